"""Does the codebook stay in use, and do its codes mean something? Ours beside the published training loop's rule.

    python benchmarks/quantizer_collapse.py --prepare pairs.npz --bridge bridge_rlds/1.0.0
    python benchmarks/quantizer_collapse.py --data pairs.npz --output collapse.jsonl --seeds 0 1 2 3 4 --jobs 2

Every run trains one small quantizer from scratch, with the published number of codes and tokens, and appends a line to
the output; runs that are there already are not repeated. The summary says which conditions hold. The second command needs
torch, transformers and numpy, and none of the simulator or the readers.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantizer_collapse_data import SOURCES, Pairs, load_pairs, prepare

# The published 8 codes, 4 tokens and 8 x 8 patches; everything else scaled down.
SIZES = {
    "hidden_size": 48,
    "codebook_dim": 8,
    "codebook_size": 8,
    "num_latent_tokens": 4,
    "num_spatial_layers": 1,
    "num_temporal_layers": 1,
    "num_attention_heads": 3,
    "head_dim": 16,
}
PUBLISHED_LAYOUT = {
    "bottleneck_activation": "relu",
    "action_injection": "cross_attention",
    "residual_decoding": False,
    "interleave_latent_tokens": True,
}
OUR_LAYOUT = {
    "bottleneck_activation": "leaky_relu",
    "action_injection": "additive",
    "residual_decoding": True,
    "interleave_latent_tokens": False,
}
PUBLISHED_LOOP = {"codebook_init_from_data": False, "codebook_update": "published"}
# What each variant is: fields of the model, arguments of the training. `published-rule` tells the rule from the layout.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ours": (OUR_LAYOUT, {"codebook_update_threshold": 0.3}),
    "published-rule": (OUR_LAYOUT, PUBLISHED_LOOP),
    "published": (PUBLISHED_LAYOUT, PUBLISHED_LOOP),
}
RECIPE = {
    "per_device_train_batch_size": 32,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.05},
    "warmup_steps": 50,
    "adam_beta2": 0.98,
    # The pixels that change are so few that the loss starts at 0.006, and its gradient is as small.
    "adam_epsilon": 1e-10,
    "max_grad_norm": 0.006,
    # A run that collapses is to be judged, not stopped.
    "min_perplexity": 1.0,
    "min_codes_used": 0.0,
}
# Pixels; a few hundred pairs are learned by heart otherwise.
SHIFT = {"tabletop": 0, "human": 0, "bridge": 6}
ENCODE_BATCH = 256
NUM_FOLDS, RIDGE = 5, 1.0
NUM_BOOTSTRAPS = 1000
MIN_USED = 0.9


class PairDataset(torch.utils.data.Dataset):
    """Pairs as the quantizer's trainer takes them, both frames moved alike by up to `shift` pixels at random."""

    def __init__(self, pairs: Pairs, shift: int) -> None:
        self.pairs, self.shift = pairs, shift

    def __len__(self) -> int:
        return len(self.pairs.first)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        frames = self.pairs.frames[[self.pairs.first[item], self.pairs.second[item]]]
        if self.shift:
            top, left = torch.randint(2 * self.shift + 1, (2,)).tolist()
            around = ((0, 0), (self.shift, self.shift), (self.shift, self.shift), (0, 0))
            padded = np.pad(frames, around, mode="edge")
            frames = padded[:, top : top + frames.shape[1], left : left + frames.shape[2]].copy()
        return {"frames": torch.from_numpy(frames).permute(0, 3, 1, 2)}


