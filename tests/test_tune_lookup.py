"""Which config serves: the order of places, pins, recordings, stamps, ranks, and what a lookup costs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
import timeit
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_imports import MODULES, PACKAGE, imports
from tuned import A100, B200, DEVICE, GH200, H100, H200, PROBLEM, RULE, cast, entry, forget, found, install, keep, ship

import mxkernels as mx
from mxkernels import gpu, report, tune
from mxkernels.bench import config_source
from mxkernels.folded import folded_spec
from mxkernels.ops import paths
from mxkernels.tune import location, lookup, source, stamp

pytestmark = pytest.mark.filterwarnings("error")
Become = Callable[[tune.Stamp], None]


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Become]:
    yield install(monkeypatch, tmp_path)
    monkeypatch.undo()
    forget()


def test_the_order(fake_gpu: Become) -> None:
    """Each place goes before those that were there already."""
    assert found() == tune.Choice(RULE, "rule")
    ship(A100, {PROBLEM.key: entry(cast(1))})  # of another architecture
    assert found().origin == "rule"
    ship(H100, {PROBLEM.key: entry(cast(2))})
    assert found() == tune.Choice(cast(2), "nearest (NVIDIA H100 PCIe)")
    ship(GH200, {PROBLEM.key: entry(cast(3))})
    assert found() == tune.Choice(cast(3), "nearest (NVIDIA GH200)")
    ship(H200, {PROBLEM.key: entry(cast(4))})
    assert found() == tune.Choice(cast(4), "shipped")
    path = tune.store({PROBLEM.key: entry(cast(5))}, H200)
    assert found() == tune.Choice(cast(5), "cache")
    with tune.pinned("quantize", cast(6)):
        assert found() == tune.Choice(cast(6), "pinned")
    assert found() == tune.Choice(cast(5), "cache")
    tune.remove(path)
    assert found() == tune.Choice(cast(4), "shipped")


def test_each_place_serves_the_problems_that_it_has(fake_gpu: Become) -> None:
    other = replace(PROBLEM, shape=(4096, 8192))
    ship(H200, {PROBLEM.key: entry(cast(1))})
    ship(H100, {PROBLEM.key: entry(cast(2)), other.key: entry(cast(3))})
    tune.store({replace(PROBLEM, dtype="float32").key: entry(cast(4))}, H200)
    assert found() == tune.Choice(cast(1), "shipped")
    assert found(other) == tune.Choice(cast(3), "nearest (NVIDIA H100 PCIe)")
    assert found(replace(other, layout="columns")).origin == "rule"


def test_the_first_dimension_counts_as_the_next_power_of_two(fake_gpu: Become) -> None:
    tune.store({PROBLEM.key: entry(cast(1))}, H200)
    assert {found(replace(PROBLEM, shape=(rows, 4096))).origin for rows in (2049, 3000, 4096)} == {"cache"}
    assert {found(replace(PROBLEM, shape=(rows, 4096))).origin for rows in (2048, 4097)} == {"rule"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_a_gpu_the_rule_serves_and_nothing_is_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "sources", None)
    assert found(device=torch.device(device)) == tune.Choice(RULE, "rule")


def test_tables_are_read_once(fake_gpu: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    load = source.load
    monkeypatch.setattr(source, "load", lambda path: read.append(path.name) or load(path))
    tune.store({PROBLEM.key: entry(cast(1))}, H200)
    ship(H100, {PROBLEM.key: entry(cast(2))})
    for rows in range(1, 50):
        found(replace(PROBLEM, shape=(rows, 4096)))
    with tune.pinned("fold", cast(0)), tune.recording():
        found()
    assert sorted(read) == ["nvidia-h100-pcie.json", "nvidia-h200.json"]


def test_a_warm_lookup_takes_microseconds(fake_gpu: Become) -> None:
    """2 us are the goal; four times that leaves room for a machine that does something else as well."""
    tune.store({PROBLEM.key: entry(cast(1))}, H200)
    for problem in (PROBLEM, replace(PROBLEM, shape=(1, 1))):
        seconds = timeit.repeat(lambda problem=problem: found(problem), number=1000, repeat=20)
        assert min(seconds) / 1000 < 8e-6


def test_what_is_known_does_not_grow_without_end(fake_gpu: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_MOST_KNOWN", 10)
    for rows in range(1, 100):
        found(replace(PROBLEM, shape=(rows, 4096)))
    assert len(lookup._known) <= 10


# --- configs that cannot serve -----------------------------------------------------------------------------


def test_a_config_that_the_op_cannot_take_is_passed_over(fake_gpu: Become) -> None:
    """The next place serves."""
    problem = tune.Problem("multiply", "bfloat16 * bfloat16", "bfloat16", "turned * straight", (4096, 4096, 4096))
    rule = tune.MatmulConfig(64, 64, 64, 4, 3)
    hopper, plain = tune.HopperConfig(128, 1, 4), tune.MatmulConfig(128, 128, 64, 8, 3)
    keep(problem, hopper)
    ship(H200.here("multiply"), {problem.key: entry(plain)})

    def choose(serves: Callable[[tune.Config], bool] | None) -> tune.Choice:
        lookup._known.clear()
        return tune.find_config(problem, DEVICE, lambda: rule, serves)

    assert choose(None) == tune.Choice(hopper, "cache")
    assert choose(lambda config: isinstance(config, tune.MatmulConfig)) == tune.Choice(plain, "shipped")
    assert choose(lambda config: config.group_m == 1) == tune.Choice(rule, "rule")


def test_the_hopper_kernel_is_not_asked_for_what_it_cannot_do(
    fake_gpu: Become, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the output that are not whole 16 bytes, operands that lie turned, and GPUs of another kind."""
    config = tune.HopperConfig(128, 1, 4)

    def choice(n: int, turned: tuple[bool, bool] = (False, False)) -> tune.Choice:
        bf16 = torch.bfloat16
        with tune.recording() as seen:
            paths.carrier_choice(4096, n, 512, (bf16, bf16), bf16, DEVICE, turned)
        for problem in seen:
            keep(problem, config, tune.Stamp.of(DEVICE, problem.op))
        return paths.carrier_choice(4096, n, 512, (bf16, bf16), bf16, DEVICE, turned)

    assert choice(4096) == tune.Choice(config, "cache")
    assert choice(4097).origin == "rule"
    assert choice(4096, (False, True)).origin == "rule"
    fake_gpu(A100)
    assert choice(4096).origin == "rule"


