"""Export to Core ML packages, and readers of these packages."""
