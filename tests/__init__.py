"""The checks: run them with ``python -m tests``."""

TIMEOUT = 300
"""Seconds after which what takes a few, on a machine that does nothing else, counts as hung."""
