"""Constraints on generated text: masks of the tokens that may follow.

Letters of shapes: `B` rows, `V` vocabulary, `W` words of 32 bits that cover it.

    constraints = Constraints(tokenizer, stop_tokens=[0], vocab_size=2304)
    matcher = constraints.start(Grammar.regex("[0-9]{3}"))
    logits = mask_logits(logits, matcher.allowed()[None])
    matcher.accept(token)
"""

from __future__ import annotations

import collections
import json
import re
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from tokenizers import Tokenizer

from glm_edge.errors import DataError, require
from glm_edge.generate.grammar import ESCAPES, THINKING_TAGS, WHITE_SPACE, Grammar
from glm_edge.preprocess.tokenizer_files import guarded
from glm_edge.preprocess.tokens import special_tokens

MAX_GRAMMARS = 64
# States of a matcher's automaton take one to two kilobytes each.
MAX_STATES = 20_000
_END = "<|end of constrained text|>"
_SHOWN = 200
# llguidance's name for a text that no token continues, and an explanation.
_NO_TOKEN = "NoExtensionBias"
_DEAD_END = (
    "no token can follow; the grammar has a dead end, or needs text that the tokenizer cannot write"
)

# Per tokenizer: llguidance's tokenizer, and the version of the tokenizer that it was made from.
_TOKENIZERS: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class _Machine(Protocol):
    """The methods of `llguidance.LLMatcher` that a matcher calls."""

    def compute_bitmask(self) -> bytes: ...
    def compute_ff_tokens(self) -> list[int]: ...
    def consume_token(self, token: int) -> bool: ...
    def rollback(self, count: int) -> bool: ...
    def deep_copy(self) -> _Machine: ...
    def is_accepting(self) -> bool: ...
    def is_error(self) -> bool: ...
    def get_error(self) -> str: ...


class Constraints:
    """Compiled grammars for one tokenizer, safe for concurrent threads.

    Attributes:
      stop_tokens: ids that end a text.
      vocab_size: number of scores of the model.
    """

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Sequence[int], vocab_size: int) -> None:
        """Prepare the vocabulary, once per tokenizer: four seconds for 150,000 tokens.

        Args:
          tokenizer: a `tokenizers.Tokenizer`.
          stop_tokens: ids that end a text. They are never a part of it.
          vocab_size: number of scores of the model, padding included.

        Raises:
          DataError: a stop token is outside the vocabulary, or the tokenizer is of an unsupported
            kind.
          MissingExtraError: llguidance is not installed.
        """
        self.stop_tokens, self.vocab_size = tuple(map(int, stop_tokens)), vocab_size
        if outside := [token for token in self.stop_tokens if not 0 <= token < vocab_size]:
            raise DataError(f"stop_tokens: {outside[0]} is not in 0..{vocab_size - 1}")
        self._library = require("llguidance", extra="constrain")
        self._tokenizer, size = _vocabulary(self._library, tokenizer)
        special = special_tokens(tokenizer).ids
        self._tags = [special[tag] for tag in THINKING_TAGS if tag in special]
        self._stops = _bits(self.stop_tokens, vocab_size)
        self._text = _bits(range(min(size, vocab_size)), vocab_size)
        self._text &= ~(self._stops | _bits(special.values(), vocab_size))
        self._lock = threading.Lock()
        self._compiled: collections.OrderedDict[Grammar, Any] = collections.OrderedDict()

    def start(self, grammar: Grammar) -> Matcher:
        """Start a text.

        Args:
          grammar: the texts to allow. The latest 64 grammars remain compiled.

        Returns:
          The matcher of an empty text.

        Raises:
          DataError: the grammar has wrong or unsupported syntax, matches no text, or is too large.
        """
        if not isinstance(grammar, Grammar):
            raise DataError(f"grammar must be a Grammar, got {grammar!r:.60}")
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
            return compiled.copy()

    def _compile(self, grammar: Grammar) -> Matcher:
        library, text = self._library, self._text
        if grammar.kind == "phone_actions":
            special = grammar.thinking and len(self._tags) == len(THINKING_TAGS)
            source = library.LLMatcher.grammar_from_lark(grammar.to_lark(special))
            text = text | (_bits(self._tags, self.vocab_size) & ~self._stops) if special else text
        elif grammar.kind == "json_schema":
            options = {"whitespace_pattern": WHITE_SPACE, "json_allowed_escapes": ESCAPES}
            try:
                source = library.LLMatcher.grammar_from_json_schema(
                    grammar.source, overrides={**options, "lenient": False, "coerce_one_of": False}
                )
            except ValueError as error:
                raise _refused(grammar.kind, str(error)) from error
        elif grammar.kind == "regex":
            source = library.LLMatcher.grammar_from_regex(grammar.source)
        else:
            source = library.LLMatcher.grammar_from_lark(grammar.source)
        limits = library.LLParserLimits(verbose_errors=False, max_lexer_states=MAX_STATES)
        machine = library.LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if machine.is_error():
            raise _refused(grammar.kind, machine.get_error())
        if warnings := machine.get_grammar_warnings():
            raise _refused(grammar.kind, "; ".join(map(str, warnings)))
        matcher = Matcher(machine, grammar.kind, text, self._stops)
        # Grammars without any text, and those whose first step exceeds a limit.
        matcher.allowed()
        return matcher