def train(pairs: Pairs, source: str, variant: str, seed: int, steps: int, device: str) -> Any:
    """A quantizer trained from scratch, by the trainer of stage 1."""
    from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
    from lapa.training.arguments import LapaQuantizerTrainingArguments
    from lapa.training.quantizer_trainer import LapaQuantizerTrainer

    layout, loop = VARIANTS[variant]
    size = pairs.frames.shape[1]
    torch.manual_seed(seed)
    model = LapaQuantizer(LapaQuantizerConfig(**SIZES, image_size=size, patch_size=size // 8, **layout))
    with tempfile.TemporaryDirectory() as folder:
        arguments = LapaQuantizerTrainingArguments(
            folder,
            **{**RECIPE, **loop, "warmup_steps": min(RECIPE["warmup_steps"], steps // 10)},
            max_steps=steps,
            seed=seed,
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=max(1, steps // 10),
            num_sample_reconstructions=0,
        )
        trainer = LapaQuantizerTrainer(model, arguments, PairDataset(pairs, SHIFT[source]))
        trainer.remove_callback(_printer())
        trainer.train()
    return model.eval()


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def _batches(pairs: Pairs, device: torch.device) -> Any:
    for start in range(0, len(pairs.first), ENCODE_BATCH):
        rows = slice(start, start + ENCODE_BATCH)
        frames = np.stack([pairs.frames[pairs.first[rows]], pairs.frames[pairs.second[rows]]], axis=1)
        yield rows, torch.from_numpy(frames).to(device).permute(0, 1, 4, 2, 3).float() / 255


@torch.no_grad()
def encode(model: Any, pairs: Pairs) -> np.ndarray:
    """Codes (num_pairs, num_latent_tokens)."""
    device = next(model.parameters()).device
    return np.concatenate([model.encode(pixels).latent_action_codes.cpu() for _, pixels in _batches(pairs, device)])


@torch.no_grad()
def errors(model: Any, pairs: Pairs, codes: np.ndarray) -> np.ndarray:
    """Mean squared error (num_pairs,) of decoding `codes`."""
    device, found = next(model.parameters()).device, []
    for rows, pixels in _batches(pairs, device):
        decoded = model.decode(pixels[:, 0], torch.from_numpy(codes[rows]).to(device))
        found.append((decoded - pixels[:, 1]).square().mean((1, 2, 3)).cpu().numpy())
    return np.concatenate(found)


def copy_errors(pairs: Pairs) -> np.ndarray:
    """Mean squared error (num_pairs,) of showing the first frame again."""
    return np.concatenate(
        [(pixels[:, 0] - pixels[:, 1]).square().mean((1, 2, 3)).numpy() for _, pixels in _batches(pairs, torch.device("cpu"))]
    )  # fmt: skip


class Bootstrap:
    """Resamples whole episodes, since the pairs of one are alike."""

    def __init__(self, episode: np.ndarray, seed: int) -> None:
        names, self.rows = np.unique(episode, return_inverse=True)
        generator = np.random.default_rng(seed)
        # How often each resampling holds each episode.
        self.counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), NUM_BOOTSTRAPS)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of `values` (num_pairs, ...) over each resampling."""
        totals = np.zeros((self.counts.shape[1], *values.shape[1:]))
        np.add.at(totals, self.rows, values)
        return np.tensordot(self.counts, totals, 1)


def interval(values: np.ndarray) -> list[float]:
    """95% interval of bootstrap values."""
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def ratio(numerator: np.ndarray, denominator: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Ratio of two means over pairs, with its bootstrap interval."""
    values = bootstrap.sums(numerator) / bootstrap.sums(denominator)
    return {"value": float(numerator.mean() / denominator.mean()), "ci95": interval(values)}


def probe_predictions(codes: np.ndarray, pairs: Pairs, codebook_size: int) -> np.ndarray:
    """What ridge regression from one-hot codes says of each pair's standardised target, fitted on other episodes."""
    target = standardised(pairs.target)
    features = np.eye(codebook_size)[codes].reshape(len(codes), -1)
    names = np.unique(pairs.episode)
    fold_of = dict(zip(names.tolist(), np.random.default_rng(0).permutation(len(names)) % NUM_FOLDS))
    folds = np.array([fold_of[name] for name in pairs.episode.tolist()])
    predicted = np.zeros_like(target)
    for fold in range(NUM_FOLDS):
        fit, held = folds != fold, folds == fold
        mean = target[fit].mean(0)
        gram = features[fit].T @ features[fit] + RIDGE * np.eye(features.shape[1])
        predicted[held] = mean + features[held] @ np.linalg.solve(gram, features[fit].T @ (target[fit] - mean))
    return predicted


def standardised(target: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance; dimensions that never change are left out."""
    target = target.astype(np.float64)
    moving = target.std(0) > 1e-6
    return (target[:, moving] - target[:, moving].mean(0)) / target[:, moving].std(0)


def r_squared(predicted: np.ndarray, pairs: Pairs, bootstrap: Bootstrap) -> dict[str, Any]:
    """Explained share of the variance, over all target dimensions."""
    target = standardised(pairs.target)
    residual = ((target - predicted) ** 2).sum(1)
    number, total, squares = (bootstrap.sums(v) for v in (np.ones(len(target)), target, (target**2).sum(1)))
    values = 1 - bootstrap.sums(residual) / (squares - (total**2).sum(1) / number)
    # The target has zero mean.
    return {"value": float(1 - residual.sum() / (target**2).sum()), "ci95": interval(values)}


def usage(codes: np.ndarray, codebook_size: int) -> dict[str, float]:
    """Codes in use and their perplexity, over all tokens."""
    share = np.bincount(codes.ravel(), minlength=codebook_size) / codes.size
    used = share[share > 0]
    return {"codes_used": len(used), "perplexity": float(np.exp(-(used * np.log(used)).sum()))}


def judge(model: Any, pairs: Pairs, held_out: np.ndarray, seed: int) -> dict[str, Any]:
    """
    Everything a line says about a trained quantizer.

    Args:
        model: Trained on the pairs that are not held out.
        pairs: All pairs.
        held_out: (num_pairs,) bool.
        seed: Of the shuffling and the resampling.
    """
    size, generator = model.config.codebook_size, np.random.default_rng(seed)
    codes, copy = encode(model, pairs), copy_errors(pairs)
    # Within either part, so that held-out frames meet held-out codes.
    order = np.arange(len(codes))
    for part in (held_out, ~held_out):
        order[part] = generator.permutation(order[part])
    true, shuffled = errors(model, pairs, codes), errors(model, pairs, codes[order])
    bootstrap, part = Bootstrap(pairs.episode, seed), Bootstrap(pairs.episode[held_out], seed)
    random_codes = generator.integers(0, size, codes.shape)
    return {
        "train": usage(codes[~held_out], size),
        "held_out": usage(codes[held_out], size),
        "sequences_used": len(np.unique(codes, axis=0)),
        "copy_first_frame_mse": float(copy.mean()),
        # Of the error of copying the first frame.
        "reconstruction": ratio(true, copy, bootstrap),
        "shuffled": ratio(shuffled, copy, bootstrap),
        "held_out_reconstruction": ratio(true[held_out], copy[held_out], part),
        "held_out_shuffled": ratio(shuffled[held_out], copy[held_out], part),
        "held_out_gain": ratio((shuffled - true)[held_out], copy[held_out], part),
        "probe": r_squared(probe_predictions(codes, pairs, size), pairs, bootstrap),
        "random_probe": r_squared(probe_predictions(random_codes, pairs, size), pairs, bootstrap),
    }


def run(data: Path, source: str, variant: str, seed: int, steps: int, device: str) -> dict[str, Any]:
    """Trains and judges one quantizer."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    pairs = load_pairs(data, source)
    held_out = pairs.held_out()
    model = train(pairs.take(np.flatnonzero(~held_out)), source, variant, seed, steps, device)
    trained = time.perf_counter()
    report = judge(model, pairs, held_out, seed)
    return {
        "source": source,
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "codebook_size": model.config.codebook_size,
        **report,
        "train_seconds": round(trained - begin, 1),
        "judge_seconds": round(time.perf_counter() - trained, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def conditions(line: dict[str, Any], control: dict[str, Any] | None) -> dict[str, bool]:
    """What must hold for a run of ours."""
    size = line["codebook_size"]
    found = {
        "codes used": line["train"]["codes_used"] >= MIN_USED * size,
        "perplexity": line["train"]["perplexity"] >= size / 2,
        "codes matter": line["reconstruction"]["ci95"][1] < line["shuffled"]["ci95"][0],
        # Few episodes are held out of the smallest source: the difference is taken pair by pair.
        "codes matter on held-out pairs": line["held_out_gain"]["ci95"][0] > 0,
    }
    if control is not None:
        found["beats control"] = line["probe"]["value"] > control["probe"]["value"]
    return found


def _cell(value: dict[str, Any]) -> str:
    return f"{value['value']:.3f} [{value['ci95'][0]:.3f}, {value['ci95'][1]:.3f}]"


def summarise(lines: list[dict[str, Any]], control: str) -> bool:
    """Prints a table; whether every run of ours met every condition."""
    print(
        "\n| source | variant | seed | codes | perplexity | error / copying | with shuffled codes | held out | with "
        "shuffled codes | probe R² | random codes | conditions |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    runs = {(line["source"], line["variant"], line["seed"]): line for line in lines}
    passed = True
    for (source, variant, seed), line in sorted(runs.items()):
        verdict = ""
        if variant == "ours":
            found = conditions(line, runs.get((source, control, seed)))
            passed &= all(found.values())
            verdict = (
                "all hold" if all(found.values()) else "FAILS: " + ", ".join(k for k, v in found.items() if not v)
            )
        print(
            f"| {source} | {variant} | {seed} | {line['train']['codes_used']}/{line['codebook_size']} | "
            f"{line['train']['perplexity']:.2f} | {_cell(line['reconstruction'])} | {_cell(line['shuffled'])} | "
            f"{line['held_out_reconstruction']['value']:.3f} | {line['held_out_shuffled']['value']:.3f} | "
            f"{_cell(line['probe'])} | {line['random_probe']['value']:.3f} | {verdict} |"
        )
    return passed


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Finished runs of an output file; a line that was cut off is not one."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{path}: a line that was cut off is left out")
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FILE.npz", help="record the pairs and stop")
    parser.add_argument("--bridge", default="../shared/data/bridge_rlds/1.0.0", help="RLDS folder, for --prepare")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="what --prepare wrote")
    parser.add_argument("--output", type=Path, default=Path("outputs/quantizer_collapse.jsonl"))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--control", choices=list(VARIANTS), default="published", help="what ours must beat")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if (args.prepare is None) == (args.data is None):
        parser.error("give either --prepare or --data")
    return args


def main() -> int:
    args = parse_arguments()
    if args.prepare is not None:
        prepare(args.prepare, args.bridge)
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in read_lines(args.output) if line["steps"] == args.steps]
    done = {(line["source"], line["variant"], line["seed"]) for line in lines}
    jobs = [(source, variant, seed) for seed in args.seeds for source in args.sources for variant in args.variants]
    jobs = [job for job in jobs if job not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool, args.output.open("a", encoding="utf-8") as file:
        futures = [pool.submit(run, args.data, *job, args.steps, args.device) for job in jobs]
        for future in as_completed(futures):
            if future.exception() is not None:
                print(f"a run failed: {future.exception()!r}", flush=True)
                continue
            line = future.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            lines.append(line)
            print(f"{len(lines)}/{len(jobs) + len(done)} {json.dumps(line)}", flush=True)
    return 0 if summarise(lines, args.control) else 1


if __name__ == "__main__":
    raise SystemExit(main())
