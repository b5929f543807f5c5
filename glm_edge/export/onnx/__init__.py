"""Export to directories of ONNX graphs, and readers of these directories."""
