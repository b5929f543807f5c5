"""Export to `.tflite` files, and readers of these files."""
