"""Metrics by hand."""

import numpy as np
import pytest
import torch

from lapa.training.metrics import (
    RunningMeans,
    action_error,
    code_usage,
    count_codes,
    mean_action_error,
    num_codes_used,
    num_sequences_used,
    per_dimension,
    perplexity,
    token_accuracy,
)


def test_every_occurrence_counts():
    assert count_codes(torch.tensor([[0, 2], [2, 2]]), 4).tolist() == [1, 0, 3, 0]


def test_usage_and_perplexity():
    assert code_usage([3, 1, 0]).tolist() == [0.75, 0.25, 0]
    assert code_usage([0, 0]).tolist() == [0, 0]
    assert perplexity([5, 0, 0, 0]) == pytest.approx(1)
    assert perplexity([2, 2, 2, 2]) == pytest.approx(4)
    assert perplexity([3, 1]) == pytest.approx(4 / 27**0.25)
    assert num_codes_used([3, 0, 1]) == 2


def test_sequences_used():
    assert num_sequences_used([[0, 1], [1, 0], [0, 1]]) == 2
    with pytest.raises(ValueError, match="num_latent_tokens"):
        num_sequences_used([0, 1])


def test_token_accuracy_per_column():
    assert token_accuracy([[1, 2], [3, 4]], [[1, 0], [3, 4]]).tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 3\)"):
        token_accuracy([[1, 2]], [[1, 2, 3]])


def test_action_errors_beside_the_mean_action():
    target = [[0.0, 1.0], [2.0, -1.0]]
    assert action_error([[1.0, 1.0], [2.0, 0.0]], target).tolist() == [0.5, 0.5]
    # The mean of the training actions is (1, 0): off by 1 in both dimensions, every time.
    assert mean_action_error([[0.0, 0.0], [2.0, 0.0]], target).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="non-empty"):
        action_error(np.zeros((0, 2)), np.zeros((0, 2)))


def test_running_means_weigh_and_start_anew():
    means = RunningMeans()
    means.add({"loss": torch.tensor(1.0), "accuracy": None}, weight=3)
    means.add({"loss": torch.tensor(5.0), "accuracy": torch.tensor(0.5)}, weight=1)
    assert means.pop() == {"accuracy": 0.5, "loss": 2.0}
    assert means.pop() == {}


def test_running_means_over_processes():
    means = RunningMeans()
    means.add({"loss": torch.tensor(1.0)}, weight=1)
    # Another process that saw three times as much, at 5.
    assert means.pop(lambda table: torch.cat((table, torch.tensor([[[15.0, 3.0]]])))) == {"loss": 4.0}


def test_per_dimension():
    assert per_dimension("error", [1.0, 3.0]) == {"error": 2.0, "error/0": 1.0, "error/1": 3.0}
