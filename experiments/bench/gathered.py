"""Flags and data that the tables of quality and of pruning share."""

import dataclasses
import functools
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import glm_edge as ge
from experiments.common import calibration_data, eval_data, tap_items, text_domains
from glm_edge import params as boxes
from glm_edge.cli import corpora
from glm_edge.cli.checkpoints import CHECKPOINT_HELP, NANO, checkpoint_of
from glm_edge.compress.batches import INPUTS

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of measurement, calibration and selection."""
    flags.DEFINE_string(
        "out_dir", None, "Output directory, with one JSON file per method.", required=True
    )
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_list(
        "text",
        None,
        "UTF-8 files for the measurement, one per domain, which is named by its file.",
        required=True,
    )
    flags.DEFINE_bool("text_help", True, "Measure also on half of CPython's help topics.")
    flags.DEFINE_list(
        "calibration_text", None, "UTF-8 files for calibration, one domain each.", required=True
    )
    flags.DEFINE_bool("calibration_help", True, "Calibrate also on half of CPython's help topics.")
    flags.DEFINE_integer("text_tokens", 65536, "Maximum number of tokens to score per domain.", 512)
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


def run_settings() -> dict[str, Any]:
    """Return the settings that all rows of a table share, with a checksum of the text."""
    names = ("text_tokens", "calibration_windows", "calibration_screens", "screens", "seed")
    names += ("calibration_help",)
    settings: dict[str, Any] = {name: FLAGS[name].value for name in names}
    learned, held_out = texts()
    settings["text"] = text_domains.checksums(held_out)
    settings["calibration_text"] = text_domains.checksums(learned)
    for name in ("digits_dir", "speech_dir"):
        settings[name] = FLAGS[name].value and Path(FLAGS[name].value).name
    if FLAGS.checkpoint not in (None, "", NANO):
        settings["checkpoint"] = Path(FLAGS.checkpoint).name
    return {**settings, "speakers": ",".join(FLAGS.speakers)}


def texts() -> tuple[dict[str, str], dict[str, str]]:
    """Read the texts for calibration and those for the measurement, by domain.

    Raises:
      DataError: a file cannot be read, or is in both.
    """
    learned = text_domains.read_texts(FLAGS.calibration_text, "calibration", FLAGS.calibration_help)
    held_out = text_domains.read_texts(FLAGS.text, "evaluation", FLAGS.text_help)
    text_domains.refuse_shared(learned, held_out)
    return learned, held_out


@dataclasses.dataclass(frozen=True)
class Gathered:
    """The model, and its data for measurement and calibration.

    Attributes:
      checkpoint: path of the model.
      model: the float32 model.
      params: its parameters.
      tokenizer: tokenizer of the model.
      learned: token ids of the calibration texts by domain.
      windows: windows of held-out text by domain.
      questions: questions by kind (`image`, `spoken`).
      utterances: recordings for calibration.
    """

    checkpoint: Path
    model: Any
    params: Any
    tokenizer: Any
    learned: dict[str, np.ndarray]
    windows: dict[str, corpora.Windows]
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
    for_calibration, held_out = texts()
    learned = {
        domain: corpora.encode_text(tokenizer, text) for domain, text in for_calibration.items()
    }
    windows = text_domains.complete_windows(held_out, tokenizer, FLAGS.text_tokens)
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
    read = {name: batch[name] for name in ("tokens", *INPUTS) if batch.get(name) is not None}
    sown = boxes.path_items(_sown_inputs(model, params, read)["inputs"])
    rows = {path.replace("/rows", "/weight").removesuffix("/0"): leaf for path, leaf in sown}
    return {path: np.asarray(rows[path], np.float32) for path in paths}


@functools.partial(jax.jit, static_argnums=0)
def _sown_inputs(model, params, batch):
    return model.apply({"params": params}, **batch, mutable=["inputs"])[1]


def alternate(first: list[Any], second: list[Any]) -> list[Any]:
    """Interleave two lists, and append the remaining items of the longer one."""
    longest = max(len(first), len(second))
    return [x for i in range(longest) for x in (*first[i : i + 1], *second[i : i + 1])]
