"""Nano's tokenizer: byte-level BPE with chat tokens, action literals and coordinate tokens.

Ids, in this order: `SPECIALS`, the 256 bytes, merges, `ACTION_LITERALS`, the x tokens `[5,` to
`[995,`, the y tokens `5]` to `995]`. Every string is encoded without loss. The literals shorten
actions: `do(action="Tap", element=[505,715])` is four tokens.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from glm_edge.errors import CheckpointError, DataError
from glm_edge.preprocess.tokenizer_files import read_tokenizer

VOCAB_SIZE = 2304
COORDINATES = tuple(range(5, 1000, 10))
SPECIALS = (
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|image|>",
    "<|end_of_image|>",
    "<|begin_of_audio|>",
    "<|audio|>",
    "<|end_of_audio|>",
    "<|pad|>",
)
ACTION_LITERALS = (
    'do(action="Tap", element=',
    'do(action="Back")',
    'do(action="Swipe", start=',
    ", end=",
    'do(action="Type", text="',
    'finish(message="',
)
X_TOKENS = tuple(f"[{x}," for x in COORDINATES)
Y_TOKENS = tuple(f"{y}]" for y in COORDINATES)

VERBS = (
    "tap", "open", "press", "click", "touch", "select", "hit", "choose", "find", "show", "scroll",
    "swipe", "type", "enter", "write", "go", "please",
)  # fmt: skip
NAMES = (
    "settings", "camera", "phone", "messages", "mail", "music", "maps", "clock", "calendar",
    "photos", "wifi", "bluetooth", "battery", "sound", "search", "home", "star", "heart", "lock",
    "cart", "cloud", "flag", "user", "play", "pause", "stop", "bell", "key", "sun", "moon",
    "folder", "trash", "download", "upload", "share", "edit", "plus", "minus", "check", "menu",
    "arrow", "gift", "book", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
    "nine",
)  # fmt: skip
OTHER_WORDS = (
    "red", "green", "blue", "yellow", "orange", "purple", "pink", "white", "black", "gray",
    "square", "circle", "round", "button", "icon", "key", "row", "digit", "number", "word", "item",
    "list", "screen", "page", "back", "up", "down", "left", "right", "top", "bottom", "to", "the",
    "on", "with", "say", "done", "finish", "finished", "text", "message",
)  # fmt: skip
PHRASE_WEIGHT = 250


def instruction_phrases() -> Iterator[str]:
    """Yield training sentences, in a fixed order, that make instruction words single tokens."""
    for word in (*NAMES, *OTHER_WORDS, *VERBS):
        yield f"tap {word}"
    for word in (*NAMES, "done"):
        yield word
    for verb in VERBS:
        yield f"{verb} the"
        yield f"{verb.capitalize()} the"
    for end in (")", '")', '"'):
        yield f"5{end}"


def build(lines: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train the tokenizer; the result is deterministic.

    Args:
      lines: training text.
      vocab_size: total number of ids, including added tokens.

    Returns:
      The tokenizer with exactly `vocab_size` ids.

    Raises:
      DataError: the text has too few distinct pairs for the vocabulary.

    References:
      Sennrich et al., Neural Machine Translation of Rare Words with Subword Units (2016).
    """
    added = (*ACTION_LITERALS, *X_TOKENS, *Y_TOKENS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sentences() -> Iterator[str]:
        yield from lines
        for _ in range(PHRASE_WEIGHT):
            yield from instruction_phrases()

    tokenizer.train_from_iterator(sentences(), trainer)
    literals = (*ACTION_LITERALS, *X_TOKENS)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in literals])
    # single_word keeps the number of `1915]` in one piece; an x token cannot use it, as a digit
    # follows.
    tokenizer.add_tokens([AddedToken(y, normalized=False, single_word=True) for y in Y_TOKENS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"training text: yields {tokenizer.get_vocab_size()} ids, expected {vocab_size}; use "
            "a longer text"
        )
    return tokenizer


def to_json(tokenizer: Tokenizer) -> str:
    """Write a tokenizer as compact JSON that `Tokenizer.from_str` reads."""
    fields = json.loads(tokenizer.to_str())
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n"


def load(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Args:
      path: path of the file.

    Returns:
      The tokenizer.

    Raises:
      DataError: the file is missing or is not a tokenizer.
    """
    try:
        return read_tokenizer(path)
    except CheckpointError as error:
        raise DataError(f"{error}; see make_tokenizer") from error
