"""`FakeRunner`: the step graph's exact contract in numpy, around a cheap stand-in for the network, for tests."""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from sdrt.errors import BackendError
from sdrt.runners.base import (
    CONTROL_EMBEDDING,
    DEPTH_ESTIMATOR,
    STEP,
    TEXT_ENCODER,
    TINY_VAE_DECODER,
    VAE_DECODER,
    VAE_ENCODER,
    Array,
    FloatArray,
)
from sdrt.step_border import fixed_sizes, step_inputs_of

Fault = Callable[[str, Mapping[str, Array]], None]


class FakeRunner:
    """Deterministic, fast, and strict: shapes that no engine would take raise BackendError.

    embeds_dim: d of the text embeddings; downsample: the VAE's factor. before: called with (component, feeds)
    before each evaluation, to raise or to wait. poison: a token id whose prompt makes the network give NaN.
    batches: how many requests each step held, in order.
    """

    def __init__(
        self, *, embeds_dim: int = 8, downsample: int = 8, before: Fault | None = None, poison: int | None = None
    ) -> None:
        self.embeds_dim = embeds_dim
        self.downsample = downsample
        self.before = before
        self.poison = poison
        self.batches: list[int] = []
        self.calls: dict[str, int] = {}
        self._inside = threading.Lock()
        self._closed = False

    def run(self, component: str, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        """See `Runner.run`. Two callers at once are an error, as they are for a real engine."""
        if self._closed:
            raise BackendError(f"{component} was asked of a runner that is closed", hint="open the bundle again")
        if not self._inside.acquire(blocking=False):
            raise BackendError("two threads are in one runner", hint="give each its own, or use a Batcher")
        try:
            if self.before is not None:
                self.before(component, feeds)
            self.calls[component] = self.calls.get(component, 0) + 1
            return _COMPONENTS[component](self, feeds)
        finally:
            self._inside.release()

    def close(self) -> None:
        """See `Runner.close`."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _text_encoder(self, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        _check_feeds("text_encoder", feeds, {"input_ids": ("i", (None, None))})
        ids = feeds["input_ids"].astype(np.float64)
        waves = np.sin(ids[:, :, None] * np.arange(1, self.embeds_dim + 1) * 0.37).astype(np.float32)
        if self.poison is not None:
            waves[(feeds["input_ids"] == self.poison).any(1)] = np.float32(1e30)
        return {"last_hidden_state": waves}

    def _step(self, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        _check_step(feeds, self.embeds_dim)
        state = feeds["state"].astype(np.float32)
        self.batches.append(len(state))
        scaled = state[:, 0] * feeds["input_scale"].astype(np.float32)[:, None, None, None]
        lanes = [
            _network(scaled[request], float(time), embeds) + _seen(feeds, lane, request)
            for lane, (request, time, embeds) in enumerate(
                zip(feeds["lane_request"], feeds["timestep"], feeds["prompt_embeds"], strict=True)
            )
        ]
        following = np.empty_like(state)
        for index in range(len(state)):
            # Summed lane by lane, so that the arithmetic of one request is the same in every batch. Lanes of weight 0
            # count, as in a real engine: 0 * NaN is NaN, so one bad lane spoils every request of the step.
            output, aim = (_combined(feeds[name][index], lanes) for name in ("guidance", "rescale_lanes"))
            share = feeds["guidance_rescale"][index]
            if share != 0:
                output = output * (share * aim.std() / output.std() + 1 - share)
            on_latents, on_output, limit = feeds["clamp"][index]
            x0 = on_latents * state[index, 0] + on_output * output
            excess = np.clip(x0, -limit, limit) - x0
            sources = np.concatenate([state[index], np.stack([output, feeds["noise"][index], excess])])
            following[index] = np.einsum("nk,kchw->nchw", feeds["transition"][index], sources)
            known = np.einsum("k,kchw->chw", feeds["known_weights"][index], feeds["known"][index])
            mask = feeds["mask"][index]
            following[index, 0] = mask * following[index, 0] + (1 - mask) * known
        return {"next_state": following.astype(np.float32)}

    def _vae_decoder(self, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        return self._decoded(VAE_DECODER, feeds, [0, 1, 2])

    def _tiny_vae_decoder(self, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        return self._decoded(TINY_VAE_DECODER, feeds, [1, 2, 3])

    def _decoded(self, component: str, feeds: Mapping[str, Array], channels: list[int]) -> dict[str, FloatArray]:
        _check_feeds(component, feeds, {"latent_sample": ("f", (None, 4, None, None))})
        latents = feeds["latent_sample"][:, channels].astype(np.float32)
        larger = latents.repeat(self.downsample, axis=2).repeat(self.downsample, axis=3)
        return {"sample": np.tanh(larger)}

    def _vae_encoder(self, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        _check_feeds("vae_encoder", feeds, {"sample": ("f", (None, 3, None, None))})
        image = feeds["sample"].astype(np.float32)
        batch, _, height, width = image.shape
        side = self.downsample
        blocks = image.reshape(batch, 3, height // side, side, width // side, side).mean((3, 5))
        mean = np.concatenate([blocks, blocks[:, :1]], axis=1)
        return {"latent_parameters": np.concatenate([mean, np.full_like(mean, -30.0)], axis=1)}

    def _control_embedding(self, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        _check_feeds("control_embedding", feeds, {"controlnet_cond": ("f", (None, None, 3, None, None))})
        pictures = feeds["controlnet_cond"].astype(np.float32)
        batch, count, _, height, width = pictures.shape
        side = self.downsample
        blocks = pictures.reshape(batch, count, 3, height // side, side, width // side, side).mean((4, 6))
        return {"control": blocks}

    def _depth_estimator(self, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        _check_feeds("depth_estimator", feeds, {"pixel_values": ("f", (1, 3, None, None))})
        return {"predicted_depth": feeds["pixel_values"].astype(np.float32).mean(1)}


def _check_step(feeds: Mapping[str, Array], embeds_dim: int) -> None:
    requests, slots, channels, height, width = _shape(feeds, "state", 5)
    (lanes,) = _shape(feeds, "lane_request", 1)
    conditions = _shape(feeds, "conditioning", 4)[1] if "conditioning" in feeds else 0
    controls, control_features = _shape(feeds, "control", 5)[1:3] if "control" in feeds else (0, 0)
    sizes: Mapping[str, int | str] = {
        **fixed_sizes(
            slots=slots,
            channels=channels,
            features=embeds_dim,
            conditioning_channels=conditions,
            controls=controls,
            control_features=control_features,
        ),
        **{"requests": requests, "lanes": lanes, "height": height, "width": width},
        "length": _shape(feeds, "prompt_embeds", 3)[1],
    }
    wanted = {
        entry.name: (
            "i" if entry.dtype == "int64" else "f",
            tuple(int(sizes[dimension]) for dimension in entry.dimensions),
        )
        for entry in step_inputs_of(
            conditioning_channels=conditions, class_labels="class_labels" in feeds, controls=controls > 0
        )
    }
    _check_feeds(STEP, feeds, wanted)
    owners = feeds["lane_request"].astype(np.int64)
    if lanes == 0 or owners.min() < 0 or owners.max() >= requests:
        raise _misfed(STEP, f"lane_request is {owners.tolist()} for {requests} requests")


def _check_feeds(
    component: str, feeds: Mapping[str, Array], wanted: Mapping[str, tuple[str, tuple[int | None, ...]]]
) -> None:
    """wanted: for each tensor the kind of its dtype (f: float32, i: int64) and its shape, None where dynamic."""
    if wanted.keys() != feeds.keys():
        raise _misfed(component, f"it takes {sorted(wanted)}, not {sorted(feeds)}")
    dtypes: Mapping[str, type[np.generic]] = {"f": np.float32, "i": np.int64}
    for name, (kind, shape) in wanted.items():
        array = feeds[name]
        pairs = zip(shape, array.shape, strict=False)
        fits = array.ndim == len(shape) and all(want in (None, have) for want, have in pairs)
        if not fits or array.dtype != dtypes[kind]:
            raise _misfed(
                component, f"{name} is {array.dtype} {list(array.shape)}, not {dtypes[kind].__name__} {shape}"
            )


def _shape(feeds: Mapping[str, Array], name: str, rank: int) -> tuple[int, ...]:
    if name not in feeds or feeds[name].ndim != rank:
        raise _misfed(STEP, f"{name} of rank {rank} is missing")
    return feeds[name].shape


def _misfed(component: str, what: str) -> BackendError:
    return BackendError(f"{component} was fed wrongly: {what}", hint="see the step graph in docs/architecture.md")


def _combined(weights: Array, lanes: Sequence[FloatArray]) -> FloatArray:
    output = np.zeros_like(lanes[0])
    for weight, lane in zip(weights.astype(np.float32), lanes, strict=True):
        output = output + weight * lane
    return output


def _network(sample: FloatArray, timestep: float, embeds: Array) -> FloatArray:
    """Bounded, smooth, and dependent on everything that the UNet depends on; NaN for absurd embeddings."""
    if not np.abs(embeds).max() < 1e20:
        return np.full_like(sample, np.nan, dtype=np.float32)
    condition = float(np.float32(embeds.astype(np.float64).mean()))
    value: FloatArray = np.tanh(sample * np.float32(0.8) + np.float32(condition + timestep / 1000)).astype(np.float32)
    return value


def _seen(feeds: Mapping[str, Array], lane: int, request: np.int64) -> FloatArray:
    """What a lane makes of its request's conditioning, class and controls; nothing where there are none."""
    seen = np.float32(0)
    if "conditioning" in feeds:
        seen = seen + feeds["lane_conditioning"][lane] * feeds["conditioning"][request].mean(0)
    if "class_labels" in feeds:
        seen = seen + np.float32(feeds["class_labels"][lane]) / np.float32(1000)
    if "control" in feeds:
        weights = feeds["control_scales"][request].astype(np.float32)
        seen = seen + np.einsum("k,kchw->hw", weights, feeds["control"][request])
    return np.asarray(seen, np.float32)


_COMPONENTS: Mapping[str, Callable[[FakeRunner, Mapping[str, Array]], dict[str, FloatArray]]] = {
    TEXT_ENCODER: FakeRunner._text_encoder,
    STEP: FakeRunner._step,
    VAE_DECODER: FakeRunner._vae_decoder,
    TINY_VAE_DECODER: FakeRunner._tiny_vae_decoder,
    VAE_ENCODER: FakeRunner._vae_encoder,
    CONTROL_EMBEDDING: FakeRunner._control_embedding,
    DEPTH_ESTIMATOR: FakeRunner._depth_estimator,
}
