"""Export to bundles for LiteRT-LM, and their verification."""