class Matcher:
    """A text so far, and the tokens that may follow.

    One thread at a time may use a matcher.
    """

    def __init__(self, machine: _Machine, kind: str, text: np.ndarray, stops: np.ndarray) -> None:
        """Start a text; call `Constraints.start` instead.

        Args:
          machine: an `llguidance.LLMatcher`.
          kind: kind of the grammar, for messages.
          text: uint32 [W], tokens that can be a part of a text.
          stops: uint32 [W], tokens that end a text.
        """
        self._machine, self._kind, self._text, self._stops = machine, kind, text, stops
        self._accepted = self._ends = 0
        self._words: np.ndarray | None = None

    def allowed(self) -> np.ndarray:
        """Return the tokens that may follow.

        Stop tokens may follow if the text is complete. Special tokens and ids without a token never
        may.

        Returns:
          uint32 [W], one bit per token, the first in the lowest bit; not to be modified.

        Raises:
          DataError: the grammar exceeds a limit at this point, or no token can follow.
        """
        if self._words is None:
            self._words = self._stops if self._ends else self._compute()
            self._words.flags.writeable = False
        return self._words

    def _compute(self) -> np.ndarray:
        raw = np.frombuffer(self._machine.compute_bitmask(), np.uint8)
        # After an error, llguidance allows only the end, as if the text were complete.
        self._check()
        words = np.zeros_like(self._text)
        size = min(raw.size, words.nbytes)
        words.view(np.uint8)[:size] = raw[:size]
        words &= self._text
        if self._machine.is_accepting():
            words |= self._stops
        elif not words.any():
            raise _refused(self._kind, _DEAD_END)
        return words

    def forced(self) -> list[int]:
        """Return tokens of the only text that can follow.

        The tokens spell that text as the tokenizer does. `allowed` may permit others that spell it
        too.

        Returns:
          Token ids, often none. The text after them may continue in several ways or end.

        Raises:
          DataError: as `allowed`.
        """
        if self._ends or self.finished:
            return []
        tokens = self._machine.compute_ff_tokens()
        self._check()
        count = next((i for i, t in enumerate(tokens) if not has_token(self._text, t)), len(tokens))
        return tokens[:count]

    def accept(self, token: int) -> None:
        """Append a token. After a stop token, only stop tokens may follow.

        Args:
          token: an allowed token.

        Raises:
          ValueError: the token is not allowed, which is an error of the caller; the text is
            unchanged.
          DataError: the grammar exceeds a limit at this point.
        """
        if not has_token(self.allowed(), token):
            raise ValueError(f"token {token} is not allowed here")
        if has_token(self._stops, token):
            self._ends += 1
        else:
            self._machine.consume_token(int(token))
            self._check()
        self._accepted += 1
        self._words = None

    def rollback(self, count: int) -> None:
        """Remove the last tokens.

        Args:
          count: number of tokens, stop tokens included.

        Raises:
          ValueError: the text has fewer tokens.
        """
        if not 0 <= count <= self._accepted:
            raise ValueError(f"cannot remove {count} of {self._accepted} tokens")
        ends = min(count, self._ends)
        if count > ends:
            self._machine.rollback(count - ends)
            self._check()
        self._ends -= ends
        self._accepted -= count
        self._words = None

    def copy(self) -> Matcher:
        """Return a matcher of the same text, which changes independently."""
        twin = Matcher(self._machine.deep_copy(), self._kind, self._text, self._stops)
        twin._accepted, twin._ends, twin._words = self._accepted, self._ends, self._words
        return twin

    @property
    def ended(self) -> bool:
        """True after a stop token."""
        return self._ends > 0

    @property
    def finished(self) -> bool:
        """True if the text is complete and nothing but a stop token can follow."""
        return not (self.allowed() & ~self._stops).any()

    def _check(self) -> None:
        if self._machine.is_error():
            raise _refused(self._kind, self._machine.get_error())


