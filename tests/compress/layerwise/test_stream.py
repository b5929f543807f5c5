"""Compressing from disk to disk: the bytes of a call in memory, after any interruption."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.checkpoint import safetensors
from glm_edge.compress import chain, distill, quantize
from glm_edge.compress.distill.state import machine
from glm_edge.compress.layerwise import stream
from glm_edge.compress.layerwise.stream import compress_checkpoint, is_streamable
from glm_edge.errors import CheckpointError, DataError, OutputError, RecipeError
from tests.tiny_models import init_glm, tiny_config

ROUNDED = chain(quantize.rtn("int4-g8", where="^decoder/", scale="mse"), quantize.rtn("int8"))
CALIBRATED = chain(
    quantize.smoothquant(where="^decoder/"),
    quantize.gptq("int4-g8", where="^decoder/"),
    quantize.rtn("int8"),
)


@pytest.fixture(scope="module")
def alike():
    """A model of all parts whose matrices have few shapes, so that each is compiled for once."""
    sizes = {"hidden_size": 24, "num_heads": 3, "intermediate_size": 24}
    encoder = sizes | {"projector_size": 24}
    return init_glm(tiny_config(sizes | {"num_kv_heads": 3}, encoder, encoder, pad_token_id=0))


@pytest.fixture
def saved(alike, tmp_path):
    model, params = alike
    return ge.save(model, params, tmp_path / "source", format="safetensors")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def hidden(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_rounding_gives_the_bytes_of_a_call_in_memory(saved, tmp_path):
    report = compress_checkpoint(saved, tmp_path / "out", ROUNDED)
    model, params = ge.load(saved)
    _, expected, in_memory = ROUNDED(model, params)
    actual = boxes.to_flat(ge.load(tmp_path / "out")[1])
    arrays, spec = boxes.to_flat(expected)
    assert actual[1] == spec
    for name, array in arrays.items():
        np.testing.assert_array_equal(actual[0][name], array)
    assert report.bytes_after == in_memory.bytes_after == boxes.stored_bytes(expected)
    assert {row.path for row in report.rows} == {row.path for row in in_memory.rows}
    assert hidden(tmp_path) == []


def test_compress_checkpoint_equals_a_call_in_memory(saved, batch_of, tmp_path):
    """One calibrated transform gives the bytes of a call in memory."""
    transform = quantize.gptq("int4-g8", where="^decoder/.*(q_proj|down_proj)")
    model, params = ge.load(saved)
    batches = [batch_of(model, seed=seed) for seed in range(2)]
    compress_checkpoint(saved, tmp_path / "out", transform, batches)
    _, expected, _ = transform(model, params, batches)
    actual = boxes.to_flat(ge.load(tmp_path / "out")[1])[0]
    for name, array in boxes.to_flat(expected)[0].items():
        np.testing.assert_array_equal(actual[name], array)


@pytest.mark.parametrize("name", ["edge", "glm4", "asr"])
def test_hugging_face_directories_are_read(make_member, name, tmp_path):
    model, params = make_member(name)
    source = ge.save(model, params, tmp_path / "source", format=None)
    compress_checkpoint(source, tmp_path / "out", quantize.rtn("int8"))
    after, compressed = ge.load(tmp_path / "out")
    assert after.config == model.config
    results = {path for path, leaf in boxes.path_items(compressed) if boxes.is_box(leaf)}
    assert results == set(boxes.select(params, None))


def job(source, output, batches, ready):
    """What a child process runs until it is killed; compiled programs outlive it."""
    jax.config.update("jax_compilation_cache_dir", str(output.parent / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    ready.set()
    compress_checkpoint(source, output, CALIBRATED, batches, rng=jax.random.key(3))


def run_in_child(context, source, output, batches, seconds=None) -> tuple[bool, float]:
    """Runs the job, killed after so many seconds; whether it was, and the seconds it took."""
    ready = context.Event()
    child = context.Process(target=job, args=(source, output, batches, ready))
    child.start()
    ready.wait()
    started = time.monotonic()
    child.join(seconds)
    killed = child.is_alive()
    if killed:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    return killed, time.monotonic() - started


@pytest.mark.slow
def test_compress_checkpoint_killed_at_random_points(saved, batch_of, tmp_path):
    """Killed at twenty random points the result has the same bytes."""
    model, _ = ge.load(saved)
    batches = [batch_of(model, seed=seed) for seed in range(2)]
    # Every run is a fresh process: this one compiles with other options, and the last digits of an
    # error depend on that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["glm_edge.compress.layerwise.stream", "glm_edge.compress"])
    run_in_child(context, saved, tmp_path / "whole", batches)
    expected = contents(tmp_path / "whole")
    _, took = run_in_child(context, saved, tmp_path / "again", batches)
    rng, output, kills, resumed = np.random.default_rng(0), tmp_path / "out", 0, 0
    while kills < 20:
        kills += run_in_child(context, saved, output, batches, rng.uniform(0.0, took))[0]
        partial = tmp_path / ".out.partial"
        resumed += partial.exists() and any(partial.glob("*.safetensors"))
        if output.exists():
            assert contents(output) == expected
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
    assert resumed > 0
    run_in_child(context, saved, output, batches)
    assert contents(output) == expected
    assert hidden(tmp_path) == []


def stop_after(count: int, monkeypatch, error: Exception):
    """Makes the `count`-th file of arrays fail."""
    from glm_edge.compress.layerwise import stream

    written = []

    def write(path, arrays, metadata=None):
        written.append(path)
        if len(written) == count:
            path.write_bytes(b"half a file")
            raise error
        safetensors.write_safetensors(path, arrays, metadata)

    monkeypatch.setattr(stream, "write_safetensors", write)


@pytest.mark.parametrize("count", [1, 5, 9])
def test_compress_checkpoint_on_a_full_disk(saved, tmp_path, monkeypatch, count):
    """A full disk leaves nothing that loads and can be finished."""
    with monkeypatch.context() as patch:
        stop_after(count, patch, OSError(28, "No space left on device"))
        with pytest.raises(OutputError, match="No space left on device"):
            compress_checkpoint(saved, tmp_path / "out", ROUNDED)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        ge.load(tmp_path / ".out.partial")
    compress_checkpoint(saved, tmp_path / "out", ROUNDED)
    compress_checkpoint(saved, tmp_path / "whole", ROUNDED)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_finished_stages_are_not_computed_again(saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(6, patch, OSError(28, "No space left on device"))
        with pytest.raises(OutputError):
            compress_checkpoint(saved, tmp_path / "out", ROUNDED)
    rounded = []
    kernel = quantize.rtn.compress_stage.__globals__["quantize_leaf"]
    monkeypatch.setitem(
        quantize.rtn.compress_stage.__globals__,
        "quantize_leaf",
        lambda path, *others, **options: rounded.append(path) or kernel(path, *others, **options),
    )
    report = compress_checkpoint(saved, tmp_path / "out", ROUNDED)
    assert 0 < len(rounded) < len(report.rows)


def test_other_arguments_do_not_finish_a_run(saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(3, patch, OSError(28, "No space left on device"))
        with pytest.raises(OutputError):
            compress_checkpoint(saved, tmp_path / "out", ROUNDED)
    with pytest.raises(OutputError, match="unfinished run with another recipe"):
        compress_checkpoint(saved, tmp_path / "out", quantize.rtn("int8"))
    os.utime(saved / safetensors.WEIGHTS)
    with pytest.raises(OutputError, match="unfinished run with another source"):
        compress_checkpoint(saved, tmp_path / "out", ROUNDED)


def test_the_report_lies_beside_the_weights(saved, tmp_path):
    report = compress_checkpoint(saved, tmp_path / "out", ROUNDED)
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["bytes_after"] == report.bytes_after
    assert len(stored["rows"]) == len(report.rows)


def test_extras_are_copied(saved, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    extras = {"tokenizer.json": tmp_path / "tokenizer.json"}
    compress_checkpoint(saved, tmp_path / "out", ROUNDED, extras=extras)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (
            distill(train=ge.TrainOptions(steps=1)),
            RecipeError,
            "distill needs the whole model in memory",
        ),
        (chain(), RecipeError, "the recipe is empty"),
        (quantize.rtn("int4-g7"), RecipeError, "do not divide into groups of 7"),
        (quantize.rtn("int8", where="banana"), RecipeError, "matches none"),
        (
            chain(quantize.rtn("int4", where="^decoder/"), quantize.rtn("int8", where="o_proj")),
            RecipeError,
            "quantized by an earlier transform already",
        ),
        (CALIBRATED, DataError, "needs calibration= batches"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(saved, tmp_path, recipe, error, message):
    with pytest.raises(error, match=message):
        compress_checkpoint(saved, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_only_stage_wise_recipes_stream():
    assert is_streamable(ROUNDED)
    assert not is_streamable(chain(ROUNDED, distill(train=ge.TrainOptions(steps=1))))


def test_an_existing_output_is_kept(saved, tmp_path):
    compress_checkpoint(saved, tmp_path / "out", ROUNDED)
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="exists and is not empty"):
        compress_checkpoint(saved, tmp_path / "out", quantize.rtn("int8"))
    assert contents(tmp_path / "out") == before
    compress_checkpoint(saved, tmp_path / "out", quantize.rtn("int8"), overwrite=True)
    assert contents(tmp_path / "out") != before


def test_extras_stay_inside_the_output(saved, tmp_path):
    for name in ("../escaped.txt", "..", "a/b", "", "config.json", "model-00001.safetensors"):
        with pytest.raises(OutputError, match="must be a plain name"):
            compress_checkpoint(saved, tmp_path / "out", ROUNDED, extras={name: b"x"})
    missing = {"a": tmp_path / "missing.txt"}
    with pytest.raises(CheckpointError, match=r"missing.txt: cannot be read"):
        compress_checkpoint(saved, tmp_path / "out", ROUNDED, extras=missing)
    assert not (tmp_path / "escaped.txt").exists()
    assert hidden(tmp_path) == []


def test_a_run_of_another_machine_is_not_taken_up(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"")
    job = {"source": "a", "machine": machine()}
    other = {**job, "machine": {**job["machine"], "cores": 512, "jaxlib": "0.0.1"}}
    (partial / "job.json").write_text(json.dumps(other))
    with pytest.raises(OutputError, match=r"another machine \(cores 512, now \d+; jaxlib 0\.0\.1"):
        stream._check_job(partial, tmp_path / "out", job)
    (partial / "job.json").write_text(json.dumps(job))
    stream._check_job(partial, tmp_path / "out", job)


def test_fixed_order_names_what_no_core_changes():
    assert stream.fixed_order(ROUNDED)
    assert stream.fixed_order(quantize.gptq("int4-g32"))
    assert not stream.fixed_order(quantize.gptq("int4-g32", solver={"sweeps": 0}))
    assert not stream.fixed_order(quantize.rtn("int8-tensor"))
    assert not stream.fixed_order(CALIBRATED)


RUN = """
import sys
import numpy as np
import glm_edge as ge
from glm_edge.compress.layerwise import stream

