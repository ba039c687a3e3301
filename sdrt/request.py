"""What a caller asks for, and the one place where it is checked before anything is computed."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text-to-image request, in the names of the diffusers pipelines. `None` means the model's default.

    With `num_images_per_prompt` > 1, image i is made with seed + i, so each can be made again alone.
    """

    prompt: str
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | None = None
    seed: int | None = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
