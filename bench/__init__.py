"""Throughput comparisons; see CONTRIBUTING.md for how to run them."""
