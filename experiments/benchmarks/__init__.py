"""Benchmarks that compare with references: python -m experiments.benchmarks.NAME [--json]."""
