"""Times GPTQ of a decoder of 337 M parameters, compared with GPTQModel on the same checkpoint.

    python -m experiments.bench.gptq --work_dir=DIR --gptqmodel_python=PYTHON --out=FILE.json

The checkpoint is a random decoder of width 1024 with 20 layers, 16 query and 4 key/value heads of
64, and a tied vocabulary of 32,000. Calibration uses 16 random sequences of 512 tokens, and the
decoder's matrices are rounded to int4 in groups of 32. The tools run one after the other in
separate processes, loading and saving included; each takes 6 to 13 minutes on two cores. GPTQModel
runs in the environment of --gptqmodel_python (pip install gptqmodel torch transformers); without
the flag, only glm_edge is timed. `python -m experiments.bench.quality` measures quality.

Two settings of glm_edge are timed. `plain` is the published algorithm, as in GPTQModel. `gptq`, the
default, also compensates for input error, searches scales, and refines codes by coordinate descent.
The results are fractions of GPTQModel's seconds. `stages` are the seconds of glm_edge's steps,
compilation included.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import glm_edge as ge
from experiments.common.provenance import peers_of, provenance_of
from experiments.golden import make_checkpoint
from glm_edge.cli.console import launch, print_table, refuse_arguments
from glm_edge.cli.corpora import write_text
from glm_edge.errors import DataError

FLAGS = flags.FLAGS
SEQUENCES, LENGTH = 16, 512
TOKENS = "tokens.npz"
MOBILE = make_checkpoint.CONFIGS["glm_edge_1_5b"] | {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "eos_token_id": [1],
    "pad_token_id": 0,
}
_FORMAT, _WHERE = "int4-g32", r"^decoder/"
OURS = {
    "gptq": ge.quantize.gptq(_FORMAT, where=_WHERE),
    "plain": ge.quantize.gptq(
        _FORMAT,
        where=_WHERE,
        scale="max",
        solver=ge.compress.SolverOptions(
            act_order=False, propagate=0.0, refit=False, sweeps=0, shrinkage=0.0
        ),
    ),
}
# `experiments.compress`, which also writes the seconds of its steps to the first argument. It is
# imported first, since it sets the environment of numerical libraries.
CHILD = """
import json, sys
from experiments import compress as command
from glm_edge.cli import compress
from glm_edge.cli.console import launch
from glm_edge.compress import timing
path, sys.argv = sys.argv[1], ["compress", *sys.argv[2:]]
command.define_flags()
with timing.recorded() as seconds:
    try:
        launch(compress.main)
    finally:
        with open(path, "w") as file:
            json.dump(seconds, file)
