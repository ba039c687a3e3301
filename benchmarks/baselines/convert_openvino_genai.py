"""A diffusers folder as OpenVINO IR, the way its documentation says: python convert_openvino_genai.py MODEL OUT.

Runs under the interpreter of the peers' environment (peers.txt), beside whose `python` lies `optimum-cli`. Those
tools read what transformers 4 wrote: a checkpoint saved by transformers 5 is first restated in its terms, through
links where a file stays as it is. Standard library only.
"""

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TEXT_PREFIX = "text_model."  # of every weight of a CLIPTextModel, until transformers 5 dropped it


def main() -> int:
    """Convert, and say on standard error what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weight-format", default="fp32")
    options = parser.parse_args()
    tool = Path(sys.executable).with_name("optimum-cli")
    with tempfile.TemporaryDirectory(prefix=f".{options.out.name}.", dir=options.out.resolve().parent) as folder:
        view, made = Path(folder) / "checkpoint", Path(folder) / "ir"
        restate_checkpoint(options.model.resolve(), view)
        command = [str(tool), "export", "openvino", "--model", str(view), "--task", "text-to-image"]
        code = subprocess.run([*command, "--weight-format", options.weight_format, str(made)]).returncode
        if code == 0:
            made.rename(options.out)
    return code


def restate_checkpoint(model: Path, view: Path) -> None:
    """Make `view`: the diffusers folder `model` as transformers 4 reads it."""
    for path in sorted(model.rglob("*")):
        target = view / path.relative_to(model)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    _restate_tokenizer(view / "tokenizer")
    weights = view / "text_encoder" / "model.safetensors"
    if weights.is_file():
        restate_text_weights(weights)


def _restate_tokenizer(folder: Path) -> None:
    """Write the two-file form beside tokenizer.json, where it is absent."""
    source = folder / "tokenizer.json"
    if (folder / "vocab.json").exists() or not source.is_file():
        return
    saved: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    vocabulary = dict(saved["model"]["vocab"])
    vocabulary.update({token["content"]: token["id"] for token in saved["added_tokens"]})
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in saved["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def restate_text_weights(path: Path) -> None:
    """Give every weight of a safetensors file the old prefix, unless it has it. A link is replaced by a file."""
    with path.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header: dict[str, Any] = json.loads(source.read(length))
        metadata = header.pop("__metadata__", {"format": "pt"})
        if all(name.startswith(TEXT_PREFIX) for name in header):
            return
        renamed = {"__metadata__": metadata, **{TEXT_PREFIX + name: entry for name, entry in header.items()}}
        text = json.dumps(renamed).encode()
        text += b" " * (-len(text) % 8)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(source, target)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
