"""Code that several scripts share: evaluation data, figures, provenance."""
