"""Directories of compressed-tensors: `pack-quantized` and `int-quantized`.

`pack-quantized` stores `weight_packed`, int32 [O, I * bits / 32], `weight_scale` [O, G],
`weight_shape`, int64 [2] = (O, I), and for affine weights `weight_zero_point`, int32
[O * bits / 32, G], packed along the outputs. Codes and zero points are stored unsigned, as
`code + 2^(bits - 1)`. `int-quantized` stores `weight`, int8 [O, I], `weight_scale`, and for affine
weights `weight_zero_point`, int8 [O, G].
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from glm_edge.checkpoint.hugging_face.fields import Fields
from glm_edge.checkpoint.hugging_face.quantized.matrix import (
    SCALE_TYPES,
    Codes,
    PackedMatrix,
    StoredModule,
    format_of,
    read_group_size,
)
from glm_edge.checkpoint.hugging_face.quantized.words import (
    num_words,
    pack_words,
    signed,
    unpack_words,
    unsigned,
)
from glm_edge.errors import CheckpointError, ConfigError

METHOD = "compressed-tensors"
PACKED, UNPACKED = "pack-quantized", "int-quantized"
FORMATS = (PACKED, UNPACKED, "naive-quantized", "mixed-precision")
# Fields that do not change the stored values.
UNUSED = ("ignore", "version", "global_compression_ratio", "quant_method")
UNUSED_OF_WEIGHTS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
MIN_BITS, MAX_BITS = 2, 8
# Rounding of activations to int8 per token, beside int8 weights.
ACTIVATIONS_PER_TOKEN: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "group_size": None,
    "dynamic": True,
}


@dataclass(frozen=True)
class Scheme:
    """One way to quantize weights.

    Attributes:
      bits: bits per code.
      group_size: columns per group, None for one scale per row.
      symmetric: False for weights with zero points.
    """

    bits: int
    group_size: int | None
    symmetric: bool

    def write(self) -> dict[str, Any]:
        """Return the fields that `_read_scheme` reads."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
        }


@dataclass(frozen=True)
class CompressedTensors:
    """Options of a directory of compressed-tensors.

    A module's scheme is the one that its tensors have; it must be one of `schemes`. The targets of
    the schemes, which may be regular expressions, are not needed.

    Attributes:
      schemes: declared schemes.
    """

    schemes: tuple[Scheme, ...]
    name: ClassVar[str] = METHOD
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )

    def is_quantized(self, module: StoredModule) -> bool:
        """Test for scales."""
        return "weight_scale" in module.names or "weight_packed" in module.names

    def open(self, module: StoredModule) -> PackedMatrix:
        """Check the headers of a module's tensors.

        Args:
          module: the module.

        Returns:
          The matrix.

        Raises:
          CheckpointError: a tensor is missing, damaged, or has a wrong type or shape; or its
            scheme is not declared.
        """
        packed = "weight_packed" in module.names
        if packed:
            rows, columns = _read_shape(module)
        else:
            rows, columns = module.info("weight", "I8").shape
        scale_rows, groups = module.info("weight_scale", *SCALE_TYPES).shape
        if scale_rows != rows:
            raise CheckpointError(
                f"{module.where('weight_scale')}: has {scale_rows} rows, the weight has {rows}"
            )
        scheme = self._scheme_of(module, columns, groups, packed)
        module.check_order("weight_g_idx", columns, scheme.group_size)
        if packed:
            module.check("weight_packed", (rows, num_words(columns, scheme.bits)), "I32")
        if not scheme.symmetric:
            zero_rows = num_words(rows, scheme.bits) if packed else rows
            kind = "I32" if packed else "I8"
            module.check("weight_zero_point", (zero_rows, groups), kind)
        return PackedMatrix(
            f"{module.name}.weight",
            module.files["weight_scale"].path,
            (rows, columns),
            format_of(module, "weight_scale", scheme.bits, scheme.group_size, scheme.symmetric),
            functools.partial(_read, module, scheme, (rows, columns), packed),
        )

    def _scheme_of(self, module: StoredModule, columns: int, groups: int, packed: bool) -> Scheme:
        """Find the declared scheme that the shapes of a module's tensors have."""
        words = module.info("weight_packed", "I32").shape[1] if packed else 0
        symmetric = "weight_zero_point" not in module.names
        fitting = [
            scheme
            for scheme in self.schemes
            if scheme.symmetric == symmetric
            and columns == groups * (scheme.group_size or columns)
            and (num_words(columns, scheme.bits) == words if packed else scheme.bits == MAX_BITS)
        ]
        kinds = {scheme.bits for scheme in fitting}
        if len(kinds) == 1:
            return fitting[0]
        fault = "fit several of" if kinds else "do not fit"
        part = "weight_packed" if packed else "weight"
        raise CheckpointError(
            f"{module.where(part)}: {columns} columns in {groups} groups"
            f"{f' and {words} words' if packed else ''}, {'without' if symmetric else 'with'} "
            f"zero points, {fault} the schemes of config_groups: "
            f"{', '.join(map(_describe, self.schemes)) or 'none'}"
        )


