"""`make oracle`: every scheduler with every option against the reference, and the table of how far apart they are.

python -m tests.oracle.scheduler_table docs/schedulers.md
"""

import ast
import os
import sys
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
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
from tests.oracle.scheduler_options import REFUSED, WITH_ETA, WITHOUT_CELLS, Variation, variations

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
    RuntimeError,
)
BOUND = 1e-5
FEEDBACKS = (0.0, 0.3)  # the network's output is random numbers, and this share of what it sees
# Where the reference's own float32 decides the result: how far it may be, and why. Everything else keeps the bound.
ILL_CONDITIONED: Mapping[tuple[str, str], tuple[float, str]] = {
    ("KDPM2AncestralDiscreteScheduler", "beta_schedule=squaredcos_cap_v2"): (
        5e-2,
        "sigmas begin at 20,291, and the first step's smaller sigma is left of a float32 difference that cancels to "
        "two digits: reckoned on two CPUs, the reference differs from itself as much",
    ),
    ("DPMSolverMultistepScheduler", "as `dpmpp_3m_sde_beta`"): (
        5e-4,
        "of such uneven steps it amplifies the last place of a sigma: over 50 of them the reference in float32 is "
        "1.3e-3 from itself in float64",
    ),
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
class Cell:
    """What became of one option at one number of steps.

    exact: the error in float64; rounded: that of float32 states and coefficients. None where one refuses, and why.
    """

    exact: float | None = None
    rounded: float | None = None
    ours: str | None = None
    theirs: str | None = None


@dataclass(slots=True)
class Line:
    """What became of the cells of one option of one class."""

    worst: dict[int, float] = field(default_factory=dict)
    rounded: float = 0.0
    cells: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def in_float32(self) -> tuple[str, float]:
        """What the error of float32 states is called, and how large it is."""
        return "in float32", self.rounded

    def add(self, option: str, steps: int, cell: Cell) -> None:
        """Count a cell; one that ought to have been measured is a fault."""
        if cell.exact is not None and cell.rounded is not None:
            self.cells += 1
            self.worst[steps] = max(cell.exact, self.worst.get(steps, 0.0))
            self.rounded = max(cell.rounded, self.rounded)
        elif cell.ours is not None and option in REFUSED:
            self.note(f"refused: {REFUSED[option]}")
        elif cell.ours is not None and cell.theirs is not None:
            self.note(f"neither: {cell.theirs}")
        else:
            reason = f"only sdrt refuses: {cell.ours}" if cell.theirs is None else f"not the reference: {cell.theirs}"
            self.note(reason)
            self.faults.append(f"{option}, {steps} steps: {reason}")

    def note(self, reason: str) -> None:
        """Count one more cell that was not measured for this reason."""
        self.notes[reason] = self.notes.get(reason, 0) + 1


def measure(class_name: str, asked: Variation, steps: int) -> Cell:
    """The largest errors of the last latents, of their largest value, with random and with linear networks."""
    family = FAMILIES[class_name]
    whole = {**(STABLE_DIFFUSION if family.schedule in ("betas", "none") else {}), **asked.config}
    grid = asked.own_grid(steps, flow=family.schedule == "flow")
    first = steps - int(steps * asked.strength)
    plan, ours, theirs = None, None, None
    try:
        plan = build_plan(
            scheduler_class=class_name,
            scheduler_config=whole if asked.mu is None else {**whole, "mu": asked.mu},
            num_inference_steps=steps if grid is None else None,
            eta=asked.eta,
            first=first,
            **(grid or {}),
        )
    except RequestError as refusal:
        ours = refusal.message
    errors: list[tuple[float, float]] = []
    for feedback in FEEDBACKS:
        try:
            last = last_of_reference(class_name, whole, asked, steps, grid, first, feedback)
        except REFUSALS as refusal:
            theirs = first_line(refusal)
            continue
        if plan is not None:
            largest = float(np.abs(last).max())
            exact, rounded = (run_plan(plan, feedback, dtype)[-1] for dtype in (np.float64, np.float32))
            errors.append(tuple(float(np.abs(state - last).max()) / largest for state in (exact, rounded)))
    if plan is None or theirs is not None:
        return Cell(ours=ours, theirs=theirs)
    return Cell(exact=max(each[0] for each in errors), rounded=max(each[1] for each in errors))


def last_of_reference(
    class_name: str,
    whole: Mapping[str, object],
    asked: Variation,
    steps: int,
    grid: Mapping[str, tuple[float, ...]] | None,
    first: int,
    feedback: float,
) -> np.ndarray:
    """The reference's last latents; one of REFUSALS where it does not have them."""
    scheduler = make_scheduler(class_name, whole)
    given = None if grid is None else {name: list(values) for name, values in grid.items()}
    if asked.mu is not None:
        given = {"num_inference_steps": steps, "mu": asked.mu}
    eta = {"eta": asked.eta} if class_name in WITH_ETA else {}
    last = run_reference(scheduler, steps, feedback=feedback, first=first, grid=given, **eta).states[-1]
    if not np.isfinite(last).all():
        raise ValueError("its latents are not finite")
    return last


def first_line(error: Exception) -> str:
    """What an error says, or is."""
    return str(error).partition("\n")[0] or repr(error)


def measure_class(class_name: str) -> dict[str, Line]:
    """Every cell of a class, gathered by option."""
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines: dict[str, Line] = defaultdict(Line)
    for asked in variations(class_name):
        for steps in STEPS:
            lines[asked.option].add(asked.option, steps, measure(class_name, asked, steps))
        if (class_name, asked.option) in ILL_CONDITIONED:
            lines[asked.option].notes[ILL_CONDITIONED[class_name, asked.option][1]] = 0
    return dict(lines)


def written(found: Mapping[str, Mapping[str, Line]], seconds: float) -> str:
    """The document."""
    cells = sum(line.cells for lines in found.values() for line in lines.values())
    kept = [
        line for name, lines in found.items() for option, line in lines.items() if (name, option) not in ILL_CONDITIONED
    ]
    worst = max(error for line in kept for error in line.worst.values())
    rounded = max(line.rounded for line in kept)
    introduction = (
        "Written by `make oracle`: do not edit. Every scheduler is rows of numbers (a sampling plan), built "
        f"in float64. Here each is held against the class of diffusers {diffusers.__version__} that it stands "
        "for: both take the same steps with the same network, once of random outputs and once linear in what "
        "it sees, and the same noise; the figure is the largest error of the last latents, relative to their "
        f"largest value, over all grids of the option. The reference steps in float64. {cells:,} cells were measured "
        f"in {seconds:.0f} s: the worst is {worst:.1e} where the plan steps in float64 too, which shows its "
        f"mathematics, and {rounded:.1e} where its state and its numbers are float32, as the step graph has them; the "
        f"bound is {BOUND:.0e} for both. What remains in float64 is the float32 in which the reference holds its "
        f"sigmas; {len(ILL_CONDITIONED)} options are worse than the bound, and say why. Where a DDIM or DDPM config "
        "does not say `clip_sample`, nothing is clipped, as Stable Diffusion's pipelines have it and not as the bare "
        "classes. Of timesteps of one's own, a `strength` is a share of the steps; the pipelines of diffusers take it "
        "of the evaluations, of which Heun's method has two a step, and so begin elsewhere with `heun`."
    )
    text = [
        "# Schedulers",
        "",
        *textwrap.wrap(introduction, 120, break_on_hyphens=False),
        "",
        "| name | class in checkpoints | with sigmas | worst error | in float32 |",
        "| --- | --- | --- | --- | --- |",
        *(_name_row(name, found) for name in base_names()),
        "",
        "Names with a spacing are written together: `euler_karras`, `dpmpp_2m_exponential`, `heun_beta`.",
        "",
    ]
    for class_name, lines in found.items():
        text += [
            f"## {class_name}",
            "",
            "| option | cells | 5 steps | 20 steps | 50 steps | in float32 | |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(_option_row(option, line) for option, line in lines.items()),
            "",
        ]
    text += ["## Fields without cells", "", "| field | why |", "| --- | --- |"]
    text += [f"| {name} | {reason} |" for name, reason in WITHOUT_CELLS.items()]
    text += ["", "## Without a plan", "", "| class | why |", "| --- | --- |"]
    text += [f"| {name} | {reason} |" for name, reason in WITHOUT_PLAN.items()]
    return "\n".join(text) + "\n"


def _name_row(name: str, found: Mapping[str, Mapping[str, Line]]) -> str:
    family = NAMES[name].family
    spellings = {f"as `{each}`" for each in (name, *(f"{name}_{spacing}" for spacing in family.spacings))}
    lines = [line for option, line in found[family.class_name].items() if option in spellings]
    worst = max(error for line in lines for error in line.worst.values())
    rounded = max(line.rounded for line in lines)
    spacings = ", ".join(family.spacings) or "its own"
    return f"| `{name}` | {family.class_name} | {spacings} | {worst:.1e} | {rounded:.1e} |"


def _option_row(option: str, line: Line) -> str:
    figures = " | ".join(f"{line.worst[steps]:.1e}" if steps in line.worst else "-" for steps in STEPS)
    rounded = f"{line.rounded:.1e}" if line.cells else "-"
    reasons = [
        reason.replace("|", "/") + (f" ({count} cells)" if count else "") for reason, count in line.notes.items()
    ]
    return f"| {option} | {line.cells} | {figures} | {rounded} | {'; '.join(reasons)} |"


def options_of(document: str) -> dict[str, list[str]]:
    """The classes of a written document with their options, in its order."""
    found: dict[str, list[str]] = {}
    for part in document.split("\n## ")[1:]:
        class_name, _, body = part.partition("\n")
        if class_name in FAMILIES:
            rows = [line for line in body.splitlines() if line.startswith("| ")]
            found[class_name] = [line.split(" | ")[0].removeprefix("| ") for line in rows[2:]]
    return found


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
        f"{name} {option} {where}: {error:.1e}"
        for name, lines in found.items()
        for option, line in lines.items()
        for where, error in [*((f"{steps} steps", error) for steps, error in line.worst.items()), line.in_float32]
        if not error <= ILL_CONDITIONED.get((name, option), (BOUND,))[0]
    ]


def faults_of(found: Mapping[str, Mapping[str, Line]]) -> list[str]:
    """The cells that only one of the two has, and no reason is said for."""
    return [
        f"{name} {fault}"
        for name, lines in found.items()
        for option, line in lines.items()
        if (name, option) not in ILL_CONDITIONED
        for fault in line.faults
    ]


def main(target: str) -> int:
    """Measure everything and write; 1 when a cell is beyond its bound, or a class or a cell is missing."""
    missing = all_classes() - FAMILIES.keys() - WITHOUT_PLAN.keys()
    if missing:
        print(f"neither a plan nor a reason: {', '.join(sorted(missing))}")
        return 1
    began = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(sorted(FAMILIES), pool.map(measure_class, sorted(FAMILIES)), strict=True))
    Path(target).write_text(written(found, time.monotonic() - began))
    wrong = beyond_bound(found) + faults_of(found)
    print("\n".join(wrong) or f"all within {BOUND:.0e} or what is said of them: {target}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
