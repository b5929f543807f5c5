"""Rules by which delegates take operators of a `.tflite` file."""
