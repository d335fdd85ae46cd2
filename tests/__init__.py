"""The checks: run them with ``python -m tests``."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The checkout."""
TIMEOUT = 300
"""Seconds after which something that takes a few on an idle machine counts as hung."""
