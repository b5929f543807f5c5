import json
import subprocess
import sys

import numpy as np
import pytest

COMMAND = [sys.executable, "-m", "experiments.ngram_baseline"]


def run(*flags):
    return subprocess.run([*COMMAND, *flags], capture_output=True, text=True)


def test_reports_every_text_as_table_and_json(tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("The value of the expression is None.\nZürich\n", encoding="utf-8")
    out = tmp_path / "made" / "numbers.json"
    done = run(f"--eval={held_out}", f"--eval={held_out}", "--order=3", f"--out={out}")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["order"] == 3
    assert result["vocab_size"] == 2304
    assert len(result["rows"]) == 2
    row = result["rows"][0]
    assert row["bytes"] == len(held_out.read_bytes())
    bits = np.log2(row["perplexity"]) * row["tokens"]
    assert row["bits_per_byte"] == pytest.approx(bits / row["bytes"])
    assert f"{row['bits_per_byte']:.4f}" in done.stdout
    assert str(held_out) in done.stdout


@pytest.mark.parametrize(
    ("flag", "content", "expected"),
    [
        ("train", b"\xff\xfe", "byte offset 0"),
        ("eval", b"", "empty"),
        ("tokenizer", b"{}", "is no tokenizer"),
        ("train", None, "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_a_failure(tmp_path, flag, content, expected):
    path = tmp_path / "input"
    if content is not None:
        path.write_bytes(content)
    done = run(f"--{flag}={path}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert str(path) in done.stderr
