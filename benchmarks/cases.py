"""Cases: the pictures that every contestant draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a task may be given, in the names of `sdrt.Request`.
PICTURES = ("image", "mask_image", "depth_map", "control_image")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One picture to draw, in the names of `sdrt.Request`.

    pictures: the files of what its task is given; options: the task's own fields, such as `strength`.
    """

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str | None = None
    pictures: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """The case without its defaults, as it is sent to a contestant: a picture is the name of its file."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("pictures", "options")}
        given = {name: value for name, value in own.items() if value is not None}
        return {**given, **{name: str(path) for name, path in self.pictures.items()}, **self.options}


def with_pictures(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a contestant was sent, with its pictures opened as PIL images."""
    from PIL import Image

    return {name: Image.open(value) if name in PICTURES else value for name, value in arguments.items()}
