"""Bit allocation: a format per group of weights within a budget of bytes."""
