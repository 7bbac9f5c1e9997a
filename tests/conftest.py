"""Where the tests run: on the GPU if there is one, else in Triton's interpreter and on the CPU reference.

Markers: `gpu` needs a GPU; `interpreter` launches kernels on CPU tensors, which a machine with a GPU compiles
instead. Both are skipped, with the reason printed, where they cannot run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

try:
    import hypothesis
except ImportError:  # a machine that only runs the GPU's tests may lack it
    hypothesis = None

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read while Triton is imported, so before any test module is

os.environ["MXKERNELS_CACHE"] = f"{tempfile.gettempdir()}/mxkernels-tests-{os.getpid()}"  # not the user's configs

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism

# A first example may import or compile for seconds, so no deadline; the same examples on every run, as far as the same
# modules are imported by then, whose constants are among them.
if hypothesis:
    hypothesis.settings.register_profile("mxkernels", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("mxkernels")


# The marker of the tests that cannot run here, and why.
ABSENT, REASON = (
    ("interpreter", "there is a GPU: kernels are compiled, not interpreted")
    if HAS_GPU
    else ("gpu", "no GPU on this machine")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker(ABSENT):
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with a GPU that compiles nothing and runs nothing. Its cache."""
    import tuning_fakes as fakes
    from tuned import H200, install

    from mxkernels import tune, tuner
    from mxkernels.tune.limits import Limits

    install(monkeypatch, tmp_path)
    monkeypatch.setattr(Limits, "of", classmethod(lambda cls, device: Limits("sm_90")))
    monkeypatch.setattr(tuner, "make_compiler", fakes.counting_compiler)
    monkeypatch.setattr(tuner, "make_runner", fakes.instant_runner)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield tune.cache_path(H200)
    monkeypatch.undo()
    tune.events.TABLES_CHANGED.happened()
