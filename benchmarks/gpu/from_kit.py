"""The GPU runbook on a machine without a network: put the parts of a kit together, then run it from this checkout.

python3 benchmarks/gpu/from_kit.py PART [options of the runbook]. Standard library only.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path

PIECES_NAME = "pieces.json"
WHEELS, BUNDLE = "wheels", "shapes.sdrt"
STORE = Path("build") / "gpu"
PACKAGES = ("sdrt", "export", "engines", "benchmarks", "models")  # folders of the checkout
PYTHON = (3, 12)  # what the kit's wheels are for
# What the kit does not bring: module → package. Without these nothing runs:
NEEDED = {
    "numpy": "numpy",
    "PIL": "pillow",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "psutil": "psutil",
}
# And these only some stages import: those that judge images, compare with PyTorch, or build.
NEEDED_BY_SOME = {
    "scipy": "scipy",
    "torch": "torch",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "accelerate": "accelerate",
    "huggingface_hub": "huggingface-hub",
    "filelock": "filelock",
    "regex": "regex",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "typer": "typer",
    "rich": "rich",
}
WAITING = 3  # exit code: nothing is wrong, and not all is here yet


class KitError(Exception):
    """What is wrong with the kit, and what to do."""


def keep_part(part: Path, home: Path) -> list[str]:
    """Copy a part's piece to where the kit is kept; returns the names of the pieces that are still missing.

    A part of another kit begins anew: what was made of the older one is removed. Raises KitError for a damaged piece.
    """
    store = home / "kit"
    listing = part / PIECES_NAME
    if not listing.is_file():
        raise KitError(f"{part} has no {PIECES_NAME}; name the folder of one part, as `make gpu-kit` printed it")
    pieces = json.loads(listing.read_text())
    known = store / PIECES_NAME
    if known.is_file() and json.loads(known.read_text()) != pieces:
        for name in ("kit", "unpacked", "site", BUNDLE):
            shutil.rmtree(home / name, ignore_errors=True)
    store.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(pieces))
    for piece in pieces:
        source = part / piece["name"]
        if not source.is_file():
            continue
        data = source.read_bytes()
        if hashlib.sha256(data).hexdigest() != piece["sha256"]:
            raise KitError(f"{source} is damaged: its sha256 is not the one of the kit; copy it again")
        (store / piece["name"]).write_bytes(data)
    return [piece["name"] for piece in pieces if not (store / piece["name"]).is_file()]


def unpack(store: Path, target: Path) -> None:
    """Join the pieces and unpack them, once."""
    if target.is_dir():
        return
    joined = store / "kit.tar"
    with joined.open("wb") as whole:
        for piece in json.loads((store / PIECES_NAME).read_text()):
            with (store / piece["name"]).open("rb") as source:
                shutil.copyfileobj(source, whole)
    fresh = target.with_name(target.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(joined) as archive:
        archive.extractall(fresh, filter="data")
    joined.unlink()
    fresh.rename(target)


def install(wheels: Path, site: Path) -> None:
    """The wheels as a folder to import from, once. Raises KitError."""
    if sys.version_info[:2] != PYTHON:
        wanted = ".".join(map(str, PYTHON))
        raise KitError(
            f"the kit is for Python {wanted}, and this is {_python()}; "
            f"name another: make gpu-check GPU_PYTHON=python{wanted} KIT=…"
        )
    if site.is_dir():
        return
    fresh = site.with_name(site.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    # Isolated: what the machine sets for pip, such as constraints of its own, is not for these.
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--disable-pip-version-check", "--target", str(fresh)]
    done = subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"pip ended with code {done.returncode}"]
        raise KitError(f"the kit's wheels cannot be installed here: {said[-1]}")
    fresh.rename(site)


def lay_out(checkout: Path, tree: Path) -> None:
    """The checkout's folders under the names that they are imported by; links, so that changes are seen."""
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "sdrt").mkdir(parents=True)
    for entry in (checkout / "sdrt").iterdir():
        (tree / "sdrt" / entry.name).symlink_to(entry)
    for name in PACKAGES[1:]:
        (tree / "sdrt" / name).symlink_to(checkout / name)


def missing_packages(wanted: Mapping[str, str], site: Path) -> list[str]:
    """What of it neither this machine's Python has nor the kit brought."""
    path = [str(site), *sys.path]
    return [package for module, package in wanted.items() if PathFinder.find_spec(module, path) is None]


def prepare(part: Path, checkout: Path) -> list[str]:
    """Make build/gpu ready to run from; returns the pieces that are still missing. Raises KitError, OSError."""
    home = checkout / STORE
    if missing := keep_part(part, home):
        return missing
    unpack(home / "kit", home / "unpacked")
    install(home / "unpacked" / WHEELS, home / "site")
    if absent := missing_packages(NEEDED, home / "site"):
        raise KitError(
            f"Python {_python()} has no {', '.join(absent)}; "
            f'bring it with the kit: make gpu-kit WITH="{" ".join(absent)}"'
        )
    if not (home / BUNDLE).is_dir():
        fresh = home / (BUNDLE + ".partial")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(home / "unpacked" / BUNDLE, fresh)  # a copy: the golden image on a GPU completes its seal
        fresh.rename(home / BUNDLE)
    lay_out(checkout, home / "tree")
    return []


def main(arguments: list[str]) -> int:
    """Keep the part; once all are here, run the runbook."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: make gpu-check KIT=PART, with a folder that `make gpu-kit` wrote", file=sys.stderr)
        return 2
    checkout = Path(__file__).resolve().parents[2]
    home = checkout / STORE
    try:
        missing = prepare(Path(arguments[0]), checkout)
    except (KitError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    absent = missing_packages({**NEEDED, **NEEDED_BY_SOME}, home / "site")
    if absent:
        print(f"note: Python {_python()} has no {', '.join(absent)}; stages that need it will fail", flush=True)
    if missing:
        print(f"kept; still to be brought, by the same command: {', '.join(missing)}")
        return WAITING
    paths = [str(home / "tree"), str(home / "site"), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONSAFEPATH": "1",  # not from the working directory: the checkout's sdrt is a part of the laid out one
    }
    command = [sys.executable, "-m", "sdrt.benchmarks.gpu", "--work", str(home), *arguments[1:]]
    return subprocess.run(command, env=variables, cwd=checkout).returncode


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
