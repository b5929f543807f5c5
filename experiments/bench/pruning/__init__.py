"""Parts of `experiments.bench.pruning`: rows, their execution, speed, the table."""
