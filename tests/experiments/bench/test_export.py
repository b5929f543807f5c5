"""Runtimes beside each other: bursts, goals, and a small run of our own engines."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import glm_edge as ge
from experiments.bench.export import TOY, to_profile
from experiments.bench.runtimes import compare, profiler
from experiments.bench.runtimes.child import PAUSE_S, EngineProcess, Spec, prepare, spec_of
from experiments.bench.runtimes.compare import Burst, Quartiles
from experiments.bench.runtimes.engine import Task, step_signature
from experiments.bench.runtimes.litert import LiteRT, timed_signatures
from experiments.common.child import ChildError
from glm_edge.configs import to_dict
from glm_edge.export.common.sizes import step_name
from glm_edge.export.verify.runner import SignatureRunner

ROOT = Path(__file__).resolve().parents[3]
LENGTH, SLOTS, ATTENDED = 16, 64, (16, 32)


def task(path, form="int8", **options):
    return Task(form, str(path), to_dict(TOY), SLOTS, (8,), (LENGTH,), 1, options=options or None)


def spec(name, family, bits, python=sys.executable):
    return Spec(name, family, bits, "litert", python, task("unused"))


def test_speed_is_compared_within_a_round():
    """A slow round slows both sides; medians over all rounds would say 1.5."""
    ours = [Burst(0, 1.0), Burst(1, 10.0), Burst(2, 2.0)]
    theirs = [Burst(0, 3.0), Burst(1, 30.0), Burst(7, 3.0)]
    assert compare.speedup(ours, theirs) == Quartiles(3.0, 3.0, 3.0)
    assert compare.speedup(ours, [Burst(9, 4.0)]).median == 2.0
    assert compare.speedup(ours, []) is None


def test_goals_name_every_rival_of_the_same_bits():
    specs = [
        spec("LiteRT int4", "ours", 4),
        spec("LiteRT float16", "ours", 16),
        spec("llama.cpp Q4_0", "llama.cpp", 4),
        spec("llama.cpp Q4_K_M", "llama.cpp", 4),
        spec("llama.cpp Q8_0", "llama.cpp", 8),
        spec("onnxruntime int4-g32", "onnxruntime", 4),
    ]
    times = (1.0, 0.1, 1.3, 1.1, 0.2, 3.9)
    samples = {
        s.name: {phase: [Burst(0, t), Burst(1, t)] for phase in ("decode 8", "prefill 16")}
        for s, t in zip(specs, times, strict=True)
    }
    results = {s.name: {"weight_bytes": 60} for s in specs}
    bandwidth = {0: 100.0, 1: 80.0}
    rows = compare.goals(specs, ["decode 8", "prefill 16"], samples, results, bandwidth)
    verdicts = {(row["phase"], row["beside"]): row["reached"] for row in rows}
    assert {row["engine"] for row in rows} == {"LiteRT int4"}
    assert verdicts == {
        ("decode 8", "llama.cpp Q4_0"): True,
        ("decode 8", "llama.cpp Q4_K_M"): False,
        ("decode 8", "onnxruntime int4-g32"): True,
        ("decode 8", "bandwidth limit"): False,
        ("prefill 16", "onnxruntime int4-g32"): False,
    }
    limit = next(row["found"] for row in rows if row["beside"] == "bandwidth limit")
    assert limit[1] == pytest.approx((60 / 100 + 60 / 80) / 2)


def test_a_missing_interpreter_or_package_is_said(tmp_path):
    with pytest.raises(ChildError, match="no_python"):
        prepare(spec("absent", "ours", 8, str(tmp_path / "no_python")))
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho \'{"missing": "gguf is not installed"}\'\n')
    script.chmod(0o755)
    with pytest.raises(ChildError, match="gguf is not installed"):
        prepare(spec("absent", "ours", 8, str(script)))


def test_a_row_is_ours_in_litert_unless_told_otherwise(tmp_path):
    sizes = (TOY, SLOTS, (8,), (LENGTH,), 1)
    assert spec_of("row", "int8", "unused", *sizes) == spec("row", "ours", 0)
    other = spec_of("row", "int8", "unused", *sizes, bits=4, family="jax", python="other")
    assert other == spec("row", "jax", 4, "other")


def test_a_turn_is_a_pause_and_the_median_of_its_steps(tmp_path):
    asked, script = tmp_path / "asked", tmp_path / "python"
    answers = ['{"seconds": [3.0, 1.0, 9.0]}', '{"seconds": 5.0}']
    lines = [f"read -r line; echo \"$line\" >> {asked}; echo '{answer}'" for answer in answers]
    script.write_text("\n".join(["#!/bin/sh", "echo '{\"versions\": {}}'", *lines]) + "\n")
    script.chmod(0o755)
    engine = EngineProcess(spec("fixed", "ours", 8, str(script)))
    started = time.monotonic()
    assert engine.burst("decode", 8, 3) == 3.0
    assert time.monotonic() - started > PAUSE_S
    assert engine.burst("prefill", 16, pause_s=0.0) == 5.0
    engine.close()
    assert [json.loads(line) for line in asked.read_text().splitlines()] == [
        {"do": "decode", "context": 8, "steps": 3},
        {"do": "prefill", "length": 16},
    ]


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy_int8.tflite"
    LiteRT().prepare(task(path, attended_slots=list(ATTENDED)))
    return path


def test_what_is_timed_gives_the_scores_of_the_file(toy_file):
    tokens = np.random.default_rng(0).integers(0, TOY.decoder.vocab_size, LENGTH).astype(np.int32)
    engine = LiteRT()
    engine.load(task(toy_file, attended_slots=list(ATTENDED)))
    engine.decode(8, 2)
    engine._clear()
    engine._run(engine._embed(tokens), 0, LENGTH)
    scores = engine._step(tokens[-1], LENGTH - 1).read(TOY.decoder.vocab_size, np.float32)
    phone = ge.export.LiteRTRunner(toy_file)
    expected, _ = phone.extend(phone.embed(tokens), 0, phone.empty_cache())
    np.testing.assert_allclose(scores, expected[0], atol=1e-5 * np.abs(expected).max())


def scores_of(engine, original):
    """Scores of a prompt and of steps behind it, that cross a number of attended slots."""
    engine.load(original)
    engine.decode(3, 2)
    result, run = [], engine._run
    engine._run = lambda *arguments: result.append(run(*arguments))
    engine.prefill(LENGTH)
    engine.decode(LENGTH, 10)
    return result


def test_a_shorter_look_at_the_cache_changes_no_scores_in_jax():
    from experiments.bench.runtimes.jax_engine import Jax

    complete = scores_of(Jax(), task("", "float32"))
    short = scores_of(Jax(), task("", "float32", attended_slots=[LENGTH, 20, 32]))
    assert len(short) == 11
    for actual, expected in zip(short, complete, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_attended_slots_change_no_scores_in_onnxruntime(tmp_path):
    """A shorter look at the cache changes no scores in onnxruntime."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from experiments.bench.runtimes.onnx_engine import OnnxRuntime

    attended = {"attended_slots": [20, 32]}
    original = task(tmp_path / "toy", **attended)
    OnnxRuntime().prepare(original)
    engine = OnnxRuntime()
    short = scores_of(engine, original)
    used = {"embed", "embed_16", "decode_20", "decode_32", "prefill_16_20"}
    assert engine.sessions.keys() == used
    complete = scores_of(OnnxRuntime(), task(tmp_path / "toy"))
    for actual, expected in zip(short[1:], complete[1:], strict=True):
        actual, expected = (
            next(v.numpy() for v in b.get_outputs() if v.shape()[-1] == TOY.decoder.vocab_size)
            for b in (actual, expected)
        )
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_fastest_signature_is_chosen():
    """The fastest signature is the one that a phone model takes."""
    phone = SignatureRunner(TOY, (LENGTH,), SLOTS, attended_slots=ATTENDED)
    for length in (1, LENGTH):
        for slot in range(SLOTS - length + 1):
            attended = phone.attended(slot, length)
            expected = step_name(length, attended), attended
            assert step_signature(length, slot, reversed(ATTENDED)) == expected
    assert step_signature(1, 7, ()) == ("decode", None)


