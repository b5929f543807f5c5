"""Transforms that quantize weights, or prepare weights for quantization."""

from glm_edge.compress.quantize.activations import activations
from glm_edge.compress.quantize.adaround import adaround
from glm_edge.compress.quantize.awq import awq
from glm_edge.compress.quantize.blockwise import blockwise
from glm_edge.compress.quantize.catq import catq
from glm_edge.compress.quantize.distill_scales import distill_scales
from glm_edge.compress.quantize.gptq import gptq
from glm_edge.compress.quantize.hqq import hqq
from glm_edge.compress.quantize.parameter import quantize_leaf
from glm_edge.compress.quantize.qat import qat
from glm_edge.compress.quantize.reorder import reorder
from glm_edge.compress.quantize.rotate import rotate
from glm_edge.compress.quantize.rtn import rtn
from glm_edge.compress.quantize.smoothquant import smoothquant

__all__ = [
    "activations",
    "adaround",
    "awq",
    "blockwise",
    "catq",
    "distill_scales",
    "gptq",
    "hqq",
    "qat",
    "quantize_leaf",
    "reorder",
    "rotate",
    "rtn",
    "smoothquant",
]


def __dir__() -> list[str]:
    return __all__
