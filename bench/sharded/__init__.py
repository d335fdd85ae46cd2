"""Sharded weights: an estimate of the cost, an example, and deviations from whole weights."""
