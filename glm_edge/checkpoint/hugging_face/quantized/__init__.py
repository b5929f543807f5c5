"""Quantized Hugging Face directories: compressed-tensors, GPTQ and AWQ."""
