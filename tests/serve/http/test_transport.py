"""Bodies, responses and clients that leave, without a network."""

import asyncio
import json

import pytest

from glm_edge.errors import ConfigError
from glm_edge.serve.http.errors import ApiError, server_error
from glm_edge.serve.http.limits import Budget, Limits, Reservation
from glm_edge.serve.http.transport import ClientGoneError, Reply, read_body, until_disconnect


def receiver(*messages, forever=False):
    queue = list(messages)

    async def receive():
        if not queue and forever:
            await asyncio.Event().wait()
        return queue.pop(0)

    return receive


def part(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


def body_of(receive, headers=None, **limits):
    budget = Budget(1000)
    reservation = Reservation(budget)
    coroutine = read_body(headers or {}, receive, Limits(**limits), reservation)
    return asyncio.run(coroutine), budget


def test_a_body_in_parts_is_counted():
    raw, budget = body_of(receiver(part(b"ab"), part(b"cd", more=False)))
    assert (raw, budget.used) == (b"abcd", 4)


def test_a_body_that_is_too_large_too_slow_or_gone():
    with pytest.raises(ApiError) as refused:
        body_of(receiver(part(b"x" * 11)), body_bytes=10)
    assert refused.value.status == 413
    with pytest.raises(ApiError) as refused:
        body_of(receiver(), {b"content-length": b"11"}, body_bytes=10)
    assert refused.value.status == 413
    with pytest.raises(ApiError) as refused:
        body_of(receiver(part(b"x"), forever=True), body_s=0.05)
    assert refused.value.status == 408
    with pytest.raises(ApiError) as refused:
        body_of(receiver(part(b"x" * 2000)))
    assert (refused.value.status, refused.value.code) == (429, "memory_full")
    with pytest.raises(ClientGoneError):
        body_of(receiver(part(b"x"), GONE))


def test_reservations_return_what_they_took():
    budget = Budget(100)
    first, second = Reservation(budget), Reservation(budget)
    first.resize(80)
    with pytest.raises(ApiError):
        second.resize(21)
    first.resize(10)
    second.resize(90)
    first.release()
    second.release()
    first.release()
    assert budget.used == 0


def test_limits_are_positive():
    with pytest.raises(ConfigError, match="body_bytes"):
        Limits(body_bytes=0)


class Sent(list):
    async def __call__(self, message):
        self.append(message)


def test_work_is_cancelled_when_the_client_leaves():
    cleaned = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    async def leave():
        with pytest.raises(ClientGoneError):
            await until_disconnect(receiver(GONE), work(), Reply(Sent()))

    asyncio.run(leave())
    assert cleaned == [True]


def test_a_client_may_leave_after_the_response():
    done = []

    async def scenario():
        reply = Reply(Sent())
        await reply.json({})

        async def finish():
            await asyncio.sleep(0.05)
            done.append(True)

        await until_disconnect(receiver(GONE), finish(), reply)

    asyncio.run(scenario())
    assert done == [True]


def test_an_error_is_the_response_or_the_last_event():
    async def scenario():
        response, streamed, ended = Sent(), Sent(), Sent()
        await Reply(response).fail(ApiError("no", status=429, headers={"retry-after": "1"}))
        reply = Reply(streamed)
        await reply.stream()
        await reply.events({"a": "é"})
        await reply.fail(server_error("broken"))
        reply = Reply(ended)
        await reply.json({})
        await reply.fail(server_error("late"))
        return response, streamed, ended

    response, streamed, ended = asyncio.run(scenario())
    assert response[0]["status"] == 429
    assert (b"retry-after", b"1") in response[0]["headers"]
    assert json.loads(response[1]["body"])["error"]["message"] == "no"
    assert streamed[1]["body"] == 'data: {"a":"é"}\n\n'.encode()
    assert b"broken" in streamed[-1]["body"]
    assert not streamed[-1]["more_body"]
    assert len(ended) == 2


def test_a_client_that_does_not_read_is_gone():
    async def stuck(message):
        await asyncio.Event().wait()

    with pytest.raises(ClientGoneError):
        asyncio.run(Reply(stuck, write_s=0.05).json({}))
