"""Export to Hugging Face directories in the format of compressed-tensors."""
