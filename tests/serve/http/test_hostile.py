"""Malformed requests: always an answer of 4xx with one line, never 500, never a hang."""

import base64
import gc
import json
import random
from pathlib import Path

import pytest

from glm_edge.serve.http.errors import ApiError

VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1.5, 1e308, -1e308, 10**300),
    *(
        "",
        "x",
        "\x00",
        "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
        "💥" * 50,
    ),
    *("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "data:image/png;base64,AAAA"),
    *("{{ 7 * 7 }}", "{% for x in range(10**9) %}{% endfor %}", "<|endoftext|>", "((((a+)+)+)+)+$"),
    *([], {}, [[]], [{}], [None], [1, "a"], {"a": {}}, {"type": "x"}, {"type": "function"}),
]
NAMES = [
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_p", "logit_bias", "seed"),
    *("n", "stop", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "stream"),
    *("stream_options", "reasoning_effort", "service_tier", "priority", "prediction", "regex"),
    *("parallel_tool_calls", "stop_token_ids", "ignore_eos", "min_tokens", "grammar", "modalities"),
    *("structured_outputs", "chat_template_kwargs", "enable_thinking", "return_reasoning"),
    *("prompt", "echo", "suffix", "best_of", "unknown", "__proto__", "a\nb"),
]
SCHEMAS = [
    {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "string", "pattern": "(a|a)*" * 100},
    {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    {"type": "object", "properties": {str(i): {"type": "integer"} for i in range(3000)}},
    {"anyOf": [{"const": "x" * i} for i in range(500)]},
    {"type": 5},
    {"type": "string", "format": "no-such-format"},
]
REGEXES = [
    "(",
    "(?=a)",
    "(a*)*{",
    "a{1,100000}{1,100000}",
    "\\p{Nope}",
    "[",
    "(a|b|ab)*" * 500 + "\\1",
]
GRAMMARS = [
    "",
    "x: y",
    "start: start",
    "start: %json {}",
    'start: "a' + '"' * 9,
    "start: " + "(" * 900,
]


def conversation(content="hello"):
    return [{"role": "user", "content": content}]


class Attacker:
    """Draws malformed requests; equal seeds draw equal ones."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def value(self):
        return self.draw.choice(VALUES)

    def fields(self):
        """One to three parameters of any value."""
        names = self.draw.sample(NAMES, self.draw.randint(1, 3))
        return {name: self.value() for name in names}

    def message(self):
        kind = self.draw.randrange(6)
        if kind == 0:
            return self.value()
        if kind == 1:
            return {"role": self.value(), "content": self.value()}
        if kind == 2:
            return {"role": "user", "content": [self.value()]}
        if kind == 3:
            part = {"type": "image_url", "image_url": {"url": self.value()}}
            return {"role": "user", "content": [part]}
        if kind == 4:
            noise = base64.b64encode(self.draw.randbytes(self.draw.randrange(200))).decode()
            head = self.draw.choice(
                [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBPVP8 "]
            )
            url = "data:image/png;base64," + base64.b64encode(head).decode().rstrip("=") + noise
            return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        audio = {
            "data": base64.b64encode(b"RIFF" + self.draw.randbytes(60)).decode(),
            "format": "wav",
        }
        return {"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}

    def constraint(self):
        kind = self.draw.randrange(3)
        if kind == 0:
            return {"regex": self.draw.choice(REGEXES)}
        if kind == 1:
            return {"grammar": self.draw.choice(GRAMMARS)}
        schema = {"name": "x", "schema": self.draw.choice(SCHEMAS)}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}

    def text(self):
        """A body that is JSON nearly, or not at all."""
        good = json.dumps({"messages": conversation()})
        kind = self.draw.randrange(5)
        if kind == 0:
            return good[: self.draw.randrange(len(good))].encode()
        if kind == 1:
            return self.draw.randbytes(self.draw.randrange(300))
        if kind == 2:
            return ("[" * 10 ** self.draw.randrange(1, 6)).encode()
        if kind == 3:
            return ('{"a":' * 3000 + "1" + "}" * 3000).encode()
        return good.replace("hello", "\\ud800" * self.draw.randrange(1, 9)).encode()

    def request(self):
        """Return the path and the body."""
        kind = self.draw.randrange(10)
        path = "/v1/chat/completions"
        if kind < 2:
            return path, self.text()
        if kind < 5:
            body = {"messages": conversation(), **self.fields()}
        elif kind < 7:
            body = {"messages": [self.message() for _ in range(self.draw.randint(1, 3))]}
        elif kind < 9:
            body = {"messages": conversation(), "max_tokens": 8, **self.constraint()}
        else:
            path, body = "/v1/completions", {"prompt": self.value(), **self.fields()}
        return path, json.dumps(body).encode("utf-8", "surrogatepass")


def attack(client, backend, start, count):
    """Sends requests, checks each answer, and returns the statuses."""
    backend.say("ok")
    statuses = set()
    for seed in range(start, start + count):
        path, body = Attacker(seed).request()
        headers = {"content-type": "application/json"}
        response = client.post(path, content=body, headers=headers)
        statuses.add(response.status_code)
        # A drawn request may happen to be valid.
        assert response.status_code == 200 or 400 <= response.status_code < 500, (seed, body[:300])
        if response.status_code != 200:
            error = response.json()["error"]
            assert error["message"], seed
            assert "\n" not in error["message"], seed
            assert len(error["message"]) <= 2100, seed
    return statuses


def resident_bytes():
    """Returns the memory of this process after a collection."""
    gc.collect()
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc/self/status")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def test_malformed_requests(client, backend):
    assert 400 in attack(client, backend, 0, 200)
    assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_many_malformed_requests(client, backend):
    assert 400 in attack(client, backend, 200, 600)
    before = resident_bytes()
    attack(client, backend, 800, 1200)
    assert client.get("/health").status_code == 200
    # The largest drawn body has 1 MB; one that stays per request would be far more.
    assert resident_bytes() - before < 40 << 20


def test_templates_of_a_client_are_text(ask, backend):
    backend.say("ok")
    before = ask("7").json()["usage"]["prompt_tokens"]
    assert ask("{{ 7 }}").json()["usage"]["prompt_tokens"] > before


def test_messages_of_errors_have_one_line():
    message = str(ApiError("a\nb\x00\u2028c" + "x" * 10_000))
    assert message.isprintable()
    assert len(message) < 2100
