"""`sdrt schedulers`: every scheduler's name, the class that it is in checkpoints, and what it supports."""

from typing import TYPE_CHECKING

from sdrt.cli.options import AsJson
from sdrt.cli.terminal import emit, table, title

if TYPE_CHECKING:
    from sdrt.bundle import JsonValue
    from sdrt.plan.catalog import NamedScheduler

_HEAD = ("name", "class in checkpoints", "for models of", "spacings", "sets")


def schedulers(as_json: AsJson = False) -> None:
    """List the schedulers."""
    from sdrt.plan.catalog import FAMILIES, NAMES, base_names

    bases = [NAMES[name] for name in base_names()]
    rows = [
        (each.name, each.family.class_name, each.family.schedule, ", ".join(each.family.spacings), _fields_text(each))
        for each in bases
    ]
    result: dict[str, JsonValue] = {
        "schedulers": [
            {
                "name": each.name,
                "schedule": each.family.schedule,
                "class": each.family.class_name,
                "spacings": [*each.family.spacings],
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
        *table(_HEAD, rows, left=(0, 1, 2, 3, 4)),
    ]
    emit(result, lines, as_json=as_json)


def _fields_text(scheduler: "NamedScheduler") -> str:
    return ", ".join(f"{name}={value}" for name, value in scheduler.sets.items())
