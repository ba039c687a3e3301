"""The schedulers by name: which family makes a scheduler's rows, and which config fields a community name sets."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan import (
    ddim,
    ddpm,
    deis,
    dpm_multistep,
    dpm_sde,
    dpm_singlestep,
    edm,
    euler,
    euler_ancestral,
    flow_match,
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
from sdrt.schedule import PREDICTION_TYPES, SCHEDULE_FIELDS, NoiseSchedule

# What a family's configs describe: betas of noise schedules, sigmas as EDM or flow matching has them, or nothing.
Schedule = Literal["betas", "edm", "flow", "none"]
MakePlan = Callable[[Mapping[str, JsonValue], AskedSteps], SamplingPlan]
MakePlanOfBetas = Callable[[Mapping[str, JsonValue], NoiseSchedule, AskedSteps], SamplingPlan]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A sampler: its class in checkpoints, its config fields with their defaults, and what makes its rows.

    schedule: what its configs describe. A sampler takes over configs of others that describe the same.
    """

    class_name: str
    schedule: Schedule
    fields: Mapping[str, JsonValue]
    plan: MakePlan

    @property
    def spacings(self) -> tuple[str, ...]:
        """The sigma spacings that it can be asked for: "karras" and so on."""
        return tuple(_SUFFIXES[name] for name in SPACING_FIELDS if name in self.fields)

    @property
    def predictions(self) -> tuple[str, ...]:
        """What its networks may predict, as `prediction_type` says; none where a config does not say."""
        kinds = PREDICTION_TYPES if "prediction_type" in self.fields else ()
        asked = AskedSteps(num_inference_steps=20)
        return tuple(kind for kind in kinds if self._makes({"prediction_type": kind}, asked))

    @property
    def takes(self) -> tuple[str, ...]:
        """Which of eta, timesteps and sigmas a request may choose."""
        sigmas = (1.0, 0.5, 0.1) if self.schedule == "flow" else (9.0, 3.0, 0.5, 0.0)
        asked = {
            "eta": AskedSteps(num_inference_steps=20, eta=0.5),
            "timesteps": AskedSteps(num_inference_steps=3, timesteps=(900.0, 500.0, 100.0)),
            "sigmas": AskedSteps(num_inference_steps=3, sigmas=sigmas),
        }
        return tuple(name for name, each in asked.items() if self._makes({}, each))

    def _makes(self, config: Mapping[str, JsonValue], asked: AskedSteps) -> bool:
        try:
            with np.errstate(all="ignore"):
                self.plan({**self.fields, **config}, asked)
        except RequestError:
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedScheduler:
    """A name, the family behind it, and the config fields that the name sets."""

    name: str
    family: Family
    fields: Mapping[str, JsonValue]

    @property
    def sets(self) -> Mapping[str, JsonValue]:
        """Its fields without the sigma spacings that it turns off."""
        return {name: value for name, value in self.fields.items() if value is not False}


_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
)


# Fields of noise schedules that some classes do not have, and then do not heed.
_OPTIONAL = frozenset({"rescale_betas_zero_snr"})


def _of_betas(
    class_name: str, fields: Mapping[str, JsonValue], plan: MakePlanOfBetas, *, schedule: Schedule = "betas"
) -> Family:
    def make(config: Mapping[str, JsonValue], asked: AskedSteps) -> SamplingPlan:
        return plan(config, NoiseSchedule.from_config(config), asked)

    shared = {name: value for name, value in SCHEDULE_FIELDS.items() if name not in _OPTIONAL or name in fields}
    return Family(class_name=class_name, schedule=schedule, fields={**shared, **fields}, plan=make)


_FAMILIES = (
    _of_betas("DDIMScheduler", ddim.FIELDS, ddim.ddim_plan),
    _of_betas("DDIMParallelScheduler", ddim.FIELDS, ddim.ddim_plan),
    _of_betas("DDPMScheduler", ddpm.FIELDS, ddpm.ddpm_plan),
    _of_betas("DDPMParallelScheduler", ddpm.FIELDS, ddpm.ddpm_plan),
    _of_betas("PNDMScheduler", pndm.FIELDS, pndm.pndm_plan),
    _of_betas("LMSDiscreteScheduler", lms.FIELDS, lms.lms_plan),
    _of_betas("EulerDiscreteScheduler", euler.FIELDS, euler.euler_plan),
    _of_betas("EulerAncestralDiscreteScheduler", euler_ancestral.FIELDS, euler_ancestral.euler_ancestral_plan),
    _of_betas("HeunDiscreteScheduler", heun.FIELDS, heun.heun_plan),
    _of_betas("KDPM2DiscreteScheduler", kdpm2.FIELDS, kdpm2.kdpm2_plan),
    _of_betas("KDPM2AncestralDiscreteScheduler", kdpm2.FIELDS, kdpm2.kdpm2_ancestral_plan),
    _of_betas("DPMSolverMultistepScheduler", dpm_multistep.FIELDS, dpm_multistep.dpm_multistep_plan),
    _of_betas("DPMSolverSinglestepScheduler", dpm_singlestep.FIELDS, dpm_singlestep.dpm_singlestep_plan),
    _of_betas("DPMSolverSDEScheduler", dpm_sde.FIELDS, dpm_sde.dpm_sde_plan),
    _of_betas("DEISMultistepScheduler", deis.FIELDS, deis.deis_plan),
    _of_betas("UniPCMultistepScheduler", unipc.FIELDS, unipc.unipc_plan),
    _of_betas("SASolverScheduler", sa_solver.FIELDS, sa_solver.sa_solver_plan),
    _of_betas("LCMScheduler", lcm.FIELDS, lcm.lcm_plan),
    _of_betas("TCDScheduler", tcd.FIELDS, tcd.tcd_plan),
    _of_betas("IPNDMScheduler", ipndm.FIELDS, ipndm.ipndm_plan, schedule="none"),
    Family(class_name="EDMEulerScheduler", schedule="edm", fields=edm.EULER_FIELDS, plan=edm.edm_euler_plan),
    Family(
        class_name="EDMDPMSolverMultistepScheduler",
        schedule="edm",
        fields=edm.DPM_MULTISTEP_FIELDS,
        plan=edm.edm_dpm_multistep_plan,
    ),
    Family(
        class_name="FlowMatchEulerDiscreteScheduler",
        schedule="flow",
        fields=flow_match.EULER_FIELDS,
        plan=flow_match.flow_match_euler_plan,
    ),
    Family(
        class_name="FlowMatchHeunDiscreteScheduler",
        schedule="flow",
        fields=flow_match.HEUN_FIELDS,
        plan=flow_match.flow_match_heun_plan,
    ),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.class_name: family for family in _FAMILIES})
