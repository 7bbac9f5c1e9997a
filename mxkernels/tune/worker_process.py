"""The process that a `Worker` asks.

python -m mxkernels.tune.worker_process DESCRIPTOR      answers until its pipe is closed
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection

from .worker import Handler


def serve(connection: Connection) -> None:
    """Answer requests until the other end is closed, or one raises."""
    handle: Handler | None = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            if handle is None:
                handle, answer = request(), None
            else:
                answer = handle(*request)
        except Exception as error:
            connection.send((False, f"it raised {_innermost(error)}"))
            os._exit(1)  # not by way of destructors, which hang in a poisoned GPU context
        connection.send((True, answer))


def _innermost(error: BaseException) -> str:
    """What went wrong in the first place: compilers wrap it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[-1000:]}"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair, which ends this process then
    serve(Connection(int(sys.argv[1])))
