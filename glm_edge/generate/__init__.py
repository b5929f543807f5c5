"""Generation with a static-shape cache."""

from glm_edge.generate.decoding import greedy, prompt_mask

__all__ = ["greedy", "prompt_mask"]
