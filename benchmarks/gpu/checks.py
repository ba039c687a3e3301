"""Stages on the embedded model's bundle: is what the GPU makes right, always the same, and refused where it must be?"""

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdrt.batcher import Batcher
from sdrt.benchmarks.gpu.results import Bound, Findings
from sdrt.benchmarks.suites import shapes
from sdrt.bundle import Bundle, JsonValue
from sdrt.denoiser import lasting_inputs, row_inputs
from sdrt.errors import BackendError
from sdrt.parity import largest_level, psnr_db
from sdrt.philox import PhiloxDraw
from sdrt.pipeline import Pipeline
from sdrt.request import Request
from sdrt.runners import open_runner, read_engine_layers
from sdrt.runners.base import STEP
from sdrt.runners.cuda_python import CudaPython
from sdrt.runners.nvidia import library_of, load_library, require_device
from sdrt.runners.tensorrt import TensorRtRunner
from sdrt.verify import verify_bundle

Pixels = npt.NDArray[np.uint8]

REPEATS = 200
PICTURES = 8
FP16_PSNR_DB = 35.0
NOISE_TOLERANCE = 2e-6  # of numbers up to 6: the GPU's sine is good to 2^-21
SCHEDULERS = ("ddim", "pndm", "euler", "dpmpp_2m", "euler_karras", "dpmpp_2m_karras")


def describe_device() -> Findings:
    """What is there. Raises BackendError, saying what is not."""
    device, library = require_device(), load_library()
    figures: dict[str, JsonValue] = {
        "GPU": device.name,
        "architecture": device.architecture,
        "GPU memory GB": round(device.memory_bytes / 1e9, 1),
        "library": f"{library.name} {library.version}",
        "driver": _driver_version(),
    }
    return Findings(figures=figures)


def check_parity(path: Path) -> Findings:
    """The golden image on the device, which completes the seal; then the suite's pictures beside PyTorch's on the CPU.

    The pictures are compared where diffusers is installed, and it is said where it is not.
    """
    golden = verify_bundle(Bundle.open(path)).parity
    bounds = [Bound(name=f"golden image, {golden.metric}", measured=golden.measured, bound=golden.bound)]
    cases = shapes.cases(PICTURES)
    with _pipeline(path) as pipeline:
        ours = [_pixels(pipeline, Request(**case.arguments())) for case in cases]
    share = shapes.wanted_share(ours, [case.prompt for case in cases])
    figures: dict[str, JsonValue] = {"attributes of captions shown": share}
    theirs = _pytorch_pictures([case.arguments() for case in cases])
    if theirs is None:
        figures["compared with PyTorch"] = "no: diffusers is not installed"
    else:
        distances = [psnr_db(a, b) for a, b in zip(ours, theirs, strict=True)]
        figures["PSNR to PyTorch fp32, dB"] = [round(distance, 1) for distance in distances]
        bounds.append(Bound(name="median PSNR, dB", measured=float(np.median(distances)), bound=FP16_PSNR_DB))
    return Findings(bounds=bounds, figures=figures)


def check_graphs(path: Path) -> Findings:
    """Each request drawn with graphs and without: the same bits, and nothing was captured in vain."""
    requests = [_request(seed, scheduler=name) for seed, name in enumerate(SCHEDULERS)]
    requests += [_request(7, guidance_scale=1.0), _stochastic(8)]
    requests += [_request(9, num_images_per_prompt=count) for count in (3, 6)]  # 6 are two batches that take turns
    with _pipeline(path) as pipeline:
        replayed = [_all_pixels(pipeline, request) for request in requests]
        counters = _runner(pipeline).counters
    with _pipeline(path, capture=False) as pipeline:
        plain = [_all_pixels(pipeline, request) for request in requests]
    differing = sum(not np.array_equal(a, b) for a, b in zip(replayed, plain, strict=True))
    return Findings(
        bounds=[
            Bound(name="requests whose bits differ", measured=differing, bound=0, kind="at most"),
            Bound(name="failed captures", measured=counters.failed_captures, bound=0, kind="at most"),
            Bound(name="replays", measured=counters.replays, bound=1),
        ],
        figures={"captures": counters.captures, "plain launches": counters.plain_launches},
    )


def check_layers(path: Path) -> Findings:
    """TensorRT's inspector tells of every engine what it is made of, and the network's has float16 in it."""
    found = read_engine_layers(Bundle.open(path))
    halves = sum(kind.count for kind in found[STEP].kinds if "float16" in kind.outputs)
    return Findings(
        bounds=[Bound(name="layers of the step that give float16", measured=halves, bound=1)],
        figures={f"layers of {name}": len(engine.names) for name, engine in found.items()},
    )


