"""Workers: what answers, crashes, hangs, raises, or is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tuning_fakes as fakes

from mxkernels.tune.worker import Failure, Worker

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes are inherited by descriptor")


def test_it_answers_from_a_process_of_its_own() -> None:
    with Worker(fakes.echo) as worker:
        assert worker.process_id is None
        assert worker.ask("same", 1, "two", seconds=60) == (1, "two")
        assert worker.ask("pid", seconds=60) == worker.process_id != os.getpid()


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (("exit", 139), "it crashed: its process ended with exit status 139"),
        (("kill",), "it crashed: its process ended with signal 9, SIGKILL"),
        (("sleep", 3600), "it hung: there was no answer in 5 s"),
        (("raise",), "it raised ValueError: the first cause"),
        (("raise in lines",), "it raised MemoryError: there is no memory Tried to allocate 64 GiB$"),
    ],
    ids=["exits", "is killed", "hangs", "raises", "raises in lines"],
)
def test_what_fails_costs_one_request(request_: tuple[object, ...], says: str) -> None:
    with Worker(fakes.echo) as worker:
        before = worker.ask("pid", seconds=60)
        with pytest.raises(Failure, match=says):
            worker.ask(*request_, seconds=5)
        with pytest.raises(ProcessLookupError):  # it is gone, whatever it did
            os.kill(before, 0)
        assert worker.process_id is None
        assert worker.ask("pid", seconds=60) != before
        assert worker.generation == 2


def test_killed_from_outside() -> None:
    with Worker(fakes.echo) as worker:
        victim = worker.ask("pid", seconds=60)
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
        start = time.monotonic()
        with pytest.raises(Failure, match="SIGKILL"):
            worker.ask("sleep", 3600, seconds=60)
        assert time.monotonic() - start < 30
        assert worker.ask("same", 1, seconds=60) == (1,)


def test_killed_between_two_requests() -> None:
    with Worker(fakes.echo) as worker:
        os.kill(worker.ask("pid", seconds=60), signal.SIGKILL)
        with pytest.raises(Failure, match="SIGKILL"):
            worker.ask("same", seconds=60)
        assert worker.ask("same", 1, seconds=60) == (1,)


def test_an_interrupt_is_its_parents_affair() -> None:
    """From the first on, before it can have said that it ignores them."""
    with Worker(fakes.echo) as worker:
        worker.start()
        assert worker.process_id is not None
        os.kill(worker.process_id, signal.SIGINT)
        assert worker.ask("pid", seconds=60) == worker.process_id
        assert worker.generation == 1


ABANDONS = """
import os, threading, time
import tuning_fakes as fakes
from mxkernels.tune.worker import Worker
worker = Worker(fakes.echo)
worker.wait()
threading.Thread(target=worker.ask, args=("sleep", 1.0), kwargs={"seconds": 60}, daemon=True).start()
time.sleep(0.2)
os._exit(3)
"""


def test_whose_parent_is_gone_ends_without_a_word() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", ABANDONS], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")  # read until the worker has closed its end too


def test_a_handler_that_cannot_be_made() -> None:
    with Worker(fakes.cannot_start) as worker, pytest.raises(Failure, match="RuntimeError: there is no GPU"):
        worker.ask("same", seconds=60)


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKEN_AWAY", "1")
    with Worker(fakes.echo, {"TAKEN_AWAY": None, "GIVEN": "2"}) as worker:
        assert worker.ask("environment", "TAKEN_AWAY", seconds=60) is None
        assert worker.ask("environment", "GIVEN", seconds=60) == "2"


def test_the_process_ends_with_its_worker() -> None:
    with Worker(fakes.echo) as worker:
        process_id = worker.ask("pid", seconds=60)
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)
