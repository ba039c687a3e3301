"""Every command and code block of the documents runs, and every figure's file exists.

Blocks fenced as ```python run as they stand; blocks fenced as ```sh run line by line. A line that starts
with `make`, `pip install` or `.` (activate) is checked against the Makefile or the package's extras instead of run,
because this very test is part of `make test`. `shapes` is built once, and the documents' file names are real there.
What takes minutes is run by `make oracle`: the gallery's page, benchmarks, and the lines about bundles of a kind of
their own.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from sdrt.models.shapes import gallery
from sdrt.models.shapes.task_cases import task_cases

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
DOCUMENTS += [ROOT / "models" / "shapes" / "README.md"]
SLOW = ("steered.sdrt", "my-model-gpu.sdrt", "sdrt bench ")
NEEDED = "sdrt build my-model --out my-model.sdrt"  # by the slow ones, and run with the others too
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for number, match in enumerate(FENCE.finditer(document.read_text()), start=1):
            if match[1] == language:
                found.append((f"{document.relative_to(ROOT)} block {number}", match[2]))
    return found


def commands(*, slow: bool) -> list[tuple[str, str]]:
    """(where, line) of every command but the gallery's; slow: those with a part of SLOW, or all others."""
    lines = []
    for name, block in blocks("sh"):
        if "gallery" in name:
            continue
        joined = block.replace("\\\n", " ")
        lines += [(name, line.split("  #")[0].strip()) for line in joined.splitlines() if line.strip()]
    return [
        (name, line) for name, line in lines if any(part in line for part in SLOW) is slow or (slow and line == NEEDED)
    ]


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory, shapes_bundle: Path) -> Path:
    """A folder as a reader of the README would have it: the bundle, a checkpoint and a picture of their own."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(shapes_bundle, folder / "shapes.sdrt")
    shutil.copytree(ROOT / "models" / "shapes" / "checkpoint", folder / "my-model")
    case = next(iter(task_cases("edges", 1)))
    Image.fromarray(case.edges).save(folder / "edges.png")
    return folder


def run_in(folder: Path, command: list[str] | str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    import os

    environment = os.environ | {"PATH": path} | variables
    shell = isinstance(command, str)
    return subprocess.run(command, cwd=folder, shell=shell, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("name", "code"), blocks("python"), ids=lambda value: value if "block" in value else "")
def test_python_blocks_run(name, code, desk):
    done = run_in(desk, [sys.executable, "-c", code])
    assert done.returncode == 0, f"{name}\n{done.stderr}"


@pytest.mark.timeout(900)  # many commands, builds among them
def test_shell_lines_run(desk):
    run_lines(commands(slow=False), desk)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_slow_shell_lines_run(desk, tensorrt_python):
    lines = commands(slow=True)
    assert NEEDED in [line for _, line in lines]
    run_lines(lines, desk, **beside(tensorrt_python))


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_the_gallery_is_drawn_by_its_pages_commands(tmp_path):
    assert gallery.main(["--work", str(tmp_path / "work"), "--out", str(tmp_path / "gallery.png")]) == 0
    assert Image.open(tmp_path / "gallery.png").width > 500


def run_lines(lines: list[tuple[str, str]], desk: Path, **gpu_variables: str) -> None:
    """gpu_variables: of the environment of the commands for TensorRT bundles."""
    assert lines
    for name, line in lines:
        if line.startswith("make "):
            done = run_in(ROOT, ["make", "--dry-run", *shlex.split(line)[1:]])
        elif line.startswith("pip install "):
            check_install(name, line)
            continue
        elif line.startswith(". "):
            check_activation(name, line)
            continue
        else:
            assert line.startswith("sdrt "), f"{name}: this test does not know how to run {line!r}"
            again = " --force" if line.startswith("sdrt build shapes --out") else ""  # the desk has it already
            done = run_in(desk, line + again, **(gpu_variables if "-gpu" in line else {}))
        assert done.returncode == 0, f"{name}: {line}\n{done.stdout}\n{done.stderr}"


def beside(python: Path) -> dict[str, str]:
    """What lets a command find another venv's packages too."""
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    return {"PYTHONPATH": str(packages)}


def check_install(name: str, line: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for wanted in re.findall(r"\[([\w,]+)\]", line):
        assert set(wanted.split(",")) <= set(extras), f"{name}: {line}"


def check_activation(name: str, line: str) -> None:
    venv = re.search(r"^VENV := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert venv is not None
    assert line == f". {venv[1]}/bin/activate", f"{name}: make setup does not make what {line!r} activates"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_makefile_says_what_takes_long_before_it_begins():
    # --always-make: as in a fresh clone. --dry-run: nothing is run.
    made = run_in(ROOT, ["make", "--dry-run", "--always-make", "demo"])
    lines = made.stdout.splitlines()
    slow = [number for number, line in enumerate(lines) if "pip install" in line or "/bin/sdrt " in line]
    assert len(slow) == 5
    assert [lines[number - 1].split()[0] for number in slow] == ["echo"] * 5
