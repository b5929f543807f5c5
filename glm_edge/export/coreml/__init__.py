"""Export to Core ML packages, and reading them."""
