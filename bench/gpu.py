"""What `make gpu` runs: the tests on a GPU and the recorded measurements, in pieces that can be resumed.

    python bench/gpu.py --results DIR [--only PIECE] [--list]

Each piece is a process of at most `LIMIT_S` seconds, recorded in DIR/<piece>.json as soon as it ends: status,
seconds, commit, the end of its output. A piece that has passed is not run again while the sources are the same.
Nothing is installed: it runs on this interpreter with what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from mxkernels.environment import device_name, digest, revision
from mxkernels.tune.location import SHIPPED, table_name

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 570
# Files with so many kernels to compile that pytest runs them in processes side by side, if it has xdist. The casts'
# has processes of its own.
COMPILING = {
    "test_gpu_matmul", "test_gpu_nn", "test_gpu_ops", "test_gpu_pack", "test_gpu_tune", "test_matmul_hopper",
    "test_primitives",
}  # fmt: skip
TEST_PROCESSES = 8
TAIL = 6000  # characters of output that are kept
NO_TESTS_RAN = 5  # pytest's exit status

# By group, the script that measures it.
MEASUREMENTS = {
    "casts": "bench/casts.py",
    "overhead": "bench/casts.py",
    "sizes": "bench/casts.py",
    "transforms": "bench/casts.py",
    "products": "bench/products.py",
    "products-overhead": "bench/products.py",
    "layers": "bench/training.py",
    "serving": "bench/training.py",
    "step": "bench/training.py",
    "training": "bench/training.py",
    "tuning": "bench/tuning.py",
    "new-gpu": "bench/new_gpu.py",
}

# By name, the arguments of `mxkernels tune` that make a part of the table that is shipped for a GPU: the configs of
# what the goals name.
CASTS = "16384x16384,4096x4096"
LAYERS = "8192x8192x8192,4096x14336x4096"
TUNED = {
    "formats": f"--op quantize,dequantize --fmt e2m1,e3m0,int4,e2m3,e3m2,e4m3,e5m2,int8 --shape {CASTS}",
    "blocks": f"--op quantize,dequantize --fmt e2m1 --block 1x16,4x4,16x16,32x32,32x1 --shape {CASTS}",
    "orientations": f"--op quantize_transposed,quantize_pair --fmt e2m1,e4m3 --block 1x32,4x4 --shape {CASTS}",
    "stochastic": f"--op quantize --rounding sr --fmt e2m1 --block 1x32,4x4 --shape {CASTS}",
    "asymmetric": f"--op quantize,dequantize --asymmetric --fmt e2m1,int4 --shape {CASTS}",
    "layers": f"--op matmul --fmt e2m1 --block 1x32,4x4,16x16 --shape {LAYERS}",
    "layers_e2m3": f"--op matmul --fmt e2m3 --shape {LAYERS}",
    "turned": "--op fold_transposed --fmt e2m1 --block 1x32,4x4 --shape 8192x8192,4096x14336,14336x4096,4096x4096",
    "folded": "--op matmul --fmt e2m1 --shape 64x8192x8192,256x8192x8192,1024x8192x8192,4096x4096x14336",
    "folded_layers": "--op matmul --fmt e2m1 --shape 64x4096x14336,256x4096x14336,1024x4096x14336,14336x4096x4096",
    "weights": "--op matmul --fmt e2m1 --activations bfloat16 --shape 8192x8192,4096x14336,4x8192x8192,4x4096x14336",
    "in_bf16": "--op matmul --fmt mxfp8_e4m3,mxint8 --shape 8192x8192x8192",
}
BUDGET = "4s"  # for each problem; problems that are left are done by the next run


@dataclass(frozen=True)
class Piece:
    """One process: its name, which is also its record's, and its arguments to this Python."""

    name: str
    arguments: tuple[str, ...]


def pieces(results: Path) -> list[Piece]:
    """The test files that need a GPU, found by their marker; the shipped table; then the measurements, which use it."""
    tests = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    pytest = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    many = ("-n", str(TEST_PROCESSES), "--dist", "worksteal") if find_spec("xdist") else ()
    tune = ("cli.py", "tune", "--resume", "--budget", BUDGET, "--export", str(shipped_table().resolve()))
    return [
        *(
            Piece(path.stem, (*pytest, *(many if path.stem in COMPILING else ()), f"tests/{path.name}"))
            for path in tests
        ),
        *(Piece(f"tune_{name}", (*tune, *arguments.split())) for name, arguments in TUNED.items()),
        *(
            Piece(f"measure_{group}", (script, group, "--results", str(results)))
            for group, script in MEASUREMENTS.items()
        ),
    ]


def shipped_table() -> Path:
    """The file of the GPU at hand."""
    name = device_name(torch.device("cuda")) if torch.cuda.is_available() else "no gpu"
    return SHIPPED / table_name(name)


def run(piece: Piece) -> dict[str, Any]:
    """Run a piece to its end or its limit, and print its lines as they come. Its record."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # for each process; it would take one for each core
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *piece.arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it starts ends with it
    )
    ended = threading.Event()

    def end() -> None:
        ended.set()
        os.killpg(process.pid, signal.SIGKILL)

    limit = threading.Timer(LIMIT_S, end)
    limit.start()
    output = ""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            output += line
    finally:
        limit.cancel()
    process.wait()
    status = {0: "passed", NO_TESTS_RAN: "nothing ran"}.get(process.returncode, "failed")
    if ended.is_set():
        status = "timed out"
    return {
        "piece": piece.name,
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        **revision(),
        "sources": sources(),
        "command": ["python", *map(within, piece.arguments)],
        "output_tail": within(output)[-TAIL:],
    }


def within(text: str) -> str:
    """Paths in the repository as they are from its root, wherever that is."""
    return text.replace(f"{ROOT}{os.sep}", "")


def sources() -> str:
    """What tells apart all that a piece's outcome depends on."""
    return digest(ROOT / "mxkernels", ROOT / "tests", ROOT / "bench", ROOT / "examples")


def record(results: Path, piece: Piece) -> dict[str, Any]:
    """What is recorded of a piece; nothing, if that was of other sources."""
    try:
        found: dict[str, Any] = json.loads((results / f"{piece.name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("sources") == sources() else {}


def run_all(results: Path, chosen: list[Piece], again: bool) -> Iterator[bool]:
    """Run the pieces that have not passed yet, or all if `again`; whether each is well."""
    for piece in chosen:
        if not again and record(results, piece).get("status") == "passed":
            print(f"{piece.name}: passed before", flush=True)
            continue
        print(f"{piece.name} ...", flush=True)
        outcome = run(piece)
        (results / f"{piece.name}.json").write_text(json.dumps(outcome, indent=1) + "\n", "utf-8")
        print(f"{piece.name}: {outcome['status']} in {outcome['seconds']} s", flush=True)
        yield outcome["status"] in ("passed", "nothing ran")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="where records are written")
    parser.add_argument("--only", metavar="PIECE", help="run this piece alone, also if it has passed")
    parser.add_argument("--list", action="store_true", help="print the pieces and what is recorded of them")
    arguments = parser.parse_args()
    results = arguments.results.resolve()
    known = pieces(results)
    if arguments.list:
        for piece in known:
            print(f"{piece.name}: {record(results, piece).get('status', 'to run')}")
        return
    chosen = [piece for piece in known if arguments.only in (None, piece.name)]
    if not chosen:
        parser.error(f"--only {arguments.only}: allowed: {', '.join(piece.name for piece in known)}")
    results.mkdir(parents=True, exist_ok=True)
    SHIPPED.mkdir(exist_ok=True)
    well = list(run_all(results, chosen, again=arguments.only is not None))
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
