"""Parts of `experiments.bench_pruning`: rows, how each is carried out, speed, the table."""