def test_a_program_has_only_so_much_shared_memory(fake_gpu: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tune.Problem("multiply", "bfloat16 * bfloat16", "bfloat16", "straight * straight", (64, 64, 64))
    keep(problem, tune.MatmulConfig(256, 128, 64, 8, 4))
    assert found(problem).origin == "cache"
    monkeypatch.setattr(lookup, "_shared_bytes", lambda device: 101376)
    lookup._known.clear()
    assert found(problem).origin == "rule"


# --- configs that do not compile ---------------------------------------------------------------------------


def launch(failing: dict[tune.Config, Exception], problem: tune.Problem = PROBLEM) -> tune.Config:
    """As `ops` launches what it has not launched before: it looks the config up, and launches. The second launch needs
    another config, which always compiles."""

    def run() -> tune.Config:
        config = found(problem).config
        if config in failing:
            raise failing[config]
        found(replace(problem, layout="columns"))
        return config

    return tune.first_launch(run)


def compiler_errors() -> list[Exception]:
    errors = pytest.importorskip("triton.runtime.errors", reason="the compiler is Triton's")
    from triton.compiler.errors import CompilationError

    return [
        errors.OutOfResources(303104, 232448, "shared memory"),
        errors.PTXASError("Internal Triton PTX codegen error\n" + "much\n" * 1000),
        CompilationError("def kernel():\n    pass", None, "wrong"),
        RuntimeError("PassManager::run failed"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_config_that_does_not_compile_is_left_out_with_one_warning(fake_gpu: Become, number: int) -> None:
    """What comes next serves: another table's, and at last the rule's."""
    error = compiler_errors()[number]
    keep(PROBLEM, cast(1))
    ship(H200, {PROBLEM.key: entry(cast(2))})
    with pytest.warns(UserWarning, match="the config for quantize .* is left out: ") as caught:
        assert launch({cast(1): error}) == cast(2)
    (warning,) = caught
    assert f"{cast(1)} (origin: cache); {type(error).__name__}: " in str(warning.message)
    assert len(str(warning.message)) < 500
    assert launch({cast(1): error}) == cast(2)  # a second warning would be an error
    with pytest.warns(UserWarning, match=r"\(origin: shipped\)"):
        assert launch({cast(1): error, cast(2): error}, replace(PROBLEM, shape=(4000, 4096))) == RULE
    forget()
    assert found() == tune.Choice(RULE, "rule")


def test_other_configs_and_other_errors_are_raised(fake_gpu: Become) -> None:
    error = compiler_errors()[0]
    with pytest.raises(type(error)):
        launch({RULE: error})
    keep(PROBLEM, cast(1))
    with pytest.raises(ZeroDivisionError):
        launch({cast(1): ZeroDivisionError()})
    with tune.pinned("quantize", cast(3)), pytest.raises(type(error)):
        launch({cast(3): error})
    with pytest.raises(type(error)):
        tune.first_launch(lambda: (_ for _ in ()).throw(error))
    assert found().origin == "cache"
    assert not lookup._first.met


def test_threads_blame_their_own_configs(fake_gpu: Become) -> None:
    """A config that another thread meets in the middle of a first launch is not left out for what this one meets."""
    other = replace(PROBLEM, shape=(1, 4096))
    keep(PROBLEM, cast(1))
    keep(other, cast(2))

    def make() -> str:
        origin = found().origin
        thread = threading.Thread(target=lambda: tune.first_launch(lambda: found(other)))
        thread.start()
        thread.join()
        if origin == "cache":
            raise compiler_errors()[0]
        return origin

    with pytest.warns(UserWarning, match="is left out"):
        assert tune.first_launch(make) == "rule"
    assert found(other).origin == "cache"


def test_launches_are_forgotten_where_a_config_is_left_out(fake_gpu: Become) -> None:
    """Those of other numbers of rows, which share it."""
    from mxkernels.ops import plan

    keep(PROBLEM, cast(1))
    plan._plans["a key"] = None
    with pytest.warns(UserWarning, match="is left out"):
        launch({cast(1): compiler_errors()[0]})
    assert not plan._plans


# --- pins and recordings -----------------------------------------------------------------------------------


def test_a_pin_for_a_problem_goes_before_one_for_its_op(fake_gpu: Become) -> None:
    other = replace(PROBLEM, shape=(1, 4096))
    with tune.pinned("quantize", cast(1)):
        with tune.pinned(PROBLEM, cast(2)), tune.pinned("quantize", cast(3)):
            assert (found().config, found(other).config) == (cast(2), cast(3))
        assert (found().config, found(other).config) == (cast(1), cast(1))
    assert found().origin == "rule"


def test_a_pin_ends_with_an_error(fake_gpu: Become) -> None:
    with pytest.raises(KeyError), tune.pinned("quantize", cast(1)):
        raise KeyError
    assert found().origin == "rule"


def test_a_pin_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="where is 'quantise'; allowed: a Problem, or an op: quantize, "):
        tune.pinned("quantise", cast(1)).__enter__()
    with pytest.raises(TypeError, match="config is a CastConfig; allowed for multiply: MatmulConfig or HopperConfig"):
        tune.pinned("multiply", cast(1)).__enter__()
    with tune.pinned("quantize", tune.CastConfig(1, 16, 1)):
        with pytest.raises(ValueError, match="cannot serve: tile_cols is 16; allowed: powers of two from 32"):
            found(device=torch.device("cpu"))
    bf16, cpu = torch.bfloat16, torch.device("cpu")
    with tune.pinned("multiply", tune.HopperConfig(128, 1, 4)):
        with pytest.raises(ValueError, match="cannot serve it"):
            paths.carrier_choice(64, 64, 64, (bf16, bf16), bf16, cpu, (False, False))


@pytest.mark.parametrize(("left", "right"), [("e2m1 1x32", "e2m1 1x32"), ("e4m3 1x32", "e2m1 1x16")])
def test_a_block_scaled_product_is_explained(fake_gpu: Become, left: str, right: str) -> None:
    """By the config that its launch asks for, and its origin."""
    pytest.importorskip("triton", reason="the rule stands beside its kernel")
    from mxkernels.ops.matmul_native_kernel import matmul_native_launch
    from mxkernels.ops.native_operand import native_operand
    from mxkernels.ops.operand import Operand

    fake_gpu(B200)
    meta, capabilities = torch.device("meta"), gpu.capabilities("sm_100")
    m, n, k = 512, 768, 1024

    def side(text: str, rows: int) -> Operand:
        spec = mx.MXSpec(*text.split())
        return Operand(torch.ops.mxkernels.quantize(torch.empty(rows, k, device=meta), str(spec), None), rows, spec)

    a, b = side(left, m), side(right, n)
    with tune.recording() as explained:
        explanation = paths.explanation(a, b, k, DEVICE, "auto")
    assert explanation.path == "native"
    assert f"{explanation.config} (origin: rule)" in str(explanation)
    sides = []
    for operand, fold in zip((a, b), paths.native_folds(a, b, capabilities), strict=True):
        spec = folded_spec(operand.spec) if fold else operand.spec
        codes = torch.empty(operand.rows, spec.packed_cols(k), dtype=torch.uint8, device=meta)
        scale = operand.parts[1]
        sides.append(native_operand(codes, scale, spec, k, True, scale[:, 0] if fold else None))
    out = torch.empty(m, n, dtype=torch.bfloat16, device=meta)
    with tune.recording() as launched:
        matmul_native_launch(sides[0], sides[1], None, None, out, capabilities=capabilities)
    assert launched == explained
    (problem,) = explained
    config = replace(explanation.config, num_stages=2)
    keep(problem, config, B200)
    explanation = paths.explanation(a, b, k, DEVICE, "auto")
    assert (explanation.config, explanation.origin) == (config, "cache")


def test_recordings_nest(fake_gpu: Become) -> None:
    other = replace(PROBLEM, shape=(1, 4096))
    with tune.recording() as outer:
        found()
        with tune.recording() as inner:
            found(other)
        with tune.pinned("quantize", cast(1)):
            found()
    found(replace(PROBLEM, shape=(2, 4096)))
    assert inner == {other: tune.Choice(RULE, "rule")}
    assert outer == {PROBLEM: tune.Choice(cast(1), "pinned"), other: tune.Choice(RULE, "rule")}


def test_the_benchmark_names_the_origins(fake_gpu: Become) -> None:
    """Of the launches of one call, each once."""
    other = replace(PROBLEM, shape=(1, 4096))
    tune.store({PROBLEM.key: entry(cast(1))}, H200)
    assert config_source(lambda: (found(), found())) == "cache"
    third = replace(PROBLEM, shape=(2, 4096))
    assert config_source(lambda: (found(other), found(), found(third))) == "rule + cache"
    assert config_source(lambda: None) == "reference"


def test_launches_are_forgotten_when_configs_change(fake_gpu: Become) -> None:
    """`ops` remembers launches, and so the configs that they were made with."""
    from mxkernels.ops import plan

    def forgotten(change: Callable[[], object]) -> bool:
        plan._plans["a key"] = None
        change()
        return not plan._plans

    assert forgotten(lambda: tune.store({}, H200))
    assert forgotten(lambda: tune.remove(tune.cache_path(H200)))
    pin = tune.pinned("quantize", cast(1))
    assert forgotten(pin.__enter__)
    assert forgotten(lambda: pin.__exit__(None, None, None))
    seen = tune.recording()
    assert forgotten(seen.__enter__)
    seen.__exit__(None, None, None)
    assert not forgotten(found)
    plan._plans.clear()


# --- stamps ------------------------------------------------------------------------------------------------

DIFFERENCES = {
    "triton": "3.0.0",
    "kernels": "0123456789abcdef",
    "sm_count": 16,
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_cache_of_another_stamp_is_left_out_with_one_warning(fake_gpu: Become, name: str) -> None:
    path = tune.store({PROBLEM.key: entry(cast(1))}, replace(H200, **{name: DIFFERENCES[name]}))
    words = f"{name} {DIFFERENCES[name]}, not {getattr(H200, name)}; `mxkernels tune`"
    with pytest.warns(UserWarning, match=words) as caught:
        assert found().origin == "rule"
    assert str(path) in str(caught[0].message)
    forget()
    assert found(replace(PROBLEM, shape=(1, 4096))).origin == "rule"  # a second warning would be an error


def test_a_terminal_obeys_no_stamp_of_a_file(fake_gpu: Become) -> None:
    """Which a warning says, if it is another's: here one that would clear the screen."""
    tune.store({PROBLEM.key: entry(cast(1))}, replace(H200, triton="\x1b[2J"))
    with pytest.warns(UserWarning, match=r"triton \\x1b\[2J, not "):
        assert found().origin == "rule"


def test_environments_share_a_file(fake_gpu: Become) -> None:
    """Each has its section, and no warning because of the other's."""
    tune.store({PROBLEM.key: entry(cast(1))}, replace(H200, triton="3.0.0"))
    tune.store({PROBLEM.key: entry(cast(2))}, H200)
    assert found() == tune.Choice(cast(2), "cache")


@pytest.mark.parametrize("name", ["triton", "kernels"])
@pytest.mark.parametrize("stamp", [H200, H100], ids=["its own", "another"])
def test_shipped_tables_of_another_stamp_are_left_out_quietly(fake_gpu: Become, name: str, stamp: tune.Stamp) -> None:
    ship(replace(stamp, **{name: DIFFERENCES[name]}), {PROBLEM.key: entry(cast(1))})
    assert found().origin == "rule"
    (sentence,) = tune.left_out(DEVICE)
    assert "1 of quantize in " in sentence
    assert f"measured with {name} {DIFFERENCES[name]}, not" in sentence
    assert f"configs    not used: {sentence}" in report.configs_text(DEVICE)


def test_another_gpu_of_the_same_name_is_the_nearest(fake_gpu: Become) -> None:
    ship(replace(H200, sm_count=66), {PROBLEM.key: entry(cast(1))})
    assert found().origin == "nearest (NVIDIA H200)"


def test_what_serves_a_gpu_is_told(fake_gpu: Become) -> None:
    assert report.configs_text(DEVICE) == "configs    rule: for all other problems"
    cache = tune.store({PROBLEM.key: entry(cast(1))}, H200)
    shipped = ship(H100, {PROBLEM.key: entry(cast(1))})
    assert report.configs_text(DEVICE).splitlines() == [
        f"configs    cache: 1 in {cache}",
        f"configs    nearest (NVIDIA H100 PCIe): 1 in {shipped}",
        "configs    rule: for all other problems",
    ]


@pytest.fixture
def sources_of_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of the package, whose files are hashed."""
    copy = tmp_path / "mxkernels"
    for path in stamp._PACKAGE.rglob("*.py"):
        (copy / path.relative_to(stamp._PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(stamp._PACKAGE)).write_bytes(path.read_bytes())
    monkeypatch.setattr(stamp, "_PACKAGE", copy)
    yield copy
    monkeypatch.undo()
    forget_sources()


def forget_sources() -> None:
    stamp.kernels_hash.cache_clear()
    forget()


def hashes() -> dict[str, str]:
    stamp.kernels_hash.cache_clear()
    return {op: stamp.kernels_hash(op) for op in tune.OPS}


ALL = set(tune.OPS)


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("formats.py", ALL),
        ("ops/primitives.py", ALL),
        ("ops/tiles.py", ALL),
        ("ops/quantize_kernel.py", {"quantize", "quantize_pair", "fold", "quantize_fold"}),
        ("ops/elements.py", {"quantize", "quantize_pair", "fold", "quantize_fold"}),
        ("ops/quantize_pair_kernel.py", {"quantize_pair"}),
        ("ops/dequantize_kernel.py", {"dequantize"}),
        ("ops/fold_kernel.py", {"fold", "quantize_fold"}),
        ("ops/matmul_kernel.py", {"multiply", "stream", "decode_multiply", "native"}),
        ("ops/matmul_hopper_kernel.py", {"multiply"}),
        ("ops/matmul_small_kernel.py", {"stream"}),
        ("ops/matmul_wide_kernel.py", {"decode_multiply"}),
        ("ops/matmul_native_kernel.py", {"native"}),
        ("ops/paths.py", set()),
    ],
)
def test_the_hash_of_an_ops_kernels(sources_of_kernels: Path, name: str, ops: set[str]) -> None:
    """Of the sources that make them, whatever their ends of lines, and of nothing else."""
    before, text = hashes(), (sources_of_kernels / name).read_bytes()
    (sources_of_kernels / name).write_bytes(text.replace(b"\n", b"\r\n"))
    assert hashes() == before
    (sources_of_kernels / name).write_bytes(text + b"#")
    after = hashes()
    assert {op for op in ALL if before[op] != after[op]} == ops


# The modules where an op's launches are made.
LAUNCHES = {
    "quantize": ["quantize_kernel"],
    "quantize_pair": ["quantize_pair_kernel", "quantize_kernel"],
    "dequantize": ["dequantize_kernel"],
    "fold": ["fold_kernel"],
    "quantize_fold": ["fold_kernel"],
    "multiply": ["matmul_kernel", "matmul_hopper_kernel"],
    "stream": ["matmul_small_kernel"],
    "decode_multiply": ["matmul_wide_kernel"],
    "native": ["matmul_native_kernel"],
}


@pytest.mark.parametrize("op", tune.OPS)
def test_no_source_of_a_kernel_is_missing(op: str) -> None:
    """What the modules of an op's launches import, and what that imports, wherever it has code for the GPU."""
    found, waiting = set(), [f"mxkernels.ops.{name}" for name in LAUNCHES[op]]
    while waiting:
        name = waiting.pop()
        if name in MODULES and name not in found and has_device_code(name):
            found.add(name)
            waiting += imports(name)
    files = {MODULES[name].relative_to(PACKAGE).as_posix() for name in found}
    assert files <= set(stamp.kernel_sources(op))
    assert {f"ops/{name}.py" for name in LAUNCHES[op]} <= files


def has_device_code(name: str) -> bool:
    """Whether a module has functions for the GPU; or is the one whose tables they are made by."""
    return name == "mxkernels.formats" or any(
        isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list)
        for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8")))
    )


def test_an_edit_of_one_kernel_leaves_the_others_their_configs(fake_gpu: Become, sources_of_kernels: Path) -> None:
    """And the warning, which comes when the op is met, speaks of it alone."""
    forget_sources()
    fold = tune.Problem("fold", PROBLEM.formats, "float8_e5m2", "straight", PROBLEM.shape)
    for problem in (PROBLEM, fold):
        keep(problem, cast(1), tune.Stamp.of(DEVICE, problem.op))
    assert (found().origin, found(fold).origin) == ("cache", "cache")
    path = sources_of_kernels / "ops/fold_kernel.py"
    path.write_bytes(path.read_bytes() + b"#")
    forget_sources()
    assert found().origin == "cache"
    with pytest.warns(UserWarning, match=r"nvidia-h200\.json is left out for fold: measured with kernels "):
        assert found(fold).origin == "rule"
    (sentence,) = tune.left_out(DEVICE)
    assert sentence.startswith("1 of fold in ")
    assert [(each.origin, list(each.entries)) for each in tune.serving(DEVICE)] == [("cache", [PROBLEM.key])]


def test_a_section_without_entries_silences_no_warning(fake_gpu: Become) -> None:
    stale = replace(H200, kernels="0123456789abcdef")
    path = tune.store({PROBLEM.key: entry(cast(1))}, stale)
    value = json.loads(path.read_text())
    value["sections"].append({**vars(H200), "entries": {}})
    path.write_text(json.dumps(value))
    tune.store({}, H200)
    with pytest.warns(UserWarning, match="is left out for quantize"):
        assert found().origin == "rule"


def test_the_warning_speaks_only_of_an_op_that_has_configs(fake_gpu: Become) -> None:
    tune.store({PROBLEM.key: entry(cast(1))}, replace(H200, kernels="0123456789abcdef"))
    assert found(replace(PROBLEM, op="dequantize")).origin == "rule"  # a warning would be an error


# --- caches that cannot be used ----------------------------------------------------------------------------


def test_a_broken_cache_is_left_out_with_one_warning(fake_gpu: Become) -> None:
    path = tune.cache_path(H200)
    path.parent.mkdir()
    path.write_text("no table")
    ship(H200, {PROBLEM.key: entry(cast(1))})
    with pytest.warns(UserWarning, match=r"nvidia-h200\.json is no table of configs: .*`mxkernels tune`"):
        assert found().origin == "shipped"
    forget()
    assert found().origin == "shipped"  # a second warning would be an error
    assert path.read_text() == "no table"


def test_an_entry_that_cannot_serve_is_left_out_with_a_warning(fake_gpu: Become) -> None:
    good = replace(PROBLEM, shape=(1, 4096))
    path = tune.store({PROBLEM.key: entry(cast(1)), good.key: entry(cast(2))}, H200)
    value = json.loads(path.read_text())
    value["sections"][0]["entries"][PROBLEM.key]["config"]["num_warps"] = 3
    path.write_text(json.dumps(value))
    forget()
    with pytest.warns(UserWarning, match="has an entry that is left out: .* num_warps is 3; allowed: 1, 2, 4, 8, 16"):
        assert found().origin == "rule"
    assert found(good).origin == "cache"


def test_a_shipped_table_that_is_broken_is_left_out(fake_gpu: Become) -> None:
    ship(H100, {PROBLEM.key: entry(cast(1))})
    (location.SHIPPED / "broken.json").write_text("[")
    forget()
    with pytest.warns(UserWarning, match="it came with mxkernels"):
        assert found().origin == "nearest (NVIDIA H100 PCIe)"


def test_without_platformdirs_there_is_no_cache(fake_gpu: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    tune.store({PROBLEM.key: entry(cast(1))}, H200)
    assert found().origin == "cache"  # MXKERNELS_CACHE says where
    monkeypatch.delenv(location.VARIABLE)
    forget()
    assert found().origin == "rule"
    with pytest.raises(tune.TableError, match="install platformdirs, or set MXKERNELS_CACHE"):
        tune.store({PROBLEM.key: entry(cast(1))}, H200)


def test_the_platforms_place_for_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.delenv(location.VARIABLE, raising=False)
    assert tune.cache_directory() == platformdirs.user_cache_path("mxkernels", appauthor=False)


# --- many ranks --------------------------------------------------------------------------------------------


def test_among_ranks_the_cache_waits_until_it_is_shared(fake_gpu: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.store({PROBLEM.key: entry(cast(1))}, H200)
    ship(H100, {PROBLEM.key: entry(cast(2))})
    monkeypatch.setenv("WORLD_SIZE", "8")
    forget()
    with pytest.warns(UserWarning, match=r"caches may differ; mxkernels\.tune\.share\(\)") as caught:
        assert found() == tune.Choice(cast(2), "nearest (NVIDIA H100 PCIe)")
    assert len(caught) == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    forget()
    assert found() == tune.Choice(cast(1), "cache")


def test_one_process_shares_with_nobody(fake_gpu: Become) -> None:
    tune.share()
    tune.store({PROBLEM.key: entry(cast(1))}, H200)
    assert found() == tune.Choice(cast(1), "cache")


def run_ranks(tmp_path: Path, second: str) -> list[list[str]]:
    """The lines that two processes print, whose caches differ; the second has the GPU named."""
    script = Path(__file__).with_name("tuned_rank.py")
    folders = [str(Path(mx.__file__).parents[1]), str(script.parent), os.environ.get("PYTHONPATH", "")]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), gpu_name, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        )
        for rank, gpu_name in enumerate(("H200", second))
    ]
    answers = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    return [out.splitlines() for out, _ in answers]


def test_ranks_share_the_first_ones_cache(tmp_path: Path) -> None:
    """Rank 0 has a config, rank 1 another and one more; shared is what rank 0 had then, until they part, and not
    when they join each other anew, whether or not something was looked up in between."""
    same = ["joined: rule, rule", "shared: cache 1, rule", "stored: cache 1, rule", "again: cache 3, rule"]
    anew = ["joined anew: rule, rule", "joined at once: rule, rule"]
    assert run_ranks(tmp_path, "H200") == [
        ["alone: cache 1, rule", *same, "parted: cache 3, rule", *anew],
        ["alone: cache 2, cache 2", *same, "parted: cache 3, cache 2", *anew],
    ]


def test_ranks_that_differ_share_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, "H100")
    assert first[2].startswith("shared: rank 1 has ")
    assert first[2] == second[2]
    assert "NVIDIA H100" in first[2]
    assert "NVIDIA H200" in first[2]
