"""Suites of pytest-benchmark: what the penalty costs."""
