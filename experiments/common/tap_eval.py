"""Evaluation of a checkpoint on phone screens: taps on unseen screens.

Shapes: `N` questions, `B` batch rows, `T` prompt tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from experiments.nano.phone_screens import digits, generator, instructions, metrics, speech
from glm_edge import generate
from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError
from glm_edge.kernels.log_mel import log_mel
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.preprocess.tokens import prompt_ids

ABLATIONS = ("none", "blank_images", "shuffled_images", "blank_audio")
ANSWER_TOKENS = 12
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Item:
    """One question about one screen, with a recording if it is spoken."""

    image: np.ndarray
    question: instructions.Question
    samples: np.ndarray | None = None


def draw_items(
    count: int,
    seed: int,
    digits_dir: str | None = None,
    utterances: Sequence[speech.Utterance] = (),
    split: str = "eval",
) -> list[Item]:
    """Draws one question for each of `count` screens.

    Args:
      count: number of questions.
      seed: seed of screens and questions; the split's stream is disjoint from other splits.
      digits_dir: folder of MNIST files for the keys; None uses scikit-learn's digits.
      utterances: recordings; if set, all questions are spoken.
      split: `eval` or `calibration`.

    Returns:
      The items.
    """
    part = "train" if split == "calibration" else "eval"
    source = digits.mnist_folder(digits_dir, part) if digits_dir else digits.sklearn_digits(part)
    rng = generator.random_stream(split, seed)
    drawer = generator.ScreenGenerator(source)
    by_digit = [[u for u in utterances if u.digit == digit] for digit in range(10)]
    missing = [str(digit) for digit, clips in enumerate(by_digit) if utterances and not clips]
    if missing:
        raise DataError(
            f"recordings: the digit {missing[0]} is missing; use recordings of all ten digits"
        )
    items = []
    for _ in range(count):
        screen = drawer.draw(rng, "keypad" if utterances else "mixed")
        mix = instructions.SPEECH_MIX if utterances else instructions.TEXT_MIX
        question = instructions.questions(rng, screen, 1, mix)[0]
        samples = None
        if utterances:
            clips = by_digit[question.spoken]
            samples = clips[rng.integers(len(clips))].samples
        items.append(Item(screen.image, question, samples))
    return items


def ablate(items: Sequence[Item], ablation: str) -> list[Item]:
    """Removes inputs on which the answer should depend.

    Args:
      items: the questions.
      ablation: `none`, `blank_images`, `shuffled_images` (each question gets the screen of the next
        one), or `blank_audio`.

    Returns:
      Items with the same questions and changed inputs.
    """
    if ablation == "blank_images":
        return [dataclasses.replace(i, image=np.full_like(i.image, 0.5)) for i in items]
    if ablation == "shuffled_images":
        others = [*items[1:], items[0]]
        return [dataclasses.replace(i, image=o.image) for i, o in zip(items, others, strict=True)]
    if ablation == "blank_audio":
        return [
            i if i.samples is None else dataclasses.replace(i, samples=np.zeros_like(i.samples))
            for i in items
        ]
    return list(items)


def prompt_batches(
    items: Sequence[Item], config: GLMConfig, tokenizer: Tokenizer, batch: int = BATCH
) -> Iterator[dict[str, Any]]:
    """Yields prompts of `batch` items, left-padded to one length.

    Returns:
      Dictionaries of tokens [B, T], valid [B, T], images, and audio for a model with speech. The
      last batch repeats its last item to reach the full size.
    """
    audio_tokens = config.speech.num_tokens if config.speech is not None else 0
    prompts = [
        prompt_ids(
            tokenizer,
            item.question.instruction_text,
            config.vision.num_tokens,
            0 if item.samples is None else audio_tokens,
        )
        for item in items
    ]
    # Written questions get silence, so that one compiled program serves both kinds.
    longest = max(config.vision.num_tokens + audio_tokens + 8, *map(len, prompts))
    length = -(-longest // 32) * 32
    for start in range(0, len(items), batch):
        index = [min(i, len(items) - 1) for i in range(start, start + batch)]
        tokens = np.full((batch, length), config.pad_token_id, np.int32)
        valid = np.zeros((batch, length), bool)
        for row, i in enumerate(index):
            tokens[row, length - len(prompts[i]) :] = prompts[i]
            valid[row, length - len(prompts[i]) :] = True
        images = np.stack([items[i].image for i in index]).astype(np.float32)
        audio = None
        if config.speech is not None:
            recorded = [items[i].samples for i in index]
            silence = np.zeros(1, np.float32)
            audio = mel_of([silence if r is None else r for r in recorded], config)
        yield {"tokens": tokens, "valid": valid, "images": images, "audio": audio}


def mel_of(recordings: Sequence[np.ndarray], config: GLMConfig) -> np.ndarray:
    """Returns log-mel spectrograms [B, num_frames, mel_bins] of recordings, cropped or padded."""
    shape = config.speech
    length = shape.num_frames * shape.hop_length
    rows = [np.pad(r[:length], (0, max(0, length - len(r)))) for r in recordings]
    samples = jnp.asarray(np.stack(rows), jnp.float32)
    return np.asarray(
        log_mel(samples, shape.mel_bins, shape.fft_size, shape.hop_length, shape.sample_rate)
    )


def answers(
    model: MultimodalGLM, params: Any, tokenizer: Tokenizer, items: Sequence[Item], progress=iter
) -> list[str]:
    """Generates the model's greedy answer to each item.

    Args:
      model: model with vision, and with speech for spoken questions.
      params: its parameters.
      tokenizer: tokenizer of the model.
      items: the questions.
      progress: function that wraps the iterator of batches, such as a progress bar.

    Returns:
      Answers as text, up to the stop token.
    """
    texts = []
    for batch in progress(list(prompt_batches(items, model.config, tokenizer))):
        generated = generate.greedy(model, params, batch, ANSWER_TOKENS)
        texts.extend(answer_text(tokenizer, row, model.config) for row in np.asarray(generated))
    return texts[: len(items)]


def answer_text(tokenizer: Tokenizer, ids: np.ndarray, config: GLMConfig) -> str:
    """Returns the text of generated ids up to the first stop token."""
    stops = np.flatnonzero(np.isin(ids, config.eos_token_ids))
    answer = ids[: stops[0]] if len(stops) else ids
    return tokenizer.decode([int(i) for i in answer], skip_special_tokens=False)


def outcomes(items: Sequence[Item], texts: Sequence[str]) -> dict[str, metrics.Rate | None]:
    """Returns parse rate, action accuracy, answer accuracy and tap-in-box rate with intervals."""
    return metrics.score(zip([i.question for i in items], texts, strict=True))


def hits(items: Sequence[Item], texts: Sequence[str]) -> list[float]:
    """Returns 1.0 for each tap inside its box, 0.0 for others."""
    judged = [metrics.judge(i.question, text) for i, text in zip(items, texts, strict=True)]
    return [float(outcome.in_box) for outcome in judged if outcome.in_box is not None]
