"""The GPU runbook without a GPU: its checks on the simulated one, its stages, its results, and the kit that travels."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from sdrt.benchmarks import contestants
from sdrt.benchmarks.builds import Built
from sdrt.benchmarks.contestants import Drawing
from sdrt.benchmarks.gpu import __main__ as runbook
from sdrt.benchmarks.gpu import checks, from_kit, kit, latency, making
from sdrt.benchmarks.gpu.results import (
    Bound,
    Findings,
    Outcome,
    read_outcomes,
    source_digest,
    state_of,
    summary,
    write_outcomes,
)
from sdrt.benchmarks.gpu.stages import STAGES, Stage
from sdrt.benchmarks.run import Record
from sdrt.benchmarks.suites import shapes
from sdrt.errors import BackendError, BuildError
from sdrt.export.checkpoint import open_checkpoint
from sdrt.export.golden import draw_reference
from sdrt.exported import GoldenRequest
from sdrt.runners.engine_layers import inspect_engines
from sdrt.runners.tensorrt import TensorRtRunner
from tests.simulated_cuda import SimulatedCuda

SMALL = {"height": 64, "width": 64, "num_inference_steps": 3}


class TestChecks:
    """Each passes on a device that does what it should, and misses on one that does not."""

    @pytest.fixture
    def device(self, onnx_bundle, onnx_profiles, monkeypatch):
        """The simulated GPU in the place of the driver, and requests that the tiny model can draw."""
        made = []

        def driver(*arguments):
            made.append(SimulatedCuda(onnx_profiles))
            return made[-1]

        original = checks._request
        monkeypatch.setattr(checks, "CudaPython", driver)
        monkeypatch.setattr(checks, "library_of", lambda backend: "tensorrt_rtx")
        monkeypatch.setattr(checks, "open_runner", lambda bundle: TensorRtRunner(bundle, driver()))
        monkeypatch.setattr(checks, "_request", lambda seed, **options: original(seed, **{**options, **SMALL}))
        return made

    def met(self, findings):
        return {bound.name: bound.met for bound in findings.bounds}

    def test_graphs(self, device, onnx_bundle):
        found = checks.check_graphs(onnx_bundle.path)
        assert all(self.met(found).values()), found
        assert found.figures["captures"] > 3

    def test_graphs_that_differ_are_a_miss(self, device, onnx_bundle, monkeypatch):
        def forgetful(cuda, graph, stream):
            for work in cuda.graphs[graph][:-1]:
                cuda._queue(stream, work, name=None)

        monkeypatch.setattr(SimulatedCuda, "launch", forgetful)
        assert not self.met(checks.check_graphs(onnx_bundle.path))["requests whose bits differ"]

    def test_layers(self, device, onnx_bundle, monkeypatch):
        monkeypatch.setattr(checks, "read_engine_layers", lambda bundle: inspect_engines(bundle, checks.CudaPython()))
        found = checks.check_layers(onnx_bundle.path)
        assert all(self.met(found).values()), found
        assert found.figures["layers of step"] > 10

    def test_profiles(self, device, onnx_bundle):
        found = checks.check_profiles(onnx_bundle.path)
        assert all(self.met(found).values()), found

    def test_repeats(self, device, onnx_bundle):
        found = checks.check_repeats(onnx_bundle.path, repeats=3)
        assert all(self.met(found).values()), found

    def test_repeats_that_differ_are_a_miss(self, device, onnx_bundle, monkeypatch):
        pictures = iter(range(1000))
        monkeypatch.setattr(checks, "_pixels", lambda pipeline, request: np.full((2, 2, 3), next(pictures) % 200))
        assert not any(self.met(checks.check_repeats(onnx_bundle.path, repeats=3)).values())

    def test_mixture(self, device, onnx_bundle):
        found = checks.check_mixture(onnx_bundle.path)
        assert self.met(found)["lowest PSNR to the image alone, dB"], found

    def test_noise(self, device, onnx_bundle):
        found = checks.check_noise(onnx_bundle.path)
        assert all(self.met(found).values()), found

    def test_noise_that_is_another_is_a_miss(self, device, onnx_bundle, monkeypatch):
        original = SimulatedCuda._fill

        def spoiled(cuda, target, draw):
            original(cuda, target, draw)
            cuda.view(target, 4)[:] = 0

        monkeypatch.setattr(SimulatedCuda, "_fill", spoiled)
        assert not self.met(checks.check_noise(onnx_bundle.path))["largest difference from numpy"]


class TestDescriptions:
    def test_pictures_of_pytorch_are_those_of_its_float32(self):
        request = GoldenRequest(
            prompt="a large red circle", seed=3, num_inference_steps=2, guidance_scale=4.0, height=64, width=64
        )
        checkpoint = open_checkpoint(kit.ROOT / "models" / "shapes" / "checkpoint")
        (made,) = checks._pytorch_pictures([asdict(request) | {"scheduler": "ddim"}])
        np.testing.assert_array_equal(made, draw_reference(checkpoint, request))

    def test_a_driver_whose_version_nobody_tells_is_an_error(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(BackendError, match="nvidia-smi cannot be used"):
            checks._driver_version()


class TestLatency:
    def drawing(self, *, gap_seconds=None):
        return Drawing(
            picture=np.zeros((1, 1, 3), np.uint8),
            total_seconds=1.0,
            text_encoder_seconds=0.1,
            step_seconds=(0.25, 0.25),
            vae_decoder_seconds=0.1,
            peak_bytes=1,
            gap_seconds=gap_seconds,
        )

    def test_the_share_of_gaps_is_that_of_the_worst_round(self):
        record = Record(name="a", rounds=[self.drawing(gap_seconds=0.001), self.drawing(gap_seconds=0.005)])
        assert latency.gap_share(record) == pytest.approx(0.01)
        assert latency.gap_share(Record(name="a", rounds=[self.drawing()])) is None

    def test_memory_is_what_a_contestant_holds_alone(self, monkeypatch):
        (case,) = shapes.cases(1)
        spec = contestants.ContestantSpec(name="a", command=(sys.executable, "-c", CONTESTANT))
        assert latency.memory_alone(spec, case) == 12345
        silent = CONTESTANT.replace('"gpu_bytes": 12345', '"gpu_bytes": None')
        with pytest.raises(BackendError, match="nobody watched"):
            latency.memory_alone(replace(spec, command=(sys.executable, "-c", silent)), case)


CONTESTANT = """
import numpy as np
from sdrt.benchmarks.baselines import protocol
protocol.peak_bytes = lambda process="self": 1
timings = {"text_encoder_seconds": 0, "step_seconds": [1.0], "vae_decoder_seconds": 0, "gpu_bytes": 12345}
protocol.serve(lambda: None, lambda: lambda case: (np.zeros((1, 1, 3)), timings), lambda: {"version": "1"})
"""


class TestMaking:
    """A bundle that is there is taken, unless there is a GPU that does not load it."""

    @pytest.fixture
    def commands(self, onnx_bundle, monkeypatch):
        commands = []
        monkeypatch.setattr(
            making, "run_timed", lambda command, environment: commands.append(command) or Built(seconds=1, peak_bytes=1)
        )
        return commands

    def made(self, onnx_bundle):
        return making.make_shapes(onnx_bundle.path, Path("cache"), threads=None).figures

    def test_without_a_gpu_it_is_taken(self, onnx_bundle, commands, monkeypatch):
        monkeypatch.setattr(making, "has_device", lambda: False)
        assert self.made(onnx_bundle)["found ready"] is True
        assert commands == []

    def test_one_that_loads_is_taken(self, onnx_bundle, commands, monkeypatch):
        monkeypatch.setattr(making, "has_device", lambda: True)
        assert self.made(onnx_bundle)["found ready"] is True
        assert commands == []

    def test_one_that_does_not_load_is_built_anew(self, onnx_bundle, commands, monkeypatch):
        def refuse(bundle):
            raise BackendError("not for sm90", hint="none")

        monkeypatch.setattr(making, "has_device", lambda: True)
        monkeypatch.setattr(making, "open_runner", refuse)
        figures = self.made(onnx_bundle)
        assert figures["found ready"] is False
        assert figures["built anew, because"] == "not for sm90"
        assert "--force" in commands[0]


class TestResults:
    @pytest.mark.parametrize(
        ("measured", "kind", "met"),
        [(2.0, "at least", True), (1.9, "at least", False), (2.0, "at most", True), (2.1, "at most", False)],
    )
    def test_a_bound_holds_on_its_side(self, measured, kind, met):
        assert Bound(name="x", measured=measured, bound=2.0, kind=kind).met is met

    @pytest.mark.parametrize("measured", [None, math.nan])
    @pytest.mark.parametrize("kind", ["at least", "at most"])
    def test_what_was_not_measured_is_a_miss(self, measured, kind):
        bound = Bound(name="x", measured=measured, bound=2.0, kind=kind)
        assert not bound.met
        assert state_of(Findings(bounds=[bound])) == "missed"

    def test_are_kept_and_read_again(self, tmp_path):
        outcome = Outcome(
            stage="graphs",
            state="missed",
            seconds=1.5,
            source="abc",
            bounds=(Bound(name="x", measured=1.0, bound=2.0),),
            figures={"captures": 3, "names": ["a"]},
            error=None,
        )
        write_outcomes(tmp_path, {"graphs": outcome}, {"cpu": "one"})
        assert read_outcomes(tmp_path) == {"graphs": outcome}
        text = (tmp_path / "summary.md").read_text()
        assert "| graphs | missed | 2 |" in text
        assert "| x | 1 | at least 2 | MISSED |" in text

    def test_that_are_damaged_are_an_error(self, tmp_path):
        (tmp_path / "results.json").write_text('{"graphs": 3}')
        with pytest.raises(BuildError, match="cannot be read"):
            read_outcomes(tmp_path)

    def test_of_several_states_of_the_source_are_marked(self):
        outcomes = {name: Outcome(stage=name, state="passed", seconds=1, source=name) for name in ("parity", "graphs")}
        assert "2 states of the source" in summary(outcomes, {})

    def test_the_source_has_one_name_wherever_it_is_imported_from(self, tmp_path):
        from_kit.lay_out(kit.ROOT, tmp_path)
        code = "import sdrt, sdrt.benchmarks.gpu.results as r; print(sdrt.__file__, r.source_digest())"
        variables = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(tmp_path / "sdrt" / "__init__.py"), source_digest()]
        assert len(source_digest()) == 12


class TestStages:
    """The runbook itself, with stages of its own."""

    @pytest.fixture
    def run(self, tmp_path, monkeypatch, capsys):
        def started(*names, arguments=()):
            code = runbook.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *arguments])
            return code, read_outcomes(tmp_path / "out"), capsys.readouterr().out

        return started

    def test_without_a_gpu_the_first_says_what_is_missing_and_waits(self, run):
        if Path("/dev/nvidia0").exists():
            pytest.skip("this machine has an NVIDIA GPU")
        code, outcomes, printed = run(arguments=["--stage", "device"])
        assert code == 3
        assert outcomes["device"].state == "waits for a GPU"
        assert "cuda-python is not installed" in outcomes["device"].error or "no NVIDIA driver" in printed

    def test_what_passed_is_not_run_again_unless_asked(self, run, tmp_path, monkeypatch):
        calls = []
        passed = Outcome(stage="device", state="passed", seconds=1, source="x")
        monkeypatch.setattr(runbook, "_run_apart", lambda *arguments: calls.append(arguments) or passed)
        assert run(arguments=["--stage", "device"])[0] == 0
        code, _, printed = run(arguments=["--stage", "device"])
        assert (code, len(calls)) == (0, 1)
        assert "passed before" in printed
        assert run(arguments=["--stage", "device", "--again"])[0] == 0
        assert len(calls) == 2

    def test_a_stage_is_not_begun_that_cannot_end_in_time(self, run, monkeypatch):
        def slow(stage, *arguments):
            time.sleep(1.1)
            return Outcome(stage=stage.name, state="passed", seconds=1, source="x")

        monkeypatch.setattr(runbook, "_run_apart", slow)
        code, outcomes, printed = run(arguments=["--stage", "device", "--stage", "parity", "--limit", "61"])
        assert code == 3
        assert set(outcomes) == {"device"}
        assert "left for the next run" in printed

    def test_a_stage_that_takes_too_long_is_stopped_with_all_it_started(self, tmp_path, monkeypatch):
        monkeypatch.setattr(runbook, "sys", FakeSys(tmp_path))
        work = runbook.Work(folder=tmp_path, out=tmp_path)
        stage = Stage(name="device", shows="", seconds=1, run=lambda work: Findings())
        outcome = runbook._run_apart(stage, work, 2.0)
        assert outcome.state == "out of time"
        deadline = time.monotonic() + 10
        child = int((tmp_path / "grandchild").read_text())
        while time.monotonic() < deadline and alive(child):
            time.sleep(0.05)
        assert not alive(child)

    def test_a_stage_that_dies_is_failed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(runbook, "sys", FakeSys(tmp_path, "import os; os._exit(7)"))
        stage = Stage(name="device", shows="", seconds=9, run=lambda work: Findings())
        outcome = runbook._run_apart(stage, runbook.Work(folder=tmp_path, out=tmp_path), 9.0)
        assert outcome.state == "failed"
        assert "code 7" in outcome.error

    def test_a_fault_in_a_stage_is_its_outcome(self, tmp_path, capsys):
        def faulty(work):
            raise ZeroDivisionError("of the stage")

        stage = Stage(name="device", shows="", seconds=9, run=faulty)
        assert runbook._run_here(stage, runbook.Work(folder=tmp_path, out=tmp_path)) == 1
        outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (outcome["state"], outcome["error"]) == ("failed", "ZeroDivisionError: of the stage")

    def test_have_budgets_that_fit_into_half_an_hour(self):
        assert sum(stage.seconds for stage in STAGES) <= 1800
        assert all(stage.seconds <= 540 for stage in STAGES)


SLEEPER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({path!r}, "w").write(str(child.pid))
time.sleep(60)
"""