def test_the_signatures_of_a_profile_are_those_that_ran(toy_file):
    made, ran = task(toy_file, attended_slots=list(ATTENDED)), []
    engine = LiteRT()
    call = engine._call
    engine._call = lambda name, cached=False: ran.append(name) or call(name, cached)
    engine.load(made)
    bursts = {
        "decode 8": lambda: engine.decode(8, 3),
        "decode 14": lambda: engine.decode(14, 3),
        "decode 40": lambda: engine.decode(40, 3),
        f"prefill {LENGTH}": lambda: engine.prefill(LENGTH),
    }
    results = {}
    for phase, burst in bursts.items():
        ran.clear()
        burst()
        steps = [name for name in ran if not name.startswith("embed")]
        results[phase] = timed_signatures(made, phase, 3)
        assert results[phase] == list(dict.fromkeys(steps))
    assert list(results.values()) == [
        ["decode_16"],
        ["decode_16", "decode_32"],
        ["decode"],
        ["prefill_16_16", "decode_16"],
    ]


def test_what_missed_a_goal_is_profiled_or_all():
    goals = [
        {"engine": "a", "phase": "decode 8", "reached": True},
        {"engine": "b", "phase": "decode 8", "reached": False},
    ]
    rows = [{"engine": "a"}, {"engine": "b"}, {"engine": "c"}]
    log = {"goals": goals, "results": {"decode 8": rows}}
    assert to_profile(log, False) == [("b", "decode 8")]
    assert to_profile(log, True) == [(name, "decode 8") for name in "abc"]


