"""Run Python code and the command in processes of their own, also in a terminal."""

import contextlib
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from tests import TIMEOUT


def command(*arguments):
    """Return the command line of ``spectral_kernels`` with arguments of any type."""
    return [sys.executable, "-m", "spectral_kernels", *map(str, arguments)]


def run(code, *arguments, **variables):
    """Run Python code in a process of its own; return that with its output.

    ``arguments`` are those of the program, ``variables`` are added to its environment.
    """
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env={**os.environ, **variables},
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip


def run_without(package, *arguments):
    """Run ``spectral_kernels`` with the arguments as if a package were not installed."""
    return run(
        f"import sys; sys.modules[{package!r}] = None; from spectral_kernels.cli import main;"
        f"sys.exit(main({[*map(str, arguments)]!r}))"
    )


def interrupted(arguments, when):
    """Run ``spectral_kernels`` in a terminal and press Ctrl-C once its output matches ``when``.

    Returns its output and the number of its process group.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
        # SIGINT is ignored where the tests run in the background of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    shown, sent = b"", False
    # Linux reports the end of a pseudo-terminal as an error.
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 4096):
            shown += piece
            if not sent and re.search(when, shown):
                os.killpg(process.pid, signal.SIGINT)
                sent = True
    os.close(ours)
    assert process.wait(timeout=TIMEOUT) == 130, shown.decode()
    return shown, process.pid


def check_ending(shown):
    """Assert that an interrupted command restored the cursor and reported it in one line."""
    assert b"Traceback" not in shown
    hidden, visible = b"\x1b[?25l", b"\x1b[?25h"
    assert hidden in shown
    assert shown.rindex(visible) > shown.rindex(hidden)
    assert shown.endswith(b"spectral-kernels: interrupted\r\n")


def is_gone(pid):
    """Return whether a process has ended (it may be left as a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition):
    """Wait until ``condition()`` is true."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < TIMEOUT
        time.sleep(0.02)


def png_size(path):
    """Return width and height of a PNG file."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])
