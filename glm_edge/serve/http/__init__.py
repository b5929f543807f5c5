"""The engine behind OpenAI's HTTP API."""

from glm_edge.serve.http.app import create_app
from glm_edge.serve.http.limits import Limits
from glm_edge.serve.http.server import Server
from glm_edge.serve.http.service import Service

__all__ = ["Limits", "Server", "Service", "create_app"]


def __dir__() -> list[str]:
    return __all__
