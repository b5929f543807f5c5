"""Asynchronous clients of a model service, well-behaved and not, and what they measure.

The clients speak HTTP by hand: each needs its own way to be slow, to leave, or to be wrong.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

KINDS = {"normal": 0.8, "slow": 0.08, "gone": 0.06, "malformed": 0.06}
# A slow client waits between pieces; one that leaves does so after a few.
SLOW_S, GONE_AFTER = 0.2, 3
TIMEOUT_S = 120.0


@dataclass
class Answer:
    """The response to one request.

    Attributes:
      status: HTTP status; 0 if the connection ended before.
      text: joined content.
      first_s: seconds to the first token, or None.
      seconds: of the request.
      tokens: completion tokens by the service's count, else pieces.
      complete: True after a finish reason and the end of the stream.
    """

    status: int = 0
    text: str = ""
    first_s: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    complete: bool = False


@dataclass
class Load:
    """Results of clients over some time.

    Attributes:
      answers: of normal and slow clients, with the index of the prompt.
      outcomes: counts by kind of client and status.
      seconds: duration.
    """

    answers: list[tuple[int, Answer]] = field(default_factory=list)
    outcomes: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: float = 0.0


async def ask(base_url: str, body: dict[str, Any], kind: str = "normal") -> Answer:
    """Send one streamed request.

    Args:
      base_url: address of the service, with `/v1`.
      body: of `/v1/chat/completions`.
      kind: one of `KINDS`.
    """
    url = urlsplit(base_url)
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    if kind == "malformed":
        content = content[: len(content) // 2]
    encoded = content.encode()
    head = (
        f"POST {url.path}/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(encoded)}\r\n\r\n"
    )
    answer, started = Answer(), time.monotonic()
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        writer.write(head.encode() + encoded)
        await writer.drain()
        status = await reader.readline()
        answer.status = int(status.split()[1])
        pieces = 0
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                break
            event = json.loads(line[6:])
            answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
            for choice in event.get("choices", ()):
                answer.complete |= choice.get("finish_reason") is not None
                if piece := (choice.get("delta") or {}).get("content"):
                    answer.text += piece
                    pieces += 1
                    answer.first_s = answer.first_s or time.monotonic() - started
            if kind == "gone" and pieces >= GONE_AFTER:
                break
            if kind == "slow":
                await asyncio.sleep(SLOW_S)
        answer.tokens = answer.tokens or pieces
    finally:
        writer.close()
    answer.seconds = time.monotonic() - started
    return answer


async def run_clients(
    base_url: str,
    bodies: Sequence[dict[str, Any]],
    clients: int,
    seconds: float,
    kinds: dict[str, float],
    seed: int,
) -> Load:
    """Run clients that each send one request after the other.

    Args:
      base_url: address of the service.
      bodies: of the requests, taken at random.
      clients: number of clients.
      seconds: duration; requests that run then are finished.
      kinds: probability of each kind of client per request.
      seed: of the order.

    Returns:
      The results.
    """
    load, started = Load(), time.monotonic()

    async def client(index: int) -> None:
        rng = random.Random(f"{seed} {index}")
        while time.monotonic() - started < seconds:
            prompt = rng.randrange(len(bodies))
            kind = rng.choices(list(kinds), list(kinds.values()))[0]
            try:
                answer = await asyncio.wait_for(ask(base_url, bodies[prompt], kind), TIMEOUT_S)
            except (OSError, TimeoutError, ValueError, IndexError):
                answer = Answer()
            load.outcomes[kind, answer.status] += 1
            if kind in ("normal", "slow"):
                load.answers.append((prompt, answer))

    await asyncio.gather(*(client(index) for index in range(clients)))
    load.seconds = time.monotonic() - started
    return load


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
