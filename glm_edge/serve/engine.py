"""The engine: one thread that serves many requests on the slots of a backend.

Each turn of its loop runs at most one chunk of pending tokens (prompts, forced tokens, drafts), and
then one step of all decoding requests. So a long prompt delays running answers by no more than one
chunk per token. The tokens of a request are those of `glm_edge.generate.generate` on its prompt
alone with the same seed, whatever runs beside it.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from glm_edge.errors import DataError, GlmEdgeError
from glm_edge.generate.constraint import has_token
from glm_edge.generate.row_sampling import MAX_BIASES, Drawn
from glm_edge.serve.backend import BLOCK, Backend, ready_prompt
from glm_edge.serve.draws import Draws
from glm_edge.serve.features import FeatureCache
from glm_edge.serve.prefix_cache import PrefixCache
from glm_edge.serve.pruning import pruned_prompt
from glm_edge.serve.requests import Event, Handle, Request
from glm_edge.serve.slots import Task
from glm_edge.serve.waiting import WaitingTasks


class ClosedError(GlmEdgeError):
    """Raised when a request is submitted to an engine that is closing or has failed."""


class ContextLengthError(DataError):
    """Raised when a prompt leaves no room for an answer."""


@dataclass
class Counters:
    """Totals since the start, for metrics.

    Attributes:
      steps: steps of all slots.
      chunks: calls of `extend`.
      prompt_tokens: tokens of prompts that were computed.
      cached_tokens: tokens of prompts whose rows were reused.
      generated_tokens: delivered tokens.
      preemptions: interrupted requests.
    """

    steps: int = 0
    chunks: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


class Engine:
    """Continuous batching of requests on a backend.

        engine = Engine(JaxBackend(model, params))
        engine.start()
        tokens, end = engine.submit(Request(inputs=processor(messages))).result()
        engine.close()

    Attributes:
      backend: what runs the model.
      counters: totals, for metrics.
      prefix_cache: rows of earlier prompts.
    """

    def __init__(
        self,
        backend: Backend,
        cache_bytes: int = 1 << 28,
        feature_bytes: int = 1 << 27,
        queue_size: int = 1000,
    ):
        """Prepare the engine; `start` runs it.

        Args:
          backend: what runs the model.
          cache_bytes: limit of the prefix cache.
          feature_bytes: limit of kept features of images and recordings.
          queue_size: requests that may wait.

        Raises:
          DataError: a limit is negative.
        """
        self.backend = backend
        self.counters = Counters()
        self.prefix_cache = PrefixCache(cache_bytes, backend.block_bytes())
        self._features = FeatureCache(backend, feature_bytes, self._notify)
        self._tasks: list[Task | None] = [None] * backend.num_slots
        self._draws = Draws(backend)
        self._turn = 0
        self._order = 0
        # Shared with other threads, under the lock.
        self._changed = threading.Condition()
        self._waiting = WaitingTasks(
            queue_size, backend.num_slots, self._features, self.prefix_cache, self._changed
        )
        self._pings: list[Future[None]] = []
        self._closing = self._abort = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="glm-edge-engine", daemon=True)

    def warm_up(self) -> None:
        """Compile what requests can need, before `start`."""
        self.backend.warm_up()
        self._draws.warm_up(self.backend.row_counts)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request, deliver: Callable[[Event], Any] | None = None) -> Handle:
        """Queue a request.

        Args:
          request: the request.
          deliver: called with each event on the engine's thread, and must return at once; None
            keeps the events for iteration over the handle.

        Returns:
          The handle.

        Raises:
          DataError: the request does not fit the model.
          ContextLengthError: the prompt leaves no room for an answer.
          QueueFullError: too many requests wait.
          ClosedError: the engine is closing or has failed.
        """
        config, capacity = self.backend.config, self.backend.capacity
        if request.max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be positive, got {request.max_new_tokens}")
        if len(request.sampling.logit_bias) > MAX_BIASES:
            raise DataError(f"logit_bias has more than {MAX_BIASES} tokens")
        if request.exit_threshold is not None and self.backend.exits is None:
            raise DataError("this service has no exits for early exit")
        if request.vision_tokens is not None and request.vision_tokens.layer:
            raise DataError("a service prunes vision tokens before the first layer only: layer=0")
        count = int(request.inputs.valid.sum())
        if count >= capacity:
            raise ContextLengthError(
                f"the prompt has {count} tokens; the context of {capacity} leaves no room for an "
                "answer"
            )
        prompt = ready_prompt(config, request.inputs, capacity)
        handle = Handle(request, deliver)
        with self._changed:
            self._refuse_if_closed()
            self._order += 1
            self._waiting.push(Task(handle, prompt, self._order, capacity))
            self._changed.notify()
        return handle

    def ping(self) -> "Future[None]":
        """Return a future that the loop completes in its next turn: the test of its health."""
        future: Future[None] = Future()
        with self._changed:
            self._refuse_if_closed()
            self._pings.append(future)
            self._changed.notify()
        return future

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests with a slot."""
        return sum(task is not None for task in self._tasks)

    def close(self, timeout: float = 0.0) -> None:
        """Refuse new requests, finish the others within a time, and end the thread.

        Args:
          timeout: seconds for running and waiting requests; those left then end as "cancelled".
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is None:
            self._end_all()
            return
        self._thread.join(timeout)
        with self._changed:
            self._abort = True
            self._changed.notify()
        self._thread.join()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    def _refuse_if_closed(self) -> None:
        if self._failure is not None:
            raise ClosedError(f"the engine has failed: {self._failure}")
        if self._closing:
            raise ClosedError("the engine is shutting down")

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn_once()
        except Exception as error:
            logging.exception("the engine has failed")
            self._failure = f"{type(error).__name__}: {error}"
        finally:
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Answer pings, and wait until there is something to do; False ends the loop."""
        with self._changed:
            while True:
                pings, self._pings = self._pings, []
                for ping in pings:
                    # False for one whose client has left.
                    if ping.set_running_or_notify_cancel():
                        ping.set_result(None)
                busy = self._waiting or self.running
                if self._abort or (self._closing and not busy):
                    return False
                if self.running or (self._waiting and not self._waiting.stalled):
                    return True
                self._changed.wait()

    def _turn_once(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._force()
        extended = self._extend_pending()
        self._step(extended)

    def _end_all(self) -> None:
        with self._changed:
            self._closing = True
            for ping in self._pings:
                if ping.set_running_or_notify_cancel():
                    ping.set_exception(ClosedError("the engine has stopped"))
        self._features.close()
        reason = "cancelled" if self._failure is None else "error"
        for task in (*self._tasks, *self._waiting.take(lambda task: True)):
            if task is not None:
                task.finish(reason, self._failure)
        self._tasks = [None] * len(self._tasks)

    def _drop_cancelled(self) -> None:
        for slot, task in enumerate(self._tasks):
            if task is not None and task.handle.cancelled:
                self._finish(slot, "cancelled")
        for task in self._waiting.take(lambda task: task.handle.cancelled):
            task.finish("cancelled")

    def _admit(self) -> None:
        """Give free slots to waiting requests, and slots of less urgent ones to more urgent."""
        for task in self._waiting.startable():
            slot = self._free_slot(task)
            if slot is None:
                return
            self._waiting.remove(task)
            try:
                self._occupy(slot, task)
            except GlmEdgeError as error:
                self._tasks[slot] = None
                task.finish("error", str(error))

    def _task(self, slot: int) -> Task:
        task = self._tasks[slot]
        assert task is not None
        return task

    def _free_slot(self, task: Task) -> int | None:
        """Return a free slot, interrupting a request of a lower priority if there is none."""
        if None in self._tasks:
            return self._tasks.index(None)
        running = [(other.urgency, slot) for slot, other in enumerate(self._tasks) if other]
        urgency, slot = max(running)
        if urgency[0] <= task.request.priority:
            return None
        other = self._task(slot)
        starts = range(0, other.rows, BLOCK)
        other.saved = [self.backend.copy_out(slot, start) for start in starts]
        other.text = other.text.copy()
        other.usage.preemptions += 1
        self.counters.preemptions += 1
        self._tasks[slot] = None
        self._waiting.put_back(other)
        return slot

    def _occupy(self, slot: int, task: Task) -> None:
        """Bring the rows that exist to a slot, and the request's rules."""
        if task.saved is not None:
            saved, task.saved = task.saved, None
        else:
            if task.request.vision_tokens is not None:
                assert task.features is not None
                encoded = [task.features[media.key] for media in task.prompt.media]
                task.begin_with(pruned_prompt(task.prompt, encoded, task.request.vision_tokens))
                dropped = sum(media.count - len(media.places) for media in task.prompt.media)
                task.usage.dropped_image_tokens = dropped
            keys = task.reusable_keys
            saved = self.prefix_cache.acquire(keys)
            task.rows = task.usage.cached_tokens = len(saved) * BLOCK
            self.counters.cached_tokens += task.rows
            self.prefix_cache.release(keys[: len(saved)])
        for index, rows in enumerate(saved):
            self.backend.copy_in(slot, index * BLOCK, rows)
        self._tasks[slot] = task
        self._draws.occupy(slot, task)

    def _force(self) -> None:
        """Append the tokens that constraints leave no choice about."""
        for slot, task in enumerate(self._tasks):
            if task is None or task.matcher is None or not (task.decoding or not task.rows):
                continue
            try:
                self._force_on(slot, task)
            except GlmEdgeError as error:
                self._finish(slot, "error", str(error))

    def _force_on(self, slot: int, task: Task) -> None:
        assert task.matcher is not None
        for token in task.matcher.forced():
            if token in task.stop_tokens:
                break
            task.append(token)
            task.usage.forced_tokens += 1
            self.counters.generated_tokens += 1
            task.deliver_token(token, forced=True)
            if task.length >= task.limit:
                self._finish(slot, "length")
                return
        # A grammar may exceed its limits at any point. That must not fail in a step of all slots.
        task.matcher.allowed()
        if task.must_stop():
            # Behind the last free token nothing needs to run.
            self._finish(slot, "stop")

    def _extend_pending(self) -> set[int]:
        """Run pending tokens of several requests, together at most one chunk.

        Returns:
          Slots that drew a token; they wait for the next turn.
        """
        budget, extended = self.backend.chunk, set()
        count = len(self._tasks)
        self._turn += 1
        for slot in sorted(range(count), key=lambda slot: (slot + self._turn) % count):
            task = self._tasks[slot]
            if task is None or budget <= 0:
                continue
            try:
                drafted = task.draft(self.backend.scored - 1) if task.decoding else []
                if task.decoding and not drafted:
                    continue
                extended.add(slot)
                if drafted:
                    budget -= self.backend.scored
                    self._verify(slot, task, drafted)
                else:
                    budget -= self._extend(slot, task, budget)
            except GlmEdgeError as error:
                self._finish(slot, "error", str(error))
        return extended

    def _extend(self, slot: int, task: Task, budget: int) -> int:
        """Run the next pending tokens of a request; draw a token after the last."""
        count = min(task.pending, budget)
        start, end = task.rows, task.rows + count
        scores = self.backend.extend(
            slot,
            start,
            task.text[start:end],
            task.positions(start, end),
            *self._features.of_tokens(task.prompt, task.features or {}, start, end),
            False,
        )
        self.counters.chunks += 1
        self.counters.prompt_tokens += max(0, min(end, task.prompt_length) - start)
        task.rows = end
        if start < task.prompt_length <= end:
            task.features = {}
            # At once, so that requests with the same prompt need not wait for the answer.
            self._store(slot, task.keys)
        if end == task.length:
            drawn = self._draws.after_beginnings(task, scores, [task.length], [task.matcher])
            self._take(slot, task, drawn, 0)
        return count

    def _verify(self, slot: int, task: Task, drafted: list[int]) -> None:
        """Run the newest token and a draft at once; keep the draft as far as it is drawn too."""
        matchers, matcher = [task.matcher], task.matcher
        if matcher is not None:
            for index, token in enumerate(drafted):
                if not has_token(matcher.allowed(), token):
                    drafted = drafted[:index]
                    break
                matcher = matcher.copy()
                matcher.accept(token)
                matchers.append(matcher)
        else:
            matchers *= len(drafted) + 1
        start, end = task.rows, task.rows + 1 + len(drafted)
        task.text[task.length : task.length + len(drafted)] = drafted
        tokens, positions = task.text[start:end], task.positions(start, end)
        nowhere = np.zeros(len(tokens), bool)
        scores = self.backend.extend(slot, start, tokens, positions, None, nowhere, True)
        self.counters.chunks += 1
        lengths = list(range(task.length, task.length + len(drafted) + 1))
        drawn = self._draws.after_beginnings(task, scores, lengths, matchers)
        tokens, accepted = np.asarray(drawn.tokens), 0
        for index in range(len(lengths)):
            agrees = index < len(drafted) and int(tokens[index]) == drafted[index]
            # The row of the token before the one that is drawn.
            task.rows = start + index + 1
            accepted += agrees
            self._take(slot, task, drawn, index)
            if self._tasks[slot] is not task or not agrees:
                break
        task.usage.accepted_draft_tokens += accepted
        task.usage.rejected_draft_tokens += len(drafted) - accepted

    def _step(self, extended: set[int]) -> None:
        """Feed the newest token of every decoding request, and draw the next."""
        decoding = [
            slot
            for slot, task in enumerate(self._tasks)
            if task is not None and task.decoding and slot not in extended
        ]
        if not decoding:
            return
        slots = len(self._tasks)
        tokens, lengths, positions = (np.zeros(slots, np.int32) for _ in range(3))
        for slot, task in enumerate(self._tasks):
            if task is None:
                continue
            # A row that is not decoding writes where its next pending token will.
            lengths[slot] = task.rows
            if slot in decoding:
                tokens[slot] = task.text[task.rows]
                positions[slot] = task.position(task.rows)
        arguments = tokens, lengths, positions, decoding[-1] + 1
        thresholds = self._thresholds(decoding)
        if thresholds is None:
            scores = self.backend.step(*arguments)
        else:
            scores, layers = self.backend.step_until_sure(*arguments, thresholds)
            for slot, used in zip(decoding, np.asarray(layers)[decoding], strict=True):
                total = self.backend.config.decoder.num_layers
                self._task(slot).usage.skipped_layers += total - int(used)
        drawn = self._draws.step(scores, {slot: self._task(slot) for slot in decoding})
        self.counters.steps += 1
        for slot in decoding:
            task = self._task(slot)
            task.rows += 1
            self._take(slot, task, drawn, slot)

    def _thresholds(self, decoding: list[int]) -> np.ndarray | None:
        """Return the thresholds of early exit per slot, or None if no request has one."""
        thresholds = np.full(len(self._tasks), -1, np.float32)
        wanted = False
        for slot in decoding:
            threshold = self._task(slot).request.exit_threshold
            wanted = wanted or threshold is not None
            thresholds[slot] = 2 if threshold is None else threshold
        return thresholds if wanted else None

    def _take(self, slot: int, task: Task, drawn: Drawn, row: int) -> None:
        """Append a drawn token and deliver it, or end the request."""
        if not drawn.finite[row]:
            self._finish(slot, "error", "the model's scores are NaN or infinite")
            return
        token = int(drawn.tokens[row])
        if token in task.stop_tokens:
            self._finish(slot, "stop")
            return
        facts: dict[str, Any] = {}
        if task.request.logprobs:
            pairs = zip(drawn.top_tokens[row], drawn.top_logprobs[row], strict=True)
            facts["logprob"] = float(drawn.logprobs[row])
            facts["top"] = tuple((int(other), float(value)) for other, value in pairs)
        try:
            task.append(token)
        except GlmEdgeError as error:
            self._finish(slot, "error", str(error))
            return
        self.counters.generated_tokens += 1
        task.deliver_token(token, **facts)
        if task.length >= task.limit:
            self._finish(slot, "length")

    def _finish(self, slot: int, reason: str, error: str | None = None) -> None:
        task = self._task(slot)
        if error is None and task.rows >= BLOCK:
            self._store(slot, task.written_keys())
        self._tasks[slot] = None
        task.finish(reason, error)

    def _store(self, slot: int, keys: list[bytes]) -> None:
        """Copy the blocks of a text that are not stored yet to the prefix cache."""
        for index in range(self.prefix_cache.missing(keys), len(keys)):
            rows = self.backend.copy_out(slot, index * BLOCK)
            if not self.prefix_cache.store(keys, index, rows):
                return
