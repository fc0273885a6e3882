"""Experiments and costs, each run with `python -m benchmarks.<name>`."""
