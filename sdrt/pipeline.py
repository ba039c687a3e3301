"""`Pipeline`: one bundle ready to draw. Tokenise → embed → plan → loop → decode, as a generator of steps."""

import hashlib
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from sdrt._version import VERSION
from sdrt.bundle import Bundle, JsonValue, ModelRecord
from sdrt.checks import check_whole
from sdrt.conditions import Steering
from sdrt.controls import control_parameters, steer, without_say
from sdrt.depth import estimate_depth
from sdrt.errors import RequestError
from sdrt.guidance import Guidance, guidance_of
from sdrt.image import from_pixels, to_images
from sdrt.noise import GENERATORS, TorchGenerator, Variation
from sdrt.progress import Made, Work, advance, complete
from sdrt.request import Request, nearest_field
from sdrt.resolution import ResolvedRequest, VaeName, resolve_request, resolve_vae
from sdrt.runners import open_runner
from sdrt.runners.base import TINY_VAE_DECODER, VAE_DECODER_FLOAT32, FloatArray, Runner
from sdrt.sizes import check_vae_size, window_size
from sdrt.step_batch import Faults, StepBatch, advance_row, open_batch
from sdrt.tasks.base import Drawn, Encode, EstimateDepth, Preparation
from sdrt.tasks.pictures import check_picture, pixels_sha256
from sdrt.text import PromptEncoder
from sdrt.tokenizer import Tokenizer
from sdrt.trajectory import Trajectory, start_trajectory
from sdrt.vae import Posterior, Spare, check_latents, decode_latents, encode_posterior, largest_tile
from sdrt.windows import Windows, windows_over

_LONGEST_QUOTE = 200  # characters
_OVERFLOWED = "the VAE overflowed in float16, so it decoded again in float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of one request went, in seconds. One entry of `step_seconds` is one network evaluation.

    A second pass counts where the first does: its steps after the first one's, what enlarges pixels as the VAE's.
    vae_encoder_seconds: of all that an image begins with: the VAE encoder's, the depth estimator's, and that of what
    ControlNets make of their pictures.
    gap_seconds: how long in all a GPU waited for the host between steps; None where nothing measures that.
    """

    text_encoder_seconds: float
    vae_encoder_seconds: float
    step_seconds: tuple[float, ...]
    vae_decoder_seconds: float
    total_seconds: float
    gap_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """Finished images, with everything that is needed to make each again.

    latents: float32 [images, C, h, w], with the padding where an image was padded. warnings: what was done other than
    asked, such as a prompt cut short.
    """

    images: tuple[Image.Image, ...]
    request: ResolvedRequest
    latents: FloatArray
    timings: Timings
    warnings: tuple[str, ...]
    made_with: dict[str, JsonValue]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image."""
        return self.request.seeds

    @property
    def saved_seconds(self) -> float | None:
        """About how much sooner it was done for its rows without guidance; None when there are none, or none guided."""
        seconds, saved = self.timings.step_seconds, []
        for each in self.request.passes:
            own, seconds = seconds[: len(each.plan)], seconds[len(each.plan) :]
            guided = [own[row] for row in each.guided_rows]
            plain = [second for row, second in enumerate(own) if row not in each.guided_rows]
            if guided and plain:
                saved.append(len(plain) * (sum(guided) / len(guided)) - sum(plain))
        return sum(saved) if saved else None

    def parameters(self, index: int) -> dict[str, JsonValue]:
        """What makes image `index` again, alone: the request's fields with the image's own seed, and the bundle."""
        request = self.request
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "height": request.height,
            "width": request.width,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            **(
                {"composed_prompts": [[*pair] for pair in request.composed_prompts]} if request.composed_prompts else {}
            ),
            "scheduler": request.scheduler,
            "seed": request.seeds[index],
            **_varied(request.variations[index]),
            "eta": request.eta,
            "generator": request.generator,
            "guidance_start": request.guidance_start,
            "guidance_end": request.guidance_end,
            "guidance_rescale": request.guidance_rescale,
            "timesteps": _listed(request.timesteps),
            "sigmas": _listed(request.sigmas),
            "windowed": request.windowed,
            **control_parameters(request.controls),
            "vae": request.vae,
            "task": request.task.name,
            **request.task.parameters(),
            **({} if request.hires is None else request.hires.task.parameters()),
            **self.made_with,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepEvent:
    """One network evaluation of a request is done: `row` of `rows`, of all passes. The last event carries the result.

    latents: float32 [images, C, h, w] as they are now, unless they were not asked for; in a second pass larger ones.
    preview: when asked for, those latents as images, at the scale in which the network sees them next: noise at first,
    the finished images at last.
    """

    row: int
    rows: int
    latents: FloatArray | None
    preview: tuple[Image.Image, ...] | None = None
    result: Result | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A request before the first step of a pass: one trajectory for each image.

    following: the pass after this one; None in the last.
    """

    request: ResolvedRequest
    trajectories: tuple[Trajectory, ...]
    warnings: tuple[str, ...]
    text_encoder_seconds: float
    vae_encoder_seconds: float
    following: ResolvedRequest | None = None
    vae_decoder_seconds: float = 0.0
    float32_decodes: int = 0

    @property
    def finished(self) -> bool:
        """Whether every row of this pass has run."""
        return all(trajectory.finished for trajectory in self.trajectories)

    def followed_by(self, images: "Sequence[Followed]") -> "Prepared":
        """The request before its second pass: every image of the first, in order."""
        return replace(
            self,
            trajectories=tuple(image.trajectory for image in images),
            following=None,
            vae_encoder_seconds=self.vae_encoder_seconds + sum(image.vae_encoder_seconds for image in images),
            vae_decoder_seconds=self.vae_decoder_seconds + sum(image.vae_decoder_seconds for image in images),
            float32_decodes=self.float32_decodes + sum(image.float32_decodes for image in images),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Followed:
    """One image before the first step of the second pass, and what it took to get there."""

    trajectory: Trajectory
    vae_encoder_seconds: float
    vae_decoder_seconds: float
    float32_decodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What work took while it did not rest. float32_decodes: by how much the pipeline's count of them grew."""

    seconds: float = 0.0
    float32_decodes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engines:
    """What the beginning of an image may ask of the engines."""

    encode: Encode
    estimate_depth: EstimateDepth


