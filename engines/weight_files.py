"""An engine's weights in files: those of each ControlNet in one of its own, the same in every bundle that has it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from sdrt.exported import controlnet_weight

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file's weights, by their places in the list that was divided, in the file's order.

    controlnet: whose they are; None: the network's own.
    """

    controlnet: int | None
    weights: tuple[int, ...]

    @property
    def suffix(self) -> str:
        """What tells its name from those of the other files."""
        return "" if self.controlnet is None else f".controlnet-{self.controlnet}"


def weight_files(names: Sequence[str]) -> tuple[WeightFile, ...]:
    """How weights of these names are divided: the network's own first, in the given order, then each ControlNet's.

    A ControlNet's are sorted by their names in it, so that neither its number nor the network around it shows.
    """
    own: list[int] = []
    others: dict[int, list[tuple[str, int]]] = {}
    for place, weight in enumerate(names):
        if (of_controlnet := controlnet_weight(weight)) is None:
            own.append(place)
        else:
            number, name = of_controlnet
            others.setdefault(number, []).append((name, place))
    return (
        WeightFile(controlnet=None, weights=tuple(own)),
        *(
            WeightFile(controlnet=number, weights=tuple(place for _, place in sorted(named)))
            for number, named in sorted(others.items())
        ),
    )


def write_weights(path: Path, arrays: Iterable[npt.NDArray[np.generic]]) -> list[int]:
    """Write the arrays one after the other; returns where each begins, in bytes. Raises OSError."""
    with path.open("wb") as file:
        return [append_weight(file, array) for array in arrays]


def append_weight(file: IO[bytes], array: npt.NDArray[np.generic]) -> int:
    """Write an array at the next aligned place; returns where it begins, in bytes. Raises OSError."""
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    offset = file.tell()
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return offset
