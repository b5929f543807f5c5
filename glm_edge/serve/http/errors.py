"""Errors of the service in the shape of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

from absl import logging

from glm_edge.errors import GlmEdgeError
from glm_edge.serve.engine import ClosedError, ContextLengthError
from glm_edge.serve.waiting import QueueFullError

RETRY_AFTER = {"retry-after": "1"}


class ApiError(GlmEdgeError):
    """Raised when a request is refused; the client receives status and message.

    Attributes:
      status: HTTP status.
      kind: `type` in the answer.
      param: name of the parameter at fault, or None.
      code: short name of the error for programs, or None.
      headers: further headers of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Store the parts of the answer."""
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the answer."""
        fields = {"type": self.kind, "param": self.param, "code": self.code}
        return {"error": {"message": str(self), **fields}}


def api_error(error: BaseException) -> ApiError:
    """Convert an exception to the error that the client receives.

    Args:
      error: any exception. One that is not of `glm_edge` is logged, and its text is not shown.

    Returns:
      The error.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(str(error), "messages", code="context_length_exceeded")
    if isinstance(error, QueueFullError):
        return ApiError(
            str(error), status=429, kind="rate_limit_error", code="queue_full", headers=RETRY_AFTER
        )
    if isinstance(error, ClosedError):
        return ApiError(
            str(error), status=503, kind="server_error", code="closed", headers=RETRY_AFTER
        )
    # Errors of inputs: the template, the grammar, an image, a sampling rule.
    if isinstance(error, GlmEdgeError):
        return ApiError(str(error))
    logging.error("a request failed", exc_info=error)
    return server_error("the service failed on this request; its log has the reason")


def server_error(message: str) -> ApiError:
    """Make the error of a request that failed without the client's fault."""
    return ApiError(message, status=500, kind="server_error", code="internal_error")


def shutting_down() -> ApiError:
    """Make the error of a request that ends because the service does."""
    return ApiError(
        "the service is shutting down",
        status=503,
        kind="server_error",
        code="closed",
        headers=RETRY_AFTER,
    )
