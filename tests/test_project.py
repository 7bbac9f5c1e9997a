"""What the project says of itself: documentation, Makefile and package agree with the code."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mxkernels
from mxkernels.cli import cli
from mxkernels.folded import window

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/numerics.md",
    "docs/decisions.md",
    "docs/speed.md",
    "docs/training.md",
]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[list[str]]:
    """The lines of a document's shell blocks, as words, without comments."""
    lines = (line for block in blocks(document, "sh") for line in block.splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("document", ["README.md", "docs/numerics.md"])
def test_python_runs_as_written(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of Python run, one after the other, and `print(q)  # …` prints what the comment says."""
    monkeypatch.chdir(tmp_path)
    code = "".join(blocks(document, "python"))
    assert code
    exec(compile(code, document, "exec"), {})
    assert set(re.findall(r"^print\(q\)  # (.*)", code, re.MULTILINE)) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE))
    named = {words[1] for words in commands(document) if words[0] == "make"}
    assert named
    assert named <= targets


def test_readme_command_lines_parse() -> None:
    lines = [words[1:] for words in commands("README.md") if words[0] == "mxkernels"]
    assert {name for name, *_ in lines} == set(cli.commands)
    for name, *arguments in lines:
        known = {spelling for parameter in cli.commands[name].params for spelling in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_a_new_gpu_is_timed_as_the_readme_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import new_gpu

    lines = {" ".join(words[1:]) for words in commands("README.md") if words[0] == "mxkernels"}
    assert set(new_gpu.COMMANDS) <= lines


def test_make_bench_is_the_main_job() -> None:
    line = next(words for words in commands("README.md") if words[0] == "mxkernels")
    assert f"{' '.join(line)}\n" in read("Makefile")


def test_ci_runs_the_readmes_test_command() -> None:
    assert ["make", "test"] in commands("README.md")
    assert read(".ci/run").splitlines()[-1] == "exec make test"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", read(document))
    local = [target for target in targets if "://" not in target]
    assert all(((ROOT / document).parent / target).is_file() for target in local), local


def test_decisions_are_numbered_and_found() -> None:
    numbers = [int(number) for number in re.findall(r"^### D(\d+) ", read("docs/decisions.md"), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    named = re.findall(r"\bD(\d+)\b", read("docs/decisions.md") + read("pyproject.toml"))
    assert {int(number) for number in named} <= set(numbers)


def test_numerics_lists_the_formats_and_presets() -> None:
    page = read("docs/numerics.md")
    row = r"^\| `(\w+)` \| (\d) \| [^|]+ \| ([\d.]+) \| (\d+) \| (\d) \|"
    assert {name: tuple(map(float, facts)) for name, *facts in re.findall(row, page, re.MULTILINE)} == {
        name: (element.bits, element.max, element.emax, element.scale_mantissa_bits)
        for name, element in mxkernels.FORMATS.items()
    }
    for name, spec in mxkernels.PRESETS.items():
        assert re.search(rf"^\| `{name}` \| `{spec.element.name}` \| `{spec.scale_rounding}`", page, re.MULTILINE)


def test_numerics_lists_the_windows_of_folding() -> None:
    row = r"^\| `(\w+)` \| `(\w+)` \| −(\d+) … (\d+) \| (\d+) \|$"
    found = re.findall(row, read("docs/numerics.md"), re.MULTILINE)
    windows = {name: window(element) for name, element in mxkernels.FORMATS.items()}
    assert {(name, carrier, -int(low), int(top), int(powers)) for name, carrier, low, top, powers in found} == {
        (name, each.carrier.name, each.low, each.top, each.top - each.low + 1) for name, each in windows.items() if each
    }


def test_changelog_has_the_version() -> None:
    assert f"## [{mxkernels.__version__}]" in read("CHANGELOG.md")


def test_wheel(tmp_path: Path) -> None:
    """The wheel builds without network, and holds all modules and the mark that they are typed."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    files = [path for path in (ROOT / "mxkernels").rglob("*") if path.suffix in {".py", ".json", ".typed"}]
    for path in files:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"mxkernels-{mxkernels.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in files} <= names
    assert "mxkernels/py.typed" in names
    entry_points = zipfile.ZipFile(wheel).read(f"mxkernels-{mxkernels.__version__}.dist-info/entry_points.txt").decode()
    assert "mxkernels = mxkernels.cli:main" in entry_points


@pytest.mark.parametrize("name", ["CASTS", "PRODUCTS"])
def test_the_results_in_the_readme_are_the_recorded_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import table

    shown = getattr(table, name)
    assert shown.start + shown.text() + shown.end in read("README.md")
    if shown.recorded.exists():
        assert json.loads(shown.recorded.read_text("utf-8"))["environment"]["commit"]
