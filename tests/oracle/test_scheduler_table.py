"""The table of schedulers: no class is missing, and a slice of its cells is measured in every test run."""

from dataclasses import replace
from pathlib import Path

import pytest

from sdrt.errors import RequestError
from sdrt.plan.catalog import FAMILIES, NAMES, base_names
from tests.oracle import scheduler_table
from tests.oracle.scheduler_options import IN_AXES, MORE_BETA_SCHEDULES, WITHOUT_CELLS, Variation, variations
from tests.oracle.scheduler_table import (
    BOUND,
    ILL_CONDITIONED,
    WITHOUT_PLAN,
    Cell,
    Line,
    all_classes,
    beyond_bound,
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


def within(cell: Cell) -> bool:
    """Whether a cell was measured, and both of its errors are small enough."""
    return cell.exact is not None and cell.exact <= BOUND and cell.rounded is not None and cell.rounded <= BOUND


@pytest.mark.parametrize("class_name", sorted(FAMILIES))
def test_a_class_with_its_defaults_and_begun_late_is_the_reference(class_name: str):
    plain = next(variations(class_name))
    for asked in (plain, replace(plain, strength=0.6)):
        assert within(measure(class_name, asked, 20))


@pytest.mark.parametrize("option", ["clip_sample=True", "thresholding=True"])
@pytest.mark.parametrize("class_name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_clamp_is_the_reference_s(class_name: str, option: str):
    asked = [each for each in variations(class_name) if each.option == option]
    assert asked or option == "clip_sample=True"
    for each in asked:
        assert within(measure(class_name, each, 5))


@pytest.mark.parametrize(
    ("class_name", "kind"), [(name, kind) for name, kinds in MORE_BETA_SCHEDULES.items() for kind in kinds]
)
def test_the_schedules_of_betas_that_few_have_are_the_reference_s(class_name: str, kind: str):
    asked = Variation(option=kind, config={"beta_schedule": kind})
    assert within(measure(class_name, asked, 7))


@pytest.mark.parametrize("bound", ["sigma_min", "sigma_max"])
def test_a_flow_heeds_the_bounds_of_its_sigmas(bound: str):
    (asked, *_) = [
        each for each in variations("FlowMatchEulerDiscreteScheduler") if each.option.startswith(f"{bound}=")
    ]
    assert within(measure("FlowMatchEulerDiscreteScheduler", asked, 5))


def test_every_field_of_a_class_is_varied_or_a_reason_is_said():
    for class_name, family in FAMILIES.items():
        varied = {name for asked in variations(class_name) for name in asked.config}
        assert family.fields.keys() <= varied | IN_AXES | WITHOUT_CELLS.keys(), class_name


def test_a_cell_beyond_its_bound_is_found():
    line = Line(worst={5: 2e-5}, cells=1)
    assert beyond_bound({"DDIMScheduler": {"epsilon": line}}) == ["DDIMScheduler epsilon 5 steps: 2.0e-05"]
    assert beyond_bound({"DDIMScheduler": {"epsilon": Line(worst={5: float("nan")}, cells=1)}})
    assert beyond_bound({"DDIMScheduler": {"epsilon": Line(worst={5: 1e-9}, rounded=2e-5, cells=1)}})
    (class_name, option), (bound, _) = next(iter(ILL_CONDITIONED.items()))
    assert not beyond_bound({class_name: {option: Line(worst={5: bound}, cells=1)}})


def test_a_cell_that_only_one_of_the_two_has_is_found():
    for cell, refused in ((Cell(ours="no"), "only sdrt refuses: no"), (Cell(theirs="no"), "not the reference: no")):
        line = Line()
        line.add("eta=0.3", 5, cell)
        assert faults_of({"DDIMScheduler": {"eta=0.3": line}}) == [f"DDIMScheduler eta=0.3, 5 steps: {refused}"]
    line = Line()
    line.add("use_flow_sigmas=True", 5, Cell(ours="no"))
    line.add("sample", 5, Cell(ours="no", theirs="no"))
    assert not faults_of({"DDIMScheduler": {"sample": line}})


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
    assert not within(measure("DDIMScheduler", asked, 20))


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
