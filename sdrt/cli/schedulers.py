"""`sdrt schedulers`: every scheduler's name, the class that it is in checkpoints, and what it supports."""

from typing import TYPE_CHECKING

from sdrt.cli.options import AsJson
from sdrt.cli.terminal import emit, table, title

if TYPE_CHECKING:
    from sdrt.bundle import JsonValue
    from sdrt.plan.catalog import NamedScheduler

_HEAD = ("name", "class in checkpoints", "for models of", "spacings", "takes", "prediction types", "sets")


def schedulers(as_json: AsJson = False) -> None:
    """List the schedulers."""
    from sdrt.plan.catalog import FAMILIES, NAMES, base_names

    bases = [NAMES[name] for name in base_names()]
    rows = [
        (
            each.name,
            each.family.class_name,
            each.family.schedule,
            ", ".join(each.family.spacings),
            ", ".join(each.family.takes),
            _predictions_text(each),
            _fields_text(each),
        )
        for each in bases
    ]
    result: dict[str, JsonValue] = {
        "schedulers": [
            {
                "name": each.name,
                "schedule": each.family.schedule,
                "class": each.family.class_name,
                "spacings": [*each.family.spacings],
                "takes": [*each.family.takes],
                "predictions": [*each.family.predictions],
                "sets": dict(each.sets),
                "fields": [*sorted(each.family.fields)],
            }
            for each in bases
        ],
        "names": [*NAMES],
        "classes": [*sorted(FAMILIES)],
    }
    lines = [
        title("Schedulers: give --scheduler a name, a name with a spacing (euler_karras), or a class"),
        *table(_HEAD, rows, left=tuple(range(len(_HEAD)))),
    ]
    emit(result, lines, as_json=as_json)


def _predictions_text(scheduler: "NamedScheduler") -> str:
    from sdrt.schedule import PREDICTION_TYPES

    supported = scheduler.family.predictions
    refused = [kind for kind in PREDICTION_TYPES if kind not in supported]
    if not supported:  # a flow's networks predict nothing but its velocity
        return "velocity"
    return f"all but {', '.join(refused)}" if refused else "all"


def _fields_text(scheduler: "NamedScheduler") -> str:
    return ", ".join(
        f"order {value}" if name == "solver_order" else str(value) for name, value in scheduler.sets.items()
    )
