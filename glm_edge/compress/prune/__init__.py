"""Pruning: scores, mask shapes, allocation, schedules, and removal of units from the arrays."""

from glm_edge.compress.prune.channels import channels
from glm_edge.compress.prune.compact import compact, unmasked
from glm_edge.compress.prune.depth import depth
from glm_edge.compress.prune.encoders import encoders
from glm_edge.compress.prune.magnitude import magnitude
from glm_edge.compress.prune.mask import mask
from glm_edge.compress.prune.schedules import (
    boxed,
    cubic,
    iterative,
    one_shot,
    scheduled,
    staircase,
)
from glm_edge.compress.prune.scores.from_model import scores_of
from glm_edge.compress.prune.shrink.heads_neurons import shrink, shrink_encoder
from glm_edge.compress.prune.shrink.layers import shrink_depth
from glm_edge.compress.prune.shrink.tokenizer import frequent_tokens, shrink_tokenizer
from glm_edge.compress.prune.shrink.vocabulary import map_tokens, shrink_vocabulary
from glm_edge.compress.prune.sparsegpt import sparsegpt
from glm_edge.compress.prune.structured import structured
from glm_edge.compress.prune.vocabulary import vocabulary

__all__ = [
    "boxed",
    "channels",
    "compact",
    "cubic",
    "depth",
    "encoders",
    "frequent_tokens",
    "iterative",
    "magnitude",
    "map_tokens",
    "mask",
    "one_shot",
    "scheduled",
    "scores_of",
    "shrink",
    "shrink_depth",
    "shrink_encoder",
    "shrink_tokenizer",
    "shrink_vocabulary",
    "sparsegpt",
    "staircase",
    "structured",
    "unmasked",
    "vocabulary",
]


def __dir__() -> list[str]:
    return __all__
