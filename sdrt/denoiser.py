"""One denoising step for many trajectories: their rows laid side by side in the step graph, and taken apart again."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sdrt.errors import ParityError
from sdrt.guidance import Lane
from sdrt.runners.base import STEP, Array, FloatArray, Runner
from sdrt.step_border import ALL_STEP_INPUTS, COLUMNS_BESIDE_SLOTS, StepInput
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
        **_known_inputs(trajectories),
        **_conditioning_inputs(trajectories, lanes),
        **_class_inputs(trajectories),
        **_control_inputs(trajectories),
    }


def _known_inputs(trajectories: Sequence[Trajectory]) -> dict[str, Array]:
    """What is known of each, and where; of most nothing."""
    channels, height, width = trajectories[0].latents.shape
    mask = np.ones((len(trajectories), 1, height, width), np.float32)
    known = np.zeros((len(trajectories), 2, channels, height, width), np.float32)
    for index, item in enumerate(trajectories):
        if item.start.known is not None:
            mask[index] = item.start.known.mask
            known[index] = item.start.known.latents, item.start.known.noise
    return {"mask": mask, "known": known}


def _conditioning_inputs(trajectories: Sequence[Trajectory], lanes: Sequence[Lane]) -> dict[str, Array]:
    """More channels for the network, where it has them."""
    arrays = [item.start.conditioning for item in trajectories if item.start.conditioning is not None]
    if not arrays:
        return {}
    shares = np.array([lane.conditioning for lane in lanes], np.float32)
    return {"conditioning": np.stack(arrays), "lane_conditioning": shares}


def _class_inputs(trajectories: Sequence[Trajectory]) -> dict[str, Array]:
    """The class of each lane, where the network has classes."""
    labels = [item.start.class_label for item in trajectories for _ in item.lanes if item.start.class_label is not None]
    return {"class_labels": np.array(labels, np.int64)} if labels else {}


def _control_inputs(trajectories: Sequence[Trajectory]) -> dict[str, Array]:
    """What steers each, where the network has ControlNets."""
    arrays = [item.steering.control for item in trajectories if item.steering is not None]
    return {"control": np.stack(arrays)} if arrays else {}


def row_inputs(trajectories: Sequence[Trajectory], rows: int) -> dict[str, Array]:
    """The step graph's inputs that each row has its own of, for the next rows: each array [rows, …]."""
    slots = trajectories[0].state.shape[0]
    spans = [(item.plan, slice(item.row, item.row + rows)) for item in trajectories]
    per_lane = [pair for pair, item in zip(spans, trajectories, strict=True) for _ in item.lanes]
    weights = np.zeros((rows, len(trajectories), 2), np.float32)
    for index, (item, (plan, span)) in enumerate(zip(trajectories, spans, strict=True)):
        if item.start.known is not None:
            weights[:, index] = plan.known_weights(span)
    scales = [
        item.steering.scales[span]
        for item, (_, span) in zip(trajectories, spans, strict=True)
        if item.steering is not None
    ]
    return {
        **({"control_scales": np.stack(scales, axis=1)} if scales else {}),
        "input_scale": np.stack([plan.input_scales[span] for plan, span in spans], axis=1).astype(np.float32),
        "timestep": np.stack([plan.timesteps[span] for plan, span in per_lane], axis=1).astype(np.float32),
        "clamp": np.stack([plan.clamps(span) for plan, span in spans], axis=1),
        "transition": np.stack([plan.padded_transitions(span, slots) for plan, span in spans], axis=1),
        "known_weights": weights,
    }


def pad_inputs(
    lasting: Mapping[str, Array], rows: Mapping[str, Array], *, requests: int, lanes: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Both kinds of inputs, with inert requests and lanes appended up to these counts.

    An inert request keeps its (zero) state under the identity; an inert lane repeats lane 0 with weight 0.
    """
    more = {
        "requests": requests - len(lasting["state"]),
        "lanes": lanes - len(lasting["lane_request"]),
    }
    return (
        {name: _padded(ALL_STEP_INPUTS[name], array, more, 0) for name, array in lasting.items()},
        {name: _padded(ALL_STEP_INPUTS[name], array, more, 1) for name, array in rows.items()},
    )


def _padded(entry: StepInput, array: Array, more: Mapping[str, int], first: int) -> Array:
    """One input with inert entries; `first` is the axis of its first dimension."""
    if entry.name == "transition":
        slots = array.shape[-2]
        return _appended(array, np.eye(slots, slots + COLUMNS_BESIDE_SLOTS), more["requests"], axis=first)
    for axis, dimension in enumerate(entry.dimensions, start=first):
        if dimension in more:
            inert = np.take(array, [0], axis) if entry.inert is None else entry.inert
            array = _appended(array, inert, more[dimension], axis=axis)
    return array


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
