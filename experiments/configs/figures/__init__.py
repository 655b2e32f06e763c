"""Configs and sweeps of the figures that `experiments.reproduce` draws, at four scales."""
