"""Plans: what a scheduler takes over from the checkpoint, and its rows. A module per family; names in `catalog.py`."""

import json
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan.asked import AskedSteps
from sdrt.plan.catalog import FAMILIES, NAMES, Family, find_scheduler
from sdrt.plan.rows import MAX_STATE_SLOTS, SamplingPlan
from sdrt.schedule import SCHEDULE_FIELDS, NoiseSchedule

__all__ = ["MAX_STATE_SLOTS", "SCHEDULERS", "SamplingPlan", "build_plan"]


SCHEDULERS: tuple[str, ...] = tuple(NAMES)

# With a schedule of their own: no other scheduler can take over the configs of these, nor these those of others.
_WITHOUT_BETAS = frozenset({"IPNDMScheduler"})

# Fields that only those other schedulers read; they mean nothing to the ones here.
_OTHER_SCHEDULERS_FIELDS = frozenset(
    {
        "disable_corrector",
        "original_inference_steps",
        "predict_x0",
        "rho",
        "shift_terminal",
        "sigma_data",
        "sigma_schedule",
        "solver_p",
        "timestep_scaling",
    }
)
_KNOWN_FIELDS = frozenset(
    {*SCHEDULE_FIELDS, *_OTHER_SCHEDULERS_FIELDS, *(name for family in FAMILIES.values() for name in family.fields)}
)


def build_plan(
    *,
    scheduler_class: str,
    scheduler_config: Mapping[str, JsonValue],
    num_inference_steps: int,
    scheduler: str | None = None,
    eta: float = 0.0,
) -> SamplingPlan:
    """The rows of `num_inference_steps` steps with `scheduler`, or with the checkpoint's own when that is None.

    scheduler_class, scheduler_config: those of the checkpoint (scheduler_config.json). Another scheduler takes over
    the fields it shares with that config, and its own defaults for the rest. scheduler: one of `SCHEDULERS` or a
    class name as in checkpoints. eta: DDIM's noise, 0 to 1.
    RequestError: unknown scheduler, impossible step count or eta, or a config field that cannot be honoured.
    Equal arguments give the same object.
    """
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise RequestError(f"num_inference_steps is {num_inference_steps!r}", hint="give a whole number from 1")
    if not math.isfinite(eta) or eta < 0:
        raise RequestError(f"eta is {eta:g}", hint="give a number from 0 to 1")
    config = json.dumps(dict(scheduler_config), sort_keys=True)
    return _cached_plan(scheduler_class, config, num_inference_steps, scheduler, float(eta))


@lru_cache(maxsize=64)
def _cached_plan(
    scheduler_class: str, config_json: str, num_inference_steps: int, scheduler: str | None, eta: float
) -> SamplingPlan:
    family, overrides = _select(scheduler, scheduler_class)
    config = _taken_over(json.loads(config_json), family, overrides)
    schedule = NoiseSchedule.from_config(config)
    if num_inference_steps > len(schedule):
        raise RequestError(
            f"num_inference_steps is {num_inference_steps}, but the model was trained with {len(schedule)} timesteps",
            hint=f"ask for at most {len(schedule)} steps",
        )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # checked as a whole below
        plan = family.plan(config, schedule, AskedSteps(num_inference_steps=num_inference_steps, eta=eta))
    _refuse_infinite(plan, family, num_inference_steps)
    return plan


def _select(scheduler: str | None, scheduler_class: str) -> tuple[Family, Mapping[str, JsonValue]]:
    """The family and the config fields that its name sets."""
    if scheduler_class not in FAMILIES:
        raise RequestError(
            f"the checkpoint's scheduler is {scheduler_class!r}, which is of no kind that sdrt knows",
            hint="sdrt samples models whose scheduler is one of: " + ", ".join(sorted(FAMILIES)),
        )
    if scheduler is None:
        return FAMILIES[scheduler_class], {}
    found = find_scheduler(scheduler)
    if found.family.class_name != scheduler_class and _WITHOUT_BETAS & {found.family.class_name, scheduler_class}:
        raise RequestError(
            f"{found.family.class_name} cannot take the place of the checkpoint's {scheduler_class}: one has no betas",
            hint="leave the scheduler out",
        )
    return found.family, found.fields


def _taken_over(
    config: dict[str, JsonValue], family: Family, overrides: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """Every field that `family` reads: from `overrides`, the checkpoint's config or the family's defaults."""
    for name, value in config.items():
        if not name.startswith("_") and name not in _KNOWN_FIELDS:
            raise RequestError(
                f"the checkpoint's scheduler config has an unknown field {name}={value!r}",
                hint="remove it from scheduler_config.json if the model does not need it",
            )
    # Written by a live scheduler object: fields it holds only by default, which do not carry over.
    defaulted = config.get("_use_default_values", [])
    given = {name: value for name, value in config.items() if not isinstance(defaulted, list) or name not in defaulted}
    known = {**SCHEDULE_FIELDS, **family.fields}
    if "rescale_betas_zero_snr" not in family.fields:
        given.pop("rescale_betas_zero_snr", None)
    return {**known, **{name: given[name] for name in known if name in given}, **overrides}


def _refuse_infinite(plan: SamplingPlan, family: Family, num_inference_steps: int) -> None:
    arrays = (plan.timesteps, plan.input_scales, plan.transitions, np.array(plan.initial_scale))
    if not all(np.isfinite(array).all() for array in arrays):
        raise RequestError(
            f"{family.class_name} has no finite {num_inference_steps} steps with the checkpoint's noise schedule",
            hint="ask for another number of steps, or another scheduler",
        )
