"""What a TensorRT bundle needs of a machine: each thing that does not fit is its own error, before an engine loads."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from sdrt import runners
from sdrt.bundle import BackendRecord
from sdrt.engines.tensorrt import TensorRtBuilder
from sdrt.engines.tensorrt_child import CURRENT
from sdrt.errors import BackendError, BundleError
from sdrt.runners import nvidia
from sdrt.runners.nvidia import Device, check_device, check_version, library_of

ADA = Device(name="NVIDIA L4", compute_capability=(8, 9), memory_bytes=24 * 2**30)


def backend(version="1.7.1.116", device="cuda", features=("tensorrt_rtx",)):
    return BackendRecord(name="tensorrt", version=version, device=device, features=features)


def test_a_fitting_machine_is_accepted():
    check_version(backend(), "1.7.1.116")
    check_version(backend(), "1.7.1.204")  # another build of the same release
    check_device(backend(), ADA)
    check_device(backend(features=("tensorrt_rtx", "sm86", "sm89")), ADA)
    check_device(backend(device="sm89", features=("tensorrt",)), ADA)


@pytest.mark.parametrize("installed", ["1.7.2.1", "1.8.1.116", "2.7.1.116"])
def test_another_release_of_the_library_is_refused(installed):
    with pytest.raises(BundleError, match=rf"built with tensorrt_rtx 1.7.1.116; {installed} is installed"):
        check_version(backend(), installed)


@pytest.mark.parametrize(
    "record",
    [backend(features=("tensorrt_rtx", "sm120")), backend(device="sm90", features=("tensorrt",))],
    ids=["ahead of time for another", "on another GPU"],
)
def test_engines_for_another_architecture_are_refused(record):
    with pytest.raises(BackendError, match=r"built for sm(120|90); NVIDIA L4 is sm89"):
        check_device(record, ADA)


def test_a_gpu_that_is_too_old_is_refused_with_the_way_to_build_for_it():
    old = Device(name="Tesla T4", compute_capability=(7, 5), memory_bytes=2**34)
    with pytest.raises(BackendError, match=r"compute capability 7.5; engines of tensorrt_rtx need 8.0") as caught:
        check_device(backend(), old)
    assert "--target sm75" in caught.value.hint
    check_device(backend(features=("tensorrt_rtx", "sm75")), old)


def test_a_bundle_that_names_no_library_is_refused():
    with pytest.raises(BundleError, match="does not say which library it was built with, only sm89"):
        library_of(backend(features=("sm89",)))


def test_a_library_that_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(nvidia.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="tensorrt_rtx is not installed") as caught:
        nvidia.load_library("tensorrt_rtx")
    assert caught.value.hint == 'install it with: pip install "sdrt[tensorrt]"'


class FakeRuntime:
    """CUDA's runtime as it answers where something is missing."""

    class cudaError_t:  # noqa: N801
        cudaSuccess, cudaErrorInsufficientDriver, cudaErrorNoDevice = "ok", "cudaErrorInsufficientDriver", "none"

    def __init__(self, error, driver=0, count=0):
        self.error, self.driver, self.count = error, driver, count

    def cudaGetDeviceCount(self):
        return self.error, self.count

    def cudaDriverGetVersion(self):
        return "ok", self.driver

    def cudaRuntimeGetVersion(self):
        return "ok", 13020


@pytest.mark.parametrize(
    ("runtime", "text"),
    [
        (FakeRuntime("cudaErrorInsufficientDriver"), "there is no NVIDIA driver; .* need one for CUDA 13 or later"),
        (FakeRuntime("cudaErrorInsufficientDriver", driver=12040), "the NVIDIA driver is for CUDA 12.4; .* CUDA 13"),
        (FakeRuntime("none"), "there is no NVIDIA GPU that this process can use"),
        (FakeRuntime("ok", count=0), "there is no NVIDIA GPU that this process can use"),
    ],
)
def test_what_is_missing_is_told_apart(monkeypatch, runtime, text):
    monkeypatch.setattr(nvidia, "load_cuda_runtime", lambda: runtime)
    with pytest.raises(BackendError, match=text):
        nvidia.require_device()


def test_a_gpu_that_portable_engines_are_not_for_has_its_own():
    known = SimpleNamespace(
        ComputeCapability=SimpleNamespace(__members__={"NONE": 0, "SM80": 1, "SM89": 2, "CURRENT": 3})
    )
    library = nvidia.Library(name="tensorrt_rtx", version="1.7", module=known)
    assert nvidia.architectures(library) == ("sm80", "sm89")
    builders = {
        capability: TensorRtBuilder(
            library=library,
            gpu=nvidia.Device(name="a GPU", compute_capability=capability, memory_bytes=1),
            targets=targets,
        )
        for capability, targets in (((8, 9), ()), ((9, 0), ()), ((9, 1), ("sm80",)))
    }
    assert {capability: builder._targets() for capability, builder in builders.items()} == {
        (8, 9): (),
        (9, 0): (CURRENT,),
        (9, 1): ("sm80",),
    }
    assert builders[8, 9].features("fp16") == ("tensorrt_rtx",)
    assert builders[9, 0].features("fp16") == ("tensorrt_rtx", "sm90")


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"version": "1.8.0.1"}, BundleError, "was built with tensorrt_rtx 1.8.0.1"),
        ({"device": "sm120", "features": ("tensorrt_rtx",)}, BackendError, "was built for sm120"),
        ({"features": ("tensorrt_rtx", "sm86")}, BackendError, "was built for sm86"),
        ({"features": ()}, BundleError, "does not say which library"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_each_field_that_does_not_fit_is_an_error_before_any_engine_is_loaded(
    onnx_bundle, monkeypatch, changes, kind, text
):
    def untouched(*arguments):
        raise AssertionError("the device was touched")

    library = nvidia.Library(name="tensorrt_rtx", version="1.7.1.116", module=SimpleNamespace())
    monkeypatch.setattr(nvidia, "load_library", lambda name: library)
    monkeypatch.setattr(nvidia, "require_device", lambda: ADA)
    monkeypatch.setattr(runners, "_open_gpu", untouched)
    fitting = replace(onnx_bundle, manifest=replace(onnx_bundle.manifest, backend=backend()))
    with pytest.raises(AssertionError, match="was touched"):
        runners.open_runner(fitting)
    flipped = replace(fitting, manifest=replace(fitting.manifest, backend=replace(backend(), **changes)))
    with pytest.raises(kind, match=text):
        runners.open_runner(flipped)
