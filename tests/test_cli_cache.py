"""`mxkernels cache` and what `doctor` says of configs, by the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tuned import H100, H200, PROBLEM, cast, entry, forget, install, keep, ship

from mxkernels import tune
from mxkernels.cli import cli
from mxkernels.tune import location

OTHER = replace(PROBLEM, shape=(1, 4096))


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    install(monkeypatch, tmp_path)
    monkeypatch.setattr("mxkernels.cli_cache.SHIPPED", location.SHIPPED)
    yield
    monkeypatch.undo()
    forget()


def invoke(*arguments: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["cache", *arguments], input=answer, prog_name="mxkernels")


def test_help() -> None:
    for command in ([], ["path"], ["list"], ["verify"], ["clear"]):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: mxkernels cache")


def test_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert invoke("path").stdout == f"{tmp_path / 'cache'}\n"
    monkeypatch.setattr("mxkernels.cli_cache.cache_directory", lambda: None)
    for command in ("path", "clear"):
        result = invoke(command)
        assert result.exit_code == 2
        assert "install platformdirs, or set MXKERNELS_CACHE" in result.stderr
    assert invoke("list").exit_code == 0


def test_list() -> None:
    """A line an op of a section, the user's first; what is left out says why."""
    assert invoke("list").stdout == "Nothing is stored.\n"
    tune.store({PROBLEM.key: entry(cast(1)), OTHER.key: entry(cast(2))}, H200)
    tune.store({PROBLEM.key: entry(cast(1))}, replace(H200, triton="3.0.0"))
    ship(H100, {PROBLEM.key: entry(cast(1))})
    (location.SHIPPED / "broken.json").write_text("")
    lines = [" ".join(line.split()) for line in invoke("list").stdout.splitlines()]
    assert lines[0] == "from GPU SMs Triton op configs used"
    assert lines[2:-1] == [
        f"cache nvidia-h200.json NVIDIA H200 132 3.0.0 quantize 1 no: triton 3.0.0, not {H200.triton}",
        f"cache nvidia-h200.json NVIDIA H200 132 {H200.triton} quantize 2 yes",
        f"shipped broken.json no: {location.SHIPPED / 'broken.json'} is no table of configs: "
        "Expecting value: line 1 column 1 (char 0)",
    ]
    assert lines[-1] == f"shipped nvidia-h100-pcie.json NVIDIA H100 PCIe 114 {H100.triton} quantize 1 yes"


def test_list_of_entries() -> None:
    tune.store({PROBLEM.key: entry(cast(1)), OTHER.key: entry(cast(2))}, H200)
    tune.store({replace(PROBLEM, dtype="float32").key: entry(cast(3))}, replace(H200, triton="3.0.0"))
    lines = [" ".join(line.split()) for line in invoke("list", "--entries").stdout.splitlines()]
    assert lines[2:] == [
        f"cache nvidia-h200.json {OTHER.key} {cast(2)} 2.0 1.0 2026-11-22",
        f"cache nvidia-h200.json {PROBLEM.key} {cast(1)} 2.0 1.0 2026-11-22",
    ]


def test_verify(tmp_path: Path) -> None:
    assert invoke("verify").stdout == "Configs: 0, all of which can be used.\n"
    path = tune.store({PROBLEM.key: entry(cast(1)), OTHER.key: entry(cast(2))}, H200)
    tune.store({PROBLEM.key: entry(cast(1))}, replace(H200, triton="3.0.0"))  # another environment's
    result = invoke("verify")
    assert (result.exit_code, result.stdout.splitlines()) == (
        0,
        ["Configs: 2, all of which can be used.", "Not used here: 1, of other versions of Triton or of the kernels."],
    )
    path.write_text(path.read_text().replace('"num_warps": 4', '"num_warps": 5', 4))
    result = invoke("verify")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count(f"{path}: quantize | ") == 2
    assert result.stderr.count("num_warps is 5") == 2


