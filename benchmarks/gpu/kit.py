"""The kit for a GPU machine without a network: wheels, engines of the embedded model, cut into parts that travel.

python -m sdrt.benchmarks.gpu.kit --out build/gpu-kit [--with NAME]…; `from_kit.py` puts it together there.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sdrt.benchmarks.builds import ensure_tensorrt, run_timed
from sdrt.benchmarks.gpu.from_kit import BUNDLE, PIECES_NAME, PYTHON, WHEELS
from sdrt.errors import BuildError, SdrtError
from sdrt.files import staged_directory

# What an image with PyTorch lacks. Their own needs that such an image has are not carried: from_kit.py says what is
# missing, and --with adds it.
PACKAGES = (
    "tensorrt-rtx-cu13-bindings",
    "tensorrt-rtx-cu13-libs",
    "cuda-bindings",
    "cuda-pathfinder",
    "msgspec",
    "diffusers",
    "importlib-metadata",
    "zipp",
    "requests",
    "urllib3",
    "charset-normalizer",
    "idna",
    "certifi",
)
SOURCE_PACKAGES = ("tensorrt-rtx-cu13",)  # pure Python that is published as source: its wheel is made here
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64")
LARGEST_MIB = 60  # of a part and the repository together
ROOT = Path(__file__).resolve().parents[2]


def make_kit(out: Path, extra: Sequence[str], tensorrt: Path) -> list[Path]:
    """Write part-1, part-2, … with one piece each, and return their folders. Raises BuildError, OutputError."""
    with tempfile.TemporaryDirectory(prefix="sdrt-kit-") as folder:
        content = Path(folder) / "content"
        download_wheels([*PACKAGES, *extra], content / WHEELS)
        build_shapes(content / BUNDLE, ensure_tensorrt(tensorrt))
        archive = Path(folder) / "kit.tar"
        with tarfile.open(archive, "w:xz", preset=1) as tar:  # for the engines; wheels do not shrink
            tar.add(content, arcname=".")
        room = LARGEST_MIB * 2**20 - repository_bytes(ROOT)
        with staged_directory(out, overwrite=True) as staged:
            names = [part.name for part in cut(archive, staged, room)]
    return [out / name for name in names]


def download_wheels(packages: Sequence[str], folder: Path) -> None:
    """The pinned wheels for the other machine's Python, without what they need in turn. Raises BuildError."""
    pins = pinned_versions(ROOT / "constraints.txt")

    def pinned(names: Sequence[str]) -> list[str]:
        return [f"{name}=={pins[name]}" if name in pins else name for name in names]

    platforms = [flag for name in PLATFORMS for flag in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--python-version", ".".join(map(str, PYTHON)), "--implementation", "cp", "--dest", str(folder)]
    run_timed([*command, *pinned(packages)])
    make = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    run_timed([*make, *pinned(SOURCE_PACKAGES)])


def pinned_versions(constraints: Path) -> dict[str, str]:
    """Package → version, of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in constraints.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def build_shapes(out: Path, python: Path) -> None:
    """The embedded model's bundle, exported here and built ahead of time. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="sdrt-onnx-") as folder:
        exported = Path(folder) / "shapes"
        checkpoint = ROOT / "models" / "shapes" / "checkpoint"
        run_timed([sys.executable, "-m", "sdrt.export", str(checkpoint), str(exported)])
        run_timed([str(python), "-m", "sdrt.engines", str(exported), str(out), "--backend", "tensorrt"])


def repository_bytes(root: Path) -> int:
    """The size of what git tracks, and of new files that it does not ignore. Raises BuildError outside a checkout."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{root} is no git checkout", hint="make the kit from a clone") from error
    return sum((root / name).stat().st_size for name in listed.split("\0") if name and (root / name).is_file())


def cut(archive: Path, folder: Path, room: int) -> list[Path]:
    """Folders part-1, part-2, … of at most `room` bytes, as few as that allows and of one size.

    Each holds a piece of the archive and the list of all pieces.
    """
    if room < 2**20:
        raise BuildError(f"{room} bytes are left for a part", hint="the repository itself has become too large")
    space = room - 2**16  # the list of pieces is in each part
    content = archive.stat().st_size
    count = -(-content // space)
    size = -(-content // count)
    pieces, parts = [], []
    with archive.open("rb") as source:
        for number in range(1, count + 1):
            part = folder / f"part-{number}"
            part.mkdir()
            piece = part / f"kit.tar.{number:02}"
            data = source.read(size)
            piece.write_bytes(data)
            pieces.append({"name": piece.name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})
            parts.append(part)
    for part in parts:
        (part / PIECES_NAME).write_text(json.dumps(pieces, indent=2) + "\n")
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the kit; print its parts."""
    parser = argparse.ArgumentParser(prog="python -m sdrt.benchmarks.gpu.kit", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-kit"))
    parser.add_argument("--with", dest="extra", action="append", default=[], metavar="NAME", help="another package")
    parser.add_argument("--tensorrt", type=Path, default=Path("build/venv-tensorrt"), help="a venv, made if absent")
    options = parser.parse_args(arguments)
    if shutil.which("git") is None:
        print("error: git is not on the PATH\nhint: install it", file=sys.stderr)
        return 1
    try:
        parts = make_kit(options.out, options.extra, options.tensorrt)
    except SdrtError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    for part in parts:
        size = sum(file.stat().st_size for file in part.iterdir())
        print(f"{part}  {size / 2**20:.1f} MiB")
    print("on the GPU machine, once for each part: make gpu-check KIT=PART")
    return 0


if __name__ == "__main__":
    sys.exit(main())
