"""Check of the Host header, against web pages that a browser lets talk to this machine.

A page from elsewhere may point its own name at a loopback address (DNS rebinding). Its requests
then reach a service without a key, but with the page's name in their Host header.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.transport import Receive, Reply, Send, headers_of

LOOPBACK = ("127.0.0.1", "::1", "localhost")

Application = Callable[[Any, Receive, Send], Awaitable[None]]


def known_hosts(app: Application, names: Sequence[str]) -> Application:
    """Return an application that refuses requests to other hosts.

    Args:
      app: the application.
      names: names or addresses of this service, without ports.

    Returns:
      The application; other hosts receive status 421.
    """
    known = {name.lower() for name in names}

    async def checked(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = headers_of(scope).get(b"host", b"").decode("latin-1")
            if name_of(host) not in known:
                refusal = ApiError(
                    f"this service is not {host[:100]!r}; --allowed_hosts adds names",
                    status=421,
                    code="unknown_host",
                    headers={"connection": "close"},
                )
                await Reply(send).fail(refusal)
                return
        await app(scope, receive, send)

    return checked


def name_of(host: str) -> str:
    """Return the name or address of a Host header in lower case, without brackets and port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
