"""The border of the step graph: each of its inputs, with its dimensions and what padding puts there."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

COLUMNS_BESIDE_SLOTS = 3  # of a transition: model output, noise, what clamping changes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """An input: its dimensions by name, of which `fixed_sizes` gives those that a bundle fixes.

    each_row: every row of a plan has its own, the others last. inert: what a request or a lane that only fills up a
    batch has there; None is what lane 0 has.
    """

    name: str
    dimensions: tuple[str, ...]
    dtype: Literal["float32", "int64"] = "float32"
    each_row: bool = False
    inert: float | None = 0.0


_ALWAYS = (
    StepInput(name="state", dimensions=("requests", "slots", "channels", "height", "width")),
    StepInput(name="input_scale", dimensions=("requests",), each_row=True, inert=1.0),
    StepInput(name="lane_request", dimensions=("lanes",), dtype="int64", inert=None),
    StepInput(name="timestep", dimensions=("lanes",), each_row=True, inert=None),
    StepInput(name="prompt_embeds", dimensions=("lanes", "length", "features"), inert=None),
    StepInput(name="guidance", dimensions=("requests", "lanes")),
    StepInput(name="rescale_lanes", dimensions=("requests", "lanes")),
    StepInput(name="guidance_rescale", dimensions=("requests",)),
    StepInput(name="clamp", dimensions=("requests", "limits"), each_row=True),
    StepInput(name="transition", dimensions=("requests", "slots", "columns"), each_row=True),
    StepInput(name="noise", dimensions=("requests", "channels", "height", "width")),
    StepInput(name="mask", dimensions=("requests", "one", "height", "width"), inert=1.0),
    StepInput(name="known", dimensions=("requests", "two", "channels", "height", "width")),
    StepInput(name="known_weights", dimensions=("requests", "two"), each_row=True),
)
_OF_MORE_CHANNELS = (
    StepInput(name="conditioning", dimensions=("requests", "conditions", "height", "width")),
    StepInput(name="lane_conditioning", dimensions=("lanes",), inert=None),
)
_OF_CONTROLS = (
    StepInput(name="control", dimensions=("requests", "controls", "control_features", "height", "width")),
    StepInput(name="control_scales", dimensions=("requests", "controls"), each_row=True),
)
_OF_CLASSES = (StepInput(name="class_labels", dimensions=("lanes",), dtype="int64", inert=None),)

# Every input that a step graph may have, by name.
ALL_STEP_INPUTS: Mapping[str, StepInput] = MappingProxyType(
    {entry.name: entry for entry in (*_ALWAYS, *_OF_MORE_CHANNELS, *_OF_CLASSES, *_OF_CONTROLS)}
)


def step_inputs_of(
    *, conditioning_channels: int = 0, class_labels: bool = False, controls: bool = False
) -> tuple[StepInput, ...]:
    """The inputs for a UNet with this many channels beside the latents', perhaps with class labels or ControlNets."""
    more = _OF_MORE_CHANNELS if conditioning_channels else ()
    return (*_ALWAYS, *more, *(_OF_CLASSES if class_labels else ()), *(_OF_CONTROLS if controls else ()))


def fixed_sizes(
    *,
    slots: int,
    channels: int | str,
    features: int | str,
    conditioning_channels: int = 0,
    controls: int = 0,
    control_features: int = 0,
) -> dict[str, int | str]:
    """The sizes of the dimensions that are no more than one bundle's: those of its model, and of the step itself.

    controls: how many ControlNets there are; control_features: the channels of what they see, embedded.
    """
    return {
        "slots": slots,
        "columns": slots + COLUMNS_BESIDE_SLOTS,
        "channels": channels,
        "features": features,
        "conditions": conditioning_channels,
        "controls": controls,
        "control_features": control_features,
        "limits": 3,
        "one": 1,
        "two": 2,
    }
