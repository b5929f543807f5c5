"""Reference cases: what a model computes, under the names of the reference implementation."""
