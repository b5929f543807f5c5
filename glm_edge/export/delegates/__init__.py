"""Rules by which delegates accept operators of a `.tflite` file."""
