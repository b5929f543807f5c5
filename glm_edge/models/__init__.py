"""Pure Linen modules, one architecture per file."""
