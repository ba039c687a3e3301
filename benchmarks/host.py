"""What a step costs beside the engines, and what a plan costs: both are to be nothing beside a network evaluation.

python -m sdrt.benchmarks.host --out FILE.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from sdrt.benchmarks.machine import describe_machine
from sdrt.bundle import JsonValue
from sdrt.conditions import Start
from sdrt.errors import SdrtError
from sdrt.files import write_atomically
from sdrt.guidance import Guidance, Lane
from sdrt.noise import TorchGenerator
from sdrt.plan import MAX_STATE_SLOTS, build_plan
from sdrt.plan.catalog import NAMES
from sdrt.runners.base import Array, FloatArray
from sdrt.step_batch import open_batch
from sdrt.trajectory import Trajectory, start_trajectory

PLAN_SECONDS, STEP_SECONDS = 5e-3, 1e-3  # the bars
STEPS, REQUESTS = 50, 8
LATENTS, LENGTH, EMBEDS = (4, 64, 64), 77, 768  # of SD1.5 at 512x512
OWN = {"betas": "PNDMScheduler", "edm": "EDMEulerScheduler", "flow": "FlowMatchEulerDiscreteScheduler"}
CONFIG: Mapping[str, JsonValue] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# Eight requests that share nothing: noise or none, one or two evaluations a step, guided and not.
MIXTURE = ("ddim", "pndm", "euler_a", "heun", "dpm2_a", "dpmpp_2m_sde", "deis", "unipc")
ENGINE_SECONDS = 0.05  # less than any UNet of Stable Diffusion needs for eight requests on a CPU
_REPEATS = 15


class TimedRunner:
    """Takes a while for a step, as an engine does outside of Python, and knows how long it was asked.

    So what the loop does meanwhile, such as drawing noise, costs nothing here either.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def run(self, component: str, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        """The state as it is."""
        began = time.perf_counter()
        time.sleep(ENGINE_SECONDS)
        state = np.array(feeds["state"], np.float32)
        self.seconds += time.perf_counter() - began
        return {"next_state": state}

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def plan_seconds(name: str) -> float:
    """Median seconds of building a 50-step plan that was never built before."""
    own = OWN[NAMES[name].family.schedule]
    seconds = []
    for repeat in range(_REPEATS):
        config = {**CONFIG, "beta_end": 0.012 + repeat * 1e-9, "sigma_max": 80.0 + repeat * 1e-9}
        began = time.perf_counter()
        build_plan(scheduler_class=own, scheduler_config=config, num_inference_steps=STEPS, scheduler=name)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def trajectories(schedulers: tuple[str, ...]) -> list[Trajectory]:
    """Requests at their first row, guided, each with an own prompt."""
    random = np.random.default_rng(0)
    started = []
    for seed, name in enumerate(schedulers):
        embeds = random.standard_normal((2, LENGTH, EMBEDS), np.float32)
        lanes = tuple(Lane(prompt_embeds=each, weight=weight) for each, weight in zip(embeds, (-6.5, 7.5), strict=True))
        plan = build_plan(
            scheduler_class=OWN["betas"], scheduler_config=CONFIG, num_inference_steps=STEPS, scheduler=name
        )
        guidance = Guidance(inside=lanes, outside=lanes[1:], interval=range(len(plan)))
        generator = TorchGenerator(seed)
        started.append(
            start_trajectory(
                plan=plan,
                guidance=guidance,
                generator=generator,
                slots=MAX_STATE_SLOTS,
                start=Start(latents=generator.randn(LATENTS) * np.float32(plan.initial_scale)),
            )
        )
    return started


def step_seconds(schedulers: tuple[str, ...]) -> tuple[float, float]:
    """(median, largest) seconds of a row of these requests together that the runner did not take."""
    runner = TimedRunner()
    batch = open_batch(runner, trajectories(schedulers))
    seconds = []
    for _ in range(STEPS - 1):
        before, began = runner.seconds, time.perf_counter()
        batch.advance()
        seconds.append(time.perf_counter() - began - (runner.seconds - before))
    batch.close()
    return statistics.median(seconds), max(seconds)


def measure() -> dict[str, JsonValue]:
    """Every figure, with the bars beside them."""
    build_plan(scheduler_class=OWN["betas"], scheduler_config=CONFIG, num_inference_steps=7)  # imports are over
    plans = {name: plan_seconds(name) for name in NAMES}
    worst = max(plans, key=plans.__getitem__)
    steps: dict[str, JsonValue] = {}
    mixtures = {
        "eight requests, eight schedulers, three of them with noise": MIXTURE,
        "eight requests without noise": ("euler",) * REQUESTS,
        "one request": ("euler",),
    }
    for label, schedulers in mixtures.items():
        median, largest = step_seconds(schedulers)
        steps[label] = {"median_seconds": median, "largest_seconds": largest}
    return {
        "plan_of_50_steps": {
            "bar_seconds": PLAN_SECONDS,
            "slowest": worst,
            "slowest_seconds": plans[worst],
            "seconds": {**plans},
        },
        "host_work_of_a_step": {"bar_seconds": STEP_SECONDS, "latents": [*LATENTS], **steps},
        "machine": describe_machine(),
    }


def meets_bars(found: Mapping[str, JsonValue]) -> bool:
    """Whether every median that `measure` found is within its bar. The first row of a batch, which is put together
    then, takes longer."""
    plans, steps = found["plan_of_50_steps"], found["host_work_of_a_step"]
    assert isinstance(plans, dict)
    assert isinstance(steps, dict)
    medians = [each["median_seconds"] for each in steps.values() if isinstance(each, dict)]
    return all(
        isinstance(seconds, float) and seconds <= bar
        for seconds, bar in [(plans["slowest_seconds"], PLAN_SECONDS), *((each, STEP_SECONDS) for each in medians)]
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; prints the file's content. 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m sdrt.benchmarks.host", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        found = measure()
        text = json.dumps(found, indent=2)
        write_atomically(options.out, text.encode() + b"\n", overwrite=True)
    except SdrtError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(text)
    return 0 if meets_bars(found) else 1


if __name__ == "__main__":
    sys.exit(main())
