"""Tables of configs as files: what is in them, and what happens to them when much goes wrong."""

from __future__ import annotations

import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned import H100, H200, PROBLEM, SPEC, cast, entry, forget, install

from mxkernels import gpu, problems, tune
from mxkernels.formats import FORMATS
from mxkernels.spec import MXSpec
from mxkernels.tune import location, table
from mxkernels.tune.problem import impossibility

OTHER = replace(PROBLEM, shape=(1, 4096))
FP8 = tune.Problem("multiply", "float8_e5m2 * float8_e5m2", "bfloat16", "straight * straight", (8192, 8192, 8192))


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    install(monkeypatch, tmp_path)
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.json"


def stored(path: Path, stamp: tune.Stamp = H200) -> dict[str, tune.Entry]:
    table = tune.load(path)
    parts = [table.entries(stamp, op) for op in tune.OPS]
    assert not any(faults for _, faults in parts)
    return {key: each for entries, _ in parts for key, each in entries.items()}


# --- what is in them ---------------------------------------------------------------------------------------


def test_what_is_stored_comes_back(path: Path) -> None:
    """Configs of every type."""
    stream = tune.Problem("stream", SPEC, "bfloat16", "prepared", (16, 8192, 8192))
    entries = {
        PROBLEM.key: tune.Entry(tune.CastConfig(16, 256, 4, True, True), 2.5, 1.25, "2026-11-22"),
        FP8.key: tune.Entry(tune.HopperConfig(128, 2, 4, 2, 8), 2, 1, "2026-11-22"),
        replace(FP8, layout="turned * straight").key: entry(tune.MatmulConfig(128, 128, 128, 8, 3, 4, 512)),
        stream.key: entry(tune.SmallMatmulConfig(128, 128, 8, 4, 3)),
    }
    assert tune.store(entries, H200, path) == path
    assert stored(path) == entries
    assert tune.load(path.with_name("absent.json")) == tune.Table()
    tune.store({}, H100, path)
    assert list(tune.load(path).sections) == [H200]  # none without entries


def test_the_file(path: Path) -> None:
    """Sorted, a line an entry."""
    tune.store({PROBLEM.key: entry(cast(0)), FP8.key: entry(tune.HopperConfig(128, 2, 4, 2, 8))}, H200, path)
    tune.store({PROBLEM.key: entry(cast(1))}, H100, path)
    stamp = f'"triton": "{H200.triton}", "kernels": "{H200.kernels}"'
    times = '"after_us": 1.0, "before_us": 2.0, "config": {'
    config = (
        '"num_warps": 4, "run": 1, "square": false, "tile_cols": 32, "tile_rows": %d, '
        '"type": "CastConfig", "wide": false}'
    )
    key = f"quantize | {SPEC} | bfloat16 | rows | 4096x4096"
    multiply = "multiply | float8_e5m2 * float8_e5m2 | bfloat16 | straight * straight | 8192x8192x8192"
    hopper = '"cols": 128, "group_m": 8, "pieces": 2, "promote": 2, "stages": 4, "type": "HopperConfig"}'
    assert path.read_text().splitlines() == [
        '{"sections": [',
        f'{{"gpu": "NVIDIA H100 PCIe", "architecture": "sm_90", "sm_count": 114, {stamp}, "entries": {{',
        f'  "{key}": {{{times}{config % 2}, "date": "2026-11-22"}}',
        "}}",
        f', {{"gpu": "NVIDIA H200", "architecture": "sm_90", "sm_count": 132, {stamp}, "entries": {{',
        f'  "{multiply}": {{{times}{hopper}, "date": "2026-11-22"}},',
        f'  "{key}": {{{times}{config % 1}, "date": "2026-11-22"}}',
        "}}",
        "]}",
    ]
    before = path.read_bytes()
    tune.store({}, H200, path)
    assert path.read_bytes() == before


