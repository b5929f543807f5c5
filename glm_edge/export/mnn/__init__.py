"""Export to directories of MNN graphs, and readers of these directories."""
