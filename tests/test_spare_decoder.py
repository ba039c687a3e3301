"""An FP16 bundle's second decoder: when halves overflow at an image, float32 draws it, and the result says so."""

import numpy as np
import pytest

from sdrt.batcher import Batcher
from sdrt.bundle import Bundle
from sdrt.engines.build import BuildOptions, build_bundle
from sdrt.engines.components import input_specs
from sdrt.engines.onnx_files import load_graph
from sdrt.engines.optimization import optimization_profiles
from sdrt.pipeline import Pipeline
from sdrt.progress import silent
from sdrt.request import Request
from sdrt.runners.base import VAE_DECODER, VAE_DECODER_FLOAT32
from sdrt.runners.tensorrt import TensorRtRunner
from tests.component_source import source_of
from tests.simulated_cuda import SimulatedCuda

REQUEST = Request(prompt="a red circle", num_inference_steps=2, seed=1, height=64, width=64)


@pytest.fixture(scope="module")
def bundle(tiny_export, tmp_path_factory):
    target = tmp_path_factory.mktemp("bundles") / "halves.sdrt"
    options = BuildOptions(backend="onnxruntime", precision="fp16", sizes="64..128", batch="1..2", threads=1)
    build_bundle(tiny_export, target, options, silent)
    return Bundle.open(target)


@pytest.fixture
def cuda(bundle):
    profiles = {
        record.name: optimization_profiles(
            source_of(bundle, record.name), input_specs(load_graph(bundle.file(record.files[0])))
        )
        for record in bundle.manifest.components
    }
    return SimulatedCuda(profiles)


@pytest.fixture
def pipeline(bundle, cuda):
    with Pipeline(bundle, TensorRtRunner(bundle, cuda)) as pipeline:
        yield pipeline


def engines(cuda):
    return {engine.component for engine in cuda.engines}


def test_it_is_not_even_loaded_while_nothing_overflows(pipeline, cuda):
    result = pipeline.generate(REQUEST)
    assert result.warnings == ()
    assert pipeline.float32_decodes == 0
    assert VAE_DECODER_FLOAT32 not in engines(cuda)


def test_it_draws_the_image_that_overflowed(pipeline, cuda):
    usual = np.asarray(pipeline.generate(REQUEST).images[0]).astype(int)
    cuda.poison = (VAE_DECODER, "sample")
    result = pipeline.generate(REQUEST)
    assert result.warnings == ("the VAE overflowed in float16, so it decoded again in float32",)
    assert pipeline.float32_decodes == 1
    assert np.abs(np.asarray(result.images[0]) - usual).max() <= 8  # the other precision, the same picture
    assert pipeline.generate(REQUEST).warnings == ()


def test_only_the_request_that_overflowed_is_told(pipeline, cuda):
    with Batcher(pipeline, max_batch=2) as batcher:
        cuda.poison = (VAE_DECODER, "sample")
        results = [ticket.result(60) for ticket in [batcher.submit(REQUEST), batcher.submit(REQUEST)]]
    assert sorted(len(result.warnings) for result in results) == [0, 1]
