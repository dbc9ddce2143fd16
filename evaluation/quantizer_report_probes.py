"""Probes: how much of an action, or of motion, the latent actions tell, on episodes that the probe was not fitted on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lapa.evaluation.quantizer_report_statistics import Cell, mean_cell, r2_cell

NUM_FOLDS = 5
# Strengths of the linear probe's ridge; the last leaves the mean.
RIDGES = 10.0 ** np.arange(-2, 7)
MLP_WIDTH, MLP_STEPS, MLP_LEARNING_RATE, MLP_WEIGHT_DECAY = 64, 200, 5e-3, 1e-2
# The MLP is judged every so many steps, and stopped when so many judgements brought nothing.
MLP_CHECK, MLP_PATIENCE = 10, 4
# Share of the fitted groups that the MLP's stopping step is chosen on.
MLP_HELD_SHARE = 0.2
# Fewer pairs than this say nothing.
MIN_PAIRS = 20

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def one_hot(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """(num_pairs, num_latent_tokens) codes -> (num_pairs, num_latent_tokens * used codes) float64, unused ones left out."""
    columns = [np.unique(column) for column in codes.T]
    assert max(int(column.max()) for column in columns) < codebook_size
    return np.concatenate(
        [(codes[:, [token]] == used[None]).astype(np.float64) for token, used in enumerate(columns)], 1
    )


def fold_of(group: np.ndarray, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """Fold (num_pairs,) of each pair; groups are never split, and their order is drawn with a fixed seed."""
    _, index = np.unique(group, return_inverse=True)
    order = np.random.default_rng(0).permutation(index.max() + 1)
    return np.asarray(order[index] % min(num_folds, index.max() + 1))


def _standard(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    return mean, np.where(deviation > 1e-9 * np.maximum(np.abs(values).max(axis=0), 1e-12), deviation, 1.0)


def fit_linear(features: np.ndarray, target: np.ndarray, group: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression on centred features; each dimension gets the strength that leave-one-out error asks for."""
    mean, target_mean = features.mean(axis=0), target.mean(axis=0)
    y = target - target_mean
    left, singular, right = np.linalg.svd(features - mean, full_matrices=False)
    projected = left.T @ y
    shrink = singular[:, None] ** 2 / (singular[:, None] ** 2 + RIDGES)
    errors = []
    for factor in shrink.T:
        # The mean is left one out, too.
        leverage = np.minimum(left**2 @ factor + 1 / len(y), 1 - 1e-9)
        residual = (y - left @ (factor[:, None] * projected)) / (1 - leverage)[:, None]
        errors.append((residual**2).sum(axis=0))
    chosen = np.argmin(errors, axis=0)
    scale = np.divide(shrink[:, chosen], singular[:, None], out=np.zeros((len(singular), y.shape[1])),
                      where=singular[:, None] > 1e-10 * max(singular.max(initial=0.0), 1e-300))  # fmt: skip
    weights = right.T @ (scale * projected)
    return lambda new: np.asarray((new - mean) @ weights + target_mean)


def fit_mlp(features: np.ndarray, target: np.ndarray, group: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Two hidden layers, stopped where a held-out part of the groups is predicted best; always the same result."""
    (x_mean, x_std), (y_mean, y_std) = _standard(features), _standard(target)
    x = torch.from_numpy((features - x_mean) / x_std).float()
    y = torch.from_numpy((target - y_mean) / y_std).float()
    held = torch.from_numpy(fold_of(group, round(1 / MLP_HELD_SHARE)) == 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], MLP_WIDTH),
            torch.nn.GELU(),
            torch.nn.Linear(MLP_WIDTH, MLP_WIDTH),
            torch.nn.GELU(),
            torch.nn.Linear(MLP_WIDTH, y.shape[1]),
        )
    optimizer = torch.optim.AdamW(network.parameters(), lr=MLP_LEARNING_RATE, weight_decay=MLP_WEIGHT_DECAY)
    # Before any step it predicts the mean: what an uninformative probe is left at.
    best, best_loss = None, float(y[held].square().mean()) if held.any() else float("inf")
    best_step = 0
    for step in range(MLP_STEPS):
        loss = F.mse_loss(network(x[~held]), y[~held])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % MLP_CHECK == MLP_CHECK - 1 and held.any():
            with torch.no_grad():
                held_loss = F.mse_loss(network(x[held]), y[held]).item()
            if held_loss < best_loss:
                best_loss, best_step = held_loss, step
                best = {name: value.clone() for name, value in network.state_dict().items()}
            elif step - best_step >= MLP_CHECK * MLP_PATIENCE:
                break
    if best is not None:
        network.load_state_dict(best)

    def predict(new: np.ndarray) -> np.ndarray:
        if best is None:
            return np.broadcast_to(y_mean, (len(new), len(y_mean)))
        with torch.no_grad():
            return (
                np.asarray(network(torch.from_numpy((new - x_mean) / x_std).float()).double().numpy()) * y_std + y_mean
            )

    return predict


FITS: dict[str, Fit] = {"linear": fit_linear, "mlp": fit_mlp}


def cross_predict(features: np.ndarray, target: np.ndarray, group: np.ndarray, fit: Fit) -> np.ndarray:
    """Predictions (num_pairs, dim) of probes that did not see the pair's group."""
    fold, predicted = fold_of(group), np.empty_like(target)
    for number in np.unique(fold):
        inside = fold == number
        if inside.all():
            predicted[:] = target.mean(axis=0)
            continue
        predicted[inside] = fit(features[~inside], target[~inside], group[~inside])(features[inside])
    return predicted


def probe(features: np.ndarray, target: np.ndarray, group: np.ndarray, fit: Fit) -> Cell:
    """
    One probe, cross-validated by group.

    Returns:
        `r2` (`value` and `ci95`; mean over the dimensions that vary), `r2_per_dimension`, and `normalised_mse`: mean
        squared error of the action divided by its standard deviation per dimension, so 1 is the mean action.
    """
    predicted = cross_predict(features, target, group, fit)
    cell = r2_cell(predicted, target, group)
    _, deviation = _standard(target)
    error = (((predicted - target) / deviation) ** 2).mean(axis=1)
    return {
        "r2": {"value": cell["value"], "ci95": cell["ci95"]},
        "r2_per_dimension": cell["per_dimension"],
        "normalised_mse": mean_cell(error, group),
    }


def action_probes(
    codes: np.ndarray, embeddings: np.ndarray, target: np.ndarray, group: np.ndarray, codebook_size: int
) -> dict[str, Any]:
    """
    Probes from codes (`linear`, `mlp`) and from embeddings before quantisation (`embeddings.linear`, `embeddings.mlp`).

    `shuffled` is the linear probe on codes of other pairs: what chance gives.
    """
    features = one_hot(codes, codebook_size)
    shuffled = features[np.random.default_rng(0).permutation(len(features))]
    flat = embeddings.reshape(len(embeddings), -1).astype(np.float64)
    mean, deviation = _standard(flat)
    flat = (flat - mean) / deviation
    result: dict[str, Any] = {name: probe(features, target, group, fit) for name, fit in FITS.items()}
    result["embeddings"] = {name: probe(flat, target, group, fit) for name, fit in FITS.items()}
    result["shuffled"] = probe(shuffled, target, group, fit_linear)
    return result
