"""Pruning: masks over single weights, and shrinking by whole heads and neurons."""

from glm_edge.compress.prune.magnitude import magnitude
from glm_edge.compress.prune.structured import shrink, structured

__all__ = ["magnitude", "shrink", "structured"]
