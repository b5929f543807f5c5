"""The server: a socket, signals, and an orderly end."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from glm_edge.errors import OutputError, require
from glm_edge.serve.http.app import create_app
from glm_edge.serve.http.hosts import LOOPBACK, known_hosts
from glm_edge.serve.http.service import Service

HEADER_BYTES = 32 << 10
# Seconds for the last events after the engine has closed.
FLUSH_S = 5.0


class Server:
    """A service on a port.

    Attributes:
      port: of the socket, once `started` is set.
      started: set when the socket accepts connections.
    """

    def __init__(
        self,
        service: Service,
        host: str = "127.0.0.1",
        port: int = 8000,
        drain_s: float = 30.0,
        header_s: float = 10.0,
        connections: int = 500,
        allowed_hosts: Sequence[str] = (),
        access_log: bool = False,
        on_start: Callable[[int], Any] | None = None,
    ) -> None:
        """Prepare the server; `run` opens the socket.

        Args:
          service: the service.
          host: address; the default accepts connections of this machine only.
          port: 0 takes a free one.
          drain_s: seconds that running and waiting requests have to finish after a signal.
          header_s: seconds in which the headers of a request must arrive.
          connections: most open connections; others are closed at once.
          allowed_hosts: names in the Host header besides `host` and those of the loopback
            interface. Without any, an address that others reach takes every name.
          access_log: logs each request.
          on_start: called with the port once the socket accepts connections.
        """
        self.service, self.port = service, port
        self.started = threading.Event()
        self._host, self._drain_s, self._header_s = host, drain_s, header_s
        self._connections = connections
        checked = host in LOOPBACK or allowed_hosts
        self._hosts = [*allowed_hosts, host, *LOOPBACK] if checked else None
        self._access_log, self._on_start = access_log, on_start
        self._server: Any = None

    @property
    def url(self) -> str:
        """Address of the socket, without `/v1`."""
        return f"http://{self._host}:{self.port}"

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop`.

        After the first signal, new requests receive 503. Requests that are open finish within
        `drain_s`; streams that are open then end with an event that reports an error. A second
        signal ends them at once. The engine is closed at the end.

        Raises:
          MissingExtraError: uvicorn is not installed.
          OutputError: the address cannot be used.
        """
        uvicorn = require("uvicorn", extra="serve")
        app: Any = create_app(self.service)
        config = uvicorn.Config(
            app if self._hosts is None else known_hosts(app, self._hosts),
            host=self._host,
            port=self.port,
            http=_protocol(self._header_s, self._connections),
            h11_max_incomplete_event_size=HEADER_BYTES,
            ws="none",
            lifespan="off",
            loop="asyncio",
            server_header=False,
            access_log=self._access_log,
            log_level="info" if self._access_log else "warning",
            timeout_graceful_shutdown=int(FLUSH_S),
        )
        self._server = _server(config, self)
        try:
            self._server.run()
        except SystemExit as error:
            # uvicorn logs the reason and exits.
            raise OutputError(f"cannot listen on {self._host}:{self.port}") from error
        finally:
            self.service.engine.close()
            self.service.close()

    def stop(self) -> None:
        """Act as on a signal; safe on any thread."""
        if self._server is not None:
            self._server.handle_exit(0, None)


def _server(config: Any, owner: Server) -> Any:
    """Make uvicorn's server with an orderly end."""
    base: Any = require("uvicorn", extra="serve").Server
    engine = owner.service.engine

    class DrainingServer(base):
        loop: asyncio.AbstractEventLoop | None = None
        drain: asyncio.Task[None] | None = None
        signals = 0

        async def startup(self, sockets: Any = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)
            if self.servers:
                owner.port = self.servers[0].sockets[0].getsockname()[1]
                owner.started.set()
                if owner._on_start is not None:
                    owner._on_start(owner.port)

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.signals += 1
            if self.loop is None or not self.started:
                self.should_exit = True
            elif self.signals == 1:
                self.loop.call_soon_threadsafe(self._begin_drain)
            else:
                threading.Thread(target=engine.close, daemon=True).start()

        def _begin_drain(self) -> None:
            self.drain = asyncio.ensure_future(self._drain())

        async def _drain(self) -> None:
            # Refuses new requests from now on.
            await asyncio.to_thread(engine.close, owner._drain_s)
            deadline = asyncio.get_running_loop().time() + FLUSH_S
            while self.server_state.tasks and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.02)
            self.should_exit = True

    return DrainingServer(config)


def _protocol(header_s: float, connections: int) -> Any:
    """Make uvicorn's protocol with limits on connections and on the time that headers take.

    A client that sends a byte of its headers now and then would otherwise hold a connection for
    ever.
    """
    http = require("uvicorn.protocols.http.h11_impl", extra="serve")
    base: Any = http.H11Protocol

    class TimedProtocol(base):
        header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > connections:
                transport.close()
                return
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            # The first bytes of a further request on the same connection.
            self._start_timer()
            super().data_received(data)
            if self.conn.their_state is not http.h11.IDLE:
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            if self.header_timer is None and self.conn.their_state is http.h11.IDLE:
                self.header_timer = self.loop.call_later(header_s, self.transport.close)

        def _stop_timer(self) -> None:
            if self.header_timer is not None:
                self.header_timer.cancel()
                self.header_timer = None

    return TimedProtocol
