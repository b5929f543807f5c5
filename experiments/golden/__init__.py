"""Reference cases: outputs of models under the names of the reference implementation."""
