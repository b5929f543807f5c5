"""Values of README and of the results page are in the logs to which they link."""

import json
from pathlib import Path
from statistics import median

import pytest

from tests.experiments.documented import NUMBER, is_in, unlogged

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
DOCUMENTS = (ROOT / "README.md", RESULTS / "README.md")
# Phrases whose numbers are not measured: levels, requirements, formats, settings, claims.
STATEMENTS = (
    "95 %",
    "Python 3.11 to 3.13",
    "4 GB of memory",
    "int8 to 1.25 bits per weight",
    "337 million parameters",
    "16 sequences of 512 tokens",
    "(claimed 12, 22, 3.8)",
)
PROVENANCE = ("command", "commit", "seed", "versions", "machine", "load_average")
# What logs lack that were written before every script recorded it. A new measurement has all.
SEED_ONLY = ["seed"]
OLDER = {
    "bench_compress_edge_1_5b_gptq.json": ["commit", "seed", "machine", "load_average"],
    "bench_compress_edge_1_5b_rtn.json": ["commit", "seed", "machine", "load_average"],
    "bench_compress_glm_4_9b_rtn.json": ["commit", "seed", "machine", "load_average"],
    "bench_conversion_glm_4_9b.json": SEED_ONLY,
    "bench_conversion_glm_edge_1_5b.json": SEED_ONLY,
    "bench_conversion_mobile.json": SEED_ONLY,
    "bench_decode_bfloat16.json": SEED_ONLY,
    "bench_decode_float32.json": SEED_ONLY,
    "bench_export.json": SEED_ONLY,
    "bench_export_attended.json": SEED_ONLY,
    "bench_gptq.json": ["commit", "seed", "load_average"],
    "bench_kernels.json": SEED_ONLY,
    "bench_kernels_amx.json": SEED_ONLY,
    "bench_load.json": ["seed", "load_average"],
    "bench_pruning.json": ["command", "load_average"],
    "bench_quality.json": ["command", "load_average"],
    "nano_1000_screens.json": ["load_average"],
    "nano_ablations.json": ["commit", "versions", "machine", "load_average"],
    "time_to_action.json": SEED_ONLY,
}


def _log(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _time_to_action(name):
    """Compute medians in seconds: preparation, and a complete action at one format."""
    log = _log("time_to_action.json")["measured"]
    pairs = zip(log["prepare_s"], log["forms"][name]["runs"], strict=True)
    return median(log["prepare_s"]), median(seconds + sum(run.values()) for seconds, run in pairs)


def _quickstart_bytes(stage):
    rows = _log("quickstart.json")["rows"]
    return next(row["bytes"] for row in rows if row["stage"] == stage)


# Phrases with values that follow from a log, and what follows.
DERIVED = {
    "| int8 | 0.19 s": lambda: [_time_to_action("int8")[0]],
    "| int4 | 0.19 s": lambda: [_time_to_action("int4")[0]],
    "3.27 s": lambda: [_time_to_action("int8")[1]],
    "2.72 s": lambda: [_time_to_action("int4")[1]],
    "14.8 % of the bytes": lambda: [_quickstart_bytes("quantized") / _quickstart_bytes("dense")],
    "one of 97": lambda: [len(_log("bench_pruning.json")["rows"][-1]["hits_image"])],
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=["README", "results"])
def test_unlogged_finds_no_value_of_a_document(document):
    assert unlogged(document, (*STATEMENTS, *DERIVED)) == []


def test_unlogged_finds_values_of_no_log_or_of_another_entry(tmp_path):
    rows = [{"method": "a", "bits": 4.5, "loss": 0.0314}, {"method": "b", "bits": 8, "loss": 1e-5}]
    (tmp_path / "log.json").write_text(json.dumps({"rows": rows, "command": "run --rows=12"}))
    document = tmp_path / "README.md"
    document.write_text(
        "# A\n[log](log.json), 12 rows, int8-g32, `99`\n\n"
        "| a | 4.50 | 3.1 % |\n| b | 4.50 | 1e-05 |\n"
        "\nFrom 3.2 % to 3.14 %, in 13 s of v2.1.\n\n# B\n4.5 bits\n"
    )
    missing = [(value.section, value.text) for value in unlogged(document)]
    assert missing == [("# A", "4.50"), ("# A", "3.2"), ("# A", "13"), ("# B", "4.5")]
    assert [value.text for value in unlogged(document, ["in 13 s", "4.5 bits"])] == ["4.50", "3.2"]


@pytest.mark.parametrize("phrase", DERIVED)
def test_derived_values_follow_from_their_log(phrase):
    for match, expected in zip(NUMBER.finditer(phrase), DERIVED[phrase](), strict=True):
        assert is_in(match.group(), {expected})


def test_exempt_phrases_are_in_a_document():
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert [phrase for phrase in (*STATEMENTS, *DERIVED) if phrase not in text] == []


@pytest.mark.parametrize("log", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.name)
def test_logs_have_their_provenance(log):
    content = log.read_text(encoding="utf-8")
    missing = [name for name in PROVENANCE if f'"{name}"' not in content]
    assert missing == OLDER.get(log.name, [])


def test_older_logs_exist():
    assert [name for name in OLDER if not (RESULTS / name).exists()] == []
