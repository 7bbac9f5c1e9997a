"""The process that a `Worker` asks. Its argument is the descriptor of a pipe; it answers until that is closed."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from typing import Any

from .worker import Handler


def serve(connection: Connection) -> None:
    """Answer requests until the other end is closed, or one raises."""
    handle: Handler | None = None
    while True:
        try:
            request = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if handle is None:
                handle, answer = request(), None
            else:
                answer = handle(*request)
        except Exception as error:
            _send(connection, (False, f"it raised {_innermost(error)}"))
            os._exit(1)  # not by way of destructors, which hang in a poisoned GPU context
        _send(connection, (True, answer))


def _send(connection: Connection, message: tuple[bool, Any]) -> None:
    """Send, if anybody is there still."""
    try:
        connection.send(message)
    except OSError:
        os._exit(1)


def _innermost(error: BaseException) -> str:
    """What went wrong in the first place, in one line: compilers wrap it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-1000:]}"


def main() -> None:
    serve(Connection(int(sys.argv[1])))
