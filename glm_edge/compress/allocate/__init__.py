"""Bit allocation: one format per group of weights within a budget of bytes."""