def test_entries_are_merged(path: Path) -> None:
    """The same stamp and key is replaced, everything else stays, even what means nothing here."""
    tune.store({PROBLEM.key: entry(cast(1)), OTHER.key: entry(cast(2))}, H200, path)
    future = {"a key of another version": {"config": {"type": "LaterConfig"}, "more": 1}}
    value = json.loads(path.read_text())
    stamp = {"gpu": "NVIDIA H200", "architecture": "sm_90", "sm_count": 132, "triton": "9.0", "kernels": "later"}
    value["sections"].append({**stamp, "entries": future})
    path.write_text(json.dumps(value))
    tune.store({PROBLEM.key: entry(cast(3))}, H200, path)
    assert stored(path) == {PROBLEM.key: entry(cast(3)), OTHER.key: entry(cast(2))}
    assert tune.load(path).sections[tune.Stamp(**stamp)] == future


def test_the_names_of_files() -> None:
    assert tune.cache_path(H200).name == "nvidia-h200.json"
    assert location.table_name("NVIDIA GeForce RTX 5090 (Laptop)") == "nvidia-geforce-rtx-5090-laptop.json"
    assert location.table_name("../../AMD Instinct™ MI355X") == "amd-instinct-mi355x.json"


def test_shipped_tables_are_sound() -> None:
    """Whether they are up to date the tuner's records say; what they hold must be well-formed and able to serve."""
    for path in sorted((Path(tune.__file__).parent / "configs").glob("*.json")):
        found = tune.load(path)
        assert found.sections
        for stamp, section in found.sections.items():
            assert path.name == location.table_name(stamp.gpu)
            for key, value in section.items():
                table.Entry.of_json(key, value)
        assert path.read_text(encoding="utf-8") == found.text()


# --- entries that cannot serve -----------------------------------------------------------------------------


def change(path: Path, problem: tune.Problem, config: tune.Config, values: dict[str, Any]) -> list[str]:
    """Store an entry, change its file by hand, and read it: the faults."""
    tune.store({problem.key: entry(config)}, H200, path)
    value = json.loads(path.read_text())
    found = value["sections"][0]["entries"].pop(problem.key)
    for name, each in values.items():
        place = found["config"] if name in found["config"] or name == "extra" else found
        if each is None:
            place.pop(name)
        else:
            place[name] = each
    value["sections"][0]["entries"][found.pop("key", problem.key)] = found
    path.write_text(json.dumps(value))
    read = tune.load(path)
    ops = {op for _, op, _ in read.parts()}
    assert not any(read.entries(H200, op)[0] for op in ops)
    return [fault for op in ops for fault in read.entries(H200, op)[1]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_warps": 3}, "num_warps is 3; allowed: 1, 2, 4, 8, 16"),
        ({"num_warps": 10**30}, "num_warps is 1000"),
        ({"num_warps": "4"}, "num_warps is '4'; allowed: int"),
        ({"num_warps": 4.0}, "num_warps is 4.0; allowed: int"),
        ({"num_warps": True}, "num_warps is True; allowed: int"),
        ({"wide": 1}, "wide is 1; allowed: bool"),
        ({"tile_rows": 0}, "tile_rows is 0; allowed: powers of two from 1"),
        ({"tile_rows": -4}, "tile_rows is -4"),
        ({"tile_cols": 48}, "tile_cols is 48; allowed: powers of two from 32"),
        ({"tile_cols": 16}, "tile_cols is 16; allowed: powers of two from 32"),
        ({"tile_rows": 8192, "tile_cols": 8192}, "tile_rows * tile_cols is 67108864"),
        ({"tile_rows": None}, "tile_rows"),
        ({"extra": 1}, "extra"),
        ({"type": "HopperConfig"}, "unexpected keyword argument"),
        (
            {"type": "Path"},
            "type 'Path'; allowed: CastConfig, PairConfig, MatmulConfig, HopperConfig, SmallMatmulConfig",
        ),
        ({"type": 3}, "type 3; allowed"),
        ({"config": "CastConfig"}, "type None; allowed"),
        ({"before_us": "2"}, "before_us is '2'; allowed: microseconds"),
        ({"after_us": -1.0}, "after_us is -1.0"),
        ({"date": None}, "allowed: config, before_us, after_us, date"),
        ({"date": 5}, "date is 5; allowed: a day as YYYY-MM-DD, such as 2026-11-22"),
        ({"date": ""}, "date is ''; allowed"),
        ({"date": "20261122"}, "date is '20261122'; allowed"),
        ({"date": "2026-W47-7"}, "date is '2026-W47-7'; allowed"),  # a Sunday, to Python 3.11
        ({"date": "2026-13-01"}, "date is '2026-13-01'; allowed"),
        ({"date": "2026-11-22T10:00:00"}, "allowed: a day"),
        ({"date": "\x1b[31m"}, r"date is '\x1b[31m'; allowed"),
        ({"key": "quantize"}, "'quantize' is no key"),
        ({"key": PROBLEM.key.replace("quantize", "eval")}, "is no key"),
        ({"key": PROBLEM.key.replace("4096x4096", "4000x4096")}, "is no key"),
        ({"key": PROBLEM.key.replace("4096x4096", "4096x-1")}, "is no key"),
        ({"key": PROBLEM.key.replace("e2m1", "e9m9")}, "element is 'e9m9'"),
    ],
)
def test_casts_that_cannot_serve(path: Path, values: dict[str, Any], words: str) -> None:
    (fault,) = change(path, PROBLEM, tune.CastConfig(4, 1024, 4), values)
    assert words in fault
    assert values.get("key", PROBLEM.key) in fault


