"""Compares quantization methods, glm_edge's and other projects', on one model and text.

    python -m experiments.bench.quality --text=encyclopedia.txt,books.txt \\
        --calibration_text=train.txt --digits_dir=DIR --speech_dir=DIR --out_dir=out

Quantizes the decoder of --checkpoint (default: the shipped model) by every method of
`bench/peers/methods.py`, and loads each method's effective weights into one float32 model. The same
compiled program scores all. Each file of --text is a domain, and so is the evaluation half of
CPython's help (--notext_help excludes it). Per domain, a row has the mean KL divergence from
float32 (nats) and the increase of perplexity, with 95 % intervals by the bootstrap over windows,
paired with float32's. Taps on phone screens follow, for written and spoken instructions, with KL
and the fraction of changed top-1 tokens along the float32 model's answers. Bits are those that a
method stores, including scales, zero points and headers. "packed" counts codes at their width,
since some peers pack them only in their kernels. Two rows without compression show the noise.

A model without vision, such as --checkpoint=smollm2, is measured on text only. Its weights are
already on a 4-bit grid, see `experiments/common/real_models.py`.

All methods calibrate on the same --calibration_windows of text, and on screens if the method
accepts inputs of layers. Screens, digits, speakers and text differ from those of the measurement.
Texts are the files of --calibration_text (comma-separated) and the calibration half of CPython's
help topics, with an equal number of windows each; --nocalibration_help excludes the help topics.
Each text is a domain, and so are the screens, see `glm_edge.compress.domains`.

A peer runs in a separate process and may have its own environment:

    --torchao_python=/path/to/venv/bin/python --ggml_library=/path/to/libggml-base.so

It is skipped with the reason if it is not installed: `pip install qwix`, `torchao`, `gguf` and a
build of llama.cpp's libggml-base (llama-cpp-python contains one), `ai-edge-quantizer`, `gptqmodel`,
`auto-round`. Results are in --out_dir, one JSON file per method. An interrupted run resumes, as
finished methods are not repeated; delete a file to repeat its row.
--methods='^(fp32|glm_edge|qwix)' selects rows by name. `table.md`, `report.json` and `quality.png`
show all results in the directory. Every row contains its command, commit, machine and load. The
report compares each peer's row with one row of glm_edge of at most as many packed bits, selected by
a fixed rule (`bench/peers/comparison.py`): better or worse only if the interval of the difference
of KL excludes zero.
"""

import dataclasses
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax.numpy as jnp
import numpy as np
from absl import flags

import glm_edge as ge
from experiments.bench import gathered
from experiments.bench.peers import exchange
from experiments.bench.peers.comparison import verdicts, with_intervals, without_windows
from experiments.bench.peers.methods import DECODER, METHODS, OURS, REFERENCE, Method, as_json
from experiments.bench.peers.scoring import Scorer
from experiments.bench.peers.table import INTERVAL, Columns, cells, columns_of, figure, titles
from experiments.common.child import Child, ChildError
from experiments.common.provenance import provenance_of
from glm_edge import params as boxes
from glm_edge.checkpoint.companions import read_companions
from glm_edge.cli import corpora
from glm_edge.cli.console import launch, refuse_arguments
from glm_edge.errors import DataError, OutputError
from glm_edge.tables import text_table

FLAGS = flags.FLAGS
PEERS = ("qwix", "ggml", "torchao", "ai_edge", "gptqmodel", "auto_round")


def define_flags() -> None:
    """Define this script's flags."""
    gathered.define_flags()
    flags.adopt_module_key_flags(gathered)
    flags.DEFINE_string("ggml_library", None, "Path of llama.cpp's libggml-base.so (dylib, dll).")
    for peer in PEERS:
        flags.DEFINE_string(
            f"{peer}_python", None, f"Python interpreter with {peer}; default: this one."
        )


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    chosen = chosen_methods(FLAGS.methods)
    directory = Path(FLAGS.out_dir).resolve()
    results = directory / "results"
    settings = gathered.run_settings()
    waiting = [method for method in chosen if not finished(results, method, settings)]
    if waiting:
        bench = Bench(directory, settings, waiting)
        measure(bench.run, waiting, results, columns_of(list(bench.data.windows)))
        shutil.rmtree(bench.work)
    conclude(directory, results)


def chosen_methods(pattern: str, methods: Sequence[Method] = METHODS) -> list[Method]:
    """Return the methods whose names match, and always float32.

    Raises:
      DataError: the pattern is not a regular expression, or matches nothing.
    """
    try:
        selected = [m for m in methods if m.peer == REFERENCE or re.search(pattern, m.name)]
    except re.error as error:
        raise DataError(f"--methods: {pattern!r} is not a regular expression: {error}") from error
    if not any(re.search(pattern, method.name) for method in selected):
        raise DataError(
            f"--methods: {pattern!r} matches none of {', '.join(m.name for m in methods)}"
        )
    return selected


