"""Every parameter is honoured or refused."""

import inspect

import pytest

from glm_edge.errors import GlmEdgeError
from glm_edge.generate.grammar import Grammar
from glm_edge.preprocess.processor import Processor
from glm_edge.serve import Priority
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.limits import Limits
from glm_edge.serve.http.schema import RESERVED, read_chat, read_completion

MESSAGES = [{"role": "user", "content": "hello"}]
LIMITS = Limits()


def chat(**fields):
    return read_chat({"messages": MESSAGES, **fields}, LIMITS)


def test_defaults_are_those_of_openai():
    options = chat().options
    assert options.sampling.temperature == 1
    assert options.max_tokens is None
    assert (options.n, options.stream, options.logprobs) == (1, False, False)
    assert read_completion({"prompt": "x"}, LIMITS).options.max_tokens == 16


def test_sampling_rules_are_read():
    sampling = chat(
        temperature=0.5,
        top_p=0.85,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=-1,
        logit_bias={"5": -100, "6": 2.5},
    ).options.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.85, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.2, -1)
    assert sampling.logit_bias == ((5, -100.0), (6, 2.5))


def test_top_k_can_be_switched_off_as_in_vllm():
    assert chat(top_k=-1).options.sampling.top_k is None
    assert chat(top_p=0).options.sampling.top_p > 0


def test_the_newer_limit_of_tokens_wins():
    assert chat(max_tokens=3).options.max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=5).options.max_tokens == 5
    assert chat(max_completion_tokens=5.0).options.max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({}, Priority.DEFAULT),
        ({"service_tier": "priority"}, Priority.INTERACTIVE),
        ({"service_tier": "flex"}, Priority.BACKGROUND),
        ({"priority": -1}, Priority.INTERACTIVE),
        ({"priority": 3}, Priority.BACKGROUND),
    ],
)
def test_priorities(fields, priority):
    assert chat(**fields).options.priority == priority


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, None),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
    ],
)
def test_thinking_has_three_names(fields, thinking):
    assert chat(**fields).enable_thinking is thinking


def test_harmless_fields_of_clients_are_skipped():
    body = chat(
        user="u",
        metadata={"a": "b"},
        store=False,
        prompt_cache_key="k",
        safety_identifier="s",
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        stop=None,
    )
    assert body.options.include_usage


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar.json_object()),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "integer"}},
                }
            },
            Grammar.json_schema({"type": "integer"}),
        ),
        ({"regex": "a+"}, Grammar.regex("a+")),
        ({"grammar": 'start: "a"'}, Grammar.lark('start: "a"')),
        ({"structured_outputs": {"regex": "b"}}, Grammar.regex("b")),
        ({"structured_outputs": {"choice": ["a.b", "c d"]}}, Grammar.regex(r"a\.b|c d")),
        ({"structured_outputs": {"phone_actions": True}}, Grammar.phone_actions()),
        ({"structured_outputs": {"json": {"type": "null"}}}, Grammar.json_schema({"type": "null"})),
    ],
)
def test_constraints_by_all_names(fields, grammar):
    assert chat(**fields).options.grammar == grammar


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"unknown": 1}, "unknown"),
        ({"functions": []}, "functions"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "response_format"),
        ({"structured_outputs": {"magic": 1}}, "structured_outputs.magic"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function"),
        ({"prediction": {"type": "content", "content": 5}}, "prediction"),
        ({"early_exit": 2}, "early_exit"),
        ({"vision_tokens": {"keep": 0}}, "vision_tokens.keep"),
        ({"vision_tokens": {"keep": 0.5, "score": "attention"}}, "vision_tokens.score"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
    ],
)
def test_wrong_values_name_their_parameter(fields, param):
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert "\n" not in str(refused.value)


def test_unsupported_schemas_are_refused_and_never_ignored():
    schema = {"type": "object", "propertyNames": {"pattern": "a"}, "not": {}}
    with pytest.raises(GlmEdgeError):
        chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def test_variables_cannot_reach_arguments_of_the_processor():
    arguments = set(inspect.signature(Processor.__call__).parameters) - {"variables"}
    assert arguments <= RESERVED
    for name in RESERVED:
        with pytest.raises(ApiError, match="cannot be set"):
            chat(chat_template_kwargs={name: ["/etc/passwd"]})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 2}, "n"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
    ],
)
def test_wrong_completions(fields, param):
    with pytest.raises(ApiError) as refused:
        read_completion(fields, LIMITS)
    assert refused.value.param == param


def test_prompts_are_texts_or_tokens():
    for value, prompts in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2]], [[1], [2]]),
    ):
        assert read_completion({"prompt": value}, LIMITS).prompts == prompts
