"""`SamplingPlan`: a scheduler written down as rows of numbers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdrt.errors import RequestError

MAX_STATE_SLOTS = 6  # PNDM needs the most: latents, the restored sample and four past model outputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clamp:
    """What a plan does with an x₀ that is too large: its estimate is cut to ± `limit` before it counts.

    With a `ratio`, it is cut to ± that quantile of |x₀|, which is 1 to `limit`, and divided by it.

    estimates: float64 [rows, 2], (a, b) with x₀ = a · S[0] + b · model_output. weights: float64 [rows, n], how much the
    next state's slots have of x₀; they get that much of what is cut off. The arrays are read-only.
    """

    estimates: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    limit: float
    ratio: float | None = None

    def __post_init__(self) -> None:
        self.estimates.setflags(write=False)
        self.weights.setflags(write=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingPlan:
    """One request's whole sampling, as a matrix program over n state slots.

    Row k means: evaluate the network on ``input_scales[k] * S[0]`` at ``timesteps[k]``, then
    ``S = transitions[k] @ [S; model_output; noise]``. S[0] is the latents; S starts as
    ``initial_scale * noise`` in slot 0 and zeros elsewhere. That is all of a linear sampler; `clamp` is what others do.

    timesteps: float64 [rows]; input_scales: float64 [rows]; transitions: float64 [rows, n, n + 2].
    noised: float64 [rows, 2], the (a, b) with which a · latents + b · noise of an image are as noisy as S[0] is before
    each row. Not finite where the scheduler does not say.
    draws: bool [rows], the rows for which the reference draws noise, where that are more than those that add some.
    The arrays are read-only.
    """

    timesteps: npt.NDArray[np.float64]
    input_scales: npt.NDArray[np.float64]
    transitions: npt.NDArray[np.float64]
    initial_scale: float
    noised: npt.NDArray[np.float64]
    draws: npt.NDArray[np.bool_] | None = None
    clamp: Clamp | None = None

    def __post_init__(self) -> None:
        rows, slots = len(self.timesteps), self.transitions.shape[1] if self.transitions.ndim == 3 else 0
        shapes: list[tuple[npt.NDArray[np.generic], tuple[int, ...]]]
        shapes = [(self.timesteps, (rows,)), (self.input_scales, (rows,)), (self.transitions, (rows, slots, slots + 2))]
        shapes += [(self.noised, (rows, 2))]
        shapes += [] if self.draws is None else [(self.draws, (rows,))]
        if self.clamp is not None:
            shapes += [(self.clamp.estimates, (rows, 2)), (self.clamp.weights, (rows, slots))]
        if rows == 0 or slots == 0 or any(array.shape != shape for array, shape in shapes):
            raise RequestError(
                f"a plan of {rows} timesteps has arrays of {', '.join(str(array.shape) for array, _ in shapes)}",
                hint="give timesteps and input_scales [rows], transitions [rows, n, n + 2] and noised [rows, 2]",
            )
        for array, _ in shapes:
            array.setflags(write=False)

    def __len__(self) -> int:
        """How many rows, which is how often the network is evaluated (PNDM: steps + 1)."""
        return len(self.timesteps)

    @property
    def slots(self) -> int:
        """n, the number of state slots the plan uses."""
        return int(self.transitions.shape[1])

    def draws_noise(self, row: int) -> bool:
        """Whether this row consumes the request's generator."""
        return bool(np.any(self.transitions[row, :, -1]) if self.draws is None else self.draws[row])

    def known_weights(self, rows: slice) -> npt.NDArray[np.float32]:
        """After each of these rows, (a, b) of an image that is as noisy as S[0] then: float32 [rows, 2].

        After the last row it is the image itself.
        """
        after = np.concatenate([self.noised[1:], [(1.0, 0.0)]])
        return after[rows].astype(np.float32)

    def padded_transitions(self, rows: slice, slots: int) -> npt.NDArray[np.float32]:
        """The rows' transitions for a step graph of `slots` ≥ n state slots: float32 [rows, slots, slots + 3].

        The last column is that of what clamping changes.
        """
        own, chosen = self.slots, self.transitions[rows]
        wide = np.zeros((len(chosen), slots, slots + 3), np.float32)
        wide[:, :own, :own] = chosen[:, :, :own]
        wide[:, :own, slots:-1] = chosen[:, :, own:]
        if self.clamp is not None:
            wide[:, :own, -1] = self.clamp.weights[rows]
        return wide

    def clamps(self, rows: slice) -> npt.NDArray[np.float32]:
        """The rows' (a, b, limit) of `Clamp`: float32 [rows, 3]; zeros, of which nothing is cut off, without one."""
        wide = np.zeros((len(self.timesteps[rows]), 3), np.float32)
        if self.clamp is not None:
            wide[:, :2] = self.clamp.estimates[rows]
            wide[:, 2] = self.clamp.limit
        return wide
