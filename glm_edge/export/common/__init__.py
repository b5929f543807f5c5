"""Shared by all formats: signatures, weights, rewriting of functions, directories."""
