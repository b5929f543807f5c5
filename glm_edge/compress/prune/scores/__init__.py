"""Scores: how much a weight, a neuron, a head or a layer matters."""
