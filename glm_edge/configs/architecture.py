"""Model configurations as frozen dataclasses, with JSON round trip.

Letters used for shapes in this package: `B` batch, `T` tokens, `S` cache slots, `D` hidden size,
`N` query heads, `K` key/value heads, `H` head dimension, `F` neurons, `V` vocabulary.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from glm_edge.errors import ConfigError

MAX_LAYERS = 1000
MAX_HEAD_DIM = 4096
MAX_PATCHES = 1 << 16
MAX_FRAMES = 1 << 16
# float32 represents these, sums of their squares, and their inverses.
SCALES = (1e-30, 1e30)
MAX_IMAGE_PIXELS = 50_000_000
MAX_IMAGE_SIDE = 1 << 16


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a GLM decoder.

    `num_heads`, `num_kv_heads` and `intermediate_size` are one integer for all layers or, after
    structured pruning, a tuple with one integer per layer. Rotary positions rotate pairs of
    adjacent dimensions of a head (`rotary_interleaved`, GLM) or pairs half a head apart (Llama).
    `mrope_section` splits the rotary frequencies over (time, height, width) positions.
    `sandwich_norm` adds a norm after each branch to the norm before it.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int | tuple[int, ...]
    num_kv_heads: int | tuple[int, ...]
    head_dim: int
    intermediate_size: int | tuple[int, ...]
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    rotary_interleaved: bool = True
    attention_bias: bool = False
    sandwich_norm: bool = False
    mrope_section: tuple[int, ...] = ()
    tie_embeddings: bool = True
    max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "head_dim", "max_position_embeddings")
        _check_numbers("decoder", self, sizes, ("rms_norm_eps", "rope_theta"))
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(f"decoder: num_layers {self.num_layers} exceeds {MAX_LAYERS}")
        for layer in range(self.num_layers):
            heads, kv_heads = self.heads(layer), self.kv_heads(layer)
            if kv_heads < 1 or heads % kv_heads:
                raise ConfigError(
                    f"decoder layer {layer}: num_heads {heads} must be a multiple of "
                    f"num_kv_heads {kv_heads}"
                )
        if self.head_dim > MAX_HEAD_DIM:
            raise ConfigError(f"decoder: head_dim {self.head_dim} exceeds {MAX_HEAD_DIM}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ConfigError(
                f"decoder: head_dim {self.head_dim} x partial_rotary_factor "
                f"{self.partial_rotary_factor} must be even and no more than head_dim"
            )
        if self.mrope_section and 2 * sum(self.mrope_section) != self.rotary_dim:
            raise ConfigError(
                f"decoder: mrope_section {self.mrope_section} must sum to {self.rotary_dim // 2}"
            )

    def heads(self, layer: int) -> int:
        """Return the query heads of one layer."""
        return _of_layer(self.num_heads, layer, "num_heads")

    def kv_heads(self, layer: int) -> int:
        """Return the key/value heads of one layer."""
        return _of_layer(self.num_kv_heads, layer, "num_kv_heads")

    def neurons(self, layer: int) -> int:
        """Return the width of the gated feed-forward network of one layer."""
        return _of_layer(self.intermediate_size, layer, "intermediate_size")

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head; the others pass through unchanged."""
        return int(self.head_dim * self.partial_rotary_factor)


