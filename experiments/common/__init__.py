"""What several scripts share: evaluation data, figures, provenance."""
