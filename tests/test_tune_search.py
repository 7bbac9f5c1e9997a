"""The search: what is compiled, run and kept; and what one bad candidate costs, in real processes."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tuning_fakes as fakes
from tuning_fakes import config, problem

from mxkernels.tune import CastConfig, Choice, Config
from mxkernels.tune.contest import DUEL_ROUNDS, FIRST_SAMPLES, LEAST_GAIN, ROUNDS, measure, noise
from mxkernels.tune.limits import Footprint, Limits
from mxkernels.tune.model import Work
from mxkernels.tune.search import BREADTHS, Breadth, better, compile_all, search, shortlist, survivors, wider
from mxkernels.tune.task import Fault, Result, Task
from mxkernels.tune.worker import Failure

LIMITS = Limits("sm_90")


def task(*candidates: Config, before: Config | None = None, number: int = 0) -> Task:
    """The rule's is the first, and serves at present unless another is said to."""
    return Task(problem(number), Work(1 << 25, 1 << 23), Choice(before or candidates[0], "rule"), candidates)


def run(*tasks: Task, runner: Callable[[], Any] = fakes.runner, **options: Any) -> list[Result]:
    options = {"compiler": fakes.compiler, "budget_s": 3600.0, "jobs": 1, **options}
    compiler = options.pop("compiler")
    return search(list(tasks), LIMITS, compiler, runner, **options)


class Here:
    """A worker without a process."""

    generation = 1
    process_id = 1

    def __init__(self, handler: Callable[..., Any]) -> None:
        self.handler = handler

    def ask(self, *request: Any, seconds: float) -> Any:
        return self.handler(*request)


def measured(candidates: list[Config], handler: Callable[..., Any], seconds: float = 60.0) -> Result:
    return measure(task(*candidates), candidates, Here(handler), seconds, (len(candidates), len(candidates)))


