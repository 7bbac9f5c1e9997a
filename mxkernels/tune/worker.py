"""A process of its own that answers requests, for what may crash, hang, or poison what comes after it.

Its other end is `worker_process`. It does not import the main module of the process that starts it, so that a script
that tunes needs no guard.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

# What the process runs. Interrupts are its parent's affair, which then ends it: they are blocked, then ignored.
_CODE = """import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from mxkernels.tune.worker_process import main
main()"""
START_S = 180.0  # to import what handles requests, and to reach the GPU

Handler = Callable[..., Any]


class Failure(Exception):
    """What became of a request that was not answered; one sentence."""


class Worker:
    """Asks a process, which is made for the first request and made anew after each that it did not answer.

    Args:
        make: called in the process, once; it returns what handles the requests. It and its arguments are pickled,
            functions by name.
        environment: variables that the process has beside this one's; None takes one away.
    """

    def __init__(self, make: Callable[[], Handler], environment: dict[str, str | None] | None = None) -> None:
        self.generation = 0  # of processes: what one of them remembered, the next has not
        self._make = make
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready = False

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    def ask(self, *request: Any, seconds: float) -> Any:
        """What the handler returns for `request`.

        Raises:
            Failure: it raised an exception, did not answer in so many `seconds`, or its process ended. The process
                is then ended: a GPU's context may be of no more use.
        """
        self.wait()
        assert self._connection is not None
        try:
            self._connection.send(request)
        except OSError:
            raise self._lost() from None
        return self._answer(seconds)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Make the process, if there is none, without waiting for it: a request to come finds it ready."""
        if self._process is not None:
            return
        self.generation += 1
        self._ready = False
        self._connection, far_end = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        for name, value in self._environment.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        with far_end:
            descriptor = far_end.fileno()
            command = [sys.executable, "-c", _CODE, str(descriptor)]
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=[descriptor], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._connection.send(self._make)

    def wait(self) -> None:
        """Make the process, if there is none, and wait until it answers requests.

        Raises:
            Failure: it does not come to that.
        """
        self.start()
        if not self._ready:
            self._answer(START_S)
            self._ready = True

    def _answer(self, seconds: float) -> Any:
        assert self._connection is not None
        try:
            if not self._connection.poll(seconds):
                self.close()
                raise Failure(f"it hung: there was no answer in {seconds:g} s")
            answered, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if answered:
            return value
        self.close()
        raise Failure(value)

    def _lost(self) -> Failure:
        """The process ended by itself, or was ended by another."""
        assert self._process is not None
        code = self._process.wait()
        self.close()
        how = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return Failure(f"it crashed: its process ended with {how}")
