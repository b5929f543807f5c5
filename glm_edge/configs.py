"""Model configurations: frozen dataclasses and presets.

Letters used for shapes in this package: `B` batch, `T` tokens, `S` cache slots, `D` hidden size,
`N` query heads, `K` key/value heads, `H` head dimension, `F` neurons, `V` vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from glm_edge.errors import ConfigError


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a GLM decoder.

    `num_heads`, `num_kv_heads` and `intermediate_size` are one number for all layers, or, after
    structured pruning, one number per layer. `mrope_section` splits the rotary frequencies over
    (time, height, width) positions.
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
    attention_bias: bool = False
    sandwich_norm: bool = False
    mrope_section: tuple[int, ...] = ()
    tie_embeddings: bool = True
    max_position_embeddings: int = 8192

    def __post_init__(self):
        for layer in range(self.num_layers):
            heads, kv_heads = self.heads(layer), self.kv_heads(layer)
            if kv_heads < 1 or heads % kv_heads:
                raise ConfigError(
                    f"decoder layer {layer}: num_heads {heads} must be a multiple of "
                    f"num_kv_heads {kv_heads}"
                )
        if self.rotary_dim % 2:
            raise ConfigError(
                f"decoder: head_dim {self.head_dim} x partial_rotary_factor "
                f"{self.partial_rotary_factor} must be even"
            )
        if self.mrope_section and 2 * sum(self.mrope_section) != self.rotary_dim:
            raise ConfigError(
                f"decoder: mrope_section {self.mrope_section} must sum to {self.rotary_dim // 2}"
            )

    def heads(self, layer: int) -> int:
        """Query heads of one layer."""
        return _of_layer(self.num_heads, layer, "num_heads")

    def kv_heads(self, layer: int) -> int:
        """Key/value heads of one layer."""
        return _of_layer(self.num_kv_heads, layer, "num_kv_heads")

    def neurons(self, layer: int) -> int:
        """Width of the gated feed-forward network of one layer."""
        return _of_layer(self.intermediate_size, layer, "intermediate_size")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotate; the rest pass through."""
        return int(self.head_dim * self.partial_rotary_factor)


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a GLM vision tower: patches, pre-norm transformer, 2x2 merge, gated projector.

    A window of `patch_size` pixels is read every `patch_stride` pixels (equal in GLM-4.1V; twice
    as large in nano, which overlaps). Attention is local to windows of `window` patches (rows,
    columns) in every layer not listed in `global_layers`; `window=None` is global throughout.
    `separable_positions` adds a learned row and column embedding to the projected features, so
    that the decoder can read off where a feature lies.
    """

    image_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    projector_size: int
    patch_size: int = 14
    patch_stride: int = 14
    temporal_patch_size: int = 2
    channels: int = 3
    merge_size: int = 2
    position_grid: tuple[int, int] = (24, 24)
    post_conv_norm: bool = True
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    attention_bias: bool = False
    window: tuple[int, int] | None = None
    global_layers: tuple[int, ...] = ()
    separable_positions: bool = False

    def __post_init__(self):
        rows, columns = self.grid
        if rows % self.merge_size or columns % self.merge_size:
            raise ConfigError(
                f"vision: {rows}x{columns} patches of image_size {self.image_size} must divide "
                f"by merge_size {self.merge_size}"
            )
        if (self.patch_size - self.patch_stride) % 2 or self.patch_size < self.patch_stride:
            raise ConfigError(
                f"vision: patch_size {self.patch_size} must exceed patch_stride "
                f"{self.patch_stride} by an even number of pixels"
            )
        if self.window and (rows % self.window[0] or columns % self.window[1]):
            raise ConfigError(f"vision: window {self.window} must divide {rows}x{columns} patches")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns) of the default image size."""
        return self.image_size[0] // self.patch_stride, self.image_size[1] // self.patch_stride

    @property
    def num_tokens(self) -> int:
        """Features that one image gives to the decoder."""
        rows, columns = self.grid
        return rows * columns // self.merge_size**2


@dataclass(frozen=True)
class SpeechConfig:
    """Shape of a GLM-ASR speech encoder: log-mel, two convolutions, transformer, 4x merge."""

    mel_bins: int
    num_frames: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    projector_size: int
    merge_size: int = 4
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    sample_rate: int = 16000
    fft_size: int = 400
    hop_length: int = 160

    def __post_init__(self):
        if self.num_frames % (2 * self.merge_size):
            raise ConfigError(
                f"speech: num_frames {self.num_frames} must be a multiple of "
                f"{2 * self.merge_size} (convolution stride 2, merge {self.merge_size})"
            )

    @property
    def num_tokens(self) -> int:
        """Features that one recording gives to the decoder."""
        return self.num_frames // (2 * self.merge_size)


