"""`/v1/chat/completions` and its neighbours on an engine whose answers are known."""

import json

import numpy as np
import pytest
from starlette.testclient import TestClient

from glm_edge.preprocess.chat import family_template
from glm_edge.preprocess.processor import Processor
from glm_edge.serve import Engine
from glm_edge.serve.http import Limits, Service, create_app
from tests.serve.http.fakes import ScriptedBackend, events

ACTION = 'do(action="Tap", element=[435,715])'
THOUGHT = f"<think>the key is there</think><answer>{ACTION}</answer>"


def chunks(response):
    *values, last = events(response.text)
    assert last == "[DONE]"
    return [json.loads(value) for value in values]


def contents(values):
    deltas = [choice["delta"] for value in values for choice in value["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_an_answer(ask, backend):
    backend.say("all is well")
    response = ask(max_tokens=50)
    body = response.json()
    assert response.status_code == 200
    assert (body["object"], body["model"]) == ("chat.completion", "nano")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "all is well", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"], choice["index"]) == ("stop", None, 0)
    usage = body["usage"]
    assert usage["completion_tokens"] == len(backend.script)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["text_tokens"] == usage["prompt_tokens"]


def test_chunks_of_a_stream(ask, backend):
    backend.say("all is well")
    options = {"include_usage": True}
    response = ask(stream=True, stream_options=options)
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *pieces, end, usage = chunks(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert contents(pieces) == "all is well"
    assert all(piece["choices"][0]["finish_reason"] is None for piece in pieces)
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(backend.script)
    assert all(value["usage"] is None for value in (first, *pieces, end))
    assert len({value["id"] for value in (first, *pieces, end, usage)}) == 1
    assert {value["object"] for value in (first, *pieces)} == {"chat.completion.chunk"}
    assert all("usage" not in value for value in chunks(ask(stream=True)))


def test_usage_in_every_chunk(ask, backend):
    backend.say("all is well")
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, *pieces, _, _ = chunks(ask(stream=True, stream_options=options))
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == len(backend.script)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens(ask, backend, name):
    backend.say("one two three four five six")
    body = ask(**{name: 3}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3


def test_more_tokens_than_the_context_end_at_its_end(client, backend):
    backend.script = [40] * 100
    prompt = [50] * (backend.capacity - 12) + [backend.assistant]
    body = {"prompt": prompt, "max_tokens": 3000, "temperature": 0}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == backend.capacity


def test_thoughts_stay_inline_for_open_autoglm(ask, backend):
    backend.say(THOUGHT)
    assert ask().json()["choices"][0]["message"]["content"] == "the key is there" + ACTION
    streamed = contents(chunks(ask(stream=True)))
    assert streamed == "the key is there" + ACTION


def test_thoughts_apart_on_request(ask, backend):
    backend.say(THOUGHT)
    extra = {"enable_thinking": True, "return_reasoning": True}
    message = ask(**extra).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (ACTION, "the key is there")
    deltas = [value["choices"][0]["delta"] for value in chunks(ask(stream=True, **extra))]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "the key is there"
    assert "reasoning_content" not in ask(return_reasoning=False).json()["choices"][0]["message"]


def test_stop_strings_end_both_kinds_of_answer(ask, backend):
    backend.say("the quick brown fox jumps")
    for fields in ({"stop": "brown"}, {"stop": ["x", "brown"]}):
        body = ask(**fields).json()
        assert body["choices"][0]["message"]["content"] == "the quick "
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] < len(backend.script)
        assert contents(chunks(ask(stream=True, **fields))) == "the quick "


def test_stop_tokens(ask, backend):
    backend.say("the quick brown")
    token = backend.script[-1]
    assert (
        ask(stop_token_ids=[token]).json()["usage"]["completion_tokens"] == len(backend.script) - 1
    )
    body = ask(ignore_eos=True, max_tokens=30).json()
    assert body["usage"]["completion_tokens"] == 30


def test_several_answers(ask, backend):
    backend.say("yes")
    body = ask(n=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 3 * len(backend.script)
    single = ask().json()["usage"]["prompt_tokens"]
    assert body["usage"]["prompt_tokens"] == single
    values = chunks(ask(n=3, stream=True))
    ends = [c["index"] for v in values for c in v["choices"] if c["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


def test_logprobs_spell_the_content(ask, backend):
    backend.say("the quick brown fox")
    choice = ask(logprobs=True, top_logprobs=3, stop=["wn f"]).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert (
        "".join(token["token"] for token in tokens)
        == "the quick bro"
        == choice["message"]["content"]
    )
    assert all(len(token["top_logprobs"]) == 3 for token in tokens)
    assert all(token["logprob"] <= 0 and isinstance(token["bytes"], list) for token in tokens)
    streamed = [
        token["token"]
        for value in chunks(ask(logprobs=True, stream=True))
        for choice in value["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(streamed) == "the quick brown fox"


def test_a_bias_bans_a_token(ask, backend):
    backend.say("the quick brown")
    first = backend.script[0]
    answer = ask(logit_bias={str(first): -100}).json()["choices"][0]["message"]
    assert not answer["content"].startswith("the")
    assert ask(logit_bias={"9999999": 1}).json()["error"]["param"] == "logit_bias"


def test_a_prediction_is_verified(ask, backend):
    backend.say("the quick brown fox jumps over the lazy dog")
    prediction = {"type": "content", "content": "the quick brown fox jumps over the lazy cat"}
    body = ask(prediction=prediction).json()
    assert body["choices"][0]["message"]["content"].endswith("lazy dog")
    details = body["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 0


def test_early_exit_needs_exits(ask):
    response = ask(early_exit=0.9)
    assert (response.status_code, "no exits" in response.text) == (400, True)


def test_a_constraint_is_enforced(ask, backend):
    pytest.importorskip("llguidance")
    backend.say("something else altogether")
    body = ask(regex="(yes|no)!").json()
    assert body["choices"][0]["message"]["content"] in ("yes!", "no!")
    logprobs = ask(regex="(yes|no)!", logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in logprobs) in ("yes!", "no!")
    assert ask(regex="(").status_code == 400


def test_special_tokens_in_a_users_text_are_text(ask, backend, processor):
    backend.say("ok")
    plain = ask("<|assistant|><|endoftext|>").json()
    # The script counts from the last assistant token, so it would be off.
    assert plain["choices"][0]["message"]["content"] == "ok"
    assert plain["usage"]["prompt_tokens"] > 6


def test_a_cached_prompt_is_counted(ask, backend):
    backend.say("ok")
    text = "a long question " * 20
    ask(text)
    usage = ask(text).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32


def test_completions(client, backend):
    body = {"prompt": ["<|assistant|>", [3, 40]], "max_tokens": 4, "temperature": 0, "echo": True}
    backend.say("the quick brown fox")
    answer = client.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    first, second = answer["choices"]
    assert first["text"].startswith("<|assistant|>")
    assert second["finish_reason"] == "length"
    streamed = client.post("/v1/completions", json={**body, "stream": True, "echo": False})
    values = chunks(streamed)
    texts = [
        "".join(c["text"] for v in values for c in v["choices"] if c["index"] == i) for i in (0, 1)
    ]
    assert [texts[0], texts[1]] == [
        first["text"].removeprefix("<|assistant|>"),
        second["text"][-len(texts[1]) :],
    ]
    outside = client.post("/v1/completions", json={"prompt": [5000]})
    assert (outside.status_code, outside.json()["error"]["param"]) == (400, "prompt")


def test_names_of_models(client, ask, backend):
    backend.say("ok")
    assert ask(model="alias").json()["model"] == "alias"
    missing = ask(model="gpt-4")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["nano", "alias"]
    assert client.get("/v1/models/alias").json()["object"] == "model"
    assert client.get("/v1/models/gpt-4").status_code == 404


def test_a_prompt_that_is_too_long(ask):
    response = ask("word " * 5000)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "messages"


def test_statuses_without_a_body_worth_reading(client):
    post = client.post
    assert post("/v1/chat/completions", content=b"{}").status_code == 415
    kind = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b'{"a":1,"a":2}', b"\xff", b"[" * 5000, b"NaN"):
        response = post("/v1/chat/completions", content=content, headers=kind)
        assert response.status_code == 400, content
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/nothing").json()["error"]["message"]


def test_a_key(scripted_engine, processor):
    app = create_app(Service(scripted_engine, processor, api_key="secret"))
    client = TestClient(app)
    for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
        response = client.get("/v1/models", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.post("/v1/completions", json={}, headers=headers).status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_a_body_over_the_limit(scripted_engine, processor):
    limits = Limits(body_bytes=1000)
    client = TestClient(create_app(Service(scripted_engine, processor, limits=limits)))
    response = client.post("/v1/completions", json={"prompt": "x" * 2000})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")


def test_memory_that_requests_share(scripted_engine, processor):
    service = Service(scripted_engine, processor, limits=Limits(memory_bytes=500))
    client = TestClient(create_app(service))
    response = client.post("/v1/completions", json={"prompt": "x" * 1000})
    assert response.status_code == 429
    assert "retry-after" in response.headers
    assert service.budget.used == 0


def test_a_full_queue_and_a_closed_engine(processor):
    backend = ScriptedBackend(processor.tokenizer, num_slots=1)
    engine = Engine(backend, queue_size=1)
    client = TestClient(create_app(Service(engine, processor)))
    body = {"prompt": "x", "n": 2, "max_tokens": 1}
    response = client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert response.headers["retry-after"] == "1"
    engine.close()
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
    assert client.get("/health").status_code == 503


def test_health_waits_for_the_engine(processor):
    engine = Engine(ScriptedBackend(processor.tokenizer))
    client = TestClient(create_app(Service(engine, processor), health_s=0.05))
    # The engine's thread does not run.
    assert client.get("/health").json()["error"]["code"] == "engine_stuck"
    assert client.get("/v1/models").status_code == 200
    engine.start()
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    engine.close()


def test_a_failed_request_is_no_answer(ask, backend, monkeypatch):
    def broken(slot, length):
        return np.full(backend.config.decoder.vocab_size, np.nan, np.float32)

    monkeypatch.setattr(backend, "scores", broken)
    assert ask("nan").status_code == 500
    *_, last = events(ask("nan", stream=True).text)
    assert json.loads(last)["error"]["type"] == "server_error"


def test_metrics(client, ask, backend):
    backend.say("ok")
    ask()
    ask(unknown=1)
    text = client.get("/metrics").text
    assert 'glm_edge_requests_total{endpoint="chat",status="200"}' in text
    assert 'glm_edge_requests_total{endpoint="chat",status="400"}' in text
    for name in ("time_to_first_token_seconds_count", "steps_total", "running_requests"):
        assert f"glm_edge_{name}" in text


NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "tap", "parameters": NOTHING}},
    {"type": "function", "function": {"name": "say", "parameters": NOTHING}},
]


@pytest.fixture(scope="module")
def caller(scripted_engine, processor):
    """A client of a model whose template has tools."""
    with_tools = Processor(
        processor.tokenizer, family_template("glm_4"), stop_token_ids=processor.stop_token_ids
    )
    return TestClient(create_app(Service(scripted_engine, with_tools)))


def call(client, **fields):
    body = {"messages": [{"role": "user", "content": "go"}], "temperature": 0, "tools": TOOLS}
    return client.post("/v1/chat/completions", json={**body, **fields})


def test_a_tool_call(caller, backend):
    backend.say('tap\n{"x": 3}')
    choice = call(caller).json()["choices"][0]
    (made,) = choice["message"]["tool_calls"]
    assert (made["type"], made["function"]) == (
        "function",
        {"name": "tap", "arguments": '{"x": 3}'},
    )
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    values = chunks(call(caller, stream=True))
    deltas = [v["choices"][0]["delta"] for v in values]
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert {part["index"] for part in parts} == {0}
    assert parts[0]["function"]["name"] == "tap"
    assert parts[0]["id"].startswith("call_")
    assert "".join(part["function"]["arguments"] for part in parts) == '{"x": 3}'
    assert values[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_are_offered_and_not_forced(caller, backend):
    backend.say("I need none.")
    choice = call(caller).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I need none.", "stop")
    backend.say("tap\n{}")
    choice = call(caller, tool_choice="none").json()["choices"][0]
    assert choice["message"]["content"] == "tap\n{}"


def test_a_required_call(caller, backend):
    pytest.importorskip("llguidance")
    backend.say("I need none.")
    for choice in ("required", {"type": "function", "function": {"name": "say"}}):
        body = call(caller, tool_choice=choice, max_tokens=400).json()["choices"][0]
        (made,) = body["message"]["tool_calls"]
        assert made["function"]["name"] in ("tap", "say")
        assert isinstance(json.loads(made["function"]["arguments"]), dict)
        assert body["finish_reason"] == "tool_calls"
    assert made["function"]["name"] == "say"


def test_a_model_without_tools_refuses_them(client):
    response = call(client)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
