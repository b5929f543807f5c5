"""Training batches for nano: rows with many questions about one screen, text, and speech.

A screen's row is `<|user|> image`, then blocks of one question and its answer each. A question of a
dialogue contains the task and the earlier answers. A block attends to the image and itself, but not
to other blocks, so that one encoded screen serves many questions.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from experiments.nano.phone_screens import actions, dialogues, instructions
from experiments.nano.phone_screens.generator import Screen, ScreenGenerator, dense_labels
from experiments.nano.phone_screens.speech import Utterance, augment
from glm_edge.configs import GLMConfig
from glm_edge.preprocess.tokens import USER

TEXT_BLOCK = 28
SPEECH_BLOCK = 30
DIALOGUE_BLOCK = 116
ANSWER_LENGTH = 10
# Most tokens of a request that are learned: the thoughts of all steps, and the present answer.
DIALOGUE_LABELS = 48
# A thought has many tokens, which would otherwise count more than the action.
THOUGHT_WEIGHT = 0.3
NO_TARGET = NO_SOURCE = -1
# Marks the first token of a word in the vocabulary of a byte-level BPE.
WORD_START = "\u0120"


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
      noise: probability that a written instruction to tap contains random words.
    """

    def __init__(
        self,
        config: GLMConfig,
        tokenizer: Tokenizer,
        generators: Sequence[ScreenGenerator],
        utterances: Sequence[Utterance],
        noise: float = 0.0,
    ):
        self.config, self.tokenizer, self.noise = config, tokenizer, noise
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

        # Tokens that begin a word, to insert and to insert before.
        self.first_tokens = np.array(
            [i for text, i in tokenizer.get_vocab().items() if text.startswith(WORD_START)]
        )

    def layout(self, text_blocks: int, speech_blocks: int, dialogue_blocks: int = 0) -> Layout:
        """Return the layout of rows with spoken questions, written ones, and dialogues."""
        blocks = [SPEECH_BLOCK] * speech_blocks + [TEXT_BLOCK] * text_blocks
        return Layout(self.prefix, (*blocks, *[DIALOGUE_BLOCK] * dialogue_blocks))

    def draw(
        self,
        rng: np.random.Generator,
        screens: int,
        text_blocks: int,
        speech_blocks: int,
        dialogue_blocks: int = 0,
        silent: bool = False,
    ) -> dict[str, np.ndarray]:
        """Draw one batch.

        Args:
          rng: random generator.
          screens: number of rows `B`.
          text_blocks: number of written questions per row.
          speech_blocks: number of spoken questions per row; with spoken questions, screens are
            keypads.
          dialogue_blocks: number of requests per row of dialogues of several steps; half of the
            screens with dialogues are keypads.
          silent: whether to keep the shapes but write all questions, about screens of any kind.

        Returns:
          images [B, height, width, 3], cell labels (`cell_class`, `cell_offset`, `cell_centre`),
          tokens [B, T], `samples` [B, speech_blocks, L], and for each of `Q` questions: slots
          [B, Q, A] whose next token is a label, their `labels` and `weights`, the `source` slot of
          the task that a label of a thought repeats (-1 for others), the `acting` slot, after which
          the action begins, the index `action` of the action's first label, and the `target` cell
          (-1 without a tap) with its `box` in pixels.
        """
        layout = self.layout(text_blocks, speech_blocks, dialogue_blocks)
        counts = (0 if silent else speech_blocks, dialogue_blocks)
        rows = [self._row(rng, layout, speech_blocks, *counts) for _ in range(screens)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def draw_cells(self, rng: np.random.Generator, screens: int) -> dict[str, np.ndarray]:
        """Draw only images and labels of their cells; half of the images are keypads."""
        rows = []
        for index in range(screens):
            screen = self._screen(rng, "keypad" if index % 2 else "mixed")
            names = ("cell_class", "cell_offset", "cell_centre")
            rows.append(dict(zip(names, dense_labels(screen), strict=True), images=screen.image))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _screen(self, rng: np.random.Generator, kind: str) -> Screen:
        return self.generators[rng.integers(len(self.generators))].draw(rng, kind)

    def _row(
        self,
        rng: np.random.Generator,
        layout: Layout,
        speech_blocks: int,
        num_spoken: int,
        num_dialogues: int,
    ) -> dict[str, np.ndarray]:
        count = len(layout.block_lengths)
        labels = DIALOGUE_LABELS if num_dialogues else ANSWER_LENGTH
        keypad = num_spoken or (num_dialogues and rng.random() < 0.5)
        screen = self._screen(rng, "keypad" if keypad else "mixed")
        cell_class, cell_offset, cell_centre = dense_labels(screen)
        row = {
            "images": screen.image.astype(np.float32),
            "cell_class": cell_class,
            "cell_offset": cell_offset,
            "cell_centre": cell_centre,
            "tokens": np.full(layout.length, self.config.pad_token_id, np.int32),
            "samples": np.zeros((speech_blocks, self.num_samples), np.float32),
            "digits": np.zeros(speech_blocks, np.int32),
            "slots": np.zeros((count, labels), np.int32),
            "labels": np.zeros((count, labels), np.int32),
            "weights": np.zeros((count, labels), np.float32),
            "source": np.full((count, labels), NO_SOURCE, np.int32),
            "acting": np.zeros(count, np.int32),
            "action": np.zeros(count, np.int32),
            "target": np.full(count, NO_TARGET, np.int32),
            "box": np.zeros((count, 4), np.float32),
        }
        row["tokens"][: len(layout.prefix)] = layout.prefix
        spoken = []
        if num_spoken:
            spoken = instructions.questions(rng, screen, num_spoken, instructions.SPEECH_MIX)
        num_written = count - num_spoken - num_dialogues
        written = instructions.questions(rng, screen, num_written) if num_written else []
        for index, question in enumerate(spoken):
            choices = self.by_digit[question.spoken]
            utterance = choices[rng.integers(len(choices))]
            row["digits"][index] = question.spoken
            row["samples"][index] = fit(augment(rng, utterance.samples), self.num_samples)
            self._write_row(row, index, layout, self.audio_prompt, question)
        for index, question in enumerate(written, num_spoken):
            prompt = self._noisy(
                rng, self.tokenizer.encode(question.instruction_text).ids, question
            )
            self._write_row(row, index, layout, prompt, question)
        for index in range(count - num_dialogues, count):
            turn, parts = self._dialogue(rng, screen)
            self._write_block(row, index, layout, parts, turn.question)
        return row

    def _dialogue(
        self, rng: np.random.Generator, screen: Screen
    ) -> tuple[dialogues.Turn, list[tuple[list[int], float]]]:
        """Draw a request that fits a block, as parts with their weights."""
        while True:
            turn = dialogues.draw_turn(rng, screen)
            parts = [(self._encode(turn.task), 0.0)]
            for answer in turn.history:
                thought = self._encode(dialogues.thought_line(turn.task, answer.thought))
                action = [*self._encode(actions.format_action(answer.action)), self.end]
                parts += [([self.assistant], 0.0), (thought, THOUGHT_WEIGHT), (action, 0.0)]
            if turn.question.instruction_text:
                parts.append((self._encode(USER + turn.question.instruction_text), 0.0))
            thought = self._encode(dialogues.thought_line(turn.task, turn.thought))
            parts += [([self.assistant], 0.0), (thought, THOUGHT_WEIGHT)]
            parts.append((self._action(turn.question), 1.0))
            labelled = sum(len(ids) for ids, weight in parts if weight)
            length = sum(len(ids) for ids, _ in parts)
            if length <= DIALOGUE_BLOCK and labelled <= DIALOGUE_LABELS:
                return turn, parts

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def _action(self, question: instructions.Question) -> list[int]:
        ids = self._encode(actions.format_action(question.answer_action))
        return [*ids, self.end][:ANSWER_LENGTH]

    def _noisy(
        self, rng: np.random.Generator, prompt: list[int], question: instructions.Question
    ) -> list[int]:
        """Insert one or two random tokens between words, if the instruction asks for a tap.

        The name of the target then has to decide, whatever the other words are.
        """
        if question.target is None or rng.random() >= self.noise:
            return prompt
        noisy = list(prompt)
        for _ in range(int(rng.integers(1, 3))):
            starts = [i for i, token in enumerate(noisy) if i and token in self._starts]
            at = starts[rng.integers(len(starts))] if starts else 0
            noisy.insert(at, int(self.first_tokens[rng.integers(len(self.first_tokens))]))
        return noisy

    @functools.cached_property
    def _starts(self) -> frozenset[int]:
        return frozenset(self.first_tokens.tolist())

    def _write_row(
        self,
        row: dict[str, np.ndarray],
        index: int,
        layout: Layout,
        prompt: Sequence[int],
        question: instructions.Question,
    ) -> None:
        answer = self._action(question)
        room = layout.block_lengths[index] - 1
        # The end of an instruction names its target.
        prompt = list(prompt)[max(0, len(prompt) - room + len(answer)) :]
        parts = [([*prompt, self.assistant], 0.0), (answer, 1.0)]
        self._write_block(row, index, layout, parts, question)

    def _write_block(
        self,
        row: dict[str, np.ndarray],
        index: int,
        layout: Layout,
        parts: Sequence[tuple[Sequence[int], float]],
        question: instructions.Question,
    ) -> None:
        """Write a block of parts, whose tokens are labels if their weight is positive."""
        start = int(layout.starts[index])
        ids = [token for tokens, _ in parts for token in tokens]
        weights = np.array([weight for tokens, weight in parts for _ in tokens], np.float32)
        row["tokens"][start : start + len(ids)] = ids
        labelled = np.flatnonzero(weights)
        count = len(labelled)
        row["slots"][index, :count] = start + labelled - 1
        row["labels"][index, :count] = np.array(ids)[labelled]
        row["weights"][index, :count] = weights[labelled]
        sources = np.array(_sources(parts))[labelled]
        row["source"][index, :count] = np.where(sources < 0, NO_SOURCE, start + sources)
        answer = len(parts[-1][0])
        row["acting"][index] = start + len(ids) - answer - 1
        row["action"][index] = count - answer
        if question.target is not None:
            row["target"][index] = self._cell(question.target.box)
            row["box"][index] = question.target.box

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


def _sources(parts: Sequence[tuple[Sequence[int], float]]) -> list[int]:
    """Return for each token of a block the index in its first part, the task, that it repeats.

    Thoughts repeat parts of the task one after the other; the line break at their end, and all
    other tokens, have no source.
    """
    task, at = list(parts[0][0]), 0
    sources = []
    for ids, weight in parts:
        source = NO_SOURCE
        if weight == THOUGHT_WEIGHT and len(ids):
            words = list(ids[:-1])
            starts = range(at, len(task) - len(words) + 1)
            source = next((i for i in starts if task[i : i + len(words)] == words), NO_SOURCE)
        if source == NO_SOURCE:
            sources += [NO_SOURCE] * len(ids)
            continue
        at = source + len(ids) - 1
        sources += [*range(source, at), NO_SOURCE]
    return sources


def speech_batch(
    rng: np.random.Generator,
    groups: Sequence[Sequence[Sequence[Utterance]]],
    shares: Sequence[float],
    size: int,
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw augmented recordings.

    Args:
      rng: random generator.
      groups: recordings of one kind each, as lists per speaker from `by_speaker`; within a kind,
        speakers are equally frequent.
      shares: frequencies of the kinds, with sum 1.
      size: batch size `B`.
      length: number of samples `L` per row.

    Returns:
      `(samples [B, L], digits [B])`.
    """
    drawn = []
    for _ in range(size):
        speakers = groups[rng.choice(len(groups), p=shares)]
        clips = speakers[rng.integers(len(speakers))]
        drawn.append(clips[rng.integers(len(clips))])
    samples = np.stack([fit(augment(rng, u.samples), length) for u in drawn])
    return samples.astype(np.float32), np.array([u.digit for u in drawn], np.int32)


def by_speaker(utterances: Sequence[Utterance]) -> list[list[Utterance]]:
    """Sort recordings into one list per speaker, in the order of the names."""
    names = sorted({utterance.speaker for utterance in utterances})
    return [[u for u in utterances if u.speaker == name] for name in names]


def text_batch(rng: np.random.Generator, tokens: np.ndarray, size: int, length: int) -> np.ndarray:
    """Draw windows [B, length + 1] of a token stream at random offsets.

    Args:
      rng: random generator.
      tokens: token ids.
      size: batch size `B`.
      length: number of predicted tokens per window.
    """
    starts = rng.integers(0, len(tokens) - length, size)
    return np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)
