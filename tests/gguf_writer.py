"""A writer of small GGUF files, also of files that are wrong, independent of the reader."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30, "Q4_K": 12}
# Code and layout of numbers of a metadata value.
NUMBERS = {"u8": (0, "B"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "u64": (10, "Q")}
DECODER = {
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 1e5,
    "llama.rope.dimension_count": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def text(value: str) -> bytes:
    """Encodes a string."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encode(value: Any) -> bytes:
    """Encodes a metadata value with its type; `(name of NUMBERS, number)` sets the type."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, list):
        items = [encode(item) for item in value] or [encode(0)]
        body = b"".join(item[4:] for item in items[: len(value)])
        return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(value)) + body
    if not isinstance(value, tuple):
        value = ("f32" if isinstance(value, float) else "u32", value)
    code, layout = NUMBERS[value[0]]
    return struct.pack(f"<I{layout}", code, value[1])


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
    alignment: int = 32,
    **wrong: Any,
) -> Path:
    """Writes a file.

    Args:
      path: of the file.
      metadata: values by key, see `encode`.
      tensors: type, shape (contiguous axis last) and bytes by name.
      alignment: of tensors.
      **wrong: values that replace the right ones: `magic`, `version`, `num_tensors`,
        `num_fields`; `offset` is added to that of the last tensor.
    """
    fields = [text(key) + encode(value) for key, value in metadata.items()]
    infos, data = [], b""
    for index, (name, (kind, shape, raw)) in enumerate(tensors.items()):
        shift = wrong.get("offset", 0) if index == len(tensors) - 1 else 0
        code = TYPES[kind] if isinstance(kind, str) else kind
        layout = f"<I{len(shape)}QIQ"
        infos.append(
            text(name) + struct.pack(layout, len(shape), *shape[::-1], code, len(data) + shift)
        )
        data += raw + bytes(-len(raw) % alignment)
    header = wrong.get("magic", b"GGUF") + struct.pack(
        "<IQQ",
        wrong.get("version", 3),
        wrong.get("num_tensors", len(tensors)),
        wrong.get("num_fields", len(metadata)),
    )
    header += b"".join(fields + infos)
    path.write_bytes(header + bytes(-len(header) % alignment) + data)
    return path


def random_tensor(
    kind: str, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[str, tuple[int, ...], bytes]:
    """Draws a tensor: codes of any value, scales that make weights of a usual size."""
    count = int(np.prod(shape))
    if kind in ("F32", "F16"):
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        values = (1.0 if len(shape) == 1 else 0.0) + scale * rng.normal(size=count)
        return kind, shape, values.astype("<f4" if kind == "F32" else "<f2").tobytes()
    if kind == "BF16":
        upper = rng.normal(size=count).astype("<f4").view("<u4") >> 16
        return kind, shape, upper.astype("<u2").tobytes()
    blocks = count // 32
    codes = rng.integers(0, 256, (blocks, 32 if kind == "Q8_0" else 16), np.uint8)
    levels = 127 if kind == "Q8_0" else 8
    scale = rng.uniform(0.3, 1, blocks) * shape[-1] ** -0.5 / levels
    # Scales of Q4_0 may be negative.
    scale *= np.where(rng.random(blocks) < 0.5, -1, 1) if kind == "Q4_0" else 1
    parts = [scale.astype("<f2").reshape(-1, 1).view(np.uint8)]
    if kind == "Q4_1":
        minimum = -levels * scale * rng.uniform(0.8, 1.1, blocks)
        parts.append(minimum.astype("<f2").reshape(-1, 1).view(np.uint8))
    return kind, shape, np.concatenate([*parts, codes], axis=1).tobytes()


def vocabulary() -> tuple[list[str], list[str]]:
    """Lists the tokens of a byte-level vocabulary with merges, one of digits, and these merges."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    return [*tokens, "Ġt", "Ġth", "12"], ["Ġ t", "Ġt h", "1 2"]


def tokenizer_fields() -> dict[str, Any]:
    """Describes the tokenizer of `vocabulary`."""
    tokens, merges = vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [("i32", 3)] * 3 + [("i32", 1)] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def tiny_metadata(**changed: Any) -> dict[str, Any]:
    """Describes a llama of two layers; keyword arguments change fields of `llama.`."""
    changed = {f"llama.{key.replace('__', '.')}": value for key, value in changed.items()}
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        **DECODER,
        **changed,
        **tokenizer_fields(),
    }


def tiny_tensors(kind: str = "Q4_1", embedding: str = "Q8_0", tied: bool = True) -> dict[str, Any]:
    """Draws the tensors of `tiny_metadata`, matrices of one type and norms in float32."""
    rng = np.random.default_rng(0)
    size, kv, hidden, rows = 32, 16, 64, len(vocabulary()[0])
    shapes = {"attn_q": (size, size), "attn_k": (kv, size), "attn_v": (kv, size)}
    shapes |= {"attn_output": (size, size), "ffn_gate": (hidden, size), "ffn_up": (hidden, size)}
    shapes["ffn_down"] = (size, hidden)
    tensors = {"token_embd.weight": random_tensor(embedding, (rows, size), rng)}
    for layer in range(2):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = random_tensor("F32", (size,), rng)
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = random_tensor(kind, shape, rng)
    tensors["output_norm.weight"] = random_tensor("F32", (size,), rng)
    if not tied:
        tensors["output.weight"] = random_tensor(kind, (rows, size), rng)
    return tensors


def dequantized(tensor: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    """Computes the values of a tensor, one block after the other."""
    kind, shape, raw = tensor
    if kind in ("F32", "F16"):
        return np.frombuffer(raw, "<f4" if kind == "F32" else "<f2").reshape(shape)
    if kind == "BF16":
        widened = np.frombuffer(raw, "<u2").astype("<u4") << 16
        return widened.view("<f4").reshape(shape)
    size, values = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind], []
    for start in range(0, len(raw), size):
        block = raw[start : start + size]
        (scale,) = struct.unpack("<e", block[:2])
        if kind == "Q8_0":
            values += [scale * code for code in struct.unpack("<32b", block[2:])]
            continue
        nibbles = [b & 15 for b in block[-16:]] + [b >> 4 for b in block[-16:]]
        if kind == "Q4_0":
            values += [scale * (code - 8) for code in nibbles]
        else:
            (minimum,) = struct.unpack("<e", block[2:4])
            values += [scale * code + minimum for code in nibbles]
    # Products and sums of float16 values are exact in float64, then rounded once.
    return np.array(values).astype(np.float32).reshape(shape)
