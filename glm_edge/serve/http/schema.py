"""Bodies of requests as checked options.

Every parameter is honoured or refused with 400, as in OpenAI's API; vLLM ignores unknown ones with
a warning in its log, which a client never reads. Only those that cannot change an answer are
skipped: see `HARMLESS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm_edge.generate.grammar import Grammar
from glm_edge.generate.row_sampling import MAX_BIASES, MAX_LOGPROBS
from glm_edge.generate.sampling import Sampling
from glm_edge.generate.token_pruning import VisionTokens
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.fields import Fields
from glm_edge.serve.http.grammars import read_grammar
from glm_edge.serve.http.limits import Limits
from glm_edge.serve.http.tools import Tools, read_tools
from glm_edge.serve.requests import Priority

HARMLESS = (
    *("user", "metadata", "store", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
)
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_COUNT = 1 << 31
# A mass of 0 leaves the most probable token.
LEAST_TOP_P = 1e-6
TIERS = {
    "auto": Priority.DEFAULT,
    "default": Priority.DEFAULT,
    "scale": Priority.DEFAULT,
    "flex": Priority.BACKGROUND,
    "fast": Priority.INTERACTIVE,
    "priority": Priority.INTERACTIVE,
}
# Attention is known only inside the decoder.
VISION_SCORES = ("novelty", "norm")
# Names that `Processor` reads itself; as variables they could open files or spell special tokens.
RESERVED = frozenset(
    [
        *("self", "messages", "images", "videos", "audio", "tools", "documents"),
        *("add_generation_prompt", "special_tokens_in_text", "conversation"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that conversations and plain completions share.

    Attributes:
      model: requested model, or None.
      max_tokens: most tokens of an answer, or None.
      min_tokens: tokens before which no stop token may come.
      sampling: sampling rules.
      seed: seed of the first answer, or None.
      n: answers per prompt.
      stop: texts that end an answer.
      stop_token_ids: further tokens that end an answer.
      ignore_eos: keeps the model's own stop tokens from ending an answer.
      logprobs: adds log-probabilities.
      top_logprobs: number of alternatives per token.
      stream: answers in pieces.
      include_usage: adds a last chunk with the usage.
      continuous_usage: adds the usage to every chunk.
      priority: of the request.
      tier: name of the priority in the answer.
      grammar: what the answer must match, or None.
      prompt_lookup: drafts continuations from the text.
      early_exit: threshold of early exit, or None.
    """

    model: str | None
    max_tokens: int | None
    min_tokens: int
    sampling: Sampling
    seed: int | None
    n: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    priority: Priority
    tier: str
    grammar: Grammar | None
    prompt_lookup: bool
    early_exit: float | None


@dataclass(frozen=True, kw_only=True)
class ChatBody:
    """A request of `/v1/chat/completions`.

    Attributes:
      options: shared options.
      messages: the conversation, not checked yet.
      tools: functions that the model may call, or None.
      variables: further variables of the template.
      enable_thinking: requested state of thinking, or None.
      return_reasoning: True separates thoughts, False omits them, None follows the service.
      draft: text that the answer may begin with, or None.
      vision_tokens: vision token pruning, or None.
    """

    options: Options
    messages: list[Any]
    tools: Tools | None
    variables: Mapping[str, Any]
    enable_thinking: bool | None
    return_reasoning: bool | None
    draft: str | None
    vision_tokens: VisionTokens | None


@dataclass(frozen=True, kw_only=True)
class CompletionBody:
    """A request of `/v1/completions`.

    Attributes:
      options: shared options.
      prompts: texts or token ids.
      echo: begins each answer with its prompt.
    """

    options: Options
    prompts: list[str | list[int]]
    echo: bool


