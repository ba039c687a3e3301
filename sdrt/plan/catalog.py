"""The schedulers by name: which family makes a scheduler's rows, and which config fields a community name sets."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan import (
    ddim,
    ddpm,
    deis,
    dpm_multistep,
    dpm_sde,
    dpm_singlestep,
    euler,
    euler_ancestral,
    heun,
    ipndm,
    kdpm2,
    lcm,
    lms,
    pndm,
    sa_solver,
    tcd,
    unipc,
)
from sdrt.plan.asked import AskedSteps
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.spacing import SPACING_FIELDS
from sdrt.schedule import NoiseSchedule

MakePlan = Callable[[Mapping[str, JsonValue], NoiseSchedule, AskedSteps], SamplingPlan]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A sampler: its class in checkpoints, its config fields with their defaults, and what makes its rows."""

    class_name: str
    fields: Mapping[str, JsonValue]
    plan: MakePlan

    @property
    def spacings(self) -> tuple[str, ...]:
        """The sigma spacings that it can be asked for: "karras" and so on."""
        return tuple(_SUFFIXES[name] for name in SPACING_FIELDS if name in self.fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedScheduler:
    """A name, the family behind it, and the config fields that the name sets."""

    name: str
    family: Family
    fields: Mapping[str, JsonValue]


_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        class_name: Family(class_name=class_name, fields=fields, plan=plan)
        for class_name, fields, plan in (
            ("DDIMScheduler", ddim.FIELDS, ddim.ddim_plan),
            ("DDPMScheduler", ddpm.FIELDS, ddpm.ddpm_plan),
            ("PNDMScheduler", pndm.FIELDS, pndm.pndm_plan),
            ("LMSDiscreteScheduler", lms.FIELDS, lms.lms_plan),
            ("EulerDiscreteScheduler", euler.FIELDS, euler.euler_plan),
            ("EulerAncestralDiscreteScheduler", euler_ancestral.FIELDS, euler_ancestral.euler_ancestral_plan),
            ("HeunDiscreteScheduler", heun.FIELDS, heun.heun_plan),
            ("KDPM2DiscreteScheduler", kdpm2.FIELDS, kdpm2.kdpm2_plan),
            ("KDPM2AncestralDiscreteScheduler", kdpm2.FIELDS, kdpm2.kdpm2_ancestral_plan),
            ("DPMSolverMultistepScheduler", dpm_multistep.FIELDS, dpm_multistep.dpm_multistep_plan),
            ("DPMSolverSinglestepScheduler", dpm_singlestep.FIELDS, dpm_singlestep.dpm_singlestep_plan),
            ("DPMSolverSDEScheduler", dpm_sde.FIELDS, dpm_sde.dpm_sde_plan),
            ("DEISMultistepScheduler", deis.FIELDS, deis.deis_plan),
            ("UniPCMultistepScheduler", unipc.FIELDS, unipc.unipc_plan),
            ("SASolverScheduler", sa_solver.FIELDS, sa_solver.sa_solver_plan),
            ("IPNDMScheduler", ipndm.FIELDS, ipndm.ipndm_plan),
            ("LCMScheduler", lcm.FIELDS, lcm.lcm_plan),
            ("TCDScheduler", tcd.FIELDS, tcd.tcd_plan),
        )
    }
)
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_BASES: Mapping[str, tuple[str, Mapping[str, JsonValue]]] = MappingProxyType(
    {
        "ddim": ("DDIMScheduler", {}),
        "ddpm": ("DDPMScheduler", {}),
        "pndm": ("PNDMScheduler", {}),
        "lms": ("LMSDiscreteScheduler", {}),
        "euler": ("EulerDiscreteScheduler", {}),
        "euler_a": ("EulerAncestralDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "dpm2": ("KDPM2DiscreteScheduler", {}),
        "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
        "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
        "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
        "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", _SDE),
        "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {**_SDE, "solver_order": 3}),
        "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
        "deis": ("DEISMultistepScheduler", {}),
        "unipc": ("UniPCMultistepScheduler", {}),
        "sa_solver": ("SASolverScheduler", {}),
        "lcm": ("LCMScheduler", {}),
        "tcd": ("TCDScheduler", {}),
    }
)


def _named() -> dict[str, NamedScheduler]:
    """Every base name, and with each sigma spacing that its family has."""
    found = {}
    for base, (class_name, fields) in _BASES.items():
        family = FAMILIES[class_name]
        found[base] = NamedScheduler(name=base, family=family, fields=fields)
        for field, suffix in _SUFFIXES.items():
            if field in family.fields:
                name = f"{base}_{suffix}"
                found[name] = NamedScheduler(name=name, family=family, fields={**fields, field: True})
    return found


NAMES: Mapping[str, NamedScheduler] = MappingProxyType(_named())


def base_names() -> tuple[str, ...]:
    """The names without those that only add a sigma spacing."""
    return tuple(_BASES)


def find_scheduler(name: str) -> NamedScheduler:
    """The scheduler of a community name ("euler_karras") or class name. RequestError suggests the nearest."""
    if name in NAMES:
        return NAMES[name]
    if name in FAMILIES:
        return NamedScheduler(name=name, family=FAMILIES[name], fields={})
    raise RequestError(f"there is no scheduler {name!r}", hint=_suggestion(name))


def _suggestion(wanted: str) -> str:
    folded = {name.casefold(): name for name in (*NAMES, *FAMILIES)}
    near = difflib.get_close_matches(wanted.casefold(), folded, n=1, cutoff=0.5)
    choices = f"choose one of: {', '.join(NAMES)}; all with: sdrt schedulers"
    return f"did you mean {folded[near[0]]}? {choices}" if near else choices
