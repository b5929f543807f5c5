"""Generation with a static-shape key-value cache."""

from glm_edge.generate.constraint import Constraints, Matcher, mask_logits
from glm_edge.generate.conversation import chat
from glm_edge.generate.decoding import Generation, generate, greedy, stream
from glm_edge.generate.early_exit import EarlyExit, early_exit, fit_exits
from glm_edge.generate.grammar import Grammar
from glm_edge.generate.options import DecodeOptions
from glm_edge.generate.prompts import prompt_mask
from glm_edge.generate.sampling import Sampling
from glm_edge.generate.skipping import skip_neurons
from glm_edge.generate.sweep import Setting, SweepRow, sweep
from glm_edge.generate.text import TextStream, generate_text, stream_text
from glm_edge.generate.token_pruning import VisionTokens, drop_vision_tokens

__all__ = [
    "Constraints",
    "DecodeOptions",
    "EarlyExit",
    "Generation",
    "Grammar",
    "Matcher",
    "Sampling",
    "Setting",
    "SweepRow",
    "TextStream",
    "VisionTokens",
    "chat",
    "drop_vision_tokens",
    "early_exit",
    "fit_exits",
    "generate",
    "generate_text",
    "greedy",
    "mask_logits",
    "prompt_mask",
    "skip_neurons",
    "stream",
    "stream_text",
    "sweep",
]


def __dir__() -> list[str]:
    return __all__