class EncoderWidths:
    """Widths of an encoder's layers.

    `num_heads` and `intermediate_size` are one integer for all layers or, after structured pruning,
    a tuple with one integer per layer. A tuple of `num_heads` requires `head_dim`, which otherwise
    defaults to `hidden_size / num_heads`.
    """

    hidden_size: int
    num_heads: int | tuple[int, ...]
    intermediate_size: int | tuple[int, ...]
    head_dim: int | None

    def heads(self, layer: int) -> int:
        """Return the heads of one layer."""
        return _of_layer(self.num_heads, layer, "num_heads", self._name)

    def kv_heads(self, layer: int) -> int:
        """Return the key/value heads of one layer, by default the number of query heads."""
        shared = getattr(self, "num_kv_heads", None)
        return self.heads(layer) if shared is None else shared

    def neurons(self, layer: int) -> int:
        """Return the width of the feed-forward network of one layer."""
        return _of_layer(self.intermediate_size, layer, "intermediate_size", self._name)

    @property
    def head_size(self) -> int:
        """Dimensions per head."""
        return self.hidden_size // self.heads(0) if self.head_dim is None else self.head_dim

    @property
    def _name(self) -> str:
        return type(self).__name__.removesuffix("Config").lower()

    def _check_widths(self, entries: int) -> None:
        """Check widths; `entries` is the required length of a tuple."""
        sizes = [
            name for name in ("hidden_size", "num_heads") if isinstance(getattr(self, name), int)
        ]
        _check_numbers(self._name, self, sizes, ())
        for field in ("num_heads", "intermediate_size"):
            widths = getattr(self, field)
            if not isinstance(widths, int) and (len(widths) != entries or min(widths) < 1):
                raise ConfigError(
                    f"{self._name}: {field} {widths!s:.60} must be one integer, or {entries} "
                    "integers of at least 1"
                )
        shared = getattr(self, "num_kv_heads", None)
        for heads in self.num_heads if isinstance(self.num_heads, tuple) else (self.num_heads,):
            if shared is not None and (shared < 1 or heads % shared):
                raise ConfigError(
                    f"{self._name}: num_heads {heads} must be a multiple of num_kv_heads {shared}"
                )
        if self.head_dim is not None:
            if not 1 <= self.head_dim <= MAX_HEAD_DIM:
                raise ConfigError(
                    f"{self._name}: head_dim {self.head_dim} must be in 1..{MAX_HEAD_DIM}"
                )
            return
        if not isinstance(self.num_heads, int):
            raise ConfigError(f"{self._name}: num_heads that differ per layer require head_dim")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{self._name}: hidden_size {self.hidden_size} must be a multiple of num_heads "
                f"{self.num_heads}"
            )


@dataclass(frozen=True)
class VisionConfig(EncoderWidths):
    """Shape of a vision tower: patches, pre-norm transformer, merge, gated projector.

    The defaults describe GLM-4.1V's tower. SigLIP has layer norms with biases (`norm`), a plain
    feed-forward network (`gated_mlp=False`), biases in every projection (`attention_bias` on query,
    key and value, `projection_bias` on the others), no `rotary` positions and a `pooling_head`.
    GLM-OCR normalizes queries and keys (`qk_norm`) and has no `learned_positions`. A standalone
    tower has no merge and no projector (`merge_size=1`, `projector_size=0`).
    `boundary_embeddings` adds a learned vector before and after the features of an image
    (GLM-Edge-V).

    Patches of `patch_size` pixels are read every `patch_stride` pixels. Both are equal in GLM-4.1V;
    in nano patches overlap, with a size of twice the stride. Layers not listed in `global_layers`
    attend within windows of `window` patches (rows, columns); `window=None` makes every layer
    global. `separable_positions` adds a learned row and column embedding to the projected features,
    so that the decoder sees the location of a feature. Per-layer widths have one more entry, the
    last, for the pooling head.
    """

    image_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_heads: int | tuple[int, ...]
    intermediate_size: int | tuple[int, ...]
    projector_size: int
    patch_size: int = 14
    patch_stride: int = 14
    temporal_patch_size: int = 2
    channels: int = 3
    merge_size: int = 2
    position_grid: tuple[int, int] = (24, 24)
    learned_positions: bool = True
    rotary: bool = True
    norm: str = "rms"
    norm_eps: float = 1e-5
    post_conv_norm: bool = True
    qk_norm: bool = False
    rope_theta: float = 10000.0
    attention_bias: bool = False
    projection_bias: bool = False
    gated_mlp: bool = True
    pooling_head: bool = False
    boundary_embeddings: bool = False
    window: tuple[int, int] | None = None
    global_layers: tuple[int, ...] = ()
    separable_positions: bool = False
    head_dim: int | None = None

    def __post_init__(self) -> None:
        sizes = ("patch_size", "patch_stride", "temporal_patch_size", "channels", "merge_size")
        _check_numbers("vision", self, sizes, ("norm_eps", "rope_theta"))
        if self.norm not in ("rms", "layer"):
            raise ConfigError(f"vision: norm must be 'rms' or 'layer', not {self.norm!r:.60}")
        self._check_widths(self.num_layers + self.pooling_head)
        if self.rotary and self.head_size % 4:
            raise ConfigError(
                f"vision: hidden_size {self.hidden_size} / num_heads {self.num_heads} must be a "
                "multiple of 4, since rows and columns each rotate pairs of a head's dimensions"
            )
        if not self.projector_size and self.merge_size != 1:
            raise ConfigError("vision: a tower without projector must have merge_size 1")
        if (self.patch_size - self.patch_stride) % 2 or self.patch_size < self.patch_stride:
            raise ConfigError(
                f"vision: patch_size {self.patch_size} must exceed patch_stride "
                f"{self.patch_stride} by an even number of pixels"
            )
        if math.prod(self.image_size) > MAX_IMAGE_PIXELS or max(self.image_size) > MAX_IMAGE_SIDE:
            raise ConfigError(
                f"vision: image_size {self.image_size} exceeds {MAX_IMAGE_PIXELS} pixels or "
                f"{MAX_IMAGE_SIDE} per side"
            )
        rows, columns = self.grid_of(self.image_size)
        if rows * columns > MAX_PATCHES:
            raise ConfigError(f"vision: {rows}x{columns} patches exceed {MAX_PATCHES}")

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Compute the patches (rows, columns) of an image.

        Args:
          image_size: (height, width) in pixels.

        Returns:
          Patches (rows, columns).

        Raises:
          ConfigError: `merge_size` or `window` does not divide the patches.
        """
        rows, columns = (pixels // self.patch_stride for pixels in image_size)
        if rows % self.merge_size or columns % self.merge_size or not rows * columns:
            raise ConfigError(
                f"vision: merge_size {self.merge_size} must divide {rows}x{columns} patches of an "
                f"image of {tuple(image_size)} pixels"
            )
        if self.window and (rows % self.window[0] or columns % self.window[1]):
            raise ConfigError(f"vision: window {self.window} must divide {rows}x{columns} patches")
        return rows, columns

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns) of the default image size."""
        return self.grid_of(self.image_size)

    @property
    def num_tokens(self) -> int:
        """Features per image of the default size, as the decoder reads them."""
        rows, columns = self.grid
        return rows * columns // self.merge_size**2 + 2 * self.boundary_embeddings


