"""Configs and sweeps of the figures that `experiments.reproduce` draws, at up to four scales."""
