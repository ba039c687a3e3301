"""`sdrt inspect`: what a bundle or a model is, from its files alone; no engine is loaded but for --layers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdrt.cli.build import UNVERIFIED, bundle_bytes, is_onnx_folder, parity_table, size_multiple
from sdrt.cli.options import AsJson, is_embedded, model_folder
from sdrt.cli.terminal import emit, facts, size_text, table, title
from sdrt.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.text import Text

    from sdrt.bundle import Bundle, Float32Islands, JsonValue, ModelRecord
    from sdrt.runners.engine_layers import EngineLayers

_LAYERS_HEAD = ("component", "layer", "gives", "count")
MOST_NODES = 8  # named; --json has all
WEIGHTS = (".safetensors", ".bin", ".onnx", ".data", ".onnx_data", ".pb")


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE|MODEL",
            help="A bundle, a diffusers or ONNX folder, or an embedded model.",
            show_default=False,
        ),
    ],
    layers: Annotated[
        bool, typer.Option("--layers", help="Also what each TensorRT engine is made of. Needs the GPU.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a bundle or a model is."""
    import msgspec

    from sdrt.bundle import Bundle
    from sdrt.runners import read_engine_layers
    from sdrt.tasks import possible_tasks

    folder = Path(path)
    if is_embedded(path) or (folder / "model_index.json").is_file() or is_onnx_folder(folder):
        if layers:
            raise RequestError(f"{path} is a model, which has no engines", hint="name a bundle, or leave --layers out")
        model = _model(model_folder(path))
        emit(model, _model_lines(model), as_json=as_json)
        return
    bundle = Bundle.open(folder)
    manifest: dict[str, Any] = msgspec.to_builtins(bundle.manifest)
    result: dict[str, JsonValue] = {
        "kind": "bundle",
        "path": path,
        "size_bytes": bundle_bytes(bundle),
        "manifest": manifest,
        "tasks": [*possible_tasks(bundle.manifest.model)],
    }
    lines = _bundle_lines(bundle)
    if layers:
        found = read_engine_layers(bundle)
        result["layers"] = msgspec.to_builtins(found)
        lines = [*lines, "", *_layer_lines(found)]
    emit(result, lines, as_json=as_json)


def _bundle_lines(bundle: "Bundle") -> "list[Text | str]":
    from sdrt.sizes import describe_sizes
    from sdrt.tasks import possible_tasks

    manifest = bundle.manifest
    model, backend, golden = manifest.model, manifest.backend, manifest.golden
    features = f" with {', '.join(backend.features)}" if backend.features else ""
    rows = [
        ("model", f"{model.name}, {model.task}, {model.identity[:12]}"),
        ("tasks", ", ".join(possible_tasks(model))),
        *_control_rows(model),
        *_depth_rows(model),
        *_tiny_vae_rows(model),
        ("backend", f"{backend.name} {backend.version.split('-')[0]} on {backend.device}{features}"),
        ("precision", manifest.precision),
        ("images", f"{describe_sizes(manifest.profile)}; up to {manifest.profile.max_batch} at a time"),
        ("scheduler", f"{model.scheduler_class} ({model.scheduler_config.get('prediction_type', 'epsilon')})"),
        ("prompt", f"up to {model.text_length} tokens"),
        ("size", size_text(bundle_bytes(bundle))),
        ("made by", f"sdrt {manifest.sdrt_version}, bundle format {manifest.format_version}"),
        ("reference", golden.reference),
        (
            "golden image",
            f"{golden.prompt!r}, seed {golden.seed}, {golden.num_inference_steps} steps, "
            f"guidance {golden.guidance_scale:g}, {golden.width}x{golden.height}",
        ),
    ]
    if not manifest.device_verified:
        rows.append(("verified", UNVERIFIED))
    islands = [(item.name, _islands_text(item.islands)) for item in manifest.components if item.islands is not None]
    kept: list[Text | str] = ["", title("Kept in float32"), *facts(islands)] if islands else []
    return [title(f"{bundle.path}: a bundle"), *facts(rows), "", *parity_table(bundle), *kept]


