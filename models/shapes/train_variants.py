"""The recipe of the task variants: short fine-tunes of the `shapes` checkpoint, its text encoder frozen.

    python -m sdrt.models.shapes.train_variants --work build/shapes-variants

Every stage leaves its result in the work folder and is skipped when that result is there already, so a run that was
interrupted goes on where it stopped. Losses go to standard output as JSON lines.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from sdrt.models.shapes.conditions import (
    SIDES,
    Drawing,
    depth_map,
    drawings,
    edge_map,
    extend,
    low_resolution,
    sample_mask,
)
from sdrt.models.shapes.train import (
    EMPTY_CAPTION_RATE,
    SCHEDULE,
    TEXT_LENGTH,
    WARM_UP,
    Averaged,
    atomic_save,
    draw_timesteps,
    encode_all,
    log,
    loss_weights,
    mixed_precision,
    rate_at,
    resume,
    train_vae,
    whiten,
)

SCENES = 8_000
MASKED_SCENES = 5_000  # of them
EXTENDED_SCENES = 200  # for each side
EXTENSION = 32
UPSCALE_SCENES = 1_500
UPSCALE_VAE_ITERATIONS = 6_000
UPSCALE_SCALING_FACTOR = 0.08333  # diffusers' upscale pipeline insists on this one
WINDOW = 16  # of the latents, in the part of the upscaler's training that sees windows
LOW_RES_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
}
MAX_NOISE_LEVEL = 350
EDGE_CHANNELS = (8, 16, 32, 64)

# (noisy latents, timesteps, prompt_embeds, condition) -> what the scheduler's prediction type asks for
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Scenes of one size: what is to be drawn, how it is asked for, and what is given with it."""

    latents: torch.Tensor  # float32 [count, 4, height, width], scaled
    ids: torch.Tensor  # int64 [count, 77], the captions' tokens
    condition: torch.Tensor  # [count, channels, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The checkpoint that the variants begin with."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long a variant learns, and what its output means."""

    iterations: int
    batch: int
    peak: float = 4e-4
    prediction_type: str = "epsilon"
    layout_given: bool = False  # timesteps from all of them alike: nothing is left for the noisiest to decide
    windows: float = 0.0  # the share of the iterations, the first ones, that see four times as many windows instead


RECIPES = {
    "inpaint": Recipe(iterations=1_500, batch=24, peak=1e-3, layout_given=True),
    "depth": Recipe(iterations=1_350, batch=24, peak=1e-3, layout_given=True),
    "edges": Recipe(iterations=450, batch=24, peak=1e-3),  # nothing trained can be spoilt: its outputs begin at zero
    "upscale": Recipe(iterations=5_000, batch=6, peak=1e-3, prediction_type="v_prediction", windows=0.9),
}


def open_base(folder: Path) -> Base:
    """The checkpoint in float32, frozen."""
    base = Base(
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
    )
    for module in (base.vae, base.text_encoder, base.unet):
        module.requires_grad_(False).eval()
    return base


