"""A model service: many requests at once on one model, and an OpenAI-compatible endpoint."""

from glm_edge.serve.engine import ClosedError, ContextLengthError, Engine
from glm_edge.serve.jax_backend import JaxBackend
from glm_edge.serve.requests import Finished, Handle, Priority, Request, Token, Usage
from glm_edge.serve.waiting import QueueFullError

__all__ = [
    "ClosedError",
    "ContextLengthError",
    "Engine",
    "Finished",
    "Handle",
    "JaxBackend",
    "Priority",
    "QueueFullError",
    "Request",
    "Token",
    "Usage",
]


def __dir__() -> list[str]:
    return __all__
