"""Hugging Face directories of the GLM family, read and written."""

from glm_edge.checkpoint.hugging_face.members import MEMBERS, read_config
from glm_edge.checkpoint.hugging_face.reading import read
from glm_edge.checkpoint.hugging_face.writing import fields_of, write

__all__ = ["MEMBERS", "fields_of", "read", "read_config", "write"]
