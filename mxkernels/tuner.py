"""The tuner: finds the fastest configs for problems on the GPU at hand, and keeps them for later calls.

What a config is, where it is looked up and how candidates compete is `tune`'s affair; here are the problems, the
processes that compile and run their launches, and what becomes of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from .tune import (
    BrokenTable,
    Choice,
    Config,
    Entry,
    PairConfig,
    Problem,
    Stamp,
    cache_path,
    find_config,
    load,
    recording,
    share,
    store,
)
from .tune.limits import Footprint, Limits
from .tune.ranks import joined, one_of_many, same_stamps
from .tune.search import BREADTHS, Breadth, Progress, search, usable_cpus
from .tune.space import candidates
from .tune.task import Result, Task
from .tune.worker import Handler

T = TypeVar("T")

_CEILING_S = 0.03  # that each limit is measured


def autotune(
    what: Callable[[], object] | Problem | Iterable[Problem],
    *,
    budget: float = 60.0,
    jobs: int | None = None,
    progress: Progress | None = None,
    path: Path | None = None,
) -> list[Result]:
    """Find the fastest configs, and store them for later calls, in this process and others.

        mxkernels.autotune(lambda: train_step(model, batch))

    Args:
        what: a callable, which is run once, and every problem that it meets is tuned; or the problems.
        budget: seconds for each problem, on average; most need far fewer.
        jobs: processes that compile; None is one for each CPU that this process may use.
        progress: called with the stage ("compile" or "measure"), how much of it is done, of how much, and what is next.
        path: of a table that is written, for others, and not looked up; None is the user's cache, which is.

    Returns:
        A result for each problem: before, after, the limit, and the candidates that failed. Each is stored as soon as
        it is there.

    Raises:
        ValueError: there is no GPU, or `what` met no problem.
        tune.TableError: the table cannot be written, or what is at `path` is none.
        RuntimeError: this process was launched as one of many, and has not joined them yet; or not all of these have
            the same GPU, Triton and kernels.

    In a job of many processes all call it: each runs `what`, the first tunes all that any of them met, and all use
    what is in its cache then. What one of them raises, all raise: the others as a RuntimeError that names it.
    """

    def prepare() -> list[Problem]:
        if not 0 < budget < float("inf"):
            raise ValueError(f"budget is {budget}; allowed: seconds above 0")
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs is {jobs}; allowed: 1 and more, or None")
        tuning_device()
        return problems_of(what)

    def find(problems: list[Problem]) -> list[Result]:
        if not problems and callable(what):
            raise ValueError("what met no problem: it ran no op of this library on a GPU")
        return tune_problems(problems, tuning_device(), budget=budget, jobs=jobs, progress=progress, path=path)

    if not one_of_many():
        return find(prepare())
    if not joined():
        raise RuntimeError(
            "WORLD_SIZE says that this process is one of many, but it has not joined them; "
            "allowed: after torch.distributed.init_process_group"
        )
    return _with_all_ranks(prepare, find)


def tuning_device() -> torch.device:
    """The current GPU.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU, and configs are found by measuring; `mxkernels tune --dry-run` needs none")
    return torch.device("cuda", torch.cuda.current_device())


def problems_of(what: Callable[[], object] | Problem | Iterable[Problem]) -> list[Problem]:
    """The problems, one for each key: the largest, where several share a config."""
    if isinstance(what, Problem):
        return [what]
    if callable(what):
        with recording() as met:
            what()
        what = list(met)
    by_key: dict[str, Problem] = {}
    for problem in what:
        if not isinstance(problem, Problem):
            raise TypeError(f"what has a {type(problem).__name__}; allowed: a callable, a Problem, or several of them")
        if min(problem.shape) == 0:
            continue  # nothing is launched
        known = by_key.setdefault(problem.key, problem)
        if problem.shape > known.shape:
            by_key[problem.key] = problem
    return list(by_key.values())


