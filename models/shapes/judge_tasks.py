"""The judge of the tasks: says from the pixels alone whether each task did what its name promises.

Every function compares pictures with cases from `task_cases`; a score passes when every figure that has a bar reaches
it. Deterministic, no network.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from PIL import Image
from scipy import ndimage

from sdrt.models.shapes.conditions import Mask, Picture
from sdrt.models.shapes.judge import FOREGROUND_DISTANCE, Verdict, find_background, judge
from sdrt.models.shapes.scenes import BACKGROUNDS, parse_caption
from sdrt.models.shapes.task_cases import STRENGTHS, TaskCase

Value = TypeVar("Value")

NEW_BACKGROUND = 0.98  # the share of an outpainted area that has to show the background


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """Means over many cases, and the least that some of them must reach."""

    figures: dict[str, float]
    bars: dict[str, float] = field(default_factory=dict)
    count: int

    @property
    def passed(self) -> bool:
        """Whether every bar is reached."""
        return all(self.figures[name] >= bar for name, bar in self.bars.items())


def judge_task(task: str, cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> TaskScore:
    """The score of a task's pictures, one a case. Raises KeyError for a task without a judge."""
    judges: dict[str, Callable[[Sequence[TaskCase], Sequence[Picture]], TaskScore]] = {
        "inpaint": judge_inpaint,
        "outpaint": judge_outpaint,
        "upscale": judge_upscale,
        "depth": judge_depth,
        "image-to-image": judge_image_to_image,
        "edges": judge_edges,
    }
    return judges[task](cases, pictures)


