"""The recipe of the `shapes` checkpoint: tokenizer, autoencoder, then text encoder and UNet together.

    python -m sdrt.models.shapes.train --work build/shapes --out models/shapes/checkpoint

Each stage leaves its result in the work folder and is skipped when that result is there already, so
a run that was interrupted goes on where it stopped. Losses go to standard output as JSON lines.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdrt.models.shapes.reading import build_reader, end_of_caption, reading_loss, reading_targets
from sdrt.models.shapes.scenes import is_held_out, sample_scene, scenes

VAE_SCENES = 4_000
UNET_SCENES = 20_000
TEXT_LENGTH = 77
EMPTY_CAPTION_RATE = 0.1
LAYOUT_START = 0.7  # of the timesteps: above, the picture's layout is still open
READING_ITERATIONS = 800
READING_WEIGHT = 0.05
WARM_UP = 100  # iterations after a start or a resume: the optimiser's own state starts empty
SNR_CAP = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def log(stage: str, **figures: float) -> None:
    print(json.dumps({"stage": stage, **figures}), flush=True)


def mixed_precision() -> torch.autocast:
    """bf16 where the processor computes in it; emulated, it takes several times as long as float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=native)


def build_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges are learnt on the captions."""
    base = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    base.normalizer = normalizers.Lowercase()
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=4_000, end_of_word_suffix="</w>", min_frequency=2, show_progress=False)
    base.train_from_iterator(captions, trainer)
    learnt = [tuple(merge) for merge in json.loads(base.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in learnt)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=learnt, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_vae() -> AutoencoderKL:
    """The autoencoder of Stable Diffusion (factor 8, 4 latent channels) at 0.88 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=128,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of 2 layers, width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion with three levels, 3.9 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96, 112),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers reads this as the number of heads in models of this layout
        norm_num_groups=8,
    )


