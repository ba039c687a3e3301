"""One denoising step for many trajectories: their rows laid side by side in the step graph, and taken apart again."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sdrt.errors import ParityError
from sdrt.runners.base import STEP, Array, FloatArray, Runner
from sdrt.trajectory import Trajectory


def step_trajectories(runner: Runner, trajectories: Sequence[Trajectory]) -> dict[Trajectory, ParityError]:
    """Advance every trajectory by one row of its own plan, in one evaluation of the step graph.

    All must have latents of one size and not be finished.
    Returns the trajectories whose next state is not finite, each with its error; these did not advance. When a
    shared step is not finite, every trajectory is tried alone, so only the one at fault is returned.
    """
    states = run_step(runner, trajectories)
    finite = [bool(np.isfinite(state).all()) for state in states]
    if not all(finite) and len(trajectories) > 1:
        return step_alone(runner, trajectories)
    for trajectory, state in zip(trajectories, states, strict=True):
        if all(finite):
            trajectory.advance(state)
    return {} if all(finite) else {trajectories[0]: not_finite(trajectories[0])}


def step_alone(runner: Runner, trajectories: Sequence[Trajectory]) -> dict[Trajectory, ParityError]:
    """`step_trajectories` of one after the other."""
    faults: dict[Trajectory, ParityError] = {}
    for trajectory in trajectories:
        faults |= step_trajectories(runner, [trajectory])
    return faults


def run_step(runner: Runner, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
    """Each trajectory's next state, float32 [n, C, h, w]; nothing is advanced."""
    result = runner.run(STEP, step_inputs(trajectories))["next_state"]
    return [result[index].copy() for index in range(len(trajectories))]


def step_inputs(trajectories: Sequence[Trajectory]) -> dict[str, Array]:
    """The step graph's inputs (see docs/architecture.md) for the next row of each."""
    inputs = lasting_inputs(trajectories)
    inputs |= {name: rows[0] for name, rows in row_inputs(trajectories, 1).items()}
    inputs["noise"] = np.stack([item.noise() for item in trajectories])
    return inputs


def lasting_inputs(trajectories: Sequence[Trajectory]) -> dict[str, Array]:
    """The step graph's inputs that are the same in every row, and the state as it is now."""
    lane_request = [index for index, item in enumerate(trajectories) for _ in item.lanes]
    lanes = [lane for item in trajectories for lane in item.lanes]
    guidance, aims = np.zeros((2, len(trajectories), len(lanes)), np.float32)
    guidance[lane_request, range(len(lanes))] = [lane.weight for lane in lanes]
    aims[lane_request, range(len(lanes))] = [lane.rescale_weight for lane in lanes]
    return {
        "state": np.stack([item.state for item in trajectories]),
        "lane_request": np.array(lane_request, np.int64),
        "prompt_embeds": np.stack([lane.prompt_embeds for lane in lanes]),
        "guidance": guidance,
        "rescale_lanes": aims,
        "guidance_rescale": np.array([item.guidance_rescale for item in trajectories], np.float32),
    }


def row_inputs(trajectories: Sequence[Trajectory], rows: int) -> dict[str, Array]:
    """The step graph's inputs that each row has its own of, for the next rows: each array [rows, …]."""
    slots = trajectories[0].state.shape[0]
    spans = [(item.plan, slice(item.row, item.row + rows)) for item in trajectories]
    per_lane = [pair for pair, item in zip(spans, trajectories, strict=True) for _ in item.lanes]
    return {
        "input_scale": np.stack([plan.input_scales[span] for plan, span in spans], axis=1).astype(np.float32),
        "timestep": np.stack([plan.timesteps[span] for plan, span in per_lane], axis=1).astype(np.float32),
        "clamp": np.stack([plan.clamps(span) for plan, span in spans], axis=1),
        "transition": np.stack([plan.padded_transitions(span, slots) for plan, span in spans], axis=1),
    }


def pad_inputs(
    lasting: Mapping[str, Array], rows: Mapping[str, Array], *, requests: int, lanes: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Both kinds of inputs, with inert requests and lanes appended up to these counts.

    An inert request keeps its (zero) state under the identity; an inert lane repeats lane 0 with weight 0.
    """
    more_requests, more_lanes = requests - len(lasting["state"]), lanes - len(lasting["lane_request"])
    slots = lasting["state"].shape[1]
    padded = {name: _appended(lasting[name], 0, more_requests) for name in ("state", "noise")}
    padded |= {
        name: _appended(lasting[name], lasting[name][:1], more_lanes) for name in ("lane_request", "prompt_embeds")
    }
    padded |= {
        name: np.pad(lasting[name], ((0, more_requests), (0, more_lanes))) for name in ("guidance", "rescale_lanes")
    }
    padded["guidance_rescale"] = _appended(lasting["guidance_rescale"], 0, more_requests)
    padded_rows = {
        "input_scale": _appended(rows["input_scale"], 1, more_requests, axis=1),
        "clamp": _appended(rows["clamp"], 0, more_requests, axis=1),
        "transition": _appended(rows["transition"], np.eye(slots, slots + 3), more_requests, axis=1),
        "timestep": _appended(rows["timestep"], rows["timestep"][:, :1], more_lanes, axis=1),
    }
    return padded, padded_rows


def _appended(array: Array, value: npt.ArrayLike, count: int, *, axis: int = 0) -> Array:
    """`array` with `count` more entries along an axis, each of them `value`."""
    shape = (*array.shape[:axis], count, *array.shape[axis + 1 :])
    return np.concatenate([array, np.broadcast_to(np.asarray(value, array.dtype), shape)], axis)


def not_finite(trajectory: Trajectory, rows: int = 1) -> ParityError:
    """The error of a trajectory whose state is not finite after its next `rows` rows."""
    first, last = trajectory.row + 1, trajectory.row + rows
    where = f"step {first}" if rows == 1 else f"one of the steps {first} to {last}"
    return ParityError(
        f"{where} of {len(trajectory.plan)} gave NaN or infinity",
        hint="build the bundle again with --precision fp32, or ask for a lower guidance_scale",
    )
