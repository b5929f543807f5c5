"""Removing units from arrays, configurations and tokenizers."""
