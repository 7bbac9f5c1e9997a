"""Launches that are remembered: recorded in one call, repeated in others with other tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from .. import tune

if TYPE_CHECKING:
    from .launch import Launch, Relaunch

Tensors: TypeAlias = Sequence[Any]  # each a tensor or None
# Where a launch's tensor starts: in which root (an input, or a buffer), and how many bytes after it; None for None.
Place: TypeAlias = tuple[int, int] | None

# How a tensor is made: shape, strides, dtype.
Made: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

_ALIGNMENT = 256  # of buffers in the workspace; kernels take 16 for granted
_MOST_PLANS = 4096


class Plan:
    """Launches on tensors that are given, and on buffers of device memory that the plan makes.

    Each launch runs at once, and is recorded. `finish` is told which tensors to return; then `replay` does all of it
    again with other inputs, which must be like the first ones: in dtype, shape, strides, alignment to 16 bytes, and
    in which of them start at the same address. A finished plan holds no tensors.

    What is launched on, or returned, must be an input, a buffer, or a view of one; else the plan is not `complete`,
    and cannot be replayed.
    """

    def __init__(self, device: torch.device, inputs: Tensors) -> None:
        self.device = device
        self.complete = True
        self._inputs = len(inputs)
        self._roots = list(inputs)
        self._zeroed: set[int] = set()
        self._calls: list[tuple[Relaunch, list[Any], list[Place]]] = []

    def buffer(self, *shape: int, dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
        """Device memory of its own: zeros, or anything."""
        if zero:
            self._zeroed.add(len(self._roots))
        made = self._make(shape, dtype, zero)
        self._roots.append(made)
        return made

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, zero: bool) -> torch.Tensor:
        return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=self.device)

    def launch(self, launch: Launch) -> None:
        tensors = list(launch.tensors.values())
        # Found now, while what is no root is still there: a later root may have its address.
        places = [self._place(each) for each in tensors]
        relaunch = launch.run(self.device)
        if relaunch.compiled is not None:
            self._calls.append((relaunch, tensors, places))

    def _place(self, tensor: Any) -> Place:
        if tensor is None:
            return None
        tensor = tensor if isinstance(tensor, torch.Tensor) else tensor.base  # or a descriptor
        if tensor.numel() == 0:
            return None
        address = tensor.data_ptr()
        inside = []
        for index, root in enumerate(self._roots):
            if root is not None and root.numel():
                offset = address - root.data_ptr()
                if offset == 0:
                    return index, 0
                if 0 < offset < _extent(root):
                    inside.append((index, offset))
        if len(inside) == 1:
            return inside[0]
        self.complete = False
        return None

    def finish(self, returned: Tensors) -> None:
        """Decide what `replay` returns, and let go of all tensors."""
        from .launch import Relaunches

        roots = [self._root(each) for each in returned]
        outputs = {root: each for root, each in zip(roots, returned, strict=True) if root is not None}
        self.complete &= len(outputs) == sum(root is not None for root in roots)
        starts = {root: (root, 0) for root in range(self._inputs)}
        made: list[list[Made]] = [[], []]  # anything, zeros
        for zero in (False, True):
            here, before, used = made[zero], self._inputs + len(made[False]) * zero, 0
            buffers = [root for root in range(self._inputs, len(self._roots)) if (root in self._zeroed) == zero]
            for root in buffers:
                if root in outputs:
                    starts[root] = (before + len(here), 0)
                    here.append(_like(outputs[root]))
            for root in buffers:
                if root not in outputs:
                    starts[root] = (before + len(here), used)
                    used += -(-_extent(self._roots[root]) // _ALIGNMENT) * _ALIGNMENT
            if used:
                here.append(((used,), (1,), torch.uint8))
        self._made, self._made_of_zeros = made
        self._returned = [None if root is None else starts[root][0] for root in roots]

        # Places in the list of addresses that launches pick from: of inputs and what is made, then inside of these.
        whole = self._inputs + len(self._made) + len(self._made_of_zeros)
        slots = {(root, 0): root for root in range(whole)}
        self._relaunches = Relaunches(self.device)
        for relaunch, tensors, places in self._calls:
            moved = [place and (starts[place[0]][0], starts[place[0]][1] + place[1]) for place in places]
            # The last slot holds None.
            self._relaunches.add(
                relaunch, tensors, [slots.setdefault(each, len(slots)) if each else -1 for each in moved]
            )
        self._inside = list(slots)[whole:]
        self._roots, self._calls = [], []

    def _root(self, tensor: torch.Tensor | None) -> int | None:
        """The input, or the buffer, that a tensor is the whole of."""
        if tensor is None:
            return None
        for index, root in enumerate(self._roots):
            if root is tensor:
                return index
        for index, root in enumerate(self._roots[self._inputs :], self._inputs):
            assert root is not None
            if (root.data_ptr(), root.nbytes) == (tensor.data_ptr(), tensor.nbytes) and tensor.is_contiguous():
                return index
        self.complete = False
        return None

    def replay(self, inputs: Tensors, addresses: Sequence[int | None]) -> list[Any]:
        """What was returned, made of other inputs, which start at `addresses`."""
        if self.device.index != _current_device():
            with torch.cuda.device(self.device):
                return self.replay(inputs, addresses)
        tensors, pointers = [*inputs], [*addresses]
        for shape, strides, dtype in self._made:
            made = _empty(shape, strides, dtype)
            tensors.append(made)
            pointers.append(made.data_ptr())
        for shape, _, dtype in self._made_of_zeros:
            made = torch.zeros(shape, dtype=dtype, device=self.device)
            tensors.append(made)
            pointers.append(made.data_ptr())
        for index, offset in self._inside:
            pointers.append(pointers[index] + offset)  # type: ignore[operator]
        pointers.append(None)
        self._relaunches.run(pointers)
        return [None if index is None else tensors[index] for index in self._returned]


def _like(tensor: torch.Tensor) -> Made:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


# torch.empty on the current device without what dispatching it takes, as in the code that torch.compile generates.
_empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None) or (
    lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
)

# torch.cuda.current_device without looking whether CUDA has been initialised, which tensors on a device show.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _extent(tensor: Any) -> int:
    """The bytes from a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize if tensor.numel() else 0


