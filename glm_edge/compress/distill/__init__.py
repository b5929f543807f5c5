"""Distillation: the training loop and what a student learns from its teacher."""
