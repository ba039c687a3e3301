"""`python -m sdrt.engines ONNX_FOLDER OUT`: the engines stage as a child process, speaking the worker protocol."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sdrt.bundle import JsonValue
from sdrt.progress import Progress
from sdrt.worker import serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a bundle; the result is {"bundle", "seconds", "manifest"}."""
    parsed = _parser().parse_args(arguments)

    def build(progress: Progress) -> JsonValue:
        from sdrt.engines.build import BuildOptions, build_bundle

        started = time.monotonic()
        options = BuildOptions(
            backend=parsed.backend,
            precision=parsed.precision,
            sizes=parsed.sizes,
            batch=parsed.batch,
            targets=tuple(parsed.target),
            refit=parsed.refit,
            threads=parsed.threads,
            overwrite=parsed.overwrite,
        )
        manifest = build_bundle(parsed.onnx_folder, parsed.out, options, progress)
        return {
            "bundle": str(parsed.out),
            "seconds": round(time.monotonic() - started, 3),
            "manifest": msgspec.to_builtins(manifest),
        }

    return serve(build)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdrt.engines", description="Build a bundle from ONNX components.")
    parser.add_argument("onnx_folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--sizes", default=None, help="512x512,512x768 | 256..1024 | 256x256..1024x768")
    parser.add_argument("--batch", default="1..4", help="images at a time")
    parser.add_argument("--target", action="append", default=[], help="a GPU architecture, such as sm89")
    parser.add_argument("--refit", action="store_true", help="TensorRT engines that take other weights later")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--overwrite", action="store_true", help="replace what is at OUT")
    return parser


if __name__ == "__main__":
    sys.exit(main())