def test_a_fault_is_one_short_line_that_a_terminal_only_shows() -> None:
    """Whatever the file has."""
    good, long = entry(cast(1)).as_json(), "\x1b\n\ud800" * 100_000
    for key, value in (
        (PROBLEM.key, {**good, "date": None}),
        (PROBLEM.key, {**good, "date": long}),
        (PROBLEM.key, {**good, "before_us": long}),
        (PROBLEM.key, {**good, long: 1}),
        (PROBLEM.key, {**good, "config": {"type": long}}),
        (PROBLEM.key, {**good, "config": {**good["config"], "num_warps": long}}),
        (PROBLEM.key, {**good, "config": {**good["config"], long: 1}}),
        (replace(PROBLEM, formats=long).key, good),
        (replace(PROBLEM, dtype=long).key, good),
        (replace(PROBLEM, layout=long).key, good),
        (PROBLEM.key.replace("4096x4096", f"{'9' * 4300}x1"), good),
    ):
        with pytest.raises(ValueError, match=r"^'?quantize \| ") as caught:
            table.Entry.of_json(key, value)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 10_000


HOPPER = tune.HopperConfig(128, 2, 4, 2)
PLAIN = tune.MatmulConfig(128, 128, 128, 8, 4, promote=512)
STREAM = tune.Problem("stream", SPEC, "bfloat16", "stored", (16, 8192, 8192))
SMALL = tune.SmallMatmulConfig(128, 128, 8, 4, 3)
WIDE = tune.Problem("decode_multiply", f"packed straight {SPEC} * plain", "bfloat16", "parts", (64, 64, 64))
SCALAR = tune.MatmulConfig(32, 64, 32, 4, 1)
NATIVE = tune.Problem("native", "e2m1 * e2m1", "bfloat16", "swizzled", (8192, 8192, 8192))
TILES = tune.MatmulConfig(128, 256, 256, 8, 4)


