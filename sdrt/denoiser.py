"""One denoising step for many trajectories: their rows laid side by side in the step graph, and taken apart again."""

from collections.abc import Sequence

import numpy as np

from sdrt.errors import ParityError
from sdrt.runners.base import STEP, Array, FloatArray, Runner
from sdrt.trajectory import Trajectory

NO_SIZES: tuple[int, ...] = ()


def step_trajectories(
    runner: Runner, trajectories: Sequence[Trajectory], *, sizes: tuple[int, ...] = NO_SIZES
) -> dict[Trajectory, ParityError]:
    """Advance every trajectory by one row of its own plan, in one evaluation of the step graph.

    All must have latents of one size and not be finished. sizes: the counts of requests and lanes for which the
    backend has an engine or a captured graph, ascending; the batch is padded up to the next one (empty: never).
    Returns the trajectories whose next state is not finite, each with its error; these did not advance. When a
    shared step is not finite, every trajectory is tried alone, so only the one at fault is returned.
    """
    states = run_step(runner, trajectories, sizes=sizes)
    finite = [bool(np.isfinite(state).all()) for state in states]
    if not all(finite) and len(trajectories) > 1:
        faults: dict[Trajectory, ParityError] = {}
        for trajectory in trajectories:
            faults |= step_trajectories(runner, [trajectory], sizes=sizes)
        return faults
    for trajectory, state in zip(trajectories, states, strict=True):
        if all(finite):
            trajectory.advance(state)
    return {} if all(finite) else {trajectories[0]: not_finite(trajectories[0])}


def run_step(runner: Runner, trajectories: Sequence[Trajectory], *, sizes: tuple[int, ...]) -> list[FloatArray]:
    """Each trajectory's next state, float32 [n, C, h, w]; nothing is advanced."""
    result = runner.run(STEP, step_inputs(trajectories, sizes=sizes))["next_state"]
    return [result[index].copy() for index in range(len(trajectories))]


def step_inputs(trajectories: Sequence[Trajectory], *, sizes: tuple[int, ...] = NO_SIZES) -> dict[str, Array]:
    """The step graph's inputs (see docs/architecture.md), padded with inert requests and lanes up to `sizes`."""
    exact = lasting_inputs(trajectories)
    exact |= {name: rows[0] for name, rows in row_inputs(trajectories, 1).items()}
    exact["noise"] = np.stack([item.noise() for item in trajectories])
    requests, lane_count = len(trajectories), len(exact["lane_request"])
    padded = (next_size(requests, sizes), next_size(lane_count, sizes))
    return exact if padded == (requests, lane_count) else _padded(exact, *padded)


def lasting_inputs(trajectories: Sequence[Trajectory]) -> dict[str, Array]:
    """The step graph's inputs that are the same in every row, and the state as it is now."""
    lane_request = [index for index, item in enumerate(trajectories) for _ in item.lanes]
    lanes = [lane for item in trajectories for lane in item.lanes]
    guidance = np.zeros((len(trajectories), len(lanes)), np.float32)
    guidance[lane_request, range(len(lanes))] = [lane.weight for lane in lanes]
    return {
        "state": np.stack([item.state for item in trajectories]),
        "lane_request": np.array(lane_request, np.int64),
        "prompt_embeds": np.stack([lane.prompt_embeds for lane in lanes]),
        "guidance": guidance,
    }


def row_inputs(trajectories: Sequence[Trajectory], rows: int) -> dict[str, Array]:
    """The step graph's inputs that each row has its own of, for the next rows: each array [rows, …]."""
    slots = trajectories[0].state.shape[0]
    spans = [(item.plan, slice(item.row, item.row + rows)) for item in trajectories]
    per_lane = [pair for pair, item in zip(spans, trajectories, strict=True) for _ in item.lanes]
    return {
        "input_scale": np.stack([plan.input_scales[span] for plan, span in spans], axis=1).astype(np.float32),
        "timestep": np.stack([plan.timesteps[span] for plan, span in per_lane], axis=1).astype(np.float32),
        "transition": np.stack([plan.padded_transitions(span, slots) for plan, span in spans], axis=1),
    }


def next_size(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the ascending sizes that holds `count`, or `count` itself when none does."""
    return next((size for size in sizes if size >= count), count)


def _padded(exact: dict[str, Array], requests: int, lanes: int) -> dict[str, Array]:
    """Inert requests keep their (zero) state under the identity; inert lanes repeat lane 0 with weight 0."""
    more_requests, more_lanes = requests - len(exact["state"]), lanes - len(exact["lane_request"])
    slots = exact["state"].shape[1]
    inert = {
        "state": np.zeros_like(exact["state"][:1]),
        "input_scale": np.ones(1, np.float32),
        "transition": np.eye(slots, slots + 2, dtype=np.float32)[None],
        "noise": np.zeros_like(exact["noise"][:1]),
    }
    padded = {name: np.concatenate([exact[name], *[row] * more_requests]) for name, row in inert.items()}
    for name in ("lane_request", "timestep", "prompt_embeds"):
        padded[name] = np.concatenate([exact[name], *[exact[name][:1]] * more_lanes])
    padded["guidance"] = np.pad(exact["guidance"], ((0, more_requests), (0, more_lanes)))
    return padded


def not_finite(trajectory: Trajectory, rows: int = 1) -> ParityError:
    """The error of a trajectory whose state is not finite after its next `rows` rows."""
    first, last = trajectory.row + 1, trajectory.row + rows
    where = f"step {first}" if rows == 1 else f"one of the steps {first} to {last}"
    return ParityError(
        f"{where} of {len(trajectory.plan)} gave NaN or infinity",
        hint="build the bundle again with --precision fp32, or ask for a lower guidance_scale",
    )
