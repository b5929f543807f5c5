"""Generated tokens as text, in complete characters and without stop strings."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from glm_edge.errors import ConfigError, DataError
from glm_edge.generate.decoding import stop_ids, stream
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.preprocess.inputs import Inputs
from glm_edge.preprocess.processor import Processor
from glm_edge.preprocess.tokens import decode

_REPLACEMENT = "\ufffd"
_UNFINISHED = 3


class TextStream:
    """A stream of tokens as pieces of text that can be shown at once.

    A piece never ends inside a character, nor with a possible beginning of a stop string. Joined,
    the pieces are the text of all tokens up to the first stop string.

    Attributes:
      stopped: True after a stop string; later tokens give no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ):
        """Start an empty text.

        Args:
          tokenizer: a `tokenizers.Tokenizer`.
          stop_strings: texts that end the text and are not part of it.
          skip_special_tokens: removes special tokens from the text.

        Raises:
          ConfigError: a stop string is empty.
        """
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise ConfigError(f"stop_strings must be a list of texts, none empty: {stop_strings!r}")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._recent: list[int] = []
        self._shown = 0
        self._pending = ""

    def push(self, token: int) -> str:
        """Add a token.

        Args:
          token: its id.

        Returns:
          The text that later tokens cannot change, often empty.
        """
        if self.stopped:
            return ""
        self._recent.append(int(token))
        before, text = self._decoded()
        # An unfinished character of up to three bytes decodes to at most one replacement per byte.
        end = len(text)
        while end > len(text) - _UNFINISHED and text[:end].endswith(_REPLACEMENT):
            end -= 1
        piece = text[before + self._shown : end]
        self._shown += len(piece)
        if piece and end == len(text):
            self._context, self._recent, self._shown = self._recent, [], 0
        return self._certain(piece)

    def finish(self) -> str:
        """Return the pending text, as no token follows."""
        if self.stopped:
            return ""
        before, text = self._decoded()
        piece = self._certain(text[before + self._shown :]) + (
            "" if self.stopped else self._pending
        )
        self._recent, self._shown, self._pending = [], 0, ""
        return piece

    def _decoded(self) -> tuple[int, str]:
        """Decode the recent tokens after some earlier ones, and find where their text begins.

        Decoders treat the first token of a text differently, so earlier tokens come before.
        """

        def text(ids: list[int]) -> str:
            return decode(self._tokenizer, ids, self._skip_special_tokens)

        return len(text(self._context)), text(self._context + self._recent)

    def _certain(self, piece: str) -> str:
        """Cut at a stop string, and keeps a possible beginning of one pending."""
        text = self._pending + piece
        cuts = [(at + len(s), at) for s in self._stop_strings if (at := text.find(s)) >= 0]
        if cuts:
            # The first that is complete, so that the cut does not depend on the split into tokens.
            self.stopped, self._pending = True, ""
            return text[: min(cuts)[1]]
        pending = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._pending = text[len(text) - pending :]
        return text[: len(text) - pending]


def _overlap(text: str, stop: str) -> int:
    """Measure the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    model: MultimodalGLM,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Sequence[int] | Inputs,
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    skip_special_tokens: bool = True,
    **options: Any,
) -> Iterator[str]:
    """Continue one prompt and yield its text in pieces that can be shown at once.

    Args:
      model: the model.
      params: its parameters, boxed or not.
      tokenizer: a `tokenizers.Tokenizer`.
      prompt: token ids; or `glm_edge.preprocess.Inputs` of one row, with its images and recordings.
      stop_strings: texts that end the answer and are not part of it.
      stop_tokens: token ids that end the answer; None takes those of the model's configuration.
      skip_special_tokens: removes special tokens from the text.
      **options: further arguments of `glm_edge.generate.stream`, such as `max_new_tokens`.

    Yields:
      Pieces of text, none empty.

    Raises:
      ConfigError: a stop string is empty.
      DataError: the prompt holds no token ids or several rows, or does not fit the model.
    """
    inputs = _one_row(tokenizer, prompt)
    stops = stop_ids(model, stop_tokens)
    text = TextStream(tokenizer, stop_strings, skip_special_tokens)
    for (token,) in stream(model, params, inputs, stop_tokens=stop_tokens, **options):
        if token in stops:
            break
        if piece := text.push(token):
            yield piece
        if text.stopped:
            return
    if piece := text.finish():
        yield piece


def _one_row(tokenizer: Tokenizer, prompt: Any) -> Inputs | list[Any]:
    """Make a batch of one prompt."""
    chat = "glm_edge.chat(model, params, processor, messages) answers conversations"
    if isinstance(tokenizer, Processor):
        raise DataError(f"tokenizer is a Processor; pass its .tokenizer; {chat}")
    if isinstance(prompt, Inputs):
        if len(prompt.tokens) != 1:
            raise DataError(f"prompt must be one row, got {len(prompt.tokens)}")
        return prompt
    parts = prompt if isinstance(prompt, list | tuple) else [prompt]
    if any(isinstance(part, str | Mapping | list | tuple) for part in parts):
        raise DataError(f"prompt must be token ids, such as tokenizer.encode(text).ids; {chat}")
    return [prompt]


def generate_text(
    model: MultimodalGLM,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Sequence[int] | Inputs,
    **options: Any,
) -> str:
    """Continue one prompt and return the text.

    Args:
      model: the model.
      params: its parameters, boxed or not.
      tokenizer: a `tokenizers.Tokenizer`.
      prompt: see `stream_text`.
      **options: further arguments of `stream_text`.

    Returns:
      The text, up to a stop token or stop string, or of `max_new_tokens` tokens.

    Raises:
      ConfigError: a stop string is empty.
      DataError: the prompt holds no token ids, or does not fit the model.
    """
    return "".join(stream_text(model, params, tokenizer, prompt, **options))
