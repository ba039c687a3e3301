"""What the oracle asks of every scheduler: each class with each option, spacing and grid that the reference has."""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from sdrt.plan.catalog import FAMILIES, NAMES
from tests.oracle.plan_reference import scheduler_class

WITH_ETA = ("DDIMScheduler", "DDIMParallelScheduler", "TCDScheduler")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SIGMAS = (None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MORE_BETA_SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "DDPMScheduler": ("sigmoid", "laplace"),
    "DDPMParallelScheduler": ("sigmoid", "laplace"),
    "HeunDiscreteScheduler": ("exp",),
}
TRAINED_BETAS = tuple(float(value) for value in np.linspace(0.001, 0.015, 1000))
OTHER_VALUES: Mapping[str, tuple[object, ...]] = {
    "clip_sample": (True,),
    "lambda_min_clipped": (-5.1,),
    "original_inference_steps": (100,),
    "timestep_scaling": (5.0,),
    "rho": (5.0,),
    "sigma_data": (1.0,),
    "thresholding": (True,),
    "shift": (3.0,),
    "shift_terminal": (0.1,),
    "invert_sigmas": (True,),
    "stochastic_sampling": (True,),
    "sigma_schedule": ("karras", "exponential"),
    "disable_corrector": ([0], [1, 2]),
    "euler_at_final": (True,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "lower_order_final": (True, False),
    "predict_x0": (True, False),
    "predictor_order": (1, 2, 3),
    "corrector_order": (1, 2, 3),
    "set_alpha_to_one": (True, False),
    "skip_prk_steps": (True, False),
    "solver_order": (1, 2, 3),
    "timestep_type": ("discrete", "continuous"),
    "use_lu_lambdas": (True,),
    "variance_type": (
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ),
    "use_flow_sigmas": (True,),
    "use_dynamic_shifting": (True,),
    "noise_sampler_seed": (1,),
}
# Values that are a class's own.
ITS_VALUES: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "DEISMultistepScheduler": {"algorithm_type": ("deis",), "solver_type": ("logrho",)},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
    },
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
    },
    "EDMDPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
    },
    "FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting": ()},
    "SASolverScheduler": {
        "algorithm_type": ("data_prediction", "noise_prediction"),
        "variance_type": ("learned", "learned_range"),
    },
    "UniPCMultistepScheduler": {"solver_type": ("bh1", "bh2")},
}
# Options that count only with others.
TOGETHER: Mapping[str, tuple[object, tuple[str, ...]]] = {
    "sigma_min": (0.05, tuple(filter(None, SIGMAS))),
    "sigma_max": (10.0, tuple(filter(None, SIGMAS))),
    "clip_sample_range": (0.5, ("clip_sample",)),
    "dynamic_thresholding_ratio": (0.9, ("thresholding",)),
    "sample_max_value": (2.0, ("thresholding",)),
}
TOGETHER_OF_FLOW: Mapping[str, tuple[object, tuple[str, ...]]] = {
    "sigma_min": (0.01, tuple(filter(None, SIGMAS))),
    "sigma_max": (0.9, tuple(filter(None, SIGMAS))),
}
AROUND: Mapping[str, Mapping[str, object]] = {"dynamic_thresholding_ratio": {"sample_max_value": 3.0}}
# Fields that an axis of `variations` has, and those of which nothing can be measured.
IN_AXES = {
    "timestep_spacing",
    "prediction_type",
    "steps_offset",
    "rescale_betas_zero_snr",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "num_train_timesteps",
    "mu",
    *filter(None, SIGMAS),
}
_OF_MU = "one of four numbers from which pipelines reckon mu, which is measured"
_OF_FLOW = "counts with use_flow_sigmas only"
WITHOUT_CELLS: Mapping[str, str] = {
    "base_image_seq_len": _OF_MU,
    "max_image_seq_len": _OF_MU,
    "base_shift": _OF_MU,
    "max_shift": _OF_MU,
    "flow_shift": _OF_FLOW,
    "time_shift_type": "counts with use_dynamic_shifting only",
    "solver_p": "a scheduler object, which no config file holds: refused",
    "tau_func": "a function, which no config file holds: refused",
}
# What sdrt refuses and the reference does not, by option, and why.
REFUSED: Mapping[str, str] = {
    "use_flow_sigmas=True": "for flow-matching models, which Stable Diffusion pipelines do not load",
    "use_dynamic_shifting=True": "for flow-matching models, which Stable Diffusion pipelines do not load",
    "prediction_type=flow_prediction": "for flow-matching models, which Stable Diffusion pipelines do not load",
    "variance_type=learned": "for networks that predict their variance too, which Stable Diffusion's do not",
    "variance_type=learned_range": "for networks that predict their variance too, which Stable Diffusion's do not",
    "noise_sampler_seed=1": "it would override the request's seed",
}
SOLVER = ("algorithm_type", "solver_order", "solver_type")
# Options that are not finite where the last sigma is zero, in the reference neither.
ENDS_ON_SIGMA_MIN: Mapping[str, tuple[str, ...]] = {
    "UniPCMultistepScheduler": ("solver_type=bh1", "lower_order_final=False", "predict_x0=False")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """What is asked of a class. grid: timesteps or sigmas of one's own; strength: the share of the steps that run.

    eta: how much noise, of classes that have the choice. mu: the shift of a flow that depends on the image's size.
    """

    option: str
    config: Mapping[str, object]
    grid: str | None = None
    strength: float = 1.0
    eta: float = 0.0
    mu: float | None = None

    def own_grid(self, steps: int, *, flow: bool) -> dict[str, tuple[float, ...]] | None:
        """The grid of `steps` steps; sigmas with the one after the last step, but for flow matching."""
        if self.grid is None:
            return None
        if self.grid == "timesteps":
            return {"timesteps": tuple(float(value) for value in np.linspace(981, 11, steps).round())}
        sigmas = np.linspace(1, 0.02, steps) ** (1 if flow else 3) * (1 if flow else 14.0)
        return {"sigmas": tuple(float(value) for value in (sigmas if flow else np.append(sigmas, 0)))}


def variations(class_name: str) -> Iterator[Variation]:
    """Everything that is varied of a class: all spacings at once, other options one by one."""
    family = FAMILIES[class_name]
    fields = family.fields
    sigmas = [name for name in SIGMAS if name is None or name in fields]
    spacings = SPACINGS if "timestep_spacing" in fields else (None,)
    predictions = PREDICTIONS if "prediction_type" in fields else (None,)
    for prediction, spacing, spaced in itertools.product(predictions, spacings, sigmas):
        config = {} if prediction is None else {"prediction_type": prediction}
        config |= {} if spacing is None else {"timestep_spacing": spacing}
        config |= {} if spaced is None else {spaced: True}
        words = [prediction or "velocity", *([] if spaced is None else [spaced.split("_")[1]])]
        yield Variation(option=", ".join(words), config=config)
    yield Variation(option="strength 0.6", config={}, strength=0.6)
    for eta in (0.3, 1.0) if class_name in WITH_ETA else ():
        yield Variation(option=f"eta={eta}", config={}, eta=eta)
    for name, (value, needed) in (TOGETHER_OF_FLOW if family.schedule == "flow" else TOGETHER).items():
        for condition in needed:
            if name in fields and condition in fields:
                words = f"{name}={value} with {condition}"
                yield Variation(option=words, config={**AROUND.get(name, {}), name: value, condition: True})
    if family.schedule == "edm":  # whose whole grid lies between them
        for bound in ({"sigma_min": 0.05}, {"sigma_max": 10.0}):
            yield Variation(option=", ".join(f"{name}={value}" for name, value in bound.items()), config=bound)
    own = inspect.signature(scheduler_class(class_name).set_timesteps).parameters
    for grid in ("timesteps", "sigmas"):
        if grid in own:
            yield Variation(option=f"{grid} of one's own", config={}, grid=grid)
    if family.schedule == "betas":
        for schedule in (*BETA_SCHEDULES, *MORE_BETA_SCHEDULES.get(class_name, ())):
            yield Variation(option=f"beta_schedule={schedule}", config={"beta_schedule": schedule})
        yield Variation(option="beta_start and beta_end", config={"beta_start": 0.0005, "beta_end": 0.02})
        yield Variation(option="trained_betas", config={"trained_betas": list(TRAINED_BETAS)})
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        if "use_flow_sigmas" in fields:
            yield Variation(option="prediction_type=flow_prediction", config=flow)
    yield Variation(option="num_train_timesteps=500", config={"num_train_timesteps": 500})
    for offset, spacing in itertools.product((0, 3), spacings) if "steps_offset" in fields else ():
        yield Variation(
            option=f"steps_offset={offset}", config={"steps_offset": offset, "timestep_spacing": spacing or "leading"}
        )
    for kind in ("exponential", "linear") if "mu" in fields else ():
        shifted = {"use_dynamic_shifting": True, "time_shift_type": kind}
        yield Variation(option=f"use_dynamic_shifting, {kind}", config=shifted, mu=0.8)
    for each in NAMES.values():
        if each.family is family:
            for prediction in predictions[:2]:
                config = {**each.fields} | ({} if prediction is None else {"prediction_type": prediction})
                yield Variation(option=f"as `{each.name}`", config=config)
    if "rescale_betas_zero_snr" in fields:
        zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        yield Variation(option="rescale_betas_zero_snr", config=zero)
    values = {**OTHER_VALUES, **ITS_VALUES.get(class_name, {})}
    crossed = values.keys() >= {*SOLVER} and fields.keys() >= {*SOLVER}
    if crossed:
        for algorithm, order, kind in itertools.product(*(values[name] for name in SOLVER)):
            config = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
            if not str(algorithm).endswith("++") and "final_sigmas_type" in fields:
                config["final_sigmas_type"] = "sigma_min"  # without it, it could not take its last step
            yield Variation(option=f"{algorithm}, order {order}, {kind}", config=config)
    elsewhere = IN_AXES | TOGETHER.keys() | WITHOUT_CELLS.keys() | set(SOLVER if crossed else ())
    for name in sorted(fields.keys() - elsewhere):
        for value, prediction in itertools.product(values[name], predictions[:2]):
            config = {name: value} | ({} if prediction is None else {"prediction_type": prediction})
            option = f"{name}={value}"
            if option in ENDS_ON_SIGMA_MIN.get(class_name, ()):
                config["final_sigmas_type"] = "sigma_min"
            yield Variation(option=option, config=config)
