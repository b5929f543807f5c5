"""Generation with a static-shape cache."""

from glm_edge.generate.decoding import Generation, generate, greedy, prompt_mask, stream
from glm_edge.generate.sampling import Sampling
from glm_edge.generate.text import TextStream, generate_text, stream_text

__all__ = [
    "Generation",
    "Sampling",
    "TextStream",
    "generate",
    "generate_text",
    "greedy",
    "prompt_mask",
    "stream",
    "stream_text",
]
