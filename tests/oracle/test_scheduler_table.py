"""The table of schedulers: no class is missing, and a slice of its cells is measured in every test run."""

import pytest

from sdrt.plan.catalog import FAMILIES, NAMES, base_names
from tests.oracle.scheduler_table import (
    BOUND,
    ILL_CONDITIONED,
    MEASURED_ELSEWHERE,
    WITHOUT_PLAN,
    Line,
    Variation,
    all_classes,
    beyond_bound,
    measure,
    variations,
    written,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def test_every_class_of_the_reference_has_a_plan_or_a_reason():
    assert all_classes() == FAMILIES.keys() | WITHOUT_PLAN.keys()
    assert not FAMILIES.keys() & WITHOUT_PLAN.keys()


@pytest.mark.parametrize("class_name", sorted(FAMILIES.keys() - MEASURED_ELSEWHERE.keys()))
def test_a_class_with_its_defaults_and_begun_late_is_the_reference(class_name: str):
    plain = next(variations(class_name))
    for asked in (plain, Variation(option=plain.option, config=plain.config, strength=0.6)):
        assert measure(class_name, asked, 20) <= BOUND


@pytest.mark.parametrize("option", ["clip_sample=True", "thresholding=True"])
@pytest.mark.parametrize("class_name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_clamp_is_the_reference_s(class_name: str, option: str):
    asked = [each for each in variations(class_name) if each.option == option]
    assert asked or option == "clip_sample=True"
    for each in asked:
        assert measure(class_name, each, 5) <= BOUND


def test_a_cell_beyond_its_bound_is_found():
    line = Line(worst={5: 2e-5}, cells=1)
    assert beyond_bound({"DDIMScheduler": {"epsilon": line}}) == ["DDIMScheduler epsilon 5 steps: 2.0e-05"]
    assert beyond_bound({"DDIMScheduler": {"epsilon": Line(worst={5: float("nan")}, cells=1)}})
    (class_name, option), (bound, _) = next(iter(ILL_CONDITIONED.items()))
    assert not beyond_bound({class_name: {option: Line(worst={5: bound}, cells=1)}})


def test_a_plan_that_is_wrong_by_little_is_beyond_the_bound(monkeypatch: pytest.MonkeyPatch):
    asked = Variation(option="epsilon", config={"beta_end": 0.012 * (1 + 1e-4)})
    monkeypatch.setattr("tests.oracle.scheduler_table.STABLE_DIFFUSION", {"beta_start": 0.00085, "beta_end": 0.012})
    from tests.oracle import scheduler_table

    make = scheduler_table.make_scheduler
    monkeypatch.setattr(
        scheduler_table, "make_scheduler", lambda name, config: make(name, {**config, "beta_end": 0.012})
    )
    assert measure("DDIMScheduler", asked, 20) > BOUND


def test_the_document_names_every_scheduler_and_says_why_a_cell_is_missing():
    line = Line(worst={5: 1e-7}, cells=2)
    line.note("the reference refuses: this | that")
    text = written({name: {"epsilon": line} for name in FAMILIES}, 1.0)
    assert all(f"| `{name}` |" in text for name in base_names())
    assert "this / that (1 cells)" in text
    assert all(NAMES[name].family.class_name in text for name in base_names())
    assert all(f"| {name} |" in text for name in WITHOUT_PLAN)
