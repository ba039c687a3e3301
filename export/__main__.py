"""The export stage as a child process: python -m sdrt.export MODEL OUT."""

import argparse
import re
import resource
import sys
from pathlib import Path

import msgspec

from sdrt import worker
from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.export.package import export_model
from sdrt.progress import Progress


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments and speak the child protocol."""
    parser = argparse.ArgumentParser(prog="python -m sdrt.export", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--controlnet", type=Path, action="append", default=[], help="a ControlNet's folder")
    parser.add_argument("--tiny-vae", type=Path, help="the folder of an AutoencoderTiny, whose decoder is exported too")
    parser.add_argument("--golden-size", help="HEIGHTxWIDTH of the reference image")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--linked", action="store_true", help="let files be hard links into the cache")
    options = parser.parse_args(arguments)

    def export(progress: Progress) -> JsonValue:
        record = export_model(
            options.model,
            options.out,
            controlnets=options.controlnet,
            tiny_vae=options.tiny_vae,
            golden_size=_parse_size(options.golden_size),
            threads=options.threads,
            overwrite=options.overwrite,
            linked=options.linked,
            progress=progress,
        )
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        built: dict[str, JsonValue] = msgspec.to_builtins(record)
        return {**built, "peak_bytes": peak_bytes}

    return worker.serve(export)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if match is None:
        raise RequestError(f"{text!r} is not a size", hint="write HEIGHTxWIDTH, such as 512x512")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
