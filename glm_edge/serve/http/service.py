"""The service behind all endpoints: engine, processor, limits and settings."""

import hmac
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from glm_edge.errors import ConfigError
from glm_edge.generate.constraint import Constraints
from glm_edge.preprocess.processor import Processor
from glm_edge.serve.engine import Engine
from glm_edge.serve.http.answers import INLINE, THINKING
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.limits import Budget, Limits
from glm_edge.serve.http.metrics import Metrics
from glm_edge.serve.http.tools import CallSyntax

WORKERS = 2


class Service:
    """A model that answers over HTTP.

        service = Service(engine, ge.Processor.from_checkpoint(path), names=["nano"])
        app = create_app(service)

    Attributes:
      engine: a started engine.
      processor: of the same checkpoint.
      names: names by which clients may ask for the model; the first is the name in answers.
      limits: on requests.
      thinking: "inline" leaves thoughts in the content, "separate" moves them to
        `reasoning_content`, "omit" removes them.
      transcribes: True for a model that turns speech to text.
      stop_tokens: tokens that end an answer.
      call_syntax: of the model, or None without tools.
      budget: memory of open requests.
      metrics: of the service.
      workers: threads that prepare requests.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        names: Sequence[str] = (),
        limits: Limits | None = None,
        api_key: str | None = None,
        thinking: str = INLINE,
        transcribes: bool | None = None,
    ) -> None:
        """Prepare a service; the caller starts and closes the engine.

        Args:
          engine: runs the model.
          processor: of the same checkpoint.
          names: as the attribute; none takes the name of the configuration.
          limits: on requests; None takes the defaults.
          api_key: key that clients must send, or None.
          thinking: as the attribute.
          transcribes: as the attribute; None means a model that hears but does not see.

        Raises:
          ConfigError: `thinking` has another value, or the key is empty.
          MissingExtraError: prometheus-client is not installed.
        """
        if thinking not in THINKING:
            raise ConfigError(f"thinking must be one of {', '.join(THINKING)}, got {thinking!r}")
        if api_key is not None and not api_key:
            raise ConfigError("api_key is empty; pass None for a service without a key")
        config = engine.backend.config
        self.engine, self.processor, self.config = engine, processor, config
        self.names = tuple(names) or (config.name,)
        self.limits, self.thinking = limits or Limits(), thinking
        hears_only = processor.audio is not None and config.vision is None
        self.transcribes = hears_only if transcribes is None else transcribes
        self.stop_tokens = tuple(sorted({*config.eos_token_ids, *processor.stop_token_ids}))
        self.call_syntax = CallSyntax.of(processor)
        self.budget = Budget(self.limits.memory_bytes)
        self.metrics = Metrics(engine)
        self.workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="glm-edge-http")
        self._api_key = None if api_key is None else f"Bearer {api_key}".encode()
        self._lock = threading.Lock()
        self._constraints: Constraints | None = None

    @property
    def constraints(self) -> Constraints:
        """Compiled grammars, made at the first use."""
        with self._lock:
            if self._constraints is None:
                size = self.config.decoder.vocab_size
                tokenizer = self.processor.tokenizer
                self._constraints = Constraints(tokenizer, self.stop_tokens, size)
            return self._constraints

    def authorize(self, headers: Mapping[bytes, bytes]) -> None:
        """Check the key of a request.

        Args:
          headers: of the request, in lower case.

        Raises:
          ApiError: the key is missing or wrong.
        """
        sent = headers.get(b"authorization", b"")
        if self._api_key is None or hmac.compare_digest(sent, self._api_key):
            return
        raise ApiError(
            "the API key is missing or wrong; send 'Authorization: Bearer KEY'",
            status=401,
            kind="authentication_error",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def model_named(self, name: str | None) -> str:
        """Return the name of the model in an answer.

        Raises:
          ApiError: the client asks for another model.
        """
        if name is not None and name not in self.names:
            raise ApiError(
                f"model: {name[:100]!r} does not exist; served: {', '.join(self.names)}",
                "model",
                status=404,
                kind="not_found_error",
                code="model_not_found",
            )
        return name or self.names[0]

    def described(self, name: str) -> dict[str, Any]:
        """Return the object of `/v1/models/{id}`."""
        return {
            "id": name,
            "object": "model",
            "created": self.metrics.started,
            "owned_by": "glm_edge",
            "max_model_len": self.engine.backend.capacity,
        }

    def close(self) -> None:
        """Stop the threads that prepare requests."""
        self.workers.shutdown(wait=False, cancel_futures=True)