def _describe(scheme: Scheme) -> str:
    grouping = "channel" if scheme.group_size is None else f"g{scheme.group_size}"
    return f"int{scheme.bits}-{grouping}{'' if scheme.symmetric else '-affine'}"


def _read_shape(module: StoredModule) -> tuple[int, int]:
    module.check("weight_shape", (2,), "I64", "I32")
    rows, columns = (int(extent) for extent in module.read("weight_shape"))
    stored = module.info("weight_packed", "I32").shape
    # Bounds of the extents, before anything of their size is made.
    if rows != stored[0] or not 0 < columns <= stored[1] * 32 // MIN_BITS:
        raise CheckpointError(
            f"{module.where('weight_shape')}: is ({rows}, {columns}), but weight_packed has shape "
            f"{stored}"
        )
    return rows, columns


def _read(module: StoredModule, scheme: Scheme, shape: tuple[int, int], packed: bool) -> Codes:
    rows, columns = shape
    scale = module.read("weight_scale")
    if not packed:
        zero = None if scheme.symmetric else module.read("weight_zero_point")
        return Codes(module.read("weight"), scale, zero)
    middle = 1 << (scheme.bits - 1)
    codes = unpack_words(module.read("weight_packed"), columns, scheme.bits)
    if scheme.symmetric:
        return Codes(signed(codes, middle), scale, None)
    zero = unpack_words(module.read("weight_zero_point").T, rows, scheme.bits).T
    return Codes(signed(codes, middle), scale, signed(zero, middle))


def tensors_of(codes: Codes, bits: int, packed: bool) -> dict[str, np.ndarray]:
    """Convert codes to the tensors of a module, the inverse of reading them.

    Args:
      codes: codes, scales and zero points.
      bits: bits per code.
      packed: False for `int-quantized`, with 8 bits.

    Returns:
      Arrays by suffix.
    """
    tensors = {"weight_scale": codes.scale}
    if not packed:
        tensors["weight"] = codes.codes
        return tensors | ({} if codes.zero is None else {"weight_zero_point": codes.zero})
    middle = 1 << (bits - 1)
    tensors["weight_packed"] = pack_words(unsigned(codes.codes, middle), bits)
    tensors["weight_shape"] = np.asarray(codes.codes.shape, np.int64)
    if codes.zero is not None:
        packed_zero = pack_words(unsigned(codes.zero.T, middle), bits).T
        tensors["weight_zero_point"] = np.ascontiguousarray(packed_zero)
    return tensors


def read_config(fields: Fields) -> CompressedTensors:
    """Read the options of a `quantization_config`.

    Args:
      fields: fields of the section.

    Returns:
      The options.

    Raises:
      ConfigError: a field is missing, malformed or unsupported.
    """
    fields.expect("format", *FORMATS)
    fields.expect("quantization_status", "compressed")
    for name in UNUSED:
        fields.take(name)
    sparsity = fields.optional_section("sparsity_config")
    if sparsity is not None and sparsity.values:
        # Other formats store compressed sparse tensors.
        sparsity.expect("format", "dense")
    groups = fields.section("config_groups")
    schemes = tuple(_read_group(groups.section(name)) for name in groups.values)
    # Without an effect on weights, but with one on results.
    for name in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if fields.take(name):
            raise ConfigError(f"{fields.where}: field {name!r} is unsupported; it must be absent")
    fields.finish()
    return CompressedTensors(schemes)


def _read_group(group: Fields) -> Scheme:
    group.expect("format", *FORMATS)
    group.take("targets")
    inputs = group.optional_section("input_activations")
    if inputs is not None:
        # The caller chooses this arithmetic: `compute="int8_dynamic"`.
        for name in ("num_bits", "type", "strategy"):
            inputs.expect(name, ACTIVATIONS_PER_TOKEN[name])
        if inputs.take("dynamic") is not True:
            raise ConfigError(f"{inputs.where}: static ranges of activations are unsupported")
    if group.take("output_activations"):
        raise ConfigError(f"{group.where}: field 'output_activations' is unsupported")
    scheme = _read_scheme(group.section("weights"))
    group.finish()
    return scheme


def _read_scheme(weights: Fields) -> Scheme:
    weights.expect("type", "int")
    weights.expect("dynamic", False)
    weights.expect("actorder", "weight", "static", "group", False)
    for name in UNUSED_OF_WEIGHTS:
        weights.take(name)
    strategy = weights.expect("strategy", "channel", "group")
    size = read_group_size(weights, "group_size")
    if strategy is None:
        strategy = "channel" if size is None else "group"
    bits = weights.get("num_bits", int, MAX_BITS)
    if not MIN_BITS <= bits <= MAX_BITS or bits == 7:
        raise ConfigError(
            f"{weights.where}: field 'num_bits' is {bits}; it must be 2, 3, 4, 5, 6 or 8"
        )
    if strategy == "group" and size is None:
        raise ConfigError(f"{weights.where}: field 'group_size' is missing for strategy 'group'")
    symmetric = weights.get("symmetric", bool, True)
    weights.finish()
    return Scheme(bits, size if strategy == "group" else None, symmetric)
