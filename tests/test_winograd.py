"""Winograd's minimal filtering: what it computes, which convolutions it is for, and what it needs."""

import gc

import numpy as np
import openvino
import pytest
from openvino import opset13 as opset

from sdrt.bundle import Bundle
from sdrt.runners import winograd
from sdrt.runners.openvino import OpenVinoRunner
from sdrt.runners.usual import usual_shapes
from tests.test_usual import narrowed, step_feeds  # noqa: F401  (a fixture)

FLOAT32_ERROR = 1e-5  # of values around 1, for sums of a few hundred products


def convolution(sizes, *, side=3, stride=1, pads=(1, 1), dilation=1, weights=None):
    images, channels, filters, height, width = sizes
    if weights is None:
        scale = 1 / np.sqrt(channels * side * side)
        weights = (np.random.default_rng(1).standard_normal((filters, channels, side, side)) * scale).astype(np.float32)
    data = opset.parameter([images, channels, height, width], np.float32)
    begin, end = pads
    node = opset.convolution(
        data, opset.constant(weights), [stride, stride], [begin, begin], [end, end], [dilation, dilation]
    )
    return openvino.Model([opset.result(node)], [data])


def filtered(model):
    return winograd.filter_minimally(model, lanes=8, threads=2)


def run(model, data):
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([data])[0]


def data_of(sizes):
    images, channels, _, height, width = sizes
    return np.random.default_rng(0).standard_normal((images, channels, height, width)).astype(np.float32)


@pytest.fixture
def any_gain(monkeypatch):
    monkeypatch.setattr(winograd, "_LEAST_GAIN", 0)


def test_its_transforms_filter_one_dimension():
    of_data, of_filters, of_products = winograd.transforms()
    data, weights = np.split(np.random.default_rng(0).standard_normal(9), [6])
    values = of_products @ ((of_filters @ weights) * (of_data @ data))
    assert np.allclose(values, np.correlate(data, weights, "valid"), atol=1e-12)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 5, 7, 4, 4),  # one tile
        (2, 8, 16, 8, 12),  # two images, not square
        (2, 6, 9, 36, 132),  # blocks of columns, the last one smaller
    ],
)
def test_it_computes_the_convolution(any_gain, sizes):
    model = convolution(sizes)
    kept = filtered(model)
    assert len(kept) == 1
    assert not [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    assert np.abs(run(model, data_of(sizes)) - run(convolution(sizes), data_of(sizes))).max() < FLOAT32_ERROR


@pytest.mark.parametrize("sizes", [(1, 4, 5, 24, 16), (2, 3, 5, 12, 132)])
def test_blocks_of_rows_and_groups_of_filters_join_without_a_seam(any_gain, monkeypatch, sizes):
    monkeypatch.setattr(winograd, "_BLOCK_BYTES", 1)  # a block for each row of tiles
    monkeypatch.setattr(winograd, "_GROUP_BYTES", 4 * 36 * sizes[1] * 2)  # two filters, and one in the last
    model = convolution(sizes)
    kept = filtered(model)
    assert kept
    assert np.abs(run(model, data_of(sizes)) - run(convolution(sizes), data_of(sizes))).max() < FLOAT32_ERROR


def test_its_error_is_about_twice_that_of_the_convolution(any_gain):
    sizes = (1, 320, 320, 16, 16)
    weights = (np.random.default_rng(2).standard_normal((320, 320, 3, 3)) / np.sqrt(2880)).astype(np.float32)
    data = data_of(sizes)
    padded = np.pad(data[0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    exact = np.einsum("kcij,chwij->khw", weights.astype(np.float64), windows, optimize=True)
    model = convolution(sizes, weights=weights)
    direct = run(model, data)[0] - exact
    kept = filtered(model)
    error = run(model, data)[0] - exact
    assert len(kept) == 1
    assert error.std() < 3 * direct.std()
    assert np.abs(error).max() < 5 * np.abs(direct).max()


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 8, 8, 8, 8), {"side": 1, "pads": (0, 0)}),
        ((1, 8, 8, 8, 8), {"side": 5, "pads": (2, 2)}),
        ((1, 8, 8, 8, 8), {"stride": 2}),
        ((1, 8, 8, 8, 8), {"pads": (0, 0)}),
        ((1, 8, 8, 8, 8), {"pads": (0, 1)}),
        ((1, 8, 8, 8, 8), {"dilation": 2, "pads": (2, 2)}),
        ((1, 8, 8, 6, 8), {}),
        ((1, 8, 8, 8, 10), {}),
    ],
)
def test_other_convolutions_stay_as_they_are(any_gain, sizes, options):
    model = convolution(sizes, **options)
    assert filtered(model) == ()
    assert [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]


