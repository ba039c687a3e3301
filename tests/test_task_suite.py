"""The tasks suite: its checkpoints, what each side is asked to draw, and a run that keeps what it has finished."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdrt.benchmarks.baselines.pytorch import PIPELINES, load_pipeline
from sdrt.benchmarks.cases import with_pictures
from sdrt.benchmarks.contestants import PYTORCH_FP32, SDRT, Drawing
from sdrt.benchmarks.run import Record, Start
from sdrt.benchmarks.suites.checkpoints import make_checkpoint
from sdrt.benchmarks.suites.tasks import TASKS, case_of, layout_of, subjects_of, tasks_named
from sdrt.benchmarks.task_report import TasksReport, check_place, tasks_json, tasks_page, tasks_text, write_tasks
from sdrt.benchmarks.task_suite import Made, Settings, results_of
from sdrt.bundle import write_manifest
from sdrt.errors import BackendError, OutputError, RequestError
from sdrt.export.checkpoint import open_checkpoint
from sdrt.progress import silent
from sdrt.tasks import KINDS
from sdrt.worker import run_child
from tests import small_bundle

SETTINGS = Settings(
    scale="small",
    precision="fp32",
    threads=1,
    steps=2,
    rounds=2,
    warmup=0,
    cold_starts=1,
    resident="all",
    peers=("pytorch-fp32",),
)
MACHINE = {
    "cpu": "x",
    "cores": 2,
    "memory_gib": 4,
    "cpu_features": ["avx2"],
    "system": "s",
    "load_average": 0.0,
    "python": "3",
    "sdrt": "1",
    "source": "abc",
    "commit": None,
    "packages": {"numpy": "2"},
}
SD1 = ("text-to-image", "image-to-image", "inpainting")
# Millions, of stable-diffusion-v1-5 and what was fine-tuned from it, stable-diffusion-2-depth and -x4-upscaler.
UNET_PARAMETERS = {
    "sd1": 860,
    "sd1-inpainting": 860,
    "sd1-editing": 860,
    "sd1-controlnet": 860,
    "sd2-depth": 866,
    "x4-upscaler": 473,
}
CHANNELS = {"sd1-inpainting": 9, "sd1-editing": 8, "sd2-depth": 5, "x4-upscaler": 7}  # others have 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The small checkpoint of each subject."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for subject in subjects_of(TASKS):
        make_checkpoint(folder / subject, layout_of(subject, "small"))
    return folder


class Bench:
    """Makes bundles without engines and measures nothing: sdrt takes `ours` seconds an image, PyTorch 2.

    log: what was asked of it.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.log: list[str] = []
        self.ours = 1.0
        self.fails_at: str | None = None
        self.level = 0

    def results(self, *names, settings=SETTINGS, again=False):
        tasks = tasks_named(",".join(names) or None)
        return results_of(
            tasks,
            settings,
            self.work,
            machine=MACHINE,
            again=again,
            progress=silent,
            make=self.make,
            measure=self.measure,
        )

    def make(self, subject, settings, folder, progress):
        others = [path.name for path in folder.parent.iterdir() if path != folder and path.name != "results"]
        assert not others, "two subjects on the disk"
        self.log.append(f"make {subject}")
        bundle = folder / "bundle.sdrt"
        if not bundle.exists():
            small_bundle.write_files(bundle)
            write_manifest(bundle, small_bundle.describe(bundle))
        return Made(folder=folder, checkpoint=folder / "checkpoint", bundle=bundle, extra={"build seconds": 1.0})

    def measure(self, task, case, made, settings, say):
        if task.name == self.fails_at:
            raise BackendError("out of luck", hint="try again")
        self.log.append(f"measure {task.name}")
        say("round 1", 0, 1)
        return [self.record(SDRT, self.ours, self.level), self.record(PYTORCH_FP32, 2.0, 0)]

    def record(self, name, seconds, level):
        drawing = Drawing(
            picture=np.full((8, 8, 3), level, np.uint8),
            total_seconds=seconds,
            text_encoder_seconds=0.1 * seconds,
            step_seconds=(0.2 * seconds, 0.2 * seconds),
            vae_decoder_seconds=0.2 * seconds,
            peak_bytes=2**20 if name == SDRT else 3 * 2**19,
        )
        start = Start(load_seconds=2.0, import_seconds=0.5, open_seconds=1.0, first=drawing)
        return Record(name=name, version="1", starts=[start], rounds=[drawing, drawing])


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "work")


def report_of(results) -> TasksReport:
    return TasksReport(title="a < b", command="sdrt bench", machine=MACHINE, settings={"steps": 2}, results=results)


def test_tasks_are_chosen_by_name_and_stay_in_the_suite_s_order():
    assert [task.name for task in tasks_named("upscaling, text-to-image")] == ["text-to-image", "upscaling"]
    assert tasks_named(None) == TASKS


