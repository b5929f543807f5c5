"""Architectures of GGUF files: configuration from metadata, and tensor names."""

from collections.abc import Callable
from dataclasses import dataclass

from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.hugging_face.member import TensorMapping, join, same
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.errors import ConfigError
from glm_edge.gguf_file import GGUFFile
from glm_edge.preprocess.gguf_tokenizer import stop_tokens, token_id

ARCHITECTURE = "general.architecture"
HEAD = "output.weight"
# Names of a layer's parameters and of the file's tensors.
_LLAMA_LAYER = {
    "input_norm": "attn_norm",
    "post_attention_norm": "ffn_norm",
    "attention/q_proj": "attn_q",
    "attention/k_proj": "attn_k",
    "attention/v_proj": "attn_v",
    "attention/o_proj": "attn_output",
    "mlp/down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture` of GGUF files.

    Attributes:
      read_config: converts the file's metadata to our configuration.
      entries: lists all parameters of a configuration with the file's tensors.
    """

    read_config: Callable[[GGUFFile], GLMConfig]
    entries: Callable[[GLMConfig], list[TensorMapping]]


def _architecture_of(file: GGUFFile) -> Architecture:
    name = file.metadata.get(ARCHITECTURE)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path}: field {ARCHITECTURE!r} is {name!r:.60}, which is unsupported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ConfigError(
            f"{file.path}: is one of {parts!r:.60} parts of a model; merge them, for example with "
            "llama-gguf-split --merge"
        )
    return ARCHITECTURES[name]


def read_config(file: GGUFFile) -> tuple[Architecture, GLMConfig]:
    """Find the architecture of a file and read its configuration.

    Args:
      file: the file.

    Returns:
      `(architecture, config)`.

    Raises:
      ConfigError: the architecture is unknown, or a field is missing, malformed or unsupported.
    """
    architecture, where = _architecture_of(file), str(file.path)
    try:
        return architecture, architecture.read_config(file)
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from error


def _read_llama(file: GGUFFile) -> GLMConfig:
    where, prefix = str(file.path), "llama."
    names = {key for key in file.metadata if key.startswith(prefix)}
    fields = Fields({key: file.metadata[key] for key in sorted(names)}, where)
    for absent in ("expert_count", "expert_used_count", "attention.sliding_window"):
        fields.expect(f"{prefix}{absent}", 0)
    fields.expect(f"{prefix}rope.scaling.type", "none")
    fields.expect(f"{prefix}attention.causal", True)
    hidden = fields.get(f"{prefix}embedding_length", int)
    heads = fields.get(f"{prefix}attention.head_count", int)
    head_dim = fields.get(f"{prefix}attention.key_length", int, max(1, hidden // heads))
    fields.expect(f"{prefix}attention.value_length", head_dim)
    fields.expect(f"{prefix}rope.dimension_count", head_dim)
    embedding = file.tensors.get("token_embd.weight")
    rows = None if embedding is None else embedding.shape[0]
    vocab = fields.get(f"{prefix}vocab_size", int, *([] if rows is None else [rows]))
    decoder = DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=fields.get(f"{prefix}block_count", int),
        num_heads=heads,
        num_kv_heads=fields.divisor(
            f"{prefix}attention.head_count_kv", f"{prefix}attention.head_count", heads, heads
        ),
        head_dim=head_dim,
        intermediate_size=fields.get(f"{prefix}feed_forward_length", int),
        rms_norm_eps=fields.get(f"{prefix}attention.layer_norm_rms_epsilon", float),
        rope_theta=fields.get(f"{prefix}rope.freq_base", float, 10000.0),
        # Converters reorder the rows of queries and keys to adjacent rotary pairs.
        rotary_interleaved=True,
        tie_embeddings=HEAD not in file.tensors,
        max_position_embeddings=fields.get(f"{prefix}context_length", int),
    )
    fields.finish()
    name = file.metadata.get("general.name")
    return GLMConfig(
        name=name if isinstance(name, str) and name else file.path.stem,
        decoder=decoder,
        eos_token_ids=stop_tokens(file),
        pad_token_id=token_id(file, "padding"),
    )


def _llama_entries(config: GLMConfig) -> list[TensorMapping]:
    entries = same("embed", "token_embd") + same("decoder/norm", "output_norm")
    if not config.decoder.tie_embeddings:
        entries += same("head", "output")
    for layer in range(config.decoder.num_layers):
        ours, stored = f"decoder/layers/{layer}", f"blk.{layer}"
        for name, stored_name in _LLAMA_LAYER.items():
            entries += same(f"{ours}/{name}", f"{stored}.{stored_name}")
        parts = (f"{stored}.ffn_gate.weight", f"{stored}.ffn_up.weight")
        entries.append(join(f"{ours}/mlp/gate_up_proj/weight", parts))
    return entries


ARCHITECTURES = {"llama": Architecture(_read_llama, _llama_entries)}