"""
# Columns of the table; `rest` includes loading, saving and errors.
STAGES = ("forward", "Gram", "factor", "rounding", "descent", "rest")
PEER = """
import sys, time
started = time.monotonic()
import numpy as np, torch
from gptqmodel import GPTQModel, QuantizeConfig
source, tokens, out = sys.argv[1:]
rows = torch.from_numpy(np.load(tokens)["tokens"]).long()
batch = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
config = QuantizeConfig(bits=4, group_size=32, offload_to_disk=False, device="cpu")
model = GPTQModel.load(source, config, dtype=torch.float32)
model.quantize(batch, batch_size=4)
model.save(out)
print("seconds", time.monotonic() - started)
"""


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string("work_dir", None, "Working directory for the checkpoint.", required=True)
    flags.DEFINE_string("gptqmodel_python", None, "Python interpreter with GPTQModel.")
    flags.DEFINE_multi_enum(
        "settings", list(OURS), list(OURS), "Setting of glm_edge; repeat the flag for more."
    )
    flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "Arithmetic of glm_edge.")
    flags.DEFINE_string("out", None, "JSON file for the results.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    work = Path(FLAGS.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    source = work / "mobile_decoder"
    if not source.is_dir():
        make_checkpoint.write(MOBILE, str(source), 2e9, seed=0)
        _write_tokenizer(source)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, MOBILE["vocab_size"], (SEQUENCES, LENGTH), dtype=np.int32)
    np.savez(work / TOKENS, tokens=tokens)
    runs = [ours(work, source, name) for name in FLAGS.settings]
    if FLAGS.gptqmodel_python:
        runs.append(peer(work, source))
    by_name: dict[str, list[float]] = {}
    for run in runs:
        by_name.setdefault(run["tool"], []).append(run["seconds"])
    summary: dict[str, Any] = {"runs": runs}
    if "GPTQModel" in by_name:
        (theirs,) = by_name["GPTQModel"]
        summary["of_gptqmodel"] = {
            name: [seconds / theirs for seconds in by_name[name]] for name in FLAGS.settings
        }
    summary |= {
        **provenance_of(
            "bench.gptq", ("compute",), ["--work_dir=DIR", *peers_of(("gptqmodel",))], seed=0
        ),
        "compute": FLAGS.compute,
    }
    print_table(
        ["tool", "seconds", *STAGES, "peak RSS"],
        [
            [
                run["tool"],
                f"{run['seconds']:.0f}",
                *(f"{run['stages'][stage]:.0f}" if "stages" in run else "" for stage in STAGES),
                run.get("peak_rss_bytes", ""),
            ]
            for run in runs
        ],
    )
    if FLAGS.out:
        write_text(FLAGS.out, json.dumps(summary, indent=1) + "\n", overwrite=True)
    for name, ratios in summary.get("of_gptqmodel", {}).items():
        print(f"{name}: {', '.join(f'{ratio:.2f}' for ratio in ratios)} of GPTQModel's time")


def _write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with one word per id, which GPTQModel needs to load a checkpoint."""
    words = {f"w{i}": i for i in range(MOBILE["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "w0", "eos_token": "w1"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")


def ours(work: Path, source: Path, name: str) -> dict[str, Any]:
    """Time one setting of glm_edge, including loading and saving."""
    recipe = work / f"{name}.json"
    recipe.write_text(ge.to_json(OURS[name]), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=work) as out:
        steps = Path(out) / "steps.json"
        command = [sys.executable, "-c", CHILD, steps, "--checkpoint", source]
        command += [
            "--recipe",
            recipe,
            "--calibration",
            work / TOKENS,
            "--out_dir",
            Path(out) / "compressed",
        ]
        command += [f"--compute={FLAGS.compute}"]
        started = time.monotonic()
        _run(command, name)
        seconds = time.monotonic() - started
        report = json.loads((Path(out) / "compressed" / "report.json").read_text(encoding="utf-8"))
        stages = json.loads(steps.read_text(encoding="utf-8"))
    stages["rest"] = seconds - sum(stages.values())
    return {
        "tool": name,
        "seconds": seconds,
        "stages": {stage: stages.get(stage, 0.0) for stage in STAGES},
        "peak_rss_bytes": report["peak_rss_bytes"],
    }


def peer(work: Path, source: Path) -> dict[str, Any]:
    """Time GPTQModel, including loading and saving."""
    out = work / "gptqmodel"
    shutil.rmtree(out, ignore_errors=True)
    command = [FLAGS.gptqmodel_python, "-c", PEER, *map(Path.resolve, (source, work / TOKENS, out))]
    started = time.monotonic()
    # On two cores it starts one worker but then requests two. It writes a log to the current
    # directory.
    _run(command, "GPTQModel", env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}, cwd=work)
    seconds = time.monotonic() - started
    shutil.rmtree(out, ignore_errors=True)
    return {"tool": "GPTQModel", "seconds": seconds}


def _run(command: Sequence[Any], name: str, **options: Any) -> None:
    done = subprocess.run(list(map(str, command)), check=False, **options)
    if done.returncode:
        raise DataError(f"{name}: the run failed; see its message above")


if __name__ == "__main__":
    define_flags()
    launch(main)
