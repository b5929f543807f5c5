"""Text: nano's tokenizer."""
