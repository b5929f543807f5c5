"""The application: routes of the service."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from glm_edge.errors import require
from glm_edge.serve.http.errors import ApiError, api_error
from glm_edge.serve.http.exchange import CLIENT_GONE, Exchange
from glm_edge.serve.http.metrics import CONTENT_TYPE
from glm_edge.serve.http.prepare import prepare_chat, prepare_completion
from glm_edge.serve.http.service import Service
from glm_edge.serve.http.transcriptions import prepare_transcription
from glm_edge.serve.http.transport import ClientGoneError, Receive, Reply, Send, headers_of

if TYPE_CHECKING:
    from starlette.applications import Starlette

HEALTH_S = 10.0
# The page contains its own script, and talks to this service only.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}

Respond = Callable[[Service, Mapping[str, Any], Reply], Awaitable[None]]


def create_app(service: Service, health_s: float = HEALTH_S) -> "Starlette":
    """Create the ASGI application of a service.

    Args:
      service: the service; its engine runs already.
      health_s: seconds in which the engine must answer `/health`. A program that the engine
        compiles for a new size of image delays it.

    Returns:
      The application.

    Raises:
      MissingExtraError: starlette is not installed.
    """
    applications = require("starlette.applications", extra="serve")
    routing = require("starlette.routing", extra="serve")
    exceptions = require("starlette.exceptions", extra="serve")
    routes = [
        ("/v1/chat/completions", Exchange(service, "chat", prepare_chat), "POST"),
        ("/v1/completions", Exchange(service, "completions", prepare_completion), "POST"),
        (
            "/v1/audio/transcriptions",
            Exchange(service, "transcriptions", prepare_transcription, "multipart/form-data"),
            "POST",
        ),
        ("/v1/models", _Lookup(service, _models), "GET"),
        ("/v1/models/{model:path}", _Lookup(service, _model), "GET"),
        ("/health", _Lookup(service, _health(health_s), protected=False), "GET"),
        ("/metrics", _Lookup(service, _metrics, protected=False), "GET"),
        ("/", _Lookup(service, _page, protected=False), "GET"),
    ]
    return applications.Starlette(
        routes=[routing.Route(path, app, methods=[method]) for path, app, method in routes],
        exception_handlers={exceptions.HTTPException: _http_error},
    )


class _Lookup:
    """An endpoint that answers at once, as an ASGI application."""

    def __init__(self, service: Service, respond: Respond, protected: bool = True) -> None:
        self._service, self._respond, self._protected = service, respond, protected

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        reply = Reply(send, self._service.limits.write_s)
        try:
            if self._protected:
                self._service.authorize(headers_of(scope))
            await self._respond(self._service, scope, reply)
        except ClientGoneError:
            reply.status = CLIENT_GONE
        except Exception as error:
            await reply.fail(api_error(error))


async def _models(service: Service, scope: Mapping[str, Any], reply: Reply) -> None:
    data = [service.described(name) for name in service.names]
    await reply.json({"object": "list", "data": data})


async def _model(service: Service, scope: Mapping[str, Any], reply: Reply) -> None:
    name = service.model_named(scope["path_params"]["model"])
    await reply.json(service.described(name))


async def _metrics(service: Service, scope: Mapping[str, Any], reply: Reply) -> None:
    await reply.content(service.metrics.text(), CONTENT_TYPE)


async def _page(service: Service, scope: Mapping[str, Any], reply: Reply) -> None:
    page = resources.files("glm_edge.serve").joinpath("page.html").read_bytes()
    await reply.content(page, "text/html; charset=utf-8", headers=PAGE_HEADERS)


def _health(health_s: float) -> Respond:
    async def health(service: Service, scope: Mapping[str, Any], reply: Reply) -> None:
        """Wait for a turn of the engine's loop, which a server that is stuck does not make."""
        ping = asyncio.wrap_future(service.engine.ping())
        try:
            await asyncio.wait_for(asyncio.shield(ping), health_s)
        except TimeoutError as error:
            raise ApiError(
                f"the engine has not answered within {health_s:g} s",
                status=503,
                kind="server_error",
                code="engine_stuck",
            ) from error
        engine = service.engine
        counts = {"running": engine.running, "waiting": engine.waiting}
        await reply.json({"status": "ok", **counts})

    return health


async def _http_error(request: Any, error: Any) -> Any:
    """Answer an unknown path or method in the shape of other errors."""
    known = {404: "this path does not exist", 405: "this path has another method"}
    message = known.get(error.status_code, str(error.detail))
    headers = {"connection": "close", **(error.headers or {})}
    failure = ApiError(message, status=error.status_code, code="not_found", headers=headers)

    async def respond(scope: Any, receive: Receive, send: Send) -> None:
        await Reply(send).fail(failure)

    return respond