@dataclass(frozen=True)
class SpeechConfig(EncoderWidths):
    """Shape of a speech encoder: log-mel, two convolutions, transformer, merge, projector.

    The defaults are GLM-ASR's. Whisper's encoder has `learned_positions` and no rotation
    (`partial_rotary_factor=0`). A standalone encoder has no merge and no projector
    (`merge_size=1`, `projector_size=0`). With `num_kv_heads`, several query heads share a
    key/value head.
    """

    mel_bins: int
    num_frames: int
    hidden_size: int
    num_layers: int
    num_heads: int | tuple[int, ...]
    intermediate_size: int | tuple[int, ...]
    projector_size: int
    merge_size: int = 4
    learned_positions: bool = False
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    sample_rate: int = 16000
    fft_size: int = 400
    hop_length: int = 160
    head_dim: int | None = None
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        sizes = ("mel_bins", "num_frames", "merge_size", "sample_rate", "fft_size", "hop_length")
        _check_numbers("speech", self, sizes, ("layer_norm_eps", "rope_theta"))
        if self.num_frames > MAX_FRAMES:
            raise ConfigError(f"speech: num_frames {self.num_frames} exceeds {MAX_FRAMES}")
        if self.num_frames % (2 * self.merge_size):
            raise ConfigError(
                f"speech: num_frames {self.num_frames} must be a multiple of "
                f"{2 * self.merge_size} (convolution stride 2, merge {self.merge_size})"
            )
        self._check_widths(self.num_layers)
        if self.rotary_dim % 2 or self.rotary_dim > self.head_size:
            raise ConfigError(
                f"speech: hidden_size / num_heads {self.head_size} x partial_rotary_factor "
                f"{self.partial_rotary_factor} must be even and no more than {self.head_size}"
            )
        if not self.projector_size and self.merge_size != 1:
            raise ConfigError("speech: an encoder without projector must have merge_size 1")

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head; the others pass through unchanged."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def num_tokens(self) -> int:
        """Features per complete recording, as the decoder reads them."""
        return self.num_frames // (2 * self.merge_size)


