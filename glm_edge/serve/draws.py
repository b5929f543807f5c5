"""Draws of the next tokens: the rules, seeds and texts of all slots, as arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.generate.row_sampling import Drawn, RowRules, RowText, draw_rows
from glm_edge.generate.sampling import Sampling
from glm_edge.serve.backend import Backend
from glm_edge.serve.requests import Matcher
from glm_edge.serve.slots import Task

_draw = jax.jit(draw_rows)


class Draws:
    """Arrays with one row per slot.

    Args:
      backend: with the number of slots, their capacity, and the vocabulary.
    """

    def __init__(self, backend: Backend):
        slots = backend.num_slots
        self._vocabulary = backend.config.decoder.vocab_size
        words = -(-self._vocabulary // 32)
        self._everything = np.full(words, 0xFFFFFFFF, np.uint32)
        self._texts = np.zeros((slots, backend.capacity), np.int32)
        self._rules = RowRules.of([Sampling()] * slots)
        self._allowed = np.tile(self._everything, (slots, 1))
        self._seeds = np.zeros(slots, np.uint32)

    def warm_up(self, row_counts: Sequence[int]) -> None:
        """Compile the draws for numbers of rows."""
        for rows in row_counts:
            scores = jnp.zeros((rows, self._vocabulary), jnp.float32)
            ones = np.ones(rows, np.int32)
            text = RowText(
                tokens=np.zeros((rows, self._texts.shape[1]), np.int32),
                prompt_lengths=ones,
                lengths=ones,
                seeds=np.zeros(rows, np.uint32),
                allowed=np.tile(self._everything, (rows, 1)),
            )
            _draw(scores, RowRules.of([Sampling()] * rows), text, False)

    def occupy(self, slot: int, task: Task) -> None:
        """Set the row of a slot; the task's text is then a part of the array."""
        self._texts[slot] = task.text
        task.text = self._texts[slot]
        self._seeds[slot] = task.handle.seed
        row = RowRules.of([task.request.sampling])
        for field, values in vars(self._rules).items():
            values[slot] = getattr(row, field)[0]

    def step(self, scores: Any, tasks: Mapping[int, Task]) -> Drawn:
        """Draw the next tokens after a step.

        Args:
          scores: [N, V] of the first slots.
          tasks: by slot; the tokens of other slots mean nothing.

        Returns:
          Arrays of `N` rows.
        """
        rows = scores.shape[0]
        lengths, prompt_lengths = np.ones(rows, np.int32), np.ones(rows, np.int32)
        for slot, task in tasks.items():
            lengths[slot], prompt_lengths[slot] = task.length, task.prompt_length
            self._allowed[slot] = task.allowed(self._everything)
        text = RowText(
            tokens=self._texts[:rows],
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            seeds=self._seeds[:rows],
            allowed=self._allowed[:rows],
        )
        rules = jax.tree.map(lambda values: values[:rows], self._rules)
        wanted = any(task.request.logprobs for task in tasks.values())
        return jax.device_get(_draw(scores, rules, text, wanted))

    def after_beginnings(
        self,
        task: Task,
        scores: Any,
        lengths: Sequence[int],
        matchers: Sequence[Matcher | None],
    ) -> Drawn:
        """Draw the next token after several beginnings of one text.

        Args:
          task: whose text it is.
          scores: [N or more, V], after each beginning.
          lengths: tokens of the `N` beginnings.
          matchers: states of the constraint after them.

        Returns:
          Arrays of as many rows as `scores` has.
        """
        rows = scores.shape[0]
        allowed = np.tile(self._everything, (rows, 1))
        for row, (length, matcher) in enumerate(zip(lengths, matchers, strict=True)):
            allowed[row] = task.allowed(self._everything, length, matcher)
        text = RowText(
            tokens=np.tile(task.text, (rows, 1)),
            prompt_lengths=np.full(rows, task.prompt_length, np.int32),
            lengths=np.array([*lengths, *[lengths[-1]] * (rows - len(lengths))], np.int32),
            seeds=np.full(rows, task.handle.seed, np.uint32),
            allowed=allowed,
        )
        rules = RowRules.of([task.request.sampling])
        rules = jax.tree.map(lambda values: np.repeat(values, rows, axis=0), rules)
        return jax.device_get(_draw(scores, rules, text, task.request.logprobs))
