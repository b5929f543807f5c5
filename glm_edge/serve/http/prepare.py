"""Bodies of requests as requests to the engine; runs on a worker thread."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from glm_edge.errors import DataError
from glm_edge.files import parse_json
from glm_edge.generate.token_pruning import VisionTokens
from glm_edge.preprocess.inputs import Inputs
from glm_edge.preprocess.tokens import decode, encode, text_ids
from glm_edge.serve.http.answers import OMIT, SEPARATE, AnswerForm
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.formats import ChatFormat, CompletionFormat, Format
from glm_edge.serve.http.messages import MessageReader
from glm_edge.serve.http.schema import ChatBody, Options, read_chat, read_completion
from glm_edge.serve.http.service import Service
from glm_edge.serve.http.tools import call_matcher, check_supported
from glm_edge.serve.requests import Matcher, Request

_TAIL = 8
_THOUGHT = "<think>"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request of a client, ready for the engine.

    Attributes:
      requests: `n` adjacent ones per prompt.
      forms: of their answers.
      format: of the response.
      stream: answers in pieces.
    """

    requests: Sequence[Request]
    forms: Sequence[AnswerForm]
    format: Format
    stream: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all inputs; answers to one prompt share them."""
        inputs = {id(request.inputs): request.inputs for request in self.requests}
        return sum(_num_bytes(value) for value in inputs.values())


class Stepwise:
    """A matcher whose tokens are all drawn, so that each has a log-probability."""

    def __init__(self, matcher: Matcher) -> None:
        """Wrap a matcher."""
        self._matcher = matcher

    def allowed(self) -> np.ndarray:
        """Return the tokens that may follow."""
        return self._matcher.allowed()

    def forced(self) -> list[int]:
        """Return no tokens."""
        return []

    def accept(self, token: int) -> None:
        """Advance by one token."""
        self._matcher.accept(token)

    def copy(self) -> "Stepwise":
        """Return an independent copy."""
        return Stepwise(self._matcher.copy())


def parse_body(service: Service, raw: bytes) -> Any:
    """Parse a JSON body within the limits.

    Raises:
      DataError: the body is not JSON, or exceeds a limit.
    """
    limits = service.limits
    return parse_json(raw, "body", DataError, limits.body_bytes, limits.json_values)


def prepare_chat(service: Service, raw: bytes, content_type: str) -> Prepared:
    """Prepare a request of `/v1/chat/completions`.

    Args:
      service: the service.
      raw: the body.
      content_type: of the body, JSON.

    Returns:
      The request.

    Raises:
      GlmEdgeError: the body is malformed, or asks for what the model cannot do.
    """
    body = read_chat(parse_body(service, raw), service.limits)
    model = service.model_named(body.options.model)
    tools, tokenizer = body.tools, service.processor.tokenizer
    syntax = check_supported(tools, service.call_syntax)
    variables = {**body.variables, **_thinking_variable(service, body.enable_thinking)}
    messages = MessageReader(service.limits).read(body.messages)
    schemas = None if tools is None or syntax is None else tools.schemas
    inputs = service.processor(messages, tools=schemas, **variables)
    matcher = _matcher(service, body.options)
    if tools is not None and syntax is not None and tools.forced:
        matcher = call_matcher(tools, syntax, tokenizer, service.constraints)
    draft = None if body.draft is None else text_ids(tokenizer, body.draft)
    names = () if tools is None or syntax is None else tools.callable_names
    form = replace(
        _form(service, body.options),
        thinking=_thinking(service, body),
        opened=_opens_thought(service, inputs),
        names=names,
        parallel=tools is None or tools.parallel,
        next_call=None if syntax is None else syntax.next_call,
    )
    return Prepared(
        requests=_requests(
            service, body.options, [inputs], matcher, draft, _vision_tokens(service, body)
        ),
        forms=[form] * body.options.n,
        format=ChatFormat(model, body.options, int(inputs.valid.sum())),
        stream=body.options.stream,
    )


def prepare_completion(service: Service, raw: bytes, content_type: str) -> Prepared:
    """Prepare a request of `/v1/completions`; see `prepare_chat`."""
    body = read_completion(parse_body(service, raw), service.limits)
    model, options = service.model_named(body.options.model), body.options
    tokenizer = service.processor.tokenizer
    size = service.config.decoder.vocab_size
    rows, echoes = [], []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            tokens = [*_beginning(service), *text_ids(tokenizer, prompt)]
        else:
            tokens = prompt
        if outside := [token for token in tokens if token >= size]:
            raise ApiError(f"prompt: {outside[0]} is not in 0..{size - 1}", "prompt")
        if not tokens:
            raise ApiError("prompt: has no tokens", "prompt")
        rows.append(Inputs(np.array([tokens], np.int32)))
        text = prompt if isinstance(prompt, str) else decode(tokenizer, tokens)
        echoes += [text if body.echo else ""] * options.n
    form = replace(_form(service, options), tags=())
    counts = sum(int(inputs.valid.sum()) for inputs in rows)
    return Prepared(
        requests=_requests(service, options, rows, _matcher(service, options), None),
        forms=[form] * len(echoes),
        format=CompletionFormat(model, options, counts, echoes),
        stream=options.stream,
    )


def _requests(
    service: Service,
    options: Options,
    rows: Sequence[Inputs],
    matcher: Matcher | None,
    draft: list[int] | None,
    vision_tokens: VisionTokens | None = None,
) -> list[Request]:
    """Make `n` requests per prompt, with successive seeds."""
    size, capacity = service.config.decoder.vocab_size, service.engine.backend.capacity
    biased = list(dict(options.sampling.logit_bias))
    for name, tokens in (("logit_bias", biased), ("stop_token_ids", options.stop_token_ids)):
        if outside := [token for token in tokens if token >= size]:
            raise ApiError(f"{name}: {outside[0]} is not in 0..{size - 1}", name)
    stops = () if options.ignore_eos else service.stop_tokens
    request = Request(
        inputs=rows[0],
        # The engine ends an answer at the end of the context.
        max_new_tokens=min(options.max_tokens or capacity, capacity),
        sampling=options.sampling,
        stop_tokens=(*stops, *options.stop_token_ids),
        min_new_tokens=options.min_tokens,
        logprobs=options.logprobs,
        matcher=matcher,
        draft=draft,
        prompt_lookup=options.prompt_lookup,
        exit_threshold=options.early_exit,
        vision_tokens=vision_tokens,
        priority=options.priority,
    )
    seeds: list[int | None] = [None] * options.n
    if options.seed is not None:
        seeds = [(options.seed + index) & 0xFFFFFFFF for index in range(options.n)]
    return [replace(request, inputs=inputs, seed=seed) for inputs in rows for seed in seeds]


def _matcher(service: Service, options: Options) -> Matcher | None:
    if options.grammar is None:
        return None
    matcher = service.constraints.start(options.grammar)
    return Stepwise(matcher) if options.logprobs else matcher


def _form(service: Service, options: Options) -> AnswerForm:
    return AnswerForm(
        tokenizer=service.processor.tokenizer,
        stop=options.stop,
        logprobs=options.logprobs,
        top_logprobs=options.top_logprobs,
    )


def _thinking(service: Service, body: ChatBody) -> str:
    if body.return_reasoning is None:
        return service.thinking
    return SEPARATE if body.return_reasoning else OMIT


def _thinking_variable(service: Service, thinking: bool | None) -> dict[str, bool]:
    """Return the template's switch of thinking.

    Raises:
      ApiError: the model thinks, and its template has no switch.
    """
    if thinking is None:
        return {}
    if "enable_thinking" in service.processor.template:
        return {"enable_thinking": thinking}
    if not thinking and service.processor.tokenizer.token_to_id(_THOUGHT) is not None:
        raise ApiError(
            "enable_thinking: this model's chat template cannot switch thinking off",
            "enable_thinking",
        )
    return {}


def _vision_tokens(service: Service, body: ChatBody) -> VisionTokens | None:
    if body.vision_tokens is not None and service.config.vision is None:
        raise ApiError("vision_tokens: this model reads no images", "vision_tokens")
    return body.vision_tokens


def _opens_thought(service: Service, inputs: Inputs) -> bool:
    """Test whether the prompt ends inside a thought that the template opened."""
    tail = inputs.tokens[0][inputs.valid[0]][-_TAIL:]
    return decode(service.processor.tokenizer, tail.tolist()).rstrip().endswith(_THOUGHT)


def _beginning(service: Service) -> list[int]:
    """Return the tokens that the tokenizer puts before each text, such as `[gMASK]<sop>`."""
    tokenizer = service.processor.tokenizer
    bare = encode(tokenizer, "x")
    marked = tokenizer.encode("x", add_special_tokens=True).ids
    return marked[: len(marked) - len(bare)] if marked[-len(bare) :] == bare else []


def _num_bytes(inputs: Inputs) -> int:
    arrays: list[Any] = [inputs.tokens, inputs.audio]
    if inputs.images is not None:
        arrays += list(inputs.images)
    return sum(np.asarray(array).nbytes for array in arrays if array is not None)
