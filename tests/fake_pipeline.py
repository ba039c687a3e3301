"""A pipeline over `FakeRunner` with a hand-made manifest and tokenizer: policy without engines, in milliseconds."""

import json
from pathlib import Path

from sdrt.bundle import (
    FORMAT_VERSION,
    BackendRecord,
    Bundle,
    ComponentRecord,
    FileRecord,
    GoldenRecord,
    Manifest,
    ModelRecord,
    ModelTask,
    NoiseAugmentation,
    ParityRecord,
    ShapeProfile,
    TinyVaeRecord,
)
from sdrt.pipeline import Pipeline
from sdrt.runners.fake import FakeRunner

SCHEDULER_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
WORDS = ("red", "blue", "circle", "poison")


CHANNELS = {"text-to-image": 0, "inpainting": 5, "upscaling": 3, "depth-to-image": 1, "editing": 4}


def make_manifest(
    *,
    max_batch: int = 8,
    sizes: tuple[tuple[int, int], ...] = (),
    task: ModelTask = "text-to-image",
    controlnets: tuple[str, ...] = (),
    tiny_vae: TinyVaeRecord | None = None,
) -> Manifest:
    parity = ParityRecord(metric="max_relative", measured=0.0, bound=1e-3)
    file = FileRecord(path="golden/image.npz", sha256="0" * 64, size_bytes=0)
    return Manifest(
        format_version=FORMAT_VERSION,
        sdrt_version="0.1.0",
        model=ModelRecord(
            name="fake",
            identity="f" * 64,
            task=task,
            latent_channels=4,
            conditioning_channels=CHANNELS[task],
            vae_downsample=4 if task == "upscaling" else 8,
            size_multiple=16,
            vae_scaling_factor=1.0,
            prompt_embeds_dim=8,
            text_length=12,
            default_height=64,
            default_width=64,
            scheduler_class="PNDMScheduler",
            scheduler_config=dict(SCHEDULER_CONFIG),
            controlnets=controlnets,
            control_features=3 if controlnets else 0,
            noise_augmentation=NoiseAugmentation(scheduler_config=dict(SCHEDULER_CONFIG), max_noise_level=350)
            if task == "upscaling"
            else None,
            tiny_vae=tiny_vae,
        ),
        backend=BackendRecord(name="openvino", version="0", device="cpu", features=()),
        precision="fp32",
        state_slots=6,
        profile=ShapeProfile(
            sizes=sizes, minimum=(32, 32), maximum=(128, 128), multiple_of=16, max_batch=max_batch, text_length=12
        ),
        components=(ComponentRecord(name="step", files=(file,), inputs=(), outputs=(), parity=parity),),
        tokenizer=(),
        golden=GoldenRecord(
            reference="none",
            prompt="",
            seed=0,
            num_inference_steps=1,
            guidance_scale=1.0,
            height=64,
            width=64,
            file=file,
            parity=parity,
        ),
    )


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer in its older form: bytes, bytes that end a word, a few whole words."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            tokens.append(pieces[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in dict.fromkeys(merges)))
    config = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<|endoftext|>"}))


def fake_pipeline(folder: Path, runner: FakeRunner | None = None, **manifest) -> Pipeline:  # type: ignore[no-untyped-def]
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
    bundle = Bundle(path=folder, manifest=make_manifest(**manifest))
    return Pipeline(bundle, FakeRunner() if runner is None else runner)
