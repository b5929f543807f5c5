"""Rows of the quality table as data: one `Method` per row."""

import json
from dataclasses import dataclass, field
from typing import Any

DECODER = r"^decoder/"
OURS, REFERENCE = "ours", "reference"
ALONE = "labels alone"
# The rows of glm_edge that answer peers' rows, fixed before measuring: GPTQ with the same options
# for all formats but the kind of scale at two bits, and the trained rows for trained peers.
ANSWERS = {
    "training-free": tuple(
        f"glm_edge gptq {shape}"
        for shape in (
            "ternary34-channel",
            "ternary-channel",
            "int2-channel extreme",
            "int2-g32 extreme",
            "int3-channel",
            "int3-g32",
            "int4-channel",
            "int4-g32",
            "int5-g32",
            "int6-g32",
            "int8-channel",
        )
    ),
    "trained": tuple(
        f"glm_edge qat {shape}"
        for shape in ("ternary-channel", "int2-channel", "int2-g32", "int3-g32", "int4-g32")
    ),
}


def grouping(name: str) -> str:
    """Return the grouping of a row's scales by its name: `channel`, or `groups`."""
    return "channel" if "channel" in name else "groups"


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
      name: name of the row, and of its result file.
      peer: name of a module of this package, or REFERENCE.
      options: options of the peer's module; for `ours`, a recipe as JSON values.
      kind: `none`, `training-free` or `trained`.
      calibration: `none`, `text`, `both` (text and screens), or `training` (more of both).
      where: pattern of the matrices that are compressed and whose bits are counted.
    """

    name: str
    peer: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "training-free"
    calibration: str = "none"
    where: str = DECODER


def ours(
    name: str,
    *transforms: dict[str, Any],
    kind: str = "training-free",
    where: str = DECODER,
    calibration: str = "both",
) -> Method:
    """Return a recipe of glm_edge: transforms `{"name": ..., "options": {...}}` in order.

    Each gets `where` unless it has one; all receive calibration.
    """
    steps = [
        {"name": t["name"], "options": {"where": where or None, **t.get("options", {})}}
        for t in transforms
    ]
    recipe = steps[0] if len(steps) == 1 else {"name": "chain", "options": {"transforms": steps}}
    return Method(f"glm_edge {name}", OURS, recipe, kind, calibration, where)


def rtn(name: str, where: str = DECODER, **options: Any) -> Method:
    """Return glm_edge's round-to-nearest methods."""
    return ours(f"rtn {name}", {"name": "quantize.rtn", "options": options}, where=where)


# Zero points between levels: groups of 64 then take the bits of symmetric groups of 32.
_OFFSETS = {"symmetric": False, "zero_dtype": "bfloat16"}
# Scales are bfloat16 for groups, and per channel for few bits.
_SHAPES = {
    "int8-channel": {"bits": 8},
    "int6-channel": {"bits": 6},
    "int6-g32": {"bits": 6, "group_size": 32},
    "int5-g32": {"bits": 5, "group_size": 32},
    "int4-channel": {"bits": 4},
    "int4-g64": {"bits": 4, "group_size": 64},
    "int4-g32": {"bits": 4, "group_size": 32},
    "int3-channel": {"bits": 3, "scale_dtype": "bfloat16"},
    "int3-g64": {"bits": 3, "group_size": 64},
    "int3-g32": {"bits": 3, "group_size": 32},
    "int2-channel": {"bits": 2, "scale_dtype": "bfloat16"},
    "int2-g32": {"bits": 2, "group_size": 32},
    "int2-g32 affine": {"bits": 2, "group_size": 32, "symmetric": False},
    **{f"int{b}-g64 affine offsets": {"bits": b, "group_size": 64, **_OFFSETS} for b in (4, 3, 2)},
    "int2-channel affine offsets": {"bits": 2, "scale_dtype": "bfloat16", **_OFFSETS},
    "ternary-g32": {"qtype": "ternary", "group_size": 32},
    "ternary-g64 affine": {"qtype": "ternary", "group_size": 64, **_OFFSETS},
    "ternary-channel": {"qtype": "ternary", "scale_dtype": "bfloat16"},
    "ternary34-channel": {"qtype": "ternary34", "scale_dtype": "bfloat16"},
}
_CATQ = {"name": "quantize.catq", "options": {"format": "ternary-g32"}}
_TRAINED = ("int4-g32", "int3-g32", "int2-g32", "int2-channel", "ternary-channel")


