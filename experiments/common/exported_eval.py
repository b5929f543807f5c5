"""Evaluation of an exported file by running it: the last row of the quickstart's table."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import glm_edge as ge
from experiments.common import tap_eval, tap_items
from glm_edge.cli import corpora
from glm_edge.cli.console import bar
from glm_edge.cli.loss import WINDOW

DECODE_STEPS = 40
VERIFY_WINDOWS = 6
VERIFY_ITEMS = 24


def prefill_lengths(context: int) -> tuple[int, ...]:
    """Return the prefill lengths: one for prompts, one for complete windows of text."""
    return tuple(sorted({min(128, context), min(WINDOW, context)}))


def cache_slots(context: int) -> int:
    """Return the number of cache slots for a window of text, or a prompt with its answer."""
    return min(WINDOW + 32, context)


def answers(phone: Any, tokenizer: Any, items: Sequence[tap_items.Item], label: str) -> list[str]:
    """Generate the file's greedy answer to each item, one at a time as on a phone."""
    texts = []
    for item in bar(label)(items):
        generated = phone.generate(
            **tap_items.prompt(item, phone.config, tokenizer), max_new_tokens=12
        )
        texts.append(tap_eval.answer_text(tokenizer, np.asarray(generated), phone.config))
    return texts


def verification_windows(
    config: Any,
    tokenizer: Any,
    windows: corpora.Windows,
    items: Sequence[tap_items.Item],
    texts: Sequence[str],
) -> list[Any]:
    """Collect windows for the verification of a file: held-out text, and answers to questions.

    Only the coordinates of an answer count, since the grammar forces its other tokens.
    """
    chosen = [
        ge.export.Window(tokens, prompt_length=len(tokens) // 2)
        for tokens in windows.tokens[:VERIFY_WINDOWS]
    ]
    for item, text in zip(items[:VERIFY_ITEMS], texts[:VERIFY_ITEMS], strict=True):
        content = tap_items.prompt(item, config, tokenizer)
        answer = tokenizer.encode(text).ids
        length = len(content["tokens"])
        tokens = np.array([*content["tokens"], *answer], np.int32)
        predicted = [tokenizer.id_to_token(i) or "" for i in answer]
        counted = np.zeros(len(tokens), bool)
        counted[length - 1 : -1] = [token.strip("[],").isdigit() for token in predicted]
        chosen.append(ge.export.Window(tokens, content["image"], content["audio"], counted, length))
    return chosen


def decode_latency_ms(phone: Any) -> float:
    """Measure the median milliseconds of one decoding step of the file after a prompt."""
    slots = phone.cache_slots
    tokens = np.zeros(slots - DECODE_STEPS, np.int32)
    _, cache = phone.extend(phone.embed(tokens), 0, phone.empty_cache())
    seconds = []
    for slot in range(len(tokens), slots):
        start = time.perf_counter()
        embedded = phone.run("embed", tokens=np.zeros((1, 1), np.int32))["embeddings"][0]
        _, cache = phone.extend(embedded, slot, cache)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[5:]))
