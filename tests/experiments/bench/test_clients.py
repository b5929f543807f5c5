"""Clients of a service under load, against a scripted server."""

import asyncio
import json

import pytest

from experiments.bench import clients

BODY = {"messages": [{"role": "user", "content": "tap"}]}


def events(pieces):
    """Lines of a complete stream."""
    yield {"choices": [{"delta": {"role": "assistant", "content": None}}]}
    for piece in pieces:
        yield {"choices": [{"delta": {"content": piece}, "finish_reason": None}]}
    yield {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    yield {"choices": [], "usage": {"completion_tokens": 5}}


async def respond(reader, writer, script):
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split()[0])
    body = await reader.readexactly(length)
    try:
        script["bodies"].append(json.loads(body))
    except ValueError:
        writer.write(b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": {}}\n')
    else:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for event in script["events"]:
            writer.write(f"data: {json.dumps(event)}\n\n".encode())
        writer.write(b"data: [DONE]\n\n" if script["done"] else b"")
    await writer.drain()
    writer.close()


def ask(kind="normal", pieces=("do(", "x", ")"), cut=None):
    """One request; the server sends the first `cut` events only."""
    script = {"bodies": [], "events": list(events(pieces))[:cut], "done": cut is None}

    async def run():
        server = await asyncio.start_server(lambda r, w: respond(r, w, script), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return await clients.ask(f"http://127.0.0.1:{port}/v1", BODY, kind)

    return asyncio.run(run()), script["bodies"]


def test_a_complete_answer_and_its_tokens_are_read():
    answer, bodies = ask()
    assert (answer.status, answer.text, answer.tokens, answer.complete) == (200, "do(x)", 5, True)
    assert 0 < answer.first_s <= answer.seconds
    assert bodies[0]["stream"] is True


def test_an_answer_without_its_end_is_not_complete():
    assert not ask(cut=3)[0].complete


@pytest.mark.parametrize(("kind", "text"), [("slow", "abcdef"), ("gone", "abc")])
def test_other_clients_read_slowly_or_leave(kind, text, monkeypatch):
    monkeypatch.setattr(clients, "SLOW_S", 0.001)
    answer, _ = ask(kind, pieces="abcdef")
    assert answer.text == text
    assert answer.complete == (kind == "slow")


def test_half_a_body_is_refused():
    assert ask("malformed")[0].status == 400


def test_percentiles():
    values = list(range(100))[::-1]
    assert [clients.percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [0, 50, 99, 99]
