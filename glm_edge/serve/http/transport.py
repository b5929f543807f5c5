"""One HTTP exchange in terms of ASGI: body, response, and a client that left."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any

from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.formats import event_bytes, json_bytes
from glm_edge.serve.http.limits import Limits, Reservation

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_CHARSET = "; charset=utf-8"


class ClientGoneError(Exception):
    """Raised when the client has closed the connection, or does not read."""


def headers_of(scope: Mapping[str, Any]) -> dict[bytes, bytes]:
    """Return the headers of a request, by their names in lower case."""
    return {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}


async def read_body(
    headers: Mapping[bytes, bytes], receive: Receive, limits: Limits, reservation: Reservation
) -> bytes:
    """Read the body.

    Args:
      headers: of the request.
      receive: of the request.
      limits: of the service.
      reservation: grows with the body.

    Returns:
      The body.

    Raises:
      ApiError: the body is too large or too slow, or open requests use all memory.
      ClientGoneError: the client left.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit():
        _check_size(int(declared[:20]), limits)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                _check_size(size, limits)
                reservation.resize(size)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise ApiError(
            f"the body did not arrive within {limits.body_s:g} s", status=408, code="timeout"
        ) from error


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.body_bytes:
        raise ApiError(
            f"the body is larger than {limits.body_bytes} bytes", status=413, code="too_large"
        )


async def until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, None], reply: "Reply"
) -> None:
    """Run work, and cancel it if the client leaves.

    Args:
      receive: of a request whose body was read.
      work: the work.
      reply: of the work; a client may leave once it is complete.

    Raises:
      ClientGoneError: the client left first.
      Exception: of the work.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not reply.ended:
            raise ClientGoneError
        await task
    finally:
        for future in (task, watch):
            future.cancel()
        # So that the cleanup of the work has run when this function ends.
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Reply:
    """The response of one exchange, whole or in events.

    Attributes:
      status: of the response, or None before it begins.
      ended: True after the last part.
    """

    def __init__(self, send: Send, write_s: float = 60.0) -> None:
        """Prepare a response.

        Args:
          send: of the request.
          write_s: seconds in which the client must take each part.
        """
        self._send_message, self._write_s = send, write_s
        self.status: int | None = None
        self._streams = self.ended = False

    async def json(
        self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a JSON value as the whole response."""
        await self.content(json_bytes(value), "application/json", status, headers)

    async def content(
        self,
        body: bytes,
        content_type: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send the whole response."""
        sized = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
        await self._start(status, sized)
        await self._body(body, last=True)

    async def stream(self) -> None:
        """Begin a stream of server-sent events."""
        self._streams = True
        await self._start(
            200,
            {
                "content-type": "text/event-stream" + _CHARSET,
                "cache-control": "no-cache",
                # Proxies such as nginx collect a response otherwise.
                "x-accel-buffering": "no",
            },
        )

    async def events(self, *values: Any) -> None:
        """Send events."""
        if values:
            await self._body(b"".join(map(event_bytes, values)))

    async def comment(self, text: str) -> None:
        """Send a comment, which clients skip."""
        await self._body(f": {text}\n\n".encode())

    async def done(self) -> None:
        """End a complete stream."""
        await self._body(b"data: [DONE]\n\n", last=True)

    async def fail(self, error: ApiError) -> None:
        """Send an error as the response, or as the last event of a stream."""
        if self.ended:
            return
        if self._streams:
            await self._body(event_bytes(error.body()), last=True)
        elif self.status is None:
            await self.json(error.body(), error.status, error.headers)

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _body(self, body: bytes, last: bool = False) -> None:
        self.ended = last
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_s):
                await self._send_message(message)
        except (TimeoutError, OSError) as error:
            raise ClientGoneError from error