def tune_problems(
    problems: Sequence[Problem],
    device: torch.device,
    *,
    budget: float,
    jobs: int | None = None,
    progress: Progress | None = None,
    path: Path | None = None,
    breadths: Sequence[Breadth] = BREADTHS,
    found: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """`autotune` of problems, in this process alone; `found` is called with each result before it is stored, and again
    if a wider search has another."""
    if not problems:
        return []
    limits = Limits.of(device)
    if path is not None:
        load(path)  # what somebody named and is no table is not set aside, as a cache would be
    path = store({}, Stamp.of(device, problems[0].op), path)  # says what cannot be written before anything is measured

    def keep(result: Result) -> None:
        found(result)
        if result.after_us is not None:
            before_us = result.after_us if result.before_us is None else result.before_us
            entry = Entry(result.config, before_us, result.after_us, date.today().isoformat())
            store({result.problem.key: entry}, Stamp.of(device, result.problem.op), path)

    return search(
        [task(problem, limits, device) for problem in problems],
        limits,
        partial(make_compiler, limits),
        partial(make_runner, device, limits),
        budget_s=budget,
        jobs=jobs or usable_cpus(),
        breadths=breadths,
        progress=progress or (lambda stage, done, total, text: None),
        found=keep,
    )


def untuned(problems: Sequence[Problem], device: torch.device, path: Path | None = None) -> list[Problem]:
    """Those that a table, or the user's cache, has nothing for.

    Raises:
        tune.TableError: the table cannot be read; or it is none, and somebody named it.
    """
    known: set[str] = set()
    for op in {problem.op for problem in problems}:
        stamp = Stamp.of(device, op)
        try:
            known |= load(path or cache_path(stamp)).entries(stamp, op)[0].keys()
        except BrokenTable:  # which is set aside when the first result is stored
            if path is not None:
                raise
    return [problem for problem in problems if problem.key not in known]


def task(problem: Problem, limits: Limits, device: torch.device | None = None) -> Task:
    """What to search through for a problem, on a device, or on one with `limits` that is not here."""
    from .workloads import META, rule_config, serves, workload

    rule = rule_config(problem, limits)

    def fits(config: Config) -> bool:
        return serves(problem, config, limits)

    before: Choice[Any] = Choice(rule, "rule")
    if device is not None:
        before = find_config(problem, device, lambda: rule, fits)
    configs = candidates(problem, rule, limits, fits)
    if before.config not in configs:
        configs.append(before.config)
    return Task(problem, workload(problem, META, limits).work, before, tuple(configs))


def _with_all_ranks(
    prepare: Callable[[], list[Problem]], find: Callable[[list[Problem]], list[Result]]
) -> list[Result]:
    """Have the first rank find configs for what all of them prepare, and all use these."""
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=1))  # for it may take longer than others wait
    try:
        problems = problems_of(problem for its in _gathered(prepare, group) for problem in its)
        same_stamps(group)
        found: list[list[Result]] = _gathered(lambda: find(problems) if distributed.get_rank() == 0 else [], group)
    finally:
        distributed.destroy_process_group(group)
    share()
    return found[0]


def _gathered(make: Callable[[], T], group: distributed.ProcessGroup) -> list[T]:
    """What `make` returns on each rank. Where it raises on one, that one raises it, once the others know, and they
    raise a RuntimeError that says so: none waits for it."""
    mine: T | None = None
    failure: Exception | None = None
    try:
        mine = make()
    except Exception as error:
        failure = error
    words = None if failure is None else f"{type(failure).__name__}: {failure}"  # for not all exceptions can be sent
    answers: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(answers, (mine, words), group)
    if failure is not None:
        raise failure
    for rank, (_, raised) in enumerate(answers):
        if raised is not None:
            raise RuntimeError(f"rank {rank} raised {raised}")
    return [its for its, _ in answers]


# --- in processes of their own -----------------------------------------------------------------------------


