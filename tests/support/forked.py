"""Calls in a forked process, whose crash is an error here.

The process that forks must not have run torch on several threads: a fork has none of them.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback

from .. import TIMEOUT


class Failed(AssertionError):
    """A call in the forked process failed, or the process died."""


class Forked:
    """An object in a process of its own: ``make()`` is called there, and so are its methods."""

    def __init__(self, make):
        self._ours, theirs = multiprocessing.Pipe()
        self._stack = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by close()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._ours.close()
            _serve(make, theirs, self._stack)
        theirs.close()

    def call(self, method: str, *args, **kwargs):
        """Call a method; raise Failed if it raised or the process died."""
        try:
            self._ours.send((method, args, kwargs))
            if not self._ours.poll(TIMEOUT):
                os.kill(self._pid, signal.SIGABRT)  # which prints where it is
                raise Failed(f"{method} did not return within {TIMEOUT} s: {self._death()}")
            ok, result = self._ours.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise Failed(f"the process died in {method}: {self._death()}") from None
        if not ok:
            raise Failed(result)
        return result

    def _death(self) -> str:
        _, status = os.waitpid(self._pid, 0)
        self._pid = None
        self._stack.seek(0)
        code = os.waitstatus_to_exitcode(status)
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        stack = self._stack.read().partition(__file__)[0]  # down to _serve
        return f"{reason}\n{stack.rpartition(chr(10))[0]}"

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = None
        self._stack.close()


def _serve(make, connection, stack) -> None:
    """Answer calls until the other end is closed; never returns."""
    faulthandler.enable(stack, all_threads=False)
    own = None
    while True:
        try:
            method, args, kwargs = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            own = make() if own is None else own
            answer = True, getattr(own, method)(*args, **kwargs)
        except Failed as error:
            answer = False, str(error)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)
