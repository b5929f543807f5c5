"""Training batches for nano: rows with many questions about one screen, text, and speech.

A screen's row is `<|user|> image`, then blocks of one question and its answer each. A block attends
to the image and itself, but not to other blocks, so that one encoded screen serves many questions.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from experiments.nano.phone_screens import actions, instructions
from experiments.nano.phone_screens.generator import Screen, ScreenGenerator, dense_labels
from experiments.nano.phone_screens.speech import Utterance, augment
from glm_edge.configs import GLMConfig

TEXT_BLOCK = 18
SPEECH_BLOCK = 30
ANSWER_LENGTH = 10
NO_TARGET = -1


@dataclass(frozen=True)
class Layout:
    """Layout of a row of `blocks` questions after an image prefix.

    Attributes:
      prefix: token ids before the first block.
      block_lengths: number of tokens of each block.
    """

    prefix: tuple[int, ...]
    block_lengths: tuple[int, ...]

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """First slot of each block."""
        return len(self.prefix) + np.cumsum([0, *self.block_lengths[:-1]])

    @property
    def length(self) -> int:
        """Number of tokens in a row."""
        return len(self.prefix) + sum(self.block_lengths)

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """Positions [T]; every block continues the prefix."""
        blocks = [len(self.prefix) + np.arange(length) for length in self.block_lengths]
        return np.concatenate([np.arange(len(self.prefix)), *blocks]).astype(np.int32)

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """Mask bool [1, 1, T, T]: causal, within the prefix and the token's own block."""
        block = np.concatenate(
            [np.zeros(len(self.prefix), int)]
            + [np.full(length, i + 1) for i, length in enumerate(self.block_lengths)]
        )
        visible = (block[None] == 0) | (block[None] == block[:, None])
        return (np.tril(np.ones((self.length, self.length), bool)) & visible)[None, None]


