"""MXTensors in safetensors files: what is written is what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file as save_safetensors
from test_tensor import SPECS, gaussian, same, same_parts

import mxkernels as mx


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tensors.safetensors"


@pytest.mark.parametrize("shape", [(33, 70), (70,), (2, 3, 40), (1, 1), (0, 8)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_trip(spec: mx.MXSpec, shape: tuple[int, ...], path: Path) -> None:
    q = mx.quantize(gaussian(*shape), spec)
    mx.save_file({"w": q}, path)
    loaded = mx.load_file(path)
    assert list(loaded) == ["w"]
    assert same_parts(loaded["w"], q)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_transposed_tensor_comes_back_transposed(spec: mx.MXSpec, path: Path) -> None:
    q = mx.quantize(gaussian(33, 70), spec)
    mx.save_file({"w": q.T}, path)
    loaded = mx.load_file(path)["w"]
    assert same_parts(loaded, q.T)
    assert loaded.codes.T.is_contiguous()  # still packed along its first dimension
    assert same(loaded.dequantize(), q.dequantize().T)


def test_plain_tensors_beside(path: Path) -> None:
    q, plain, turned = mx.quantize(gaussian(8, 64), mx.mxfp4), gaussian(3, 5), gaussian(4, 6).bfloat16().T
    mx.save_file({"layer.weight": q, "layer.bias": plain, "norm": turned}, path)
    loaded = mx.load_file(path)
    assert sorted(loaded) == ["layer.bias", "layer.weight", "norm"]
    assert same_parts(loaded["layer.weight"], q)
    assert same(loaded["layer.bias"], plain)
    assert same(loaded["norm"], turned)


def test_nothing_at_all(path: Path) -> None:
    mx.save_file({}, path)
    assert mx.load_file(path) == {}


def test_names_in_the_file(path: Path) -> None:
    """Other tools find uint8 and float16 tensors, and a description in the metadata."""
    spec = mx.MXSpec("int4", "4x4", symmetric=False)
    q = mx.quantize(gaussian(8, 6), spec)
    mx.save_file({"w": q.T}, path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["w.codes", "w.offset", "w.scale"]
        assert same(file.get_tensor("w.codes"), q.codes)
        described = json.loads(file.metadata()["mxkernels"])
    assert described == {"w": {"spec": str(spec), "shape": [8, 6], "transposed": True}}


def test_files_of_other_tools(path: Path) -> None:
    save_safetensors({"w": torch.ones(3)}, path)
    assert same(mx.load_file(path)["w"], torch.ones(3))


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_two_tensors_under_one_name(part: str, path: Path) -> None:
    q = mx.quantize(gaussian(8, 64), mx.mxfp4)
    for tensors in ({"w": q, f"w.{part}": torch.ones(1)}, {f"w.{part}": torch.ones(1), "w": q}):
        with pytest.raises(ValueError, match=f"two tensors would be stored as 'w.{part}'; rename one"):
            mx.save_file(tensors, path)
    assert not path.exists()


def test_a_plain_tensor_named_as_the_offset_of_a_symmetric_one(path: Path) -> None:
    tensors = {"w": mx.quantize(gaussian(8, 64), mx.mxfp4), "w.offset": torch.ones(2)}
    mx.save_file(tensors, path)
    loaded = mx.load_file(path)
    assert same_parts(loaded["w"], tensors["w"])
    assert same(loaded["w.offset"], tensors["w.offset"])


def test_tensors_that_share_memory(path: Path) -> None:
    """safetensors refuses them, and so a tensor beside its own transpose: no byte is stored twice unasked."""
    q = mx.quantize(gaussian(8, 64), mx.mxfp4)
    with pytest.raises(RuntimeError, match="share memory"):
        mx.save_file({"w": q, "turned": q.T}, path)
    assert not path.exists()


def described(path: Path, **changes: object) -> None:
    """A file whose description of `w` is changed."""
    q = mx.quantize(gaussian(8, 64), mx.mxfp4)
    description = {"spec": str(q.spec), "shape": [8, 64], "transposed": False, **changes}
    metadata = {"mxkernels": json.dumps({"w": description})}
    save_safetensors({"w.codes": q.codes, "w.scale": q.scale}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [8, 66]}, "codes is torch.uint8"),
        ({"spec": "e2m1 1x16 rtne even symmetric"}, "scale is torch.uint8"),
        ({"spec": "e2m1 1x32 rtne even asymmetric"}, "'w.offset' is missing"),
        ({"spec": "e2m1 1x32 rtne even"}, "write 'e2m1 1x32 rtne even symmetric'"),
        ({"spec": "e9m9 1x32 rtne even symmetric"}, "element is 'e9m9'"),
    ],
)
def test_descriptions_that_do_not_fit(changes: dict[str, object], message: str, path: Path) -> None:
    described(path)
    assert mx.load_file(path)["w"].shape == (8, 64)
    described(path, **changes)
    with pytest.raises(ValueError, match=message):
        mx.load_file(path)


def test_a_described_tensor_whose_parts_are_missing(path: Path) -> None:
    description = {"w": {"spec": str(mx.mxfp4), "shape": [8, 64], "transposed": False}}
    save_safetensors({"w.codes": torch.zeros(8, 32, dtype=torch.uint8)}, path, {"mxkernels": json.dumps(description)})
    with pytest.raises(ValueError, match=r"'w' is described, but 'w\.scale' is missing"):
        mx.load_file(path)


def test_a_file_that_is_cut_off(path: Path) -> None:
    mx.save_file({"w": mx.quantize(gaussian(8, 64), mx.mxfp4)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(safetensors.SafetensorError):
        mx.load_file(path)


def test_a_file_that_is_something_else(path: Path) -> None:
    path.write_text("no tensors")
    with pytest.raises(safetensors.SafetensorError):
        mx.load_file(path)


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mx.load_file(path)