def check_profiles(path: Path) -> Findings:
    """Feeds outside the profile of each component: an error each time, and the same image before and after."""
    with _pipeline(path) as pipeline:
        runner, profile = pipeline.runner, pipeline.bundle.manifest.profile
        before = _pixels(pipeline, _request(0))
        refused: dict[str, JsonValue] = {}
        for component in pipeline.bundle.manifest.components:
            beyond = {"height": 10_000, "width": 10_000, "batch": 1000, "requests": 1000, "lanes": 1000}
            beyond |= {"length": 10_000, "sequence": 10_000}
            dynamic = {size for spec in component.inputs for size in spec.shape if isinstance(size, str)}
            name = next(size for size in ("batch", "requests", "height") if size in dynamic)
            sizes = {size: beyond[size] if size == name else 1 for size in dynamic}
            feeds = {
                spec.name: np.zeros([sizes[size] if isinstance(size, str) else size for size in spec.shape], spec.dtype)
                for spec in component.inputs
            }
            try:
                runner.run(component.name, feeds)
            except BackendError as error:
                refused[component.name] = error.message[:120]
        after = _pixels(pipeline, _request(0))
        components = len(pipeline.bundle.manifest.components)
    return Findings(
        bounds=[
            Bound(name="components that refused", measured=len(refused), bound=components),
            Bound(name="image unchanged afterwards", measured=int(np.array_equal(before, after)), bound=1),
        ],
        figures={"profile": f"{profile.minimum} to {profile.maximum}, batch {profile.max_batch}", **refused},
    )


def check_repeats(path: Path, repeats: int = REPEATS) -> Findings:
    """One request again and again: one hash."""
    with _pipeline(path) as pipeline:
        hashes = {hashlib.sha256(_pixels(pipeline, _request(3)).tobytes()).hexdigest() for _ in range(repeats)}
        stochastic = {hashlib.sha256(_pixels(pipeline, _stochastic(3)).tobytes()).hexdigest() for _ in range(20)}
    return Findings(
        bounds=[
            Bound(name=f"images in {repeats} repeats", measured=len(hashes), bound=1, kind="at most"),
            Bound(name="images in 20 repeats, stochastic", measured=len(stochastic), bound=1, kind="at most"),
        ]
    )


def check_mixture(path: Path) -> Findings:
    """Requests that differ in all that can differ, in one running batch and alone."""
    requests = [
        _request(
            seed,
            scheduler=SCHEDULERS[seed % len(SCHEDULERS)],
            num_inference_steps=8 + seed % 9,
            guidance_scale=(1.0, 4.0, 7.5)[seed % 3],
        )
        for seed in range(24)
    ]
    with _pipeline(path) as pipeline:
        alone = [_pixels(pipeline, request) for request in requests]
        with Batcher(pipeline, max_queue=len(requests)) as batcher:
            tickets = [batcher.submit(request) for request in requests]
            together = [np.asarray(ticket.result(60).images[0]) for ticket in tickets]
            occupancy = batcher.stats().occupancy
    distances = [psnr_db(a, b) for a, b in zip(together, alone, strict=True)]
    return Findings(
        bounds=[
            Bound(name="lowest PSNR to the image alone, dB", measured=min(distances), bound=FP16_PSNR_DB),
            Bound(name="requests in a step, mean", measured=occupancy, bound=2),
        ],
        figures={
            "equal to the bit": sum(np.array_equal(a, b) for a, b in zip(together, alone, strict=True)),
            "largest difference of 255": max(largest_level(a, b) for a, b in zip(together, alone, strict=True)),
        },
    )


def check_noise(path: Path) -> Findings:
    """The kernel's numbers beside numpy's, and beside torch.randn on the GPU where PyTorch has one."""
    draws = [PhiloxDraw(seed=seed, offset=0, count=count) for seed in (0, 2**40 + 3) for count in (12, 16_384, 65_536)]
    made = [_on_device(path, draw) for draw in draws]
    errors = [float(np.abs(values - draw.values()).max()) for values, draw in zip(made, draws, strict=True)]
    bounds = [Bound(name="largest difference from numpy", measured=max(errors), bound=NOISE_TOLERANCE, kind="at most")]
    figures: dict[str, JsonValue] = {}
    theirs = [_torch_on_cuda(draw) for draw in draws]
    if any(values is None for values in theirs):
        figures["compared with PyTorch on CUDA"] = "no: PyTorch is not installed, or without CUDA"
    else:
        pairs = [(a, b) for a, b in zip(made, theirs, strict=True) if b is not None]
        worst = max(float(np.abs(a - b).max()) for a, b in pairs)
        bounds.append(
            Bound(name="largest difference from torch.randn", measured=worst, bound=NOISE_TOLERANCE, kind="at most")
        )
        figures["draws equal to torch.randn's to the bit"] = sum(np.array_equal(a, b) for a, b in pairs)
    with _pipeline(path) as pipeline:
        on_device = _pixels(pipeline, _stochastic(5, generator="cuda"))
        host = _drawn_with_host_noise(pipeline, _stochastic(5, generator="cuda"))
    bounds.append(Bound(name="image of host's numbers, PSNR dB", measured=psnr_db(on_device, host), bound=FP16_PSNR_DB))
    return Findings(bounds=bounds, figures=figures)