@pytest.mark.parametrize(
    ("problem", "config", "values", "words"),
    [
        # FP8's partial sums must be promoted at least every 512 of K: docs/numerics.md
        (FP8, HOPPER, {"promote": 0}, "promote is every 0 of K; allowed: multiples of 128 up to 512"),
        (FP8, HOPPER, {"promote": 5, "stages": 6, "pieces": 1}, "promote is every 640 of K"),
        (FP8, PLAIN, {"promote": 0}, "promote is every 0 of K"),
        (FP8, PLAIN, {"promote": 1024}, "promote is every 1024 of K"),
        (FP8, PLAIN, {"promote": 64}, "promote is every 64 of K; allowed: multiples of 128"),
        # a group waits for all of its blocks in shared memory, and would wait for ever
        (FP8, HOPPER, {"stages": 1}, "stages is 1; allowed: 2 to 4"),
        (FP8, HOPPER, {"promote": 4, "stages": 3}, "stages is 3; allowed: 4 to 4"),
        (FP8, HOPPER, {"stages": 5}, "stages is 5; allowed: 2 to 4"),
        (FP8, HOPPER, {"cols": 32}, "cols is 32; allowed: powers of two from 64 to 256"),
        (FP8, HOPPER, {"pieces": 4}, "pieces is 4; allowed: 1, 2"),
        (FP8, HOPPER, {"cols": 256}, "its sums take 768 columns; allowed: 384"),
        (FP8, HOPPER, {"group_m": 0}, "group_m is 0; allowed: 1 to 64"),
        (FP8, PLAIN, {"block_k": 16}, "block_k is 16; allowed: powers of two from 32 to 256"),
        (FP8, PLAIN, {"num_stages": 8}, "its stages take 262144 bytes; allowed: 232448"),
        (FP8, PLAIN, {"num_stages": 0}, "num_stages is 0; allowed: 1 to 10"),
        (FP8, PLAIN, {"key": FP8.key.replace("float8_e5m2 *", "nn *")}, "'nn' is no dtype"),
        (FP8, PLAIN, {"key": FP8.key.replace("float8_e5m2 *", "float7 *")}, "'float7' is no dtype"),
        (STREAM, SMALL, {"num_warps": 16}, "rows is 128; allowed: powers of two from 256"),
        (STREAM, SMALL, {"cols": 64}, "cols is 64; allowed: powers of two from 128"),
        (STREAM, SMALL, {"splits": 65}, "splits is 65; allowed: 1 to 64"),
        (STREAM, SMALL, {"splits": 0}, "splits is 0"),
        (WIDE, SCALAR, {"promote": 32}, "promote is 32; allowed for decode_multiply: 0"),
        (WIDE, SCALAR, {"block_m": 8}, "block_m is 8; allowed: powers of two from 16"),
        (NATIVE, TILES, {"block_m": 64}, "block_m is 64; allowed: powers of two from 128"),
        (NATIVE, TILES, {"block_k": 64}, "block_k is 64; allowed: powers of two from 128"),
    ],
)  # fmt: skip
def test_products_that_cannot_serve(
    path: Path, problem: tune.Problem, config: tune.Config, values: dict[str, Any], words: str
) -> None:
    assert tune.obstacle(problem, config) is None
    (fault,) = change(path, problem, config, values)
    assert words in fault


# One of each op that can be met, with a config that serves it.
CAST = tune.CastConfig(32, 128, 4)
POSSIBLE: dict[str, tuple[tune.Problem, tune.Config]] = {
    problem.op: (problem, config)
    for problem, config in (
        (PROBLEM, CAST),
        (replace(PROBLEM, op="quantize_pair", layout="columns"), CAST),
        (replace(PROBLEM, op="dequantize", dtype="float16"), CAST),
        (replace(PROBLEM, op="fold", dtype="float8_e4m3fn", layout="turned"), CAST),
        (replace(PROBLEM, op="quantize_fold", dtype="float32"), CAST),
        (FP8, PLAIN),
        (STREAM, SMALL),
        (WIDE, SCALAR),
        (NATIVE, TILES),
    )
}