class FakeSys:
    """`sys` with an interpreter that ignores its arguments and runs something else."""

    def __init__(self, folder, code=None):
        script = folder / "interpreter"
        code = SLEEPER.format(path=str(folder / "grandchild")) if code is None else code
        script.write_text(f"#!{sys.executable}\n{code}\n")
        script.chmod(0o755)
        self.executable = str(script)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


class TestKit:
    @pytest.fixture
    def parts(self, tmp_path):
        """An archive of three pieces, as `cut` makes them."""
        content = tmp_path / "content"
        (content / from_kit.WHEELS).mkdir(parents=True)
        (content / from_kit.BUNDLE).mkdir()
        (content / from_kit.BUNDLE / "bundle.json").write_bytes(os.urandom(2_500_000))
        archive = tmp_path / "kit.tar"
        subprocess.run(["tar", "-C", content, "-cf", archive, "."], check=True)
        return kit.cut(archive, tmp_path, 2**20 + 2**16)

    @pytest.fixture
    def checkout(self, tmp_path):
        root = tmp_path / "checkout"
        for name in from_kit.PACKAGES:
            (root / name).mkdir(parents=True)
        (root / "sdrt" / "__init__.py").write_text("")
        return root

    def test_parts_are_no_larger_than_their_room(self, parts):
        assert len(parts) == 3
        for part in parts:
            assert sum(file.stat().st_size for file in part.iterdir()) <= 2**20 + 2**16
        sizes = [piece["size"] for piece in json.loads((parts[0] / from_kit.PIECES_NAME).read_text())]
        assert max(sizes) - min(sizes) < len(sizes)

    def test_parts_come_together_in_any_order(self, parts, checkout, tmp_path, monkeypatch):
        monkeypatch.setattr(from_kit, "install", lambda wheels, site: site.mkdir(exist_ok=True))
        monkeypatch.setattr(from_kit, "missing_packages", lambda wanted, site: [])
        assert from_kit.prepare(parts[2], checkout) == ["kit.tar.01", "kit.tar.02"]
        assert from_kit.prepare(parts[0], checkout) == ["kit.tar.02"]
        assert from_kit.prepare(parts[0], checkout) == ["kit.tar.02"]
        assert from_kit.prepare(parts[1], checkout) == []
        made = checkout / from_kit.STORE / from_kit.BUNDLE / "bundle.json"
        source = tmp_path / "content" / from_kit.BUNDLE / "bundle.json"
        assert made.read_bytes() == source.read_bytes()
        assert (checkout / from_kit.STORE / "tree" / "sdrt" / "engines").resolve() == checkout / "engines"
        assert from_kit.prepare(parts[1], checkout) == []

    def test_a_damaged_part_is_refused(self, parts, checkout):
        piece = next(parts[0].glob("kit.tar.*"))
        content = bytearray(piece.read_bytes())
        content[1000] ^= 1
        piece.write_bytes(content)
        with pytest.raises(from_kit.KitError, match="is damaged"):
            from_kit.prepare(parts[0], checkout)

    def test_a_folder_that_is_no_part_is_refused(self, checkout, tmp_path):
        with pytest.raises(from_kit.KitError, match=r"has no pieces\.json"):
            from_kit.prepare(tmp_path / "nowhere", checkout)

    def test_parts_of_another_kit_do_not_mix(self, parts, checkout):
        from_kit.prepare(parts[0], checkout)
        listing = parts[1] / from_kit.PIECES_NAME
        changed = json.loads(listing.read_text())
        changed[0]["sha256"] = "0" * 64
        listing.write_text(json.dumps(changed))
        assert from_kit.prepare(parts[1], checkout) == ["kit.tar.01", "kit.tar.03"]

    def test_packages_that_the_machine_lacks_are_named(self, parts, checkout, monkeypatch):
        monkeypatch.setattr(from_kit, "install", lambda wheels, site: None)
        monkeypatch.setitem(from_kit.NEEDED, "a_module_that_is_not", "its-package")
        for part in parts[:2]:
            from_kit.prepare(part, checkout)
        with pytest.raises(from_kit.KitError, match=r'has no its-package.*make gpu-kit WITH="its-package"'):
            from_kit.prepare(parts[2], checkout)

    def test_packages_that_the_kit_brought_are_not_missing(self, tmp_path):
        assert from_kit.missing_packages({"a_module_that_is_not": "its-package"}, tmp_path) == ["its-package"]
        (tmp_path / "a_module_that_is_not.py").write_text("")
        assert from_kit.missing_packages({"a_module_that_is_not": "its-package"}, tmp_path) == []

    def test_packages_that_only_some_stages_need_are_named_and_no_error(self, parts, checkout, monkeypatch, capsys):
        monkeypatch.setitem(from_kit.NEEDED_BY_SOME, "a_module_that_is_not", "its-package")
        monkeypatch.setattr(from_kit, "__file__", str(checkout / "benchmarks" / "gpu" / "from_kit.py"))
        assert from_kit.main([str(parts[0])]) == from_kit.WAITING
        assert "has no its-package; stages that need it will fail" in capsys.readouterr().out

    def test_what_is_needed_is_more_than_what_is_imported_at_once(self):
        """No stage module imports anything at its top that the kit does not bring and does not ask for."""
        code = (
            "import sys; import sdrt.benchmarks.gpu.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert not set(done.stdout.split()) & from_kit.NEEDED_BY_SOME.keys()
        assert from_kit.NEEDED.keys() <= set(done.stdout.split())

    def test_another_python_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(from_kit, "PYTHON", (3, 1))
        with pytest.raises(from_kit.KitError, match=r"the kit is for Python 3\.1, .* GPU_PYTHON=python3\.1 "):
            from_kit.install(tmp_path, tmp_path / "site")

    def test_wheels_that_cannot_be_installed_are_an_error_in_words(self, tmp_path, monkeypatch):
        monkeypatch.setattr(from_kit, "PYTHON", sys.version_info[:2])
        (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no archive")
        with pytest.raises(from_kit.KitError, match=r"cannot be installed here: [A-Z]"):
            from_kit.install(tmp_path, tmp_path / "site")
        assert not (tmp_path / "site").exists()

    def test_wheels_are_installed_whatever_the_machine_tells_pip(self, tmp_path, monkeypatch):
        wheels, site = tmp_path / "wheels", tmp_path / "site"
        wheels.mkdir()
        with zipfile.ZipFile(wheels / "brought-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("brought.py", "")
            wheel.writestr("brought-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
            wheel.writestr(
                "brought-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr("brought-1.0.dist-info/RECORD", "")
        (tmp_path / "constraints.txt").write_text("brought==2.0\n")
        monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
        monkeypatch.setenv("PIP_USER", "1")
        monkeypatch.setattr(from_kit, "PYTHON", sys.version_info[:2])
        from_kit.install(wheels, site)
        assert (site / "brought.py").is_file()

    def test_the_runbook_runs_from_the_kit_and_not_from_the_working_directory(self, checkout, monkeypatch):
        shutil.rmtree(checkout)
        for name in from_kit.PACKAGES:
            (checkout / name).mkdir(parents=True)
            (checkout / name / "__init__.py").write_text("")
        stages = checkout / "benchmarks" / "gpu"
        stages.mkdir()
        (stages / "__init__.py").write_text("")
        (stages / "__main__.py").write_text("import sys; sys.exit(7 if sys.argv[1] == '--work' else 8)")
        monkeypatch.setattr(from_kit, "__file__", str(stages / "from_kit.py"))
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        monkeypatch.setattr(
            from_kit, "prepare", lambda part, home: from_kit.lay_out(home, home / from_kit.STORE / "tree")
        )
        assert from_kit.main(["part-1"]) == 7

    def test_the_command_says_what_is_still_to_be_brought(self, parts, checkout, tmp_path):
        script = checkout / "benchmarks" / "gpu" / "from_kit.py"
        script.parent.mkdir()
        script.write_text(Path(from_kit.__file__).read_text())
        done = subprocess.run([sys.executable, script, parts[0]], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (3, "")
        assert "kit.tar.02, kit.tar.03" in done.stdout
        done = subprocess.run([sys.executable, script], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")

    def test_what_needs_the_whole_room_is_refused(self, tmp_path):
        with pytest.raises(BuildError, match="1000 bytes are left for a part"):
            kit.cut(tmp_path / "x", tmp_path, 1000)

    def test_the_repository_leaves_room_for_parts(self):
        assert kit.repository_bytes(kit.ROOT) <= (kit.LARGEST_MIB - 15) * 2**20

    def test_versions_are_those_of_the_constraints(self):
        pins = kit.pinned_versions(kit.ROOT / "constraints.txt")
        assert {"msgspec", "diffusers", "cuda-bindings", "tensorrt-rtx-cu13"} <= pins.keys()
