"""Plans: what a scheduler takes over from the checkpoint, and its rows. A module per family; names in `catalog.py`."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan.asked import AskedSteps
from sdrt.plan.catalog import FAMILIES, NAMES, Family, base_names, find_scheduler
from sdrt.plan.clamping import read_thresholding
from sdrt.plan.derivation import derive
from sdrt.plan.rows import MAX_STATE_SLOTS, SamplingPlan
from sdrt.schedule import SCHEDULE_FIELDS, unsupported_field

__all__ = ["MAX_STATE_SLOTS", "SCHEDULERS", "SamplingPlan", "build_plan", "count_steps", "derive"]


SCHEDULERS: tuple[str, ...] = tuple(NAMES)
DEFAULT_STEPS = 50

# One scheduler's config may hold another's fields, which mean nothing to it: a checkpoint was used with many.
_KNOWN_FIELDS = frozenset({*SCHEDULE_FIELDS, *(name for family in FAMILIES.values() for name in family.fields)})


def build_plan(
    *,
    scheduler_class: str,
    scheduler_config: Mapping[str, JsonValue],
    num_inference_steps: int | None = None,
    scheduler: str | None = None,
    eta: float = 0.0,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    first: int = 0,
) -> SamplingPlan:
    """The rows of `num_inference_steps` steps with `scheduler`, or with the checkpoint's own when that is None.

    scheduler_class, scheduler_config: those of the checkpoint (scheduler_config.json). Another scheduler takes over
    the fields it shares with that config, and its own defaults for the rest. scheduler: one of `SCHEDULERS` or a
    class name as in checkpoints. eta: how much noise, 0 to 1, of those that have the choice. timesteps, sigmas: a grid
    of one's own, as the `set_timesteps` of the reference takes it. first: how many steps are left out at the start.
    RequestError: unknown scheduler, impossible step count, grid or eta, or a config field that cannot be honoured.
    Equal arguments give the same object.
    """
    if not math.isfinite(eta) or eta < 0:
        raise RequestError(f"eta is {eta:g}", hint="give a number from 0 to 1")
    family, overrides = _select(scheduler, scheduler_class)
    asked = AskedSteps(
        num_inference_steps=_step_count(family, num_inference_steps, timesteps, sigmas),
        eta=float(eta),
        first=first,
        timesteps=_numbers("timesteps", timesteps),
        sigmas=_numbers("sigmas", sigmas),
    )
    if not 0 <= first < asked.num_inference_steps:
        raise RequestError(
            f"first is {first} of {asked.num_inference_steps} steps", hint="leave out fewer steps than there are"
        )
    config = json.dumps(dict(scheduler_config), sort_keys=True)
    return _cached_plan(family.class_name, json.dumps(dict(overrides)), config, asked, scheduler is None)


@lru_cache(maxsize=64)
def _cached_plan(class_name: str, overrides_json: str, config_json: str, asked: AskedSteps, own: bool) -> SamplingPlan:
    family, whole = FAMILIES[class_name], json.loads(config_json)
    config = _taken_over(whole, family, json.loads(overrides_json), own=own)
    trained = config["num_train_timesteps"]
    if isinstance(trained, int) and asked.num_inference_steps > trained:
        raise RequestError(
            f"num_inference_steps is {asked.num_inference_steps}, but the model was trained with {trained} timesteps",
            hint=f"ask for at most {trained} steps",
        )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # checked as a whole below
        plan = family.plan(config, asked)
    _refuse_infinite(plan, family, asked.num_inference_steps)
    if plan.clamp is not None and plan.clamp.ratio is None and read_thresholding(whole) is not None:
        # The step graph takes quantiles where the checkpoint's config says so, whatever the scheduler.
        raise unsupported_field("thresholding", True)
    return plan


def count_steps(
    *,
    scheduler_class: str,
    scheduler: str | None,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> int:
    """How many steps `build_plan` makes for these. RequestError where they contradict one another."""
    return _step_count(_select(scheduler, scheduler_class)[0], num_inference_steps, timesteps, sigmas)


def _step_count(
    family: Family, steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> int:
    """How many steps are asked for, once and not in contradiction."""
    if timesteps is not None and sigmas is not None:
        raise RequestError("timesteps and sigmas are both given", hint="give one of the two")
    own = timesteps if sigmas is None else sigmas
    if own is None:
        count: object = DEFAULT_STEPS if steps is None else steps
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise RequestError(f"num_inference_steps is {count!r}", hint="give a whole number from 1")
        return count
    name = "timesteps" if sigmas is None else "sigmas"
    # Sigmas of one's own end with the one after the last step, but for flow matching, where that is always zero.
    ends_included = sigmas is not None and family.schedule != "flow"
    count = len(own) - 1 if ends_included else len(own)
    if steps is not None and steps != count:
        raise RequestError(
            f"num_inference_steps is {steps}, but {name} has {count} steps", hint="leave num_inference_steps out"
        )
    return max(count, 1)  # none at all is told by the family


def _numbers(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    if not all(math.isfinite(value) for value in values):
        raise RequestError(f"{name} is {values!r}", hint="give finite numbers in descending order")
    return tuple(float(value) for value in values)


def _select(scheduler: str | None, scheduler_class: str) -> tuple[Family, Mapping[str, JsonValue]]:
    """The family and the config fields that its name sets."""
    if scheduler_class not in FAMILIES:
        raise RequestError(
            f"the checkpoint's scheduler is {scheduler_class!r}, which is of no kind that sdrt knows",
            hint="sdrt samples models whose scheduler is one of: " + ", ".join(sorted(FAMILIES)),
        )
    own = FAMILIES[scheduler_class]
    if scheduler is None:
        return own, {}
    found = find_scheduler(scheduler, own.schedule)
    if found.family.schedule != own.schedule:
        alike = [name for name, other in NAMES.items() if other.family.schedule == own.schedule]
        raise RequestError(
            f"{scheduler} cannot take the place of the checkpoint's {scheduler_class}: their noise is of another kind",
            hint=f"leave the scheduler out, or choose one of: {', '.join(alike)}"
            if alike
            else "leave the scheduler out",
        )
    return found.family, found.fields


def _taken_over(
    config: dict[str, JsonValue], family: Family, overrides: Mapping[str, JsonValue], *, own: bool
) -> dict[str, JsonValue]:
    """Every field that `family` reads: from `overrides`, the checkpoint's config or the family's defaults.

    own: the config is the family's own; another one does not get the fields that are in it by default only.
    """
    for name, value in config.items():
        if not name.startswith("_") and name not in _KNOWN_FIELDS:
            raise RequestError(
                f"the checkpoint's scheduler config has an unknown field {name}={value!r}",
                hint="remove it from scheduler_config.json if the model does not need it",
            )
    if config.get("rescale_betas_zero_snr") is True and "rescale_betas_zero_snr" not in family.fields:
        able = [name for name in base_names() if "rescale_betas_zero_snr" in NAMES[name].family.fields]
        raise RequestError(
            f"the checkpoint's config has rescale_betas_zero_snr=True, which {family.class_name} does not know",
            hint=f"choose one of: {', '.join(able)}",
        )
    defaulted = [] if own else config.get("_use_default_values", [])  # written by a live scheduler object
    given = {name: value for name, value in config.items() if not isinstance(defaulted, list) or name not in defaulted}
    return {**family.fields, **{name: given[name] for name in family.fields if name in given}, **overrides}


def _refuse_infinite(plan: SamplingPlan, family: Family, num_inference_steps: int) -> None:
    arrays = (plan.timesteps, plan.input_scales, plan.transitions, np.array(plan.initial_scale))
    if not all(np.isfinite(array).all() for array in arrays):
        raise RequestError(
            f"{family.class_name} has no finite {num_inference_steps} steps with the checkpoint's noise schedule",
            hint="ask for another number of steps, or another scheduler",
        )