source, out, stop = sys.argv[1:]
write = stream._write_stage

def stopping(partial, file, leaves, rows):
    spec = write(partial, file, leaves, rows)
    if stop in file:
        sys.exit(9)
    return spec

batches = [{"tokens": np.random.default_rng(i).integers(1, 40, (2, 24))} for i in range(3)]
recipe = ge.chain(
    ge.quantize.gptq("int4-g8", where="^decoder/.*mlp"),
    ge.quantize.gptq("int3", where="^decoder/.*attention"),
)
if stop != "-":
    stream._write_stage = stopping
lacking = {"without": ["images", "audio"]}
ge.compress_checkpoint(source, out, recipe, calibration=batches, compute="float32", **lacking)
"""


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_gptq_gives_the_same_bytes_on_any_number_of_cores(make_member, tmp_path):
    model, params = make_member("nano")
    source = ge.save(model, params, tmp_path / "source", format="safetensors")
    cores = sorted(os.sched_getaffinity(0))

    def run(name: str, used: list[int], stop: str = "-") -> int:
        program = f"import os; os.sched_setaffinity(0, {used}); exec({RUN!r})"
        arguments = [sys.executable, "-c", program, str(source), str(tmp_path / name), stop]
        return subprocess.run(arguments, check=False).returncode

    assert run("many", cores) == run("one", cores[:1]) == 0
    assert run("mixed", cores, "00002") == 9
    assert run("mixed", cores[:1]) == 0
    results = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("many", "one", "mixed")
    ]
    assert results[0]
    assert results[0] == results[1] == results[2]
