"""Trains nano's tokenizer on a text file and writes `tokenizer.json`.

    python -m experiments.nano.make_tokenizer --text=wt103_train_head.txt --out_dir=build

The same text and version of `tokenizers` produce the same bytes; compare the printed SHA-256. The
shipped `glm_edge/assets/nano/tokenizer.json` was trained on the head of WikiText-103's training
text. A checkpoint works only with the tokenizer of its training.
"""

import hashlib
import sys
from pathlib import Path

from absl import flags

from experiments.nano.text import tokenizer as nano_tokenizer
from glm_edge.cli.console import launch, refuse_arguments
from glm_edge.cli.corpora import encode_text, read_text, write_text
from glm_edge.errors import GlmEdgeError

TEXT = flags.DEFINE_string(
    "text", None, "UTF-8 training text; 3 MB of plain English is enough.", required=True
)
OUT_DIR = flags.DEFINE_string(
    "out_dir", None, "Output directory of tokenizer.json, created if missing.", required=True
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing tokenizer.json.")


def main(argv: list[str]) -> None:
    """Train and write the tokenizer, and print its size."""
    refuse_arguments(argv)
    try:
        text = read_text(TEXT.value)
        tokenizer = nano_tokenizer.build(text.splitlines(keepends=True))
        path = Path(OUT_DIR.value) / "tokenizer.json"
        content = nano_tokenizer.to_json(tokenizer)
        write_text(path, content, OVERWRITE.value)
    except GlmEdgeError as error:
        sys.exit(f"error: {error}")
    ids = encode_text(tokenizer, text)
    print(f"{path}: {tokenizer.get_vocab_size()} ids, {len(content.encode())} bytes")
    print(f"sha256 {hashlib.sha256(content.encode()).hexdigest()}")
    print(f"{len(ids)} tokens, {len(text.encode()) / len(ids):.3f} bytes per token of its text")
    for name in (*nano_tokenizer.SPECIALS, *nano_tokenizer.ACTION_LITERALS, "[5,", "5]"):
        print(f"{tokenizer.token_to_id(name):6d}  {name}")


if __name__ == "__main__":
    launch(main)
