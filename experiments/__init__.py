"""Scripts and benchmarks built on glm_edge."""
