"""The stages of the GPU runbook, in order: what each has to show, and how long it may take."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdrt.benchmarks.gpu import checks, latency, making, refit
from sdrt.benchmarks.gpu.results import Findings


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Where the runbook keeps what it makes: bundles, the checkpoint, the build cache. out: where results go."""

    folder: Path
    out: Path
    threads: int | None = None

    @property
    def shapes(self) -> Path:
        """The bundle of the embedded model."""
        return self.folder / "shapes.sdrt"

    @property
    def sd15(self) -> Path:
        """The bundle of SD1.5's size, for 512x512 and one image."""
        return self.folder / "sd15.sdrt"

    @property
    def sd15_checkpoint(self) -> Path:
        """The checkpoint of SD1.5's size, random weights."""
        return self.folder / "sd15-checkpoint"

    @property
    def cache(self) -> Path:
        """The build cache."""
        return self.folder / "cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage: what it shows, in a line; run raises what stops it. seconds: its budget, after which it is stopped."""

    name: str
    shows: str
    seconds: float
    run: Callable[[Work], Findings]


STAGES = (
    Stage(
        name="device",
        shows="driver, GPU and library are there and fit",
        seconds=30,
        run=lambda work: checks.describe_device(),
    ),
    Stage(
        name="shapes",
        shows="the embedded model's engines are there, or are built",
        seconds=200,
        run=lambda work: making.make_shapes(work.shapes, work.cache, threads=work.threads),
    ),
    Stage(
        name="parity",
        shows="the golden image on the GPU completes the seal; images equal PyTorch's",
        seconds=100,
        run=lambda work: checks.check_parity(work.shapes),
    ),
    Stage(
        name="layers",
        shows="TensorRT's inspector tells what each engine is made of",
        seconds=30,
        run=lambda work: checks.check_layers(work.shapes),
    ),
    Stage(
        name="graphs",
        shows="replayed graphs equal plain launches to the bit",
        seconds=60,
        run=lambda work: checks.check_graphs(work.shapes),
    ),
    Stage(
        name="profiles",
        shows="shapes outside every profile are errors, and harm nothing",
        seconds=30,
        run=lambda work: checks.check_profiles(work.shapes),
    ),
    Stage(
        name="repeats",
        shows="200 repeats of one seed are one image",
        seconds=60,
        run=lambda work: checks.check_repeats(work.shapes),
    ),
    Stage(
        name="mixture",
        shows="requests of other schedulers, steps and seeds in one batch equal themselves alone",
        seconds=60,
        run=lambda work: checks.check_mixture(work.shapes),
    ),
    Stage(
        name="noise",
        shows="a CUDA generator's numbers, made on the GPU, are those of numpy and of PyTorch",
        seconds=50,
        run=lambda work: checks.check_noise(work.shapes),
    ),
    Stage(
        name="refit",
        shows="an engine takes other weights, and the old ones again",
        seconds=160,
        run=lambda work: refit.check_refit(work.folder, work.cache, threads=work.threads),
    ),
    Stage(
        name="sd15",
        shows="engines of SD1.5's size, random weights, are there or are built",
        seconds=540,
        run=lambda work: making.make_sd15(work.sd15_checkpoint, work.sd15, work.cache, threads=work.threads),
    ),
    Stage(
        name="latency",
        shows="faster than PyTorch FP16, eager and compiled, in no more memory",
        seconds=480,
        run=lambda work: latency.check_latency(
            work.sd15, work.sd15_checkpoint, work.out / "latency", threads=work.threads
        ),
    ),
)