def make_compiler(limits: Limits) -> Handler:
    """Compiles a problem's launches for a GPU, which need not be here; it leaves them in Triton's cache on disk."""
    from .tune.aot import compile_launch
    from .workloads import META, workload

    def compile_config(problem: Problem, config: Config) -> Footprint:
        launches = workload(problem, META, limits).launches(config)
        compiled, *_ = [compile_launch(launch, limits.architecture) for launch in launches]
        loops = isinstance(config, PairConfig) and config.cells > 1
        counted = problem.op in COUNTED and not loops and "ptx" in compiled.texts
        instructions = compiled.instructions if counted else 0
        return Footprint(compiled.spilled_bytes, compiled.registers, compiled.shared_bytes, instructions)

    return compile_config


# Kernels without loops (but for that over a pair's cells), whose instructions are what they execute.
COUNTED = ("quantize", "quantize_pair", "dequantize", "fold", "quantize_fold")


def make_runner(device: torch.device, limits: Limits) -> Handler:
    """Runs candidates on a device: see `search`."""
    return Runner(device, limits)


class Runner:
    """One problem's operands at a time, and the launches of its candidates."""

    def __init__(self, device: torch.device, limits: Limits) -> None:
        from .perf import Ceilings, ColdTimer

        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.device = device
        self.limits = limits
        self._timer = ColdTimer(device)
        self._ceilings = Ceilings(device, _CEILING_S)
        self._open: Any = None
        self._proofs: dict[Problem, Any] = {}
        self._calls: dict[Config, Callable[[], None]] = {}

    def __call__(self, request: str, *arguments: Any) -> Any:
        requests: dict[str, Callable[..., Any]] = {"open": self.open, "check": self.check, "time": self.time}
        return requests[request](*arguments)

    def open(self, problem: Problem) -> float:
        """Make a problem's operands, and what has to come of them. The least microseconds that it can take."""
        from .workloads import workload

        self._open, self._proofs, self._calls = None, {}, {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._open = workload(problem, self.device, self.limits)
        return self._limit_us(problem)

    def check(self, problem: Problem, config: Config) -> str | None:
        """Run a config's launches on the operands, and on those of a proof. What is wrong with what they wrote."""
        from triton.runtime.errors import OutOfResources

        from .workloads import proof, proof_problem

        proven = proof_problem(problem, config)
        if proven not in self._proofs:
            self._proofs[proven] = proof(proven, self.device, self.limits)
        for each in (self._open, self._proofs[proven]):
            each.poison()
            try:
                call = self._call(each, config)
            except OutOfResources as error:  # said before anything was launched
                return str(error)
            if each is self._open:
                self._calls[config] = call
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            wrong: str | None = each.difference()
            if wrong is not None:
                return wrong
        return None

    def time(self, problem: Problem, config: Config, samples: int) -> tuple[float, ...]:
        if config not in self._calls:
            self._calls[config] = self._call(self._open, config)
        return self._timer.take(self._calls[config], samples)

    def _call(self, workload: Any, config: Config) -> Callable[[], None]:
        """Launch, and again at each call."""
        launches = workload.launches(config)
        relaunches = [launch.run(self.device) for launch in launches]
        if self.device.type != "cuda":  # nothing is compiled that could be relaunched

            def call() -> None:
                for launch in launches:
                    launch.run(self.device)

            return call
        steps = [(relaunch, launch.tensors.values()) for relaunch, launch in zip(relaunches, launches, strict=True)]

        def recall() -> None:
            for relaunch, tensors in steps:
                relaunch.run(*tensors)

        return recall

    def _limit_us(self, problem: Problem) -> float:
        """A copy of as many bytes, or the product's operations at the rate of a large one by torch."""
        work = self._open.work
        copy_us = self._ceilings.copy(work.read_bytes, work.written_bytes).timing.median_us
        if len(problem.shape) == 2:
            return copy_us
        m, n, k = problem.shape
        fp8 = problem.op == "native" or "float8" in problem.formats
        return max(copy_us, 2 * m * n * k / self._tflops("FP8" if fp8 else "bf16") / 1e6)

    def _tflops(self, kind: str) -> float:
        try:
            return self._ceilings.product_tflops(kind)
        except ValueError:  # torch has none
            return self._ceilings.product_tflops("bf16")
