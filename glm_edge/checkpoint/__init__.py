"""Checkpoints: native safetensors and Orbax directories, and Hugging Face directories."""

from glm_edge.checkpoint.load import build, load, load_tokenizer, save, shipped

__all__ = ["build", "load", "load_tokenizer", "save", "shipped"]


def __dir__() -> list[str]:
    return __all__
