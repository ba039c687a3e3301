"""Tasks: what a request does. A file for each, and this table, which says what a request means by what it brings."""

from collections.abc import Callable
from dataclasses import dataclass

from sdrt.bundle import ModelRecord, ModelTask
from sdrt.errors import RequestError
from sdrt.request import Request
from sdrt.tasks.base import Task, TaskName
from sdrt.tasks.depth_to_image import read_depth_to_image
from sdrt.tasks.editing import read_editing
from sdrt.tasks.hires import FIELDS as HIRES_FIELDS
from sdrt.tasks.image_to_image import read_image_to_image
from sdrt.tasks.inpainting import read_inpainting
from sdrt.tasks.outpainting import read_outpainting
from sdrt.tasks.text_to_image import read_text_to_image
from sdrt.tasks.upscaling import read_upscaling

__all__ = ["KINDS", "TaskKind", "possible_tasks", "read_task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskKind:
    """A task in the table: the checkpoints that do it, the fields that ask for it, and those that go with it.

    read: makes the task of a request that brings all of `needs`; it raises RequestError for values that cannot be.
    able: which of those checkpoints have what it takes; lacking: what the others lack, in words.
    """

    name: TaskName
    models: tuple[ModelTask, ...]
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    read: Callable[[Request, ModelRecord], Task]
    able: Callable[[ModelRecord], bool] = lambda _: True
    lacking: str = ""

    def is_done_by(self, model: ModelRecord) -> bool:
        """Whether a checkpoint can do it in this way."""
        return model.task in self.models and self.able(model)


_MASKING = ("strength", "mask_mode", "mask_blur", "preserve")
# From the most to the least asked for: the first whose needs are met is meant.
KINDS: tuple[TaskKind, ...] = (
    TaskKind(
        name="outpainting",
        models=("text-to-image", "inpainting"),
        needs=("image", "outpaint"),
        takes=(*_MASKING, "fill"),
        read=read_outpainting,
    ),
    TaskKind(
        name="inpainting",
        models=("text-to-image", "inpainting"),
        needs=("image", "mask_image"),
        takes=(*_MASKING, "padding_mask_crop"),
        read=read_inpainting,
    ),
    TaskKind(
        name="image-to-image",
        models=("text-to-image",),
        needs=("image",),
        takes=("strength",),
        read=read_image_to_image,
    ),
    TaskKind(
        name="depth-to-image",
        models=("depth-to-image",),
        needs=("depth_map",),
        takes=("image", "strength"),
        read=read_depth_to_image,
    ),
    TaskKind(
        name="depth-to-image",
        models=("depth-to-image",),
        needs=("image",),
        takes=("strength",),
        read=read_depth_to_image,
        able=lambda model: model.depth_estimation is not None,
        lacking="its checkpoint brought no depth estimator that could make one of the image",
    ),
    TaskKind(
        name="upscaling",
        models=("upscaling",),
        needs=("image",),
        takes=("noise_level",),
        read=read_upscaling,
    ),
    TaskKind(
        name="editing",
        models=("editing",),
        needs=("image",),
        takes=("image_guidance_scale",),
        read=read_editing,
    ),
    TaskKind(
        name="text-to-image",
        models=("text-to-image",),
        needs=(),
        takes=HIRES_FIELDS,
        read=read_text_to_image,
    ),
)
_FIELDS = tuple(dict.fromkeys(field for kind in KINDS for field in (*kind.needs, *kind.takes)))
# The kind of checkpoint in words, for those who have another.
CHECKPOINTS: dict[ModelTask, str] = {
    "text-to-image": "a text-to-image checkpoint (its UNet takes the latents alone)",
    "inpainting": "an inpainting checkpoint (its UNet takes 9 channels)",
    "upscaling": "an x4 upscaler (its UNet takes 7 channels and noise levels)",
    "depth-to-image": "a depth-to-image checkpoint (its UNet takes 5 channels)",
    "editing": "an image editing checkpoint such as InstructPix2Pix (its UNet takes 8 channels)",
}


def possible_tasks(model: ModelRecord) -> tuple[TaskName, ...]:
    """What a checkpoint can do."""
    return tuple(dict.fromkeys(kind.name for kind in KINDS if kind.is_done_by(model)))


def read_task(request: Request, model: ModelRecord) -> Task:
    """The task that a request means. Raises RequestError where it means none that the model does."""
    given = [field for field in _FIELDS if getattr(request, field) is not None]
    kinds = [kind for kind in KINDS if kind.is_done_by(model)]
    meant = next((kind for kind in kinds if set(kind.needs) <= set(given)), None)
    if meant is None:
        raise _nothing_meant(given, kinds[-1], model)
    beside = [field for field in given if field not in (*meant.needs, *meant.takes)]
    if beside:
        raise _means_nothing(beside[0], given, meant, model)
    return meant.read(request, model)


def _nothing_meant(given: list[str], least: TaskKind, model: ModelRecord) -> RequestError:
    """The error of a request that lacks what even the least asked-for task of its bundle needs."""
    missing = [field for field in least.needs if field not in given]
    nearly = [kind for kind in KINDS if model.task in kind.models and set(kind.needs) <= set(given)]
    because = "".join(f"; {kind.lacking}" for kind in nearly)
    return RequestError(
        f"this bundle does {least.name}, and the request has no {' and no '.join(missing)}{because}",
        hint=f"give {' and '.join(missing)}; without, it takes {CHECKPOINTS['text-to-image']}",
    )


def _means_nothing(field: str, given: list[str], meant: TaskKind, model: ModelRecord) -> RequestError:
    """The error of a field that has no meaning in the task that the others ask for."""
    able = [kind for kind in KINDS if field in (*kind.needs, *kind.takes)]
    here = [kind for kind in able if kind.is_done_by(model)]
    if not here:
        simplest = min(able, key=lambda kind: len(kind.needs))
        needed = CHECKPOINTS[simplest.models[0]]
        return RequestError(f"{field} is for {simplest.name}, which this bundle cannot do", hint=f"it takes {needed}")
    missing = [name for name in here[-1].needs if name not in given]
    if missing:
        absent = " and no ".join(missing)
        return RequestError(
            f"{field} is given, but there is no {absent}", hint=f"give {missing[0]}, or leave {field} out"
        )
    return RequestError(f"{field} means nothing in {meant.name}", hint=f"leave {field} out")
