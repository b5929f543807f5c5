"""The model in JAX behind the engine: boxed or dense parameters, static slots, three programs.

`encode` compiles per image size, `extend` per chunk length, `step` per number of rows; `extend` and
`step` also per number of attended rows. All other sizes are arguments, so no request compiles
anything after `warm_up`, except an image of a new size, and that on the thread that encodes.

Letters of shapes: `B` slots, `N` rows of a call, `T` tokens, `S` cache rows, `A` attended rows, `D`
hidden size, `V` vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.errors import DataError
from glm_edge.generate.early_exit import EarlyExit, run_until_sure
from glm_edge.generate.options import DecodeOptions
from glm_edge.models.glm import init_cache
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.serve.backend import BLOCK, Media

# Chunk lengths of `extend`; the first returns scores of all its tokens.
LENGTHS = (16, 64, 256)


class JaxBackend:
    """A model in JAX with a static cache of several slots.

    See `glm_edge.serve.backend.Backend` for the methods.
    """

    encodes_apart = True

    def __init__(
        self,
        model: MultimodalGLM,
        params: Params,
        num_slots: int = 16,
        capacity: int | None = None,
        cache_dtype: Any = "float32",
        lengths: Sequence[int] = LENGTHS,
        exits: EarlyExit | None = None,
    ):
        """Allocate the cache.

        Args:
          model: the model.
          params: its parameters, boxed or not.
          num_slots: number of slots.
          capacity: most tokens of a prompt and its answer; None takes the context length.
          cache_dtype: as in `DecodeOptions`.
          lengths: chunk lengths of `extend`, in ascending order.
          exits: from `glm_edge.generate.early_exit`; requests choose their threshold.

        Raises:
          DataError: a size is not positive, or exceeds the context length, or a cache cannot have
            this type.
        """
        context = model.config.decoder.max_position_embeddings
        capacity = context if capacity is None else capacity
        if num_slots < 1 or not 1 <= capacity <= context:
            raise DataError(
                f"num_slots must be positive and capacity in 1..{context} (the context length), "
                f"got {num_slots} and {capacity}"
            )
        self.config, self.exits = model.config, exits
        self.num_slots, self.capacity = num_slots, capacity
        self.scored, self.chunk = lengths[0], lengths[-1]
        self._model, self._params, self._lengths = model, params, tuple(lengths)
        # A padded chunk must not reach beyond the last row.
        rows = -(-(capacity + self.chunk) // BLOCK) * BLOCK
        self._attended = sorted({min(512, rows), rows})
        self._widths = sorted({1, min(4, num_slots), num_slots})
        self.row_counts: Sequence[int] = sorted({*self._widths, self.scored})
        dtype = DecodeOptions(cache_dtype=cache_dtype).cache_dtype
        self._layers = init_cache(model.config.decoder, num_slots, rows, dtype)["layers"]

    def encode(self, media: Media) -> np.ndarray:
        """Encode one image or one chunk of speech; compiles per size."""
        frames = None if media.frames is None else np.array([media.frames], np.int32)
        features = _encode(self._model, media.kind, self._params, media.array, frames)
        return np.asarray(features, np.float32)[: media.count]

    def extend(
        self,
        slot: int,
        start: int,
        tokens: np.ndarray,
        positions: np.ndarray,
        features: np.ndarray | None,
        placed: np.ndarray,
        all_scores: bool,
    ) -> Array:
        """Append a chunk, padded on the right to one of the compiled lengths."""
        count = len(tokens)
        length = next(length for length in self._lengths if length >= count)
        padding = (0, length - count)
        if features is None:
            features = np.zeros((count, self.config.decoder.hidden_size), np.float32)
        scores, self._layers = _extend(
            self._model,
            self._attend(start + length),
            all_scores,
            self._params,
            self._layers,
            np.int32(slot),
            np.int32(start),
            np.pad(tokens, padding)[None],
            np.pad(positions, ((0, 0), padding)),
            np.pad(features, (padding, (0, 0)))[None],
            np.pad(placed, padding)[None],
            np.int32(count),
        )
        return scores

    def step(
        self, tokens: np.ndarray, lengths: np.ndarray, positions: np.ndarray, count: int
    ) -> Array:
        """Append one token to each of the first slots, as many as one of the compiled counts."""
        return self._step(tokens, lengths, positions, count, None)[0]

    def step_until_sure(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        positions: np.ndarray,
        count: int,
        thresholds: np.ndarray,
    ) -> tuple[Array, Array]:
        """Do as `step`, with early exit."""
        return self._step(tokens, lengths, positions, count, thresholds)

    def _step(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        positions: np.ndarray,
        count: int,
        thresholds: np.ndarray | None,
    ) -> tuple[Any, Any]:
        width = next(width for width in self._widths if width >= count)
        exits = None
        if thresholds is not None and self.exits is not None:
            exits = dataclasses.replace(self.exits, threshold=jnp.asarray(thresholds[:width]))
        scores, layers, self._layers = _step(
            self._model,
            self._attend(int(lengths[:width].max()) + 1),
            self._params,
            self._layers,
            tokens[:width],
            lengths[:width],
            positions[:width],
            exits,
        )
        return scores, layers

    def copy_out(self, slot: int, start: int) -> Any:
        """Copy rows to new arrays."""
        return _copy_out(self._layers, np.int32(slot), np.int32(start))

    def copy_in(self, slot: int, start: int, rows: Any) -> None:
        """Write copied rows."""
        self._layers = _copy_in(self._layers, rows, np.int32(slot), np.int32(start))

    def block_bytes(self) -> int:
        """Return the bytes of `BLOCK` rows of all layers."""
        leaves = jax.tree.leaves(self._layers)
        return sum(leaf.nbytes // (leaf.shape[0] * leaf.shape[1]) * BLOCK for leaf in leaves)

    def warm_up(self) -> None:
        """Compile every program, for images of the configured size; slots then hold no text."""
        vision, speech, nowhere = self.config.vision, self.config.speech, np.zeros(1, int)
        if vision is not None:
            image = np.zeros((*vision.image_size, vision.channels), np.float32)
            self.encode(Media("image", image, 1, b"", nowhere, nowhere))
        if speech is not None:
            mel = np.zeros((speech.num_frames, speech.mel_bins), np.float32)
            self.encode(Media("audio", mel, 1, b"", nowhere, nowhere, speech.num_frames))
        axes = 3 if self.config.decoder.mrope_section else 1
        for attended in self._attended:
            for length in self._lengths:
                start = 0 if attended == self._attended[0] else attended - length
                if start + length > attended:
                    continue
                positions = np.zeros((axes, length), np.int32)
                for all_scores in {False, length == self.scored}:
                    tokens = np.zeros(length, np.int32)
                    self.extend(0, start, tokens, positions, None, tokens > 0, all_scores)
            for width in self._widths:
                zeros = np.zeros(width, np.int32)
                arguments = zeros, np.full(width, attended - 1, np.int32), zeros, width
                self.step(*arguments)
                if self.exits is not None:
                    self.step_until_sure(*arguments, np.ones(width, np.float32))
        self.copy_in(0, 0, self.copy_out(0, 0))
        jax.block_until_ready(self._layers)

    def _attend(self, length: int) -> int:
        return next(rows for rows in self._attended if rows >= length)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(
    model: MultimodalGLM, kind: str, params: Params, array: Array, frames: Array | None
) -> Array:
    if kind == "image":
        image: Any = model.apply({"params": params}, [array], method="encode_images")
        return image
    speech: Any = model.apply({"params": params}, array[None], frames, method="encode_audio")
    return speech[0] if speech.ndim == 3 else speech


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _extend(
    model: MultimodalGLM,
    attended: int,
    all_scores: bool,
    params: Params,
    layers: Any,
    slot: Array,
    start: Array,
    tokens: Array,
    positions: Array,
    features: Array,
    placed: Array,
    count: Array,
) -> tuple[Array, Any]:
    """Append `count` of the [1, T] tokens to one slot; return scores [T or 1, V] and the cache."""
    x: Any = model.apply({"params": params}, tokens, method=lambda module, t: module.embed(t))
    x = jnp.where(placed[..., None], features.astype(x.dtype), x)
    positions = positions[:, None] if model.config.decoder.mrope_section else positions
    final, layers = _run(model, params, layers, slot, start[None], x, positions, attended)
    if not all_scores:
        final = jax.lax.dynamic_slice_in_dim(final, count - 1, 1, axis=1)
    scores: Any = model.apply({"params": params}, final, method="predict")
    return scores[0].astype(jnp.float32), layers


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(
    model: MultimodalGLM,
    attended: int,
    params: Params,
    layers: Any,
    tokens: Array,
    lengths: Array,
    positions: Array,
    exits: EarlyExit | None,
) -> tuple[Array, Array | None, Any]:
    """Append a token [N] to each of the first slots; return scores, layers used and the cache."""
    positions = positions[:, None]
    if model.config.decoder.mrope_section:
        positions = jnp.broadcast_to(positions, (3, *positions.shape))
    first, used = jnp.zeros((), jnp.int32), None
    if exits is None:
        run = functools.partial(model.apply, {"params": params})
        x: Any = run(tokens[:, None], method=lambda module, t: module.embed(t))
        final, layers = _run(model, params, layers, first, lengths, x, positions, attended)
        scores: Any = run(final, method="predict")
        scores = scores[:, 0].astype(jnp.float32)
    else:
        mask, stopped = _mask(lengths, 1, attended), exits.threshold < 0
        cache = {"layers": _read(layers, first, len(tokens), attended), "length": lengths}
        scores, cache, used = run_until_sure(
            model, params, tokens[:, None], positions, mask, cache, exits, stopped
        )
        layers = _write(layers, cache["layers"], first, lengths, 1)
    return scores, used, layers


def _run(
    model: MultimodalGLM,
    params: Params,
    layers: Any,
    first: Array,
    starts: Array,
    x: Array,
    positions: Array,
    attended: int,
) -> tuple[Array, Any]:
    """Run the decoder on x [N, T, D] behind the rows of `N` slots from `first` on."""
    count, length = x.shape[:2]
    mask = _mask(starts, length, attended)
    cache = {"layers": _read(layers, first, count, attended), "length": starts}

    def decode(module: MultimodalGLM, x: Array) -> tuple[Array, Any]:
        final, _, updated = module.decoder(x, positions, mask, cache)
        return final, updated

    final, updated = model.apply({"params": params}, x, method=decode)
    return final, _write(layers, updated["layers"], first, starts, length)


def _mask(starts: Array, length: int, attended: int) -> Array:
    """Return bool [N, 1, T, A]: a token attends to the rows before its own, and to its own."""
    rows = starts[:, None] + jnp.arange(length)
    return (jnp.arange(attended) <= rows[..., None])[:, None]


def _read(layers: Any, first: Array, count: int, attended: int) -> Any:
    """Return the first `attended` rows of some slots, so that the time does not depend on `S`."""

    def read(array: Array) -> Array:
        start: Any = (first, *(0,) * (array.ndim - 1))
        return jax.lax.dynamic_slice(array, start, (count, attended, *array.shape[2:]))

    return jax.tree.map(read, layers)


def _write(layers: Any, updated: Any, first: Array, starts: Array, length: int) -> Any:
    """Write the new rows of `_read`'s slots back, and no others."""

    def take(rows: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(rows, start, length)

    def write(array: Array, rows: Array) -> Array:
        new = jax.vmap(take)(rows, starts)
        for row in range(len(starts)):
            start: Any = (first + row, starts[row], *(0,) * (array.ndim - 2))
            array = jax.lax.dynamic_update_slice(array, new[row][None], start)
        return array

    return jax.tree.map(write, layers, updated)


@jax.jit
def _copy_out(layers: Any, slot: Array, start: Array) -> Any:
    def take(array: Array) -> Array:
        at: Any = (slot, start, *(0,) * (array.ndim - 2))
        return jax.lax.dynamic_slice(array, at, (1, BLOCK, *array.shape[2:]))

    return jax.tree.map(take, layers)


@functools.partial(jax.jit, donate_argnums=0)
def _copy_in(layers: Any, rows: Any, slot: Array, start: Array) -> Any:
    def put(array: Array, new: Array) -> Array:
        at: Any = (slot, start, *(0,) * (array.ndim - 2))
        return jax.lax.dynamic_update_slice(array, new, at)

    return jax.tree.map(put, layers, rows)
