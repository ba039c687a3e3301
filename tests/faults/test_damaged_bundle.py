"""No damage to any file of a bundle goes unnoticed, and each is a BundleError, never a crash or a wrong image."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from sdrt.bundle import Bundle, verify_files
from sdrt.errors import BundleError

SPEC = importlib.util.spec_from_file_location("small_bundle", Path(__file__).parents[1] / "small_bundle.py")
small_bundle = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small_bundle)


def listed_files():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "a"
        small_bundle.write_bundle(folder)
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


FILES = listed_files()


@pytest.fixture
def folder(tmp_path):
    small_bundle.write_bundle(tmp_path / "a.sdrt")
    return tmp_path / "a.sdrt"


def check(folder):
    verify_files(Bundle.open(folder))


def flip(path, position, bit=0):
    """Change one bit in place: rewriting whole files thousands of times would wait for the disk each time."""
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))


def swap_two_bytes(path):
    data = path.read_bytes()
    first = next(index for index in range(len(data) - 1) if data[index] != data[index + 1])
    path.write_bytes(data[:first] + data[first : first + 2][::-1] + data[first + 2 :])


DAMAGE = {
    "first bit flipped": lambda path: flip(path, 0),
    "middle bit flipped": lambda path: flip(path, path.stat().st_size // 2, 3),
    "last bit flipped": lambda path: flip(path, -1, 7),
    "two bytes swapped": swap_two_bytes,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "emptied": lambda path: os.truncate(path, 0),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "two bytes short": lambda path: os.truncate(path, path.stat().st_size - 2),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "doubled": lambda path: path.write_bytes(path.read_bytes() * 2),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


def test_the_undamaged_bundle_is_fine(folder):
    assert len(FILES) == 11
    check(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_to_any_file_is_found(folder, file, damage):
    damage(folder / file)
    with pytest.raises(BundleError) as caught:
        check(folder)
    assert caught.value.hint


@pytest.mark.parametrize("file", [file for file in FILES if file != "bundle.json"])
def test_every_flipped_byte_is_found(folder, file):
    bundle, path = Bundle.open(folder), folder / file
    good = path.read_bytes()
    for position in range(len(good)):
        flip(path, position, position % 8)
        with pytest.raises(BundleError, match="not the file that was sealed"):
            verify_files(bundle)
        flip(path, position, position % 8)
    verify_files(bundle)
    assert path.read_bytes() == good


def test_every_flipped_bit_of_the_manifest_is_found_on_opening(folder):
    path = folder / "bundle.json"
    good = path.read_bytes()
    for position in range(len(good)):
        for bit in range(8):
            flip(path, position, bit)
            with pytest.raises(BundleError):
                Bundle.open(folder)
            flip(path, position, bit)
    assert path.read_bytes() == good
    check(folder)


def test_every_shorter_manifest_is_found_on_opening(folder):
    path = folder / "bundle.json"
    good = path.read_bytes()
    assert good.endswith(b"}\n")
    for length in reversed(range(len(good) - 1)):
        os.truncate(path, length)
        with pytest.raises(BundleError):
            Bundle.open(folder)


@pytest.mark.parametrize("size", ["of the same size", "of another size"])
def test_engines_that_were_exchanged_are_found(folder, size):
    names = ("vae_decoder", "vae_encoder") if size == "of the same size" else ("step", "vae_encoder")
    paths = [folder / "engines" / name / "model.bin" for name in names]
    first, second = (path.read_bytes() for path in paths)
    assert (len(first) == len(second)) == (size == "of the same size")
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    with pytest.raises(BundleError):
        check(folder)


def test_the_manifest_of_another_bundle_is_found(folder, tmp_path):
    small_bundle.write_files(tmp_path / "b")
    (tmp_path / "b" / "engines" / "step" / "model.bin").write_bytes(bytes(101))
    small_bundle.write_manifest(tmp_path / "b", small_bundle.describe(tmp_path / "b"))
    check(tmp_path / "b")
    shutil.copyfile(tmp_path / "b" / "bundle.json", folder / "bundle.json")
    with pytest.raises(BundleError, match=r"engines/step/model\.bin"):
        check(folder)