def mask_logits(logits: ArrayLike, allowed: ArrayLike) -> Array:
    """Set the scores of tokens that may not follow to -inf.

    Args:
      logits: [B, V].
      allowed: uint32 or int32 [B, W], rows of `Matcher.allowed`.

    Returns:
      [B, V], of the type of `logits`.
    """
    logits, words = jnp.asarray(logits), jnp.asarray(allowed)
    bits = (words[..., None] >> jnp.arange(32, dtype=words.dtype)) & 1
    bits = bits.reshape(*words.shape[:-1], -1)[..., : logits.shape[-1]]
    return jnp.where(bits != 0, logits, -jnp.inf)


def allowed_tokens(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the tokens that may follow as flags, for runtimes without JAX.

    Args:
      words: uint32 or int32 [W], as `Matcher.allowed` returns them.
      vocab_size: number of scores `V` of the model.

    Returns:
      bool [V].

    Raises:
      DataError: the words are those of another number of scores.
    """
    words = np.ascontiguousarray(words)
    if words.size != -(-vocab_size // 32):
        raise DataError(
            f"the constraint is one of {32 * words.size} tokens at most, the model scores "
            f"{vocab_size}; make it with Constraints(tokenizer, stop_tokens, {vocab_size})"
        )
    flags = np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size)
    return flags.astype(bool)


def _vocabulary(library: Any, tokenizer: Tokenizer) -> tuple[Any, int]:
    """Return llguidance's tokenizer, and the number of ids of the tokenizer."""
    with _LOCK, guarded("the tokenizer cannot be used for constraints", DataError):
        version = tokenizer.get_vocab_size(), special_tokens(tokenizer).names
        made, made_of = _TOKENIZERS.get(tokenizer, (None, None))
        if made_of != version:
            # llguidance needs a token for the end and would give it a part in texts. An additional
            # one leaves all stop tokens, which may be ordinary ones, to `Matcher`.
            content = json.loads(tokenizer.to_str())
            size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
            end = {"id": size, "content": _END, "special": True, "normalized": False}
            end.update(dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
            content["added_tokens"] = [*content["added_tokens"], end]
            content.update(truncation=None, padding=None)
            made = library.LLTokenizer(json.dumps(content), eos_token=[size]), size
            _TOKENIZERS[tokenizer] = made, version
        return made


def _bits(tokens: Any, vocab_size: int) -> np.ndarray:
    """Return uint32 [W] with a bit per token; ids outside the vocabulary have none."""
    flags = np.zeros(-(-vocab_size // 32) * 32, bool)
    flags[[token for token in tokens if token < vocab_size]] = True
    return np.packbits(flags, bitorder="little").view(np.uint32)


def has_token(words: np.ndarray, token: int) -> bool:
    """Return True if the bit of a token is set.

    Args:
      words: uint32 [W], as `Matcher.allowed` returns them.
      token: its id.
    """
    return 0 <= token < 32 * words.size and bool(words[token >> 5] >> np.uint32(token & 31) & 1)


def _refused(kind: str, message: str) -> DataError:
    """Make an error of llguidance's message without its excerpt of the grammar."""
    message = re.split(r"\n\s*\d+ \| ", message.replace("<non-verbose/>", ""))[0]
    message = _DEAD_END if message.strip() == _NO_TOKEN else " ".join(message.split())
    return DataError(f"{kind}: {message if len(message) <= _SHOWN else message[:_SHOWN] + ' ...'}")
