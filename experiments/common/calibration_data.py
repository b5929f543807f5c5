"""Calibration batches for nano: screens with written and spoken questions, and texts by domain."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from experiments.common.tap_items import mel_of
from experiments.nano.batches import Layout, ScreenBatches
from experiments.nano.phone_screens import digits, generator, speech
from glm_edge.cli import corpora
from glm_edge.cli.loss import WINDOW
from glm_edge.compress.domains import KEY as DOMAIN
from glm_edge.configs import GLMConfig

Batch = dict[str, Any]
SCREENS = "screens"


def text_batches(
    tokenizer: Tokenizer, texts: Mapping[str, str], count: int, size: int = 8
) -> list[Batch]:
    """Cut texts into `count` batches of `size` evenly spaced windows each.

    Args:
      tokenizer: tokenizer of the model.
      texts: calibration text by domain; it should not overlap with the evaluation text.
      count: number of batches; fewer if all texts are short.
      size: windows per batch.

    Returns:
      Batches as from `token_batches`.
    """
    ids = {domain: corpora.encode_text(tokenizer, text) for domain, text in texts.items()}
    return token_batches(ids, count, size)


def token_batches(ids: Mapping[str, np.ndarray], count: int, size: int = 8) -> list[Batch]:
    """Make batches like `text_batches` from token ids by domain.

    Every domain has the same number of batches, in turn. A domain whose text is too short leaves
    its share to the others. A text shorter than one batch is repeated to fill one.

    Args:
      ids: token ids by domain.
      count: number of batches.
      size: windows per batch.

    Returns:
      Batches of `tokens` [size, WINDOW] and `domain`.
    """
    windows = {
        domain: np.resize(tokens, (max(len(tokens) // WINDOW, size), WINDOW)).astype(np.int32)
        for domain, tokens in ids.items()
    }
    batches: dict[str, list[Batch]] = {domain: [] for domain in ids}
    # Shortest first, so that the share of a short text goes to longer ones.
    by_length = sorted(windows, key=lambda domain: len(windows[domain]))
    for index, domain in enumerate(by_length):
        number = min(count // (len(by_length) - index), len(windows[domain]) // size)
        count -= number
        chosen = np.linspace(0, len(windows[domain]) - 1, number * size).astype(int)
        for rows in windows[domain][chosen].reshape(number, size, WINDOW):
            batches[domain].append({"tokens": rows, DOMAIN: domain})
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*batches.values()))
    return [batch for batch in in_turn if batch is not None]


def screen_batches(
    config: GLMConfig,
    tokenizer: Tokenizer,
    utterances: Sequence[speech.Utterance],
    digits_dir: str | None,
    seed: int,
    count: int,
    screens: int = 4,
) -> list[Batch]:
    """Draw `count` batches of screens with several questions each, with equal shapes.

    With recordings, every other batch shows keypads, and half of its questions are spoken.

    Args:
      config: configuration of the model.
      tokenizer: tokenizer of the model.
      utterances: recordings for spoken questions; without them all questions are written.
      digits_dir: folder of MNIST files; None uses scikit-learn's digits.
      seed: seed of the calibration stream.
      count: number of batches.
      screens: rows per batch.

    Returns:
      Batches of the domain `screens` with tokens, loss_mask, images, positions and mask; also audio
      for spoken questions.
    """
    source = digits.mnist_folder(digits_dir, "train") if digits_dir else None
    drawer = generator.ScreenGenerator(source or digits.sklearn_digits("train"))
    rng = generator.random_stream("calibration", seed)
    drawn = ScreenBatches(config, tokenizer, [drawer], utterances)
    blocks = (4, 4) if utterances else (8, 0)
    layout = drawn.layout(*blocks)
    return [
        as_batch(drawn.draw(rng, screens, *blocks, silent=index % 2 == 0), layout, config)
        for index in range(count)
    ]


def as_batch(drawn: dict[str, np.ndarray], layout: Layout, config: GLMConfig) -> Batch:
    """Convert rows of questions to a calibration batch for `glm_edge.compress`."""
    rows = np.arange(len(drawn["tokens"]))[:, None, None]
    loss_mask = np.zeros(drawn["tokens"].shape, np.float32)
    np.add.at(loss_mask, (rows, drawn["slots"]), drawn["weights"])
    batch = {
        "tokens": drawn["tokens"],
        "loss_mask": loss_mask,
        "images": drawn["images"],
        "positions": np.broadcast_to(layout.positions, drawn["tokens"].shape),
        "mask": layout.mask,
        DOMAIN: SCREENS,
    }
    if drawn["samples"].shape[1]:
        mel = mel_of(drawn["samples"].reshape(-1, drawn["samples"].shape[-1]), config)
        batch["audio"] = mel.reshape(*drawn["samples"].shape[:2], *mel.shape[1:])
    return batch
