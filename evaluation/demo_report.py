"""The demo's report: numbers to JSON, numbers and pictures to one HTML page."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lapa.data.atomic_files import write_atomically
from lapa.evaluation import report as page
from lapa.evaluation.demo_settings import DemoSettings
from lapa.evaluation.demo_stages import Recording, shown_episodes
from lapa.evaluation.statistics import intervals_overlap, success_table
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.training.metrics import code_usage, perplexity

if TYPE_CHECKING:
    from lapa.evaluation.demo import Progress

LABELS = {
    "lapa": "LAPA",
    "lapa_decoder": "LAPA, codes decoded (not finetuned)",
    "scratch": "Scratch (same trunk, data and steps, no video)",
    "expert": "scripted expert (sees the state)",
    "do_nothing": "do nothing",
}
COLOURS = {
    "lapa": "#3366aa",
    "lapa_decoder": "#88bbee",
    "scratch": "#cc8844",
    "expert": "#99bb99",
    "do_nothing": "#bbbbbb",
}
NUM_RECONSTRUCTIONS, NUM_EFFECT_FRAMES, NUM_PROBE_PAIRS, PICTURE_SCALE = 8, 5, 4000, 3


def code_motion(codes: np.ndarray, motion: np.ndarray, codebook_size: int) -> float:
    """Share of the variance of the true motion (num_pairs, 2 or 3) that the codes (num_pairs, num_latent_tokens) explain.

    A linear probe on one-hot codes, fitted on one half of the pairs and scored on the other.
    """
    one_hot = np.eye(codebook_size)[codes].reshape(len(codes), -1)
    one_hot = np.concatenate([one_hot, np.ones((len(codes), 1))], axis=1)
    half = len(codes) // 2
    weights = np.linalg.lstsq(one_hot[:half], motion[:half], rcond=None)[0]
    residual = ((motion[half:] - one_hot[half:] @ weights) ** 2).sum()
    return float(1 - residual / ((motion[half:] - motion[half:].mean(0)) ** 2).sum())


class QuantizerPictures:
    """Reconstructions, what each code does, and how codes relate to the true motion."""

    def __init__(self, settings: DemoSettings, video: Recording, codes: np.ndarray, folder: Path) -> None:
        self.settings, self.video, self.codes = settings, video, codes
        self.quantizer = LapaQuantizer.from_pretrained(folder).eval()
        _, self.first = video.steps(settings.frame_gap)
        self.second = self.first + settings.frame_gap
        generator = np.random.default_rng(0)
        self.sample = generator.permutation(len(codes))[:NUM_PROBE_PAIRS]
        self.motion = video.effector[self.second] - video.effector[self.first]
        self.used = np.flatnonzero(np.bincount(codes[:, 0], minlength=settings.codebook_size))

    def _pixels(self, frames: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.video.frames[frames]).permute(0, 3, 1, 2).float() / 255

    @torch.no_grad()
    def reconstructions(self) -> str:
        """Columns of first frame, second frame, decoded second frame."""
        chosen = self.sample[:NUM_RECONSTRUCTIONS]
        pairs = torch.stack((self._pixels(self.first[chosen]), self._pixels(self.second[chosen])), 1)
        first, second = self.quantizer.align(pairs).unbind(1)
        decoded = self.quantizer.decode(first, torch.from_numpy(self.codes[chosen]))
        rows = [page.to_uint8(frames.numpy()) for frames in (first, second, decoded)]
        return page.png(page.grid([list(row) for row in rows]), PICTURE_SCALE)

    @torch.no_grad()
    def code_effects(self) -> str:
        """One row per frame: the frame itself, then what each used code makes of it."""
        rows = []
        for pair in self.sample[:NUM_EFFECT_FRAMES]:
            first = self._pixels(self.first[[pair]]).expand(len(self.used), -1, -1, -1)
            codes = torch.from_numpy(np.repeat(self.codes[[pair]], len(self.used), axis=0))
            codes[:, 0] = torch.from_numpy(self.used)
            decoded = page.to_uint8(self.quantizer.decode(first, codes).numpy())
            rows.append([page.to_uint8(first[0].numpy()), *decoded])
        return page.png(page.grid(rows), PICTURE_SCALE)

    def scatter(self) -> Any:
        """True motion of the end effector in centimetres, coloured by the first code."""
        return page.displacement_scatter(self.codes[self.sample, 0], 100 * self.motion[self.sample], "cm")

    def numbers(self) -> dict[str, float]:
        """Codes in use, perplexity, and the share of the true motion that the codes explain."""
        counts = torch.from_numpy(np.bincount(self.codes.ravel(), minlength=self.settings.codebook_size))
        return {
            "codes_used": int((code_usage(counts) > 0).sum()),
            "codebook_size": self.settings.codebook_size,
            "perplexity": perplexity(counts),
            "motion_r2": code_motion(self.codes[self.sample], self.motion[self.sample], self.settings.codebook_size),
        }


def verdict(methods: dict[str, Any]) -> str:
    """What the table says, whichever way it came out."""
    scratch = methods["scratch"]["pooled"]
    return (
        f"Scratch solved {_solved(scratch)} episodes, LAPA {_beside(methods['lapa']['pooled'], scratch)}. LAPA with its codes "
        f"decoded, in place of a finetuned head, solved {_beside(methods['lapa_decoder']['pooled'], scratch)}."
    )


def _solved(cell: dict[str, Any]) -> str:
    return f"{cell['successes']} of {cell['rollouts']} ({100 * cell['success']:.1f}%)"


def _beside(cell: dict[str, Any], scratch: dict[str, Any]) -> str:
    relation = "above" if cell["success"] > scratch["success"] else "not above"
    overlap = "overlap" if intervals_overlap(cell, scratch) else "do not overlap"
    return f"{_solved(cell)}: {relation} Scratch, and the 95% intervals {overlap}"


def comparison_rows(results: dict[str, Any], settings: DemoSettings, output: Path) -> list[dict[str, Any]]:
    """The recorded rollouts: one row per episode, one animation per method."""
    frames = {name: np.load(output / f"frames_{name}.npz") for name in results["rollouts"]}
    rows = []
    for index in shown_episodes(settings):
        cells = [
            {
                "method": name,
                "gif": page.gif(list(frames[name][str(index)]), PICTURE_SCALE),
                "success": results["rollouts"][name][index]["success"],
            }
            for name in ("lapa", "lapa_decoder", "scratch", "expert")
        ]
        first = results["rollouts"]["lapa"][index]
        rows.append({"cells": cells, "instruction": first["instruction"], "family": first["family"]})
    return rows


def write_tabletop_report(
    settings: DemoSettings, seed: int, embodiment: str, output: Path, progress: "Progress", results: dict[str, Any]
) -> dict[str, Any]:
    """Write `report.json` and `report.html`; returns what the JSON file holds."""
    from lapa.evaluation.demo import versions

    methods = {}
    for name in LABELS:
        rollouts = results["rollouts"][name]
        outcomes: dict[str, list[bool]] = {family: [] for family in settings.families}
        for rollout in rollouts:
            outcomes[rollout["family"]].append(rollout["success"])
        methods[name] = success_table(outcomes)
    video, codes = Recording.load(output / "video.npz"), np.load(output / "codes.npy")
    pictures = QuantizerPictures(settings, video, codes, output / "quantizer")
    report = {
        "seed": seed,
        "video_embodiment": embodiment,
        "minutes": sum(progress.seconds.values()) / 60,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rollouts_per_method": settings.rollouts_per_family * len(settings.families),
        "methods": methods,
        "quantizer": pictures.numbers(),
        "recorded": results["recorded"],
        "stage_seconds": progress.seconds,
        "settings": settings.to_dict(),
    }
    numbers = report["quantizer"]
    finetuning = {LABELS[name].split(" (")[0]: results[f"finetuning_{name}"] for name in ("lapa", "scratch")}
    html = page.render(
        "demo_report.html",
        report=report,
        labels=LABELS,
        families=settings.families,
        verdict=verdict(methods),
        setting_sentence=(
            f"Video: {sum(settings.video_episodes.values())} episodes of the {embodiment} without actions. Labelled: "
            f"{settings.labelled_episodes_per_family * len(settings.families)} episodes of the arm."
        ),
        bars=page.success_bars(methods, COLOURS),
        rollouts=comparison_rows(results, settings, output),
        quantizer_sentence=(
            f"{numbers['codes_used']} of {numbers['codebook_size']} codes are in use, perplexity "
            f"{numbers['perplexity']:.1f}. A linear probe from the codes to the end effector's true motion explains "
            f"{100 * numbers['motion_r2']:.0f}% of its variance."
        ),
        reconstructions=pictures.reconstructions(),
        code_effects=pictures.code_effects(),
        shown_codes=[str(code) for code in pictures.used],
        scatter=pictures.scatter(),
        quantizer_curve=page.curves({"quantizer": results["quantizer"]}, "loss", "loss"),
        pretraining_curve=page.curves({"pretraining": results["pretraining"]}, "latent_loss", "cross entropy"),
        finetuning_curve=page.curves(finetuning, "action_loss", "cross entropy"),
        decoding_curve=page.curves({"decoder": results["decoding"]}, "loss", "squared error"),
        uniform_loss=float(np.log(settings.codebook_size)),
        settings=settings.to_dict(),
        command=f"lapa demo --seed {seed}" + (" --cross-embodiment" if embodiment != "arm" else ""),
    )
    write_atomically(output / "report.html", html.encode())
    write_atomically(output / "report.json", json.dumps(report, indent=1).encode())
    for name in ("lapa", "lapa_decoder", "scratch"):
        write_atomically(
            output / name / "lapa_results.json", json.dumps(card_results(methods[name]), indent=1).encode()
        )
    return report


def card_results(table: dict[str, Any]) -> dict[str, Any]:
    """A method's row in the form that `lapa export` renders into the model card."""
    cells = {**table["families"], "all": table["pooled"]}
    return {
        "results": [
            {
                "dataset": f"tabletop, {family}",
                "metric": "success",
                "value": cell["success"],
                "ci95": cell["ci95"],
                "episodes": cell["rollouts"],
            }
            for family, cell in cells.items()
        ]
    }