def _calibrated() -> list[Method]:
    """List glm_edge's GPTQ at every width, and other methods that are accurate at some."""

    def row(
        name: str, shape: str, label: str = "", calibration: str = "both", **options: Any
    ) -> Method:
        step = {"name": f"quantize.{name}", "options": {**_SHAPES[shape], **options}}
        return ours(f"{name} {shape}{label}", step, calibration=calibration)

    rows = [row("gptq", shape) for shape in _SHAPES]
    read_by_others = ("int4-g32", "int3-channel", "int3-g32", "int2-g32")
    rows += [row("gptq", shape, " text only", "text") for shape in read_by_others]
    extreme = ("int4-g32", "int3-g32", "int2-g32", "int2-channel")
    rows += [row("gptq", shape, " extreme", scale="extreme") for shape in extreme]
    rows += [row("hqq", f"int{b}-g32", " affine", symmetric=False) for b in (4, 3, 2)]
    rows += [row("awq", f"int{b}-g32") for b in (4, 3)]
    rows += [row("adaround", f"int{b}-g32") for b in (4, 3)]
    return [
        *rows,
        _rotated("int4-g32"),
        *(_reordered(shape, 64) for shape in ("int2-g64 affine offsets", "ternary-g64 affine")),
    ]


def _reordered(shape: str, group_size: int) -> Method:
    """Return glm_edge's GPTQ after neurons are ordered by similarity."""
    reorder = {"name": "quantize.reorder", "options": {"group_size": group_size}}
    gptq = {"name": "quantize.gptq", "options": _SHAPES[shape]}
    return ours(f"reorder, gptq {shape}", reorder, gptq)


def _rotated(
    shape: str, *after: dict[str, Any], kind: str = "training-free", label: str = ""
) -> Method:
    """List glm_edge's GPTQ after a rotation, also with training after it."""
    transforms = [
        {"name": "quantize.rotate", "options": {}},
        {"name": "quantize.gptq", "options": {"where": DECODER, **_SHAPES[shape]}},
        *after,
    ]
    names = ", ".join(transform["name"].removeprefix("quantize.") for transform in transforms)
    recipe = {"name": "chain", "options": {"transforms": transforms}}
    return Method(f"glm_edge {names} {shape}{label}", OURS, recipe, kind, calibration="both")


def _trained() -> list[Method]:
    """List glm_edge's distillation from the float32 model without labels, and labels alone.

    The two have the same batches, steps and schedule. The last row trains the float32 model
    likewise, which cannot learn from itself.
    """
    rows = []
    training = {"steps": 1000, "learning_rate": 6e-4, "compute": "bfloat16"}
    for label, objective in (("", {}), (f", {ALONE}", {"alpha": 0.0})):
        for shape in _TRAINED:
            step = {"name": "quantize.qat", "options": {**_SHAPES[shape], **training, **objective}}
            rows.append(ours(f"qat {shape}{label}", step, kind="trained", calibration="training"))
        options = {"where": DECODER, "steps": 200, **objective}
        scales = {"name": "quantize.distill_scales", "options": options}
        rows += [
            _rotated(shape, scales, kind="trained", label=label)
            for shape in ("int4-g32", "int3-g32")
        ]
    rows.append(ours("catq ternary-g32", _CATQ, kind="trained"))
    step = {"name": "distill", "options": {**training, "alpha": 0.0}}
    name = f"nothing quantized, trained likewise, {ALONE}"
    return [*rows, ours(name, step, kind="trained", calibration="training")]


def _qwix() -> list[Method]:
    settings = [("rtn", q, t) for q in ("int8", "int4", "int3", "int2") for t in (None, 32)]
    settings += [("rtn", "nf4", 32), ("awq", "int4", None)]
    settings += [("awq", f"int{bits}", 32) for bits in (4, 3, 2)]
    settings += [("gptq", "int8", None), ("gptq", "int4", None), ("gptq", "int4", 32)]
    rows = []
    for algorithm, qtype, tile in settings:
        shape = f"{qtype}-g{tile}" if tile else f"{qtype}-channel"
        options = {"algorithm": algorithm, "qtype": qtype, "tile": tile}
        calibration = "none" if algorithm == "rtn" else "both"
        rows.append(Method(f"qwix {algorithm} {shape}", "qwix", options, calibration=calibration))
        if tile:
            rows.append(
                Method(
                    f"qwix {algorithm} {shape} bf16 scales",
                    "qwix",
                    {**options, "scale_dtype": "bfloat16"},
                    calibration=calibration,
                )
            )
    text = {"algorithm": "gptq", "qtype": "int4", "tile": 32}
    return [*rows, Method("qwix gptq int4-g32 text only", "qwix", text, calibration="text")]


