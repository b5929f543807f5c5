"""Parts of `experiments.bench.pruning`: rows, how each is carried out, speed, the table."""