def kept(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors that are made once and then read from `path`."""
    if not path.exists():
        began = time.monotonic()
        atomic_save(make(), path)
        log(path.stem, seconds=round(time.monotonic() - began))
    tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


def training_drawings(count: int, seed: int) -> list[Drawing]:
    """The first drawings of the training split's stream."""
    return list(islice(drawings(seed, held_out=False), count))


def stack(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 [count, 3, height, width] from as many [height, width, 3]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def tokens(base: Base, drawn: Sequence[Drawing]) -> torch.Tensor:
    """int64 [count, 77]: the captions' tokens."""
    captions = [drawing.scene.caption for drawing in drawn]
    ids: torch.Tensor = base.tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    return ids


def picture_latents(base: Base, drawn: Sequence[Drawing], work: Path) -> torch.Tensor:
    """The pictures' latents, float32 [count, 4, 16, 16]; the variants that see the same drawings share them."""
    pictures = stack([drawing.picture for drawing in drawn])
    return kept(work / "pictures.safetensors", lambda: {"latents": encode_all(base.vae, pictures)})["latents"]


def masked_condition(base: Base, pictures: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mask and masked picture's latents, float32 [count, 5, height/8, width/8], as diffusers' inpaint pipeline gives.

    pictures: uint8 [count, 3, height, width]; masks: bool [count, 1, height, width].
    """
    # 127.5 is no uint8: the hole's 0 in [-1, 1] is written into the float picture.
    hidden = torch.where(masks, 127.5, pictures.float())
    small = functional.interpolate(masks.float(), scale_factor=1 / 8)
    return torch.cat([small, encode_all(base.vae, hidden)], dim=1)


def inpaint_examples(base: Base, drawn: list[Drawing], work: Path) -> list[Examples]:
    """Masked pictures, and canvases that are to be continued on one side."""
    rng = np.random.default_rng(21)
    latents = picture_latents(base, drawn, work)[:MASKED_SCENES]
    drawn = drawn[:MASKED_SCENES]
    masks = torch.from_numpy(np.stack([sample_mask(drawing, rng) for drawing in drawn]))[:, None]
    pictures = stack([drawing.picture for drawing in drawn])
    masked = kept(work / "masked.safetensors", lambda: {"condition": masked_condition(base, pictures, masks)})
    groups = [Examples(latents=latents, ids=tokens(base, drawn), condition=masked["condition"])]
    for number, side in enumerate(SIDES):
        extended = training_drawings(EXTENDED_SCENES, seed=22 + number)
        tensors = kept(work / f"extended-{side}.safetensors", partial(_extended, base, extended, side))
        groups.append(Examples(latents=tensors["latents"], ids=tokens(base, extended), condition=tensors["condition"]))
    return groups


def _extended(base: Base, drawn: list[Drawing], side: str) -> dict[str, torch.Tensor]:
    canvases = [extend(drawing, side, EXTENSION) for drawing in drawn]
    pictures = stack([canvas for canvas, _ in canvases])
    masks = torch.from_numpy(np.stack([mask for _, mask in canvases]))[:, None]
    return {"latents": encode_all(base.vae, pictures), "condition": masked_condition(base, pictures, masks)}


def depth_examples(base: Base, drawn: list[Drawing], work: Path) -> list[Examples]:
    """Depth maps at the latents' size, in [-1, 1]; a quarter of them from sharp maps, the others from soft ones."""
    rng = np.random.default_rng(31)
    maps = [depth_map(drawing.objects, rng, softness=3.0 * (index % 4 > 0)) for index, drawing in enumerate(drawn)]
    condition = latent_depth(torch.from_numpy(np.stack(maps)))
    return [Examples(latents=picture_latents(base, drawn, work), ids=tokens(base, drawn), condition=condition)]


def latent_depth(maps: torch.Tensor) -> torch.Tensor:
    """[count, 1, height/8, width/8] in [-1, 1] from [count, height, width], as diffusers' depth pipeline makes it."""
    small = functional.interpolate(maps[:, None], scale_factor=1 / 8, mode="bicubic")
    lowest, highest = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
    return 2 * (small - lowest) / (highest - lowest) - 1


def edges_examples(base: Base, drawn: list[Drawing], work: Path) -> list[Examples]:
    """Edge maps, uint8 [count, 1, 128, 128]."""
    maps = torch.from_numpy(np.stack([edge_map(drawing.objects)[:, :, 0] for drawing in drawn]))
    return [Examples(latents=picture_latents(base, drawn, work), ids=tokens(base, drawn), condition=maps[:, None])]


def upscale_examples(base: Base, vae: AutoencoderKL, drawn: list[Drawing]) -> list[Examples]:
    """Low-resolution pictures, uint8 [count, 3, 32, 32], and latents of the same size; changes `vae`'s scale."""
    latents = whiten(
        vae, encode_all(vae, stack([drawing.picture for drawing in drawn])), scaling_factor=UPSCALE_SCALING_FACTOR
    )
    small = stack([low_resolution(drawing.picture) for drawing in drawn])
    return [Examples(latents=latents * UPSCALE_SCALING_FACTOR, ids=tokens(base, drawn), condition=small)]


def with_more_inputs(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """A copy of a UNet that takes `channels` input channels: the new ones count for nothing until they are trained."""
    wider = UNet2DConditionModel.from_config(unet.config, in_channels=channels)
    weights = unet.state_dict()
    extra = channels - unet.config.in_channels
    weights["conv_in.weight"] = functional.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, extra))
    wider.load_state_dict(weights)
    return wider


def build_upscale_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """An autoencoder of factor 4, its outer levels from one of factor 8."""
    smaller = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=128,
    )
    return load_fitting(smaller, vae.state_dict(), levels_less=1, blocks="decoder.up_blocks")


def build_upscale_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Two levels of the base's width, no attention at the first, the weights that fit from the base."""
    smaller = UNet2DConditionModel(
        sample_size=32,
        in_channels=7,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
        num_class_embeds=MAX_NOISE_LEVEL + 1,
    )
    weights = unet.state_dict()
    weights["conv_in.weight"] = functional.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, 3))
    load_fitting(smaller, weights, levels_less=1, blocks="up_blocks")
    torch.nn.init.zeros_(smaller.class_embedding.weight)
    return smaller