def test_a_model_of_any_size_stays_as_it_is(any_gain):
    model = convolution((1, 8, 8, 8, 8))
    model.reshape([1, 8, -1, -1])
    assert filtered(model) == ()


@pytest.mark.parametrize(
    ("sizes", "lanes", "threads", "worth_it"),
    [
        ((2, 320, 320, 64, 64), 8, 2, True),
        ((2, 640, 640, 32, 32), 8, 2, True),
        ((2, 1280, 1280, 16, 16), 8, 2, True),
        ((2, 1280, 1280, 8, 8), 8, 2, False),  # transforming the filters takes longer than what is saved
        ((1, 256, 256, 256, 256), 8, 2, True),
        ((1, 128, 128, 512, 512), 8, 2, False),  # so does transforming the values
        ((2, 4, 320, 64, 64), 8, 2, False),
        ((2, 320, 320, 64, 64), 16, 2, False),  # a CPU that multiplies faster still moves as slowly
        ((2, 1280, 640, 32, 32), 16, 2, True),
        ((2, 320, 320, 64, 64), 8, 8, False),  # nor does it move faster for more threads
        ((2, 320, 320, 64, 64), 8, 1, True),
    ],
)
def test_only_convolutions_that_become_faster_are_replaced(sizes, lanes, threads, worth_it):
    assert (winograd.gain(*sizes, lanes=lanes, threads=threads) >= winograd._LEAST_GAIN) is worth_it


def test_the_transformed_filters_are_not_kept(any_gain):
    sizes = (1, 64, 256, 32, 32)
    model = convolution(sizes)
    kept = filtered(model)
    data = data_of(sizes)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compiled([data])
    nodes = compiled.get_runtime_model().get_ordered_ops()
    constants = [node for node in nodes if node.get_rt_info()["layerType"].get() == "Const"]
    largest = max(int(np.prod(node.output(0).get_shape())) for node in constants)
    assert kept
    assert largest <= 64 * 256 * 9


def test_the_weights_that_it_returns_are_those_the_model_reads(any_gain, monkeypatch):
    monkeypatch.setattr(winograd, "_GROUP_BYTES", 4 * 36 * 16 * 100)  # groups share their memory
    sizes = (1, 16, 300, 8, 8)
    expected = run(convolution(sizes), data_of(sizes))
    model = convolution(sizes)
    kept = filtered(model)
    gc.collect()
    assert [list(node.output(0).get_shape()) for node in kept] == [[300, 16, 3, 3]]
    assert np.abs(run(model, data_of(sizes)) - expected).max() < FLOAT32_ERROR


@pytest.mark.parametrize("first", [0.0, -1e30, 1e30])
def test_whatever_the_first_value_is_the_filters_are_the_same(any_gain, first):
    sizes = (1, 4, 4, 8, 8)
    data = data_of(sizes)
    data[0, 0, 0, 0] = first
    model = convolution(sizes)
    kept = filtered(model)
    assert kept
    far = (..., slice(4, 8), slice(4, 8))  # another tile than the value's
    assert np.abs(run(model, data)[far] - run(convolution(sizes), data)[far]).max() < FLOAT32_ERROR


def test_a_bundle_for_one_size_computes_the_same_with_it(any_gain, narrowed, monkeypatch):  # noqa: F811
    bundle: Bundle = narrowed()
    shapes = usual_shapes(bundle, bundle.component("step"))
    feeds = step_feeds(bundle, shapes["state"][0], shapes["timestep"][0])
    replaced = []

    def counted(model, **options):
        kept = winograd.filter_minimally(model, **options)
        replaced.append(len(kept))
        return kept

    def computed():
        with OpenVinoRunner(bundle, threads=2) as runner:
            return runner.run("step", feeds)["next_state"]

    by_default = computed()
    monkeypatch.setattr("sdrt.runners.openvino.filter_minimally", counted)
    minimal = computed()
    monkeypatch.setattr("sdrt.runners.openvino.is_x86", lambda: False)
    plain = computed()
    assert sum(replaced) > 0
    assert np.array_equal(minimal, by_default)
    assert 0 < np.abs(minimal - plain).max() < FLOAT32_ERROR
