"""A process group that ends with its parent process: it watches the pipe at its input.

``python -m bench.gpu.group COMMAND...`` runs a command in such a group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading


def end_with_parent() -> None:
    """End this process group once the other end of its input is closed."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def start(command, **options) -> subprocess.Popen:
    """Start a command in a group of its own, which ends when this process does; see ``end``."""
    command = [sys.executable, "-m", "bench.gpu.group", *command]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **options)


def end(process: subprocess.Popen) -> None:
    """Kill the group of a process that has not been waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    code = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode
    sys.exit(code if code >= 0 else 128 - code)