def judge_inpaint(cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> TaskScore:
    """The hole shows what the caption asks for; nothing else has changed."""
    verdicts = [judge(picture, case.caption) for case, picture in zip(cases, pictures, strict=True)]
    changed = [changed_outside(case, picture) for case, picture in zip(cases, pictures, strict=True)]
    return TaskScore(
        figures={
            "captions": _share(shows_objects(verdict) for verdict in verdicts),
            "unchanged": _share(count == 0 for count in changed),
            "pixels changed outside": float(np.mean(changed)),
        },
        bars={"captions": 0.85, "unchanged": 1.0},
        count=len(cases),
    )


def judge_outpaint(cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> TaskScore:
    """The source is kept, the background goes on, and no seam shows where they meet; whole and in windows apart."""
    pairs = list(zip(cases, pictures, strict=True))
    kept = [changed_outside(case, picture) == 0 for case, picture in pairs]
    continued = [continues_background(case, picture) for case, picture in pairs]
    seamless = [seam_gradient(case, picture) <= inner_gradient(case, picture) for case, picture in pairs]
    right = [all(marks) for marks in zip(kept, continued, seamless, strict=True)]
    seam, inner = (
        float(np.mean([gradient(case, picture) for case, picture in pairs]))
        for gradient in (seam_gradient, inner_gradient)
    )
    return TaskScore(
        figures={"right": _share(right)}
        | _share_by_way(cases, right)
        | {
            "kept": _share(kept),
            "continued": _share(continued),
            "seamless": _share(seamless),
            "seam gradient": seam,
            "inner gradient": inner,
            "inner gradient above the seam's": inner - seam,
        },
        bars={"right": 0.90, "kept": 1.0, "inner gradient above the seam's": 0.0},
        count=len(cases),
    )


def _share_by_way(cases: Sequence[TaskCase], right: Sequence[bool]) -> dict[str, float]:
    """The share of each way, whole and in windows, that any of the cases went."""
    marks: dict[str, list[bool]] = {}
    for case, mark in zip(cases, right, strict=True):
        marks.setdefault("right in windows" if case.in_windows else "right whole", []).append(mark)
    return {name: _share(marks[name]) for name in sorted(marks)}


def judge_upscale(cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> TaskScore:
    """Nearer to the truth than bicubic interpolation, in dB."""
    truths = [_given(case.truth) for case in cases]
    ours = [psnr(picture, truth) for picture, truth in zip(pictures, truths, strict=True)]
    bicubic = [psnr(enlarge(_given(case.small)), truth) for case, truth in zip(cases, truths, strict=True)]
    return TaskScore(
        figures={
            "psnr": float(np.mean(ours)),
            "bicubic psnr": float(np.mean(bicubic)),
            "gain": float(np.mean(np.subtract(ours, bicubic))),
        },
        bars={"gain": 3.0},
        count=len(cases),
    )


def judge_depth(cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> TaskScore:
    """Objects stand where the depth map has them, in the caption's colours."""
    overlaps, verdicts = _overlaps(cases, pictures), _verdicts(cases, pictures)
    return TaskScore(
        figures={
            "iou": float(np.mean(overlaps)),
            "colours": _share(_kinds_right(verdict, ("colour",)) for verdict in verdicts),
            "captions": _share(verdict.all_correct for verdict in verdicts),
        },
        bars={"iou": 0.85, "colours": 0.85},
        count=len(cases),
    )


def judge_edges(cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> TaskScore:
    """Objects fill the edges that were given."""
    overlaps, verdicts = _overlaps(cases, pictures), _verdicts(cases, pictures)
    return TaskScore(
        figures={
            "iou": float(np.mean(overlaps)),
            "captions": _share(verdict.all_correct for verdict in verdicts),
        },
        bars={"iou": 0.85},
        count=len(cases),
    )


def judge_image_to_image(cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> TaskScore:
    """The higher the strength, the further from the source; at 0.8 the caption is followed."""
    by_seed: dict[int, dict[float, float]] = {}
    for case, picture in zip(cases, pictures, strict=True):
        by_seed.setdefault(case.seed, {})[case.strength] = distance(picture, _given(case.source))
    means = [float(np.mean([distances[strength] for distances in by_seed.values()])) for strength in STRENGTHS]
    strong = [(case, picture) for case, picture in zip(cases, pictures, strict=True) if case.strength == 0.8]
    right = _share(shows_objects(judge(picture, case.caption)) for case, picture in strong)
    return TaskScore(
        figures={
            "monotonic": float(_rises(means)),
            "monotonic sources": _share(_rises([distances[s] for s in STRENGTHS]) for distances in by_seed.values()),
            "captions at 0.8": right,
        }
        | {f"distance at {strength}": mean for strength, mean in zip(STRENGTHS, means, strict=True)},
        bars={"monotonic": 1.0, "captions at 0.8": 0.80},
        count=len(cases),
    )


def shows_objects(verdict: Verdict) -> bool:
    """Whether the picture has the caption's objects and background and nothing more, wherever they stand."""
    kinds = ("background", "colour", "shape", "size")
    return len(verdict.found) == verdict.objects_expected and _kinds_right(verdict, kinds)


def changed_outside(case: TaskCase, picture: Picture) -> int:
    """How many pixels outside the mask differ from the source, which lies on a canvas where that has grown."""
    before = case.source if case.outpaint is None else case.truth
    differs = (picture != _given(before)).any(axis=-1)
    return int((differs & ~_given(case.mask)).sum())


def continues_background(case: TaskCase, picture: Picture) -> bool:
    """Whether the new area shows the caption's background, and the picture as a whole the caption."""
    colour = np.array(BACKGROUNDS[parse_caption(case.caption).background], np.float64)
    near = np.linalg.norm(picture[_given(case.mask)] - colour, axis=-1) < FOREGROUND_DISTANCE
    return bool(near.mean() >= NEW_BACKGROUND) and shows_objects(judge(picture, case.caption))


def seam_gradient(case: TaskCase, picture: Picture) -> float:
    """The mean difference of neighbours of which one is in the mask and one is not, in levels of 255."""
    return _mean_difference(picture, _given(case.mask), lambda one, other: one != other)


def inner_gradient(case: TaskCase, picture: Picture) -> float:
    """The mean difference of neighbours that are both outside the mask, in levels of 255."""
    return _mean_difference(picture, _given(case.mask), lambda one, other: ~one & ~other)


def _mean_difference(picture: Picture, mask: Mask, chosen: Callable[[Mask, Mask], Mask]) -> float:
    differences = []
    for axis in (0, 1):
        steps = np.abs(np.diff(picture.astype(np.float64), axis=axis)).mean(-1)
        one, other = (mask[:-1], mask[1:]) if axis == 0 else (mask[:, :-1], mask[:, 1:])
        differences.append(steps[chosen(one, other)])
    return float(np.concatenate(differences).mean())


def silhouette_of(picture: Picture) -> Mask:
    """Where something is drawn, bool [height, width]: nearer to its own colour than to the background's."""
    _, backdrop = find_background(picture)
    away = np.linalg.norm(picture - backdrop, axis=-1)
    labels, count = ndimage.label(away > FOREGROUND_DISTANCE, structure=np.ones((3, 3)))
    drawn = np.zeros(away.shape, np.bool_)
    for label in range(1, count + 1):
        own = labels == label
        drawn |= own & (away > np.median(away[own]) / 2)
    return drawn


def overlap(one: Mask, other: Mask) -> float:
    """Intersection over union; 1 for two empty masks."""
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union > 0 else 1.0


def psnr(picture: Picture, truth: Picture) -> float:
    """The peak signal-to-noise ratio in dB, at most 60 (equal pictures included)."""
    error = float(np.square(picture.astype(np.float64) - truth).mean())
    return min(60.0, 10 * float(np.log10(255**2 / max(error, 1e-9))))


def enlarge(small: Picture) -> Picture:
    """Four times the size by bicubic interpolation: what an upscaler is compared with."""
    size = (4 * small.shape[1], 4 * small.shape[0])
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


def distance(picture: Picture, source: Picture) -> float:
    """The mean absolute difference in levels of 255."""
    return float(np.abs(picture.astype(np.float64) - source).mean())


def _overlaps(cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> list[float]:
    pairs = zip(cases, pictures, strict=True)
    return [overlap(silhouette_of(picture), _given(case.silhouette)) for case, picture in pairs]


def _verdicts(cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> list[Verdict]:
    return [judge(picture, case.caption) for case, picture in zip(cases, pictures, strict=True)]


def _kinds_right(verdict: Verdict, kinds: Sequence[str]) -> bool:
    return all(correct for name, correct in verdict.correct.items() if name.split(" ")[0] in kinds)


def _rises(values: Sequence[float]) -> bool:
    return bool((np.diff(values) > 0).all())


def _share(marks: Iterable[bool]) -> float:
    return float(np.mean(list(marks)))


def _given(value: Value | None) -> Value:
    if value is None:
        raise ValueError("this case belongs to another task")
    return value
