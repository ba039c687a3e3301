"""What an image is begun with, and what conditions it at every step: plain arrays that a task makes."""

from dataclasses import dataclass

from sdrt.runners.base import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """What is known of an image already, which every step puts back as noisy as the rest is then.

    latents, noise: float32 [C, h, w]. mask: float32 [1, h, w], 1 where the image is drawn, 0 where it is known.
    """

    latents: FloatArray
    noise: FloatArray
    mask: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steering:
    """What k ControlNets are given at every step.

    control: float32 [k, c, h, w], what they make of their pictures. scales: float32 [rows, k], how much each counts in
    each row.
    """

    control: FloatArray
    scales: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """One image before its first step.

    latents: float32 [C, h, w]. conditioning: float32 [K, h, w], more channels for the network. class_label: for a
    network that has classes. warnings: what showed only when this was made.
    """

    latents: FloatArray
    conditioning: FloatArray | None = None
    known: Known | None = None
    class_label: int | None = None
    warnings: tuple[str, ...] = ()
