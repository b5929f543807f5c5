"""Conversion of recipes of earlier versions to the current one."""

from collections.abc import Mapping
from typing import Any

from glm_edge.compress.quantize.options import check_bits
from glm_edge.errors import BoxError, RecipeError
from glm_edge.params import Format
from glm_edge.params.formats import default_scale_dtype

# Options of version 0 (recipes without a version) that the option `format` replaces.
_FORMAT = ("bits", "group_size", "symmetric", "scale_dtype", "zero_dtype", "qtype")
# Defaults of these options by transform.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "quantize.rtn": {"bits": 8},
    "quantize.hqq": {"bits": 4, "group_size": 64, "symmetric": False, "zero_dtype": "float16"},
    "quantize.gptq": {"bits": 4},
    "quantize.awq": {"bits": 4},
    "quantize.adaround": {"bits": 4},
    "quantize.blockwise": {"bits": 4},
    "quantize.qat": {"bits": 4},
    "prune.sparsegpt": {},
    "prune.sparsegpt_quantize": {},
}
# Options of version 0 that `TrainOptions` replaces, with their defaults if different.
_TRAIN: Mapping[str, Mapping[str, Any]] = {
    "distill": dict.fromkeys(
        (
            "steps",
            "learning_rate",
            "warmup",
            "weight_decay",
            "clip_norm",
            "compute",
            "accumulate",
            "state_dir",
            "save_every",
        )
    ),
    "quantize.qat": {
        **dict.fromkeys(("learning_rate", "weight_decay", "clip_norm", "compute")),
        "steps": 1000,
        "warmup": 0.05,
    },
    "quantize.blockwise": dict.fromkeys(("steps", "learning_rate", "warmup", "compute")),
    "quantize.distill_scales": dict.fromkeys(
        ("steps", "learning_rate", "warmup", "clip_norm", "compute")
    ),
}


def upgraded(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Converts options of a recipe without a version to version 1.

    Args:
      name: name of the transform.
      options: options from JSON; options of version 1 pass unchanged.

    Returns:
      Options of version 1.

    Raises:
      RecipeError: the options do not describe a valid format.
    """
    others = dict(options)
    if name in _DEFAULTS and set(_FORMAT) & set(others):
        old = {option: others.pop(option) for option in _FORMAT if option in others}
        format = _format(name, {**_DEFAULTS[name], **old})
        if format is not None:
            others["format"] = str(format)
    if name == "prune.mask" and others.pop("ties", "first") != "first":
        raise RecipeError("prune.mask: ties= was removed: of equal scores, the first are pruned")
    moved = _TRAIN.get(name, {})
    if set(moved) & set(others):
        old = {option: others.pop(option) for option in moved if option in others}
        defaults = {option: value for option, value in moved.items() if value is not None}
        others["train"] = {**defaults, **old}
    return others


def _format(name: str, options: Mapping[str, Any]) -> Format | None:
    qtype, group_size = options.get("qtype"), options.get("group_size")
    bits, symmetric = options.get("bits"), options.get("symmetric", True)
    if qtype is None and bits is None and name.startswith("prune."):
        return None
    if qtype is None:
        check_bits(name, "bits", bits)
    try:
        return Format(
            qtype or f"int{bits}",
            group_size,
            symmetric,
            options.get("scale_dtype") or default_scale_dtype(group_size),
            "int8" if symmetric is True else options.get("zero_dtype", "int8"),
        )
    except (BoxError, TypeError) as error:
        raise RecipeError(f"{name}: {error}") from error
