"""Compares quantization methods, glm_edge's and other projects', on one model and text.

    python -m experiments.bench.quality --text=wt103_valid.txt \\
        --calibration_text=wt103_train_head.txt --digits_dir=DIR --speech_dir=DIR --out_dir=out

Quantizes the decoder of --checkpoint (default: the shipped model) by every method of
`bench/peers/methods.py`, and loads each method's effective weights into one float32 model. The same
compiled program scores all: perplexity of --text, taps on phone screens for written and spoken
instructions, and, per modality, the mean KL divergence from float32 (nats) and the fraction of
changed top-1 tokens (for questions: along the float32 model's answers). Bits are those that a
method stores, including scales, zero points and headers. "packed" counts codes at their width,
since some peers pack them only in their kernels. Two rows without compression show the noise.

A model without vision, such as --checkpoint=smollm2, is measured on text only. Its weights are
already on a 4-bit grid, see `experiments/common/real_models.py`.

All methods calibrate on the same --calibration_windows of --calibration_text, and on screens if the
method accepts inputs of layers. Screens, digits, speakers and text differ from those of the
measurement. Without --calibration_text, --text is split: a third for calibration, the rest for the
measurement.

A peer runs in a separate process and may have its own environment:

    --torchao_python=/path/to/venv/bin/python --ggml_library=/path/to/libggml-base.so

It is skipped with the reason if it is not installed: `pip install qwix`, `torchao`, `gguf` and a
build of llama.cpp's libggml-base (llama-cpp-python contains one), `ai-edge-quantizer`, `gptqmodel`,
`auto-round`. Results are in --out_dir, one JSON file per method. An interrupted run resumes, as
finished methods are not repeated; delete a file to repeat its row.
--methods='^(fp32|glm_edge|qwix)' selects rows by name. `table.md`, `report.json` and `quality.png`
show all results in the directory. The script also lists the peers' rows whose perplexity no row of
glm_edge matches with at most as many packed bits.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import glm_edge as ge
from experiments.bench.peers import exchange
from experiments.bench.peers.methods import DECODER, METHODS, OURS, REFERENCE, Method, as_json
from experiments.bench.peers.scoring import Scorer
from experiments.bench.peers.table import COLUMNS, Columns, cells, figure, titles, unreached
from experiments.common import calibration_data, eval_data, tap_items
from experiments.common.child import Child, ChildError
from experiments.common.provenance import commit, machine
from glm_edge import params as boxes
from glm_edge.checkpoint.companions import read_companions
from glm_edge.cli import corpora
from glm_edge.cli.checkpoints import CHECKPOINT_HELP, NANO, checkpoint_of
from glm_edge.cli.console import launch, refuse_arguments
from glm_edge.cli.loss import WINDOW
from glm_edge.cli.run import versions as package_versions
from glm_edge.compress.batches import INPUTS
from glm_edge.errors import DataError, OutputError
from glm_edge.tables import text_table

FLAGS = flags.FLAGS
PEERS = ("qwix", "ggml", "torchao", "ai_edge", "gptqmodel", "auto_round")


def define_flags() -> None:
    """Define this script's flags."""
    define_shared_flags()
    flags.DEFINE_string("ggml_library", None, "Path of llama.cpp's libggml-base.so (dylib, dll).")
    for peer in PEERS:
        flags.DEFINE_string(
            f"{peer}_python", None, f"Python interpreter with {peer}; default: this one."
        )


