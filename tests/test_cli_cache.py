"""`mxkernels cache` and what `doctor` says of configs, by the command line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tuned import A100, H100, H200, PROBLEM, cast, entry, forget, install, keep, ship

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


def test_list_counts_what_can_serve() -> None:
    path = tune.store({PROBLEM.key: entry(cast(1)), OTHER.key: entry(cast(2))}, H200)
    for count, use in ((1, "1 yes, 1 cannot serve"), (2, "0 no, 2 cannot serve")):
        path.write_text(path.read_text().replace('"num_warps": 4', '"num_warps": true', 1))
        (line,) = invoke("list").stdout.splitlines()[2:]
        assert " ".join(line.split()).endswith(f" quantize {use}"), count


def test_list_of_entries_of_which_none_serves() -> None:
    path = tune.store({PROBLEM.key: entry(cast(1)), OTHER.key: entry(cast(2))}, replace(H200, triton="3.0.0"))
    faulty = tune.store({PROBLEM.key: entry(cast(1))}, H200)
    assert path == faulty
    path.write_text(path.read_text().replace("CastConfig", "LaterConfig"))
    result = invoke("list", "--entries")
    assert result.stdout == "None of the 3 that are stored can be used here: `mxkernels cache list` says why.\n"
    tune.remove(path)
    assert invoke("list", "--entries").stdout == "Nothing is stored.\n"


def test_what_a_file_says_is_only_shown() -> None:
    """Nothing of it reaches the terminal that this would obey, and what cannot be encoded stops nothing."""
    shown = r"\x1b[31m\x07\ud800"
    gpu = shown.encode().decode("unicode_escape")
    path = tune.store({PROBLEM.key: entry(cast(1))}, replace(H200, gpu=gpu), location.SHIPPED / "a.json")
    named = path.with_name(f"{gpu[:-1]}.json")
    named.write_text(path.read_text().replace('"quantize | ', '"quant\\u001bize | ').replace(H200.kernels, r"\u0007"))
    for command in (["list"], ["list", "--entries"], ["verify", str(path), str(named)]):
        result = invoke(*command)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert (result.stdout + result.stderr).replace("\n", "").isprintable()
    lines = invoke("list").stdout.splitlines()
    assert shown in lines[-1]
    assert r"quant\x1bize" in lines[2]
    assert r"quant\x1bize" in result.stderr


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


def test_verify_names_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so the folder that it may not search is made up."""
    path, stat = tmp_path / "table.json", os.stat

    def refuse(place: object, *arguments: Any, **options: Any) -> os.stat_result:
        if place == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stat(place, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    result = invoke("verify", str(path))
    monkeypatch.undo()
    assert (result.exit_code, result.stderr) == (1, f"{path} cannot be read: Permission denied\n")


@pytest.mark.parametrize("command", ["list", "verify", "clear"])
def test_a_cache_that_cannot_be_read(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What may not be read, has too long a name, or is no folder, is not empty."""
    allowed = "allowed for MXKERNELS_CACHE: a directory that can"
    file, long, closed = tmp_path / "file", tmp_path / ("x" * 300), tmp_path / "closed"
    file.write_text("")
    closed.mkdir()
    scandir = os.scandir

    def refuse(place: Any = ".") -> Any:
        if place == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    for place, why in ((file, "Not a directory"), (long, "File name too long"), (closed, "Permission denied")):
        monkeypatch.setenv(location.VARIABLE, str(place))
        result = invoke(command)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"mxkernels: {place} cannot be read: {why}; {allowed}\n"


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


def test_clear_leaves_what_is_no_table() -> None:
    """It may be somebody else's."""
    path = tune.store({PROBLEM.key: entry(cast(1))}, H200)
    aside = path.with_name("nvidia-h200.json.broken")
    aside.write_text("[")
    package, folder, pipe, link = (path.with_name(f"{name}.json") for name in ("a-package", "folder", "pipe", "link"))
    package.write_text('{"name": "a-package"}')
    folder.mkdir()
    os.mkfifo(pipe)
    link.symlink_to("nowhere")
    result = invoke("clear", "--yes")
    assert (result.exit_code, result.stdout) == (0, f"{path}\n{aside}\n")
    assert result.stderr.splitlines() == [
        f'{package} is no table of configs: it has not the form {{"sections": [...]}}; it stays',
        f"{folder} is a folder; allowed: a file; it stays",
        f"{pipe} is a pipe; allowed: a file; it stays",
    ]
    left = [folder, link, path.with_name("nvidia-h200.json.lock"), pipe]
    assert sorted(path.parent.iterdir()) == sorted([package, *left])
    assert invoke("clear", "--yes").stdout == ""
    result = invoke("clear", "--yes", "--gpu", "folder")
    assert (result.exit_code, result.stderr) == (1, f"mxkernels: {folder} is a folder; allowed: a file\n")
    assert invoke("clear", "--yes", "--gpu", "a-package").exit_code == 0
    assert not package.exists()
    assert all(os.path.lexists(each) for each in left)


def test_clear_goes_on_after_what_cannot_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tune.store({PROBLEM.key: entry(cast(1))}, each) for each in (A100, H100, H200)]
    unreadable = paths[0].with_name("unreadable.json")
    unreadable.symlink_to(unreadable)

    def refuse(path: Path) -> None:
        if path == paths[1]:
            raise tune.TableError(f"{path} cannot be deleted: Permission denied")
        tune.remove(path)

    monkeypatch.setattr("mxkernels.cli_cache.remove", refuse)
    result = invoke("clear", "--yes")
    assert [path.exists() for path in paths] == [False, True, False]
    assert result.exit_code == 1
    assert result.stderr == (
        f"mxkernels: {unreadable} cannot be read: {os.strerror(errno.ELOOP)}; "
        f"{paths[1]} cannot be deleted: Permission denied\n"
    )


def test_clear_says_what_cannot_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tune.store({PROBLEM.key: entry(cast(1))}, H200)

    def refuse(path: Path) -> None:
        raise tune.TableError(f"{path} cannot be written: Permission denied")

    monkeypatch.setattr("mxkernels.cli_cache.remove", refuse)
    result = invoke("clear", "--yes")
    assert result.exit_code == 1
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
