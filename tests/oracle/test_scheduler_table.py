"""The table of schedulers: no class is missing, and a slice of its cells is measured in every test run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdrt.errors import RequestError
from sdrt.plan.catalog import FAMILIES, NAMES, base_names
from tests.oracle import scheduler_table
from tests.oracle.scheduler_options import IN_AXES, MORE_BETA_SCHEDULES, WITHOUT_CELLS, Variation, variations
from tests.oracle.scheduler_table import (
    ILL_CONDITIONED,
    WITHOUT_PLAN,
    Cell,
    Line,
    all_classes,
    fault_of,
    faults_of,
    measure,
    options_of,
    written,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "schedulers.md"
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def test_every_class_of_the_reference_has_a_plan_or_a_reason():
    assert all_classes() == FAMILIES.keys() | WITHOUT_PLAN.keys()
    assert not FAMILIES.keys() & WITHOUT_PLAN.keys()


def fault(class_name: str, asked: Variation, steps: int) -> str | None:
    """What is wrong with a cell."""
    return fault_of(class_name, asked.option, steps, measure(class_name, asked, steps))


@pytest.mark.parametrize("class_name", sorted(FAMILIES))
def test_a_class_with_its_defaults_and_begun_late_is_the_reference(class_name: str):
    plain = next(variations(class_name))
    for asked in (plain, replace(plain, strength=0.6)):
        assert fault(class_name, asked, 20) is None


@pytest.mark.parametrize("option", ["clip_sample=True", "thresholding=True"])
@pytest.mark.parametrize("class_name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_clamp_is_the_reference_s(class_name: str, option: str):
    asked = [each for each in variations(class_name) if each.option == option]
    assert asked or option == "clip_sample=True"
    for each in asked:
        assert fault(class_name, each, 5) is None


@pytest.mark.parametrize(
    ("class_name", "kind"), [(name, kind) for name, kinds in MORE_BETA_SCHEDULES.items() for kind in kinds]
)
def test_the_schedules_of_betas_that_few_have_are_the_reference_s(class_name: str, kind: str):
    asked = Variation(option=kind, config={"beta_schedule": kind})
    assert fault(class_name, asked, 7) is None


@pytest.mark.parametrize("bound", ["sigma_min", "sigma_max"])
def test_a_flow_heeds_the_bounds_of_its_sigmas(bound: str):
    (asked, *_) = [
        each for each in variations("FlowMatchEulerDiscreteScheduler") if each.option.startswith(f"{bound}=")
    ]
    assert fault("FlowMatchEulerDiscreteScheduler", asked, 5) is None


def test_every_field_of_a_class_is_varied_or_a_reason_is_said():
    for class_name, family in FAMILIES.items():
        varied = {name for asked in variations(class_name) for name in asked.config}
        assert family.fields.keys() <= varied | IN_AXES | WITHOUT_CELLS.keys(), class_name


FINE = Cell(exact=1e-9, rounded=1e-7, told=0.0)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (replace(FINE, exact=2e-5), "2.0e-05 in float64"),
        (replace(FINE, exact=float("nan")), "nan in float64"),
        (replace(FINE, rounded=2e-5), "2.0e-05 in float32"),
        (replace(FINE, rounded=float("nan")), "nan in float32"),
        (replace(FINE, told=0.5), "timesteps 5.0e-01 from the reference's"),
        (Cell(ours="no"), "only sdrt refuses: no"),
        (Cell(theirs="no"), "not the reference: no"),
    ],
)
def test_a_cell_that_is_wrong_is_found(cell: Cell, said: str):
    line = Line()
    line.add("DDIMScheduler", "epsilon", 5, cell)
    line.add("DDIMScheduler", "epsilon", 20, FINE)
    assert faults_of({"DDIMScheduler": {"epsilon": line}}) == [f"DDIMScheduler epsilon, 5 steps: {said}"]


def test_a_line_does_not_forget_what_is_not_a_number():
    line = Line()
    for cell in (replace(FINE, exact=float("nan")), FINE):
        line.add("DDIMScheduler", "epsilon", 5, cell)
    assert np.isnan(line.worst[5])


def test_what_is_fine_or_has_a_reason_is_no_fault():
    assert fault_of("DDIMScheduler", "epsilon", 5, FINE) is None
    assert fault_of("DDIMScheduler", "use_flow_sigmas=True", 5, Cell(ours="no")) is None
    assert fault_of("DDIMScheduler", "sample", 5, Cell(ours="no", theirs="no")) is None
    for (class_name, option, steps), (bound, _) in ILL_CONDITIONED.items():
        cell = Cell(theirs="no") if bound is None else Cell(exact=bound, rounded=bound, told=9.0)
        assert fault_of(class_name, option, steps, cell) is None
        assert fault_of(class_name, option, steps + 1, cell) is not None
        assert fault_of(class_name, option, steps, Cell(ours="no")) is not None


def test_a_plan_that_tells_the_network_other_times_is_found(monkeypatch: pytest.MonkeyPatch):
    asked, build = next(variations("DDIMScheduler")), scheduler_table.build_plan

    def late(**options: object):
        plan = build(**options)
        return replace(plan, timesteps=plan.timesteps + 1)

    monkeypatch.setattr(scheduler_table, "build_plan", late)
    assert fault("DDIMScheduler", asked, 5) == "timesteps 1.0e+00 from the reference's"


def test_a_plan_that_is_refused_or_crashes_is_no_refusal_of_the_reference(monkeypatch: pytest.MonkeyPatch):
    asked = next(variations("DDIMScheduler"))

    def refuse(**_: object) -> None:
        raise RequestError("no", hint="none")

    monkeypatch.setattr(scheduler_table, "build_plan", refuse)
    assert measure("DDIMScheduler", asked, 5) == Cell(ours="no")

    def crash(**_: object) -> None:
        raise TypeError("a fault of sdrt's own")

    monkeypatch.setattr(scheduler_table, "build_plan", crash)
    with pytest.raises(TypeError):
        measure("DDIMScheduler", asked, 5)


def test_a_plan_that_is_wrong_by_little_is_beyond_the_bound(monkeypatch: pytest.MonkeyPatch):
    asked = Variation(option="epsilon", config={"beta_end": 0.012 * (1 + 1e-4)})
    monkeypatch.setattr(scheduler_table, "STABLE_DIFFUSION", {"beta_start": 0.00085, "beta_end": 0.012})
    make = scheduler_table.make_scheduler
    monkeypatch.setattr(
        scheduler_table, "make_scheduler", lambda name, config: make(name, {**config, "beta_end": 0.012})
    )
    assert fault("DDIMScheduler", asked, 20) is not None


def test_the_document_names_every_scheduler_and_says_why_a_cell_is_missing():
    line = Line(worst={5: 1e-7}, cells=2)
    line.note("the reference refuses: this | that")
    found = {
        name: {"epsilon": line} | {f"as `{each.name}`": line for each in NAMES.values() if each.family is family}
        for name, family in FAMILIES.items()
    }
    text = written(found, 1.0)
    assert all(f"| `{name}` |" in text for name in base_names())
    assert "this / that (1 cells)" in text
    assert all(NAMES[name].family.class_name in text for name in base_names())
    assert all(f"| {name} |" in text for name in WITHOUT_PLAN)
    assert options_of(text) == {name: list(lines) for name, lines in found.items()}


def test_the_committed_document_has_every_option_that_is_asked_today():
    asked = {name: list(dict.fromkeys(each.option for each in variations(name))) for name in sorted(FAMILIES)}
    assert options_of(DOCUMENT.read_text()) == asked
