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
# Options of version 1 that a group replaces, as `option: name in the group`.
_SOLVER = {
    option: option
    for option in ("act_order", "damping", "sequential", "propagate", "refit", "sweeps")
}
_GROUPS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "quantize.gptq": ("solver", _SOLVER),
    "prune.sparsegpt": ("solver", _SOLVER),
    "prune.sparsegpt_quantize": ("solver", _SOLVER),
    "quantize.qat": (
        "trainable",
        {"learned_scale": "learned_scale", "scale_rate": "scale_rate", "where_train": "where"},
    ),
}


def upgraded(name: str, options: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Convert options of an earlier version to the current one.

    Args:
      name: name of the transform.
      options: options from JSON; options of later versions pass unchanged.
      version: version of the recipe.

    Returns:
      Options of version 2.

    Raises:
      RecipeError: an option is invalid.
    """
    if version < 1:
        options = _from_version_0(name, options)
    return _from_version_1(name, options) if version < 2 else dict(options)


def _from_version_1(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if name == "distill":
        return _distill_from_version_1(options)
    group, moved = _GROUPS.get(name, ("", {}))
    if group in options:
        return dict(options)
    others = {option: value for option, value in options.items() if option not in moved}
    grouped = {moved[option]: value for option, value in options.items() if option in moved}
    return {**others, group: grouped} if grouped else others


def _distill_from_version_1(options: Mapping[str, Any]) -> dict[str, Any]:
    others = dict(options)
    # In version 1, a weight of zero disabled a loss; now None does.
    if "intermediates" not in others:
        names = ("hidden", "attention", "layers")
        inside = {name: others.pop(name) for name in names if name in others}
        if any(inside.values()):
            others["intermediates"] = inside
    share = others.get("on_policy")
    if share is None or isinstance(share, int | float):
        renamed = {"prompt": "prompt", "sampling_temperature": "temperature"}
        sampling = {renamed[option]: others.pop(option) for option in renamed if option in others}
        if share:
            others["on_policy"] = {"share": share, **sampling}
        elif sampling.get("prompt") is not None:
            raise RecipeError("distill: prompt= needs on_policy= above zero")
        else:
            others["on_policy"] = None
    return others


def _from_version_0(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options of a recipe without a version to version 1."""
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
