"""Interface between the engine and what runs the model, and the prompts that it reads.

A backend has slots: rows of a static cache, one per running request. The engine gives each request
a slot, extends the slots' texts, and steps all running slots at once.

Letters of shapes: `T` tokens, `V` vocabulary, `D` hidden size, `M` features of one image or
recording.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError
from glm_edge.generate.early_exit import EarlyExit
from glm_edge.generate.prompts import Prompt
from glm_edge.models.multimodal import audio_features, feature_counts, feature_grids
from glm_edge.preprocess.inputs import Inputs

# Rows of a cache that are copied together.
BLOCK = 32


@dataclass(frozen=True, eq=False)
class Media:
    """One image, video or chunk of speech of a prompt.

    Attributes:
      kind: "image" or "audio".
      array: pixels [H, W, C] or [F, H, W, C], or log-mel frames [frames, bins].
      count: number of features.
      key: hash of the content.
      places: int [P], ascending indices of placeholders in the prompt.
      offsets: int [P], index of the feature at each place; not all features have a place after
        vision token pruning.
      frames: frames with sound of a chunk of speech; None for all.
    """

    kind: str
    array: np.ndarray
    count: int
    key: bytes
    places: np.ndarray
    offsets: np.ndarray
    frames: int | None = None


@dataclass(frozen=True, eq=False)
class ReadyPrompt:
    """One checked prompt.

    Attributes:
      tokens: int32 [T].
      positions: int32 [3, T] with three-dimensional rotary positions, else [1, T].
      following: position of the first generated token.
      media: in order of their placeholders.
    """

    tokens: np.ndarray
    positions: np.ndarray
    following: int
    media: tuple[Media, ...]

    def media_tokens(self, kind: str) -> int:
        """Count the placeholders of "image" or "audio"."""
        return sum(len(media.places) for media in self.media if media.kind == kind)


class Backend(Protocol):
    """A runtime of a model, as the engine calls it.

    Attributes:
      config: configuration of the model.
      num_slots: number of slots.
      capacity: positions per slot that may hold a text.
      chunk: most tokens of one call of `extend`.
      scored: most tokens of one call of `extend` that returns scores of all of them.
      row_counts: numbers of rows that scores can have.
      exits: exits of `step_until_sure`, or None if it is not available.
      encodes_apart: True if `encode` may run on another thread while the other methods run.
    """

    config: GLMConfig
    num_slots: int
    capacity: int
    chunk: int
    scored: int
    row_counts: Sequence[int]
    exits: EarlyExit | None
    encodes_apart: bool

    def encode(self, media: Media) -> np.ndarray:
        """Encode an image or a chunk of speech to features [M, D]."""
        ...

    def extend(
        self,
        slot: int,
        start: int,
        tokens: np.ndarray,
        positions: np.ndarray,
        features: np.ndarray | None,
        placed: np.ndarray,
        all_scores: bool,
    ) -> Any:
        """Append tokens to the text of a slot.

        Args:
          slot: index of the slot.
          start: number of tokens that the slot already holds.
          tokens: int32 [T], at most `chunk`, or `scored` with `all_scores`.
          positions: int32 [1, T] or [3, T].
          features: float32 [T, D] of images and recordings, or None without any.
          placed: bool [T], True where a feature replaces the embedded token.
          all_scores: returns scores of all tokens instead of the last only.

        Returns:
          Scores of the next token after each, [T or more, V], or [1, V].
        """
        ...

    def step(
        self, tokens: np.ndarray, lengths: np.ndarray, positions: np.ndarray, count: int
    ) -> Any:
        """Append one token to each of the first slots, and possibly to others.

        Args:
          tokens: int32 [B].
          lengths: int32 [B], tokens that each slot already holds. A slot that is not decoding
            takes any token there: the engine overwrites that place later.
          positions: int32 [B].
          count: number of first slots whose scores are needed.

        Returns:
          Scores of the next tokens, [`count` or more, V].
        """
        ...

    def step_until_sure(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        positions: np.ndarray,
        count: int,
        thresholds: np.ndarray,
    ) -> tuple[Any, Any]:
        """Do as `step`, with early exit.

        Args:
          tokens: as for `step`, as are the next three.
          lengths: int32 [B].
          positions: int32 [B].
          count: number of first slots whose scores are needed.
          thresholds: float32 [B], see `early_exit`; above 1 runs all layers, below 0 is for slots
            whose scores are not needed.

        Returns:
          `(scores, layers)`: as for `step`, and int32 [`count` or more], layers per row.
        """
        ...

    def copy_out(self, slot: int, start: int) -> Any:
        """Copy `BLOCK` rows of a slot from `start` on, a multiple of `BLOCK`."""
        ...

    def copy_in(self, slot: int, start: int, rows: Any) -> None:
        """Write rows of `copy_out` to a slot."""
        ...

    def block_bytes(self) -> int:
        """Return the bytes of the rows of one `copy_out`."""
        ...

    def warm_up(self) -> None:
        """Compile everything that requests can need."""
        ...


def ready_prompt(config: GLMConfig, inputs: Inputs, capacity: int) -> ReadyPrompt:
    """Check one prompt, and find its media and positions.

    Args:
      config: of the model.
      inputs: one row, without padding inside.
      capacity: most tokens of a prompt.

    Returns:
      The prompt.

    Raises:
      DataError: inputs do not fit the model or each other.
    """
    inputs = Inputs.of(inputs)
    if len(inputs.tokens) != 1:
        raise DataError(f"a request is one prompt, got {len(inputs.tokens)} rows")
    tokens = inputs.tokens[0][inputs.valid[0]].astype(np.int32)
    if len(tokens) > capacity:
        raise DataError(f"a prompt of {len(tokens)} tokens exceeds the {capacity} of a slot")
    # The checks of `generate`: token ids in range.
    Prompt.of(config, tokens[None], 1, beyond_context=True)
    media = sorted(
        (*_images(config, inputs, tokens), *_recordings(config, inputs, tokens)),
        key=lambda item: int(item.places[0]),
    )
    positions, following = prompt_positions(config, tokens, media)
    return ReadyPrompt(tokens, positions, following, tuple(media))


def prompt_positions(
    config: GLMConfig, tokens: np.ndarray, media: Sequence[Media]
) -> tuple[np.ndarray, int]:
    """Compute rotary positions, as `MultimodalGLM.start_positions`, without compiling.

    Args:
      config: of the model.
      tokens: int32 [T].
      media: of the prompt.

    Returns:
      `(positions, following)`: int32 [1, T] or [3, T], and the position of the next token.
    """
    if not config.decoder.mrope_section:
        return np.arange(len(tokens), dtype=np.int32)[None], len(tokens)
    images = [item for item in media if item.kind == "image"]
    advance = np.ones(len(tokens), np.int32)
    offset = np.zeros((3, len(tokens)), np.int32)
    for item in images:
        at = int(item.places[0])
        grids: Any = [item.array]
        for rows, columns in feature_grids(grids, config.vision_tower):
            size = rows * columns
            offset[1, at : at + size] = np.repeat(np.arange(rows), columns)
            offset[2, at : at + size] = np.tile(np.arange(columns), rows)
            # The features of a grid share one time; the last advances past the grid.
            advance[at : at + size] = 0
            advance[at + size - 1] = max(rows, columns)
            at += size
    following = np.cumsum(advance)
    return (following - advance + offset).astype(np.int32), int(following[-1])


def _images(config: GLMConfig, inputs: Inputs, tokens: np.ndarray) -> list[Media]:
    if inputs.images is None:
        return _placed("image", config.image_token_id, tokens, [], [], [])
    if config.vision is None:
        raise DataError(f"{config.name} has no vision encoder")
    arrays = []
    for image in map(np.asarray, inputs.images):
        size = config.vision.temporal_patch_size
        # Text may separate the temporal patches of a video, which the tower encodes one by one.
        arrays += np.split(image, len(image) // size) if image.ndim == 4 else [image]
    counts = feature_counts(arrays, config.vision)
    return _placed("image", config.image_token_id, tokens, arrays, counts, [None] * len(arrays))


def _recordings(config: GLMConfig, inputs: Inputs, tokens: np.ndarray) -> list[Media]:
    if inputs.audio is None:
        return _placed("audio", config.audio_token_id, tokens, [], [], [])
    if config.speech is None:
        raise DataError(f"{config.name} has no speech encoder")
    arrays = list(np.asarray(inputs.audio))
    frames: list[int | None] = [None] * len(arrays)
    counts = [config.speech.num_tokens] * len(arrays)
    if inputs.audio_frames is not None:
        frames = [int(count) for count in inputs.audio_frames]
        merged = audio_features(inputs.audio_frames, config.speech.merge_size)
        counts = [int(count) for count in merged]
    return _placed("audio", config.audio_token_id, tokens, arrays, counts, frames)


def _placed(
    kind: str,
    token: int | None,
    tokens: np.ndarray,
    arrays: Sequence[np.ndarray],
    counts: Sequence[int],
    frames: Sequence[int | None],
) -> list[Media]:
    """Assign placeholders to items in reading order; one item's are adjacent."""
    places = np.flatnonzero(tokens == token) if token is not None else np.zeros(0, int)
    if len(places) != sum(counts):
        raise DataError(f"the prompt has {len(places)} placeholders of {kind}, not {sum(counts)}")
    media, at = [], 0
    for array, count, sounding in zip(arrays, counts, frames, strict=True):
        if not count:
            continue
        taken = places[at : at + count]
        if taken[-1] != taken[0] + count - 1:
            raise DataError(f"the {count} placeholders of an item of {kind} are not adjacent")
        content = np.ascontiguousarray(array)
        facts = f"{kind}{content.shape}{content.dtype}{sounding}".encode()
        key = hashlib.blake2b(facts + content.tobytes(), digest_size=16).digest()
        media.append(Media(kind, content, count, key, taken, np.arange(count), sounding))
        at += count
    return media
