"""Makes the vision tokenizer that ships with the demo (`evaluation/assets/tabletop_vision_tokenizer`).

    python -m lapa.evaluation.demo_assets --output evaluation/assets/tabletop_vision_tokenizer

A code should depend on its own patch of the image alone: then the same effector in the same place is the same word
wherever the blocks lie, and a tiny trunk learns it from few frames. A VQGAN trained on reconstruction alone spreads a
patch over its neighbours (its norms and receptive fields do), so its codes are taught instead: patches are clustered,
and the encoder learns to name the cluster of every patch, the decoder to draw the image from the names.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.evaluation.demo_settings import DemoSettings
from lapa.evaluation.demo_stages import make_environment
from lapa.evaluation.environments.tabletop_recording import record_episode
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer

# Beyond every seed that the demo records or plays with.
ASSET_SEEDS = 300_000_000
EPISODES = {"arm": 1200, "gripper": 600, "human_video": 300}
KMEANS_PATCHES, KMEANS_ROUNDS = 60_000, 25
# Squared distance at which a code is e times less likely, in units of the mean squared distance between codes.
TEMPERATURE = 0.05


def record_frames(settings: DemoSettings) -> np.ndarray:
    """Frames (num_frames, 32, 32, 3) uint8 of several embodiments and all of the demo's families."""
    frames, seed = [], ASSET_SEEDS
    for embodiment, count in EPISODES.items():
        environment = make_environment(settings, embodiment)
        for index in tqdm(range(count), desc=f"recording {embodiment}"):
            family = settings.families[index % len(settings.families)]
            frames.append(record_episode(environment, None, seed, noise=0.3, exploration=0.03, family=family).frames)
            seed += 1
    return np.concatenate(frames)


def cut_patches(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """(batch, 3, height, width) -> (batch, patches, 3 * patch * patch)."""
    return F.unfold(pixels, patch, stride=patch).transpose(1, 2)


def nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centre of each point."""
    parts = [(centres.square().sum(1) - 2 * part @ centres.t()).argmin(1) for part in points.split(4096)]
    return torch.cat(parts)


def cluster(points: torch.Tensor, count: int) -> torch.Tensor:
    """k-means centres (count, dim); empty clusters restart at random points."""
    centres = points[torch.randperm(len(points))[:count]].clone()
    for _ in tqdm(range(KMEANS_ROUNDS), desc="clustering"):
        labels = nearest(points, centres)
        sizes = torch.bincount(labels, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
        empty = sizes == 0
        centres[empty] = points[torch.randint(len(points), (int(empty.sum()),))]
    return centres


def teach(model: LapaVisionTokenizer, pixels: torch.Tensor, centres: torch.Tensor, steps: int) -> None:
    """Train encoder and decoder; the codebook is the centres in their main directions and stays."""
    config = model.config
    left, singular, _ = torch.linalg.svd(centres - centres.mean(0), full_matrices=False)
    codebook = (left * singular)[:, : config.codebook_dim]
    codebook = codebook / codebook.square().sum(1).mean().sqrt()
    model.codebook.weight.data.copy_(codebook)
    model.requires_grad_(True)
    model.codebook.weight.requires_grad_(False)
    scale = TEMPERATURE * torch.cdist(codebook, codebook).square().mean()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    patch = config.downsampling_factor
    progress = tqdm(range(steps), desc="teaching")
    for step in progress:
        batch = pixels[torch.randint(len(pixels), (64,))].float() / 127.5 - 1
        names = nearest(cut_patches(batch, patch).flatten(0, 1), centres)
        latents = model.quant_conv(model.encoder(batch)).movedim(1, -1).flatten(0, -2)
        logits = -torch.cdist(latents, codebook).square() / scale
        drawn = model._reconstruct(codebook[names].reshape(len(batch), -1, config.codebook_dim).transpose(1, 2)
                                   .reshape(len(batch), config.codebook_dim, config.grid_size, -1))  # fmt: skip
        loss = F.cross_entropy(logits, names) + 10 * F.mse_loss(drawn, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            right = (logits.argmax(1) == names).float().mean().item()
            progress.set_postfix(loss=f"{loss.item():.3f}", named_right=f"{right:.3f}")


@torch.no_grad()
def judge(model: LapaVisionTokenizer, pixels: torch.Tensor, centres: torch.Tensor) -> dict[str, float]:
    """On frames that were not trained on: share of patches named as clustered, and reconstruction error."""
    batch = pixels.float() / 127.5 - 1
    names = nearest(cut_patches(batch, model.config.downsampling_factor).flatten(0, 1), centres)
    codes = model.encode(batch).codes
    return {
        "named as clustered": (codes.flatten() == names).float().mean().item(),
        "mean squared error, pixels in [-1, 1]": (model.decode(codes) - batch).square().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    args = parser.parse_args()
    torch.manual_seed(0)
    frames = record_frames(DemoSettings())
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[torch.randperm(len(frames))]
    held_out, pixels = pixels[:1000], pixels[1000:]
    config = LapaVisionTokenizerConfig(
        image_size=32,
        base_channels=16,
        channel_multipliers=[1, 2, 2, 4],
        num_res_blocks=1,
        latent_channels=32,
        codebook_size=1024,
        codebook_dim=16,
        num_norm_groups=4,
    )
    model = LapaVisionTokenizer(config)
    patches = torch.cat([cut_patches(part.float(), 8).flatten(0, 1) for part in pixels[:20_000].split(1000)])
    patches = torch.unique(patches, dim=0)
    patches = patches[torch.randperm(len(patches))[:KMEANS_PATCHES]] / 127.5 - 1
    centres = cluster(patches, config.codebook_size)
    teach(model, pixels, centres, args.steps)
    model.half().save_pretrained(args.output)
    model = LapaVisionTokenizer.from_pretrained(args.output, dtype=torch.float32).eval()
    for name, value in judge(model, held_out, centres).items():
        print(f"{name}: {value:.4f}")


if __name__ == "__main__":
    main()
