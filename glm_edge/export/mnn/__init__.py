"""Export to directories of MNN graphs, and reading them."""
