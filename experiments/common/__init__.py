"""Pieces that several scripts share: evaluation data, figures, provenance."""