def load_fitting(
    module: torch.nn.Module, weights: dict[str, torch.Tensor], *, levels_less: int, blocks: str
) -> torch.nn.Module:
    """Load the weights of a deeper network that fit; its innermost `levels_less` of `blocks` have no counterpart."""
    own = module.state_dict()
    for name, value in weights.items():
        head, _, rest = name.removeprefix(f"{blocks}.").partition(".")
        target = f"{blocks}.{int(head) - levels_less}.{rest}" if name.startswith(f"{blocks}.") else name
        if target in own and own[target].shape == value.shape:
            own[target] = value
    module.load_state_dict(own)
    return module


def predict_with(unet: UNet2DConditionModel) -> Predict:
    """The prediction of a UNet that reads its condition from further input channels."""

    def predict(
        noisy: torch.Tensor, steps: torch.Tensor, embeds: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        predicted: torch.Tensor = unet(torch.cat([noisy, condition], dim=1), steps, embeds).sample
        return predicted

    return predict


def predict_with_edges(controlnet: ControlNetModel, unet: UNet2DConditionModel) -> Predict:
    """The prediction of the frozen base with what the ControlNet adds to it."""

    def predict(
        noisy: torch.Tensor, steps: torch.Tensor, embeds: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        image = (condition.float() / 255).expand(-1, 3, -1, -1)
        down, middle = controlnet(noisy, steps, embeds, image, return_dict=False)
        predicted: torch.Tensor = unet(
            noisy, steps, embeds, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        return predicted

    return predict


def predict_upscaled(unet: UNet2DConditionModel) -> Predict:
    """The prediction from a low-resolution picture with noise of a random level, most often a low one."""
    schedule = DDPMScheduler(**LOW_RES_SCHEDULE)

    def predict(
        noisy: torch.Tensor, steps: torch.Tensor, embeds: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        levels = ((MAX_NOISE_LEVEL + 1) * torch.rand(len(noisy)).square()).long()
        clean = condition.float() / 127.5 - 1
        image = schedule.add_noise(clean, torch.randn_like(clean), levels)
        predicted: torch.Tensor = unet(torch.cat([noisy, image], dim=1), steps, embeds, class_labels=levels).sample
        return predicted

    return predict


def draw_batch(groups: Sequence[Examples], size: int, *, windows: bool) -> Examples:
    """A random batch of one group, the larger groups more often; `windows`: four times as many, of WINDOW^2 latents."""
    counts = torch.tensor([float(len(group.latents)) for group in groups])
    group = groups[int(torch.multinomial(counts, 1))]
    if not windows:
        chosen = torch.randint(len(group.latents), (size,))
        return Examples(latents=group.latents[chosen], ids=group.ids[chosen], condition=group.condition[chosen])
    chosen = torch.randint(len(group.latents), (4 * size,))
    top, left = torch.randint(0, group.latents.shape[-1] - WINDOW + 1, (2,)).tolist()
    rows, columns = slice(top, top + WINDOW), slice(left, left + WINDOW)
    return Examples(
        latents=group.latents[chosen, :, rows, columns],
        ids=group.ids[chosen],
        condition=group.condition[chosen, :, rows, columns],
    )


def fine_tune(
    name: str, trained: torch.nn.Module, predict: Predict, groups: Sequence[Examples], base: Base, work: Path
) -> None:
    """Train `trained`, which `predict` uses, by the variant's recipe; leaves it with its averaged weights."""
    recipe, path = RECIPES[name], work / f"{name}.safetensors"
    if path.exists():
        trained.load_state_dict(load_file(path))
        return
    trained.to(memory_format=torch.channels_last).train()
    latest = path.with_suffix(".latest.safetensors")
    first = resume(trained, latest)
    torch.manual_seed(first)
    schedule = DDPMScheduler(**SCHEDULE)
    weights = loss_weights(schedule.alphas_cumprod)
    if recipe.prediction_type == "v_prediction":
        weights = weights * schedule.alphas_cumprod  # the error of v is that of epsilon divided by alpha
    empty = base.tokenizer("", padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    averaged = Averaged(trained, 0.995)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=recipe.peak, betas=(0.9, 0.99), weight_decay=1e-2)
    began, running = time.monotonic(), 0.0
    for iteration in range(first, recipe.iterations):
        batch = draw_batch(groups, recipe.batch, windows=iteration < recipe.windows * recipe.iterations)
        count = len(batch.latents)
        steps = torch.randint(0, 1000, (count,)) if recipe.layout_given else draw_timesteps(count)
        noise = torch.randn_like(batch.latents)
        noisy = schedule.add_noise(batch.latents, noise, steps)
        velocity = recipe.prediction_type == "v_prediction"
        target = schedule.get_velocity(batch.latents, noise, steps) if velocity else noise
        ids = torch.where(torch.rand(count, 1) < EMPTY_CAPTION_RATE, empty, batch.ids)
        with mixed_precision():
            with torch.no_grad():
                embeds = base.text_encoder(ids)[0]
            predicted = predict(noisy, steps, embeds, batch.condition).float()
        losses = (predicted - target).square().mean((1, 2, 3))
        warmth = 1.0 if first == 0 else min(1.0, (iteration - first) / WARM_UP)
        optimiser.param_groups[0]["lr"] = rate_at(iteration, recipe.iterations, recipe.peak) * warmth
        optimiser.zero_grad()
        loss = (losses * weights[steps]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        averaged.update(trained)
        running += max(0.02, 1 / (1 + iteration - first)) * (loss.item() - running)
        if iteration % 25 == 24:
            log(name, iteration=iteration + 1, seconds=round(time.monotonic() - began), loss=round(running, 5))
        if iteration % 100 == 99:
            atomic_save(averaged.module.state_dict(), latest, iteration=iteration + 1)
    atomic_save(averaged.module.state_dict(), path)
    trained.load_state_dict(averaged.module.state_dict())


def train_inpaint(base: Base, work: Path, out: Path) -> None:
    """Nine input channels: noisy latents, mask, masked picture's latents."""
    unet = with_more_inputs(base.unet, 9)
    groups = inpaint_examples(base, training_drawings(SCENES, seed=11), work)
    fine_tune("inpaint", unet, predict_with(unet), groups, base, work)
    unet.half().save_pretrained(out / "inpaint" / "unet")


def train_depth(base: Base, work: Path, out: Path) -> None:
    """Five input channels: noisy latents, depth."""
    unet = with_more_inputs(base.unet, 5)
    groups = depth_examples(base, training_drawings(SCENES, seed=11), work)
    fine_tune("depth", unet, predict_with(unet), groups, base, work)
    unet.half().save_pretrained(out / "depth" / "unet")


def train_edges(base: Base, work: Path, out: Path) -> None:
    """A ControlNet beside the frozen base."""
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=EDGE_CHANNELS)
    groups = edges_examples(base, training_drawings(SCENES, seed=11), work)
    base.unet.to(memory_format=torch.channels_last)
    fine_tune("edges", controlnet, predict_with_edges(controlnet, base.unet), groups, base, work)
    controlnet.half().save_pretrained(out / "edges")


def train_upscale(base: Base, work: Path, out: Path) -> None:
    """An autoencoder of factor 4, then a UNet of seven input channels over its latents."""
    vae = train_vae(
        work / "upscale-vae.safetensors",
        iterations=UPSCALE_VAE_ITERATIONS,
        start=build_upscale_vae(base.vae),
        batch_size=8,
        quarters=1.0,
    )
    groups = upscale_examples(base, vae, training_drawings(UPSCALE_SCENES, seed=41))
    unet = build_upscale_unet(base.unet)
    fine_tune("upscale", unet, predict_upscaled(unet), groups, base, work)
    vae.register_to_config(scaling_factor=UPSCALE_SCALING_FACTOR)
    vae.half().save_pretrained(out / "upscale" / "vae")
    unet.half().save_pretrained(out / "upscale" / "unet")
    DDPMScheduler(**LOW_RES_SCHEDULE).save_pretrained(out / "upscale" / "low_res_scheduler")
    DDIMScheduler(
        **SCHEDULE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ).save_pretrained(out / "upscale" / "scheduler")


TRAINERS = {"inpaint": train_inpaint, "depth": train_depth, "edges": train_edges, "upscale": train_upscale}


def drop_paths(folder: Path) -> None:
    """Remove from the configs where the weights were loaded from: it is a path of the machine that trained them."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=Path("build/shapes-variants"))
    arguments.add_argument("--base", type=Path, default=Path("models/shapes/checkpoint"))
    arguments.add_argument("--out", type=Path, default=Path("models/shapes"))
    arguments.add_argument("--only", choices=TRAINERS)
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name, trainer in TRAINERS.items():
        if options.only in (None, name):
            trainer(open_base(options.base), options.work, options.out)
            drop_paths(options.out / name)


if __name__ == "__main__":
    main()
