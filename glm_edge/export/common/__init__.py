"""What every exported format shares: signatures, weights, rewritten functions, directories."""