@pytest.mark.parametrize(("text", "message"), [("juggling,upscaling", "unknown tasks juggling"), (" ,", "names none")])
def test_an_unknown_task_is_refused_with_the_names_there_are(text, message):
    with pytest.raises(RequestError, match=message) as refused:
        tasks_named(text)
    assert all(task.name in refused.value.hint for task in TASKS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "tasks", "--tasks", "juggling"], "juggling"),
        (["--suite", "tasks", "--contestants", "openvino-genai"], "openvino-genai"),
        (["--suite", "tasks", "--size", "64x64"], "size"),
        (["--suite", "tasks", "some.sdrt"], "builds its own"),
        (["--suite", "shapes", "some.sdrt", "--tasks", "editing"], "of the suite tasks"),
    ],
)
def test_a_bad_argument_is_refused_before_any_work(tmp_path, flags, message):
    work, out = tmp_path / "work", tmp_path / "report"
    with pytest.raises(RequestError, match=message):
        run_child("sdrt.benchmarks", [*flags, "--work", str(work), "--out", str(out)])
    assert not work.exists()
    assert not out.exists()


def test_every_task_but_outpainting_is_in_the_suite_and_one_with_a_controlnet():
    assert {task.task for task in TASKS} == {kind.name for kind in KINDS} - {"outpainting"}
    assert [task.name for task in TASKS if task.controlled] == ["controlnet"]


def test_the_help_names_the_tasks(capsys):
    from sdrt.cli import run_command

    assert run_command(["bench", "--help"]) == 0
    assert "".join(f"{task.name}," for task in TASKS)[:-1] in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("subject", subjects_of(TASKS))
def test_full_size_is_that_of_the_published_model(subject):
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**layout_of(subject, "full").unet)
    assert round(sum(weights.numel() for weights in unet.parameters()) / 1e6) == UNET_PARAMETERS[subject]
    assert unet.config.in_channels == CHANNELS.get(subject, 4)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_small_checkpoint_is_one_of_its_task_and_its_pipeline_draws_the_case(checkpoints, tmp_path, task):
    checkpoint = open_checkpoint(checkpoints / task.subject)
    kinds = [kind for kind in KINDS if kind.name == task.task]
    assert kinds
    assert all(checkpoint.task in kind.models for kind in kinds)
    case = case_of(task, "small", tmp_path, steps=2)
    picture, timings = load_pipeline(str(checkpoint.path), PIPELINES[task.pipeline], threads=1)(case.arguments())
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 1
    assert len(timings["step_seconds"]) == (1 if "strength" in task.options else 2)


def test_a_controlnet_has_a_say_in_the_small_checkpoint(checkpoints, tmp_path):
    (task,) = tasks_named("controlnet")
    draw = load_pipeline(str(checkpoints / task.subject), PIPELINES[task.pipeline], threads=1)
    case = case_of(task, "small", tmp_path, steps=2)
    steered, free = (
        draw({**case.arguments(), "controlnet_conditioning_scale": scale})[0].astype(int) for scale in (0.8, 0.0)
    )
    assert np.abs(steered - free).max() > 8


def test_the_same_checkpoint_but_for_its_unet_shares_the_rest(checkpoints):
    for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        weights = {(checkpoints / subject / part).read_bytes() for subject in ("sd1", "sd1-inpainting", "sd1-editing")}
        assert len(weights) == 1


@pytest.mark.parametrize("task", tasks_named(",".join(SD1)), ids=lambda task: task.name)
def test_a_case_s_pictures_reach_the_request_as_they_were_drawn(task, tmp_path):
    import sdrt

    case = case_of(task, "small", tmp_path)
    request = sdrt.Request(**with_pictures(json.loads(json.dumps(case.arguments()))))
    assert {name for name in ("image", "mask_image") if getattr(request, name) is not None} == set(task.brings)
    for name in task.brings:
        assert np.array_equal(getattr(request, name), Image.open(case.pictures[name]))


def test_an_upscaler_is_given_a_quarter_and_depth_keeps_16_bits(tmp_path):
    depth, upscaling = (case_of(task, "small", tmp_path) for task in tasks_named("upscaling,depth-to-image"))
    assert with_pictures(upscaling.arguments())["image"].size == (16, 16)
    assert np.asarray(with_pictures(depth.arguments())["depth_map"]).max() > 255


def test_one_subject_at_a_time_is_built_measured_in_its_tasks_and_removed(bench):
    list(bench.results())
    expected = []
    for subject, its in subjects_of(TASKS).items():
        expected += [f"make {subject}", *(f"measure {task.name}" for task in its)]
    assert bench.log == expected
    assert [path.name for path in (bench.work / "small").iterdir()] == ["results"]


def test_a_run_that_was_stopped_goes_on_where_it_was(bench):
    bench.fails_at = "inpainting"
    with pytest.raises(BackendError, match="out of luck"):
        list(bench.results(*SD1))
    assert any(path.name.startswith("sd1-") for path in (bench.work / "small").iterdir())
    bench.fails_at = None
    bench.log.clear()
    results = list(bench.results(*SD1))
    assert bench.log == ["make sd1", "measure inpainting"]
    assert [result.name for result in results] == list(SD1)