def rate_at(iteration: int, iterations: int, peak: float) -> float:
    """Linear warm-up over the first 2 % of the run, then a cosine down to 2 % of the peak."""
    progress = iteration / iterations
    return peak * min(progress / 0.02 + 0.01, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Averaged:
    """An exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, value in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


def atomic_save(tensors: dict[str, torch.Tensor], path: Path, *, iteration: int | None = None) -> None:
    partial = path.with_suffix(".partial")
    metadata = None if iteration is None else {"iteration": str(iteration)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def resume(module: torch.nn.Module, path: Path) -> int:
    """Load an interrupted run's averaged weights, if there are any, and say at which iteration to go on."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        iteration = int(file.metadata()["iteration"])
    module.load_state_dict(load_file(path))
    return iteration


def pictures(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """uint8 [count, 3, 128, 128] and their captions, from the training split."""
    drawn = [next_scene for next_scene, _ in zip(scenes(seed, held_out=False), range(count), strict=False)]
    stacked = torch.from_numpy(np.stack([picture for _, picture in drawn])).permute(0, 3, 1, 2)
    return stacked.contiguous(memory_format=torch.channels_last), [scene.caption for scene, _ in drawn]


def train_vae(
    path: Path, *, iterations: int, start: AutoencoderKL | None = None, batch_size: int = 16, quarters: float = 0.67
) -> AutoencoderKL:
    """L1 + MSE, a light pull of the latents to zero and a little noise on them instead of a KL term.

    start: the autoencoder to begin with; without one, a new one of factor 8.
    quarters: the share of the iterations, the first ones, that see `batch_size` quarter pictures; the others see
        half as many whole ones.
    """
    torch.manual_seed(0)
    vae = (start or build_vae()).to(memory_format=torch.channels_last)
    if path.exists():
        vae.load_state_dict(load_file(path))
        return vae
    images, _ = pictures(VAE_SCENES, seed=1)
    averaged = Averaged(vae, 0.999)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)

    def loss_of(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = vae.encode(batch).latent_dist.mode()
        decoded = vae.decode(latents + 0.05 * torch.randn_like(latents)).sample.float()
        difference = decoded - batch
        l1 = difference.abs().mean()
        return l1 + difference.square().mean() + 1e-4 * latents.float().square().mean(), l1

    began, running = time.monotonic(), 0.0
    for iteration in range(iterations):
        # Two thirds of the steps, half of the time, on quarter pictures: more scenes for the same work.
        small = iteration < quarters * iterations
        batch = images[torch.randint(len(images), (batch_size if small else batch_size // 2,))]
        if small:
            top, left = torch.randint(0, 65, (2,)).tolist()
            batch = batch[:, :, top : top + 64, left : left + 64]
        batch = batch.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1
        with mixed_precision():
            loss, l1 = loss_of(batch)
        optimiser.param_groups[0]["lr"] = rate_at(iteration, iterations, 1e-3)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        averaged.update(vae)
        running = l1.item() if iteration == 0 else 0.98 * running + 0.02 * l1.item()
        if iteration % 100 == 99:
            log("vae", iteration=iteration + 1, seconds=round(time.monotonic() - began), l1=round(running, 5))
    atomic_save(averaged.module.state_dict(), path)
    vae.load_state_dict(averaged.module.state_dict())
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """The latents' means, float32 [count, 4, 16, 16]."""
    parts = []
    for batch in images.split(8):
        with mixed_precision():
            parts.append(vae.encode(batch.float() / 127.5 - 1).latent_dist.mode().float())
    return torch.cat(parts)


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: torch.Tensor, *, scaling_factor: float = 1.0) -> torch.Tensor:
    """Fold a per-channel scale and shift into (post_)quant_conv, so that one scaling factor serves.

    Returns the latents as the changed autoencoder would encode them: zero mean, unit variance once scaled.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * scaling_factor
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    # The rows after the means are log-variances: nearly no sampling noise, as trained.
    quant.weight[channels:] = 0.0
    quant.bias[channels:] = -12.0
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= deviation.view(1, -1, 1, 1)
    return (latents - mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)


def loss_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The weight of the squared error of epsilon at each timestep: that of the v objective, less with little noise.

    With much noise epsilon is nearly the input and its error tiny, but it is where the places of the objects are
    decided: in terms of v (Salimans and Ho 2022, "Progressive Distillation", section 4) it counts as much as it should.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (SNR_CAP / snr).clamp(max=1.0) * (1 + 1 / snr)


def draw_timesteps(count: int) -> torch.Tensor:
    """int64 [count]: half from all of them, half from the noisiest, each half stratified to vary less."""
    even = (torch.arange(count) // 2 + torch.rand(count)) / ((count + 1) // 2)
    fractions = torch.where(torch.arange(count) % 2 == 0, even, LAYOUT_START + (1 - LAYOUT_START) * even)
    return (1000 * fractions).long().clamp(max=999)


def teach_reading(both: torch.nn.ModuleDict, tokenizer: CLIPTokenizer) -> None:
    """Train the text encoder and its reader on captions alone, which takes seconds, before a UNet listens to it."""
    rng = np.random.default_rng(3)
    parameters = [*both["text_encoder"].parameters(), *both["reader"].parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    began = time.monotonic()
    for iteration in range(READING_ITERATIONS):
        captions = [caption for caption in (sample_scene(rng).caption for _ in range(96)) if not is_held_out(caption)]
        ids = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
        embeds = both["text_encoder"](ids)[0]
        ends = end_of_caption(embeds, ids, tokenizer.eos_token_id)
        loss, right = reading_loss(both["reader"](ends), reading_targets(captions))
        optimiser.param_groups[0]["lr"] = rate_at(iteration, READING_ITERATIONS, 1e-3)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if iteration % 100 == 99:
            seconds = round(time.monotonic() - began)
            log("reading", iteration=iteration + 1, seconds=seconds, loss=round(loss.item(), 5), right=right.item())


def train_denoiser(
    latents: torch.Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    path: Path,
    *,
    iterations: int,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Epsilon prediction, text encoder and UNet together; the text encoder goes on being asked what it read."""
    torch.manual_seed(0)
    both = torch.nn.ModuleDict({"text_encoder": build_text_encoder(tokenizer), "unet": build_unet()})
    both["unet"].to(memory_format=torch.channels_last)
    both["reader"] = build_reader(both["text_encoder"].config.hidden_size)
    if path.exists():
        both.load_state_dict(load_file(path))
        return both["text_encoder"], both["unet"]
    ids = tokenizer(["", *captions], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    readings = reading_targets(["", *captions])
    schedule = DDPMScheduler(**SCHEDULE)
    weights = loss_weights(schedule.alphas_cumprod)
    latest = path.with_suffix(".latest.safetensors")
    first = resume(both, latest)
    if first == 0:
        teach_reading(both, tokenizer)
    averaged = Averaged(both, 0.999)
    optimiser = torch.optim.AdamW(both.parameters(), lr=1.2e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    size, began, running = 48, time.monotonic(), 1.0
    for iteration in range(first, iterations):
        chosen = torch.randint(len(latents), (size,))
        rows = torch.where(torch.rand(size) < EMPTY_CAPTION_RATE, 0, chosen + 1)
        steps = draw_timesteps(size)
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        noisy = schedule.add_noise(clean, noise, steps).contiguous(memory_format=torch.channels_last)
        with mixed_precision():
            embeds = both["text_encoder"](ids[rows])[0]
            predicted = both["unet"](noisy, steps, embeds).sample.float()
        losses = (predicted - noise).square().mean((1, 2, 3))
        ends = end_of_caption(embeds.float(), ids[rows], tokenizer.eos_token_id)
        misread, read = reading_loss(both["reader"](ends), readings[rows])
        optimiser.param_groups[0]["lr"] = rate_at(iteration, iterations, 1.2e-3) * min(1, (iteration - first) / WARM_UP)
        optimiser.zero_grad()
        loss = (losses * weights[steps]).mean()
        (loss + READING_WEIGHT * misread).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        averaged.update(both)
        running += max(0.02, 1 / (1 + iteration - first)) * (loss.item() - running)
        if iteration % 50 == 49:
            seconds = round(time.monotonic() - began)
            log(
                "denoiser", iteration=iteration + 1, seconds=seconds, loss=round(running, 5), read=round(read.item(), 3)
            )
        if iteration % 250 == 249:
            atomic_save(averaged.module.state_dict(), latest, iteration=iteration + 1)
    atomic_save(averaged.module.state_dict(), path)
    both.load_state_dict(averaged.module.state_dict())
    return both["text_encoder"], both["unet"]


def package(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
    out: Path,
) -> None:
    """Write the diffusers folder, weights in half precision."""
    vae.register_to_config(scaling_factor=1.0)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(out)
    index = out / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_name_or_path": "shapes"}, indent=2) + "\n")
    # DDIM has no such field, but a PNDM made from this config needs it, as in Stable Diffusion 2.1.
    path = out / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"skip_prk_steps": True}, indent=2) + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=Path("build/shapes"))
    arguments.add_argument("--out", type=Path, default=Path("models/shapes/checkpoint"))
    arguments.add_argument("--vae-iterations", type=int, default=4_200)
    arguments.add_argument("--denoiser-iterations", type=int, default=6_500)
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    vae = train_vae(options.work / "vae.safetensors", iterations=options.vae_iterations)
    images, captions = pictures(UNET_SCENES, seed=2)
    latents = whiten(vae, encode_all(vae, images))
    tokenizer = build_tokenizer(captions, options.work / "tokenizer")
    text_encoder, unet = train_denoiser(
        latents,
        captions,
        tokenizer,
        options.work / "denoiser.safetensors",
        iterations=options.denoiser_iterations,
    )
    package(vae, text_encoder, unet, tokenizer, options.out)


if __name__ == "__main__":
    main()