@dataclass(frozen=True)
class TextConfig:
    """Shape of a bidirectional text encoder (BERT; DistilBERT has no token types)."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    num_labels: int = 0


@dataclass(frozen=True)
class GLMConfig:
    """A multimodal GLM: a decoder and, where present, its encoders and placeholder tokens."""

    name: str
    decoder: DecoderConfig
    vision: VisionConfig | None = None
    speech: SpeechConfig | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        for encoder, token in (("vision", "image_token_id"), ("speech", "audio_token_id")):
            if getattr(self, encoder) is not None and getattr(self, token) is None:
                raise ConfigError(f"{self.name}: a model with {encoder} needs {token}")


def _of_layer(value: int | tuple[int, ...], layer: int, field: str) -> int:
    if isinstance(value, int):
        return value
    if layer >= len(value):
        raise ConfigError(f"decoder: {field} lists {len(value)} layers, layer {layer} is missing")
    return value[layer]


def to_dict(config: GLMConfig) -> dict[str, Any]:
    """Turns a configuration into JSON-ready dictionaries."""
    return dataclasses.asdict(config)


def from_dict(fields: dict[str, Any]) -> GLMConfig:
    """Rebuilds a configuration from `to_dict`'s output, or from its JSON.

    Args:
      fields: nested dictionaries; lists are read as tuples.

    Returns:
      The configuration.

    Raises:
      ConfigError: a field is unknown or missing.
    """
    nested = {"decoder": DecoderConfig, "vision": VisionConfig, "speech": SpeechConfig}
    values = dict(fields)
    for name, kind in nested.items():
        if values.get(name) is not None:
            values[name] = _build(kind, values[name], name)
    return _build(GLMConfig, values, "config")


def _build(kind: type, fields: Any, where: str) -> Any:
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: expected an object of fields, found {type(fields).__name__}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(known)}")
    missing = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and name not in fields
    ]
    if missing:
        raise ConfigError(f"{where}: field {missing[0]!r} is missing")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def preset(name: str) -> GLMConfig:
    """Returns a named configuration.

    Args:
      name: `nano` (shipped with weights), `tiny` (86 M parameters), `mobile` (340 M), `large`
        (GLM-Edge-1.5B's shape) or `phone_9b` (GLM-4.1V-9B's shape with GLM-ASR's encoder).

    Returns:
      The configuration.

    Raises:
      ConfigError: no preset has this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


_GLM_EDGE_TOKENS = {
    "image_token_id": 59256,
    "audio_token_id": 59260,
    "eos_token_ids": (59246, 59253, 59255),
    "pad_token_id": 59246,
}

PRESETS = {
    "nano": GLMConfig(
        name="nano",
        decoder=DecoderConfig(
            vocab_size=2304,
            hidden_size=256,
            num_layers=4,
            num_heads=8,
            num_kv_heads=2,
            head_dim=32,
            intermediate_size=512,
            partial_rotary_factor=0.5,
            max_position_embeddings=512,
        ),
        vision=VisionConfig(
            image_size=(192, 96),
            hidden_size=128,
            num_layers=3,
            num_heads=4,
            intermediate_size=256,
            projector_size=256,
            patch_size=16,
            patch_stride=8,
            temporal_patch_size=1,
            position_grid=(24, 12),
            window=(4, 12),
            global_layers=(2,),
            separable_positions=True,
        ),
        speech=SpeechConfig(
            mel_bins=40,
            num_frames=160,
            hidden_size=128,
            num_layers=3,
            num_heads=4,
            intermediate_size=384,
            projector_size=256,
            sample_rate=8000,
            fft_size=200,
            hop_length=80,
        ),
        image_token_id=5,
        audio_token_id=8,
        eos_token_ids=(0,),
        pad_token_id=10,
    ),
    "tiny": GLMConfig(
        name="tiny",
        decoder=DecoderConfig(
            vocab_size=59264,
            hidden_size=512,
            num_layers=10,
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
            intermediate_size=1536,
            max_position_embeddings=4096,
        ),
        vision=VisionConfig(
            image_size=(448, 224),
            hidden_size=384,
            num_layers=8,
            num_heads=6,
            intermediate_size=1024,
            projector_size=1024,
            position_grid=(32, 16),
        ),
        speech=SpeechConfig(
            mel_bins=80,
            num_frames=3000,
            hidden_size=384,
            num_layers=4,
            num_heads=6,
            intermediate_size=1536,
            projector_size=1024,
        ),
        **_GLM_EDGE_TOKENS,
    ),
    "mobile": GLMConfig(
        name="mobile",
        decoder=DecoderConfig(
            vocab_size=59264,
            hidden_size=1024,
            num_layers=16,
            num_heads=16,
            num_kv_heads=4,
            head_dim=64,
            intermediate_size=3072,
        ),
        vision=VisionConfig(
            image_size=(672, 336),
            hidden_size=512,
            num_layers=12,
            num_heads=8,
            intermediate_size=1536,
            projector_size=3072,
            position_grid=(24, 24),
        ),
        speech=SpeechConfig(
            mel_bins=128,
            num_frames=3000,
            hidden_size=512,
            num_layers=6,
            num_heads=8,
            intermediate_size=2048,
            projector_size=2048,
        ),
        **_GLM_EDGE_TOKENS,
    ),
    "large": GLMConfig(
        name="large",
        decoder=DecoderConfig(
            vocab_size=59264,
            hidden_size=2048,
            num_layers=28,
            num_heads=16,
            num_kv_heads=4,
            head_dim=128,
            intermediate_size=6144,
        ),
        eos_token_ids=(59246, 59253, 59255),
        pad_token_id=59246,
    ),
    "phone_9b": GLMConfig(
        name="phone_9b",
        decoder=DecoderConfig(
            vocab_size=151552,
            hidden_size=4096,
            num_layers=40,
            num_heads=32,
            num_kv_heads=2,
            head_dim=128,
            intermediate_size=13696,
            partial_rotary_factor=0.5,
            attention_bias=True,
            sandwich_norm=True,
            mrope_section=(8, 12, 12),
            tie_embeddings=False,
        ),
        vision=VisionConfig(
            image_size=(672, 336),
            hidden_size=1536,
            num_layers=24,
            num_heads=12,
            intermediate_size=4096,
            projector_size=13696,
        ),
        speech=SpeechConfig(
            mel_bins=128,
            num_frames=3000,
            hidden_size=1280,
            num_layers=32,
            num_heads=20,
            intermediate_size=5120,
            projector_size=8192,
        ),
        image_token_id=151343,
        audio_token_id=151344,
        eos_token_ids=(151329, 151336, 151338, 151348),
        pad_token_id=151329,
    ),
}
