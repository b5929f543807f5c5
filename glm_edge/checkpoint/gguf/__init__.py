"""Reading of GGUF files: weights dequantized, or as boxes."""

from glm_edge.checkpoint.gguf.reading import Weights, build, open_file, read

__all__ = ["Weights", "build", "open_file", "read"]
