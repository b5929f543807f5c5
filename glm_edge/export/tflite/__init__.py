"""Export to `.tflite` files, and reading them."""
