"""Benchmarks; see bench/README.md for how to run them."""
