"""Inpainting: part of an image is drawn anew, by a network that is shown the rest, or by putting the rest back.

A network of an inpainting checkpoint sees the mask and the masked image's latents at every step (Rombach et al. 2022).
Any other one is led by the known part, which each step puts back as noisy as the rest is then (Lugmayr et al. 2022,
arXiv:2201.09865, without resampling).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
from PIL import Image

from sdrt.bundle import JsonValue, ModelRecord
from sdrt.checks import check_finite, check_flag, check_whole, shown
from sdrt.conditions import Known, Start
from sdrt.errors import RequestError
from sdrt.plan import SamplingPlan
from sdrt.progress import Work
from sdrt.request import Request
from sdrt.runners.base import FloatArray
from sdrt.tasks import pictures
from sdrt.tasks.base import PlainTask, Preparation, TaskName
from sdrt.tasks.image_to_image import check_noised, check_strength, first_step_of

DEFAULT_STRENGTH = 1.0
DEFAULT_MASK_BLUR = 8.0  # pixels
LARGEST_MASK_BLUR = 512.0
MaskMode = Literal["diffusers", "soft"]
MASK_MODES: tuple[MaskMode, ...] = ("diffusers", "soft")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inpainting(PlainTask):
    """See `Task`.

    image, mask: RGB and grey, of one size: what is worked on. strength: the share of the steps that run; with all of
    them the image is not in the start. blur: of the mask in the latents, in pixels; None is a mask without greys.
    conditioned: the network sees mask and image. preserve: put what is not drawn back afterwards.
    whole_latents: a latent that holds any of the mask is drawn, all of it; otherwise its upper left corner decides, as
    in the reference.
    whole, box: with a crop, image and mask that it is cut out of, and where. image_sha256, mask_sha256: as given.
    """

    name: ClassVar[TaskName] = "inpainting"
    image: Image.Image
    mask: Image.Image
    strength: float
    blur: float | None
    conditioned: bool
    vae_downsample: int
    image_sha256: str
    mask_sha256: str
    preserve: bool = False
    whole_latents: bool = False
    padding: int | None = None
    whole: tuple[Image.Image, Image.Image] | None = None
    box: pictures.Box | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """That of the image; a crop is of the model's own."""
        return (self.image.height, self.image.width) if self.padding is None else None

    def resized(self, height: int, width: int) -> Self:
        """With image and mask in this size, as the reference resizes them, or with what is cropped of them."""
        if self.padding is None:
            image, mask = (pictures.resize(each, height, width) for each in (self.image, self.mask))
            return replace(self, image=image, mask=mask)
        box = pictures.crop_box(self.mask, self.padding, height, width)
        pictures.check_covering((width, height), box[3] - box[1], box[2] - box[0])
        image, mask = (pictures.fitted(each.crop(box), height, width) for each in (self.image, self.mask))
        return replace(self, image=image, mask=mask, whole=(self.image, self.mask), box=box)

    def check_plan(self, plan: SamplingPlan) -> None:
        """RequestError for a plan without `noised`, where what is known has to enter it."""
        if not self.conditioned or self.strength < 1:
            check_noised(plan)

    def first_step(self, num_inference_steps: int) -> int:
        """The steps before those that `strength` lets run."""
        return first_step_of(self.strength, num_inference_steps)

    def start(self, preparation: Preparation) -> Work[Start]:
        """Noise, on the image's latents where some steps are left out; with what is known in one of the two ways.

        The generator's numbers are drawn as in the reference: for the image's latents where they are needed, for the
        noise, for the masked image's latents.
        """
        sample, free = pictures.to_sample(self.image), self.strength == 1
        image_latents = None
        if not (free and self.conditioned):
            image_latents = yield from preparation.latents_of(sample)
        noise = preparation.noise()
        mask = self._in_latents()
        if image_latents is None or free:
            latents = preparation.only_noise(noise)
        else:
            latents = preparation.with_noise(image_latents, noise)
        masked_noise = preparation.numbers()  # the reference draws it for any network
        if self.conditioned:
            masked = (yield from preparation.encode(self._masked(sample))).sample(masked_noise)
            return Start(latents=latents, conditioning=np.concatenate([mask, masked[0]]))
        if image_latents is None:
            raise RuntimeError("the image was not encoded")
        return Start(latents=latents, known=Known(latents=image_latents[0], noise=noise[0], mask=mask))

    def finish(self, image: Image.Image) -> Image.Image:
        """With what is not drawn put back, and a crop into its place."""
        if self.whole is not None and self.box is not None:
            left, top, right, bottom = self.box
            drawn = self.whole[0].copy()
            drawn.paste(pictures.covering(image, bottom - top, right - left), (left, top))
            image, mask = self.whole
            exact = self.preserve and self.blur is None
            return pictures.composite(drawn, image, pictures.binarised(mask) if exact else mask)
        return pictures.composite(image, self.image, self._drawn()) if self.preserve else image

    def worked_on(self) -> Image.Image:
        """The mask as the network is to take it, in pixels."""
        return pictures.in_whole_latents(self.mask, self.vae_downsample) if self.whole_latents else self.mask

    def warnings(self) -> tuple[str, ...]:
        """A mask that is all of one colour."""
        drawn = np.asarray(pictures.binarised(self.mask) if self.blur is None else self.mask)
        if not drawn.any():
            return ("the mask is all black: nothing is drawn anew",)
        if drawn.min() == pictures.OPAQUE:
            return ("the mask is all white: nothing of the image is kept",)
        return ()

    def parameters(self) -> Mapping[str, JsonValue]:
        """The mask's conventions, and by which pixels image and mask can be known again."""
        mode: MaskMode = "diffusers" if self.blur is None else "soft"
        return {
            "strength": self.strength,
            "image_sha256": self.image_sha256,
            "mask_image_sha256": self.mask_sha256,
            "mask_mode": mode,
            "mask_blur": self.blur,
            "padding_mask_crop": self.padding,
            "preserve": self.preserve,
        }

    def _drawn(self) -> Image.Image:
        return pictures.binarised(self.mask) if self.blur is None else self.mask

    def _in_latents(self) -> FloatArray:
        """The mask of the latents: float32 [1, h, w]."""
        mask, side = self.worked_on(), self.vae_downsample
        if self.blur is None:
            return pictures.nearest_in_latents(pictures.binarised(mask), side)
        return pictures.mean_in_latents(pictures.blurred(mask, self.blur), side)

    def _masked(self, sample: FloatArray) -> FloatArray:
        """The image's sample with 0, which is grey, where it is drawn."""
        kept = np.asarray(self.worked_on()) < pictures.HALF
        masked: FloatArray = sample * kept[None, None]
        return masked