@pytest.mark.parametrize(
    ("op", "changed", "words"),
    [
        *((op, {"layout": "sideways"}, f"its layout is 'sideways'; allowed for {op}: ") for op in tune.OPS),
        *((op, {"dtype": "zz"}, f"its dtype is 'zz'; allowed for {op}: ") for op in tune.OPS),
        *((op, {"dtype": "Tensor"}, f"its dtype is 'Tensor'; allowed for {op}: ") for op in tune.OPS),
        *((op, {"shape": (4096,)}, f"its shape is 4096; allowed for {op}: ") for op in tune.OPS),
        *((op, {"shape": (4096, 1, 1, 1)}, f"its shape is 4096x1x1x1; allowed for {op}: ") for op in tune.OPS),
        *((op, {"formats": "zzz"}, "'zzz'") for op in tune.OPS),
        ("quantize", {"dtype": "float8_e5m2"}, "allowed for quantize: bfloat16, float16, float32"),
        ("quantize", {"shape": (64, 64, 64)}, "allowed for quantize: 2 dimensions"),
        ("quantize", {"formats": SPEC.replace(" ", "  ")}, f"is written otherwise; allowed: {SPEC}"),
        ("dequantize", {"layout": "columns"}, "its layout is 'columns'; allowed for dequantize: rows"),
        ("fold", {"dtype": "bfloat16"}, "allowed for fold: float8_e4m3fn, float8_e5m2, uint8"),
        ("multiply", {"shape": (64, 64)}, "allowed for multiply: 3 dimensions"),
        ("multiply", {"layout": "straight"}, "its layout is 'straight'; allowed for multiply: straight * straight, "),
        ("multiply", {"formats": "float8_e5m2 * Tensor"}, "'Tensor' is no dtype of a carrier; allowed: "),
        ("multiply", {"formats": "bfloat16 * bfloat16 * bfloat16"}, "allowed for multiply: those of two operands"),
        ("stream", {"formats": "zzz"}, "spec 'zzz': write "),
        ("decode_multiply", {"formats": f"packed sideways {SPEC} * plain"}, "is no operand; allowed: plain, "),
        ("decode_multiply", {"formats": "plain * packed"}, "'packed' is no operand"),
        ("decode_multiply", {"formats": "plain * folded turned zzz"}, "spec 'zzz': write "),
        ("native", {"formats": "e2m1 * int4"}, "'int4' is no element; allowed: e2m1, e4m3, e5m2"),
    ],
)  # fmt: skip
def test_keys_that_nothing_can_meet(op: str, changed: dict[str, Any], words: str) -> None:
    problem, config = POSSIBLE[op]
    assert table.Entry.of_json(problem.key, entry(config).as_json()) == entry(config)
    key = replace(problem, **changed).key
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        table.Entry.of_json(key, entry(config).as_json())
    assert str(caught.value).startswith(f"{key}: ")