def _control_rows(model: "ModelRecord") -> list[tuple[str, str]]:
    """What the images can be steered with, in the order of their --control-image."""
    return [("ControlNets", ", ".join(model.controlnets))] if model.controlnets else []


def _depth_rows(model: "ModelRecord") -> list[tuple[str, str]]:
    """Where the depth of depth-to-image comes from."""
    if model.task != "depth-to-image":
        return []
    estimation = model.depth_estimation
    if estimation is None:
        return [("depth", "of a map that the request brings")]
    size = "any size" if estimation.takes is None else f"{estimation.takes[1]}x{estimation.takes[0]}"
    return [("depth", f"of a map that the request brings, else estimated from the image ({size})")]


def _tiny_vae_rows(model: "ModelRecord") -> list[tuple[str, str]]:
    """What decodes previews, and requests that ask for it."""
    tiny = model.tiny_vae
    return [] if tiny is None else [("tiny VAE", f"{tiny.name}, {tiny.identity[:12]}")]


def _layer_lines(found: "Mapping[str, EngineLayers]") -> "list[Text | str]":
    """A row for each kind of layer, the most frequent first."""
    rows = [
        (name, kind.operator, ", ".join(kind.outputs) or "not told", f"{kind.count:,}")
        for name, engine in found.items()
        for kind in engine.kinds
    ]
    totals = ", ".join(f"{name} {len(engine.names):,}" for name, engine in found.items())
    return [
        title("Layers of the engines"),
        *facts([("layers", totals)]),
        "",
        *table(_LAYERS_HEAD, rows, left=(0, 1, 2)),
    ]


def _islands_text(islands: "Float32Islands") -> str:
    """How many nodes by which rule, and the nodes that calibration found, worst first."""
    parts = [f"{count:,} {rule}" for rule, count in islands.by_rule.items()]
    parts += [
        f"{item.node} ({item.operator}, {item.reason} {item.value:.3g})" for item in islands.measured[:MOST_NODES]
    ]
    rest = len(islands.measured) - MOST_NODES
    parts += [f"{rest:,} more as measured"] * (rest > 0)
    return f"of {islands.nodes:,} nodes: {', '.join(parts) or 'none'}"


def _model(folder: Path) -> "dict[str, JsonValue]":
    """What the configs and files of a model folder say."""
    kind = "onnx" if is_onnx_folder(folder) else "diffusers"
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    unet = _read_json(folder / "unet" / "config.json")
    sample = unet.get("sample_size")
    multiple = size_multiple(folder)
    components = {
        part.name: sum(file.stat().st_size for file in part.iterdir() if file.suffix in WEIGHTS)
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }
    return {
        "kind": kind,
        "path": str(folder),
        "pipeline": index.get("_class_name"),
        "scheduler": scheduler.get("_class_name"),
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "latent_side": sample,
        "size_multiple": multiple,
        "prompt_embeds_dim": unet.get("cross_attention_dim"),
        "components": {name: size for name, size in components.items() if size > 0},
    }


def _model_lines(model: "dict[str, Any]") -> "list[Text | str]":
    word = "an ONNX folder" if model["kind"] == "onnx" else "a diffusers folder"
    unknown = "unknown"
    rows = [
        ("pipeline", str(model["pipeline"] or unknown)),
        ("scheduler", f"{model['scheduler'] or unknown} ({model['prediction_type']})"),
        ("latents", f"{model['latent_side'] or unknown} a side"),
        ("image sides", f"multiples of {model['size_multiple'] or unknown} pixels"),
        ("prompt embeds", f"{model['prompt_embeds_dim'] or unknown} numbers a token"),
        ("weights", size_text(sum(model["components"].values()))),
    ]
    sizes = [(name, size_text(size)) for name, size in model["components"].items()]
    return [title(f"{model['path']}: {word}"), *facts(rows), "", *table(("component", "weights"), sizes)]


def _read_json(path: Path) -> dict[str, Any]:
    hint = "fetch the model again, or name the folder that holds model_index.json"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint=hint) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object", hint=hint)
    return content