def read_inpainting(request: Request, model: ModelRecord) -> Inpainting:
    """The task of a request with an image and a mask. Raises RequestError."""
    image = pictures.check_picture("image", request.image)
    mask = pictures.check_mask("mask_image", request.mask_image)
    if image.size != mask.size:
        raise RequestError(
            f"image has {image.width}x{image.height} pixels, mask_image {mask.width}x{mask.height}",
            hint="give them in one size",
        )
    padding = request.padding_mask_crop
    return replace(
        inpainting_of(request, model, image, mask, preserve=False),
        padding=None if padding is None else check_whole("padding_mask_crop", padding, 0, 10_000),
    )


def inpainting_of(
    request: Request, model: ModelRecord, image: Image.Image, mask: Image.Image, *, preserve: bool
) -> Inpainting:
    """The inpainting of these pictures as the request asks. preserve: where it does not say. Raises RequestError."""
    return Inpainting(
        image=image,
        mask=mask,
        strength=check_strength(request.strength, DEFAULT_STRENGTH),
        blur=_check_mask_blur(request),
        conditioned=model.task == "inpainting",
        vae_downsample=model.vae_downsample,
        image_sha256=pictures.pixels_sha256(image),
        mask_sha256=pictures.pixels_sha256(mask),
        preserve=preserve if request.preserve is None else check_flag("preserve", request.preserve),
    )


def _check_mask_blur(request: Request) -> float | None:
    """The blur of a soft mask, or None for one without greys. Raises RequestError."""
    mode = "diffusers" if request.mask_mode is None else request.mask_mode
    if mode not in MASK_MODES:
        raise RequestError(f"mask_mode is {shown(mode)}", hint=f"choose one of: {', '.join(MASK_MODES)}")
    if mode == "diffusers":
        if request.mask_blur is not None:
            raise RequestError(
                f"mask_blur is {shown(request.mask_blur)}, but the mask has no greys", hint='give mask_mode="soft" too'
            )
        return None
    blur = DEFAULT_MASK_BLUR if request.mask_blur is None else check_finite("mask_blur", request.mask_blur)
    if not 0 <= blur <= LARGEST_MASK_BLUR:
        raise RequestError(f"mask_blur is {blur:g}", hint=f"give 0 to {LARGEST_MASK_BLUR:g} pixels")
    return blur
