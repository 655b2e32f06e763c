"""Absl launchers: python -m experiments.NAME."""
