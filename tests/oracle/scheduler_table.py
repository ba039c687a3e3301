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
from tests.oracle.plan_reference import STABLE_DIFFUSION, Reference, make_scheduler, run_plan, run_reference
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
TIMESTEP_BOUND = 1e-4  # two last places of float32 at 999
TIMESTEP_BOUNDS = {"KDPM2AncestralDiscreteScheduler": 0.02}  # it reckons its midpoints' from float32 logarithms
_COSINE = (
    "sigmas begin at 20,291, and the first step's smaller sigma is left of a float32 difference that cancels to two "
    "digits: reckoned on two CPUs, the reference differs from itself as much"
)
_UNEVEN = (
    "of such uneven steps it amplifies the last place of a sigma: over 50 of them the reference in float32 is 1.3e-3 "
    "from itself in float64"
)
# Cells in which the reference's own float32 decides: how far they may be (None: it has none there), and why.
ILL_CONDITIONED: Mapping[tuple[str, str, int], tuple[float | None, str]] = {
    ("KDPM2AncestralDiscreteScheduler", "beta_schedule=squaredcos_cap_v2", 5): (None, _COSINE),
    ("KDPM2AncestralDiscreteScheduler", "beta_schedule=squaredcos_cap_v2", 50): (5e-2, _COSINE),
    ("DPMSolverMultistepScheduler", "as `dpmpp_3m_sde_beta`", 50): (5e-4, _UNEVEN),
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

    exact: the error in float64; rounded: that of float32 states and coefficients; told: how far the timesteps that the
    network is told are from the reference's, infinite where there are more or fewer. None where one refuses, and why.
    """

    exact: float | None = None
    rounded: float | None = None
    told: float | None = None
    ours: str | None = None
    theirs: str | None = None


@dataclass(slots=True)
class Line:
    """What became of the cells of one option of one class. usual: the largest error of those without an exception."""

    worst: dict[int, float] = field(default_factory=dict)
    rounded: float = 0.0
    usual: tuple[float, float] = (0.0, 0.0)
    cells: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, class_name: str, option: str, steps: int, cell: Cell) -> None:
        """Count a cell."""
        fault = fault_of(class_name, option, steps, cell)
        self.faults += [] if fault is None else [f"{class_name} {option}, {steps} steps: {fault}"]
        bound, reason = ILL_CONDITIONED.get((class_name, option, steps), (BOUND, None))
        if reason is not None:
            self.notes[reason] = 0
        if cell.exact is not None and cell.rounded is not None:
            self.cells += 1
            self.worst[steps] = largest(cell.exact, self.worst.get(steps, 0.0))
            self.rounded = largest(cell.rounded, self.rounded)
            if bound == BOUND:
                self.usual = (largest(cell.exact, self.usual[0]), largest(cell.rounded, self.usual[1]))
        elif cell.ours is not None:
            self.note(f"refused: {REFUSED[option]}" if option in REFUSED else f"neither: {cell.theirs}")
        else:
            self.note(f"not the reference: {cell.theirs}")

    def note(self, reason: str) -> None:
        """Count one more cell that was not measured for this reason."""
        self.notes[reason] = self.notes.get(reason, 0) + 1


def fault_of(class_name: str, option: str, steps: int, cell: Cell) -> str | None:
    """What is wrong with a cell: an error beyond its bound, or that only one of the two has it for no said reason."""
    bound, _ = ILL_CONDITIONED.get((class_name, option, steps), (BOUND, None))
    if cell.exact is None or cell.rounded is None or cell.told is None:
        excused = option in REFUSED if cell.ours is not None else bound is None
        if excused or (cell.ours is not None and cell.theirs is not None):
            return None
        return f"only sdrt refuses: {cell.ours}" if cell.theirs is None else f"not the reference: {cell.theirs}"
    for name, error in (("in float64", cell.exact), ("in float32", cell.rounded)):
        if not error <= (BOUND if bound is None else bound):
            return f"{error:.1e} {name}"
    if bound == BOUND and not cell.told <= TIMESTEP_BOUNDS.get(class_name, TIMESTEP_BOUND):
        return f"timesteps {cell.told:.1e} from the reference's"
    return None


def largest(*errors: float) -> float:
    """Their maximum; not a number where one of them is none."""
    return float(np.max(errors))


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
    exact, rounded, told = [], [], []
    for feedback in FEEDBACKS:
        try:
            reference = reference_of(class_name, whole, asked, steps, grid, first, feedback)
        except REFUSALS as refusal:
            theirs = first_line(refusal)
            continue
        if plan is not None:
            last = reference.states[-1]
            for errors, dtype in ((exact, np.float64), (rounded, np.float32)):
                errors.append(float(np.abs(run_plan(plan, feedback, dtype)[-1] - last).max() / np.abs(last).max()))
            same = plan.timesteps.shape == reference.timesteps.shape
            told.append(float(np.abs(plan.timesteps - reference.timesteps).max()) if same else np.inf)
    if plan is None or theirs is not None:
        return Cell(ours=ours, theirs=theirs)
    return Cell(exact=largest(*exact), rounded=largest(*rounded), told=largest(*told))


def reference_of(
    class_name: str,
    whole: Mapping[str, object],
    asked: Variation,
    steps: int,
    grid: Mapping[str, tuple[float, ...]] | None,
    first: int,
    feedback: float,
) -> Reference:
    """What the reference does; one of REFUSALS where it does not, or does not stay finite."""
    scheduler = make_scheduler(class_name, whole)
    given = None if grid is None else {name: list(values) for name, values in grid.items()}
    if asked.mu is not None:
        given = {"num_inference_steps": steps, "mu": asked.mu}
    eta = {"eta": asked.eta} if class_name in WITH_ETA else {}
    reference = run_reference(scheduler, steps, feedback=feedback, first=first, grid=given, **eta)
    if not np.isfinite(reference.states[-1]).all():
        raise ValueError("its latents are not finite")
    return reference


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
            cell = measure(class_name, asked, steps)
            lines[asked.option].add(class_name, asked.option, steps, cell)
    return dict(lines)


def written(found: Mapping[str, Mapping[str, Line]], seconds: float) -> str:
    """The document."""
    cells = sum(line.cells for lines in found.values() for line in lines.values())
    worst, rounded = (
        largest(*(line.usual[which] for lines in found.values() for line in lines.values())) for which in (0, 1)
    )
    exceptions = sum(1 for bound, _ in ILL_CONDITIONED.values() if bound is not None)
    introduction = (
        "Written by `make oracle`: do not edit. Every scheduler is rows of numbers (a sampling plan), built "
        f"in float64. Here each is held against the class of diffusers {diffusers.__version__} that it stands "
        "for: both take the same steps with the same network, once of random outputs and once linear in what "
        "it sees, and the same noise; the figure is the largest error of the last latents, relative to their "
        f"largest value, over all grids of the option. The reference steps in float64. {cells:,} cells were measured "
        f"in {seconds:.0f} s: the worst is {worst:.1e} where the plan steps in float64 too, which shows its "
        f"mathematics, and {rounded:.1e} where its state and its numbers are float32, as the step graph has them; the "
        f"bound is {BOUND:.0e} for both. What remains in float64 is the float32 in which the reference holds its "
        f"sigmas; {exceptions} cells are worse than the bound, and say why. The timesteps that the network is told "
        f"are the reference's to {TIMESTEP_BOUND:.0e}, but for ancestral KDPM2's to 0.02. Where a DDIM or DDPM "
        "config does not say `clip_sample`, nothing is clipped, as Stable Diffusion's pipelines have it and not as the "
        "bare classes. Of timesteps of one's own, a `strength` is a share of the steps; the pipelines of diffusers "
        "take it of the evaluations, of which Heun's method has two a step, and so begin elsewhere with `heun`."
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
    worst = largest(*(error for line in lines for error in line.worst.values()))
    rounded = largest(*(line.rounded for line in lines))
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


def faults_of(found: Mapping[str, Mapping[str, Line]]) -> list[str]:
    """The cells that are wrong, or that only one of the two has."""
    return [fault for lines in found.values() for line in lines.values() for fault in line.faults]


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
    wrong = faults_of(found)
    print("\n".join(wrong) or f"all within {BOUND:.0e} or what is said of them: {target}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