def define_shared_flags() -> None:
    """Define the flags of measurement, calibration and selection."""
    flags.DEFINE_string(
        "out_dir", None, "Output directory, with one JSON file per method.", required=True
    )
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_string("text", None, "UTF-8 file for the measurement.", required=True)
    flags.DEFINE_string("calibration_text", None, "UTF-8 file for calibration.")
    flags.DEFINE_integer("text_tokens", 60000, "Maximum number of tokens to score.", 512)
    flags.DEFINE_integer("calibration_windows", 64, "Number of calibration windows of text.", 8)
    flags.DEFINE_integer(
        "training_windows", 4800, "Number of training windows of text for trained rows.", 8
    )
    flags.DEFINE_integer(
        "calibration_screens", 32, "Number of calibration screens, with several questions each.", 4
    )
    flags.DEFINE_integer("screens", 200, "Number of measured questions of each kind.", 1)
    flags.DEFINE_string(
        "digits_dir",
        None,
        "Folder of MNIST files for the keys of screens; default: scikit-learn's digits.",
    )
    flags.DEFINE_string("speech_dir", None, "Folder of spoken digits.")
    flags.DEFINE_list("speakers", [], "Speakers of --speech_dir to use; default: all.")
    flags.DEFINE_string("methods", "", "Regular expression; runs the methods whose names match.")
    flags.DEFINE_integer("seed", 0, "Seed of screens and questions.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    chosen = chosen_methods(FLAGS.methods)
    directory = Path(FLAGS.out_dir).resolve()
    results = directory / "results"
    settings = run_settings()
    waiting = [method for method in chosen if not finished(results, method, settings)]
    if waiting:
        bench = Bench(directory, settings, waiting)
        measure(bench.run, waiting, results, COLUMNS)
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


def run_settings() -> dict[str, Any]:
    """Return the settings that all rows of a table share, with a checksum of the text."""
    names = ("text_tokens", "calibration_windows", "calibration_screens", "screens", "seed")
    settings: dict[str, Any] = {name: FLAGS[name].value for name in names}
    for name in ("text", "calibration_text"):
        path = FLAGS[name].value
        settings[name] = path and f"{zlib.crc32(corpora.read_text(path).encode()):08x}"
    for name in ("digits_dir", "speech_dir"):
        settings[name] = FLAGS[name].value and Path(FLAGS[name].value).name
    if FLAGS.checkpoint not in (None, "", NANO):
        settings["checkpoint"] = Path(FLAGS.checkpoint).name
    return {**settings, "speakers": ",".join(FLAGS.speakers)}


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


@dataclasses.dataclass(frozen=True)
class Gathered:
    """The model, and its data for measurement and calibration.

    Attributes:
      checkpoint: path of the model.
      model: the float32 model.
      params: its parameters.
      tokenizer: tokenizer of the model.
      learned: token ids of the calibration text.
      windows: windows of held-out text.
      questions: questions by kind (`image`, `spoken`).
      utterances: recordings for calibration.
    """

    checkpoint: Path
    model: Any
    params: Any
    tokenizer: Any
    learned: np.ndarray
    windows: corpora.Windows
    questions: dict[str, list[tap_items.Item]]
    utterances: Sequence[Any]

    def texts(self, count: int, size: int = 8) -> list[dict[str, Any]]:
        """Draw calibration batches of text."""
        return calibration_data.token_batches(self.learned, count, size)

    def screens(self, count: int) -> list[dict[str, Any]]:
        """Draw calibration batches of four screens; none for a model without vision."""
        if self.model.config.vision is None:
            return []
        return calibration_data.screen_batches(
            self.model.config, self.tokenizer, self.utterances, FLAGS.digits_dir, FLAGS.seed, count
        )


def gather() -> Gathered:
    """Load the model and read the data that the flags name."""
    checkpoint = checkpoint_of(FLAGS.checkpoint)
    model, params = ge.load(checkpoint, dtype="float32")
    tokenizer = ge.load_tokenizer(checkpoint)
    if FLAGS.calibration_text:
        learned = corpora.read_text(FLAGS.calibration_text)
        held_out = corpora.read_text(FLAGS.text)
    else:
        learned, held_out = eval_data.split_text(FLAGS.text)
    learned = corpora.encode_text(tokenizer, learned)
    tokens = corpora.encode_text(tokenizer, held_out)[: FLAGS.text_tokens]
    windows = corpora.windows(tokens, corpora.token_bytes(tokenizer), WINDOW)
    questions: dict[str, list[tap_items.Item]] = {"image": [], "spoken": []}
    others: Sequence[Any] = []
    if model.config.vision is not None:
        heard, others, notes = eval_data.recordings(FLAGS.speech_dir, FLAGS.speakers, FLAGS.seed)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        draw = [FLAGS.screens, FLAGS.seed, FLAGS.digits_dir]
        questions["image"] = tap_items.draw_items(*draw)
        questions["spoken"] = tap_items.draw_items(*draw, heard) if heard else []
    return Gathered(checkpoint, model, params, tokenizer, learned, windows, questions, others)


class Bench:
    """The model, its scorer, and the input files of peers.

    Args:
      directory: working directory.
      settings: settings that every row records.
      chosen: methods to run.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], chosen: Sequence[Method]):
        self.settings, self.work = settings, directory / "exchange"
        self.data = gather()
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
        self.fp32 = self.scorer.score(self.model, self.params)["perplexity"]

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
            "increase": measured["perplexity"] / self.fp32 - 1,
            **measured,
            **{key: meta.get(key) for key in ("seconds", "peak_rss_bytes", "weights", "versions")},
            "total_seconds": time.perf_counter() - start,
            "settings": self.settings,
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
        for index, batch in enumerate(alternate(texts, screens)):
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
        for index, batch in enumerate(training_batches(self.data)):
            np.savez(self.work / "training" / f"{index:05d}.npz", **batch)

    def _inputs(self, batch: dict[str, Any], paths: set[str]) -> dict[str, np.ndarray]:
        return sown_inputs(self.model, self.params, batch, paths)


def training_batches(data: Gathered) -> list[dict[str, Any]]:
    """Draw batches of four rows: --training_windows of text, and a quarter as many of screens.

    Half of the screen batches are drawn and then used twice, so that a fifth of all batches are
    screens.
    """
    texts = data.texts(FLAGS.training_windows // 4, 4)
    screens = data.screens(len(texts) // 8)
    return [*texts, *screens, *screens]


def sown_inputs(
    model: Any, params: Any, batch: dict[str, Any], paths: Collection[str]
) -> dict[str, np.ndarray]:
    """Return the input rows float32 [N, in] of some matrices."""
    sown = boxes.path_items(_sown_inputs(model, params, batch)["inputs"])
    rows = {path.replace("/rows", "/weight").removesuffix("/0"): leaf for path, leaf in sown}
    return {path: np.asarray(rows[path], np.float32) for path in paths}


@functools.partial(jax.jit, static_argnums=0)
def _sown_inputs(model, params, batch):
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    return model.apply({"params": params}, batch["tokens"], **inputs, mutable=["inputs"])[1]


def alternate(first: list[Any], second: list[Any]) -> list[Any]:
    """Interleave two lists, and append the remaining items of the longer one."""
    longest = max(len(first), len(second))
    return [x for i in range(longest) for x in (*first[i : i + 1], *second[i : i + 1])]


def rows_found(results: Path, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Return the rows of the methods that have a result, in their order."""
    paths = [results / f"{slug(method)}.json" for method in methods]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def conclude(directory: Path, results: Path) -> None:
    """Write table, report and figure of all results, in the order of METHODS."""
    rows = rows_found(results, METHODS)
    table = text_table(titles(), [cells(row) for row in rows])
    ahead = unreached(rows)
    report = {"run": circumstances(rows), "unreached": ahead, "rows": rows}
    corpora.write_text(directory / "report.json", json.dumps(report, indent=1) + "\n", True)
    corpora.write_text(directory / "table.md", table + "\n", True)
    print(f"\n{table}\n")
    print(
        "peers' rows that no row of glm_edge matches at equal or fewer bits: "
        f"{', '.join(ahead) or 'none'}"
    )
    figure(rows, directory / "quality.png")


def circumstances(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe the run of the rows: settings, commit, machine, and versions including peers'."""
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["versions"] or {}
    return {
        "settings": rows[0]["settings"],
        "commit": commit(),
        **machine(),
        "versions": {**package_versions(), **versions},
    }


if __name__ == "__main__":
    define_flags()
    launch(main)