def measure(
    run: Callable[[Method], dict[str, Any] | None],
    waiting: Sequence[Method],
    results: Path,
    columns: Columns,
) -> None:
    """Run methods; each row is printed and written before the next method starts.

    Args:
      run: function that returns the row of a method, or None if the method is not available.
      waiting: methods without a result.
      results: folder of the rows.
      columns: names of the printed columns.
    """
    for number, method in enumerate(waiting, 1):
        row = run(method)
        if row is None:
            continue
        path = results / f"{slug(method)}.json"
        corpora.write_text(path, json.dumps(row, indent=1) + "\n", overwrite=True)
        pairs = zip(titles(columns), cells(row, columns), strict=True)
        shown = [f"{title} {cell}" for title, cell in pairs]
        print(f"[{number}/{len(waiting)}] " + "; ".join(shown), flush=True)


def finished(results: Path, method: Method, settings: dict[str, Any]) -> bool:
    """Return True for a method that has a result.

    Raises:
      OutputError: the result was measured with different settings.
    """
    path = results / f"{slug(method)}.json"
    if not path.exists():
        return False
    row = json.loads(path.read_text(encoding="utf-8"))
    if row["settings"] != settings:
        names = {**settings, **row["settings"]}
        other = next(k for k in names if row["settings"].get(k) != settings.get(k))
        raise OutputError(
            f"{path}: measured with {other} {row['settings'].get(other)!r}, requested "
            f"{settings.get(other)!r}; use a different --out_dir"
        )
    return row["options"] == json.loads(as_json(method))


def slug(method: Method) -> str:
    """Return the file name of a method."""
    return re.sub(r"[^a-z0-9_.]+", "-", method.name.lower())


