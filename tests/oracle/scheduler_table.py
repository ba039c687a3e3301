"""`make oracle`: every scheduler with every option against the reference, and the table of how far apart they are.

python -m tests.oracle.scheduler_table docs/schedulers.md
"""

import ast
import inspect
import itertools
import os
import sys
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch

from sdrt.errors import RequestError
from sdrt.plan import build_plan
from sdrt.plan.catalog import FAMILIES, NAMES, base_names
from tests.oracle.plan_reference import STABLE_DIFFUSION, make_scheduler, run_plan, run_reference

STEPS = (5, 20, 50)
REFUSALS = (
    ValueError,
    NotImplementedError,
    AssertionError,
    ZeroDivisionError,
    IndexError,
    TypeError,
    NameError,
    AttributeError,
)
BOUND = 1e-5
WITH_ETA = ("DDIMScheduler", "DDIMParallelScheduler", "TCDScheduler")
FEEDBACKS = (0.0, 0.3)  # the network's output is random numbers, and this share of what it sees
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SIGMAS = (None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Fields that have nothing to do with the numbers, or whose values are covered by the axes above.
NOT_VARIED = {"timestep_spacing", "prediction_type", *filter(None, SIGMAS), "steps_offset", "rescale_betas_zero_snr"}
OTHER_VALUES: Mapping[str, tuple[object, ...]] = {
    "clip_sample": (True,),
    "lambda_min_clipped": (-5.1,),
    "original_inference_steps": (100,),
    "timestep_scaling": (5.0,),
    "rho": (5.0,),
    "sigma_data": (1.0,),
    "thresholding": (True,),
    "shift": (3.0,),
    "shift_terminal": (0.1,),
    "invert_sigmas": (True,),
    "stochastic_sampling": (True,),
    "sigma_schedule": ("karras", "exponential"),
    "disable_corrector": ([0], [1, 2]),
    "euler_at_final": (True,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "lower_order_final": (True, False),
    "predict_x0": (True, False),
    "predictor_order": (1, 2, 3),
    "corrector_order": (1, 2, 3),
    "set_alpha_to_one": (True, False),
    "skip_prk_steps": (True, False),
    "solver_order": (1, 2, 3),
    "timestep_type": ("discrete", "continuous"),
    "use_lu_lambdas": (True,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# Values that are a class's own.
ITS_VALUES: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "DEISMultistepScheduler": {"algorithm_type": ("deis",), "solver_type": ("logrho",)},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
    },
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
    },
    "EDMDPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
    },
    "SASolverScheduler": {"algorithm_type": ("data_prediction", "noise_prediction")},
    "UniPCMultistepScheduler": {"solver_type": ("bh1", "bh2")},
}
# Options that count only with another one that is on.
TOGETHER: Mapping[str, tuple[object, tuple[str, ...]]] = {
    "sigma_min": (0.05, tuple(filter(None, SIGMAS))),
    "sigma_max": (10.0, tuple(filter(None, SIGMAS))),
    "clip_sample_range": (0.5, ("clip_sample",)),
    "dynamic_thresholding_ratio": (0.9, ("thresholding",)),
    "sample_max_value": (2.0, ("thresholding",)),
}
AROUND: Mapping[str, Mapping[str, object]] = {"dynamic_thresholding_ratio": {"sample_max_value": 3.0}}
SOLVER = ("algorithm_type", "solver_order", "solver_type")
# Options that are not finite where the last sigma is zero, in the reference neither.
ENDS_ON_SIGMA_MIN: Mapping[str, tuple[str, ...]] = {
    "UniPCMultistepScheduler": ("solver_type=bh1", "lower_order_final=False", "predict_x0=False")
}
MEASURED_ELSEWHERE: Mapping[str, str] = {
    "DPMSolverSDEScheduler": "its noise is of the reference's distribution, not its Brownian tree's own numbers: held "
    "to it with noise handed over in tests/oracle/test_sigma_space_oracle.py"
}
# Where the reference's own float32 decides the result: how far it may be, and why. Everything else keeps the bound.
ILL_CONDITIONED: Mapping[tuple[str, str], tuple[float, str]] = {
    ("KDPM2AncestralDiscreteScheduler", "beta_schedule=squaredcos_cap_v2"): (
        5e-2,
        "sigmas begin at 20,291, and the first step's smaller sigma is left of a float32 difference that cancels to "
        "two digits: reckoned on two CPUs, the reference differs from itself as much",
    )
}
# Every other class of diffusers.schedulers, and why it has no plan.
_OTHER_NETWORKS = "for {}, whose networks Stable Diffusion pipelines do not have"
WITHOUT_PLAN: Mapping[str, str] = {
    "DDIMInverseScheduler": "runs from an image to its noise: no text-to-image",
    "DPMSolverMultistepInverseScheduler": "runs from an image to its noise: no text-to-image",
    "RePaintScheduler": "jumps back and forth for inpainting with an unconditional model",
    "KarrasVeScheduler": "for unconditional models in pixel space, and deprecated",
    "ScoreSdeVeScheduler": "for unconditional score models in pixel space",
    "ScoreSdeVpScheduler": "for unconditional score models in pixel space, and deprecated",
    **{
        name: _OTHER_NETWORKS.format(model)
        for name, model in {
            "AmusedScheduler": "aMUSEd, which unmasks tokens",
            "BlockRefinementScheduler": "discrete tokens",
            "CMStochasticIterativeScheduler": "consistency models in pixel space",
            "CogVideoXDDIMScheduler": "CogVideoX",
            "CogVideoXDPMScheduler": "CogVideoX",
            "ConsistencyDecoderScheduler": "a consistency decoder",
            "CosineDPMSolverMultistepScheduler": "Stable Audio",
            "DDPMWuerstchenScheduler": "Wuerstchen",
            "DiscreteDDIMScheduler": "discrete tokens",
            "EntropyBoundScheduler": "discrete tokens",
            "FlowMapEulerDiscreteScheduler": "flow maps",
            "FlowMatchLCMScheduler": "distilled flow-matching video models",
            "HeliosDMDScheduler": "Helios",
            "HeliosScheduler": "Helios",
            "LTXEulerAncestralRFScheduler": "LTX-Video",
            "MiniMaxH3Scheduler": "MiniMax",
            "PiflowScheduler": "pi-Flow",
            "RFD4ProteinaScheduler": "protein design",
            "SCMScheduler": "SANA-Sprint",
            "UnCLIPScheduler": "unCLIP",
            "VQDiffusionScheduler": "VQ-Diffusion, which unmasks tokens",
        }.items()
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """What is asked of a class. grid: timesteps or sigmas of one's own; strength: the share of the steps that run.

    eta: how much noise, of classes that have the choice.
    """

    option: str
    config: Mapping[str, object]
    grid: str | None = None
    strength: float = 1.0
    eta: float = 0.0

    def own_grid(self, steps: int, *, flow: bool) -> dict[str, tuple[float, ...]] | None:
        """The grid of `steps` steps; sigmas with the one after the last step, but for flow matching."""
        if self.grid is None:
            return None
        if self.grid == "timesteps":
            return {"timesteps": tuple(float(value) for value in np.linspace(981, 11, steps).round())}
        sigmas = np.linspace(1, 0.02, steps) ** (1 if flow else 3) * (1 if flow else 14.0)
        return {"sigmas": tuple(float(value) for value in (sigmas if flow else np.append(sigmas, 0)))}


@dataclass(slots=True)
class Line:
    """What became of the cells of one option of one class."""

    worst: dict[int, float] = field(default_factory=dict)
    cells: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, reason: str) -> None:
        """Count one more cell that was not measured for this reason."""
        self.notes[reason] = self.notes.get(reason, 0) + 1


def variations(class_name: str) -> Iterator[Variation]:
    """Everything that is varied of a class: all spacings at once, other options one by one."""
    family = FAMILIES[class_name]
    fields = family.fields
    sigmas = [name for name in SIGMAS if name is None or name in fields]
    spacings = SPACINGS if "timestep_spacing" in fields else (None,)
    predictions = PREDICTIONS if "prediction_type" in fields else (None,)
    for prediction, spacing, spaced in itertools.product(predictions, spacings, sigmas):
        config = {} if prediction is None else {"prediction_type": prediction}
        config |= {} if spacing is None else {"timestep_spacing": spacing}
        config |= {} if spaced is None else {spaced: True}
        words = [prediction or "velocity", *([] if spaced is None else [spaced.split("_")[1]])]
        yield Variation(option=", ".join(words), config=config)
    yield Variation(option="strength 0.6", config={}, strength=0.6)
    for eta in (0.3, 1.0) if class_name in WITH_ETA else ():
        yield Variation(option=f"eta={eta}", config={}, eta=eta)
    for name, (value, needed) in TOGETHER.items():
        for condition in needed:
            if name in fields and condition in fields:
                words = f"{name}={value} with {condition}"
                yield Variation(option=words, config={**AROUND.get(name, {}), name: value, condition: True})
    own = inspect.signature(getattr(diffusers, class_name).set_timesteps).parameters
    for grid in ("timesteps", "sigmas"):
        if grid in own:
            yield Variation(option=f"{grid} of one's own", config={}, grid=grid)
    if family.schedule == "betas":
        for schedule in BETA_SCHEDULES:
            yield Variation(option=f"beta_schedule={schedule}", config={"beta_schedule": schedule})
    if "rescale_betas_zero_snr" in fields:
        zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        yield Variation(option="rescale_betas_zero_snr", config=zero)
    values = {**OTHER_VALUES, **ITS_VALUES.get(class_name, {})}
    if values.keys() >= {*SOLVER} and fields.keys() >= {*SOLVER}:
        for algorithm, order, kind in itertools.product(*(values[name] for name in SOLVER)):
            config = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
            if not str(algorithm).endswith("++") and "final_sigmas_type" in fields:
                config["final_sigmas_type"] = "sigma_min"  # without it, it could not take its last step
            yield Variation(option=f"{algorithm}, order {order}, {kind}", config=config)
        values = {name: each for name, each in values.items() if name not in SOLVER}
    for name in sorted(fields.keys() - NOT_VARIED):
        for value, prediction in itertools.product(values.get(name, ()), predictions[:2]):
            config = {name: value} | ({} if prediction is None else {"prediction_type": prediction})
            option = f"{name}={value}"
            if option in ENDS_ON_SIGMA_MIN.get(class_name, ()):
                config["final_sigmas_type"] = "sigma_min"
            yield Variation(option=option, config=config)


def measure(class_name: str, asked: Variation, steps: int) -> float:
    """The largest error of the last latents, of their largest value, with random and with linear networks.

    RequestError or another error where one refuses.
    """
    family = FAMILIES[class_name]
    whole = {**(STABLE_DIFFUSION if family.schedule in ("betas", "none") else {}), **asked.config}
    grid = asked.own_grid(steps, flow=family.schedule == "flow")
    first = steps - int(steps * asked.strength)
    plan = build_plan(
        scheduler_class=class_name,
        scheduler_config=whole,
        num_inference_steps=steps if grid is None else None,
        eta=asked.eta,
        first=first,
        **(grid or {}),
    )
    errors = []
    for feedback in FEEDBACKS:
        scheduler = make_scheduler(class_name, whole)
        listed = None if grid is None else {name: list(values) for name, values in grid.items()}
        given = {"eta": asked.eta} if class_name in WITH_ETA else {}
        theirs = run_reference(scheduler, steps, feedback=feedback, first=first, grid=listed, **given).states[-1]
        if not np.isfinite(theirs).all():
            raise ValueError("the reference is not finite")
        ours = run_plan(plan, feedback)[-1]
        errors.append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return max(errors)


def refusal_of_reference(class_name: str, asked: Variation, steps: int) -> str | None:
    """Why the reference does not do it either; None where it does."""
    family = FAMILIES[class_name]
    whole = {**(STABLE_DIFFUSION if family.schedule in ("betas", "none") else {}), **asked.config}
    grid = asked.own_grid(steps, flow=family.schedule == "flow")
    listed = None if grid is None else {name: list(values) for name, values in grid.items()}
    try:
        scheduler = make_scheduler(class_name, whole)
        states = run_reference(scheduler, steps, first=steps - int(steps * asked.strength), grid=listed).states
    except REFUSALS as refusal:
        return first_line(refusal)
    return None if np.isfinite(states[-1]).all() else "its latents are not finite"


def first_line(error: Exception) -> str:
    """What an error says, or is."""
    return str(error).partition("\n")[0] or repr(error)


def measure_class(class_name: str) -> dict[str, Line]:
    """Every cell of a class, gathered by option."""
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines: dict[str, Line] = defaultdict(Line)
    if class_name in MEASURED_ELSEWHERE:
        lines["all"].notes[MEASURED_ELSEWHERE[class_name]] = 0
        return dict(lines)
    for asked in variations(class_name):
        line = lines[asked.option]
        for steps in STEPS:
            try:
                error = measure(class_name, asked, steps)
            except RequestError as refusal:
                theirs = refusal_of_reference(class_name, asked, steps)
                line.note(f"only sdrt refuses: {refusal.message}" if theirs is None else f"neither: {theirs}")
            except REFUSALS as refusal:
                line.note(f"only the reference refuses: {first_line(refusal)}")
            else:
                line.cells += 1
                line.worst[steps] = max(error, line.worst.get(steps, 0.0))
        if (class_name, asked.option) in ILL_CONDITIONED:
            line.notes[ILL_CONDITIONED[class_name, asked.option][1]] = 0
    return dict(lines)


def written(found: Mapping[str, Mapping[str, Line]], seconds: float) -> str:
    """The document."""
    cells = sum(line.cells for lines in found.values() for line in lines.values())
    worst = max(
        error
        for name, lines in found.items()
        for option, line in lines.items()
        for error in line.worst.values()
        if (name, option) not in ILL_CONDITIONED
    )
    introduction = (
        "Written by `make oracle`: do not edit. Every scheduler is rows of numbers (a sampling plan), built "
        f"in float64. Here each is held against the class of diffusers {diffusers.__version__} that it stands "
        "for: both take the same steps with the same network, once of random outputs and once linear in what "
        "it sees, and the same noise; the figure is the largest error of the last latents, relative to their "
        f"largest value, over all grids of the option. {cells:,} cells were measured in {seconds:.0f} s; the "
        f"worst is {worst:.1e}, the bound {BOUND:.0e}. What remains is the float32 in which the reference "
        f"holds its sigmas; {len(ILL_CONDITIONED)} option is worse for that, and says so. Where a DDIM or DDPM "
        "config does not say `clip_sample`, nothing is clipped, as Stable Diffusion's pipelines have it and not as "
        "the bare classes."
    )
    text = [
        "# Schedulers",
        "",
        *textwrap.wrap(introduction, 120, break_on_hyphens=False),
        "",
        "| name | class in checkpoints | with sigmas | worst error |",
        "| --- | --- | --- | --- |",
    ]
    for name in base_names():
        family = NAMES[name].family
        errors = [
            error
            for option, line in found[family.class_name].items()
            for error in line.worst.values()
            if (family.class_name, option) not in ILL_CONDITIONED
        ]
        spacings = ", ".join(family.spacings) or "its own"
        text.append(
            f"| `{name}` | {family.class_name} | {spacings} | {f'{max(errors):.1e}' if errors else 'see below'} |"
        )
    text += ["", "Names with a spacing are written together: `euler_karras`, `dpmpp_2m_exponential`, `heun_beta`.", ""]
    for class_name, lines in found.items():
        text += [
            f"## {class_name}",
            "",
            "| option | cells | 5 steps | 20 steps | 50 steps | |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for option, line in lines.items():
            figures = " | ".join(f"{line.worst[steps]:.1e}" if steps in line.worst else "-" for steps in STEPS)
            reasons = [
                reason.replace("|", "/") + (f" ({count} cells)" if count else "")
                for reason, count in line.notes.items()
            ]
            text.append(f"| {option} | {line.cells} | {figures} | {'; '.join(reasons)} |")
        text.append("")
    text += ["## Without a plan", "", "| class | why |", "| --- | --- |"]
    text += [f"| {name} | {reason} |" for name, reason in WITHOUT_PLAN.items()]
    return "\n".join(text) + "\n"


def all_classes() -> set[str]:
    """Every scheduler class that diffusers has."""
    found = set()
    for file in Path(diffusers.schedulers.__path__[0]).rglob("*.py"):
        source = ast.parse(file.read_text())
        found |= {node.name for node in source.body if isinstance(node, ast.ClassDef)}
    return {name for name in found if name.endswith("Scheduler")}


def beyond_bound(found: Mapping[str, Mapping[str, Line]]) -> list[str]:
    """The cells whose error is larger than it may be."""
    return [
        f"{name} {option} {steps} steps: {error:.1e}"
        for name, lines in found.items()
        for option, line in lines.items()
        for steps, error in line.worst.items()
        if not error <= ILL_CONDITIONED.get((name, option), (BOUND,))[0]
    ]


def main(target: str) -> int:
    """Measure everything and write; 1 when a cell is beyond its bound or a class is missing."""
    missing = all_classes() - FAMILIES.keys() - WITHOUT_PLAN.keys()
    if missing:
        print(f"neither a plan nor a reason: {', '.join(sorted(missing))}")
        return 1
    began = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(sorted(FAMILIES), pool.map(measure_class, sorted(FAMILIES)), strict=True))
    Path(target).write_text(written(found, time.monotonic() - began))
    beyond = beyond_bound(found)
    print("\n".join(beyond) or f"all within {BOUND:.0e} or what is said of them: {target}")
    return bool(beyond)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
