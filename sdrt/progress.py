"""How long work reports itself, so that the stages know nothing of terminals, and how it is done a part at a time."""

from collections.abc import Generator
from typing import Protocol, TypeVar

Made = TypeVar("Made")
# It rests between two of its parts, each one or a few calls of engines, and returns what it made, which is never None.
Work = Generator[None, None, Made]


class Progress(Protocol):
    """Called with a stage's name, how many of its units are done, and how many there are."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report once."""
        ...


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def already(made: Made) -> Work[Made]:
    """What took no engine, as work that has one part."""
    yield from ()
    return made


def advance(work: Work[Made]) -> Made | None:
    """Do one part. Returns what was made when that was the last one, else None."""
    try:
        next(work)
    except StopIteration as end:
        made: Made = end.value
        return made
    return None


def complete(work: Work[Made]) -> Made:
    """Do all of it at once."""
    while (made := advance(work)) is None:
        pass
    return made
