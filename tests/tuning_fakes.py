"""Compilers and runners for the tests of the search: candidates that do what the tests want, in real processes.

A candidate is a CastConfig, whose `num_warps` says what it does. They are called by name, so they stand in a module.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mxkernels.tune import CastConfig, Problem
from mxkernels.tune.limits import Footprint

GOOD, CRASHES, HANGS, WRONG, RAISES, SPILLS, FAILS_LATER, HANGS_LATER = 1, 2, 3, 4, 5, 6, 7, 8


def config(us: int, does: int = GOOD) -> CastConfig:
    """A candidate that takes so many microseconds."""
    return CastConfig(1, us, does)


def problem(number: int = 0) -> Problem:
    return Problem("quantize", "e2m1 1x32 rtne even symmetric", "bfloat16", "rows", (4096, 4096 + 32 * number))


def compiler(
    misbehaves: tuple[int, ...] = (), log: str | None = None, seconds: float = 0.0
) -> Callable[..., Footprint]:
    """Compiles; of what `misbehaves`, only with trouble. Each call is a line in the file `log`, and takes so many
    `seconds`."""
    return partial(_compile, misbehaves, log, seconds)


def _compile(
    misbehaves: tuple[int, ...], log: str | None, seconds: float, problem: Problem, config: CastConfig
) -> Footprint:
    time.sleep(seconds)
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {config.tile_cols}\n")
    if config.num_warps in misbehaves:
        _misbehave(config)
    return Footprint(16 if config.num_warps == SPILLS else 0, 32, 0, 1000)


def runner(
    noise_us: float = 0.0, opens: bool = True, log: str | None = None, seconds: float = 0.0
) -> Callable[..., Any]:
    """Runs candidates; `noise_us` is by how much every other sample takes longer. Each request is a line in the file
    `log`: what it is, the process, and the candidate, if it is of one; and takes so many `seconds`."""
    return partial(_run, noise_us, opens, log, seconds)


def _run(
    noise_us: float, opens: bool, log: str | None, seconds: float, request: str, problem: Problem, *arguments: Any
) -> Any:
    time.sleep(seconds)
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{request} {os.getpid()} {arguments[0] if arguments else ''}\n")
    if request == "open":
        if not opens:
            raise MemoryError("there is no memory for the operands")
        return 10.0
    config = arguments[0]
    if request == "check":
        return _misbehave(config)
    if config.num_warps == FAILS_LATER:
        os._exit(139)
    if config.num_warps == HANGS_LATER:
        time.sleep(3600)
    return tuple(config.tile_cols + noise_us * (sample % 2) for sample in range(arguments[1]))


def opens_once() -> Callable[..., Any]:
    """A runner for which a problem's operands fit once."""
    opened: list[Problem] = []

    def handle(request: str, problem: Problem, *arguments: Any) -> Any:
        if request == "open":
            if problem in opened:
                raise MemoryError("there is no memory for the operands")
            opened.append(problem)
        return _run(0.0, True, None, 0.0, request, problem, *arguments)

    return handle


def _misbehave(config: CastConfig) -> str | None:
    if config.num_warps == CRASHES:
        os._exit(139)
    if config.num_warps == HANGS:
        time.sleep(3600)
    if config.num_warps == RAISES:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return "12 bytes differ" if config.num_warps == WRONG else None


def echo() -> Callable[..., Any]:
    """A handler for the tests of the worker itself."""
    return _echo


def _echo(what: str, *arguments: Any) -> Any:
    if what == "pid":
        return os.getpid()
    if what == "exit":
        os._exit(arguments[0])
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(arguments[0])
    if what == "environment":
        return os.environ.get(arguments[0])
    if what == "raise":
        try:
            raise ValueError("the first cause")
        except ValueError as error:
            raise RuntimeError("what wraps it") from error
    if what == "raise in lines":
        raise MemoryError("there is no memory\n  Tried to allocate  64 GiB\n")
    return arguments


def cannot_start() -> Callable[..., Any]:
    raise RuntimeError("there is no GPU")


# --- the real ones, as far as a machine without a GPU has them -------------------------------------------------


def interpreter(device: object, limits: object) -> Callable[..., Any]:
    """Runs launches in Triton's interpreter, whatever device they are meant for."""
    import torch

    from mxkernels.tune.limits import Limits
    from mxkernels.tuner import Runner

    return Runner(torch.device("cpu"), Limits("cpu"))


def counting_compiler(limits: object) -> Callable[..., Footprint]:
    return compiler()


def instant_runner(device: object, limits: object) -> Callable[..., Any]:
    """Of 100 us; of 80 with tiles of two rows."""
    return _instant


def runner_without_memory(device: object, limits: object) -> Callable[..., Any]:
    return runner(opens=False)


def runner_with_little_memory(device: object, limits: object) -> Callable[..., Any]:
    """It has none for matrices of more than 512 columns."""
    return _small


def _small(request: str, problem: Problem, *arguments: Any) -> Any:
    if problem.shape[1] > 512:
        raise MemoryError("there is no memory for the operands")
    return _instant(request, problem, *arguments)


def runner_of_tall_tiles(device: object, limits: object) -> Callable[..., Any]:
    """For which tiles of one row are wrong."""
    return _tall


def _tall(request: str, problem: Problem, *arguments: Any) -> Any:
    if request == "check" and arguments[0].tile_rows == 1:
        return "12 bytes differ"
    return _instant(request, problem, *arguments)


def _instant(request: str, problem: Problem, *arguments: Any) -> Any:
    if request == "open":
        return 50.0
    if request == "check":
        return None
    return (80.0 if arguments[0].tile_rows == 2 else 100.0,) * arguments[1]
