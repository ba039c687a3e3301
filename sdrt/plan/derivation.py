"""`derive`: the plan of any linear scheduler object, found by running the object instead of knowing its mathematics.

1. Probing. A scheduler treats every element of a latent alike, so each element can be an experiment of its own: in one
   run, element e has a 1 in the e-th input (a row's sample, model output or noise) and zeros elsewhere. What comes out
   at a row is its whole linear dependence on all inputs so far. The samples are inputs too, not those that the object
   made: then nothing accumulates, and only what the object itself remembers reaches a later row.
2. Realisation. What a row's memory must hold is what connects the inputs before it with the outputs from it on: the
   rank of that block of coefficients is the number of slots, and its factors are the slots (Dewilde & van der Veen
   1998, "Time-Varying Systems and Computations", chapter 5).
3. Verification. The plan must give what the object gives, on random inputs.
"""

import copy
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from sdrt.errors import RequestError
from sdrt.plan.rows import MAX_STATE_SLOTS, SamplingPlan
from sdrt.schedule import Floats

TOLERANCE = 1e-5  # of the largest value of a row, for linearity and for agreement with the plan
# Singular values below this share of a row's largest coefficient are rounding. The first that is enough is taken.
_RANK_TOLERANCES = (1e-12, 1e-10, 1e-8, 3e-7, 1e-6, 3e-6)
_AMPLITUDE = 4.0  # of random inputs: as far from zero as latents come, so that clipping shows
_CHANNELS, _RANDOM_WIDTH = 4, 24


class _Stepped(Protocol):
    prev_sample: Any