# Finished plans, and whether they take their inputs as they are given; None for what is none.
_plans: dict[tuple[Any, ...], tuple[Plan, bool] | None] = {}
_UNKNOWN: Any = object()
tune.on_change(_plans.clear)


class _Making(threading.local):
    """The plan that a thread is making, which other plans are to be part of."""

    plan: Plan | None = None


_making = _Making()


def recorded(
    key: tuple[Any, ...],
    given: Tensors,
    run: Callable[[Plan, Tensors], Tensors],
    prepare: Callable[[], Tensors] | None = None,
) -> Any:
    """What `run(plan, inputs)` returns; or, if a plan was made for the like, what that returns when it is replayed.

    `inputs` are what is `given`, or what `prepare` makes of that for the kernels; the first is no None. `key` says
    on what the launches depend besides. The plan is part of another while `traced` makes that.
    """
    if _making.plan is not None:
        return run(_making.plan, prepare() if prepare else given)
    addresses, key = _known_by(key, given)
    known = _plans.get(key)
    if known is not None:
        plan, in_place = known
        if in_place:
            return plan.replay(given, addresses)
        assert prepare is not None
        inputs = prepare()
        return plan.replay(inputs, _addresses(inputs))
    inputs = prepare() if prepare else given
    plan, returned = _made(inputs, lambda plan: run(plan, inputs))
    assert plan.complete, f"{key} launches on what is neither an input nor a buffer"
    _remember(key, (plan, _addresses(inputs) == addresses))
    return returned


def traced(key: tuple[Any, ...], given: Tensors, function: Callable[..., Tensors]) -> Any:
    """What `function(*given)` returns, whose work is that of functions that call `recorded`: as one plan of all
    their launches, or as a plan for each where something else turns out to be part of it."""
    if _making.plan is not None:
        return function(*given)
    addresses, key = _known_by(key, given)
    known = _plans.get(key, _UNKNOWN)
    if known is not _UNKNOWN:
        return known[0].replay(given, addresses) if known else function(*given)

    def run(plan: Plan) -> Tensors:
        _making.plan = plan
        try:
            return function(*given)
        finally:
            _making.plan = None

    plan, returned = _made(given, run)
    _remember(key, (plan, True) if plan.complete else None)
    return returned


def _made(inputs: Tensors, run: Callable[[Plan], Tensors]) -> tuple[Plan, Tensors]:
    """A plan that is finished, and what `run` returned when it made it; anew, if one of its configs fails."""

    def make() -> tuple[Plan, Tensors]:
        plan = Plan(inputs[0].device, inputs)
        returned = run(plan)
        plan.finish(returned)
        return plan, returned

    return tune.first_launch(make)


def _known_by(key: tuple[Any, ...], given: Tensors) -> tuple[list[int | None], tuple[Any, ...]]:
    """Where tensors start, and `key` with all that a replay takes for granted about them."""
    addresses: list[int | None] = []
    traits = [*key, given[0].get_device()]
    for each in given:
        if each is None:
            addresses.append(None)
            traits.append(None)
        else:
            address = each.data_ptr()
            addresses.append(address)
            traits += each.dtype, each.shape, each.stride(), address % 16
    if len(set(addresses)) < len(addresses):  # some start at one address, or are None
        traits += [addresses.index(each) for each in addresses]
    return addresses, tuple(traits)


def _addresses(tensors: Tensors) -> list[int | None]:
    return [each if each is None else each.data_ptr() for each in tensors]


def _remember(key: tuple[Any, ...], plan: tuple[Plan, bool] | None) -> None:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