class Pipeline:
    """Draws with one bundle. Not thread-safe; `Batcher` is the way to serve many callers."""

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        manifest = bundle.manifest
        model = manifest.model
        self.bundle = bundle
        self.runner = runner
        tokenizer = Tokenizer.load(bundle.path / "tokenizer", max_length=model.text_length)
        self._prompts = PromptEncoder(tokenizer, runner)
        self.float32_decodes = 0  # tiles that the VAE decoded again in float32, because float16 had overflowed
        has_spare = any(component.name == VAE_DECODER_FLOAT32 for component in manifest.components)
        self._spare = Spare(component=VAE_DECODER_FLOAT32, used=self._count_float32_decode) if has_spare else None
        self._preview_vae: VaeName = "full" if model.tiny_vae is None else "tiny"
        usual = (model.default_height, model.default_width)
        self._tile = largest_tile(usual, manifest.profile.maximum, model.vae_downsample)

    @classmethod
    def open(cls, path: Path | str, *, threads: int | None = None, provider: str | None = None) -> Self:
        """Open a bundle and its engines; see `open_runner`. Raises BundleError, BackendError, RequestError."""
        bundle = Bundle.open(path)
        runner = open_runner(bundle, threads=threads, provider=provider)
        try:
            return cls(bundle, runner)
        except BaseException:  # nobody else can release the engines
            runner.close()
            raise

    def generate(self, prompt: str | Request, **options: Any) -> Result:  # noqa: ANN401  (fields of Request)
        """Draw. `options` are the fields of `Request`; a bad one raises RequestError before any compute."""
        result = None
        for event in self.stream(as_request(prompt, options), latents=False):
            result = event.result
        if result is None:
            raise RuntimeError("the last step carried no result")
        return result

    def stream(
        self,
        prompt: str | Request,
        *,
        preview: bool = False,
        latents: bool = True,
        **options: Any,  # noqa: ANN401
    ) -> Generator[StepEvent, None, None]:
        """Draw step by step. The request is checked now; closing the generator stops the work.

        preview: decode the latents after every step, which costs one VAE decode an image each time: of the tiny VAE, if
        the bundle has one. latents: put them into every event; without them (and without previews) a GPU need not wait
        for the host between steps.
        """
        request = self.resolve(as_request(prompt, options))
        return self._run(request, latents=latents or preview, preview=preview)

    def resolve(self, request: Request) -> ResolvedRequest:
        """Check a request against this bundle. Raises RequestError."""
        return resolve_request(request, self.bundle.manifest)

    def prepare(self, request: ResolvedRequest) -> Prepared:
        """Embed the prompts and start one trajectory for each image."""
        return complete(self.preparing(request))

    def preparing(self, request: ResolvedRequest) -> Work[Prepared]:
        """`prepare` as work that rests between two tiles of a large image that is encoded."""
        began = time.perf_counter()
        guidance = self._guidance(request)
        text_encoder_seconds = time.perf_counter() - began
        trajectories, cost = yield from self.measured(self._starting(request, guidance))
        return Prepared(
            request=request,
            trajectories=trajectories,
            warnings=self._warnings(request) + _odd(trajectories),
            text_encoder_seconds=text_encoder_seconds,
            vae_encoder_seconds=cost.seconds,
            following=request.hires,
        )

    def begins_in_tiles(self, request: ResolvedRequest) -> bool:
        """Whether the VAE would encode what the images begin with in tiles, so that `preparing` would rest."""
        side = self.bundle.manifest.model.vae_downsample
        return any(length > tile * side for length, tile in zip(request.drawn_size, self._tile, strict=True))

    def follow(self, prepared: Prepared, index: int) -> Followed:
        """Start image `index` of a finished pass in the one that follows; `Prepared.followed_by` takes them all."""
        return complete(self.following(prepared, index))

    def following(self, prepared: Prepared, index: int) -> Work[Followed]:
        """`follow` as work that rests between two tiles of a large image that is decoded or encoded."""
        request = prepared.following
        if request is None:
            raise ValueError("no pass follows this one")
        decoding = Cost()

        def decode(latents: FloatArray) -> Work[Image.Image]:
            nonlocal decoding
            images, decoding = yield from self.measured(self._decoding(latents, request.vae))
            return images[0]

        drawn = Drawn(latents=prepared.trajectories[index].latents[None], decode=decode)
        trajectory, cost = yield from self.measured(self._entering(request, index, drawn))
        return Followed(
            trajectory=trajectory,
            vae_encoder_seconds=cost.seconds - decoding.seconds,
            vae_decoder_seconds=decoding.seconds,
            float32_decodes=decoding.float32_decodes,
        )

    def measured(self, work: Work[Made]) -> Work[tuple[Made, Cost]]:
        """The same work, with what it took while it did not rest."""
        cost = Cost()
        while True:
            began, decodes = time.perf_counter(), self.float32_decodes
            made = advance(work)
            cost = Cost(
                seconds=cost.seconds + time.perf_counter() - began,
                float32_decodes=cost.float32_decodes + self.float32_decodes - decodes,
            )
            if made is not None:
                return made, cost
            yield

    def finish(
        self,
        prepared: Prepared,
        images: tuple[Image.Image, ...],
        *,
        step_seconds: tuple[float, ...],
        vae_decoder_seconds: float,
        began: float,
        gap_seconds: float | None = None,
        float32_decodes: int = 0,
    ) -> Result:
        """The result of finished trajectories and their images. `began` is the start on time.perf_counter.

        float32_decodes: by how much the pipeline's count of them grew with these images.
        """
        manifest = self.bundle.manifest
        return Result(
            images=images,
            request=prepared.request,
            latents=_latents_of(prepared),
            timings=Timings(
                text_encoder_seconds=prepared.text_encoder_seconds,
                vae_encoder_seconds=prepared.vae_encoder_seconds,
                step_seconds=step_seconds,
                vae_decoder_seconds=prepared.vae_decoder_seconds + vae_decoder_seconds,
                total_seconds=time.perf_counter() - began,
                gap_seconds=gap_seconds,
            ),
            warnings=prepared.warnings + ((_OVERFLOWED,) if prepared.float32_decodes + float32_decodes else ()),
            made_with={
                "model": manifest.model.name,
                "model_identity": manifest.model.identity,
                **_tiny_vae_identity(prepared.request, manifest.model),
                "backend": manifest.backend.name,
                "precision": manifest.precision,
                "sdrt_version": VERSION,
            },
        )

    def encode(self, image: Image.Image, *, seed: int | None = None) -> FloatArray:
        """The scaled latents of an image, float32 [1, C, h, w]: the mean, or a sample when a seed is given.

        It is taken as `open_image` gives it: upright RGB on white. Raises RequestError for what is no image, too large
        or moves, when its sides are not multiples of the VAE's factor, and for a seed that is none.
        """
        image = check_picture("image", image)
        check_vae_size(image.height, image.width, self.bundle.manifest.model.vae_downsample)
        seed = None if seed is None else check_whole("seed", seed, 0, 2**64 - 1)
        posterior = self.posterior(image)
        return posterior.mode() if seed is None else posterior.sample(TorchGenerator(seed).randn(posterior.mean.shape))

    def posterior(self, image: Image.Image) -> Posterior:
        """What the VAE knows of an image's latents. Raises RequestError as `encode` does."""
        return complete(self._encoding(from_pixels(np.asarray(check_picture("image", image))[None])))

    def _encoding(self, sample: FloatArray) -> Work[Posterior]:
        """What the VAE knows of an image, at rest between two tiles."""
        model = self.bundle.manifest.model
        return encode_posterior(
            self.runner,
            sample,
            scaling_factor=model.vae_scaling_factor,
            vae_downsample=model.vae_downsample,
            tile=self._tile,
        )

    def _estimate_depth(self, image: Image.Image) -> FloatArray:
        estimation = self.bundle.manifest.model.depth_estimation
        if estimation is None:
            raise RuntimeError("a task asked for depth of a bundle that estimates none")
        return estimate_depth(self.runner, image, estimation)

    def decode(self, latents: FloatArray, *, vae: str | None = None) -> tuple[Image.Image, ...]:
        """The images of scaled latents, float32 [B, C, h, w]. vae: see `Request`.

        Raises RequestError for another shape or dtype, or a decoder that the bundle does not have.
        """
        model = self.bundle.manifest.model
        check_latents(latents, model.latent_channels)
        return self._decode(latents, resolve_vae(vae, model))

    def draw(self, prepared: Prepared, index: int) -> Image.Image:
        """The image of one finished trajectory. Raises ParityError when a value is not finite."""
        return complete(self.drawing(prepared, index))

    def drawing(self, prepared: Prepared, index: int) -> Work[Image.Image]:
        """`draw` as work that rests between two tiles of a large image."""
        latents = prepared.trajectories[index].latents[None]
        request = prepared.request.passes[-1]
        images = yield from self._decoding(latents, request.vae)
        return request.task.finish(request.cropped(images[0]))

    def close(self) -> None:
        """Release the engines."""
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, request: ResolvedRequest, *, latents: bool, preview: bool) -> Generator[StepEvent, None, None]:
        began = time.perf_counter()
        prepared = self.prepare(request)
        rows = sum(len(each.plan) for each in request.passes)
        seconds, gaps = yield from self._denoise(prepared, 0, rows, latents=latents, preview=preview)
        if prepared.following is not None:
            prepared = prepared.followed_by([self.follow(prepared, i) for i in range(len(prepared.trajectories))])
            more = yield from self._denoise(prepared, len(seconds), rows, latents=latents, preview=preview)
            seconds, gaps = seconds + more[0], gaps + more[1]
        decoding, decoded_before = time.perf_counter(), self.float32_decodes
        images = tuple(self.draw(prepared, index) for index in range(len(prepared.trajectories)))
        result = self.finish(
            prepared,
            images,
            step_seconds=tuple(seconds),
            vae_decoder_seconds=time.perf_counter() - decoding,
            began=began,
            gap_seconds=sum(gaps) if gaps else None,
            float32_decodes=self.float32_decodes - decoded_before,
        )
        shown = images if preview else None
        yield StepEvent(row=rows, rows=rows, latents=result.latents, preview=shown, result=result)

    def _denoise(
        self, prepared: Prepared, before: int, rows: int, *, latents: bool, preview: bool
    ) -> Generator[StepEvent, None, tuple[list[float], list[float]]]:
        """Run one pass, `before` rows of all having run. Returns the seconds of its rows, and of gaps where measured.

        It yields after each row, except the last of all, whose event carries the result.
        """
        plan = prepared.trajectories[0].plan
        with ExitStack() as opened:
            batches = [opened.enter_context(closing(batch)) for batch in self._batches(prepared)]
            for row in range(1, len(plan) + 1):
                for batch in batches:
                    _raise_first(advance_row(batch))
                if before + row == rows:
                    break
                if latents:
                    for batch in batches:
                        _raise_first(batch.collect())
                now = _latents_of(prepared) if latents else None
                shown = None
                if preview and now is not None:
                    scale = plan.input_scales[row] if row < len(plan) else 1.0
                    images = self._decode(now * np.float32(scale), self._preview_vae)
                    shown = tuple(prepared.request.cropped(image) for image in images)
                yield StepEvent(row=before + row, rows=rows, latents=now, preview=shown)
            seconds = [batch.take_seconds() for batch in batches]
            gaps = [gap for batch in batches if (gap := batch.gap_seconds()) is not None]
        return [sum(parts) for parts in zip(*seconds, strict=True)], gaps

    def _starting(self, request: ResolvedRequest, guidance: Guidance) -> Work[tuple[Trajectory, ...]]:
        """Every image before the first row, what all of them begin with being looked at once."""
        engines = _Engines(encode=_encoded_once(self._encoding), estimate_depth=_estimated_once(self._estimate_depth))
        steering = self._steering(request)
        trajectories = []
        for index in range(request.num_images_per_prompt):
            trajectories.append((yield from self._start(request, index, guidance, steering, engines)))
        return tuple(trajectories)

    def _entering(self, request: ResolvedRequest, index: int, drawn: Drawn) -> Work[Trajectory]:
        """Image `index` before the first row of a second pass."""
        engines = _Engines(encode=self._encoding, estimate_depth=self._estimate_depth)
        guidance, steering = self._guidance(request), self._steering(request)
        return (yield from self._start(request, index, guidance, steering, engines, drawn))

    def _start(
        self,
        request: ResolvedRequest,
        index: int,
        guidance: Guidance,
        steering: Steering | None,
        engines: _Engines,
        drawn: Drawn | None = None,
    ) -> Work[Trajectory]:
        """Image `index` before the first row of a pass."""
        model, variation = self.bundle.manifest.model, request.variations[index]
        rows, columns = (length // model.vae_downsample for length in request.drawn_size)
        generator = GENERATORS[request.generator](request.seeds[index])
        preparation = Preparation(
            plan=request.plan,
            generator=generator,
            shape=(model.latent_channels, rows, columns),
            encode=engines.encode,
            estimate_depth=engines.estimate_depth,
            vary=_as_it_is if variation is None else variation.apply,
            drawn=drawn,
        )
        start = yield from request.task.start(preparation)
        return start_trajectory(
            plan=request.plan,
            guidance=guidance,
            generator=generator,
            slots=self.bundle.manifest.state_slots,
            start=start,
            steering=steering,
            windows=self._windows(request),
        )

    def _batches(self, prepared: Prepared) -> Sequence[StepBatch]:
        """The trajectories, as many together as the engines take."""
        paths = prepared.trajectories
        size = self.bundle.manifest.profile.max_batch // prepared.request.places_per_image
        return [open_batch(self.runner, paths[first : first + size]) for first in range(0, len(paths), size)]

    def _windows(self, request: ResolvedRequest) -> Windows | None:
        """Where the engines work on one part of the latents at a time; None where they take them whole."""
        if not request.windowed:
            return None
        profile, side = self.bundle.manifest.profile, self.bundle.manifest.model.vae_downsample
        drawn, part = request.drawn_size, window_size(profile, *request.drawn_size)
        size, window = (drawn[0] // side, drawn[1] // side), (part[0] // side, part[1] // side)
        return windows_over(size, window, profile.max_batch // request.places_per_image)

    def _steering(self, request: ResolvedRequest) -> Steering | None:
        model, rows = self.bundle.manifest.model, len(request.plan)
        return steer(request.controls, model, self.runner, rows, *request.drawn_size)

    def _guidance(self, request: ResolvedRequest) -> Guidance:
        negative = self._prompts.encode(request.negative_prompt) if request.guided else None
        composed = [self._prompts.encode(text) for text, _ in request.composed_prompts]
        return guidance_of(request, self._prompts.encode(request.prompt), negative, composed)

    def _warnings(self, request: ResolvedRequest) -> tuple[str, ...]:
        texts = {"prompt": request.prompt}
        texts |= {f"composed prompt {_shortened(text)!r}": text for text, _ in request.composed_prompts}
        if request.guided:
            texts["negative_prompt"] = request.negative_prompt
        unused = [*request.task.warnings(), *without_say(request.controls, len(request.plan))]
        unused += [] if request.guided else _unused_without_guidance(request)
        length = self.bundle.manifest.model.text_length
        dropped = {name: self._prompts.dropped(text) for name, text in texts.items()}
        return tuple(unused) + tuple(
            f"the {name} is longer than the model's {length} tokens; this part was dropped: {_shortened(rest)!r}"
            for name, rest in dropped.items()
            if rest
        )

    def _decode(self, latents: FloatArray, vae: VaeName) -> tuple[Image.Image, ...]:
        return complete(self._decoding(latents, vae))

    def _decoding(self, latents: FloatArray, vae: VaeName) -> Work[tuple[Image.Image, ...]]:
        """The images of latents, at rest between two tiles."""
        model = self.bundle.manifest.model
        decode = partial(
            decode_latents,
            self.runner,
            latents,
            vae_downsample=model.vae_downsample,
            tile=self._tile,
        )
        if vae == "tiny" and model.tiny_vae is not None:
            sample = yield from decode(component=TINY_VAE_DECODER, scaling_factor=model.tiny_vae.scaling_factor)
        else:
            sample = yield from decode(scaling_factor=model.vae_scaling_factor, spare=self._spare)
        return tuple(to_images(sample))

    def _count_float32_decode(self) -> None:
        self.float32_decodes += 1


def _raise_first(faults: Faults) -> None:
    for fault in faults.values():
        raise fault


def _latents_of(prepared: Prepared) -> FloatArray:
    return np.stack([trajectory.latents for trajectory in prepared.trajectories])


def _shortened(text: str) -> str:
    """A warning is for reading; prompts may have megabytes."""
    half = _LONGEST_QUOTE // 2
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:half]} … {text[-half:]}"


def _unused_without_guidance(request: ResolvedRequest) -> list[str]:
    asked = {"negative_prompt": "", "guidance_rescale": 0, "guidance_start": 0, "guidance_end": 1}
    names = [name for name, nothing in asked.items() if getattr(request, name) != nothing]
    names += ["image_guidance_scale"] if request.task.name == "editing" else []
    scale = f"guidance_scale {request.guidance_scale:g} is without guidance"
    return [f"{scale}, so {' and '.join(names)} did nothing"] if names else []


def _estimated_once(estimate: EstimateDepth) -> EstimateDepth:
    """`estimate` that looks at each image once, however many results begin with it."""
    known: dict[str, FloatArray] = {}

    def remembered(image: Image.Image) -> FloatArray:
        key = pixels_sha256(image)
        if key not in known:
            known[key] = estimate(image)
        return known[key]

    return remembered


def _encoded_once(encode: Encode) -> Encode:
    """`encode` that encodes each sample once, however many results begin with it."""
    known: dict[bytes, Posterior] = {}

    def remembered(sample: FloatArray) -> Work[Posterior]:
        key = hashlib.sha256(sample.tobytes()).digest()
        if key not in known:
            known[key] = yield from encode(sample)
        return known[key]

    return remembered


def _odd(trajectories: Sequence[Trajectory]) -> tuple[str, ...]:
    """What showed only when the images were begun; once, though it may be so for each."""
    return tuple(dict.fromkeys(warning for path in trajectories for warning in path.start.warnings))


def _as_it_is(noise: FloatArray) -> FloatArray:
    return noise


def _varied(variation: Variation | None) -> dict[str, JsonValue]:
    if variation is None:
        return {}
    return {"variation_seed": variation.seed, "variation_strength": variation.share}


def _tiny_vae_identity(request: ResolvedRequest, model: ModelRecord) -> dict[str, JsonValue]:
    """Which tiny VAE decoded the image, where one did: it is no part of the model's own identity."""
    if request.vae != "tiny" or model.tiny_vae is None:
        return {}
    return {"tiny_vae_identity": model.tiny_vae.identity}


def _listed(values: tuple[float, ...] | None) -> JsonValue:
    return None if values is None else [*values]


def as_request(prompt: str | Request, options: dict[str, Any]) -> Request:
    """A Request from a prompt and its options. Raises RequestError for an option that Request does not have."""
    if isinstance(prompt, Request):
        if options:
            hint = "put them into the Request"
            raise RequestError(f"options {sorted(options)} were given beside a Request", hint=hint)
        return prompt
    unknown = sorted(set(options) - set(Request.__dataclass_fields__))
    if unknown:
        near = [f"{field} for {name}" for name in unknown if (field := nearest_field(name)) is not None]
        meant = f"did you mean {', '.join(near)}? " if near else ""
        raise RequestError(f"a request has no {', '.join(unknown)}", hint=f"{meant}every field: help(sdrt.Request)")
    return Request(prompt=prompt, **options)
