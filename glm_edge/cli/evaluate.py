"""Measures the loss of any checkpoint on text, and its distance from a reference.

    glm-edge evaluate --checkpoint=DIR --reference=DIR --text=FILE --json=FILE

Prints perplexity per token and bits per byte. With --reference, it also prints the KL divergence
from that checkpoint's predictions in nats, and the fraction of positions whose top-1 token differs.
--json writes the same values. The default checkpoint is the shipped model, and the default text is
half of CPython's help topics.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from tokenizers import Tokenizer

import glm_edge as ge
from glm_edge.cli import corpora
from glm_edge.cli.checkpoints import CHECKPOINT_HELP, checkpoint_of
from glm_edge.cli.console import refuse_arguments
from glm_edge.cli.loss import WINDOW, text_loss
from glm_edge.cli.outputs import check_output

FLAGS = flags.FLAGS
Further = Callable[[Any, Any, Tokenizer], dict[str, Any]]

flags.disclaim_key_flags()


def define_flags() -> None:
    """Define the command's flags."""
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_string("reference", None, "Checkpoint with the reference predictions.")
    flags.DEFINE_string("text", None, "UTF-8 file on which the loss is measured.")
    flags.DEFINE_integer("text_tokens", 60000, "Maximum number of tokens of --text to score.", 2)
    flags.DEFINE_string("json", None, "JSON file for the results.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --json file.")


def main(argv: Sequence[str], further: Further | None = None) -> None:
    """Run the command.

    Args:
      argv: the program's name.
      further: function of model, parameters and tokenizer that prints and returns further results.
    """
    refuse_arguments(argv)
    check_output(FLAGS.json, FLAGS.overwrite)
    checkpoint = checkpoint_of(FLAGS.checkpoint)
    model, params = ge.load(checkpoint, dtype="float32")
    tokenizer = ge.load_tokenizer(checkpoint)
    windows = text_windows(tokenizer, FLAGS.text, FLAGS.text_tokens)
    reference = None
    if FLAGS.reference:
        reference = ge.load(checkpoint_of(FLAGS.reference), dtype="float32")
    text = text_loss(model, params, windows, reference) | {"tokens": windows.num_scored}
    show(text, reference is not None)
    report = {"checkpoint": str(checkpoint), "reference": FLAGS.reference, "text": text}
    if further:
        report |= further(model, params, tokenizer)
    if FLAGS.json:
        content = json.dumps(report, indent=2) + "\n"
        corpora.write_text(FLAGS.json, content, overwrite=FLAGS.overwrite)


def text_windows(tokenizer: Tokenizer, path: str | None, limit: int) -> corpora.Windows:
    """Cut a file, or CPython's help topics, into evaluation windows."""
    text = corpora.read_text(path) if path else corpora.pydoc_topics("evaluation")
    tokens = corpora.encode_text(tokenizer, text)[:limit]
    return corpora.windows(tokens, corpora.token_bytes(tokenizer), WINDOW)


def show(text: dict[str, Any], compared: bool) -> None:
    """Print the results."""
    print(
        f"text: perplexity {text['perplexity']:.2f}, {text['bits_per_byte']:.3f} bits per byte "
        f"over {text['tokens']} tokens"
    )
    if compared:
        print(
            f"distance from the reference: KL {text['kl']:.4f} nats, top-1 flips "
            f"{text['flips']:.2%}"
        )