def test_what_is_tuned_can_be_met() -> None:
    """Whatever formats, blocks and GPUs."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    blocks = ("1x16", "1x32", "4x4", "32x1")
    specs = [
        MXSpec(name, block, symmetric=symmetric) for name in FORMATS for block in blocks for symmetric in (True, False)
    ]
    found = set()
    for able in gpu.ARCHITECTURES.values():
        for spec in specs:
            for op, dtype in itertools.product(problems.CASTS, dtypes):
                found |= set(problems.cast_problems(op, spec, 64, 256, dtype, able))
            for m, a in itertools.product((16, 256), (spec, torch.bfloat16, torch.float16)):
                found |= set(problems.product_problems(m, 256, 512, a, spec, able))
    assert {problem.op for problem in found} == set(tune.OPS)
    assert {problem: reason for problem in found if (reason := impossibility(problem))} == {}


def test_tiles_hold_whole_blocks_rows_and_words() -> None:
    def words(op: str, spec: str, shape: tuple[int, int], *values: Any) -> str:
        return tune.obstacle(tune.Problem(op, spec, "bfloat16", "rows", shape), tune.CastConfig(*values)) or ""

    tall, wide = SPEC.replace("1x32", "32x1"), SPEC.replace("1x32", "1x128")
    assert "tile_rows is 16; allowed: powers of two from 32" in words("quantize", tall, (64, 64), 16, 64, 4)
    assert "tile_cols is 64; allowed: powers of two from 128" in words("dequantize", wide, (64, 64), 16, 64, 4)
    assert "tile_cols is 8; allowed: powers of two from 16" in words("fold", tall, (64, 64), 32, 8, 4)
    assert "tile_rows is 16; allowed: powers of two from 32" in words("quantize_pair", SPEC, (64, 64), 16, 64, 4)
    assert "tile_rows is 8; allowed: powers of two from 16" in words("quantize", SPEC, (64, 64), 8, 64, 4, True)
    assert "tile_cols is 32; allowed: powers of two from 64" in words("quantize_fold", SPEC, (64, 1024), 1, 32, 4)
    assert not words("quantize_fold", SPEC, (64, 1025), 1, 1024, 4)

    run = (False, True, 4)
    assert "tile_cols is 16; allowed: powers of two from 32" in words("quantize", tall, (64, 64), 128, 16, 1, *run)
    assert "tile_rows is 16; allowed: powers of two from 32" in words("quantize_pair", SPEC, (64, 64), 16, 64, 1, *run)
    assert "run is 2; allowed: 1, 4" in words("quantize", SPEC, (64, 64), 16, 64, 1, False, True, 2)
    assert "run is 4; allowed: 1" in words("quantize", SPEC, (64, 64), 16, 64, 1, True, True, 4)
    assert "run is 4; allowed: 1" in words("dequantize", SPEC, (64, 64), 16, 64, 1, *run)
    assert "run is 4; allowed: 1" in words("quantize", SPEC, (64, 64), 8, 64, 1, *run)  # half a run to a thread
    assert not words("quantize", SPEC, (64, 64), 16, 64, 1, *run)
    with pytest.raises(ValueError, match="float99"):
        tune.obstacle(tune.Problem("quantize", SPEC, "float99", "rows", (64, 64)), tune.CastConfig(16, 64, 1, *run))


# --- files that are no tables ------------------------------------------------------------------------------

GOOD = {"gpu": "a", "architecture": "b", "sm_count": 1, "triton": "c", "kernels": "d", "entries": {}}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "truncated": b'{"sections": [{"gpu": "NVI',
    "not UTF-8": b'{"sections": ["\xff\xfe"]}',
    "a list": b"[]",
    "another object": b'{"entries": {}}',
    "sections of another type": b'{"sections": 3}',
    "a section of another type": b'{"sections": [3]}',
    "a field too many": json.dumps({"sections": [{**GOOD, "more": 1}]}).encode(),
    "a field of another type": json.dumps({"sections": [{**GOOD, "sm_count": "1"}]}).encode(),
    "entries of another type": json.dumps({"sections": [{**GOOD, "entries": []}]}).encode(),
    "an entry of another type": json.dumps({"sections": [{**GOOD, "entries": {"key": 3}}]}).encode(),
    "an entry with a list": json.dumps({"sections": [{**GOOD, "entries": {"key": {"config": [1]}}}]}).encode(),
    "an entry that is deep": json.dumps({"sections": [{**GOOD, "entries": {"key": {"config": {"a": {}}}}}]}).encode(),
    "the same stamp twice": json.dumps({"sections": [GOOD, GOOD]}).encode(),
    "NaN": b'{"sections": [NaN]}',
    "infinity": b'{"sections": [1e999]}',
    "an infinite time": json.dumps({"sections": [{**GOOD, "entries": {"key": {"after_us": 9}}}]})
    .replace("9", "1e999")
    .encode(),
    "a huge integer": b'{"sections": [' + b"9" * 5000 + b"]}",
    "deep nesting": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 100_000,
    "NUL bytes": bytes(10_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_table(path: Path, name: str) -> None:
    """Reading says so in one sentence; storing sets it aside."""
    path.write_bytes(HOSTILE[name])
    with pytest.raises(tune.BrokenTable, match=r"table\.json is no table of configs: ") as caught:
        tune.load(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000
    with pytest.warns(
        UserWarning, match="is no table of configs: .*; it is set aside as .*table.json.broken$"
    ) as warned:
        tune.store({PROBLEM.key: entry(cast(1))}, H200, path)
    assert len(warned) == 1
    assert len(str(warned[0].message).splitlines()) == 1
    assert stored(path) == {PROBLEM.key: entry(cast(1))}
    assert path.with_name("table.json.broken").read_bytes() == HOSTILE[name]
    path.write_bytes(HOSTILE[name] + b" ")
    with pytest.warns(UserWarning, match="it is set aside as .*table.json.broken-2$"):
        tune.store({PROBLEM.key: entry(cast(1))}, H200, path)
    assert path.with_name("table.json.broken-2").read_bytes() == HOSTILE[name] + b" "


def test_numbers_that_are_not_finite_stay_out(path: Path) -> None:
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"before_us is .*; allowed: microseconds"):
            tune.store({PROBLEM.key: tune.Entry(cast(1), number, 1.0, "")}, H200, path)
    assert not path.exists()


def test_a_file_that_is_too_large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(tune.BrokenTable, match="bytes; allowed: "):
        tune.load(path)


def untouched(path: Path, what: str) -> None:
    """Storing refuses what cannot be a table, and leaves it and its surroundings alone."""
    before = sorted(path.parent.iterdir()), path.lstat().st_ino
    for use in (lambda: tune.load(path), lambda: tune.store({PROBLEM.key: entry(cast(1))}, H200, path)):
        with pytest.raises(tune.TableError, match=f"{re.escape(str(path))} is {what}; allowed: a file") as caught:
            use()
        assert not isinstance(caught.value, tune.BrokenTable)
    assert (sorted(path.parent.iterdir()), path.lstat().st_ino) == before


def test_a_folder_in_its_place(path: Path) -> None:
    (path / "inner").mkdir(parents=True)
    untouched(path, "a folder")


def test_a_pipe_in_its_place(path: Path) -> None:
    """Nobody waits for somebody to read from it, or write into it; not behind a link either."""
    os.mkfifo(path)
    untouched(path, "a pipe")
    link = path.with_name("link.json")
    link.symlink_to(path)
    untouched(link, "a pipe")


def test_a_device_in_its_place() -> None:
    untouched(Path(os.devnull), "a device or socket")


def test_a_link_stays_one(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "mine.json"
    tune.store({OTHER.key: entry(cast(1))}, H200, target)
    path.symlink_to(target)
    tune.store({PROBLEM.key: entry(cast(2))}, H200, path)
    assert path.is_symlink()
    assert set(stored(target)) == {PROBLEM.key, OTHER.key}


def test_a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)
    with pytest.raises(tune.TableError, match="cannot be read"):
        tune.load(path)
    with pytest.raises(tune.TableError, match="cannot be read"):
        tune.store({}, H200, path)


def test_what_waits_where_the_temporary_file_goes_is_not_written_through(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    path.with_name("table.json.tmp").symlink_to(victim)
    tune.store({PROBLEM.key: entry(cast(1))}, H200, path)
    assert victim.read_text() == "untouched"
    assert PROBLEM.key in stored(path)


def test_a_folder_is_not_deleted(path: Path) -> None:
    """Nor is a lock made beside it."""
    path.mkdir()
    with pytest.raises(tune.TableError, match=r"table\.json is a folder; allowed: a file"):
        tune.remove(path)
    assert list(path.parent.iterdir()) == [path]


def test_what_was_set_aside_goes_with_its_table(path: Path) -> None:
    """The lock stays, since somebody may be about to take it; and so does what has another name."""
    for _ in range(2):
        path.write_text("[")
        with pytest.warns(UserWarning, match="it is set aside"):
            tune.store({}, H200, path)
    others = [path.with_name(name) for name in ("table.json.broken-old", "table.json.brokenly", "table2.json.broken")]
    for other in others:
        other.write_text("")
    assert table.set_aside(path) == [path.with_name(f"table.json.broken{number}") for number in ("", "-2")]
    tune.remove(path)
    assert sorted(path.parent.iterdir()) == sorted([*others, path.with_name("table.json.lock")])


def test_a_table_goes_even_if_what_was_set_aside_cannot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.store({}, H200, path)
    aside = path.with_name("table.json.broken")
    aside.write_text("[")
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self == aside:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(tune.TableError, match=r"table\.json\.broken cannot be deleted: Permission denied$"):
        tune.remove(path)
    assert not path.exists()


# --- places that cannot be written -------------------------------------------------------------------------


def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.store({PROBLEM.key: entry(cast(1))}, H200, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(table.os, name, full)
            with pytest.raises(tune.TableError, match="cannot be written: No space left on device"):
                tune.store({PROBLEM.key: entry(cast(2))}, H200, path)
        assert path.read_bytes() == before
        assert not path.with_name("table.json.tmp").exists()
    tune.store({PROBLEM.key: entry(cast(2))}, H200, path)
    assert stored(path)[PROBLEM.key] == entry(cast(2))


@pytest.mark.skipif(os.getuid() == 0, reason="root writes where it likes")
def test_a_folder_that_may_only_be_read(path: Path) -> None:
    tune.store({PROBLEM.key: entry(cast(1))}, H200, path)
    before = path.read_bytes()
    path.parent.chmod(0o500)
    try:
        with pytest.raises(tune.TableError, match="cannot be written"):
            tune.store({PROBLEM.key: entry(cast(2))}, H200, path)
        assert PROBLEM.key in stored(path)
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == before


def test_a_lock_that_cannot_be_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where file systems know none, and where a file stands in the place of the folder."""
    import filelock

    path.write_text("")
    with pytest.raises(tune.TableError, match="cannot be written: File exists"):
        tune.store({}, H200, path / "table.json")

    def refuse(self: object, *arguments: object, **options: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(tune.TableError, match="does not appear to support flock"):
        tune.store({}, H200, path)


def test_a_lock_that_is_held_for_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(table, "_LOCK_SECONDS", 0.1)
    with FileLock(f"{path}.lock"), pytest.raises(tune.TableError, match="could not be acquired"):
        tune.store({}, H200, path)


# --- many processes ----------------------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "mxkernels"])  # so that a process starts at once


def write(path: Path, writer: int, count: int, told: Connection) -> None:
    """Store `count` entries, one after the other, and tell the key of each when it is stored."""
    table._LOCK_SECONDS = 600  # disks may be slow, and whoever waits has no turn of its own
    for number in range(count):
        problem = replace(PROBLEM, shape=(1 << writer, 32 * (number + 1)))
        tune.store({problem.key: entry(cast(number))}, H200, path)
        told.send(problem.key)


def start(path: Path, writer: int, count: int) -> tuple[BaseProcess, Connection]:
    """A process that writes, and what it tells."""
    told, telling = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=write, args=(path, writer, count, telling))
    process.start()
    telling.close()  # so that the process's end ends what it tells
    return process, told


