import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from sdrt.bundle import (
    FORMAT_VERSION,
    Bundle,
    FileRecord,
    ShapeProfile,
    TensorSpec,
    _seal,
    read_manifest,
    record_file,
    verify_files,
    write_manifest,
)
from sdrt.errors import BuildError, BundleError, OutputError

SPEC = importlib.util.spec_from_file_location("small_bundle", Path(__file__).parent / "small_bundle.py")
small_bundle = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small_bundle)


@pytest.fixture
def folder(tmp_path):
    small_bundle.write_bundle(tmp_path / "a.sdrt")
    return tmp_path / "a.sdrt"


def refused(path, *said):
    """The BundleError of opening `path`; its message and hint hold these texts."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    for text in said:
        assert text in f"{caught.value.message} | {caught.value.hint}"
    assert caught.value.hint
    return caught.value


def forge(folder, change):
    """Change the manifest as JSON and seal it again, as an ill-meant or careless tool would."""
    manifest = json.loads((folder / "bundle.json").read_text())["manifest"]
    change(manifest)
    seal_text(folder, json.dumps(manifest).encode())


def seal_text(folder, body):
    (folder / "bundle.json").write_bytes(b'{"seal": "%s", "manifest": %s}' % (_seal(body).encode(), body))


# Writing and reading


def test_a_manifest_is_read_as_it_was_written(folder):
    manifest = small_bundle.describe(folder)
    assert read_manifest(folder) == manifest
    assert Bundle.open(str(folder)) == Bundle(path=folder, manifest=manifest)


def test_the_manifest_can_be_read_by_people_and_other_programs(folder):
    text = (folder / "bundle.json").read_text()
    assert json.loads(text)["manifest"]["model"]["vae_scaling_factor"] == 0.18215
    assert text.count("\n") > 100


def test_a_manifest_is_not_written_over_another(folder):
    with pytest.raises(OutputError, match="exists already"):
        write_manifest(folder, small_bundle.describe(folder))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_sealed(tmp_path, number):
    small_bundle.write_files(tmp_path)
    manifest = small_bundle.describe(tmp_path)
    parity = replace(manifest.golden.parity, measured=number)
    model = replace(manifest.model, scheduler_config={"beta_start": number})
    for wrong in (
        replace(manifest, golden=replace(manifest.golden, parity=parity)),
        replace(manifest, model=model),
    ):
        with pytest.raises(BuildError, match="NaN"):
            write_manifest(tmp_path, wrong)
    assert not (tmp_path / "bundle.json").exists()


def test_a_manifest_that_contradicts_itself_is_not_sealed(tmp_path):
    small_bundle.write_files(tmp_path)
    manifest = small_bundle.describe(tmp_path)
    with pytest.raises(BuildError, match="one name"):
        write_manifest(tmp_path, replace(manifest, components=manifest.components * 2))
    assert not (tmp_path / "bundle.json").exists()


def test_a_file_is_recorded_with_its_hash_size_and_place(folder):
    path = folder / "engines" / "step" / "model.bin"
    record = record_file(folder, path)
    assert record.path == "engines/step/model.bin"
    assert record.size_bytes == path.stat().st_size
    assert record_file(folder, path, sha256="b" * 64).sha256 == "b" * 64


def test_engines_are_found_by_name(folder):
    bundle = Bundle.open(folder)
    assert bundle.component("step").name == "step"
    with pytest.raises(BundleError, match="no engine 'stp'; it has text_encoder, step"):
        bundle.component("stp")


def test_every_listed_file_is_enumerated_once(folder):
    listed = [record.path for record in Bundle.open(folder).files()]
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted([*listed, "bundle.json"]) == sorted(there)


def test_files_that_are_not_listed_are_nobodys_concern(folder):
    (folder / "notes.txt").write_text("mine")
    verify_files(Bundle.open(folder))


def test_a_bundle_may_be_moved_and_reached_through_a_link(folder, tmp_path):
    folder.rename(tmp_path / "b")
    (tmp_path / "link").symlink_to("b")
    verify_files(Bundle.open(tmp_path / "link"))


def test_verifying_reports_its_progress_up_to_the_end(folder):
    reports = []
    verify_files(Bundle.open(folder), lambda *report: reports.append(report))
    assert reports == [("hashes", done, 10) for done in range(11)]


# What is no bundle


def test_a_path_that_is_missing(tmp_path):
    refused(tmp_path / "nowhere", "there is no bundle at", "check the path")
    refused("a\0b", "there is no bundle at")
    refused(tmp_path / ("x" * 300), "too long")


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "model.safetensors", "is a file, not a bundle")


@pytest.mark.parametrize("kind", ["model_index.json", "unet/model.onnx", "unet/config.json"])
def test_a_checkpoint_or_an_onnx_folder(tmp_path, kind, monkeypatch):
    model = tmp_path / "model"
    (model / kind).parent.mkdir(parents=True)
    (model / kind).write_text("{}")
    refused(model, "is a model, not a bundle", f"build it first: sdrt build {model} --out model.sdrt")
    monkeypatch.chdir(model)
    refused(".", "sdrt build . --out model.sdrt")


def test_an_unfinished_build(folder):
    (folder / "bundle.json").unlink()
    refused(folder, "its build was not finished", "run the same sdrt build again")


def test_any_other_folder(tmp_path):
    refused(tmp_path, "it has no bundle.json", "sdrt build")


def test_a_manifest_that_cannot_be_read(folder):
    (folder / "bundle.json").unlink()
    (folder / "bundle.json").mkdir()
    refused(folder, "Is a directory")


# A manifest that is not right


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"not JSON",
        b"\xff\xfe",
        b'{"seal": 1, "manifest": {}}',
        b'{"seal": "", "manifest": null}',
        b'{"seal": "", "manifest": {}, "more": 1}',
        b'{"seal": "\xff", "manifest": {"format_version": 1, "sdrt_version": "0"}}',
        b'{"seal": "", "manifest": {"format_version": 1, "sdrt_version": "\xff"}}',
        b'{"seal": "", "manifest": {"format_version": true, "sdrt_version": "0"}}',
        b'{"seal": "", "manifest": {"format_version": 1e400, "sdrt_version": "0"}}',
        b'{"seal": "", "manifest": {"format_version": ' + b"9" * 5000 + b', "sdrt_version": "0"}}',
        b'{"seal": "", "manifest": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"seal": "", "manifest": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    ],
)
def test_a_manifest_that_is_none(folder, text):
    (folder / "bundle.json").write_bytes(text)
    refused(folder, "is damaged", "sdrt build")


@pytest.mark.parametrize(
    ("version", "kind"), [(FORMAT_VERSION + 1, "newer"), (FORMAT_VERSION - 1, "older"), (-1, "older")]
)
def test_another_format_is_named_with_what_to_do_whatever_else_it_holds(folder, version, kind):
    body = b'{"format_version": %d, "sdrt_version": "7.8.9", "other": []}' % version
    (folder / "bundle.json").write_bytes(b'{"seal": "of another kind", "manifest": %s}' % body)
    refused(folder, f"{kind} bundle format {version}", "sdrt 7.8.9", f"reads format {FORMAT_VERSION}", "sdrt build")


def test_a_manifest_that_was_edited_after_it_was_sealed(folder):
    text = (folder / "bundle.json").read_text()
    assert text.count("0.18215") == 1
    (folder / "bundle.json").write_text(text.replace("0.18215", "0.13025"))
    refused(folder, "was changed after it was sealed")


def test_white_space_is_part_of_what_is_sealed(folder):
    text = (folder / "bundle.json").read_text()
    (folder / "bundle.json").write_text(text.replace("\n  ", "\n   ", 1))
    refused(folder, "was changed after it was sealed")


@pytest.mark.parametrize("where", ["model", "backend", "precision", "state_slots", "components", "golden"])
def test_a_sealed_manifest_that_lacks_something(folder, where):
    forge(folder, lambda manifest: manifest.pop(where))
    refused(folder, "is not a manifest", where)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(precision="fp8"),
        lambda manifest: manifest.update(state_slots="6"),
        lambda manifest: manifest.update(state_slots=6.5),
        lambda manifest: manifest["backend"].update(name="pickle"),
        lambda manifest: manifest["model"].update(task="text-to-speech"),
        lambda manifest: manifest["profile"].update(minimum=[64]),
        lambda manifest: manifest["model"].update(vae_scaling_factor=None),
    ],
)
def test_a_sealed_manifest_with_a_wrong_value(folder, change):
    forge(folder, change)
    refused(folder, "is not a manifest", "$")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["components"].append(m["components"][0]), "one name"),
        (lambda m: m["components"][1].update(files=[]), "the engine step has no file"),
        (lambda m: m["components"][0]["inputs"][0].update(dtype="object"), "unknown type 'object'"),
        (lambda m: m["components"][0]["outputs"][0].update(dtype="O"), "unknown type 'O'"),
        (lambda m: m["golden"]["file"].update(size_bytes=-1), "golden/image.npz"),
        (lambda m: m["tokenizer"][0].update(sha256="A" * 64), "tokenizer/tokenizer.json"),
        (lambda m: m["tokenizer"][0].update(sha256=""), "tokenizer/tokenizer.json"),
        (lambda m: m["model"].update(vae_scaling_factor=0), "vae_scaling_factor is 0"),
        (lambda m: m["model"].update(vae_downsample=-8), "vae_downsample is -8"),
        (lambda m: m["profile"].update(multiple_of=0), "multiple_of is 0"),
        (lambda m: m["profile"].update(max_batch=0), "max_batch is 0"),
    ],
)
def test_a_sealed_manifest_that_contradicts_itself(folder, change, said):
    forge(folder, change)
    refused(folder, "contradicts itself", said)


def test_a_scheduler_config_without_end_is_refused(folder):
    body = msgspec.json.encode(small_bundle.describe(folder))
    deep = b'"scheduler_config":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b","
    seal_text(folder, body.replace(b'"scheduler_config":{', deep, 1))
    refused(folder, "is damaged")


# Files that are not as listed


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/etc/passwd",
        "engines/../../outside",
        "C:\\outside",
        "..\\outside",
        "engines\\step",
        "a\x00b",
        "",
        ".",
        "..",
        "loop",
        "out",
    ],
)
def test_a_listed_path_that_leaves_the_bundle(folder, path):
    (folder.parent / "outside").write_bytes(b"")
    (folder / "loop").symlink_to("loop")
    (folder / "out").symlink_to("../outside")
    forge(folder, lambda manifest: manifest["golden"]["file"].update(path=path, size_bytes=0))
    refused(folder, repr(path))


def test_a_listed_folder_that_is_a_link_to_the_outside(folder):
    (folder / "tokenizer").rename(folder.parent / "elsewhere")
    (folder / "tokenizer").symlink_to("../elsewhere")
    refused(folder, "leads outside", "through a link")


def test_a_path_is_checked_again_whenever_it_is_used(folder):
    bundle = Bundle.open(folder)
    record = FileRecord(path="../outside", sha256="0" * 64, size_bytes=0)
    with pytest.raises(BundleError, match="leaves"):
        bundle.file(record)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "engines/step/model.bin is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "is 3 bytes shorter than its manifest says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"12"), "is 2 bytes longer than its manifest says"),
    ],
)
def test_a_file_that_is_missing_or_of_another_size_is_found_on_opening(folder, damage, said):
    damage(folder / "engines" / "step" / "model.bin")
    refused(folder, said, "copy the bundle again, or rebuild it with: sdrt build")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_listed_file_that_is_something_else(folder, kind):
    path = folder / "golden" / "image.npz"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    forge(folder, lambda manifest: manifest["golden"]["file"].update(size_bytes=path.stat().st_size))
    refused(folder, "is not a file")


def test_a_file_that_goes_after_the_bundle_was_opened_is_found_by_verify(folder):
    bundle = Bundle.open(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        verify_files(bundle)


def test_a_file_that_the_disk_cannot_read_is_a_bundle_error(folder, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    bundle = Bundle.open(folder)
    monkeypatch.setattr("sdrt.bundle.sha256_of", broken)
    with pytest.raises(BundleError, match="Input/output error"):
        verify_files(bundle)


# Shape profiles


@pytest.mark.parametrize(
    ("size", "accepted"),
    [
        ((64, 64), True),
        ((128, 96), True),
        ((72, 64), True),
        ((65, 64), False),
        ((64, 65), False),
        ((56, 64), False),
        ((64, 136), False),
        ((0, 0), False),
        ((-64, -64), False),
    ],
)
def test_a_range_accepts_its_grid_and_its_ends(size, accepted):
    profile = ShapeProfile(sizes=(), minimum=(64, 64), maximum=(128, 128), multiple_of=8, max_batch=1, text_length=77)
    assert profile.accepts(*size) is accepted


def test_a_list_accepts_what_it_lists_in_height_and_width():
    profile = ShapeProfile(
        sizes=((64, 128),), minimum=(64, 128), maximum=(64, 128), multiple_of=8, max_batch=1, text_length=77
    )
    assert profile.accepts(64, 128)
    assert not profile.accepts(128, 64)
    assert not profile.accepts(64, 64)


def test_dynamic_dimensions_keep_their_names(folder):
    assert Bundle.open(folder).component("step").inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),)
