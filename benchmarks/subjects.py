"""Subjects: what a run compares, and making of it what is not there yet (SD1.5: checkpoint, bundle, conversions)."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdrt.benchmarks import contestants
from sdrt.benchmarks.builds import build_bundle, convert_for_genai, ensure_peers
from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import ContestantSpec, Picture
from sdrt.benchmarks.suites import sd15, shapes
from sdrt.bundle import Bundle, JsonValue
from sdrt.errors import CheckpointError, RequestError
from sdrt.progress import Progress

CUDA_PEERS = ("pytorch-cuda-fp16", "pytorch-cuda-compile")
PEERS = ("pytorch-fp32", "pytorch-bf16", "pytorch-compile", "openvino-genai", *CUDA_PEERS)
DEFAULT_PEERS = ("pytorch-fp32", "pytorch-bf16")
SD15_PEERS = (*DEFAULT_PEERS, "openvino-genai")
TASK_PEERS = ("pytorch-fp32", "pytorch-bf16", "pytorch-compile")
SUITES = ("plain", "shapes", "sd15", "tasks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is compared: the bundle, the checkpoint it came from, the cases, the bars and what else to report.

    bars: name of the bar → (kind of ratio: "step", "total" or "start"; the peer; the bound).
    """

    title: str
    bundle: Path
    baseline: Path | None
    peers: Sequence[str]
    cases: Sequence[Case]
    bars: Mapping[str, tuple[str, str, float]]
    extra: Mapping[str, JsonValue]
    wanted_share: Callable[[Sequence[Picture]], float] | None = None


def bundle_subject(
    bundle: Path, baseline: Path | None, suite: str, *, prompt: str, peers: Sequence[str] | None
) -> Subject:
    """A bundle on the cases of a suite. Raises BundleError, CheckpointError, RequestError."""
    model = Bundle.open(bundle).manifest.model
    plain = Case(
        prompt=prompt,
        height=model.default_height,
        width=model.default_width,
        num_inference_steps=30,
        guidance_scale=7.5,
        seed=0,
        scheduler="ddim",
    )
    if baseline is None and peers:
        raise RequestError(
            f"{', '.join(peers)} cannot run without the checkpoint", hint="name it with: --baseline MODEL"
        )
    if baseline is not None and not (baseline / "model_index.json").is_file():
        raise CheckpointError(
            f"{baseline} has no model_index.json",
            hint="--baseline takes the diffusers folder the bundle was built from",
        )
    return Subject(
        title=f"{model.name}: sdrt and its peers",
        bundle=bundle,
        baseline=baseline,
        peers=() if baseline is None else DEFAULT_PEERS if peers is None else peers,
        cases=shapes.cases() if suite == "shapes" else [plain],
        bars={},
        extra={},
    )


def sd15_subject(
    work: Path, precision: str, threads: int | None, progress: Progress, *, peers: Sequence[str] | None
) -> Subject:
    """Make the checkpoint unless it is there, build it (timed), and build it again from the cache (timed)."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle, cache = work / "checkpoint", work / "sd15.sdrt", work / "cache"
    progress("SD1.5 checkpoint", 0, 3)
    sd15.make_checkpoint(checkpoint)
    shutil.rmtree(cache, ignore_errors=True)
    size = f"{sd15.SIDE}x{sd15.SIDE}"
    flags = ["--sizes", size, "--batch", "1", "--precision", precision, "--force"]
    flags += [] if threads is None else ["--threads", str(threads)]
    progress("sdrt build", 1, 3)
    built = build_bundle(checkpoint, bundle, *flags, cache=cache)
    progress("sdrt build, from the cache", 2, 3)
    again = build_bundle(checkpoint, bundle, *flags, cache=cache)
    weights = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    return Subject(
        title="SD1.5 architecture, random weights: sdrt and its peers",
        bundle=bundle,
        baseline=checkpoint,
        peers=SD15_PEERS if peers is None else peers,
        cases=sd15.cases(),
        bars=sd15.BARS,
        extra={
            "build seconds": round(built.seconds, 1),
            "rebuild from cache seconds": round(again.seconds, 2),
            "build peak memory MiB": round(built.peak_bytes / 2**20),
            "checkpoint MiB": round(weights / 2**20),
            "build peak / checkpoint": round(built.peak_bytes / weights, 2),
        },
    )


def resized(subject: Subject, *, steps: int | None, size: str | None) -> Subject:
    """The subject with other steps or another WIDTHxHEIGHT. Raises RequestError for a size that is none."""
    cases = list(subject.cases)
    if steps is not None:
        cases = [replace(case, num_inference_steps=steps) for case in cases]
    if size is not None:
        width, _, height = size.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise RequestError(f"--size {size!r} is not a size", hint="write WIDTHxHEIGHT, such as 512x512")
        cases = [replace(case, height=int(height), width=int(width)) for case in cases]
    return replace(subject, cases=cases)


def judged(subject: Subject, suite: str) -> Subject:
    """The subject with the judge of its suite, where there is one for pictures of this size."""
    if suite != "shapes" or any((case.height, case.width) != shapes.SIZE for case in subject.cases):
        return subject
    prompts = [case.prompt for case in subject.cases]
    return replace(subject, wanted_share=lambda pictures: shapes.wanted_share(pictures, prompts))


def contestants_of(
    subject: Subject, *, threads: int, provider: str | None = None, genai_python: Path, work: Path
) -> list[ContestantSpec]:
    """This runtime and the peers, converting the checkpoint for those that need it. Raises BuildError."""
    specs = [contestants.compiled(subject.bundle, threads=threads, provider=provider)]
    if subject.baseline is None:
        return specs
    model = subject.baseline
    for name in subject.peers:
        if name == "openvino-genai":
            identity = Bundle.open(subject.bundle).manifest.model.identity
            converted = work / f"openvino-genai-{identity[:12]}"
            ensure_peers(genai_python)
            convert_for_genai(model, converted, genai_python)
            specs.append(contestants.openvino_genai(converted, genai_python, threads=threads))
        else:
            specs.append(pytorch_peer(name, model, threads=threads))
    return specs


def pytorch_peer(name: str, model: Path, *, threads: int, task: str = "text-to-image") -> ContestantSpec:
    """The contestant of one of the peers that are PyTorch."""
    cuda, compiles = name in CUDA_PEERS, name.endswith("-compile")
    precision = "fp16" if cuda else "bf16" if name == "pytorch-bf16" else "fp32"
    return contestants.pytorch(model, precision, threads=threads, task=task, compile_unet=compiles, cuda=cuda)


def peer_names(text: str | None, known: Sequence[str] = PEERS) -> list[str] | None:
    """The peers of a comma-separated list, in which "sdrt" may stand too: it always runs. Raises RequestError."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - {"sdrt", *known})
    if unknown:
        raise RequestError(f"unknown contestants {', '.join(unknown)}", hint=f"choose from sdrt, {', '.join(known)}")
    return [name for name in dict.fromkeys(names) if name != "sdrt"]
