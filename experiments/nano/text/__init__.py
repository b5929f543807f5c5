"""Text: corpora, nano's tokenizer, and the n-gram baseline."""