def read_chat(values: Any, limits: Limits) -> ChatBody:
    """Check a body of `/v1/chat/completions`.

    Args:
      values: the parsed JSON.
      limits: of the service.

    Returns:
      The request.

    Raises:
      ApiError: a parameter is unknown, wrong, or not supported.
    """
    fields = Fields(values)
    messages = fields.items("messages", limits.messages)
    if not messages:
        raise ApiError("messages: must be a list of at least one message", "messages")
    for modality in fields.items("modalities", 8) or []:
        if modality != "text":
            raise fields.refused("modalities", "this service answers in text only")
    logprobs = fields.boolean("logprobs") or False
    top_logprobs = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top_logprobs is not None and not logprobs:
        raise fields.refused("top_logprobs", "needs logprobs: true")
    tools = read_tools(fields)
    variables, enable_thinking = _template_variables(fields)
    body = ChatBody(
        options=_options(fields, limits, logprobs, top_logprobs or 0),
        messages=messages,
        tools=tools,
        variables=variables,
        enable_thinking=enable_thinking,
        return_reasoning=fields.boolean("return_reasoning"),
        draft=_prediction(fields, limits),
        vision_tokens=_vision_tokens(fields),
    )
    fields.finish()
    if tools is not None and tools.choice != "none" and body.options.grammar is not None:
        raise ApiError("response_format: cannot be combined with tools", "response_format")
    return body


def read_completion(values: Any, limits: Limits) -> CompletionBody:
    """Check a body of `/v1/completions`; see `read_chat`."""
    fields = Fields(values)
    prompts = _prompts(fields, limits)
    top_logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    echo = fields.boolean("echo") or False
    if echo and top_logprobs is not None:
        raise fields.refused("echo", "log-probabilities of the prompt are not computed")
    if fields.text("suffix"):
        raise fields.refused("suffix", "text is not inserted before a suffix")
    best_of = fields.integer("best_of", 1, limits.choices)
    options = _options(fields, limits, top_logprobs is not None, top_logprobs or 0, 16)
    fields.finish()
    if best_of not in (None, options.n):
        raise fields.refused("best_of", "must equal n")
    if options.n * len(prompts) > limits.choices:
        raise ApiError(f"n: at most {limits.choices} answers per request", "n")
    return CompletionBody(options=options, prompts=prompts, echo=echo)


def _options(
    fields: Fields,
    limits: Limits,
    logprobs: bool,
    top_logprobs: int,
    max_tokens: int | None = None,
) -> Options:
    fields.ignore(*HARMLESS)
    stream = fields.boolean("stream") or False
    include_usage, continuous_usage = _stream_options(fields, stream)
    older = fields.integer("max_tokens", 1, MAX_COUNT)
    newer = fields.integer("max_completion_tokens", 1, MAX_COUNT)
    max_tokens = newer or older or max_tokens
    min_tokens = fields.integer("min_tokens", 0, MAX_COUNT) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise fields.refused("min_tokens", f"must not exceed max_tokens, {max_tokens}")
    ignore_eos = fields.boolean("ignore_eos") or False
    grammar = read_grammar(fields)
    if grammar is not None and ignore_eos:
        raise fields.refused("ignore_eos", "a constrained answer needs the model's stop tokens")
    tier, priority = _priority(fields)
    return Options(
        model=fields.text("model", 1000),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=_sampling(fields),
        seed=fields.integer("seed", -(1 << 63), (1 << 64) - 1),
        n=fields.integer("n", 1, limits.choices) or 1,
        stop=_stop(fields),
        stop_token_ids=_token_ids(fields, "stop_token_ids", 1000),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        priority=priority,
        tier=tier,
        grammar=grammar,
        prompt_lookup=fields.boolean("prompt_lookup") or False,
        early_exit=fields.number("early_exit", 0, 1),
    )


def _sampling(fields: Fields) -> Sampling:
    temperature = fields.number("temperature", 0, 2)
    top_p = fields.number("top_p", 0, 1)
    top_k = fields.integer("top_k", -1, MAX_COUNT)
    repetition = fields.number("repetition_penalty", 0, 100)
    if repetition == 0:
        raise fields.refused("repetition_penalty", "must be above 0")
    return Sampling(
        # The default of OpenAI's API; that of this library is 0.
        temperature=1.0 if temperature is None else temperature,
        top_p=None if top_p is None else max(top_p, LEAST_TOP_P),
        top_k=None if top_k is None or top_k < 1 else top_k,
        min_p=fields.number("min_p", 0, 1),
        repetition_penalty=1.0 if repetition is None else repetition,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        logit_bias=_logit_bias(fields),
    )


def _logit_bias(fields: Fields) -> dict[int, float]:
    values = fields.object("logit_bias")
    if values is None:
        return {}
    if len(values.names) > MAX_BIASES:
        raise fields.refused("logit_bias", f"has more than {MAX_BIASES} tokens")
    bias = {}
    for name in values.names:
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise fields.refused("logit_bias", f"names must be token ids, got {name!r:.60}")
        bias[int(name)] = values.number(name, -100, 100) or 0.0
    return bias


