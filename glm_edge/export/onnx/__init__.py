"""Export to directories of ONNX graphs, and reading them."""
