"""Scores text with an n-gram model: the baseline that nano's language modelling has to beat.

    python -m experiments.ngram_baseline --train=wt103_train_head.txt --eval=wt103_valid.txt

An interpolated modified Kneser-Ney model of `--order` tokens is trained on `--train` and scores
every token of each `--eval` file. Both flags may be repeated; training files are joined, evaluation
files are reported one by one. Without them, CPython's own `pydoc_data.topics` serve, half each.

Bits per byte divide by the UTF-8 bytes of the raw text, so that tokenizers can be compared;
perplexities cannot. The n-gram model sees the text as one stream and is never reset, while a neural
model starts afresh in every window: this favours the n-gram model. With `--window=128` it is
scored on the tokens that windows of 128 score, those that do not begin a window.
"""

import json
import sys
import time
from importlib import resources
from typing import Any

import numpy as np
from absl import app, flags
from tokenizers import Tokenizer

from experiments.text import kneser_ney
from experiments.text import tokenizer as nano_tokenizer
from glm_edge.cli import corpora
from glm_edge.cli.console import refuse_arguments
from glm_edge.errors import DataError, GlmEdgeError

SHIPPED_TOKENIZER = "assets/nano/tokenizer.json"

TRAIN = flags.DEFINE_multi_string(
    "train", [], "UTF-8 file to train on; repeat to join several. Default: half of pydoc's topics."
)
EVAL = flags.DEFINE_multi_string(
    "eval", [], "UTF-8 file to score; repeat to report several. Default: pydoc's other topics."
)
ORDER = flags.DEFINE_integer("order", 5, "Tokens of the longest n-gram.", lower_bound=1)
WINDOW = flags.DEFINE_integer(
    "window",
    0,
    "Leave out every token that begins a window of this many; 0 scores all.",
    lower_bound=0,
)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json. Default: the shipped one.")
OUT = flags.DEFINE_string("out", None, "Also write the numbers to this JSON file.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out where it exists already.")


def score(
    model: kneser_ney.KneserNey, tokenizer: Tokenizer, name: str, text: str, window: int = 0
) -> dict[str, Any]:
    """Scores one text.

    Args:
      model: trained on the ids of `tokenizer`.
      tokenizer: as from `load`.
      name: of the text, for the report.
      text: what is scored.
      window: tokens at multiples of it are left out; 0 scores all.

    Returns:
      `text`, `tokens`, `bytes` (of the scored tokens), `perplexity` (per token), `bits_per_byte`.

    Raises:
      DataError: `window` leaves no token to score.
    """
    tokens = corpora.encode_text(tokenizer, text)
    scored = np.arange(len(tokens)) % window > 0 if window else np.ones(len(tokens), bool)
    if not scored.any():
        raise DataError(
            f"{name}: {len(tokens)} tokens in windows of {window} leave none to score; "
            "use --window of at least 2 and a longer text"
        )
    nats = -model.log_probs(tokens)[scored]
    num_bytes = int(corpora.token_bytes(tokenizer)[tokens[scored]].sum())
    return {
        "text": name,
        "tokens": int(scored.sum()),
        "bytes": num_bytes,
        "perplexity": float(np.exp(nats.mean())),
        "bits_per_byte": corpora.bits_per_byte(nats.sum(), num_bytes),
    }


def run(
    tokenizer_path: str | None, train: list[str], evaluate: list[str], order: int, window: int
) -> dict[str, Any]:
    """Trains on some files and scores others.

    Args:
      tokenizer_path: a tokenizer.json; None is the shipped one.
      train: files to train on, joined; none is pydoc's calibration topics.
      evaluate: files to score; none is pydoc's evaluation topics.
      order: tokens of the longest n-gram.
      window: see `score`.

    Returns:
      What was trained, and under `rows` what `score` returns for each text.

    Raises:
      DataError: a file is not UTF-8 text, or is too short.
    """
    shipped = resources.files("glm_edge") / SHIPPED_TOKENIZER
    tokenizer = nano_tokenizer.load(tokenizer_path or str(shipped))
    started = time.perf_counter()
    texts = [corpora.read_text(path) for path in train] or [corpora.pydoc_topics("calibration")]
    stream = np.concatenate([corpora.encode_text(tokenizer, text) for text in texts])
    model = kneser_ney.train(stream, tokenizer.get_vocab_size(), order)
    held_out = [(path, corpora.read_text(path)) for path in evaluate]
    held_out = held_out or [("pydoc topics (evaluation)", corpora.pydoc_topics("evaluation"))]
    rows = [score(model, tokenizer, name, text, window) for name, text in held_out]
    return {
        "order": order,
        "vocab_size": model.vocab_size,
        "train": train or ["pydoc topics (calibration)"],
        "train_tokens": len(stream),
        "window": window,
        "rows": rows,
        "seconds": time.perf_counter() - started,
    }


def table(result: dict[str, Any]) -> str:
    """Lays out what `run` returns, a row for each text."""
    lines = [
        f"Kneser-Ney, order {result['order']}, vocabulary {result['vocab_size']}, trained on "
        f"{result['train_tokens']} tokens of {', '.join(result['train'])}",
        f"{'tokens':>9} {'bytes':>9} {'perplexity':>10} {'bits/byte':>9}  text",
    ]
    lines += [
        f"{row['tokens']:9d} {row['bytes']:9d} {row['perplexity']:10.2f} "
        f"{row['bits_per_byte']:9.4f}  {row['text']}"
        for row in result["rows"]
    ]
    return "\n".join([*lines, f"{result['seconds']:.1f} s"])


def main(argv: list[str]) -> None:
    """Trains, scores and reports."""
    refuse_arguments(argv)
    try:
        result = run(TOKENIZER.value, TRAIN.value, EVAL.value, ORDER.value, WINDOW.value)
        print(table(result))
        if OUT.value:
            corpora.write_text(OUT.value, json.dumps(result, indent=1) + "\n", OVERWRITE.value)
    except GlmEdgeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
