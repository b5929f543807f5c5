"""Layer-wise compression: stages of a model, the runner over them, and streaming."""