@dataclass(frozen=True)
class TextConfig(EncoderWidths):
    """Shape of a bidirectional text encoder (BERT; DistilBERT has no token types).

    `pooler` is the activation of the layer that reads the first token: `tanh` (BERT), `relu`
    (DistilBERT's classifier), or None for no such layer.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int | tuple[int, ...]
    intermediate_size: int | tuple[int, ...]
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    num_labels: int = 0
    pooler: str | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "max_position_embeddings")
        _check_numbers("text", self, sizes, ("layer_norm_eps",))
        if self.pooler not in (None, "tanh", "relu"):
            raise ConfigError(
                f"text: pooler must be 'tanh', 'relu' or None, not {self.pooler!r:.60}"
            )
        self._check_widths(self.num_layers)


@dataclass(frozen=True)
class GLMConfig:
    """A multimodal GLM: a decoder, optional encoders, and their placeholder tokens.

    Video frames use `image_token_id` as placeholder too. The other token ids are for prompts;
    `image_boundary_ids` and `video_boundary_ids` are (begin, end).
    """

    name: str
    decoder: DecoderConfig
    vision: VisionConfig | None = None
    speech: SpeechConfig | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    video_token_id: int | None = None
    image_boundary_ids: tuple[int, ...] = ()
    video_boundary_ids: tuple[int, ...] = ()

    @property
    def vision_tower(self) -> VisionConfig:
        """Return `vision` of a model that sees.

        Raises:
          ConfigError: the model has none.
        """
        if self.vision is None:
            raise ConfigError(f"{self.name}: a model with vision is needed")
        return self.vision

    @property
    def speech_encoder(self) -> SpeechConfig:
        """Return `speech` of a model that hears.

        Raises:
          ConfigError: the model has none.
        """
        if self.speech is None:
            raise ConfigError(f"{self.name}: a model with speech is needed")
        return self.speech

    def __post_init__(self) -> None:
        for encoder, token in (("vision", "image_token_id"), ("speech", "audio_token_id")):
            if getattr(self, encoder) is None:
                continue
            placeholder = getattr(self, token)
            if placeholder is None:
                raise ConfigError(f"{self.name}: a model with {encoder} needs {token}")
            if placeholder >= self.decoder.vocab_size:
                raise ConfigError(
                    f"{self.name}: {token} {placeholder} must be below vocab_size "
                    f"{self.decoder.vocab_size}"
                )


ModelConfig = GLMConfig | DecoderConfig | VisionConfig | SpeechConfig | TextConfig
"""Shape of a model or of one encoder."""


def _check_numbers(part: str, config: Any, sizes: Iterable[str], scales: Iterable[str]) -> None:
    """Refuse sizes below 1, and scales outside the range of `SCALES`."""
    for name in sizes:
        if getattr(config, name) < 1:
            raise ConfigError(f"{part}: {name} {getattr(config, name)} must be at least 1")
    for name in scales:
        low, high = SCALES
        if not low <= getattr(config, name) <= high:
            raise ConfigError(
                f"{part}: {name} {getattr(config, name)} must be in {low:g}..{high:g}"
            )


def _of_layer(value: int | tuple[int, ...], layer: int, field: str, part: str = "decoder") -> int:
    if isinstance(value, int):
        return value
    if layer >= len(value):
        raise ConfigError(f"{part}: {field} lists {len(value)} layers, layer {layer} is missing")
    return value[layer]


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """Convert a configuration (of a GLM or of one encoder) to JSON-ready dictionaries."""
    return dataclasses.asdict(config)


Config = TypeVar("Config")


@overload
def from_dict(fields: dict[str, Any]) -> GLMConfig: ...


@overload
def from_dict(fields: dict[str, Any], kind: type[Config]) -> Config: ...


def from_dict(fields: dict[str, Any], kind: type = GLMConfig) -> object:
    """Rebuild a configuration from the output of `to_dict` or its JSON.

    Args:
      fields: nested dictionaries; lists become tuples.
      kind: class of the configuration.

    Returns:
      The configuration, checked.

    Raises:
      ConfigError: a field is unknown, missing, of the wrong type, or inconsistent with another.

    Example:
      >>> from_dict(to_dict(preset("nano"))) == preset("nano")
      True
    """
    if kind is not GLMConfig:
        return _build(kind, fields, "config")
    nested = {"decoder": DecoderConfig, "vision": VisionConfig, "speech": SpeechConfig}
    values = dict(fields)
    for name, part in nested.items():
        if values.get(name) is not None:
            values[name] = _build(part, values[name], name)
    return _build(GLMConfig, values, "config")


def _build(kind: type, fields: Any, where: str) -> Any:
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: expected an object of fields, found {type(fields).__name__}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r:.60}; known: {', '.join(known)}")
    missing = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and name not in fields
    ]
    if missing:
        raise ConfigError(f"{where}: field {missing[0]!r} is missing")
    hints = typing.get_type_hints(kind)
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            raise ConfigError(
                f"{where}: field {name!r} is {value!r:.200}, a value of the wrong type; it must be "
                f"{getattr(hints[name], '__name__', hints[name])}"
            )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _fits(value: Any, hint: Any) -> bool:
    """Test a JSON value against a field's annotation; integers are in 0..2**31 - 1."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            return False
        if arguments[-1] is ...:
            arguments = arguments[:1] * len(value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is int:
        return type(value) is int and 0 <= value < 2**31
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, hint)
