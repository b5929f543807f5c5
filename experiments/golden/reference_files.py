"""Checkpoints of small reference models: random weights, shards, config.json of two versions."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from experiments.golden.reference_edge_v import GlmEdgeV
from experiments.golden.reference_plans import EOS, SPECIAL_IDS, Plan

# Standard deviation of a token's logits, so that the first is rarely close to the second.
SCORE_SPREAD = 4.0
# Stop tokens and placeholders should not be generated greedily.
UNLIKELY = 0.1
OLD_VERSION = "4.57.1"
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight")


def write_checkpoint(plan: Plan, folder: Path, rng: np.random.Generator) -> torch.nn.Module:
    """Write a Hugging Face directory and open it with transformers.

    Args:
      plan: plan of the model.
      folder: empty directory.
      rng: random generator of weights and of the omitted fields of config.json.

    Returns:
      The float32 model as transformers loads it.
    """
    if plan.architecture == GlmEdgeV.__name__:
        return _write_edge_v(plan, folder, rng)
    kind = _architecture(plan.architecture)
    model = kind(kind.config_class(**plan.config))
    _draw_weights(model, rng)
    model.to(getattr(torch, plan.dtype)).save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if plan.stored_head:
        embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        head = "language_model.lm_head" if "audio_config" in plan.config else "lm_head"
        tensors[f"{head}.weight"] = tensors[embedding].clone()
    if plan.extra_layer:
        tensors |= _extra_layer(tensors, plan.config["text_config"]["num_hidden_layers"])
    _write_shards(folder, tensors, plan.shards)
    _write_fields(plan, folder, json.loads((folder / "config.json").read_text()), rng)
    (folder / "generation_config.json").unlink(missing_ok=True)
    opened, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"] or report["mismatched_keys"]:
        raise RuntimeError(f"{folder}: transformers cannot load its own checkpoint: {report}")
    if plan.renames:
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        _write_shards(folder, _renamed(tensors, plan.renames), plan.shards)
    return opened.eval()


def _write_edge_v(plan: Plan, folder: Path, rng: np.random.Generator) -> torch.nn.Module:
    model = GlmEdgeV(plan.config)
    _draw_weights(model, rng)
    model.to(getattr(torch, plan.dtype))
    _write_shards(folder, model.stored(), plan.shards)
    _write_fields(plan, folder, model.fields() | {"dtype": plan.dtype}, rng)
    # A new model, since rotary frequencies are not stored and must not be rounded with the weights.
    opened = GlmEdgeV(plan.config)
    opened.load_state_dict(model.state_dict())
    return opened.eval()


def _write_fields(
    plan: Plan, folder: Path, fields: dict[str, Any], rng: np.random.Generator
) -> None:
    if plan.style == 4:
        fields = _as_version_4(fields)
    _leave_out_defaults(fields, rng)
    (folder / "config.json").write_text(json.dumps(fields, indent=1))


def _architecture(name: str) -> Any:
    return WhisperEncoder if name == "WhisperEncoder" else getattr(transformers, name)


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, rng: np.random.Generator) -> None:
    for name, weight in model.named_parameters():
        values = rng.normal(size=tuple(weight.shape))
        if weight.ndim == 1 and name.endswith("weight"):
            values = rng.uniform(0.5, 1.5, weight.shape)
        elif name.endswith("bias"):
            values *= 0.3
        elif name.endswith(EMBEDDINGS) or name.endswith("lm_head.weight"):
            values *= SCORE_SPREAD / np.sqrt(weight.shape[-1])
            values[[*EOS, *range(-SPECIAL_IDS, 0)]] *= UNLIKELY
        elif "position" not in name and "probe" not in name and "token_type" not in name:
            values *= 1.3 / np.sqrt(np.prod(weight.shape[1:]))
        weight.copy_(torch.as_tensor(values))


def _extra_layer(tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    first, extra = "model.language_model.layers.0.", f"model.language_model.layers.{index}."
    written = {
        extra + name.removeprefix(first): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(first)
    }
    norm = tensors[first + "input_layernorm.weight"]
    written[extra + "enorm.weight"] = norm.clone()
    written[extra + "eh_proj.weight"] = torch.cat([norm, norm])[None].repeat(len(norm), 1)
    return written


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    if count == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    places = {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::count]}
        safetensors.torch.save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _renamed(
    tensors: dict[str, torch.Tensor], renames: list[tuple[str, str]]
) -> dict[str, torch.Tensor]:
    written = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        written[name] = tensor
    return written


def _as_version_4(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the same configuration in the format of transformers 4."""
    written = {
        name: _as_version_4(value) if name.endswith("_config") else value
        for name, value in fields.items()
        if name not in ("rope_parameters", "dtype", "transformers_version")
    }
    rope = dict(fields.get("rope_parameters") or {})
    kind = rope.pop("rope_type", None)
    if kind == "default":
        written |= {name: rope.pop(name) for name in list(rope) if name != "mrope_section"}
        if rope:
            written["rope_scaling"] = {"type": kind, **rope}
    if "dtype" in fields:
        written["torch_dtype"] = fields["dtype"]
    if "transformers_version" in fields:
        written["transformers_version"] = OLD_VERSION
    return written


def _leave_out_defaults(fields: dict[str, Any], rng: np.random.Generator) -> None:
    """Remove some fields with default values, which transformers adds again."""
    known = transformers.CONFIG_MAPPING[fields["model_type"]]().to_dict()
    # Every file states the hidden size, which glm_edge requires.
    for width in ("model_type", "num_key_value_heads", "head_dim"):
        known.pop(width, None)
    for name in list(fields):
        if name.endswith("_config"):
            _leave_out_defaults(fields[name], rng)
            continue
        if name in known and fields[name] == known[name] and rng.random() < 0.5:
            del fields[name]
