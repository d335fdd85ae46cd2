"""The checks: run them with ``python -m tests``."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The checkout."""
TIMEOUT = 300
"""Seconds after which what takes a few, on a machine that does nothing else, counts as hung."""
