"""Masks: shapes of what is masked, sparsity allocation, and the masks themselves."""
