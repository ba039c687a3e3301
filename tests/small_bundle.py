"""A bundle of a few kilobytes, made by hand: every kind of file that a real one has, and no engine that runs."""

from pathlib import Path

from sdrt.bundle import (
    FORMAT_VERSION,
    BackendRecord,
    ComponentRecord,
    GoldenRecord,
    Manifest,
    ModelRecord,
    ParityRecord,
    ShapeProfile,
    TensorSpec,
    record_file,
    write_manifest,
)

COMPONENTS = ("text_encoder", "step", "vae_decoder", "vae_encoder")
PARITY = ParityRecord(metric="max_relative", measured=1.25e-5, bound=2e-4)


def write_files(folder: Path) -> None:
    """The files of a bundle, each with other content."""
    for name in COMPONENTS:
        (folder / "engines" / name).mkdir(parents=True)
        (folder / "engines" / name / "model.xml").write_text(f"<net name='{name}'/>")
        (folder / "engines" / name / "model.bin").write_bytes(bytes(range(97)) + name.encode())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    (folder / "golden").mkdir()
    (folder / "golden" / "image.npz").write_bytes(b"PK" + bytes(61))


def describe(folder: Path) -> Manifest:
    """The manifest of the files in `folder`."""
    border = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
    components = tuple(
        ComponentRecord(
            name=name,
            files=tuple(record_file(folder, folder / "engines" / name / file) for file in ("model.xml", "model.bin")),
            inputs=(border,),
            outputs=(border,),
            parity=PARITY,
        )
        for name in COMPONENTS
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        sdrt_version="0.1.0",
        model=ModelRecord(
            name="small",
            identity="a" * 64,
            task="text-to-image",
            latent_channels=4,
            conditioning_channels=0,
            vae_downsample=8,
            size_multiple=8,
            vae_scaling_factor=0.18215,
            prompt_embeds_dim=8,
            text_length=77,
            default_height=64,
            default_width=64,
            scheduler_class="PNDMScheduler",
            scheduler_config={"beta_start": 0.00085, "trained_betas": None, "skip_prk_steps": True},
        ),
        backend=BackendRecord(name="openvino", version="2026.4.1", device="cpu", features=()),
        precision="fp32",
        state_slots=6,
        profile=ShapeProfile(
            sizes=(), minimum=(64, 64), maximum=(128, 128), multiple_of=8, max_batch=4, text_length=77
        ),
        components=components,
        tokenizer=(record_file(folder, folder / "tokenizer" / "tokenizer.json"),),
        golden=GoldenRecord(
            reference="PyTorch",
            prompt="a large red circle",
            seed=0,
            num_inference_steps=4,
            guidance_scale=7.5,
            height=64,
            width=64,
            file=record_file(folder, folder / "golden" / "image.npz"),
            parity=ParityRecord(metric="max_absolute", measured=0.0, bound=1 / 255),
        ),
    )


def write_bundle(folder: Path) -> Manifest:
    """Make the whole bundle at `folder`, which may not exist yet."""
    write_files(folder)
    manifest = describe(folder)
    write_manifest(folder, manifest)
    return manifest
