"""A pytest plugin that writes JSON lines: each failed test, at once, and the counts."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

from .lines import Lines

_SECONDS = 5.0  # between two writes of the counts, in case the run is killed


def pytest_configure(config):
    """Register in the process that collects all reports, not in xdist's workers."""
    if not hasattr(config, "workerinput") and "BENCH_GPU_LINES" in os.environ:
        folder = Path(os.environ["BENCH_GPU_LINES"])
        lines = Lines(folder, "tests", os.environ.get("BENCH_GPU_DRY_RUN") == "1")
        config.pluginmanager.register(_Writer(lines), "bench-gpu-writer")


class _Writer:
    def __init__(self, lines: Lines):
        self.lines, self.counts, self.written = lines, Counter(), time.monotonic()

    def pytest_runtest_logreport(self, report):
        """Count a test by its call, or by a failed or skipped setup."""
        if report.failed:
            self.counts["failed"] += 1
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash is not None else str(report.longrepr)[-300:]
            self.lines.failed("test", reason, test=report.nodeid, phase=report.when)
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        if time.monotonic() - self.written > _SECONDS:
            self._write()

    def pytest_collectreport(self, report):
        """Count a file that cannot be imported."""
        if report.failed:
            self.counts["failed"] += 1
            self.lines.failed("test", str(report.longrepr)[-300:], test=report.nodeid,
                              phase="collection")  # fmt: skip

    def pytest_sessionfinish(self):
        """Write the counts."""
        self._write()

    def _write(self):
        self.written = time.monotonic()
        for what in ("passed", "failed", "skipped"):
            self.lines.put(f"tests {what}", self.counts[what], "tests")