class ScreenBatches:
    """A source of random batches of screens with questions.

    Args:
      config: configuration of the model.
      tokenizer: tokenizer of the model.
      generators: screen generators, drawn with equal probability.
      utterances: recordings of spoken questions by digit; empty for written questions only.
      rng: random generator.
    """

    def __init__(
        self,
        config: GLMConfig,
        tokenizer: Tokenizer,
        generators: Sequence[ScreenGenerator],
        utterances: Sequence[Utterance],
        rng: np.random.Generator,
    ):
        self.config, self.tokenizer, self.rng = config, tokenizer, rng
        self.generators = generators
        self.by_digit = [[u for u in utterances if u.digit == digit] for digit in range(10)]
        token = tokenizer.token_to_id
        image = [config.image_token_id] * config.vision.num_tokens
        self.prefix = (
            token("<|user|>"),
            token("<|begin_of_image|>"),
            *image,
            token("<|end_of_image|>"),
        )
        self.audio_prompt = [
            token("<|begin_of_audio|>"),
            *[config.audio_token_id] * config.speech.num_tokens,
            token("<|end_of_audio|>"),
        ]
        self.assistant, self.end = token("<|assistant|>"), config.eos_token_ids[0]
        self.num_samples = config.speech.num_frames * config.speech.hop_length

    def layout(self, text_blocks: int, speech_blocks: int) -> Layout:
        """Return the layout of rows with spoken questions first, then written ones."""
        return Layout(self.prefix, (SPEECH_BLOCK,) * speech_blocks + (TEXT_BLOCK,) * text_blocks)

    def draw(
        self, screens: int, text_blocks: int, speech_blocks: int, silent: bool = False
    ) -> dict[str, np.ndarray]:
        """Draw one batch.

        Args:
          screens: number of rows `B`.
          text_blocks: number of written questions per row.
          speech_blocks: number of spoken questions per row; with spoken questions, screens are
            keypads.
          silent: whether to keep the shapes but write all questions, about screens of any kind.

        Returns:
          images [B, height, width, 3], cell labels (`cell_class`, `cell_offset`, `cell_centre`),
          tokens [B, T], `samples` [B, speech_blocks, L], and for each of `Q` questions: slots
          [B, Q, A] whose next token is a label, their `labels` and `weights`, the `assistant` slot,
          and the `target` cell (-1 without a tap) with its `box` in pixels.
        """
        layout = self.layout(text_blocks, speech_blocks)
        spoken = 0 if silent else speech_blocks
        rows = [self._row(layout, speech_blocks, spoken) for _ in range(screens)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def draw_cells(self, screens: int) -> dict[str, np.ndarray]:
        """Draw only images and labels of their cells; half of the images are keypads."""
        rows = []
        for index in range(screens):
            screen = self._screen("keypad" if index % 2 else "mixed")
            names = ("cell_class", "cell_offset", "cell_centre")
            rows.append(dict(zip(names, dense_labels(screen), strict=True), images=screen.image))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _screen(self, kind: str) -> Screen:
        generator = self.generators[self.rng.integers(len(self.generators))]
        return generator.draw(self.rng, kind)

    def _row(self, layout: Layout, speech_blocks: int, num_spoken: int) -> dict[str, np.ndarray]:
        rng, count = self.rng, len(layout.block_lengths)
        screen = self._screen("keypad" if num_spoken else "mixed")
        cell_class, cell_offset, cell_centre = dense_labels(screen)
        row = {
            "images": screen.image.astype(np.float32),
            "cell_class": cell_class,
            "cell_offset": cell_offset,
            "cell_centre": cell_centre,
            "tokens": np.full(layout.length, self.config.pad_token_id, np.int32),
            "samples": np.zeros((speech_blocks, self.num_samples), np.float32),
            "digits": np.zeros(speech_blocks, np.int32),
            "slots": np.zeros((count, ANSWER_LENGTH), np.int32),
            "labels": np.zeros((count, ANSWER_LENGTH), np.int32),
            "weights": np.zeros((count, ANSWER_LENGTH), np.float32),
            "assistant": np.zeros(count, np.int32),
            "target": np.full(count, NO_TARGET, np.int32),
            "box": np.zeros((count, 4), np.float32),
        }
        row["tokens"][: len(layout.prefix)] = layout.prefix
        spoken = []
        if num_spoken:
            spoken = instructions.questions(rng, screen, num_spoken, instructions.SPEECH_MIX)
        written = instructions.questions(rng, screen, count - num_spoken)
        for index, question in enumerate([*spoken, *written]):
            if index < num_spoken:
                choices = self.by_digit[question.spoken]
                utterance = choices[rng.integers(len(choices))]
                row["digits"][index] = question.spoken
                row["samples"][index] = fit(augment(rng, utterance.samples), self.num_samples)
                prompt = self.audio_prompt
            else:
                prompt = self.tokenizer.encode(question.instruction_text).ids
            answer = self.tokenizer.encode(actions.format_action(question.answer_action)).ids
            self._write_row(row, index, layout, prompt, [*answer, self.end])
            if question.target is not None:
                row["target"][index] = self._cell(question.target.box)
                row["box"][index] = question.target.box
        return row

    def _write_row(
        self, row, index: int, layout: Layout, prompt: list[int], answer: list[int]
    ) -> None:
        room = layout.block_lengths[index] - 1
        answer = answer[:ANSWER_LENGTH]
        prompt = list(prompt)[: room - len(answer)]
        start = layout.starts[index]
        block = [*prompt, self.assistant, *answer]
        row["tokens"][start : start + len(block)] = block
        slot = start + len(prompt)
        row["assistant"][index] = slot
        row["slots"][index, : len(answer)] = slot + np.arange(len(answer))
        row["labels"][index, : len(answer)] = answer
        row["weights"][index, : len(answer)] = 1.0

    def _cell(self, box: tuple[float, float, float, float]) -> int:
        vision = self.config.vision
        rows, columns = (extent // vision.merge_size for extent in vision.grid)
        height, width = vision.image_size
        row = int((box[1] + box[3]) / 2 / height * rows)
        column = int((box[0] + box[2]) / 2 / width * columns)
        return row * columns + column


def fit(samples: np.ndarray, length: int) -> np.ndarray:
    """Crop or zero-pads samples to a length."""
    cropped = samples[:length]
    return np.pad(cropped, (0, length - len(cropped)))


def speech_batches(
    groups: Sequence[Sequence[Utterance]],
    shares: Sequence[float],
    size: int,
    length: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield augmented `(samples [B, L], digits [B])` endlessly.

    Args:
      groups: lists of recordings of one kind each; within a kind, speakers are equally frequent.
      shares: frequencies of the kinds, with sum 1.
      size: batch size `B`.
      length: number of samples `L` per row.
      seed: seed of the random values.
    """
    rng = np.random.default_rng(seed)
    speakers = []
    for group in groups:
        names = sorted({utterance.speaker for utterance in group})
        speakers.append([[u for u in group if u.speaker == name] for name in names])
    while True:
        drawn = []
        for _ in range(size):
            group = speakers[rng.choice(len(groups), p=shares)]
            clips = group[rng.integers(len(group))]
            drawn.append(clips[rng.integers(len(clips))])
        samples = np.stack([fit(augment(rng, u.samples), length) for u in drawn])
        yield samples.astype(np.float32), np.array([u.digit for u in drawn], np.int32)


def text_batches(tokens: np.ndarray, size: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Yield windows [B, length + 1] of a token stream endlessly, at random offsets."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(tokens) - length - 1, size)
        yield np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)
