"""Metrics for Prometheus."""

import time
from typing import Any

from glm_edge.errors import require
from glm_edge.serve.engine import Engine

PREFIX = "glm_edge_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts and times of one service, in a registry of its own.

    Attributes:
      started: Unix time of the start.
      requests: counter by endpoint and status; a client that left counts as 499.
      open: gauge of open requests.
      first_token: seconds to the first token.
      between_tokens: seconds between tokens.
      duration: seconds of complete requests.
    """

    def __init__(self, engine: Engine) -> None:
        """Create the metrics.

        Args:
          engine: its counters are read at each scrape.

        Raises:
          MissingExtraError: prometheus-client is not installed.
        """
        prometheus = require("prometheus_client", extra="serve")
        self.started = int(time.time())
        self._generate = prometheus.generate_latest
        self._registry = registry = prometheus.CollectorRegistry()
        registry.register(_EngineCollector(engine))
        self.requests = prometheus.Counter(
            f"{PREFIX}requests", "Requests", ["endpoint", "status"], registry=registry
        )
        self.open = prometheus.Gauge(f"{PREFIX}open_requests", "Open requests", registry=registry)

        def seconds(name: str, text: str) -> Any:
            return prometheus.Histogram(
                f"{PREFIX}{name}_seconds", text, buckets=SECONDS, registry=registry
            )

        self.first_token = seconds("time_to_first_token", "Time to the first token")
        self.between_tokens = seconds("time_per_output_token", "Time between tokens")
        self.duration = seconds("request_duration", "Time of requests that completed")

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return self._generate(self._registry)


class Timer:
    """Times of one request."""

    def __init__(self, metrics: Metrics) -> None:
        """Start the clock."""
        self._metrics = metrics
        self._start = time.monotonic()
        self._last: dict[int, float] = {}

    def token(self, index: int) -> None:
        """Record a token of one answer."""
        now = time.monotonic()
        last = self._last.get(index)
        if last is not None:
            self._metrics.between_tokens.observe(now - last)
        elif not self._last:
            self._metrics.first_token.observe(now - self._start)
        self._last[index] = now

    def finish(self) -> None:
        """Record the end."""
        self._metrics.duration.observe(time.monotonic() - self._start)


class _EngineCollector:
    """A collector of the engine's counters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> list[Any]:
        core = require("prometheus_client.core", extra="serve")
        engine, cache = self._engine, self._engine.prefix_cache
        gauges = {
            "slots": ("Slots", engine.backend.num_slots),
            "running_requests": ("Requests with a slot", engine.running),
            "waiting_requests": ("Requests that wait for a slot", engine.waiting),
            "prefix_cache_bytes": ("Bytes of the prefix cache", cache.num_bytes),
        }
        counters = {
            name: (f"Engine: {name.replace('_', ' ')}", value)
            for name, value in vars(engine.counters).items()
        }
        for name in ("hits", "misses", "evictions"):
            counters[f"prefix_cache_{name}"] = (f"Prefix cache: {name}", getattr(cache, name))
        return [
            *(core.GaugeMetricFamily(PREFIX + n, text, value=v) for n, (text, v) in gauges.items()),
            *(
                core.CounterMetricFamily(PREFIX + n, text, value=v)
                for n, (text, v) in counters.items()
            ),
        ]
