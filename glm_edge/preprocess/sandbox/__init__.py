"""Untrusted chat templates, interpreted within limits of time and memory."""

from glm_edge.preprocess.sandbox.budget import Budget
from glm_edge.preprocess.sandbox.interpreter import Interpreter
from glm_edge.preprocess.sandbox.marks import Marks
from glm_edge.preprocess.sandbox.parsing import MAX_TEMPLATE, parse

__all__ = ["MAX_TEMPLATE", "Budget", "Interpreter", "Marks", "parse"]
