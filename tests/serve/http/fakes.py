"""A backend without a model: every answer is a script, so that tests know each token."""

import threading
import time

import numpy as np

import glm_edge as ge
from glm_edge.configs.architecture import from_dict
from glm_edge.files import read_json
from glm_edge.serve.backend import BLOCK

NANO = ge.shipped("nano")


def nano_config():
    return from_dict(read_json(NANO / "config.json")["config"])


class ScriptedBackend:
    """Continues a text behind its last assistant token by a script, and then by the stop token."""

    def __init__(self, tokenizer, num_slots=4, capacity=2048):
        self.config = nano_config()
        self.num_slots, self.capacity, self.chunk, self.scored = num_slots, capacity, 256, 8
        self.tokenizer = tokenizer
        self.row_counts, self.exits = (1, 8, num_slots), None
        self.encodes_apart = True
        self.assistant = tokenizer.token_to_id("<|assistant|>")
        self.script = []
        self.texts = np.zeros((num_slots, capacity + 300), np.int32)
        self.steps, self.delay = 0, 0.0
        # Cleared, it stops the engine in its next step.
        self.gate = threading.Event()
        self.gate.set()

    def say(self, text):
        self.script = self.tokenizer.encode(text, add_special_tokens=False).ids

    def scores(self, slot, length):
        text = self.texts[slot, :length]
        marks = np.flatnonzero(text == self.assistant)
        count = length - 1 - (int(marks[-1]) if len(marks) else length - 1)
        token = self.script[count] if count < len(self.script) else 0
        scores = np.zeros(self.config.decoder.vocab_size, np.float32)
        scores[token] = 20.0
        return scores

    def encode(self, media):
        return np.zeros((media.count, self.config.decoder.hidden_size), np.float32)

    def extend(self, slot, start, tokens, positions, features, placed, all_scores):
        end = start + len(tokens)
        self.texts[slot, start:end] = tokens
        if not all_scores:
            return self.scores(slot, end)[None]
        lengths = np.minimum(start + 1 + np.arange(self.scored), end)
        return np.stack([self.scores(slot, length) for length in lengths])

    def step(self, tokens, lengths, positions, count):
        assert self.gate.wait(60)
        self.steps += 1
        time.sleep(self.delay)
        rows = np.zeros((self.num_slots, self.config.decoder.vocab_size), np.float32)
        for slot, (token, length) in enumerate(zip(tokens, lengths, strict=True)):
            self.texts[slot, length] = token
            rows[slot] = self.scores(slot, length + 1)
        return rows

    def copy_out(self, slot, start):
        return self.texts[slot, start : start + BLOCK].copy()

    def copy_in(self, slot, start, rows):
        self.texts[slot, start : start + BLOCK] = rows

    def block_bytes(self):
        return BLOCK * 4

    def warm_up(self):
        pass


def events(text):
    """Parse server-sent events; comments are skipped."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]
