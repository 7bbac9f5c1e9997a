"""One of two processes of `test_tune_lookup`: it prints what serves two problems as it joins the other one, shares and
stores. Arguments: its rank, its GPU, and a folder."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tuned
from torch import distributed

from mxkernels import tune

OTHER = replace(tuned.PROBLEM, shape=(1, 4096))


def say(when: str) -> None:
    choices = [tuned.found(problem) for problem in (tuned.PROBLEM, OTHER)]
    names = {tuned.cast(number): f" {number}" for number in range(4)} | {tuned.RULE: ""}
    print(f"{when}: {', '.join(choice.origin + names[choice.config] for choice in choices)}")


def meet(place: Path, rank: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)


def part() -> None:
    """After both have received all: who leaves first takes the connection away."""
    distributed.barrier()
    distributed.destroy_process_group()


def main(rank: int, stamp: tune.Stamp, folder: Path) -> None:
    warnings.simplefilter("ignore")
    become = tuned.install(pytest.MonkeyPatch(), folder / str(rank))
    become(stamp)
    torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
    problems = [tuned.PROBLEM] if rank == 0 else [tuned.PROBLEM, OTHER]
    tune.store({problem.key: tuned.entry(tuned.cast(rank + 1)) for problem in problems}, stamp)
    say("alone")
    meet(folder / "meet", rank)
    say("joined")
    try:
        tune.share()
    except RuntimeError as error:
        print(f"shared: {error}")
        part()
        return
    say("shared")
    tune.store({tuned.PROBLEM.key: tuned.entry(tuned.cast(3))}, stamp)
    say("stored")
    tune.share()
    say("again")
    part()
    say("parted")
    meet(folder / "again", rank)
    say("joined anew")
    tune.share()
    part()
    meet(folder / "at once", rank)
    say("joined at once")
    part()


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(tuned, sys.argv[2]), Path(sys.argv[3]))
