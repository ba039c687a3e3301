"""Engines for the usual shapes: which bundles have them, and that they compute what the dynamic ones compute."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdrt.bundle import Bundle
from sdrt.runners import open_runner
from sdrt.runners.usual import usual_shapes


@pytest.fixture(scope="module")
def narrowed(tiny_bundle):
    """The tiny bundle as one for a single size and one image at a time."""

    def narrow(**changes):
        whole = Bundle.open(tiny_bundle)
        profile = replace(whole.manifest.profile, sizes=((64, 128),), minimum=(64, 128), maximum=(64, 128), max_batch=1)
        return Bundle(path=whole.path, manifest=replace(whole.manifest, profile=replace(profile, **changes)))

    return narrow


def shapes_of(bundle, name):
    return usual_shapes(bundle, bundle.component(name))


def step_feeds(bundle, requests, lanes):
    rng = np.random.default_rng(0)
    model, slots = bundle.manifest.model, bundle.manifest.state_slots
    factor = model.vae_downsample
    latents = (requests, model.latent_channels, 64 // factor, 128 // factor)
    owner = np.arange(lanes) % requests
    embeds_dim = next(spec for spec in bundle.component("step").inputs if spec.name == "prompt_embeds").shape[2]
    return {
        "state": rng.standard_normal((requests, slots, *latents[1:]), np.float32),
        "input_scale": np.ones(requests, np.float32),
        "lane_request": owner,
        "timestep": np.full(lanes, 501.5, np.float32),
        "prompt_embeds": rng.standard_normal((lanes, model.text_length, embeds_dim), np.float32),
        "guidance": (owner == np.arange(requests)[:, None]).astype(np.float32),
        "rescale_lanes": np.zeros((requests, lanes), np.float32),
        "guidance_rescale": np.zeros(requests, np.float32),
        "clamp": np.zeros((requests, 3), np.float32),
        "transition": rng.standard_normal((requests, slots, slots + 3), np.float32),
        "noise": rng.standard_normal(latents, np.float32),
        "mask": np.ones((requests, 1, *latents[2:]), np.float32),
        "known": np.zeros((requests, 2, *latents[1:]), np.float32),
        "known_weights": np.zeros((requests, 2), np.float32),
    }


def test_one_size_and_one_image_at_a_time_have_usual_shapes(narrowed):
    bundle = narrowed()
    feeds = step_feeds(bundle, requests=1, lanes=2)
    assert shapes_of(bundle, "step") == {name: array.shape for name, array in feeds.items()}
    assert shapes_of(bundle, "text_encoder") == {"input_ids": (1, bundle.manifest.model.text_length)}


@pytest.mark.parametrize(
    "changes", [{"max_batch": 2}, {"sizes": ()}, {"sizes": ((64, 64), (64, 128))}], ids=["batch", "range", "two sizes"]
)
def test_no_shape_is_usual_in_a_bundle_for_several(narrowed, changes):
    bundle = narrowed(**changes)
    assert all(usual_shapes(bundle, component) is None for component in bundle.manifest.components)


def test_a_size_that_goes_through_the_vae_in_tiles_has_no_usual_shape_for_it(narrowed):
    bundle = narrowed()
    model = bundle.manifest.model
    latents = (1, model.latent_channels, 64 // model.vae_downsample, 128 // model.vae_downsample)
    for default, expected in (
        (64, {"vae_decoder": None, "vae_encoder": None}),
        (128, {"vae_decoder": {"latent_sample": latents}, "vae_encoder": {"sample": (1, 3, 64, 128)}}),
    ):
        sized = replace(model, default_height=default, default_width=default)
        subject = Bundle(path=bundle.path, manifest=replace(bundle.manifest, model=sized))
        assert {name: shapes_of(subject, name) for name in expected} == expected


@pytest.mark.parametrize(("requests", "lanes"), [(1, 2), (1, 1), (2, 4)], ids=["usual", "unguided", "two"])
def test_every_shape_computes_what_a_dynamic_engine_computes(narrowed, tiny_bundle, requests, lanes):
    feeds = step_feeds(narrowed(), requests, lanes)
    with open_runner(Bundle.open(tiny_bundle), threads=1) as runner:
        expected = runner.run("step", feeds)["next_state"]
    with open_runner(narrowed(), threads=1) as runner:
        made = [runner.run("step", feeds)["next_state"] for _ in range(2)]
    np.testing.assert_allclose(made[0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(made[0], made[1])


def test_an_unusual_run_between_does_not_change_a_usual_one(narrowed):
    bundle = narrowed()
    usual, unusual = step_feeds(bundle, requests=1, lanes=2), step_feeds(bundle, requests=1, lanes=1)
    with open_runner(bundle, threads=1) as runner:
        before = runner.run("step", usual)["next_state"]
        runner.run("step", unusual)
        np.testing.assert_array_equal(runner.run("step", usual)["next_state"], before)


def resident_mebibytes():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("max_batch", "turns"), [(1, True), (2, False)], ids=["one image at a time", "batches"])
def test_engines_for_one_image_at_a_time_hold_memory_in_turns(narrowed, max_batch, turns):
    bundle = narrowed(max_batch=max_batch)
    model = bundle.manifest.model
    small = {"input_ids": np.zeros((1, model.text_length), np.int64)}
    large = {"latent_sample": np.zeros((1, model.latent_channels, 192, 192), np.float32)}
    with open_runner(bundle, threads=1) as runner:
        runner.run("text_encoder", small)
        before = resident_mebibytes()
        first = runner.run("vae_decoder", large)["sample"]
        held = resident_mebibytes() - before
        runner.run("text_encoder", small)
        still_held = resident_mebibytes() - before
        again = runner.run("vae_decoder", large)["sample"]
    assert held > 50
    assert (still_held < held / 3) is turns
    np.testing.assert_array_equal(first, again)
