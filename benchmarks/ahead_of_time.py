"""TensorRT engines at SD1.5's size, built where there is no GPU: how long, how much memory, how close.

python -m sdrt.benchmarks.ahead_of_time --work build/sd15 --out FILE.json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import msgspec

from sdrt.benchmarks.builds import Built, ensure_tensorrt, run_timed
from sdrt.benchmarks.machine import describe_machine
from sdrt.benchmarks.suites import sd15
from sdrt.bundle import Bundle, JsonValue
from sdrt.errors import SdrtError
from sdrt.files import write_atomically


def measure(work: Path, python: Path) -> dict[str, JsonValue]:
    """Export the checkpoint, then build its engines with `python`, from an empty cache. Raises BuildError."""
    checkpoint = work / "checkpoint"
    sd15.make_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory(dir=work, prefix=".ahead.") as folder:
        exported, target, cache = (Path(folder) / name for name in ("onnx", "sd15.sdrt", "cache"))
        environment = {"SDRT_CACHE": str(cache)}
        size = f"{sd15.SIDE}x{sd15.SIDE}"
        export = [sys.executable, "-m", "sdrt.export", str(checkpoint), str(exported), "--linked"]
        export_cost = run_timed([*export, "--golden-size", size], environment=environment)
        build = [str(python), "-m", "sdrt.engines", str(exported), str(target), "--backend", "tensorrt"]
        build_cost = run_timed([*build, "--sizes", size, "--batch", "1"], environment=environment)
        again = [*build, "--sizes", size, "--batch", "1", "--overwrite"]
        again_cost = run_timed(again, environment=environment)
        manifest = Bundle.open(target).manifest
    components: dict[str, JsonValue] = {
        component.name: {
            "engine_bytes": sum(file.size_bytes for file in component.files),
            "parity": msgspec.to_builtins(component.parity),
            "islands": msgspec.to_builtins(component.islands),
        }
        for component in manifest.components
    }
    return {
        "library": f"{manifest.backend.features[0]} {manifest.backend.version}",
        "size": size,
        "export": _cost(export_cost),
        "build": _cost(build_cost),
        "build_again": _cost(again_cost),
        "components": components,
        "golden_image": msgspec.to_builtins(manifest.golden.parity),
        "device_verified": manifest.device_verified,
        "machine": describe_machine(),
    }


def _cost(built: Built) -> dict[str, JsonValue]:
    return {"seconds": round(built.seconds, 1), "peak_bytes": built.peak_bytes}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; prints the file's content."""
    parser = argparse.ArgumentParser(prog="python -m sdrt.benchmarks.ahead_of_time", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/sd15"), help="where the checkpoint is, or is made")
    parser.add_argument("--tensorrt", type=Path, default=Path("build/venv-tensorrt"), help="a venv, made if absent")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        options.work.mkdir(parents=True, exist_ok=True)
        found = measure(options.work, ensure_tensorrt(options.tensorrt))
        text = json.dumps(found, indent=2)
        write_atomically(options.out, text.encode() + b"\n", overwrite=True)
    except SdrtError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
