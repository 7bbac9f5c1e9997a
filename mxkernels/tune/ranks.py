"""Many processes on one job: their configs are the same, so that their products have the same bits."""

from __future__ import annotations

import os

import torch
from torch import distributed

from .events import TABLES_CHANGED
from .stamp import Stamp
from .table import Entry, TableError, cache_path, load

# What rank 0 shared: its stamp and the entries of its cache. It holds until the next `share`.
_shared: tuple[Stamp, dict[str, Entry]] | None = None


def one_of_many() -> bool:
    """Whether this process is a rank among others: it says so itself, or whoever launched it (`torchrun`) does."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdecimal() and int(size) > 1


def shared_entries(stamp: Stamp) -> dict[str, Entry] | None:
    """What rank 0 shared for a GPU; None before the first `share`."""
    if _shared is None:
        return None
    return _shared[1] if _shared[0] == stamp else {}


def share(group: distributed.ProcessGroup | None = None) -> None:
    """Have all ranks use the entries of rank 0's cache: a collective, to call once all are there.

    Caches differ between hosts, and change while a job runs, so ranks do without until this is called. What it
    shares holds until it is called again. Of one process it does nothing. What a process launched before it joined
    the others it launches again as before, until it meets a new problem or shares.

    Args:
        group: the processes that take part, the first of which is rank 0; None is all.

    Raises:
        RuntimeError: the ranks have not all the same GPU, Triton and kernels; what was shared before stays.
    """
    global _shared
    if not (distributed.is_available() and distributed.is_initialized() and one_of_many()):
        return
    mine = Stamp.of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None
    stamps: list[Stamp | None] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(stamps, mine, group)
    first = stamps[0]
    for rank, stamp in enumerate(stamps):
        if stamp is None or first is None or stamp != first:
            raise RuntimeError(f"rank {rank} has {stamp or 'no GPU'}, rank 0 {first or 'none'}; allowed: all the same")
    assert first is not None
    message = [_cached(first) if distributed.get_rank(group) == 0 else {}]
    distributed.broadcast_object_list(message, group=group, group_src=0)
    _shared = (first, message[0])
    TABLES_CHANGED.happened()


def _cached(stamp: Stamp) -> dict[str, Entry]:
    """The entries of this process's cache; none where they cannot be read."""
    try:
        return load(cache_path(stamp)).entries(stamp)[0]
    except TableError:
        return {}