# What a community name means besides its class, whatever the checkpoint's config has in these fields.
_SOLVER: Mapping[str, JsonValue] = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_SDE: Mapping[str, JsonValue] = {**_SOLVER, "algorithm_type": "sde-dpmsolver++"}
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
        "dpmpp_2s": ("DPMSolverSinglestepScheduler", _SOLVER),
        "dpmpp_2m": ("DPMSolverMultistepScheduler", _SOLVER),
        "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", _SDE),
        "dpmpp_3m": ("DPMSolverMultistepScheduler", {**_SOLVER, "solver_order": 3}),
        "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {**_SDE, "solver_order": 3}),
        "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
        "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
        "unipc": ("UniPCMultistepScheduler", {}),
        "sa_solver": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),
        "lcm": ("LCMScheduler", {}),
        "tcd": ("TCDScheduler", {}),
        "edm_euler": ("EDMEulerScheduler", {}),
        "edm_dpmpp_2m": ("EDMDPMSolverMultistepScheduler", _SOLVER),
        "edm_dpmpp_2m_sde": ("EDMDPMSolverMultistepScheduler", _SDE),
        "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    }
)
# Other spellings of these, after `_normalised`.
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "plms": "pndm",
        "euler_ancestral": "euler_a",
        "euler_discrete": "euler",
        "dpm_2": "dpm2",
        "dpm_2_a": "dpm2_a",
        "dpm_2_ancestral": "dpm2_a",
        "dpm2_ancestral": "dpm2_a",
        "kdpm2": "dpm2",
        "kdpm2_a": "dpm2_a",
        "kdpm2_ancestral": "dpm2_a",
        "dpmsolver": "dpmpp_2m",
        "dpmsolverpp": "dpmpp_2m",
        "dpmpp": "dpmpp_2m",
        "uni_pc": "unipc",
    }
)


def _named() -> dict[str, NamedScheduler]:
    """Every base name, which means no sigma spacing, and with each one that its family has."""
    found = {}
    for base, (class_name, fields) in _BASES.items():
        family = FAMILIES[class_name]
        plain = {field: False for field in (*_SUFFIXES, "use_lu_lambdas") if field in family.fields}
        found[base] = NamedScheduler(name=base, family=family, fields={**fields, **plain})
        for field, suffix in _SUFFIXES.items():
            if field in family.fields:
                name = f"{base}_{suffix}"
                found[name] = NamedScheduler(name=name, family=family, fields={**fields, **plain, field: True})
    return found


NAMES: Mapping[str, NamedScheduler] = MappingProxyType(_named())


def base_names() -> tuple[str, ...]:
    """The names without those that only add a sigma spacing."""
    return tuple(_BASES)


def find_scheduler(name: str, schedule: Schedule | None = None) -> NamedScheduler:
    """The scheduler of a community name ("euler_karras", "DPM++ 2M Karras") or class name.

    schedule: that of the checkpoint, to suggest only what it can be sampled with. RequestError suggests the nearest.
    """
    if name in FAMILIES:
        return NamedScheduler(name=name, family=FAMILIES[name], fields={})
    wanted = _normalised(name)
    if wanted in NAMES:
        return NAMES[wanted]
    raise RequestError(f"there is no scheduler {name!r}", hint=_suggestion(name, schedule))


def _normalised(name: str) -> str:
    """A community name as `NAMES` spells it: "DPM++ 2M Karras" is dpmpp_2m_karras, "Euler a" euler_a."""
    spelt = name.casefold().strip().replace("++", "pp").replace("-", "_").replace(" ", "_")
    base, _, suffix = spelt.rpartition("_")
    if suffix in _SUFFIXES.values():
        return f"{_ALIASES.get(base, base)}_{suffix}"
    return _ALIASES.get(spelt, spelt)


def _suggestion(wanted: str, schedule: Schedule | None) -> str:
    names = [name for name, named in NAMES.items() if schedule in (None, named.family.schedule)]
    classes = [name for name, family in FAMILIES.items() if schedule in (None, family.schedule)]
    folded = {name.casefold(): name for name in (*names, *classes)}
    spelt = _normalised(wanted)
    base, _, suffix = spelt.rpartition("_")
    if base in NAMES and suffix in _SUFFIXES.values():
        return f"{base} has no {suffix} sigmas: leave _{suffix} off; sdrt schedulers lists who has them"
    near = difflib.get_close_matches(spelt, folded, n=1, cutoff=0.5)
    if near:
        return f"did you mean {folded[near[0]]}? all names: sdrt schedulers"
    bases = [name for name in _BASES if name in names]
    return f"choose one of: {', '.join(bases)}; with sigma spacings: sdrt schedulers"
