"""A bundle that was built without its device: what its seal says, and how the first verification completes it."""

from dataclasses import replace

import pytest

from sdrt.bundle import Bundle, write_manifest
from sdrt.engines.build import BuildOptions, build_bundle
from sdrt.errors import ParityError
from sdrt.progress import silent
from sdrt.verify import verify_bundle


@pytest.fixture
def waiting(tiny_export, tmp_path):
    """A bundle whose seal waits for a device, and which runs here."""
    target = tmp_path / "waiting.sdrt"
    build_bundle(tiny_export, target, BuildOptions(backend="onnxruntime", sizes="64x64", batch="1"), silent)
    bundle = Bundle.open(target)
    worse = replace(bundle.manifest.golden.parity, measured=0.5 / 255)
    golden = replace(bundle.manifest.golden, parity=worse)
    write_manifest(target, replace(bundle.manifest, golden=golden, device_verified=False), overwrite=True)
    return target


def test_the_first_verification_completes_the_seal_with_what_it_measured(waiting):
    assert verify_bundle(Bundle.open(waiting)).completed
    manifest = Bundle.open(waiting).manifest
    assert manifest.device_verified
    assert manifest.golden.parity.measured != 0.5 / 255
    assert not verify_bundle(Bundle.open(waiting)).completed


def test_a_device_that_draws_another_image_does_not_complete_it(waiting):
    bundle = Bundle.open(waiting)
    golden = replace(bundle.manifest.golden, seed=bundle.manifest.golden.seed + 1)
    write_manifest(waiting, replace(bundle.manifest, golden=golden), overwrite=True)
    with pytest.raises(ParityError, match="the golden image is off on this machine"):
        verify_bundle(Bundle.open(waiting))
    assert not Bundle.open(waiting).manifest.device_verified


def test_a_seal_that_is_complete_is_never_rewritten(waiting):
    verify_bundle(Bundle.open(waiting))
    before = (waiting / "bundle.json").read_bytes(), (waiting / "bundle.json").stat().st_mtime_ns
    verify_bundle(Bundle.open(waiting))
    assert ((waiting / "bundle.json").read_bytes(), (waiting / "bundle.json").stat().st_mtime_ns) == before