class Scheduler(Protocol):
    """What `derive` needs of an object on which set_timesteps was called: diffusers' conventions.

    `step` returns an object with `prev_sample`. Used where it has them: scale_model_input(sample, timestep),
    add_noise(original, noise, timesteps), init_noise_sigma (else 1), begin_index, and a variance_noise that step takes.
    """

    timesteps: Any

    def step(self, model_output: Any, timestep: Any, sample: Any) -> _Stepped:  # noqa: ANN401 - torch's or numpy's
        """The sample of the next row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What a run is fed, float64 [rows, elements] each; samples may be the first alone, to feed back the object's."""

    samples: Floats
    outputs: Floats
    noises: Floats

    def __add__(self, other: "_Inputs") -> "_Inputs":
        return _Inputs(
            samples=self.samples + other.samples,
            outputs=self.outputs + other.outputs,
            noises=self.noises + other.noises,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What a run gave: after each row the sample, before it what the network would see, float64 [rows, elements] each,
    and how often the row drew noise."""

    samples: Floats
    network_inputs: Floats
    draws: list[int]


def derive(scheduler: Scheduler, **step_options: object) -> SamplingPlan:
    """The plan of a scheduler object whose timesteps are set; the object itself is left as it is.

    step_options: passed to each of its steps (eta=1.0). Noise that it draws through torch is intercepted, a step's
    one draw at most. `noised` is NaN for an object without add_noise, whose plan cannot begin at an image.
    RequestError: it is not linear (with how far from it), needs more than 6 state slots, or is no such object.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not callable(getattr(scheduler, "step", None)) or len(timesteps) == 0:
        raise RequestError(
            f"{type(scheduler).__name__} has no timesteps or no step", hint="call its set_timesteps before derive"
        )
    try:
        inspect.signature(scheduler.step).bind(None, None, None, **step_options)
    except TypeError as error:
        raise RequestError(
            f"the step of {type(scheduler).__name__} does not take (model_output, timestep, sample): {error}",
            hint="wrap the object in one whose step does",
        ) from error
    probe = _Probe(scheduler, step_options)
    _refuse_non_linear(probe)
    return _first_that_agrees(probe)


class _Probe:
    """Runs fresh copies of one scheduler object from its first row to its last."""

    def __init__(self, scheduler: Scheduler, step_options: dict[str, object]) -> None:
        self._scheduler = scheduler
        self._options = step_options
        begin = getattr(scheduler, "begin_index", None) or 0
        self._timesteps = scheduler.timesteps[begin:]
        self._torch: ModuleType | None = None
        if type(scheduler.timesteps).__module__.partition(".")[0] == "torch":
            self._torch = sys.modules["torch"]  # the object brought it; the runtime itself never loads it
        self.initial_scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
        self.name = type(scheduler).__name__

    @property
    def timesteps(self) -> Floats:
        """float64 [rows]."""
        return np.array([float(timestep) for timestep in self._timesteps])

    def run(self, inputs: _Inputs) -> _Run:
        """Step through; `inputs` may have any number of elements, which are laid out as latents of four channels."""
        scheduler = copy.deepcopy(self._scheduler)
        scale = getattr(scheduler, "scale_model_input", None)
        elements = inputs.outputs.shape[1]
        sample = self._tensor(inputs.samples[0])
        samples, seen, draws = [], [], []
        for row, timestep in enumerate(self._timesteps):
            if 0 < row < len(inputs.samples):
                sample = self._tensor(inputs.samples[row])
            seen.append(_flat(sample if scale is None else scale(sample, timestep), elements))
            output, noise = self._tensor(inputs.outputs[row]), self._tensor(inputs.noises[row])
            sample, drawn = self._step(scheduler, output, timestep, sample, noise)
            samples.append(_flat(sample, elements))
            draws.append(drawn)
        return _Run(samples=np.array(samples), network_inputs=np.array(seen), draws=draws)

    def noised(self) -> Floats:
        """With which coefficients add_noise has an image's latents and noise before each row: float64 [rows, 2]."""
        scheduler = copy.deepcopy(self._scheduler)
        rows = len(self._timesteps)
        add_noise = getattr(scheduler, "add_noise", None)
        if add_noise is None:
            return np.full((rows, 2), np.nan)
        image, noise = (self._tensor(values) for values in np.eye(2, 4))
        nothing = self._tensor(np.zeros(4))
        mixed = []
        for row, timestep in enumerate(self._timesteps):
            mixed.append(_flat(add_noise(image, noise, self._timesteps[row : row + 1]), 2))
            self._step(scheduler, nothing, timestep, nothing, nothing)
        return np.array(mixed)

    def _tensor(self, values: Floats) -> Any:  # noqa: ANN401 - torch's or numpy's
        width = -(-len(values) // _CHANNELS)
        padded = np.pad(values, (0, _CHANNELS * width - len(values)))
        latents = padded.reshape(1, _CHANNELS, 1, width)
        return latents if self._torch is None else self._torch.from_numpy(latents)

    def _step(self, scheduler: Any, output: Any, timestep: Any, sample: Any, noise: Any) -> tuple[Any, int]:  # noqa: ANN401
        """The next sample, and how often noise was drawn for it."""
        if self._torch is None:
            options = dict(self._options)
            if "variance_noise" in inspect.signature(scheduler.step).parameters:
                options["variance_noise"] = noise
            return _sample_of(scheduler.step(output, timestep, sample, **options)), 0
        with _intercepted(self._torch, noise) as drawn:
            return _sample_of(scheduler.step(output, timestep, sample, **self._options)), drawn.count


def _sample_of(stepped: object) -> Any:  # noqa: ANN401
    if not hasattr(stepped, "prev_sample"):
        raise RequestError(
            f"step gave {type(stepped).__name__}, which has no prev_sample",
            hint="let step return an object that has it",
        )
    return stepped.prev_sample


def _flat(tensor: Any, elements: int) -> Floats:  # noqa: ANN401 - torch's or numpy's
    values = tensor.detach().numpy() if hasattr(tensor, "detach") else tensor
    return np.array(values, np.float64).reshape(-1)[:elements]


def _intercepted(torch: ModuleType, noise: Any) -> Any:  # noqa: ANN401
    """A context in which drawing normal noise gives `noise`, and float64 stays so where a step wants float32."""
    draws = {torch.randn, torch.randn_like}
    narrowing = {torch.Tensor.to, torch.Tensor.type, torch.Tensor.float}

    class Intercepted(torch.overrides.TorchFunctionMode):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_function__(
            self,
            function: Any,  # noqa: ANN401
            types: Any,  # noqa: ANN401
            arguments: tuple[Any, ...] = (),
            options: dict[str, Any] | None = None,
        ) -> Any:  # noqa: ANN401
            options = options or {}
            if function in draws:
                drawn = function(*arguments, **options)
                if drawn.shape != noise.shape:
                    return drawn  # no latents' noise: it stays random, which is refused as not linear
                self.count += 1
                return noise.clone()
            if function in narrowing and arguments[0].dtype is torch.float64 and arguments[0].ndim > 0:
                wanted = (*arguments[1:], *options.values())
                if function is torch.Tensor.float or torch.float32 in wanted:
                    return arguments[0]
            return function(*arguments, **options)

    return Intercepted()


def _random_inputs(rows: int, seed: int, *, samples: int) -> _Inputs:
    generator = np.random.default_rng(seed)

    def draw(count: int) -> Floats:
        return _AMPLITUDE * generator.standard_normal((count, _CHANNELS * _RANDOM_WIDTH))

    return _Inputs(samples=draw(samples), outputs=draw(rows), noises=draw(rows))


def _refuse_non_linear(probe: _Probe) -> None:
    """RequestError unless the run of a sum is the sum of the runs."""
    rows = len(probe.timesteps)
    one, other = (_random_inputs(rows, seed, samples=rows) for seed in (1, 2))
    apart = probe.run(one).samples + probe.run(other).samples
    together = probe.run(one + other)
    worst, row = _worst_row(together.samples, apart)
    if not worst <= TOLERANCE:
        raise RequestError(
            f"{probe.name} is not linear: step(a + b) and step(a) + step(b) differ by {worst:.2g} of the largest"
            f" value at row {row} of {rows}",
            hint="turn off what clips, thresholds or rescales in it, or noise that it does not draw through torch",
        )
    most = max(together.draws)
    if most > 1:
        raise RequestError(f"{probe.name} draws noise {most} times in a step", hint="a plan has one draw a row")


def _worst_row(values: Floats, expected: Floats) -> tuple[float, int]:
    """(largest difference as a share of the row's largest value, that row); infinite where values are not finite."""
    size = np.maximum(np.abs(values).max(axis=1), np.abs(expected).max(axis=1))
    difference = np.abs(values - expected).max(axis=1)
    shares = np.where(difference == 0, 0.0, difference / np.where(size == 0, 1.0, size))
    shares = np.where(np.isfinite(shares), shares, np.inf)
    row = int(np.argmax(shares))
    return float(shares[row]), row


def _response(probe: _Probe) -> tuple[Floats, Floats]:
    """(coefficients, input scales): float64 [rows, rows, 3] of each row's result on each row's (sample, output, noise)
    and float64 [rows]."""
    rows = len(probe.timesteps)
    unit = np.eye(3 * rows).reshape(rows, 3, 3 * rows)
    run = probe.run(_Inputs(samples=unit[:, 0], outputs=unit[:, 1], noises=unit[:, 2]))
    scales = np.array([run.network_inputs[row, 3 * row] for row in range(rows)])
    return run.samples.reshape(rows, rows, 3), scales


def _first_that_agrees(probe: _Probe) -> SamplingPlan:
    """The plan with the most exact memory that fits the slots and gives what the object gives, or RequestError."""
    coefficients, scales = _response(probe)
    inputs = _random_inputs(len(scales), 3, samples=1)
    run = probe.run(inputs)
    noised = probe.noised()
    needed = MAX_STATE_SLOTS
    worst, row = np.inf, 0
    for tolerance in _RANK_TOLERANCES:
        transitions = _realised(coefficients, tolerance)
        needed = transitions.shape[1]
        if needed > MAX_STATE_SLOTS:
            continue
        plan = SamplingPlan(
            timesteps=probe.timesteps,
            input_scales=scales,
            transitions=transitions,
            initial_scale=probe.initial_scale,
            noised=noised,
            draws=np.array(run.draws, bool) if any(run.draws) else None,
        )
        worst, row = max(_worst_row(*pair) for pair in zip(_followed(plan, inputs), _seen(run), strict=True))
        if worst <= TOLERANCE:
            return plan
    if needed > MAX_STATE_SLOTS:
        raise RequestError(
            f"{probe.name} needs {needed} state slots, but a plan has {MAX_STATE_SLOTS}",
            hint="lower its order: it remembers too much",
        )
    raise RequestError(
        f"{probe.name} is linear, but its plan is off by {worst:.2g} of the largest value at row {row}",
        hint="a scheduler must treat every element of the latents alike, with what only the timesteps decide",
    )


def _realised(coefficients: Floats, tolerance: float) -> Floats:
    """Transitions [rows, n, n + 2] with slots that carry all that outputs depend on, singular values below dropped."""
    rows = len(coefficients)
    memories = [np.zeros((0, 0))]  # of each row: orthonormal combinations of the inputs before it, [slots, 3 · row]
    readings = [np.zeros(0)]  # and how the row's result depends on them
    for row in range(1, rows):
        block = coefficients[row:, :row].reshape(rows - row, 3 * row)
        weights, sizes, combinations = np.linalg.svd(block, full_matrices=False)
        kept = int(np.sum(sizes > tolerance * np.abs(coefficients[row:]).max()))
        memories.append(combinations[:kept])
        readings.append(weights[0, :kept] * sizes[:kept])
    slots = 1 + max(len(memory) for memory in memories)
    transitions = np.zeros((rows, slots, slots + 2))
    for row, transition in enumerate(transitions):
        own = 1 + len(memories[row])
        transition[0, 1:own] = readings[row]
        transition[0, [0, slots, slots + 1]] = coefficients[row, row]
        if row + 1 < rows:
            following = memories[row + 1]
            transition[1 : 1 + len(following), 1:own] = following[:, : 3 * row] @ memories[row].T
            transition[1 : 1 + len(following), [0, slots, slots + 1]] = following[:, 3 * row :]
    return transitions


def _followed(plan: SamplingPlan, inputs: _Inputs) -> tuple[Floats, Floats]:
    """(samples after each row, what the network sees before it) of a plan: float64 [rows, elements] each."""
    state = np.zeros((plan.slots, inputs.outputs.shape[1]))
    state[0] = inputs.samples[0]
    samples, seen = [], []
    for row, transition in enumerate(plan.transitions):
        seen.append(plan.input_scales[row] * state[0])
        state = transition @ np.vstack([state, inputs.outputs[row], inputs.noises[row]])
        samples.append(state[0])
    return np.array(samples), np.array(seen)


def _seen(run: _Run) -> tuple[Floats, Floats]:
    return run.samples, run.network_inputs
