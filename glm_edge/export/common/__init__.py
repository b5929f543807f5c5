"""Code that all formats share: signatures, weights, jaxpr rewrites, directories."""
