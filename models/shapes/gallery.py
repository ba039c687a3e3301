"""The gallery: runs the commands of docs/gallery.md in a folder, and makes one sheet of what they were given and drew.

python -m sdrt.models.shapes.gallery --work build/gallery --out docs/pictures/gallery.png
"""

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdrt.errors import BuildError
from sdrt.models.shapes.conditions import Drawing, around_object, depth_map, draw, edge_map, low_resolution
from sdrt.models.shapes.scenes import Scene, SceneObject

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gallery.md"
CELL, GAP, TITLE = 192, 12, 22  # pixels
COLUMNS = 2
_FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SEED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row of the sheet: its title, the pictures that its command was given, and the one that it drew."""

    title: str
    given: tuple[str, ...]
    drawn: str


ENTRIES = (
    Entry(title="text-to-image", given=(), drawn="text-to-image.png"),
    Entry(title="a variation of it", given=(), drawn="variation.png"),
    Entry(title="image-to-image", given=("photo.png",), drawn="image-to-image.png"),
    Entry(title="inpainting", given=("photo.png", "mask.png"), drawn="inpaint.png"),
    Entry(title="outpainting", given=("photo.png",), drawn="outpaint.png"),
    Entry(title="outpainting in windows", given=("photo.png",), drawn="windows.png"),
    Entry(title="x4 super-resolution", given=("small.png",), drawn="upscale.png"),
    Entry(title="depth-to-image", given=("depth.png",), drawn="depth-to-image.png"),
    Entry(title="ControlNet (edges)", given=("edges.png",), drawn="controlnet.png"),
    Entry(title="two passes", given=(), drawn="two-passes.png"),
    Entry(title="VAE, there and back", given=("photo.png",), drawn="decoded.png"),
)


def commands() -> list[str]:
    """The page's command lines, in order."""
    return [line for block in _FENCE.findall(PAGE.read_text()) for line in block.splitlines() if line.strip()]


def write_given(folder: Path) -> None:
    """The pictures that the commands begin with."""
    scene = _drawn("red", "circle", "left of", "blue", "square", "white")
    Image.fromarray(scene.picture).save(folder / "photo.png")
    Image.fromarray(low_resolution(scene.picture)).save(folder / "small.png")
    mask = np.where(around_object(scene.objects[1], 8.0), 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(folder / "mask.png")
    other = _drawn("cyan", "triangle", "right of", "orange", "cross", "gray")
    depth = depth_map(other.objects, np.random.default_rng(_SEED), softness=1.0)
    low, high = depth.min(), depth.max()
    Image.fromarray(((depth - low) / (high - low) * 255).round().astype(np.uint8)).save(folder / "depth.png")
    Image.fromarray(edge_map(other.objects)).save(folder / "edges.png")


def _drawn(colour: str, shape: str, relation: str, other_colour: str, other_shape: str, background: str) -> Drawing:
    objects = (
        SceneObject(size="large", colour=colour, shape=shape),
        SceneObject(size="small", colour=other_colour, shape=other_shape),
    )
    return draw(Scene(objects=objects, relation=relation, background=background), np.random.default_rng(_SEED))


def run_commands(folder: Path) -> None:
    """Raises BuildError with what a command printed when it fails."""
    for line in commands():
        words = shlex.split(line)
        if words[1] == "build" and (folder / words[words.index("--out") + 1]).is_dir():
            continue
        command = [sys.executable, "-m", "sdrt", *words[1:], "--force"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"{line} failed: {done.stderr.strip()}", hint="run it alone in that folder")


def make_sheet(folder: Path) -> Image.Image:
    """All entries, each with its title, what was given and what was drawn."""
    widest = max(len(entry.given) for entry in ENTRIES) + 1
    width, height = widest * (CELL + GAP) + GAP, CELL + TITLE + GAP
    rows = -(-len(ENTRIES) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for index, entry in enumerate(ENTRIES):
        column, row = index // rows, index % rows
        left, top = column * width + GAP, row * height + GAP
        names = " + ".join(Path(name).stem for name in entry.given)
        title = f"{entry.title}, given {names}" if names else entry.title
        pen.text((left, top), title, fill="black", font=font)
        for place, name in enumerate((*entry.given, entry.drawn)):
            picture = _fitted(Image.open(folder / name).convert("RGB"))
            corner = (left + place * (CELL + GAP), top + TITLE)
            sheet.paste(picture, corner)
            pen.rectangle(
                (corner[0] - 1, corner[1] - 1, corner[0] + picture.width, corner[1] + picture.height), outline="silver"
            )
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    """As large as a cell takes it; small pictures keep their pixels visible."""
    scale = min(CELL / image.width, CELL / image.height)
    filter_ = Image.Resampling.NEAREST if image.width < CELL // 2 else Image.Resampling.LANCZOS
    return image.resize((round(image.width * scale), round(image.height * scale)), filter_)


def main(arguments: list[str] | None = None) -> int:
    """Draw everything and write the sheet."""
    parser = argparse.ArgumentParser(prog="python -m sdrt.models.shapes.gallery", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/gallery"))
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/gallery.png"))
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    write_given(options.work)
    run_commands(options.work)
    make_sheet(options.work).save(options.out, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