class Bench:
    """The model, its scorer, and the input files of peers.

    Args:
      directory: working directory.
      settings: settings that every row records.
      chosen: methods to run.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], chosen: Sequence[Method]):
        self.settings, self.work = settings, directory / "exchange"
        self.data = gathered.gather()
        self.checkpoint, self.model = self.data.checkpoint, self.data.model
        self.params = self.data.params
        texts = self.data.texts(FLAGS.calibration_windows // 8)
        screens = self.data.screens(FLAGS.calibration_screens // 4)
        self._write_calibration(texts, screens)
        if any(method.peer not in (OURS, REFERENCE) for method in chosen):
            self._write_for_peers(texts, screens)
        if any(method.calibration == "training" for method in chosen):
            self._write_training()
        self.scorer = Scorer(
            self.model, self.params, self.data.tokenizer, self.data.windows, self.data.questions
        )
        self.fp32 = self.scorer.score(self.model, self.params)

    def run(self, method: Method) -> dict[str, Any] | None:
        """Quantize by a method and score the result; return None if the peer is absent."""
        if method.calibration == "text" and self.model.config.vision is None:
            print(f"left out: {method.name}: this model reads text only", file=sys.stderr)
            return None
        start = time.perf_counter()
        quantized = {REFERENCE: self._reference, OURS: self._ours}.get(method.peer, self._peer)
        selected = quantized(method)
        if selected is None:
            return None
        model, params, meta = selected
        measured = self.scorer.score(model, params)
        return {
            "method": method.name,
            "peer": method.peer,
            "kind": method.kind,
            "calibration": method.calibration,
            "where": method.where,
            "options": method.options,
            "bits": meta["stored_bits"] / meta["weights"],
            "packed_bits": meta["packed_bits"] / meta["weights"],
            **measured,
            "text": with_intervals(measured["text"], self.fp32["text"]),
            **{key: meta.get(key) for key in ("seconds", "peak_rss_bytes", "weights")},
            "total_seconds": time.perf_counter() - start,
            "settings": self.settings,
            **run_of("bench.quality", meta.get("versions")),
        }

    def _reference(self, method: Method) -> tuple[Any, Any, dict[str, Any]]:
        return self.model, self.params, {"stored_bits": 32, "packed_bits": 32, "weights": 1}

    def _ours(self, method: Method) -> tuple[Any, Any, dict[str, Any]] | None:
        out = self.work / OURS
        data = "training" if method.calibration == "training" else "calibration"
        meta = self._quantize(
            method,
            checkpoint=str(self.checkpoint),
            calibration=str(self.work / data),
            recipe=as_json(method),
            where=method.where,
            text_only=method.calibration == "text",
            out=str(out),
        )
        return meta and (*ge.load(out, dtype="float32"), meta)

    def _peer(self, method: Method) -> tuple[Any, Any, dict[str, Any]] | None:
        options = method.options
        if method.peer == "ggml":
            options = {**options, "library": FLAGS.ggml_library}
        out, inputs = self.work / "out.npz", None
        if method.calibration != "none":
            inputs = str(self.work / f"inputs_{method.calibration}.npz")
        answer = self._quantize(
            method,
            weights=str(self.work / "weights.npz"),
            out=str(out),
            options=options,
            checkpoint=str(self.work / "hugging_face"),
            inputs=inputs,
        )
        if answer is None:
            return None
        dense, meta = exchange.read(out)
        meta |= answer
        params = boxes.map_with_path(
            lambda path, leaf: jnp.asarray(dense.get(path, leaf)), self.params
        )
        return self.model, params, meta

    def _quantize(self, method: Method, **fields: Any) -> dict[str, Any] | None:
        """Ask a peer; None, with its reason printed and its output in a log, where it fails."""
        python = None if method.peer == OURS else FLAGS[f"{method.peer}_python"].value
        try:
            module = f"experiments.bench.peers.{method.peer}"
            with Child(module, python, timeout_s=None) as child:
                answer = child.ask("quantize", **fields)
                return {**answer, "versions": child.versions or None}
        except ChildError as error:
            print(f"left out: {method.name}: {error}", file=sys.stderr, flush=True)
            log = self.work.parent / "results" / f"{slug(method)}.log"
            corpora.write_text(log, error.log, overwrite=True)
            return None

    def _write_calibration(self, texts: list[Any], screens: list[Any]) -> None:
        """Write calibration batches."""
        (self.work / "calibration").mkdir(parents=True, exist_ok=True)
        for index, batch in enumerate(gathered.alternate(texts, screens)):
            np.savez(self.work / "calibration" / f"{index:03d}.npz", **batch)

    def _write_for_peers(self, texts: list[Any], screens: list[Any]) -> None:
        """Write weights and inputs of layers for all peers."""
        leaves = dict(boxes.path_items(self.params))
        decoder = {p: np.asarray(leaves[p]) for p in boxes.select(self.params, DECODER)}
        np.savez(self.work / "weights.npz", **decoder)
        tokens = np.concatenate([batch["tokens"] for batch in texts])
        activations = [
            [self._inputs(batch, set(decoder)) for batch in part] for part in (texts, screens)
        ]
        for name, parts in (("text", activations[0]), ("both", activations[0] + activations[1])):
            rows = {path: np.concatenate([part[path] for part in parts]) for path in decoder}
            exchange.write_inputs(self.work / f"inputs_{name}.npz", rows, tokens)
        config = dataclasses.replace(
            self.model.config, vision=None, speech=None, image_token_id=None, audio_token_id=None
        )
        params = {n: self.params[n] for n in ("embed", "decoder", "head") if n in self.params}
        ge.save(
            ge.MultimodalGLM(config), params, self.work / "hugging_face", "hugging_face", True,
            {"tokenizer.json": read_companions(self.checkpoint)["tokenizer.json"]},
        )  # fmt: skip

    def _write_training(self) -> None:
        """Write batches of four rows, a fifth of them screens, for methods that train."""
        (self.work / "training").mkdir(parents=True, exist_ok=True)
        for index, batch in enumerate(gathered.training_batches(self.data)):
            np.savez(self.work / "training" / f"{index:05d}.npz", **batch)

    def _inputs(self, batch: dict[str, Any], paths: set[str]) -> dict[str, np.ndarray]:
        return gathered.sown_inputs(self.model, self.params, batch, paths)


def rows_found(results: Path, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Return the rows of the methods that have a result, in their order."""
    paths = [results / f"{slug(method)}.json" for method in methods]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def conclude(directory: Path, results: Path) -> None:
    """Write table, report and figure of all results, in the order of METHODS."""
    rows = rows_found(results, METHODS)
    columns = columns_of(list(rows[0]["text"]))
    table = text_table(titles(columns), [cells(row, columns) for row in rows])
    compared = verdicts(rows)
    titles_of_verdicts = ["peer", "glm_edge", "domain", "KL, glm_edge minus peer", "verdict"]
    lines = [
        [v["peer"], v["ours"], v["domain"], INTERVAL.format(v["difference"]), v["verdict"]]
        for v in compared
        if v["ours"]
    ]
    text = f"{table}\n\n{text_table(titles_of_verdicts, lines)}\n"
    report = {"verdicts": compared, "rows": [without_windows(row) for row in rows]}
    corpora.write_text(directory / "report.json", json.dumps(report, indent=1) + "\n", True)
    corpora.write_text(directory / "table.md", text, True)
    print(f"\n{text}")
    figure(rows, directory / "quality.png")


def run_of(
    script: str, versions: dict[str, str] | None = None, further: Sequence[str] = ()
) -> dict[str, Any]:
    """Describe the run of a row: command, seed, commit, machine, load and versions.

    Args:
      script: module of `experiments`.
      versions: versions of the peer's packages.
      further: flags of the script that affect the row, besides the shared ones.
    """
    names = ["text_tokens", "text_help", "calibration_help", "calibration_windows"]
    names += ["training_windows", "calibration_screens", "screens", "speakers", "seed", *further]
    paths = ("text", "calibration_text", "digits_dir", "speech_dir", "out_dir")
    placeholders = [f"--{name}={name.upper()}" for name in paths if FLAGS[name].value]
    if FLAGS.checkpoint:
        placeholders.insert(0, f"--checkpoint={Path(FLAGS.checkpoint).name}")
    return provenance_of(script, names, placeholders, versions)


if __name__ == "__main__":
    define_flags()
    launch(main)
