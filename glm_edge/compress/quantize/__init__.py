"""Transforms that round weights, or prepare them for it."""

from glm_edge.compress.quantize.leaves import quantize_leaf
from glm_edge.compress.quantize.rtn import rtn

__all__ = ["quantize_leaf", "rtn"]
