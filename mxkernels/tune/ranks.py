"""Many processes on one job: their configs are the same, so that their products have the same bits."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import distributed

from .events import TABLES_CHANGED
from .problem import OPS
from .stamp import Stamp
from .table import Entry, TableError, cache_path, load

_AVAILABLE = distributed.is_available()

# What rank 0 shared, by op: its stamp, and the entries of its cache. It holds until the next `share`, among the
# processes that had joined each other then.
_shared: dict[str, tuple[Stamp, dict[str, Entry]]] | None = None


def joined() -> bool:
    """Whether this process has joined others."""
    return _AVAILABLE and distributed.is_initialized()


def one_of_many() -> bool:
    """Whether this process is a rank among others: it says so itself, or whoever launched it (`torchrun`) does."""
    if joined():
        return distributed.get_world_size() > 1
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdecimal() and int(size) > 1


_world: weakref.ref[Any] | None = None  # the group of all processes, as it was last seen


def follow_ranks() -> None:
    """Forget what was found, and what was shared, before this process joined others or left them: these may have
    found something else."""
    global _world, _shared
    world = distributed.group.WORLD if _AVAILABLE else None
    before = None if _world is None else _world()
    if world is before and (world is None) == (_world is None):
        return
    _world = None if world is None else weakref.ref(world)
    _shared = None
    TABLES_CHANGED.happened()


def shared_entries(stamp: Stamp, op: str) -> dict[str, Entry] | None:
    """What rank 0 shared for an op on a GPU; None before the first `share`."""
    if _shared is None:
        return None
    first, entries = _shared[op]
    return entries if first == stamp else {}


def share(group: distributed.ProcessGroup | None = None) -> None:
    """Have all ranks use the entries of rank 0's cache: a collective, to call once all are there.

    Caches differ between hosts, and change while a job runs, so ranks do without until this is called. What it
    shares holds until it is called again, or the processes part. Of one process it does nothing. What a process
    launched before it joined the others it launches again as before, until it meets a new problem or shares.

    Args:
        group: the processes that take part, the first of which is rank 0; None is all.

    Raises:
        RuntimeError: the ranks have not all the same GPU, Triton and kernels; what was shared before stays.
    """
    global _shared
    if not (joined() and one_of_many()):
        return
    follow_ranks()
    stamps = same_stamps(group)
    message = [_cached(stamps) if distributed.get_rank(group) == 0 else {}]
    distributed.broadcast_object_list(message, group=group, group_src=0)
    _shared = {op: (stamp, message[0][op]) for op, stamp in stamps.items()}
    TABLES_CHANGED.happened()


def same_stamps(group: distributed.ProcessGroup | None = None) -> dict[str, Stamp]:
    """The stamp of every op, which all ranks have: a collective.

    Raises:
        RuntimeError: they have not.
    """
    mine = _stamps() if torch.cuda.is_available() else None
    stamps: list[dict[str, Stamp] | None] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(stamps, mine, group)
    first = stamps[0]
    for rank, its in enumerate(stamps):
        if first is None or its is None:
            raise RuntimeError(f"rank {rank} has no GPU; allowed: all the same one")
        for op in OPS:
            if its[op] != first[op]:
                raise RuntimeError(f"rank {rank} has {its[op]}, rank 0 {first[op]}; allowed: all the same")
    assert first is not None
    return first


def _stamps() -> dict[str, Stamp]:
    """Of every op, on this process's GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    return {op: Stamp.of(device, op) for op in OPS}


def _cached(stamps: dict[str, Stamp]) -> dict[str, dict[str, Entry]]:
    """The entries of this process's cache, by op; none where they cannot be read."""
    found: dict[str, dict[str, Entry]] = {}
    for op, stamp in stamps.items():
        try:
            found[op] = load(cache_path(stamp)).entries(stamp, op)[0]
        except TableError:
            found[op] = {}
    return found
