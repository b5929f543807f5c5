"""Training of the shipped checkpoint: batches, objectives, stages."""
