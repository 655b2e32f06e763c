"""Benchmarks against references: python -m experiments.benchmarks.NAME [--json]."""