def _stream_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    options = fields.object("stream_options")
    if options is None:
        return False, False
    if not stream:
        raise fields.refused("stream_options", "needs stream: true")
    options.ignore("include_obfuscation")
    include = options.boolean("include_usage") or False
    continuous = options.boolean("continuous_usage_stats") or False
    options.finish()
    return include or continuous, continuous


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise fields.refused("stop", "must be a text or a list of texts, none empty")
    if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_CHARACTERS:
        raise fields.refused(
            "stop", f"the limits are {MAX_STOPS} texts of {MAX_STOP_CHARACTERS} characters"
        )
    return tuple(stops)


def _token_ids(fields: Fields, name: str, most: int) -> tuple[int, ...]:
    values = fields.items(name, most) or []
    if not all(_is_token(value) for value in values):
        raise fields.refused(name, "must be a list of token ids")
    return tuple(values)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def _priority(fields: Fields) -> tuple[str, Priority]:
    tier = fields.choice("service_tier", TIERS)
    number = fields.integer("priority", -MAX_COUNT, MAX_COUNT)
    if number is not None:
        # As in vLLM, a lower number runs first.
        tier = "priority" if number < 0 else "flex" if number else "default"
    priority = TIERS[tier or "auto"]
    names = {Priority.INTERACTIVE: "priority", Priority.BACKGROUND: "flex"}
    return names.get(priority, "default"), priority


def _template_variables(fields: Fields) -> tuple[dict[str, Any], bool | None]:
    """Read variables of the template, and the switch of thinking by its several names."""
    variables = fields.take("chat_template_kwargs")
    variables = {} if variables is None else variables
    if not isinstance(variables, dict):
        raise fields.refused("chat_template_kwargs", "must be an object")
    if reserved := RESERVED.intersection(variables):
        raise fields.refused("chat_template_kwargs", f"{min(reserved)!r} cannot be set")
    variables = dict(variables)
    thinking = variables.pop("enable_thinking", None)
    if not isinstance(thinking, bool | None):
        raise fields.refused("chat_template_kwargs", "enable_thinking must be true or false")
    top_level = fields.boolean("enable_thinking")
    effort = fields.choice("reasoning_effort", ("none", "minimal", "low", "medium", "high"))
    if thinking is None:
        thinking = top_level
    if thinking is None and effort is not None:
        # The model's reasoning has no degrees.
        thinking = effort != "none"
    return variables, thinking


def _prediction(fields: Fields, limits: Limits) -> str | None:
    prediction = fields.object("prediction")
    if prediction is None:
        return None
    prediction.choice("type", ("content",))
    content = prediction.take("content")
    prediction.finish()
    if isinstance(content, list):
        parts = [Fields(part, "prediction.content") for part in content]
        content = "".join(part.text("text") or "" for part in parts)
    if not isinstance(content, str) or len(content) > limits.characters:
        raise fields.refused("prediction", "content must be a text or a list of text parts")
    return content


def _vision_tokens(fields: Fields) -> VisionTokens | None:
    """Read the pruning of an image's features before the first layer."""
    options = fields.object("vision_tokens")
    if options is None:
        return None
    keep = options.number("keep", 0, 1)
    if not keep:
        raise options.refused("keep", "must be a fraction above 0 and up to 1")
    score = options.choice("score", VISION_SCORES) or VISION_SCORES[0]
    options.finish()
    return VisionTokens(keep, score, 0)


def _prompts(fields: Fields, limits: Limits) -> list[str | list[int]]:
    value = fields.take("prompt")
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    prompts = value if several else [value]
    if len(prompts) > limits.choices:
        raise fields.refused("prompt", f"at most {limits.choices} answers per request")
    for prompt in prompts:
        tokens = isinstance(prompt, list) and all(_is_token(token) for token in prompt)
        if not prompt or not (isinstance(prompt, str) or tokens):
            raise fields.refused("prompt", "must be texts or lists of token ids, none empty")
    if sum(len(prompt) for prompt in prompts) > limits.characters:
        raise fields.refused("prompt", f"is longer than {limits.characters} characters")
    return prompts