def test_a_finished_task_is_kept_as_it_was_unless_forced(bench):
    (first,) = bench.results("text-to-image")
    bench.log.clear()
    bench.ours = 0.5
    (kept,) = bench.results("text-to-image")
    assert bench.log == []
    assert (kept.rows, kept.drawn, kept.bars) == (first.rows, first.drawn, first.bars)
    (anew,) = bench.results("text-to-image", again=True)
    assert [row.total.median for row in anew.rows] == [0.5, 2.0]


@pytest.mark.parametrize("change", [{"steps": 3}, {"threads": 2}, {"precision": "bf16"}, {"rounds": 3}])
def test_a_result_of_other_settings_is_not_kept(bench, change):
    list(bench.results("text-to-image"))
    bench.log.clear()
    list(bench.results("text-to-image", settings=replace(SETTINGS, **change)))
    assert bench.log[-1] == "measure text-to-image"


def test_a_result_of_other_code_is_not_kept(bench, monkeypatch):
    list(bench.results("text-to-image"))
    monkeypatch.setitem(MACHINE, "source", "def")
    list(bench.results("text-to-image"))
    assert bench.log.count("measure text-to-image") == 2


def test_a_damaged_result_is_measured_again(bench):
    list(bench.results("text-to-image"))
    (file,) = (bench.work / "small" / "results").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    bench.log.clear()
    list(bench.results("text-to-image"))
    assert bench.log[-1] == "measure text-to-image"


def test_the_bars_are_the_image_s_time_and_the_memory(bench):
    (result,) = bench.results("text-to-image")
    time, memory = result.bars
    assert (time.measured, time.bound, time.met) == (2.0, 1.5, True)
    assert (memory.measured, memory.bound, memory.met) == (1.5, 1.0, True)
    bench.ours = 1.9
    (slower,) = bench.results("text-to-image", again=True)
    assert not slower.bars[0].met
    assert "MISSED image, times PyTorch eager fp32: 1.05 [1.05, 1.05], at least 1.50" in tasks_text([slower])


def test_a_task_that_misses_parity_makes_the_whole_report_invalid(bench):
    results = list(bench.results("text-to-image", "image-to-image"))
    assert report_of(results).parity == "held"
    bench.level = 9
    wrong = report_of([*results, *bench.results("inpainting")])
    assert wrong.parity == "missed"
    assert "INVALID" in tasks_page(wrong)


def test_without_pytorch_in_fp32_parity_is_not_said_to_have_held(bench):
    (result,) = bench.results("text-to-image")
    alone = replace(result, parity="not checked")
    assert report_of([result, alone]).parity == "not checked"


def test_the_report_is_written_with_every_picture_and_replaces_its_own_earlier_one(bench, tmp_path):
    out = tmp_path / "report"
    results = list(bench.results("depth-to-image"))
    for _ in range(2):
        check_place(out, overwrite=False)
        write_tasks(report_of(results), out)
    drawn = {f"depth-to-image-{name}.png" for name in ("sdrt", "pytorch-eager-fp32", "given-image", "given-depth-map")}
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", *drawn}
    data = json.loads((out / "report.json").read_text())
    assert data["tasks"][0]["bars"][0]["met"] is True
    assert data == json.loads(json.dumps(tasks_json(report_of(results)), allow_nan=False))


def test_the_page_names_its_settings_in_words(bench):
    shown = replace(report_of(list(bench.results("text-to-image"))), settings={"cold_starts": 1, "peers": ["a", "b"]})
    assert "cold starts 1 · peers a, b" in tasks_page(shown)


@pytest.mark.parametrize("name", ["report.json", "holiday.jpg"])
def test_a_report_of_another_suite_and_a_folder_of_pictures_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(OutputError):
        check_place(tmp_path, overwrite=False)


def test_the_page_stands_alone_and_is_balanced(bench):
    text = tasks_page(report_of(list(bench.results())))
    assert "a &lt; b" in text
    assert not re.search(r"https?://", text)
    assert all(source.startswith("data:image/webp;base64,") for source in re.findall(r'src="([^"]*)"', text))
    for tag in ("div", "table", "tr", "td", "figure", "svg", "dl", "p", "span"):
        assert len(re.findall(rf"<{tag}[\s>]", text)) == text.count(f"</{tag}>"), tag
    assert all(f"<h2>{task.name}</h2>" in text for task in TASKS)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_the_whole_small_suite_holds_parity_in_every_task(tmp_path):
    out = tmp_path / "report"
    flags = ["--rounds", "1", "--warmup", "0", "--threads", "1", "--steps", "2", "--precision", "fp32"]
    command = ["--suite", "tasks", "--scale", "small", "--work", str(tmp_path / "work"), "--out", str(out), *flags]
    result = run_child("sdrt.benchmarks", command)
    assert (result["valid"], result["parity"]) == (True, "held")
    data = json.loads((out / "report.json").read_text())
    assert [task["task"] for task in data["tasks"]] == [task.name for task in TASKS]
    assert all(task["rows"][0]["parity"]["largest_difference"] <= 1 for task in data["tasks"])