def _ggml() -> list[Method]:
    plain = ["Q8_0", "Q6_K", "Q5_K", "Q4_0", "Q4_K", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS"]
    plain += ["Q2_K", "TQ2_0", "TQ1_0"]
    weighted = [*plain[2:-2], "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]
    return [Method(f"llama.cpp {name}", "ggml", {"type": name}) for name in plain] + [
        Method(
            f"llama.cpp {name} imatrix", "ggml", {"type": name, "imatrix": True}, calibration="both"
        )
        for name in weighted
    ]


def _torchao() -> list[Method]:
    rows = [
        Method("torchao int8 channel", "torchao", {"config": "int8"}),
        Method(
            "torchao int8 channel awq",
            "torchao",
            {"config": "int8", "awq": True},
            calibration="both",
        ),
        Method("torchao int8 g32", "torchao", {"config": "int8", "group_size": 32}),
    ]
    for bits in (4, 3, 2):
        for group, shape in ((None, "channel"), (32, "g32")):
            base = {"config": "intx", "bits": bits, "group_size": group}
            label = f"torchao int{bits} {shape}"
            rows.append(Method(label, "torchao", base))
            base["scale_dtype"] = "bfloat16"
            label = f"{label} bf16"
            rows.append(Method(f"{label} hqq scale-only", "torchao", {**base, "hqq": "scale"}))
            if group:
                for mapping in ("ASYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR"):
                    short = mapping.lower().removesuffix("_err").replace("_", " ")
                    options = {**base, "mapping": mapping}
                    rows.append(Method(f"{label} {short}", "torchao", options))
        hqq = {"config": "hqq", "bits": bits, "group_size": 32}
        rows.append(Method(f"torchao int{bits} g32 hqq", "torchao", hqq))
        hqq = {**hqq, "scale_dtype": "bfloat16"}
        rows.append(Method(f"torchao int{bits} g32 bf16 hqq", "torchao", hqq))
    return rows


def _ai_edge() -> list[Method]:
    algorithms = ("min_max_uniform_quantize", "MSE", "OCTAV", "GPTQ", "OSCAR")
    settings = [(8, "CHANNELWISE", "min_max_uniform_quantize"), (8, "CHANNELWISE", "GPTQ")]
    settings += [(4, "CHANNELWISE", name) for name in algorithms]
    # Its MSE supports neither two bits nor blocks, and LiteRT does not run blocks of two bits.
    others = [name for name in algorithms if name != "MSE"]
    settings += [(2, "CHANNELWISE", name) for name in others]
    settings += [(4, "BLOCKWISE_32", name) for name in others]
    rows = []
    for bits, granularity, algorithm in settings:
        shape = "g32" if granularity == "BLOCKWISE_32" else "channel"
        short = algorithm.lower().removesuffix("_uniform_quantize").replace("_", "-")
        options = {"bits": bits, "granularity": granularity, "algorithm": algorithm}
        calibration = "both" if algorithm in ("GPTQ", "OSCAR") else "none"
        name = f"ai-edge {short} int{bits}-{shape}"
        rows.append(Method(name, "ai_edge", options, calibration=calibration))
    return rows


def _gptqmodel() -> list[Method]:
    rows = []
    for bits, group in ((8, -1), (4, -1), (4, 32), (4, 128), (3, 32), (2, 32)):
        label = f"gptqmodel gptq int{bits}-" + (f"g{group}" if group > 0 else "channel")
        base = {"bits": bits, "group_size": group}
        rows.append(Method(label, "gptqmodel", base, calibration="text"))
        best = {**base, "desc_act": True, "act_group_aware": False, "mse": 2.4}
        rows.append(Method(f"{label} act-order mse", "gptqmodel", best, calibration="text"))
    return rows


def _auto_round() -> list[Method]:
    rows = []
    for bits, group in ((4, -1), (4, 32), (4, 128), (3, 32), (2, 32)):
        label = f"auto-round int{bits}-" + (f"g{group}" if group > 0 else "channel")
        default = {"bits": bits, "group_size": group, "iters": 200}
        best = {**default, "iters": 1000, "enable_alg_ext": True}
        for name, options in ((label, default), (f"{label} best", best)):
            rows.append(Method(name, "auto_round", options, kind="trained", calibration="text"))
    return rows


METHODS: tuple[Method, ...] = (
    Method("fp32", REFERENCE, kind="none"),
    Method("fp32 again", REFERENCE, kind="none"),
    rtn("int8-channel", bits=8),
    rtn("int8-channel mse", bits=8, scale="mse"),
    rtn("int4-channel", bits=4),
    rtn("int4-channel mse", bits=4, scale="mse"),
    rtn("int4-g32", bits=4, group_size=32),
    rtn("int4-g32 mse", bits=4, group_size=32, scale="mse"),
    rtn("int4-g32 extreme", bits=4, group_size=32, scale="extreme"),
    *_calibrated(),
    *_trained(),
    *_qwix(),
    *_ggml(),
    *_torchao(),
    *_ai_edge(),
    *_gptqmodel(),
    *_auto_round(),
    rtn("int8-channel, whole model", where="", bits=8),
    rtn(
        "int4-g32 mse, whole model",
        where="",
        bits=4,
        group_size=32,
        scale="mse",
        fallback_bits=8,
    ),
)


def as_json(method: Method) -> str:
    """Return the options of a method as JSON."""
    return json.dumps(method.options, sort_keys=True)
