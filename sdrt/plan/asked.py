"""`AskedSteps`: which steps of a scheduler a request wants, as asked, before a family makes rows of them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdrt.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedSteps:
    """num_inference_steps: of the whole grid. eta: how much noise a scheduler that has that choice adds, 0 to 1.

    first: the step to begin with, as img2img does with a strength below 1; steps before it are left out, and what a
    sampler remembers begins there. timesteps, sigmas: a grid of one's own in the place of the scheduler's, descending;
    sigmas end with the one after the last step. At most one of the two is given, and num_inference_steps is its length.
    """

    num_inference_steps: int
    eta: float = 0.0
    first: int = 0
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None


def refuse_noise(asked: AskedSteps) -> None:
    """RequestError for an eta, by a scheduler that has no such choice."""
    if asked.eta != 0:
        raise RequestError(
            f"eta is {asked.eta:g}, but this scheduler has no such choice",
            hint="leave eta at 0, or use the scheduler ddim",
        )


def refuse_own_grid(asked: AskedSteps, *names: str) -> None:
    """RequestError for `timesteps` or `sigmas` (those of `names`), by a scheduler that makes its own grid only."""
    for name in names:
        if getattr(asked, name) is not None:
            takers = "euler" if name == "sigmas" else "ddpm, euler, heun, dpmpp_2s, dpmpp_2m, lcm, tcd"
            raise RequestError(
                f"this scheduler takes no {name} of one's own",
                hint=f"name the number of steps, or a scheduler that takes {name}: {takers}",
            )


def check_descending(name: str, values: Sequence[float], *, low: float, high: float) -> None:
    """RequestError unless there are values, each smaller than the one before, and all from `low` to `high`."""
    if not values:
        raise RequestError(f"{name} has no values", hint=f"give them from {high:g} down to {low:g}")
    for before, value in itertools.pairwise(values):
        if not value < before:
            raise RequestError(
                f"{name} has {before:g} before {value:g}", hint="give them in descending order, each once"
            )
    if not (low <= values[-1] and values[0] <= high):
        raise RequestError(
            f"{name} goes from {values[0]:g} to {values[-1]:g}", hint=f"all must be from {low:g} to {high:g}"
        )


def whole_timesteps(timesteps: tuple[float, ...], count: int) -> npt.NDArray[np.int64]:
    """A grid of one's own as indices of a table of `count`: int64 [n]. RequestError unless whole and descending."""
    check_descending("timesteps", timesteps, low=0, high=count - 1)
    for timestep in timesteps:
        if timestep != int(timestep):
            raise RequestError(f"timesteps has {timestep:g}", hint="this scheduler takes whole numbers")
    return np.array(timesteps, np.int64)
