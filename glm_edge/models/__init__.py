"""Pure Linen modules, one architecture a file."""
