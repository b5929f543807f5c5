"""Damaged files, full disks and interrupted exports: an error, and nothing half whole."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest

from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import DataError, ExportError, OutputError
from glm_edge.export.common import parsing
from glm_edge.export.delegates.compatibility import Compatibility, compatibility
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.flatbuffer import FlatModel
from glm_edge.export.verify.litert_runner import LiteRTRunner
from glm_edge.export.verify.worker import InterpreterProcess, RemoteArray
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format

BYTE_MUTATIONS, INDEX_MUTATIONS = 440, 60
SMALL_BUFFER = 64


@pytest.fixture(scope="module")
def exported(small_config, random_params, quantize, mapped, tmp_path_factory):
    """A text model of two signatures, in blocks, at 4 bits and at 8."""
    decoder = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 96}
    config = small_config(**decoder, num_layers=2, vocab_size=64)
    config = dataclasses.replace(
        config, vision=None, speech=None, image_token_id=None, audio_token_id=None
    )
    model = MultimodalGLM(config)

    def rule(path, leaf):
        if not boxes.is_matrix(path, leaf):
            return leaf
        blocks = Format("int4", 32, scale_dtype="bfloat16")
        form = blocks if "layers/0" in path else Format("int4" if "mlp" in path else "int8")
        return quantize(leaf, form)

    params = mapped(rule, random_params(model))
    path = tmp_path_factory.mktemp("damaged") / "whole.tflite"
    return export.tflite(model, params, path, (), 16, forced_lengths=())


@pytest.fixture(scope="module")
def structure(exported):
    """Positions of bytes that are not values of a large weight."""
    with tflite_file.opened(exported.path) as (model, content):
        positions = np.ones(len(content), bool)
        start = content.__array_interface__["data"][0]
        for index in range(model.BuffersLength()):
            if model.Buffers(index).DataLength() > SMALL_BUFFER:
                data = model.Buffers(index).DataAsNumpy()
                at = data.__array_interface__["data"][0] - start
                positions[at : at + len(data)] = False
    return np.flatnonzero(positions)


def with_other_bytes(complete: bytes, structure: np.ndarray, seed: int) -> bytes:
    """A file cut short, with flipped bits, with overwritten words, or with a piece elsewhere."""
    rng, content = np.random.default_rng(seed), bytearray(complete)
    if seed % 4 == 0:
        return bytes(content[: rng.integers(0, len(content))])
    if seed % 4 == 1:
        for at in rng.choice(structure, rng.integers(1, 9)):
            content[at] ^= 1 << int(rng.integers(8))
    elif seed % 4 == 2:
        for at in rng.choice(structure, rng.integers(1, 4)) // 4 * 4:
            words = (
                0,
                0xFFFFFFFF,
                0x7FFFFFFF,
                0x80000000,
                rng.integers(64),
                rng.integers(len(complete)),
            )
            content[at : at + 4] = int(rng.choice(words)).to_bytes(4, "little")
    else:
        source, target = rng.choice(structure, 2)
        size = int(rng.integers(4, 64))
        content[target : target + size] = content[source : source + size]
    return bytes(content)


def with_other_indices(content: bytes, seed: int):
    """A graph whose indices all point to something, but to the wrong thing."""
    rng, model = np.random.default_rng(seed), FlatModel(content).model
    graph = model.subgraphs[rng.integers(len(model.subgraphs))]
    operator = graph.operators[rng.integers(len(graph.operators))]
    tensor = graph.tensors[rng.integers(len(graph.tensors))]
    if seed % 5 == 0:
        operator.inputs = np.array(operator.inputs)
        operator.inputs[rng.integers(len(operator.inputs))] = rng.integers(-1, len(graph.tensors))
    elif seed % 5 == 1:
        operator.outputs = np.array([rng.integers(len(graph.tensors))], np.int32)
    elif seed % 5 == 2:
        operator.opcodeIndex = int(rng.integers(len(model.operatorCodes)))
    elif seed % 5 == 3:
        tensor.buffer = int(rng.integers(len(model.buffers)))
    elif tensor.shape is not None and len(tensor.shape):
        tensor.shape = np.array(tensor.shape)
        tensor.shape[rng.integers(len(tensor.shape))] = rng.choice([0, 1, 3, 1 << 20])
    return model


def outcome(path, exported) -> tuple[str, str]:
    """What `compatibility` and `verify` say of a file: `refused`, or the answer."""
    message, errors = [], []
    for ask in (
        lambda: compatibility(path),
        lambda: export.verify(path, exported.model, exported.params, windows(), free_running=0),
    ):
        try:
            message.append(ask())
        except ExportError as error:
            message.append("refused")
            errors.append(str(error))
    assert all(str(path) in error and "\n" not in error for error in errors)
    table, verification = message
    assert table == "refused" or (isinstance(table, Compatibility) and table.rows and str(table))
    assert verification == "refused" or verification.passed
    return tuple("refused" if answer == "refused" else "answered" for answer in message)


def windows() -> list[export.Window]:
    return [export.Window(np.arange(3, 11, dtype=np.int32))]


@pytest.mark.slow
def test_500_damaged_files_are_refused_or_answered_rightly(exported, structure, tmp_path):
    complete, path = exported.path.read_bytes(), tmp_path / "a.tflite"
    path.write_bytes(complete)
    assert outcome(path, exported) == ("answered", "answered")
    observed = set()
    for seed in range(BYTE_MUTATIONS):
        path.write_bytes(with_other_bytes(complete, structure, seed))
        result = outcome(path, exported)
        observed.add(result)
        assert result == ("refused", "refused") or seed % 4
    for seed in range(INDEX_MUTATIONS):
        tflite_file.write(with_other_indices(complete, seed), path, overwrite=True)
        observed.add(outcome(path, exported))
    # Files that only running shows to be damaged are among them, and harmless changes.
    assert observed >= {("refused", "refused"), ("answered", "refused"), ("answered", "answered")}


def described(exported, tmp_path, **fields):
    """The file with other fields in its description."""
    graph = FlatModel(exported.path.read_bytes())
    graph.add_metadata({**export.read_metadata(exported.path), **fields})
    tflite_file.write(graph.model, tmp_path / "a.tflite", overwrite=True)
    return tmp_path / "a.tflite"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": {}}, "its description"),
        ({"config": None}, "its description"),
        ({"cache_slots": 10**15}, "its description: cache_slots=1000000000000000: must be"),
        ({"cache_slots": "many"}, "its description: cache_slots: 'many' is not a fixed length"),
        ({"prefill_lengths": [2, 4]}, r"prefill lengths \[2, 4\]"),
        ({"prefill_lengths": 7}, "its description"),
        ({"forced_lengths": [2]}, r"forced lengths \[2\]"),
    ],
    ids=str,
)
def test_a_description_that_lies_is_refused(fields, message, exported, tmp_path):
    path = described(exported, tmp_path, **fields)
    with pytest.raises(ExportError, match=message):
        export.verify(path, exported.model, exported.params, windows())


@pytest.mark.parametrize(
    ("field", "value"), [("num_layers", 10**9), ("vocab_size", 65), ("hidden_size", 128)]
)
def test_a_description_of_another_model_is_refused(field, value, exported, tmp_path):
    config = export.read_metadata(exported.path)["config"]
    config["decoder"][field] = value
    with pytest.raises(ExportError, match="its description"):
        LiteRTRunner(described(exported, tmp_path, config=config), isolated=True)


def test_a_description_of_nested_lists_is_refused(exported, tmp_path):
    path = described(exported, tmp_path, padding="x" * 200_000)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"' + b"x" * 200_000 + b'"', b"[" * 200_002))
    with pytest.raises(ExportError, match="damaged TFLite file"):
        export.read_metadata(path)


def test_endless_lists_are_refused(exported, monkeypatch):
    monkeypatch.setattr(parsing, "MAX_ENTRIES", 50)
    with pytest.raises(ExportError, match="lists with more than 50 entries"):
        compatibility(exported.path)


def test_a_file_of_another_model_is_not_verified(exported):
    other = exported.model.clone(
        config=dataclasses.replace(exported.model.config, eos_token_ids=(1, 2))
    )
    with pytest.raises(ExportError, match="contains a different model"):
        export.verify(exported.path, other, exported.params, windows())


def test_child_process_equals_the_interpreter(exported):
    """A child gives the bits of the interpreter and keeps the cache."""
    near, far = LiteRTRunner(exported.path), LiteRTRunner(exported.path, isolated=True)
    tokens = np.arange(3, 9)
    np.testing.assert_array_equal(far.score(tokens), near.score(tokens))
    assert far.generate(tokens, max_new_tokens=6) == near.generate(tokens, max_new_tokens=6)
    _, there = far.extend(far.embed(tokens), 0, far.empty_cache())
    _, current = near.extend(near.embed(tokens), 0, near.empty_cache())
    assert all(isinstance(array, RemoteArray) for array in there.values())
    for name, array in current.items():
        np.testing.assert_array_equal(np.asarray(there[name]), array)
    with pytest.raises(DataError, match="tokens must be int32"):
        far.run("embed", tokens=np.zeros((1, 2), np.int32))
    far.close()
    with pytest.raises(ExportError, match="its process has ended"):
        far.score(tokens)


def test_the_death_of_a_child_is_an_error(exported):
    model = LiteRTRunner(exported.path, isolated=True)
    os.kill(model._worker._process.pid, signal.SIGKILL)
    with pytest.raises(
        ExportError, match=r"process crashed when asked to run embed \(signal SIGKILL"
    ):
        model.score(np.arange(3))


def test_a_child_that_does_not_answer_is_ended(exported):
    child = InterpreterProcess(exported.path, timeout=1.0)
    process = child._process
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ExportError, match="did not run embed within 1 s"):
        child.run("embed", {"tokens": np.zeros((1, 1), np.int32)})
    assert process.poll() is not None


def test_what_libraries_print_does_not_disturb_the_answers(exported, tmp_path):
    from glm_edge.export.verify import worker_main

    script = f"""
        import os, runpy, sys
        import numpy as np
        sys.argv = [{worker_main.__file__!r}]
        host = runpy.run_path(sys.argv[0], run_name="host")
        load = host["Worker"]._load
        def loud(self, *arguments):
            os.write(1, b"printed" * 1000)
            load(self, *arguments)
        host["Worker"]._load = loud
        host["main"]()
    """
    loud = tmp_path / "loud.py"
    loud.write_text(textwrap.dedent(script))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_main, "__file__", str(loud))
        child = InterpreterProcess(exported.path)
    outputs = child.run("embed", {"tokens": np.zeros((1, 1), np.int32)})
    assert outputs["embeddings"].shape == (1, 1, 64)


def test_a_full_disk_is_found_before_anything_is_done(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**4))
    with pytest.raises(OutputError, match=r"needs 0\.0 GB, 0\.0 GB are free") as caught:
        export.tflite(exported.model, exported.params, tmp_path / "a.tflite", prefill_lengths=())
    assert "\n" not in str(caught.value)
    graph = FlatModel(exported.path.read_bytes()).model
    with pytest.raises(OutputError, match="make room"):
        tflite_file.write(graph, tmp_path / "a.tflite", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_what_was_there(exported, tmp_path, monkeypatch):
    graph, target = FlatModel(exported.path.read_bytes()).model, tmp_path / "a.tflite"
    target.write_bytes(b"before")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tflite_file.write(graph, target, overwrite=True)
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_export_leaves_nothing_that_looks_whole(exported, tmp_path):
    script = f"""
        import os, time
        from pathlib import Path
        from glm_edge.export.tflite import file as tflite_file
        from glm_edge.export.tflite.flatbuffer import FlatModel
        os.fsync = lambda _: time.sleep(60)
        graph = FlatModel(Path({str(exported.path)!r}).read_bytes()).model
        tflite_file.write(graph, Path({str(tmp_path / "a.tflite")!r}), overwrite=False)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "JAX_PLATFORMS": "cpu"}
    ) as process:
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size for p in tmp_path.iterdir()) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.tflite"))
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    # What is left hinders nobody, and the next export removes it.
    graph = FlatModel(exported.path.read_bytes()).model
    tflite_file.write(graph, tmp_path / "a.tflite", overwrite=False)
    compatibility(tmp_path / "a.tflite")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tflite"]
