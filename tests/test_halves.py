"""The mixed graphs of a build: what enters their cache key, and what the checkpoint's configs ask for."""

import json
import shutil

import pytest

from sdrt.cache import Store
from sdrt.engines import halves
from sdrt.engines.build import component_source
from sdrt.engines.halves import make_mixed_graph
from sdrt.engines.onnx_folder import read_onnx_folder
from sdrt.engines.profile import parse_profile
from sdrt.engines.reference import golden_inputs
from sdrt.engines.step_graph import PREFIX
from sdrt.runners.base import STEP, TEXT_ENCODER
from sdrt.step_border import step_inputs_of


@pytest.fixture
def model(tiny_export, tmp_path):
    """A copy of the tiny model's ONNX folder, to be changed."""
    return shutil.copytree(tiny_export, tmp_path / "onnx")


@pytest.fixture
def make(model, tmp_path):
    """Make the mixed graph of a component, with a cache that lasts."""
    count = iter(range(100))

    def make(component):
        folder = read_onnx_folder(model)
        own = folder.model
        profile = parse_profile(
            None,
            "1",
            default=(own.default_height, own.default_width),
            multiple_of=own.size_multiple,
            text_length=own.text_length,
        )
        work = tmp_path / f"work-{next(count)}"
        inputs = golden_inputs(folder, profile)[component]
        return make_mixed_graph(
            component_source(component, folder, profile), folder, inputs, work, Store(tmp_path / "cache"), threads=1
        )

    return make


@pytest.fixture
def conversions(monkeypatch):
    """The components that were converted, not taken from the cache."""
    converted = []
    original = halves.convert_to_half

    def counted(source, *arguments, **options):
        converted.append(options)
        return original(source, *arguments, **options)

    monkeypatch.setattr(halves, "convert_to_half", counted)
    return converted


def test_a_second_time_it_comes_from_the_cache_with_its_report(make, conversions):
    first, second = make(TEXT_ENCODER), make(TEXT_ENCODER)
    assert len(conversions) == 1
    assert second.report == first.report
    assert second.source.onnx_path.read_bytes() == first.source.onnx_path.read_bytes()
    assert second.emulated.onnx_path.is_file()


@pytest.mark.parametrize("flag", ["upcast_attention", "force_upcast"])
def test_what_the_config_asks_for_is_done_and_enters_the_key(make, conversions, model, flag):
    make(STEP)
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps({**config, flag: True}))
    changed = make(STEP)
    assert [options[flag] for options in conversions] == [False, True]
    assert ("upcast_attention" in changed.islands.by_rule) == (flag == "upcast_attention")


def test_other_calibration_inputs_are_another_graph(make, conversions, model):
    make(TEXT_ENCODER)
    shutil.copy(model / "golden" / "text_encoder.npz", model / "kept.npz")
    import numpy as np

    with np.load(model / "kept.npz") as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    changed["input.input_ids"] = changed["input.input_ids"][:, ::-1].copy()
    np.savez(model / "golden" / "text_encoder.npz", **changed)
    make(TEXT_ENCODER)
    assert len(conversions) == 2


def test_the_step_graph_is_composed_and_its_own_nodes_stay_float32(make):
    import onnx

    made = make(STEP)
    graph = onnx.load(made.source.onnx_path, load_external_data=False).graph
    assert tuple(value.name for value in graph.input) == tuple(entry.name for entry in step_inputs_of())
    own = sum(node.name.startswith(PREFIX) and node.op_type != "Cast" for node in graph.node)
    assert made.islands.by_rule["step graph"] == own
