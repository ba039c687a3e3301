"""A checkpoint's networks as diffusers and transformers make them, with every weight of theirs from its files."""

from pathlib import Path
from typing import Any

from torch import nn

from sdrt.errors import CheckpointError

_NAMED = 3  # of the weights at fault
_HINTS = {
    "base_layer": "an adapter was fused and not unloaded: call unload_lora_weights() before save_pretrained()",
    "lora": "an adapter was saved with it: fuse and unload it before save_pretrained()",
}
_AGAIN = "save or download the checkpoint again"


def load_network(kind: Any, folder: Path, *, variant: str | None, **options: object) -> nn.Module:  # noqa: ANN401
    """The network of class `kind`, of diffusers or transformers, in evaluation mode.

    variant: the infix of its weights' names. options: what else `from_pretrained` is told.
    CheckpointError: it cannot be made of these files, or they lack a weight of it, which the libraries would invent.
    """
    try:
        model, found = kind.from_pretrained(
            folder, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError, TypeError) as error:
        first = str(error).strip().splitlines()[0].partition(". ")[0]
        raise CheckpointError(f"{folder} cannot be loaded as a {kind.__name__}: {first}", hint=_AGAIN) from error
    missing = sorted(str(name) for name in found["missing_keys"])
    other_shape = sorted(str(entry[0]) for entry in found["mismatched_keys"])
    if missing or other_shape:
        names, what = (missing, "lacks") if missing else (other_shape, "has in another shape")
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        unexpected = " ".join(str(name) for name in found["unexpected_keys"])
        hint = next((hint for part, hint in _HINTS.items() if part in unexpected), _AGAIN)
        raise CheckpointError(f"{folder} {what} weights: {', '.join(names[:_NAMED])}{more}", hint=hint)
    network: nn.Module = model
    return network.eval()
