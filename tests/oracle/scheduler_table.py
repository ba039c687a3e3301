"""`make oracle`: every scheduler with every option against the reference, and the table of how far apart they are.

python -m tests.oracle.scheduler_table docs/schedulers.md
"""

import itertools
import sys
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
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
BOUND = 1e-5
TCD_ETA = 0.3  # what its step takes unless it is told otherwise
FEEDBACKS = (0.0, 0.3)  # the network's output is random numbers, and this share of what it sees
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SIGMAS = (None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Fields that have nothing to do with the numbers, or whose values are covered by the axes above.
NOT_VARIED = {"timestep_spacing", "prediction_type", *filter(None, SIGMAS), "steps_offset", "rescale_betas_zero_snr"}
OTHER_VALUES: Mapping[str, tuple[object, ...]] = {
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
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
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "timestep_type": ("discrete", "continuous"),
    "use_lu_lambdas": (True,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
MEASURED_ELSEWHERE: Mapping[str, str] = {
    "DPMSolverSDEScheduler": "its noise is of the reference's distribution, not its Brownian tree's own numbers: held "
    "to it with noise handed over in tests/oracle/test_sigma_space_oracle.py"
}
# Classes of diffusers.schedulers that a Stable Diffusion pipeline accepts by its type, and that have no plan: why.
WITHOUT_PLAN: Mapping[str, str] = {
    "DDIMInverseScheduler": "runs from an image to its noise: no text-to-image",
    "DPMSolverMultistepInverseScheduler": "runs from an image to its noise: no text-to-image",
    "CogVideoXDDIMScheduler": "for CogVideoX, whose networks Stable Diffusion pipelines do not have",
    "CogVideoXDPMScheduler": "for CogVideoX, whose networks Stable Diffusion pipelines do not have",
    "CosineDPMSolverMultistepScheduler": "for Stable Audio, whose networks Stable Diffusion pipelines do not have",
}


@dataclass(slots=True)
class Line:
    """What became of the cells of one option of one class."""

    worst: dict[int, float] = field(default_factory=dict)
    cells: int = 0
    refused: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def variations(class_name: str) -> Iterator[tuple[str, dict[str, object]]]:
    """(option, config) for everything that is varied of a class: all spacings at once, other options one by one."""
    fields = FAMILIES[class_name].fields
    sigmas = [name for name in SIGMAS if name is None or name in fields]
    spacings = SPACINGS if "timestep_spacing" in fields else (None,)
    for prediction, spacing, spaced in itertools.product(PREDICTIONS, spacings, sigmas):
        config = {"prediction_type": prediction}
        config |= {} if spacing is None else {"timestep_spacing": spacing}
        config |= {} if spaced is None else {spaced: True}
        yield (
            f"{prediction}{'' if spaced is None else ', ' + spaced.removeprefix('use_').removesuffix('_sigmas')}",
            config,
        )
    for schedule in BETA_SCHEDULES:
        yield f"beta_schedule={schedule}", {"beta_schedule": schedule}
    if "rescale_betas_zero_snr" in fields:
        zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        yield "rescale_betas_zero_snr", zero
    for name in sorted(fields.keys() - NOT_VARIED):
        for value in OTHER_VALUES.get(name, ()):
            for prediction in PREDICTIONS[:2]:
                yield f"{name}={value}", {name: value, "prediction_type": prediction}


def measure(class_name: str, config: Mapping[str, object], steps: int) -> float:
    """The largest error of the last latents, of their largest value, with random and with linear networks.

    RequestError or ValueError where one refuses.
    """
    whole = {**STABLE_DIFFUSION, **config}
    eta = TCD_ETA if class_name == "TCDScheduler" else 0.0
    plan = build_plan(scheduler_class=class_name, scheduler_config=whole, num_inference_steps=steps, eta=eta)
    errors = []
    for feedback in FEEDBACKS:
        theirs = run_reference(make_scheduler(class_name, whole), steps, feedback=feedback).states[-1]
        if not np.isfinite(theirs).all():
            raise ValueError("the reference is not finite")
        ours = run_plan(plan, feedback)[-1]
        errors.append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return max(errors)


def measure_class(class_name: str) -> dict[str, Line]:
    """Every cell of a class, gathered by option."""
    lines: dict[str, Line] = defaultdict(Line)
    if class_name in MEASURED_ELSEWHERE:
        lines["all"].refused[MEASURED_ELSEWHERE[class_name]] += 1
        return lines
    for option, config in variations(class_name):
        line = lines[option]
        for steps in STEPS:
            try:
                error = measure(class_name, config, steps)
            except RequestError as refusal:
                line.refused[f"sdrt refuses: {refusal.message}"] += 1
            except (ValueError, NotImplementedError, AssertionError, ZeroDivisionError, IndexError) as refusal:
                line.refused[
                    f"the reference refuses: {str(refusal).splitlines()[0] if str(refusal) else refusal!r}"
                ] += 1
            else:
                line.cells += 1
                line.worst[steps] = max(error, line.worst.get(steps, 0.0))
    return lines


def written(found: Mapping[str, Mapping[str, Line]], seconds: float) -> str:
    """The document."""
    cells = sum(line.cells for lines in found.values() for line in lines.values())
    worst = max(error for lines in found.values() for line in lines.values() for error in line.worst.values())
    introduction = (
        "Written by `make oracle`: do not edit. Every scheduler is rows of numbers (a sampling plan), built "
        f"in float64. Here each is held against the class of diffusers {diffusers.__version__} that it stands "
        "for: both take the same steps with the same network, once of random outputs and once linear in what "
        "it sees, and the same noise; the figure is the largest error of the last latents, relative to their "
        f"largest value, over all grids of the option. {cells:,} cells were measured in {seconds:.0f} s; the "
        f"worst is {worst:.1e}, the bound {BOUND:.0e}. What remains is the float32 in which the reference "
        "holds its sigmas."
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
        errors = [error for line in found[family.class_name].values() for error in line.worst.values()]
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
            reasons = [f"{reason.replace('|', '/')} ({count} cells)" for reason, count in line.refused.items()]
            text.append(f"| {option} | {line.cells} | {figures} | {'; '.join(reasons)} |")
        text.append("")
    text += ["## Without a plan", "", "| class | why |", "| --- | --- |"]
    text += [f"| {name} | {reason} |" for name, reason in WITHOUT_PLAN.items()]
    return "\n".join(text) + "\n"


def accepted_classes() -> set[str]:
    """The classes that diffusers says can take one another's place in a Stable Diffusion pipeline."""
    return {each.name for each in diffusers.schedulers.KarrasDiffusionSchedulers}


def main(target: str) -> int:
    """Measure everything and write; 1 when a cell is beyond the bound."""
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    began = time.monotonic()
    found = {name: measure_class(name) for name in sorted(FAMILIES)}
    Path(target).write_text(written(found, time.monotonic() - began))
    beyond = [
        f"{name} {option} {steps} steps: {error:.1e}"
        for name, lines in found.items()
        for option, line in lines.items()
        for steps, error in line.worst.items()
        if not error <= BOUND
    ]
    print("\n".join(beyond) or f"all within {BOUND:.0e}: {target}")
    return bool(beyond)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
