"""How long work reports itself: one callable, so that the stages know nothing of terminals."""

from typing import Protocol


class Progress(Protocol):
    """Called with a stage's name, how many of its units are done, and how many there are."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report once."""
        ...


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""