def heard(told: Connection) -> list[str]:
    """What was told, to the end."""
    keys = []
    with suppress(EOFError):
        while True:
            keys.append(told.recv())
    return keys


def test_eight_processes_at_once(path: Path) -> None:
    """All that each has stored is there, and whoever reads meanwhile finds a table."""
    writers = [start(path, number, 20) for number in range(8)]
    while any(process.is_alive() for process, _ in writers):
        stored(path)
    keys = [key for _, told in writers for key in heard(told)]
    assert [process.exitcode for process, _ in writers] == [0] * 8
    assert len(keys) == 160
    assert set(keys) == set(stored(path))


def test_a_process_that_is_killed_while_it_writes(path: Path) -> None:
    """Again and again, at any moment: the file is valid, and has what was said to be stored before."""
    moments, keys = random.Random(0), set()
    for number in range(20):
        process, told = start(path, number % 8, 10_000)
        keys.add(told.recv())
        time.sleep(moments.uniform(0.0, 0.1))
        process.kill()
        process.join()
        keys |= set(heard(told))
        assert keys <= set(stored(path))
    tune.store({OTHER.key: entry(cast(0))}, H200, path)
    assert OTHER.key in stored(path)
    assert sorted(each.name for each in path.parent.glob("table*")) == ["table.json", "table.json.lock"]
