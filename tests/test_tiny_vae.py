"""A tiny VAE beside the checkpoint's own: exported and checked with it; for previews, and where it is asked for."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sdrt
from sdrt.batcher import Batcher
from sdrt.bundle import Bundle, TinyVaeRecord, write_manifest
from sdrt.cache import Store
from sdrt.cli import run_command
from sdrt.engines.bisect_stage import bisect_bundle, check_same_model
from sdrt.engines.build import BuildOptions, build_bundle, component_source
from sdrt.engines.halves import make_mixed_graph
from sdrt.engines.onnx_folder import read_onnx_folder
from sdrt.engines.onnx_session import run_onnx
from sdrt.engines.optimization import optimization_profiles
from sdrt.engines.profile import parse_profile
from sdrt.engines.reference import golden_inputs
from sdrt.engines.seal import FLOAT32_BOUND, FP16_BOUNDS, read_golden
from sdrt.errors import BuildError, CheckpointError, ParityError, RequestError
from sdrt.export.checkpoint import identity_of, model_record, open_checkpoint
from sdrt.export.package import _component_key, export_model
from sdrt.noise import TorchGenerator
from sdrt.parity import max_relative
from sdrt.progress import silent
from sdrt.request import Request
from sdrt.runners.base import TINY_VAE_DECODER, VAE_DECODER
from tests.component_source import source_of
from tests.conftest import run_build

RECORD = TinyVaeRecord(name="fake-tiny", identity="e" * 64, scaling_factor=2.0)
OPTIONS = {"prompt": "red", "scheduler": "ddim", "num_inference_steps": 4, "seed": 3}
REQUEST = Request(**OPTIONS)
SCALING = 0.5  # unlike that of TAESD, so that it counts


def make_tiny_vae(folder, seed=0, **config):
    import diffusers

    torch.manual_seed(seed)
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    options = {"scaling_factor": SCALING, **blocks, **widths, **config}
    diffusers.AutoencoderTiny(**options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_vae(made_once):
    return made_once("taesd", make_tiny_vae)


class TestPolicy:
    """With `FakeRunner`, whose tiny decoder shows other channels."""

    def expected(self, latents, scaling_factor):
        larger = np.tanh(latents[[1, 2, 3]] / np.float32(scaling_factor)).repeat(8, 1).repeat(8, 2)
        return np.round((larger.transpose(1, 2, 0) * 0.5 + 0.5).clip(0, 1) * 255).astype(np.uint8)

    def test_a_request_that_asks_is_decoded_by_it_with_its_own_scaling_factor(self, fake):
        pipeline = fake(tiny_vae=RECORD)
        result = pipeline.generate(Request(**OPTIONS, vae="tiny"))
        assert {name: pipeline.runner.calls.get(name, 0) for name in (VAE_DECODER, TINY_VAE_DECODER)} == {
            VAE_DECODER: 0,
            TINY_VAE_DECODER: 1,
        }
        np.testing.assert_array_equal(np.asarray(result.images[0]), self.expected(result.latents[0], 2.0))
        assert result.images[0].tobytes() == pipeline.decode(result.latents, vae="tiny")[0].tobytes()
        full = pipeline.generate(REQUEST)
        np.testing.assert_array_equal(result.latents, full.latents)
        assert full.images[0].tobytes() == pipeline.decode(result.latents)[0].tobytes() != result.images[0].tobytes()

    def test_previews_are_decoded_by_it_and_the_finished_image_is_not(self, fake):
        pipeline = fake(tiny_vae=RECORD)
        *steps, last = pipeline.stream(REQUEST, preview=True)
        assert pipeline.runner.calls[TINY_VAE_DECODER] == len(steps) == 3
        assert pipeline.runner.calls[VAE_DECODER] == 1
        scale = np.float32(pipeline.resolve(REQUEST).plan.input_scales[1])
        shown = np.asarray(steps[0].preview[0])
        np.testing.assert_array_equal(shown, self.expected(steps[0].latents[0] * scale, 2.0))
        assert last.preview[0].tobytes() == fake().generate(REQUEST).images[0].tobytes()

    def test_previews_of_a_bundle_without_one_are_the_full_vae_s(self, fake):
        pipeline = fake()
        list(pipeline.stream(REQUEST, preview=True))
        assert pipeline.runner.calls[VAE_DECODER] == 4
        assert TINY_VAE_DECODER not in pipeline.runner.calls

    def test_requests_with_either_share_a_batch(self, fake):
        requests = [
            Request(**{**OPTIONS, "vae": name, "seed": seed}) for seed, name in enumerate(["tiny", None, "full"])
        ]
        with Batcher(fake(tiny_vae=RECORD)) as batcher:
            together = [ticket.result(10) for ticket in [batcher.submit(request) for request in requests]]
        for request, result in zip(requests, together, strict=True):
            assert result.images[0].tobytes() == fake(tiny_vae=RECORD).generate(request).images[0].tobytes()

    def test_a_second_pass_of_pixels_begins_with_what_it_decoded(self, fake):
        pipeline = fake(tiny_vae=RECORD)
        options = {**OPTIONS, "vae": "tiny"}
        first = pipeline.generate(Request(**options)).images[0].resize((128, 128), Image.Resampling.LANCZOS)
        by_hand = pipeline.generate(Request(**options, image=first, strength=0.7)).images[0]
        made = pipeline.generate(Request(**options, hires_scale=2, hires_upscaler="lanczos")).images[0]
        assert made.tobytes() == by_hand.tobytes()
        assert VAE_DECODER not in pipeline.runner.calls

    def test_the_image_remembers_it(self, fake):
        parameters = fake(tiny_vae=RECORD).generate(Request(**OPTIONS, vae="tiny")).parameters(0)
        assert (parameters["vae"], parameters["tiny_vae_identity"]) == ("tiny", RECORD.identity)
        assert "tiny_vae_identity" not in fake(tiny_vae=RECORD).generate(REQUEST).parameters(0)

    @pytest.mark.parametrize(
        ("name", "record", "reason"),
        [
            ("tiny", None, "was built without a tiny VAE"),
            ("taesd", RECORD, "vae is 'taesd'"),
            (1, RECORD, "vae is 1"),
        ],
    )
    def test_what_the_bundle_does_not_have_is_refused_before_any_compute(self, fake, name, record, reason):
        pipeline = fake(tiny_vae=record)
        for refused in (
            lambda: pipeline.stream(Request(**OPTIONS, vae=name)),
            lambda: pipeline.decode(np.zeros((1, 4, 8, 8), np.float32), vae=name),
        ):
            with pytest.raises(RequestError, match=reason) as raised:
                refused()
            assert raised.value.hint
        assert not pipeline.runner.calls


class TestFolder:
    """What is refused before the export, and what the identities hold."""

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            ({"latent_channels": 16}, "decodes 16 channels into 3, 8 times as large; the checkpoint's VAE 4 channels"),
            ({"num_decoder_blocks": [1, 1, 1]}, "4 times as large"),
            ({"num_decoder_blocks": 4}, "damaged"),
            ({"_class_name": "AutoencoderKL"}, "is a AutoencoderKL, not an AutoencoderTiny"),
            ({"scaling_factor": 0}, "scaling_factor of .* is 0"),
            ({"scaling_factor": "1"}, "scaling_factor of .* is '1'"),
        ],
    )
    def test_of_another_model_or_none_is_refused(self, tiny_vae, tiny_checkpoint, tmp_path, config, reason):
        folder = shutil.copytree(tiny_vae, tmp_path / "other")
        content = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=reason) as raised:
            export_model(tiny_checkpoint, tmp_path / "out", tiny_vae=folder)
        assert raised.value.hint
        assert not (tmp_path / "out").exists()

    def test_that_is_not_there_or_has_no_weights_is_refused(self, tiny_vae, tiny_checkpoint, tmp_path):
        with pytest.raises(CheckpointError, match="there is no tiny VAE"):
            open_checkpoint(tiny_checkpoint, tiny_vae=tmp_path / "nowhere")
        (tmp_path / "bare").mkdir()
        shutil.copy(tiny_vae / "config.json", tmp_path / "bare")
        with pytest.raises(CheckpointError, match="no safetensors weights"):
            open_checkpoint(tiny_checkpoint, tiny_vae=tmp_path / "bare")

    def test_has_an_identity_of_its_own_and_leaves_the_model_s(self, tiny_vae, tiny_checkpoint, tmp_path):
        store = Store(tmp_path / "cache")
        plain = open_checkpoint(tiny_checkpoint)
        folders = (tiny_vae, make_tiny_vae(tmp_path / "other", seed=1))
        both = [open_checkpoint(tiny_checkpoint, tiny_vae=folder) for folder in folders]
        assert {identity_of(each, store) for each in (plain, *both)} == {identity_of(plain, store)}
        assert len({model_record(each, store).tiny_vae.identity for each in both}) == 2
        # Other weights are another key, for its component alone.
        assert len({_component_key(each, TINY_VAE_DECODER, store) for each in both}) == 2
        assert len({_component_key(each, "vae_decoder", store) for each in (plain, *both)}) == 1

    def test_beside_a_model_that_was_exported_already_is_refused(self, tiny_vae, tiny_export, tmp_path, capsys):
        command = ["build", str(tiny_export), "--tiny-vae", str(tiny_vae), "--out", str(tmp_path / "a.sdrt")]
        assert run_command(command) == 2
        assert "was exported already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tiny_export, tiny_vae, made_once):
    """All but the tiny VAE comes from the cache."""
    return made_once("tiny-vae-onnx", lambda target: export_model(tiny_checkpoint, target, tiny_vae=tiny_vae))


@pytest.fixture(scope="module")
def bundle(exported, tiny_checkpoint, tiny_vae, made_once):
    """By the command line; the exported components come from the cache."""
    options = ["--precision", "fp32", "--sizes", "64..128", "--threads", "1", "--tiny-vae", str(tiny_vae)]
    return made_once("tiny-vae.sdrt", lambda target: run_build(str(tiny_checkpoint), target, *options))


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
class TestOnEngines:
    def test_its_engine_is_checked_against_pytorch_like_the_others(self, bundle, tiny_bundle):
        manifest = Bundle.open(bundle).manifest
        assert [each.name for each in manifest.components][-1] == TINY_VAE_DECODER
        parity = manifest.components[-1].parity
        assert (parity.metric, parity.bound) == ("max_relative", 2e-4)
        assert 0 < parity.measured <= parity.bound
        assert (manifest.model.tiny_vae.name, manifest.model.tiny_vae.scaling_factor) == ("taesd", SCALING)
        assert manifest.model.identity == Bundle.open(tiny_bundle).manifest.model.identity

    def test_a_manifest_that_names_it_without_its_engine_is_refused(self, bundle):
        manifest = Bundle.open(bundle).manifest
        others = tuple(component for component in manifest.components if component.name != TINY_VAE_DECODER)
        with pytest.raises(BuildError, match="no engine tiny_vae_decoder"):
            write_manifest(bundle, replace(manifest, components=others), overwrite=True)

    def test_bisection_wants_the_one_that_was_built_in(self, bundle, exported):
        opened, folder = Bundle.open(bundle), read_onnx_folder(exported)
        check_same_model(opened, folder)
        check_same_model(opened, replace(folder, model=replace(folder.model, tiny_vae=None)))
        with pytest.raises(CheckpointError, match="the tiny VAE is not the one this bundle was built from"):
            check_same_model(opened, replace(folder, model=replace(folder.model, tiny_vae=RECORD)))

    def test_it_is_bisected_where_the_model_is_named_with_it(self, bundle, exported, tiny_export, tmp_path):
        opened = Bundle.open(bundle)
        its = (opened.component(TINY_VAE_DECODER),)
        halves = replace(opened, manifest=replace(opened.manifest, precision="fp16", components=its))
        options = {"bound": FP16_BOUNDS[TINY_VAE_DECODER], "threads": 1, "progress": silent}
        (found,) = bisect_bundle(halves, exported, tmp_path, **options)
        assert (found.component, found.findings.losses) == (TINY_VAE_DECODER, ())
        with pytest.warns(UserWarning, match="without its tiny VAE"):
            assert bisect_bundle(halves, tiny_export, tmp_path, **options) == []

    def test_an_engine_that_disagrees_is_not_sealed(self, exported, tmp_path):
        folder = shutil.copytree(exported, tmp_path / "onnx")
        path = folder / "golden" / "tiny_vae_decoder.npz"
        with np.load(path) as golden:
            arrays = dict(golden)
        arrays["output.sample"] = arrays["output.sample"] + np.float32(0.01)
        np.savez(path, **arrays)
        options = BuildOptions(backend="openvino", precision="fp32", sizes="64..128", threads=1)
        with pytest.raises(ParityError, match=r"tiny_vae_decoder is off by"):
            build_bundle(folder, tmp_path / "a.sdrt", options, silent)

    def test_the_image_is_that_of_the_reference_s_pipeline_with_this_vae(self, bundle, tiny_checkpoint, tiny_vae):
        import diffusers

        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            tiny_checkpoint, vae=diffusers.AutoencoderTiny.from_pretrained(tiny_vae), safety_checker=None
        )
        pipeline.set_progress_bar_config(disable=True)
        arguments = {"prompt": "a red circle", "num_inference_steps": 3, "height": 64, "width": 96}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more cost more than such a small network takes
        expected = pipeline(generator=torch.Generator().manual_seed(5), **arguments).images[0]
        torch.set_num_threads(threads)
        with sdrt.open(bundle, threads=1) as opened:
            made = opened.generate(Request(**arguments, seed=5, vae="tiny")).images[0]
            full = opened.generate(Request(**arguments, seed=5)).images[0]
        assert np.abs(np.asarray(made, int) - np.asarray(expected, int)).max() <= 1
        assert np.abs(np.asarray(full, int) - np.asarray(expected, int)).max() > 5

    def test_the_command_line_decodes_with_it(self, bundle, tmp_path, capsys):
        latents, out = tmp_path / "latents.npy", tmp_path / "out.png"
        np.save(latents, TorchGenerator(0).randn((1, 4, 8, 8)))
        assert run_command(["decode", str(bundle), str(latents), "--vae", "tiny", "--out", str(out)]) == 0
        with sdrt.open(bundle, threads=1) as opened, Image.open(out) as made:
            assert made.tobytes() == opened.decode(np.load(latents), vae="tiny")[0].tobytes()
        assert run_command(["inspect", str(bundle)]) == 0
        shown = capsys.readouterr().out
        assert "taesd" in shown
        assert TINY_VAE_DECODER in shown

    def test_a_folder_that_lacks_its_graph_is_refused(self, exported, tmp_path):
        folder = shutil.copytree(exported, tmp_path / "onnx")
        (folder / TINY_VAE_DECODER / "model.onnx").unlink()
        with pytest.raises(CheckpointError, match=r"lacks tiny_vae_decoder/model\.onnx"):
            read_onnx_folder(folder)

    def test_its_halves_are_within_what_the_seal_allows_them(self, exported, tmp_path):
        folder = read_onnx_folder(exported)
        profile = parse_profile("64..128", "1..4", default=(64, 64), multiple_of=8, text_length=77)
        inputs = golden_inputs(folder, profile)[TINY_VAE_DECODER]
        source = component_source(TINY_VAE_DECODER, folder, profile)
        mixed = make_mixed_graph(source, folder, inputs, tmp_path, Store(tmp_path / "cache"), threads=1)
        (made,) = run_onnx(mixed.emulated.onnx_path, [inputs], threads=1)
        golden = read_golden(folder.golden_path(TINY_VAE_DECODER)).outputs["sample"]
        assert FLOAT32_BOUND < max_relative(made["sample"], golden) <= FP16_BOUNDS[TINY_VAE_DECODER]

    def test_a_gpu_s_engine_takes_the_tiles_that_the_full_one_takes(self, bundle):
        opened = Bundle.open(bundle)
        profiles = [
            optimization_profiles(replace(source_of(opened, VAE_DECODER), name=name), opened.component(name).inputs)
            for name in (VAE_DECODER, TINY_VAE_DECODER)
        ]
        assert profiles[0] == profiles[1]