# --- one bad candidate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (fakes.CRASHES, "it crashed: its process ended with exit status 139"),
        (fakes.HANGS, "it hung: there was no answer in 8 s"),
        (fakes.RAISES, "it raised RuntimeError: CUDA error: an illegal memory access was encountered"),
        (fakes.WRONG, "12 bytes differ"),
        (fakes.FAILS_LATER, "it crashed: its process ended with exit status 139"),
    ],
    ids=["crashes", "hangs", "raises", "writes something else", "crashes while it is timed"],
)
def test_a_bad_candidate_costs_itself(does: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the fastest. The others compete as if it were not there, and it is reported."""
    monkeypatch.setattr("mxkernels.tune.contest.RUN_S", 8.0)
    bad = config(10, does)
    (result,) = run(task(config(100), bad, config(90), config(80), config(95)))
    assert result.config == config(80)
    assert (result.before_us, result.after_us, result.limit_us) == (100, 80, 10)
    assert [(fault.config, fault.reason) for fault in result.faults] == [(bad, says)]
    assert result.gain == 1.25
    assert result.share_of_limit == 0.125


@pytest.mark.parametrize("does", [fakes.CRASHES, fakes.HANGS, fakes.RAISES])
def test_a_candidate_that_does_not_compile(does: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxkernels.tune.search.COMPILE_S", 8.0)
    bad = config(10, does)
    compiler = partial(fakes.compiler, (does,))
    (result,) = run(task(config(100), bad, config(80)), compiler=compiler, jobs=2)
    assert result.config == config(80)
    assert [fault.config for fault in result.faults] == [bad]


def test_the_present_config_may_be_the_bad_one() -> None:
    """It is replaced by the fastest other, by however little; and has no time that counts."""
    (result,) = run(task(config(10, fakes.WRONG), config(90), config(80), config(95)))
    assert result.config == config(80)
    assert (result.before_us, result.after_us, result.gain) == (None, 80, None)
    assert [str(fault) for fault in result.faults] == [f"{config(10, fakes.WRONG)}: 12 bytes differ"]


def test_a_problem_without_operands_costs_itself() -> None:
    (result,) = run(task(config(100), config(80)), runner=partial(fakes.runner, opens=False))
    assert result.config == config(100)
    assert (result.before_us, result.after_us, result.gain) == (None, None, None)
    assert [str(fault) for fault in result.faults] == [
        "the problem: it raised MemoryError: there is no memory for the operands"
    ]


def test_a_worker_killed_from_outside(tmp_path: Path) -> None:
    """The candidate that it was busy with is out; the rest goes on in another, which opens the problem again."""
    log = tmp_path / "log"
    log.touch()
    bad = config(10, fakes.HANGS_LATER)
    tasks = [task(config(100), bad, config(80), config(90)), task(config(100), config(80), number=1)]
    busy = re.compile(rf"^time (\d+) {re.escape(str(bad))}$", re.MULTILINE)

    def kill() -> None:
        while not (found := busy.search(log.read_text())):
            time.sleep(0.01)
        os.kill(int(found[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    results = run(*tasks, runner=partial(fakes.runner, log=str(log)))
    killer.join(60.0)
    faults = [(fault.config, fault.reason) for result in results for fault in result.faults]
    assert faults == [(bad, "it crashed: its process ended with signal 9, SIGKILL")]
    assert [result.config for result in results] == [config(80)] * 2
    opened = re.findall(r"^open (\d+)", log.read_text(), re.MULTILINE)
    assert len(opened) == 3  # the first problem twice
    assert len(set(opened)) == 2


# --- what is compiled, and what is run -----------------------------------------------------------------------


def test_as_many_are_compiled_and_run_as_the_breadth_says(tmp_path: Path) -> None:
    log = tmp_path / "log"
    candidates = [config(us) for us in range(200, 100, -1)]
    compiler = partial(fakes.compiler, log=str(log))
    (result,) = run(task(*candidates), compiler=compiler, breadths=[Breadth(9, 4)], jobs=2)
    assert len(log.read_text().splitlines()) == 9
    assert (result.candidates, result.compiled, result.run) == (100, 9, 4)
    (result,) = run(task(*candidates), breadths=[Breadth(None, None)])
    assert (result.candidates, result.compiled, result.run) == (100, 100, 100)
    assert result.config == config(101)


def test_few_are_enough_where_what_serves_is_right(tmp_path: Path) -> None:
    log = tmp_path / "log"
    candidates = [config(us) for us in range(100, 600, 10)]
    (result,) = run(task(*candidates), compiler=partial(fakes.compiler, log=str(log)))
    assert len(log.read_text().splitlines()) == BREADTHS[0].compiled
    assert (result.config, result.compiled, result.run) == (config(100), BREADTHS[0].compiled, BREADTHS[0].run)


def test_a_large_gain_is_followed_by_a_wider_search(tmp_path: Path) -> None:
    """Of that problem alone; nothing is compiled twice."""
    log = tmp_path / "log"
    found: list[Result] = []
    wrong, right = [[config(us) for us in range(*ends)] for ends in ((600, 100, -10), (100, 600, 10))]
    tasks = [task(*wrong), task(*right, number=1)]
    results = run(*tasks, compiler=partial(fakes.compiler, log=str(log)), found=found.append)
    first, _, wide = found
    assert results == [wide, found[1]]
    assert (wide.problem, wide.before) == (first.problem, tasks[0].before)
    assert 1.03 < first.gain < wide.gain  # type: ignore[operator]
    assert (wide.compiled, wide.run) == (BREADTHS[1].compiled, BREADTHS[1].run)
    compiled = [line.split()[1] for line in log.read_text().splitlines()]
    assert 32 + 8 <= len(compiled) <= 32 + 8 + 8
    assert max(compiled.count(each) for each in compiled) <= 2  # tiles that both problems have


def test_no_wider_search_without_time() -> None:
    """The last comparison alone takes longer than there is, whichever two are left for it."""
    found: list[Result] = []
    tasks = [task(config(600), *(config(us) for us in range(500, 100, -10)))]
    sample_s, budget_s = 0.25, 3.0
    assert 2 * DUEL_ROUNDS * sample_s > budget_s
    (result,) = run(*tasks, runner=partial(fakes.runner, seconds=sample_s), budget_s=budget_s, found=found.append)
    assert found == [result]
    assert result.gain > 1.03  # type: ignore[operator]


def test_a_wider_search_that_fails_takes_nothing_back() -> None:
    found: list[Result] = []
    (result,) = run(task(*(config(us) for us in range(600, 100, -10))), runner=fakes.opens_once, found=found.append)
    first, last = found
    assert result == last
    assert (last.config, last.before_us, last.after_us) == (first.config, 600, first.after_us)
    assert [str(fault) for fault in last.faults] == [
        "the problem: it raised MemoryError: there is no memory for the operands"
    ]


def outcome(
    searched: Task, *, config: Config, gain: float = 1.0, run: int = 2, failed: Sequence[Config] = ()
) -> Result:
    faults = tuple(Fault(each, "it crashed") for each in failed)
    return Result(searched.problem, searched.before, config, 100.0, 100.0 / gain, 10.0, 4, 4, run, 1.0, faults)


def test_a_wider_search_is_around_the_fastest_so_far() -> None:
    first, second, third, fourth = candidates = [config(us) for us in (100, 90, 80, 70)]
    searched = task(*candidates)
    assert wider(searched, outcome(searched, config=first)) is None
    assert wider(searched, outcome(searched, config=second, gain=1.02)) is None
    wide = wider(searched, outcome(searched, config=third, gain=1.25, failed=[second]))
    assert wide is not None
    assert wide.candidates == (third, first, fourth)
    assert (wide.before, [fault.config for fault in wide.faults]) == (searched.before, [second])
    assert wider(searched, outcome(searched, config=third, gain=1.25, run=4)) is None  # there are no others


def test_the_better_of_two_searches() -> None:
    first, second, third = candidates = [config(us) for us in (100, 90, 80)]
    searched = task(*candidates)
    earlier = outcome(searched, config=second, gain=1.1)
    assert better(None, earlier) == earlier
    more = outcome(searched, config=third, gain=1.2)
    assert better(earlier, more) == more
    less = outcome(searched, config=first, failed=[third])
    assert better(earlier, less) == replace(earlier, faults=less.faults)
    assert better(earlier, replace(more, after_us=None, faults=less.faults)) == replace(earlier, faults=less.faults)
    failed_since = outcome(searched, config=first, failed=[second])
    assert better(earlier, failed_since) == failed_since


def test_a_wider_search_where_what_serves_has_failed() -> None:
    first, second, third = candidates = [config(us) for us in (100, 90, 80)]
    searched = task(*candidates)
    wide = wider(searched, outcome(searched, config=second, run=1, failed=[first]))
    assert wide is not None
    assert wide.candidates == (second, third)
    nothing = wider(searched, outcome(searched, config=first, run=0, failed=[first, second]))
    assert nothing is not None
    assert nothing.candidates == (third,)
    assert wider(searched, outcome(searched, config=first, run=0, failed=candidates)) is None


def test_what_spills_is_not_run() -> None:
    spills = config(50, fakes.SPILLS)
    (result,) = run(task(config(100), spills, config(80)))
    assert result.config == config(80)
    assert not result.faults


def test_what_serves_and_the_rules_are_always_among_them() -> None:
    """However slow the model takes them for, and though they spill."""
    rule, before = CastConfig(1, 16, 8), CastConfig(1, 32, 8)
    others = [CastConfig(1, 1024, warps) for warps in (1, 2, 4)]
    found = task(rule, *others, before, before=before)
    chosen = shortlist(found, LIMITS, 3)
    assert set(chosen) >= {rule, before}
    assert len(chosen) == 3
    outcomes: dict[Config, Any] = {each: Footprint(8, 32, 0) for each in chosen}
    assert survivors(found, outcomes, LIMITS, None) == (chosen[:2], ())


@pytest.mark.parametrize(
    ("footprint", "reason"),
    [
        (Footprint(8, 32, 0), "spills 8 bytes"),
        (Footprint(0, 32, 232449), "232449 bytes of shared memory, of 232448"),
        (Footprint(0, 255, 0), "registers, of 65536"),
    ],
)
def test_what_exceeds_a_gpu(footprint: Footprint, reason: str) -> None:
    tile = CastConfig(64, 1024, 16)
    assert reason in str(footprint.exceeds(tile, LIMITS))
    assert Footprint(0, 128, 232448).exceeds(tile, LIMITS) is None


def test_time_for_compiling_is_shared_by_all(tmp_path: Path) -> None:
    """When it runs out, every problem has had its best candidates compiled."""
    log = tmp_path / "log"
    tasks = [task(*map(config, range(100, 1000)), number=number) for number in range(3)]
    compiler = partial(fakes.compiler, log=str(log), seconds=0.02)
    results = run(*tasks, compiler=compiler, budget_s=4.0, breadths=[Breadth(None, None)])
    compiled = [result.compiled for result in results]
    assert 0 < max(compiled) < 900
    assert max(compiled) - min(compiled) <= 1
    assert all(result.after_us is not None for result in results)


def test_compiling_is_cut_off() -> None:
    requests = [(problem(), config(us)) for us in range(100, 104)]
    outcomes = compile_all(requests, fakes.compiler, 1, -1.0, lambda *progress: None)
    assert not outcomes


def test_a_progress_line_is_told_how_much_is_done() -> None:
    told: list[tuple[Any, ...]] = []
    found: list[Result] = []
    results = run(
        task(config(100), config(80)),
        task(config(100), config(90), number=1),
        progress=lambda *each: told.append(each),
        found=found.append,
    )
    assert [each[:3] for each in told] == [
        *(("compile", done, 4) for done in range(5)),
        *(("measure", done, 2) for done in range(3)),
    ]
    assert found == results


# --- who wins ------------------------------------------------------------------------------------------------


def timed(times: Callable[[CastConfig], float]) -> Callable[..., Any]:
    """A handler that takes each sample of a candidate as it is told."""

    def handle(request: str, problem: object, *arguments: Any) -> Any:
        if request == "open":
            return 1.0
        if request == "check":
            return None
        return tuple(times(arguments[0]) for _ in range(arguments[1]))

    return handle


def test_a_gain_below_the_noise_changes_nothing() -> None:
    """100 against 98, of samples that spread by 20: who is faster cannot be said."""
    generator = random.Random(0)
    changes = 0
    for _ in range(40):
        result = measured([config(100), config(99)], timed(lambda each: each.tile_cols + generator.gauss(0, 60)))
        changes += result.config != config(100)
    assert changes <= 2  # three standard errors: 3 in 1000, and few samples


def test_a_gain_beyond_the_noise_is_taken() -> None:
    generator = random.Random(0)
    for _ in range(10):
        candidates = [config(100), config(97), config(93), config(98)]
        result = measured(candidates, timed(lambda each: each.tile_cols + generator.gauss(0, 3)))
        assert result.config == config(93)
        assert result.before_us == pytest.approx(100, abs=1.5)
        assert result.after_us == pytest.approx(93, abs=1.5)


def test_the_luck_of_the_fastest_does_not_count() -> None:
    """Twelve that are alike: some was the fastest so far, but that chose it, and it is timed anew."""
    generator = random.Random(1)
    changes = 0
    for _ in range(30):
        candidates = [config(1000 + number) for number in range(12)]
        result = measured(candidates, timed(lambda each: 1000 + generator.gauss(0, 30)))
        changes += result.config != candidates[0]
    assert changes <= 2


@pytest.mark.parametrize("drift", [1, -1])
def test_clocks_that_drift_are_no_gain(drift: int) -> None:
    """Every sample takes longer, or less, than the one before: whoever is timed first, or last, would win."""
    clock = iter(range(10**9))
    result = measured([config(100), config(101)], timed(lambda each: 2000 + drift * next(clock)))
    assert result.config == config(100)


def test_the_times_are_those_of_the_last_comparison() -> None:
    """What a candidate was chosen for is not what is reported."""
    seen: dict[CastConfig, int] = {}

    def us(each: CastConfig) -> float:
        seen[each] = seen.get(each, 0) + 1
        return each.tile_cols if seen[each] <= halvings else each.tile_cols + 10

    halvings = ROUNDS * FIRST_SAMPLES * (1 + 2 + 4 + 8 + 16)  # of 32 beside the present one
    result = measured([config(100), *(config(us) for us in range(80, 48, -1))], timed(us))
    assert (result.before_us, result.after_us) == (110, 59)


def test_a_tiny_gain_changes_nothing() -> None:
    less = 1000 * (1 - 0.9 * LEAST_GAIN)
    result = measured([config(1000), config(999)], timed(lambda each: 1000 if each == config(1000) else less))
    assert result.config == config(1000)
    assert result.gain == 1


def test_little_time_is_enough_for_two() -> None:
    """The present config and one other are compared in any case."""
    result = measured([config(100), config(80), config(50)], timed(lambda each: each.tile_cols), seconds=0.0)
    assert (result.config, result.run) == (config(80), 2)


def test_slow_candidates_are_timed_less_often() -> None:
    asked: list[int] = []

    def handle(request: str, problem: object, *arguments: Any) -> Any:
        if request == "time":
            asked.append(arguments[1])
            return (2e6,) * arguments[1]
        return None

    measured([config(100), config(80), config(70)], handle)
    assert asked[3:].count(1) > 2 * DUEL_ROUNDS - 4
    assert max(asked) <= 16


def test_noise_is_three_standard_errors() -> None:
    """Of normal differences with a deviation of 1: 3 * 1.2533 / sqrt(n)."""
    generator = random.Random(0)
    found = [noise([generator.gauss(5, 1) for _ in range(1000)]) for _ in range(20)]
    assert sum(found) / 20 == pytest.approx(3 * 1.2533 / 1000**0.5, rel=0.1)


def test_a_failure_is_a_sentence() -> None:
    outcomes = {config(100): Footprint(0, 32, 0), config(80): Failure("it raised ValueError: no")}
    _, (fault,) = survivors(task(config(100), config(80)), outcomes, LIMITS, None)
    assert str(fault) == f"{config(80)}: it raised ValueError: no"
