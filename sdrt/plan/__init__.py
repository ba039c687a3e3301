"""Plans: which scheduler a name means, what it takes over from the checkpoint, and its rows. One module per family."""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan import ddim, dpm_multistep, euler, pndm
from sdrt.plan.asked import AskedSteps
from sdrt.plan.rows import MAX_STATE_SLOTS, SamplingPlan
from sdrt.schedule import SCHEDULE_FIELDS, NoiseSchedule

__all__ = ["MAX_STATE_SLOTS", "SCHEDULERS", "SamplingPlan", "build_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """A sampler: its class name in checkpoints, its config fields with their defaults, and how its rows are made."""

    class_name: str
    fields: Mapping[str, JsonValue]
    plan: Callable[[Mapping[str, JsonValue], NoiseSchedule, AskedSteps], SamplingPlan]


_DDIM = _Family(class_name="DDIMScheduler", fields=ddim.FIELDS, plan=ddim.ddim_plan)
_PNDM = _Family(class_name="PNDMScheduler", fields=pndm.FIELDS, plan=pndm.pndm_plan)
_EULER = _Family(class_name="EulerDiscreteScheduler", fields=euler.FIELDS, plan=euler.euler_plan)
_DPM = _Family(
    class_name="DPMSolverMultistepScheduler",
    fields=dpm_multistep.FIELDS,
    plan=dpm_multistep.dpm_multistep_plan,
)
_FAMILIES = MappingProxyType({family.class_name: family for family in (_DDIM, _PNDM, _EULER, _DPM)})
_KARRAS = MappingProxyType({"use_karras_sigmas": True})
_NOTHING: Mapping[str, JsonValue] = MappingProxyType({})
_NAMES: Mapping[str, tuple[_Family, Mapping[str, JsonValue]]] = MappingProxyType(
    {
        "ddim": (_DDIM, _NOTHING),
        "pndm": (_PNDM, _NOTHING),
        "euler": (_EULER, _NOTHING),
        "euler_karras": (_EULER, _KARRAS),
        "dpmpp_2m": (_DPM, _NOTHING),
        "dpmpp_2m_karras": (_DPM, _KARRAS),
    }
)

SCHEDULERS: tuple[str, ...] = tuple(_NAMES)

# Schedulers over a table of betas, whose configs another scheduler can take over.
_COMPATIBLE_CLASSES = frozenset(
    {
        *_FAMILIES,
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    }
)

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
    {*SCHEDULE_FIELDS, *_OTHER_SCHEDULERS_FIELDS, *(name for family in _FAMILIES.values() for name in family.fields)}
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


def _select(scheduler: str | None, scheduler_class: str) -> tuple[_Family, Mapping[str, JsonValue]]:
    """The family and the config fields that its name sets."""
    if scheduler_class not in _COMPATIBLE_CLASSES:
        raise RequestError(
            f"the checkpoint's scheduler is {scheduler_class!r}, which is of no kind that sdrt knows",
            hint="sdrt samples models whose scheduler is one of: " + ", ".join(sorted(_COMPATIBLE_CLASSES)),
        )
    if scheduler is None:
        if scheduler_class in _FAMILIES:
            return _FAMILIES[scheduler_class], _NOTHING
        raise RequestError(
            f"the checkpoint's own scheduler, {scheduler_class}, is not supported",
            hint="name another one: " + ", ".join(SCHEDULERS),
        )
    if scheduler in _FAMILIES:
        return _FAMILIES[scheduler], _NOTHING
    if scheduler in _NAMES:
        return _NAMES[scheduler]
    raise RequestError(f"there is no scheduler {scheduler!r}", hint=_suggestion(scheduler, [*SCHEDULERS, *_FAMILIES]))


def _suggestion(wanted: str, names: list[str]) -> str:
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(wanted.casefold(), folded, n=1, cutoff=0.5)
    choices = "choose one of: " + ", ".join(names)
    return f"did you mean {folded[near[0]]}? {choices}" if near else choices


def _taken_over(
    config: dict[str, JsonValue], family: _Family, overrides: Mapping[str, JsonValue]
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


def _refuse_infinite(plan: SamplingPlan, family: _Family, num_inference_steps: int) -> None:
    arrays = (plan.timesteps, plan.input_scales, plan.transitions, np.array(plan.initial_scale))
    if not all(np.isfinite(array).all() for array in arrays):
        raise RequestError(
            f"{family.class_name} has no finite {num_inference_steps} steps with the checkpoint's noise schedule",
            hint="ask for another number of steps, or another scheduler",
        )
