"""The wheel on its own, in a venv of its own: the runtime installs and draws without PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEBIBYTE = 2**20
ABSENT = ("torch", "diffusers", "transformers", "onnx")
MEASURE_IMPORT = (
    "import subprocess, sys, time\n"
    "def seconds(code):\n"
    "    began = time.perf_counter(); subprocess.run([sys.executable, '-c', code], check=True)\n"
    "    return time.perf_counter() - began\n"
    "print(min(seconds('import sdrt') for _ in range(5)) - min(seconds('pass') for _ in range(5)))"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh venv that holds the built wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("install")
    quiet = ("--quiet", "--disable-pip-version-check")
    wheel_options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *quiet, *wheel_options, str(ROOT)], check=True)
    (wheel,) = folder.glob("sdrt-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    interpreter = folder / "venv" / "bin" / "python"
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    subprocess.run([str(interpreter), "-m", "pip", "install", *quiet, *constraints, str(wheel)], check=True)
    return interpreter


def test_the_reference_stack_is_absent(python):
    for module in ABSENT:
        assert subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode != 0


def test_an_image_is_made_from_a_bundle(python, tiny_bundle, tmp_path):
    target = tmp_path / "image.png"
    command = [
        python.parent / "sdrt",
        "run",
        tiny_bundle,
        "a large red circle",
        "--steps",
        "2",
        "--seed",
        "7",
        "--json",
    ]
    done = subprocess.run([*map(str, command), "--out", str(target)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_it_stays_small_and_starts_fast(python, capsys):
    packages = next((python.parents[1] / "lib").glob("python*/site-packages"))
    brought_by_venv = {"pip", "setuptools", "pkg_resources", "_distutils_hack"}
    parts = [part for part in packages.iterdir() if part.name not in brought_by_venv]
    files = [path for part in parts for path in ([part] if part.is_file() else part.rglob("*"))]
    size = sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())
    seconds = float(subprocess.run([str(python), "-c", MEASURE_IMPORT], capture_output=True, text=True).stdout)
    with capsys.disabled():
        print(f"\ninstalled size {size / MEBIBYTE:.0f} MiB, import sdrt {seconds * 1000:.0f} ms")
    assert size <= 350 * MEBIBYTE
    assert seconds <= 0.15
