"""Reading and writing of Hugging Face directories of the GLM family."""

from glm_edge.checkpoint.hugging_face.members import MEMBERS, read_config
from glm_edge.checkpoint.hugging_face.reading import open_directory, read
from glm_edge.checkpoint.hugging_face.writing import fields_of, write

__all__ = ["MEMBERS", "fields_of", "open_directory", "read", "read_config", "write"]
