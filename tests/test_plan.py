"""Launches that are remembered: what a replay launches, on which memory, and what it writes there.

Kernels run in the interpreter, behind stand-ins for what Triton compiles: these take addresses, as on a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import torch
from triton import knobs
from triton.runtime import driver

import mxkernels as mx
from mxkernels import gpu, ops
from mxkernels.ops import layer_operand, linear, plan, transform
from mxkernels.ops.launch import Launch, Relaunch
from mxkernels.recipes import RECIPES, Product

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")]

BF16 = torch.bfloat16
STOCHASTIC = mx.MXSpec("e2m1", rounding="stochastic")


def at(address: Any, like: torch.Tensor) -> torch.Tensor:
    """The memory at an address as a tensor of the dtype, shape and strides of another."""
    if like.numel() == 0:
        return like
    raw = (ctypes.c_uint8 * plan._extent(like)).from_address(address)
    return torch.frombuffer(raw, dtype=like.dtype).as_strided(like.shape, like.stride())


class Log(list[Any]):
    """Launches that were made again; and the names and programs of those that were made for the first time."""

    def __init__(self) -> None:
        self.first: list[tuple[str, int]] = []


class Compiled:
    """What Triton returns of a launch: it runs the same kernel on other addresses."""

    function, packed_metadata = "the function", "the metadata"

    def __init__(self, launch: Launch, log: Log) -> None:
        self.log, self.name = log, launch.kernel.fn.__name__
        # No tensors, or they would not be let go.
        self.kernel, self.options, self.scalars = launch.kernel, launch.options, dict(launch.scalars)
        self.like = {name: _hollow(each) for name, each in launch.tensors.items()}

    def run(
        self, gridX: int, gridY: int, gridZ: int, stream: int, function: str, kernel_metadata: str,
        launch_metadata: object, launch_enter_hook: object, launch_exit_hook: object, *args: Any,
    ) -> None:  # fmt: skip
        assert (gridY, gridZ, function, kernel_metadata) == (1, 1, self.function, self.packed_metadata)
        assert launch_metadata is launch_enter_hook is launch_exit_hook is None
        self._run("directly", gridX, stream, args)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args, stream=None: self._run("by Triton", grid[0], stream, args)

    def _run(self, how: str, programs: int, stream: int | None, args: tuple[Any, ...]) -> None:
        pointers, scalars = args[: len(self.like)], args[len(self.like) :]
        assert scalars == tuple(self.scalars.values())
        tensors = {}
        for (name, like), pointer in zip(self.like.items(), pointers, strict=True):
            assert (pointer is None) == (like is None)
            if like is None:
                tensors[name] = None
            elif isinstance(like, torch.Tensor):
                assert type(pointer) is int
                tensors[name] = at(pointer, like)
            else:
                assert type(pointer) is type(like)
                fields = {key: value for key, value in vars(pointer).items() if key != "base"}
                tensors[name] = type(like)(at(pointer.base.data_ptr(), like.base), **fields)
        self.log.append(SimpleNamespace(name=self.name, how=how, programs=programs, stream=stream, tensors=tensors))
        self.kernel[(programs,)](**tensors, **self.scalars, **self.options)


def rubbish(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    made = torch.empty_strided(shape, strides, dtype=dtype)
    made.view(torch.uint8).fill_(0xFF)
    return made


def _hollow(tensor: Any) -> Any:
    """Its description, without memory."""
    if tensor is None:
        return None
    if isinstance(tensor, torch.Tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    hollow = object.__new__(type(tensor))
    hollow.__dict__ = {**vars(tensor), "base": _hollow(tensor.base)}
    return hollow


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """The CPU as a GPU with FP8 tensor cores; what was launched again."""
    log = Log()
    run = Launch.run

    def compiling(self: Launch, device: torch.device) -> Relaunch:
        log.first.append((self.kernel.fn.__name__, self.programs))
        relaunch = run(self, device)
        return dataclasses.replace(relaunch, compiled=Compiled(self, log)) if self.programs else relaunch

    def is_eager(*tensors: torch.Tensor | None) -> bool:
        return not torch._C._len_torch_dispatch_stack()

    def folds_at_once(product: Any, device: torch.device, rows: int, cols: int) -> bool:
        return layer_operand._foldable(product.left) and layer_operand._foldable(product.right)

    monkeypatch.setattr(Launch, "run", compiling)
    monkeypatch.setattr(ops, "is_eager", is_eager)
    monkeypatch.setattr(layer_operand, "is_eager", is_eager)
    monkeypatch.setattr("mxkernels.ops.linear_function.folds_at_once", folds_at_once)
    monkeypatch.setattr("mxkernels.ops.paths.LEAST_FP8_ROWS", 1)
    monkeypatch.setattr(gpu, "device_capabilities", lambda device: gpu.Capabilities(fp8_mma=True))
    monkeypatch.setattr(plan, "_empty", rubbish)
    monkeypatch.setattr(plan, "_current_device", lambda: None)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda index: 7))
    plan._plans.clear()
    yield log
    plan._plans.clear()


def ordinary(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(made: Any) -> list[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        return [made]
    if isinstance(made, mx.FoldedTensor):
        return [*parts(made.values), made.reference, made.outside, made.outside_rows]
    if isinstance(made, mx.MXTensor):
        return [made.codes, made.scale, *([] if made.offset is None else [made.offset])]
    return [part for each in made for part in parts(each)]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(parts(one), parts(other), strict=True))
    assert all((a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) for a, b in pairs)
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


ASYMMETRIC = mx.MXSpec("int4", symmetric=False)
# A call of two inputs `[32, 64]`, and of a seed.
CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "quantize": lambda x, w, seed: mx.quantize(x, mx.mxfp4),
    "dimensions that do not merge": lambda x, w, seed: mx.quantize(x.view(4, 8, 64).transpose(0, 1), ASYMMETRIC),
    "stochastic": lambda x, w, seed: mx.quantize(x, STOCHASTIC, seed),
    "pair": lambda x, w, seed: mx.quantize_pair(x, mx.mxfp6_e2m3),
    "dequantize": lambda x, w, seed: mx.dequantize(mx.quantize(x, ASYMMETRIC)),
    "fold a plain one": lambda x, w, seed: mx.fold(x, STOCHASTIC, seed),
    "fold by way of codes": lambda x, w, seed: mx.fold(x.T, mx.mxfp4),
    "hadamard": lambda x, w, seed: transform._hadamard_cuda(x, 32, None),
    "fp8": lambda x, w, seed: mx.matmul(mx.quantize(x.T, mx.mxfp4).T, mx.quantize(w, mx.mxfp4).T, bias=x[:, 0]),
    "folded": lambda x, w, seed: mx.matmul(mx.fold(mx.quantize(x, mx.mxfp4)), mx.fold(mx.quantize(w, mx.mxfp4)).T),
    "offsets": lambda x, w, seed: mx.matmul(mx.quantize(x, ASYMMETRIC), mx.quantize(w, mx.mxfp4).T),
    "decoded": lambda x, w, seed: mx.matmul(mx.quantize(x, mx.mxfp8_e5m2), mx.quantize(w, mx.mxfp4).T),
    "half": lambda x, w, seed: mx.matmul(x.half(), mx.quantize(w, mx.mxfp4).T, out_dtype=torch.float32),
}


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return ordinary(32, 64, seed=seed), ordinary(32, 64, seed=seed + 100), torch.tensor([seed])


@pytest.mark.parametrize("name", CALLS)
def test_replays_write_what_a_first_call_does(name: str, log: Log) -> None:
    call = CALLS[name]
    expected = call(*inputs(1))
    plan._plans.clear()
    del log[:]
    other = call(*inputs(0))
    del log[:]
    assert same(call(*inputs(1)), expected)
    assert not same(other, expected)
    assert {(each.how, each.stream) for each in log} == {("directly", 7)}


def test_operands_that_are_one_tensor_are_a_plan_apart(log: Log) -> None:
    q, w = mx.quantize(ordinary(32, 64), mx.mxfp4), mx.quantize(ordinary(32, 64, seed=1), mx.mxfp4)
    square = mx.matmul(q, q.T)
    product = mx.matmul(q, w.T)
    assert not torch.equal(square, product)
    for _ in range(2):
        assert same(mx.matmul(q, q.T), square)
        assert same(mx.matmul(q, w.T), product)


def test_alignment_and_strides_and_dtypes_are_a_plan_apart(log: Log) -> None:
    flat = ordinary(2 * 8 * 64 + 8)
    x = flat[:512].view(8, 64)
    kinds = [x, flat[1:513].view(8, 64), flat[:1024].view(8, 128)[:, :64], x.half()]
    expected = [mx.quantize(x, mx.mxfp4) for x in kinds]
    assert len(plan._plans) == len(kinds)
    assert not log
    assert same(mx.quantize(x.clone(), mx.mxfp4), expected[0])
    for x, q in zip(kinds, expected, strict=True):
        assert same(mx.quantize(x, mx.mxfp4), q)
    assert len(plan._plans) == len(kinds)


def test_what_is_not_returned_lies_in_one_workspace(log: Log) -> None:
    q, w = mx.quantize(ordinary(32, 64), mx.mxfp8_e5m2), mx.quantize(ordinary(32, 64, seed=1), mx.mxfp4)
    mx.matmul(q, w.T)
    (made,) = (known[0] for key, known in plan._plans.items() if known and key[0] == "matmul")
    (out, workspace), (zeros,) = made._made, made._made_of_zeros
    assert (out[0], out[2]) == ((32, 32), BF16)
    assert (workspace[1:], zeros) == (((1,), torch.uint8), ((256,), (1,), torch.uint8))  # the flag for lost bits
    assert workspace[0] == (2 * 32 * 64 * 2,)  # both sides in bf16
    assert all(offset % 256 == 0 for _, offset in made._inside)


def test_a_plan_holds_no_tensors(log: Log) -> None:
    for _ in range(2):
        x, w = ordinary(32, 64), ordinary(32, 64, seed=1)
        made = mx.matmul(mx.quantize(x, mx.mxfp4), mx.quantize(w, mx.mxfp4).T)
        alive = [weakref.ref(each) for each in (x, w, made)]
        del x, w, made, log[:]
        gc.collect()
        assert [each() for each in alive] == [None] * 3
    assert plan._plans


# --- how it is launched ------------------------------------------------------------------------------------


def test_whoever_asked_to_hear_of_launches_is_called(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    x = ordinary(8, 64)
    expected = mx.quantize(x, mx.mxfp4)
    runtime, hook = knobs.runtime, lambda metadata: None
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(hook)
        assert same(mx.quantize(x, mx.mxfp4), expected)
        chain.remove(hook)
    monkeypatch.setattr(runtime, "launch_enter_hook", hook)
    mx.quantize(x, mx.mxfp4)
    monkeypatch.setattr(runtime, "launch_enter_hook", None)
    mx.quantize(x, mx.mxfp4)
    assert [each.how for each in log] == ["by Triton"] * 3 + ["directly"]
    assert {each.stream for each in log} == {7}


def test_a_launcher_that_is_not_known_is_left_to_triton(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiled, "run", lambda self, grid, stream, *args: None)
    x = ordinary(8, 64)
    expected = mx.quantize(x, mx.mxfp4)
    assert same(mx.quantize(x, mx.mxfp4), expected)
    assert [each.how for each in log] == ["by Triton"]


@pytest.mark.parametrize("vendor", ["nvidia.driver.CudaLauncher", "amd.driver.HIPLauncher"])
def test_the_launchers_of_this_triton_are_known(vendor: str) -> None:
    *module, name = f"triton.backends.{vendor}".split(".")
    launcher = getattr(importlib.import_module(".".join(module)), name)
    compiled = SimpleNamespace(run=object.__new__(launcher), function=0, packed_metadata=())
    relaunch = Relaunch(compiled, 1, (), torch.device("cuda", 0))
    assert relaunch.directly() != relaunch.by_triton


def test_on_the_device_of_the_inputs_whichever_is_current(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = [3]
    entered = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted)
        current.append(wanted.index)
        yield
        current.pop()

    x = ordinary(8, 64)
    expected = mx.quantize(x, mx.mxfp4)
    monkeypatch.setattr(plan, "_current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    assert same(mx.quantize(x, mx.mxfp4), expected)
    assert entered == [x.device]
    assert len(log) == 1


# --- plans of several calls --------------------------------------------------------------------------------


def decoded_twice(x: torch.Tensor) -> list[torch.Tensor]:
    return [mx.dequantize(mx.quantize(mx.dequantize(mx.quantize(x, mx.mxfp8_e4m3)), mx.mxfp4))]


def test_calls_become_one_plan(log: Log) -> None:
    expected = decoded_twice(ordinary(8, 64))
    plan._plans.clear()
    for seed in (1, 0):
        (made,) = plan.traced(("twice",), [ordinary(8, 64, seed=seed)], decoded_twice)
    assert torch.equal(made, expected[0])
    assert [each.name for each in log] == ["quantize_kernel", "dequantize_kernel"] * 2
    assert len(plan._plans) == 1


@pytest.mark.parametrize(
    "between",
    [
        lambda x: [mx.dequantize(mx.quantize(x + 1, mx.mxfp4))],  # launched on what no plan made
        lambda x: [mx.dequantize(mx.quantize(x, mx.mxfp4)) + 1],  # returned
        lambda x: [mx.dequantize(mx.quantize(x, mx.mxfp4)).T],
        lambda x: [mx.dequantize(mx.quantize(x, mx.mxfp4))] * 2,
    ],
    ids=["before", "after", "turned", "twice"],
)
def test_other_work_between_them_makes_them_plans_apart(between: Callable[..., Any], log: Log) -> None:
    expected = between(ordinary(8, 64, seed=1))
    for seed in (0, 1, 0, 1):
        made = plan.traced(("between",), [ordinary(8, 64, seed=seed)], between)
    assert same(made, expected)
    assert sum(known is None for known in plan._plans.values()) == 1


def test_a_call_that_fails_leaves_no_plan_behind(log: Log) -> None:
    def fails(x: torch.Tensor) -> list[torch.Tensor]:
        mx.quantize(x, mx.mxfp4)
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            plan.traced(("fails",), [ordinary(8, 64)], fails)
    assert not plan._plans
    mx.quantize(ordinary(8, 64), mx.mxfp4)
    assert len(plan._plans) == 1


def test_threads_make_plans_of_their_own(log: Log) -> None:
    def with_another(x: torch.Tensor) -> list[torch.Tensor]:
        thread = threading.Thread(target=mx.quantize, args=(x, mx.mxfp6_e2m3))
        thread.start()
        thread.join()
        return [mx.quantize(x, mx.mxfp4).scale]

    for _ in range(2):
        plan.traced(("threads",), [ordinary(8, 64)], with_another)
    assert [each.tensors["codes_ptr"].shape for each in log] == [(8, 32)]
    assert len(plan._plans) == 2


# --- the layer ---------------------------------------------------------------------------------------------

LAYERS = {
    "mxfp4": RECIPES["mxfp4"],
    "kept weights": RECIPES["mxfp4"].replace(keep_weights=True),
    "one kept weight": RECIPES["mxfp6_mxfp4"].replace(weight_block="16x16", keep_weights=True),
}


def passes(recipe: Any, seed: int) -> list[torch.Tensor]:
    """What a layer's forward and backward give, from random numbers that start at `seed`."""
    torch.manual_seed(seed)
    x, w, b = (ordinary(*shape, seed=seed).requires_grad_() for shape in ((2, 16, 64), (32, 64), (32,)))
    y = linear(x, w, b, recipe=recipe)
    y.backward(ordinary(2, 16, 32, seed=seed + 3))
    with torch.no_grad():
        again = linear(x, w, b, recipe=recipe)
    return [y.detach(), x.grad, w.grad, b.grad, again, torch.get_rng_state()]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_same_bits_as_one_plan(name: str, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = LAYERS[name]
    passes(recipe, 0)
    assert {key[0] for key in plan._plans} == {"_output", "_data_gradient", "_weight_gradient"}
    del log[:]
    found = passes(recipe, 1)
    again = [(each.name, each.programs) for each in log]
    monkeypatch.setattr(layer_operand, "traced", lambda key, given, function: function(*given))
    plan._plans.clear()
    del log.first[:], log[:]
    assert same(found, passes(recipe, 1))
    replayed = [(each.name, each.programs) for each in log]  # where a call is like one before
    assert sorted(log.first + replayed) == sorted(again)


def test_results_may_be_changed_in_place(log: Log) -> None:
    """The first call's as well as those of replays: they are no views to autograd."""
    x, w, _ = inputs(0)
    w = w[:, : x.shape[1]].detach().requires_grad_()
    q = mx.quantize(ordinary(8, 64), mx.mxfp4)
    for _ in range(2):
        torch.relu_(linear(x, w)).sum().backward()
        with torch.no_grad():
            y, z = mx.matmul(q, q.T), linear(x, w)
        y.mul_(torch.ones(8, dtype=y.dtype, requires_grad=True))
        z.mul_(torch.ones(w.shape[0], dtype=z.dtype, requires_grad=True))


def test_recipes_with_other_work_are_no_plan(log: Log) -> None:
    for recipe in (RECIPES["bf16"], RECIPES["mxfp4"].replace(forward=Product(mx.mxfp4, mx.mxfp4, hadamard=16))):
        linear(ordinary(8, 64), ordinary(16, 64), recipe=recipe)
    assert not any(key[0] == "_output" for key in plan._plans)
