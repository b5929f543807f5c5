"""GPTQ checkpoints (AutoGPTQ, GPTQModel), in both conventions of zero points.

`qweight` is int32 [I * bits / 32, O], packed along the inputs. `qzeros` is int32
[G, O * bits / 32], packed along the outputs. `scales` is [G, O]. `g_idx`, int32 [I], is the group
of each input. The format `gptq` stores `zero - 1`, and `gptq_v2` stores `zero`.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

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
    WORD_BITS,
    num_words,
    signed,
    unpack_words,
)
from glm_edge.errors import CheckpointError, ConfigError

BITS = (2, 3, 4, 8)
# Fields of calibration and of kernels.
UNUSED = (
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_percent", "damp_auto_increment", "dataset", "desc_act", "disable_exllama",
    "exllama_config", "failsafe", "fallback", "lm_head", "max_input_length", "meta", "method",
    "model_file_base_name", "model_name_or_path", "model_seqlen", "modules_in_block_to_quantize",
    "module_name_preceding_first_block", "mse", "offload_to_disk", "pad_token_id", "quantizer",
    "quant_method", "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16",
    "use_exllama",
)  # fmt: skip


@dataclass(frozen=True)
class GPTQ:
    """Options of a GPTQ checkpoint.

    Attributes:
      bits: bits per code.
      group_size: columns per group, None for one scale per row.
      symmetric: True if every zero point is 2^(bits - 1).
      offset: number to add to a stored zero point.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    offset: int
    name: ClassVar[str] = "gptq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def is_quantized(self, module: StoredModule) -> bool:
        """Test for packed codes."""
        return "qweight" in module.names

    def open(self, module: StoredModule) -> PackedMatrix:
        """Check the headers of a module's tensors, and the order of its groups.

        Args:
          module: the module.

        Returns:
          The matrix.

        Raises:
          CheckpointError: a tensor is missing, damaged, or has a wrong type or shape; or groups
            are not adjacent columns.
        """
        packed_rows, rows = module.info("qweight", "I32").shape
        columns = packed_rows * WORD_BITS // self.bits
        if "g_idx" in module.names:
            columns = module.info("g_idx", "I32", "I64", dimensions=1).shape[0]
            module.check("qweight", (num_words(columns, self.bits), rows), "I32")
        groups = module.groups(columns, self.group_size, "qweight")
        module.check("scales", (groups, rows), *SCALE_TYPES)
        module.check("qzeros", (groups, num_words(rows, self.bits)), "I32")
        module.check_order("g_idx", columns, self.group_size)
        return PackedMatrix(
            f"{module.name}.weight",
            module.files["qweight"].path,
            (rows, columns),
            format_of(module, "scales", self.bits, self.group_size, self.symmetric),
            functools.partial(self._read, module, rows, columns),
        )

    def _read(self, module: StoredModule, rows: int, columns: int) -> Codes:
        middle = 1 << (self.bits - 1)
        codes = unpack_words(module.read("qweight").T, columns, self.bits)
        zero = unpack_words(module.read("qzeros"), rows, self.bits).T
        # As in AutoGPTQ, the sum has as many bits as a code: 15 + 1 is the zero point 0.
        zero = (zero + np.uint8(self.offset)) & np.uint8(2**self.bits - 1)
        scale = np.ascontiguousarray(module.read("scales").T)
        if self.symmetric:
            _check_symmetric(module, zero, middle)
            return Codes(signed(codes, middle), scale, None)
        return Codes(signed(codes, middle), scale, signed(zero, middle))


def _check_symmetric(module: StoredModule, zero: np.ndarray, middle: int) -> None:
    wrong = zero[zero != middle]
    if wrong.size:
        raise CheckpointError(
            f"{module.where('qzeros')}: has the zero point {wrong[0]}, but with 'sym' each is "
            f"{middle}; is 'checkpoint_format' right (gptq stores zero - 1, gptq_v2 zero)?"
        )


def read_config(fields: Fields) -> GPTQ:
    """Read the options of a `quantization_config`.

    Args:
      fields: fields of the section.

    Returns:
      The options.

    Raises:
      ConfigError: a field is missing, malformed or unsupported.
    """
    formats = ("gptq", "gptq_v2")
    stored = fields.expect("checkpoint_format", *formats) or fields.expect("format", *formats)
    fields.expect("format", *formats)
    fields.expect("pack_dtype", "int32")
    fields.expect("is_marlin_format", False)
    fields.expect("bits", *BITS)
    dynamic = fields.take("dynamic") or {}
    # Keys that begin with `-:` only exclude modules, whose weights are then dense.
    if not isinstance(dynamic, dict) or not all(str(key).startswith("-:") for key in dynamic):
        raise ConfigError(
            f"{fields.where}: field 'dynamic' is {dynamic!r:.60}; options per module are "
            "unsupported, except '-:' for dense modules"
        )
    for name in UNUSED:
        fields.take(name)
    options = GPTQ(
        bits=fields.get("bits", int),
        group_size=read_group_size(fields, "group_size"),
        symmetric=fields.get("sym", bool, True),
        offset=0 if stored == "gptq_v2" else 1,
    )
    fields.finish()
    return options