def _driver_version() -> str:
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BackendError(f"nvidia-smi cannot be used: {error}", hint="install it with the driver") from error


def _pipeline(path: Path, *, capture: bool = True) -> Pipeline:
    bundle = Bundle.open(path)
    if capture:
        return Pipeline(bundle, open_runner(bundle))
    driver = CudaPython(library_of(bundle.manifest.backend), bundle.path / "kernels")
    return Pipeline(bundle, TensorRtRunner(bundle, driver, capture=False))


def _runner(pipeline: Pipeline) -> TensorRtRunner:
    if not isinstance(pipeline.runner, TensorRtRunner):
        raise BackendError(
            f"the bundle is for {pipeline.bundle.manifest.backend.name}", hint="give one built with: --backend tensorrt"
        )
    return pipeline.runner


def _request(seed: int, **options: Any) -> Request:  # noqa: ANN401  (fields of Request)
    """A picture of the suite's own prompt, size and scale, in 12 steps."""
    case = shapes.cases(1)[0].arguments() | {"seed": seed, "num_inference_steps": 12, **options}
    return Request(**case)


def _stochastic(seed: int, **options: Any) -> Request:  # noqa: ANN401
    return _request(seed, scheduler="ddim", eta=1.0, **options)


def _pixels(pipeline: Pipeline, request: Request) -> Pixels:
    return np.asarray(pipeline.generate(request).images[0])


def _all_pixels(pipeline: Pipeline, request: Request) -> Pixels:
    return np.stack([np.asarray(image) for image in pipeline.generate(request).images])


def _drawn_with_host_noise(pipeline: Pipeline, request: Request) -> Pixels:
    """The image with the numbers of every row made by numpy and uploaded."""
    prepared = pipeline.prepare(pipeline.resolve(request))
    (trajectory,) = prepared.trajectories
    rows = len(trajectory.plan)
    noise = np.zeros((1, *trajectory.state.shape[1:]), np.float32)
    steps = _runner(pipeline).open_steps(
        lasting_inputs([trajectory]) | {"noise": noise}, row_inputs([trajectory], rows)
    )
    for row in range(rows):
        drawn = trajectory.generator.randn(noise.shape)[0] if trajectory.plan.draws_noise(row) else None
        steps.advance([drawn])
    trajectory.advance(steps.state()[0], rows)
    steps.close()
    return np.asarray(pipeline.draw(prepared, 0))


def _on_device(path: Path, draw: PhiloxDraw) -> npt.NDArray[np.float32]:
    driver = CudaPython(library_of(Bundle.open(path).manifest.backend), path / "kernels")
    size = 4 * draw.count
    stream, block, staging = driver.create_stream(), driver.allocate(size), driver.allocate_pinned(size)
    driver.fill_normal(block, draw, stream)
    driver.download(staging.address, block, size, stream)
    driver.synchronize(stream)
    values = staging.bytes.view(np.float32).copy()
    driver.free(block)
    driver.free_pinned(staging)
    driver.destroy_stream(stream)
    driver.close()
    return values


def _torch_on_cuda(draw: PhiloxDraw) -> npt.NDArray[np.float32] | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    generator = torch.Generator("cuda").manual_seed(draw.seed)
    values: npt.NDArray[np.float32] = torch.randn(draw.count, generator=generator, device="cuda").cpu().numpy()
    return values


def _pytorch_pictures(cases: Sequence[Mapping[str, Any]]) -> list[Pixels] | None:
    try:
        import diffusers
        import torch
    except ImportError:
        return None

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        str(files("sdrt.models.shapes") / "checkpoint"),
        torch_dtype=torch.float32,  # the checkpoint's is half
        safety_checker=None,
        requires_safety_checker=False,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pictures = []
    for case in cases:
        options = {name: value for name, value in case.items() if name not in ("seed", "scheduler")}
        generator = torch.Generator("cpu").manual_seed(case["seed"])
        pictures.append(np.asarray(pipeline(generator=generator, **options).images[0]))
    return pictures
