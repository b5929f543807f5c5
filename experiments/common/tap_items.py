"""Items of the tap benchmark: a screen, a question about it, and its recording, as model inputs.

Letters: `B` items of a batch, `T` prompt tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from experiments.nano.phone_screens import dialogues, digits, generator, instructions, speech
from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError
from glm_edge.kernels.log_mel import log_mel
from glm_edge.preprocess.tokens import encode, prompt_ids

ABLATIONS = ("none", "blank_images", "shuffled_images", "blank_audio")
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Item:
    """One question about one screen.

    Args:
      image: the screen.
      question: question and answer.
      samples: recording of a spoken question.
      speaker: who speaks.
      turn: request of a dialogue; `question` is its question.
    """

    image: np.ndarray
    question: instructions.Question
    samples: np.ndarray | None = None
    speaker: str | None = None
    turn: dialogues.Turn | None = None


def draw_items(
    count: int,
    seed: int,
    digits_dir: str | None = None,
    utterances: Sequence[speech.Utterance] = (),
    split: str = "eval",
    wording: str | None = None,
) -> list[Item]:
    """Draw one question for each of `count` screens.

    Args:
      count: number of questions.
      seed: seed of screens and questions; the split's stream is disjoint from other splits.
      digits_dir: folder of MNIST files for the keys; None uses scikit-learn's digits.
      utterances: recordings; if set, all questions are spoken.
      split: `eval` or `calibration`.
      wording: one of `instructions.WORDINGS`; default: "exam" for `eval`, else "train".

    Returns:
      The items.
    """
    wording = wording or ("exam" if split == "eval" else "train")
    drawer, rng = _screens(digits_dir, split, seed)
    by_digit = [[u for u in utterances if u.digit == digit] for digit in range(10)]
    missing = [str(digit) for digit, clips in enumerate(by_digit) if utterances and not clips]
    if missing:
        raise DataError(f"recordings: none says {missing[0]}; all ten digits are needed")
    items = []
    for _ in range(count):
        screen = drawer.draw(rng, "keypad" if utterances else "mixed")
        while wording == "names" and not instructions.nameable(screen):
            screen = drawer.draw(rng, "mixed")
        mix = instructions.SPEECH_MIX if utterances else instructions.TEXT_MIX
        question = instructions.questions(rng, screen, 1, mix, wording)[0]
        if utterances:
            clips = by_digit[question.spoken]
            clip = clips[rng.integers(len(clips))]
            items.append(Item(screen.image, question, clip.samples, clip.speaker))
        else:
            items.append(Item(screen.image, question))
    return items


def draw_dialogues(
    count: int, seed: int, digits_dir: str | None = None, wording: str = "exam"
) -> list[Item]:
    """Draw one request of a dialogue for each of `count` unseen screens.

    The earlier answers of a request are the right ones.

    Args:
      count: number of requests.
      seed: seed of screens and tasks.
      digits_dir: folder of MNIST files for the keys; None uses scikit-learn's digits.
      wording: "exam" or "train".

    Returns:
      The items.
    """
    drawer, rng = _screens(digits_dir, "eval", seed)
    items = []
    for index in range(count):
        screen = drawer.draw(rng, "keypad" if index % 2 else "mixed")
        turn = dialogues.draw_turn(rng, screen, wording)
        items.append(Item(screen.image, turn.question, turn=turn))
    return items


def _screens(
    digits_dir: str | None, split: str, seed: int
) -> tuple[generator.ScreenGenerator, np.random.Generator]:
    part = "train" if split == "calibration" else "eval"
    source = digits.mnist_folder(digits_dir, part) if digits_dir else digits.sklearn_digits(part)
    return generator.ScreenGenerator(source), generator.random_stream(split, seed)


def ablate(items: Sequence[Item], ablation: str) -> list[Item]:
    """Remove inputs on which the answer should depend.

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


def prompt(item: Item, config: GLMConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokens, image and log-mel frames of one question."""
    audio, audio_tokens = None, 0
    if item.samples is not None:
        audio, audio_tokens = mel_of([item.samples], config)[0], config.speech.num_tokens
    ids = _ids(item, config, tokenizer, audio_tokens)
    return {"tokens": np.array(ids, np.int32), "image": item.image, "audio": audio}


def _ids(item: Item, config: GLMConfig, tokenizer: Tokenizer, audio_tokens: int) -> list[int]:
    image_tokens = config.vision_tower.num_tokens
    if item.turn is None:
        text = item.question.instruction_text
        return prompt_ids(tokenizer, text, image_tokens, audio_tokens)
    *ids, assistant = prompt_ids(tokenizer, item.turn.task, image_tokens, audio_tokens)
    return [*ids, *encode(tokenizer, dialogues.continuation(item.turn)), assistant]


def prompt_batches(
    items: Sequence[Item], config: GLMConfig, tokenizer: Tokenizer, batch: int = BATCH
) -> Iterator[dict[str, Any]]:
    """Yield prompts of `batch` items, left-padded to one length.

    Returns:
      Dictionaries of tokens [B, T], valid [B, T], images, and audio for a model with speech. The
      last batch repeats its last item to reach the full size.
    """
    audio_tokens = config.speech.num_tokens if config.speech is not None else 0
    prompts = [
        _ids(item, config, tokenizer, 0 if item.samples is None else audio_tokens) for item in items
    ]
    # Room for a recording, and silence where there is none: one compiled program serves both kinds.
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
    """Return log-mel spectrograms [B, num_frames, mel_bins] of recordings, cropped or padded."""
    shape = config.speech
    length = shape.num_frames * shape.hop_length
    rows = [np.pad(r[:length], (0, max(0, length - len(r)))) for r in recordings]
    samples = jnp.asarray(np.stack(rows), jnp.float32)
    return np.asarray(
        log_mel(samples, shape.mel_bins, shape.fft_size, shape.hop_length, shape.sample_rate)
    )