def test_a_profile_counts_every_product_and_adds_up(toy_file):
    command = [
        sys.executable,
        "-m",
        "experiments.bench.runtimes.profiler",
        toy_file,
        "decode",
        "1",
        "5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    result = json.loads(done.stdout)
    counts = {row["operator"]: row["count"] for row in result["operators"]}
    # Query, key, value, output, gate with up, down, in two layers; and the head.
    assert sum(n for name, n in counts.items() if name.startswith("Fully Connected")) == 13
    assert counts["DYNAMIC_UPDATE_SLICE"] == 4
    total = sum(row["us"] for row in result["operators"]) + result["elsewhere_us"]
    assert total == pytest.approx(result["us"])


def test_events_of_unequal_runs_are_refused():
    events = [profiler.Event(tag=b"ADD", kind=profiler.OPERATOR, elapsed_us=1)] * 3
    with pytest.raises(RuntimeError, match="3 events do not divide into 2 runs"):
        profiler.by_operator(events, 2, 1e-6)


@pytest.mark.slow
def test_a_small_run_compares_our_engines(tmp_path):
    out, work = tmp_path / "speed.json", tmp_path / "models"
    command = [sys.executable, "-m", "experiments.bench.export", "--shape=toy", "--slots=64"]
    command += ["--contexts=8,32", "--prefill=16", "--rounds=2", "--steps=3", "--profile"]
    command += ["--attended_slots=16,48"]
    command += ["--engines=^(LiteRT int8|JAX int8|llama.cpp Q8_0)$", "--reserve_gb=0"]
    command += [f"--work_dir={work}", f"--out={out}", f"--llama_python={tmp_path / 'none'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    log = json.loads(out.read_text())
    assert list(log["results"]) == ["decode 8", "decode 32", "prefill 16"]
    for rows in log["results"].values():
        assert [row["engine"] for row in rows] == ["LiteRT int8", "JAX int8"]
        assert all(0 < row["ms"][0] <= row["ms"][1] <= row["ms"][2] for row in rows)
    assert list(log["left_out"]) == ["llama.cpp Q8_0"]
    assert {row["beside"] for row in log["goals"]} == {"bandwidth limit"}
    assert log["profiles"].keys() == {"LiteRT int8: decode_16", "LiteRT int8: decode_48"}
    command = shlex.split(log["command"])
    assert "--attended_slots=16,48" in command
    assert "--engines=^(LiteRT int8|JAX int8|llama.cpp Q8_0)$" in command
    assert log["memory_bytes"] > 1e9
    facts = log["engines"]["LiteRT int8"]
    assert facts["weight_bytes"] < facts["file_bytes"] < facts["peak_rss_bytes"]
    assert "left out: llama.cpp Q8_0" in done.stdout
    assert not list(work.iterdir())
