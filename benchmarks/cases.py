"""Cases: the pictures that every contestant draws."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One picture to draw, in the names of `sdrt.Request`."""

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The case without its defaults."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in fields.items() if value is not None}