def test_verify_names_what_cannot_be_used(tmp_path: Path) -> None:
    stale = tune.store({PROBLEM.key: entry(cast(1))}, replace(H200, kernels="0123"), tmp_path / "stale.json")
    broken = tmp_path / "broken.json"
    broken.write_text("[")
    result = invoke("verify", str(stale), str(broken))
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first == f"{stale}: 1 of quantize measured with kernels 0123, not {H200.kernels}"
    assert second.startswith(f"{broken} is no table of configs: ")
    result = invoke("verify", str(tmp_path / "absent.json"))
    assert result.exit_code == 2
    assert "there is no file" in result.stderr


def test_an_op_whose_kernels_have_changed_is_listed_and_no_fault_of_the_others() -> None:
    keep(PROBLEM, cast(1))
    dequantize = replace(PROBLEM, op="dequantize")
    path = keep(dequantize, cast(2))
    assert invoke("verify").stdout == "Configs: 2, all of which can be used.\n"
    value = path.read_text().replace(H200.here("dequantize").kernels, "0123456789abcdef")
    path.write_text(value)
    forget()
    result = invoke("verify")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{path}: 1 of dequantize measured with kernels 0123456789abcdef, not ")
    assert len(result.stderr.splitlines()) == 1
    uses = [line.split()[6:9] for line in invoke("list").stdout.splitlines()[2:]]
    assert sorted(uses) == [["dequantize", "1", "no:"], ["quantize", "1", "yes"]]
    (line,) = invoke("list", "--entries").stdout.splitlines()[2:]
    assert PROBLEM.key in line


def test_keys_of_no_op() -> None:
    """Such as a later version may have."""
    path = keep(PROBLEM, cast(1))
    path.write_text(path.read_text().replace('"quantize | ', '"requantize | '))
    assert "no: another mxkernels, which knows requantize" in invoke("list").stdout
    assert "1 of requantize measured with another mxkernels" in invoke("verify").stderr


def test_clear_asks() -> None:
    assert invoke("clear").stdout == "Nothing is stored.\n"
    path = tune.store({PROBLEM.key: entry(cast(1))}, H200)
    result = invoke("clear", answer="n\n")
    assert result.exit_code == 1
    assert str(path) in result.stdout
    assert path.exists()
    assert invoke("clear", answer="y\n").exit_code == 0
    assert not path.exists()


def test_clear_one_gpu() -> None:
    h200, h100 = (tune.store({PROBLEM.key: entry(cast(1))}, stamp) for stamp in (H200, H100))
    shipped = ship(H200, {PROBLEM.key: entry(cast(1))})
    result = invoke("clear", "--gpu", "RTX", "--yes")
    assert result.exit_code == 2
    assert "nothing of RTX is stored; allowed: nvidia-h100-pcie, nvidia-h200" in result.stderr
    assert invoke("clear", "--gpu", "NVIDIA H100 PCIe", "--yes").exit_code == 0
    assert (h200.exists(), h100.exists()) == (True, False)
    assert invoke("clear", "--gpu", "nvidia-h200", "--yes").exit_code == 0
    assert (h200.exists(), shipped.exists()) == (False, True)


def test_clear_says_what_cannot_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tune.store({PROBLEM.key: entry(cast(1))}, H200)

    def refuse(path: Path) -> None:
        raise tune.TableError(f"{path} cannot be written: Permission denied")

    monkeypatch.setattr("mxkernels.cli_cache.remove", refuse)
    result = invoke("clear", "--yes")
    assert result.exit_code == 2
    assert result.stderr == f"mxkernels: {path} cannot be written: Permission denied\n"


def test_doctor_says_what_serves_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tune.store({PROBLEM.key: entry(cast(1))}, H200)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    text = CliRunner().invoke(cli, ["doctor"]).stdout
    assert f"configs    cache: 1 in {tune.cache_path(H200)}\n" in text
    assert "configs    rule: for all other problems\n" in text


def test_a_mistake_is_one_sentence() -> None:
    for arguments in (["lisst"], ["clear", "--gpus"], ["path", "here"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("mxkernels: ")
        assert result.stderr.count("\n") == 1
