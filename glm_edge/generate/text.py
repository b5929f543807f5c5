"""Generated tokens as text: complete characters only, without stop strings."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm_edge.errors import ConfigError, DataError
from glm_edge.generate.decoding import stop_ids, stream
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.preprocess.processor import Processor
from glm_edge.preprocess.tokens import decode

_REPLACEMENT = "\ufffd"
_UNFINISHED = 3


class TextStream:
    """A stream of tokens as pieces of text that can be shown at once.

    A piece never ends inside a character whose other bytes are still to come, nor with what may be
    the beginning of a stop string. The pieces, joined, are the text of all tokens up to the first
    stop string.

    Attributes:
      stopped: True once a stop string was found; later tokens give no text.
    """

    def __init__(
        self, tokenizer: Any, stop_strings: Sequence[str] = (), skip_special_tokens: bool = True
    ):
        """Starts an empty text.

        Args:
          tokenizer: a `tokenizers.Tokenizer`.
          stop_strings: texts that end the text and are not part of it.
          skip_special_tokens: leave special tokens out of the text.

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
        """Adds a token.

        Args:
          token: its id.

        Returns:
          The text that has become certain, often empty.
        """
        if self.stopped:
            return ""
        self._recent.append(int(token))
        before, text = self._decoded()
        # An unfinished character, of at most three bytes, decodes to as many replacements at most.
        end = len(text)
        while end > len(text) - _UNFINISHED and text[:end].endswith(_REPLACEMENT):
            end -= 1
        piece = text[before + self._shown : end]
        self._shown += len(piece)
        if piece and end == len(text):
            self._context, self._recent, self._shown = self._recent, [], 0
        return self._certain(piece)

    def finish(self) -> str:
        """Returns the text held back so far, as no token follows."""
        if self.stopped:
            return ""
        before, text = self._decoded()
        piece = self._certain(text[before + self._shown :]) + (
            "" if self.stopped else self._pending
        )
        self._recent, self._shown, self._pending = [], 0, ""
        return piece

    def _decoded(self) -> tuple[int, str]:
        """Decodes the recent tokens after some earlier ones, and finds where their text begins.

        Decoders treat the first token of a text in their own way, hence the tokens before.
        """

        def text(ids: list[int]) -> str:
            return decode(self._tokenizer, ids, self._skip_special_tokens)

        return len(text(self._context)), text(self._context + self._recent)

    def _certain(self, piece: str) -> str:
        """Cuts at a stop string, and withholds a possible beginning of one."""
        text = self._pending + piece
        cuts = [(at + len(s), at) for s in self._stop_strings if (at := text.find(s)) >= 0]
        if cuts:
            # The first to be complete, so that the cut does not depend on how tokens part the text.
            self.stopped, self._pending = True, ""
            return text[: min(cuts)[1]]
        pending = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._pending = text[len(text) - pending :]
        return text[: len(text) - pending]


def _overlap(text: str, stop: str) -> int:
    """Measures the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    model: MultimodalGLM,
    params: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    skip_special_tokens: bool = True,
    **options: Any,
) -> Iterator[str]:
    """Continues one prompt and yields the text as it becomes certain.

    Args:
      model: the model.
      params: its parameters, boxed or not.
      tokenizer: a `tokenizers.Tokenizer`.
      prompt: token ids.
      stop_strings: texts that end the answer and are not part of it.
      stop_tokens: token ids that end it; None takes those of the model's configuration.
      skip_special_tokens: leave special tokens out of the text.
      **options: of `glm_edge.generate.stream`, such as `images`, `sampling`, `max_new_tokens`.

    Yields:
      Pieces of text, none empty.

    Raises:
      ConfigError: a stop string is empty.
      DataError: the prompt holds no token ids, or does not fit the model.
    """
    _check_tokens(tokenizer, prompt)
    stops = stop_ids(model, stop_tokens)
    text = TextStream(tokenizer, stop_strings, skip_special_tokens)
    for (token,) in stream(model, params, [prompt], stop_tokens=stop_tokens, **options):
        if token in stops:
            break
        if piece := text.push(token):
            yield piece
        if text.stopped:
            return
    if piece := text.finish():
        yield piece


def _check_tokens(tokenizer: Any, prompt: Any) -> None:
    chat = "glm_edge.chat(model, params, processor, messages) answers conversations"
    if isinstance(tokenizer, Processor):
        raise DataError(f"tokenizer is a Processor; pass its .tokenizer; {chat}")
    parts = prompt if isinstance(prompt, list | tuple) else [prompt]
    if any(isinstance(part, str | Mapping | list | tuple) for part in parts):
        raise DataError(f"prompt must be token ids, such as tokenizer.encode(text).ids; {chat}")


def generate_text(
    model: MultimodalGLM, params: Any, tokenizer: Any, prompt: Sequence[int], **options: Any
) -> str:
    """Continues one prompt.

    Args:
      model: the model.
      params: its parameters, boxed or not.
      tokenizer: a `tokenizers.Tokenizer`.
      prompt: token ids.
      **options: of `stream_text`.

    Returns:
      The text, up to a stop token or stop string, or of `max_new_tokens` tokens.

    Raises:
      ConfigError: a stop string is empty.
      DataError: the prompt holds no token ids, or does not fit the model.
    """
    return "".join(stream_text(model, params, tokenizer, prompt, **options))
