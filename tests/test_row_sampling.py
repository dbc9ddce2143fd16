"""Sampling with a generator per robot."""

import numpy as np
import pytest
import torch
from hub_folders import policy_config
from shared_files import shared_path

from lapa import LapaForActionPrediction, LapaImageProcessor, LapaProcessor, LapaTokenizer
from lapa.serving.policy import ChunkPlayer, LapaPolicy
from lapa.serving.row_sampling import RowSamplingLogitsProcessor


@pytest.fixture(scope="module")
def model_and_processor():
    torch.manual_seed(0)
    model = LapaForActionPrediction(policy_config(has_action_segment=True, action_dim=2))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    tokenizer = LapaTokenizer(str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")))
    processor = LapaProcessor.from_config(model.config, LapaImageProcessor(size=16), tokenizer)
    processor.fit_actions(np.random.default_rng(0).uniform(-1, 1, (400, 2)), "robot", gripper_dimension=None)
    return model, processor


IMAGES = list(np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))


def generators():
    return [np.random.default_rng(seed) for seed in range(5)]


def test_a_robot_draws_the_same_in_every_batch(model_and_processor):
    policy = LapaPolicy(*model_and_processor, do_sample=True, temperature=2.0, top_k=0)
    whole = policy.act(IMAGES, ["push"] * 5, draws=generators())
    for rows in ([3], [4, 0, 2]):
        some = policy.act([IMAGES[row] for row in rows], ["push"] * len(rows), draws=[generators()[r] for r in rows])
        np.testing.assert_array_equal(some, whole[rows])
    player = ChunkPlayer(policy)
    np.testing.assert_array_equal(player.act(IMAGES, ["push"] * 5, robots="abcde", draws=generators()), whole)
    assert len(np.unique(whole, axis=0)) > 1
    assert not np.array_equal(whole, policy.act(IMAGES, ["push"] * 5, draws=generators()[::-1]))
    # A policy that does not sample draws nothing.
    greedy, draws = LapaPolicy(*model_and_processor), generators()
    np.testing.assert_array_equal(greedy.act(IMAGES, ["push"] * 5, draws=draws), greedy.act(IMAGES, ["push"] * 5))
    assert draws[0].random() == generators()[0].random()
    likeliest = LapaPolicy(*model_and_processor, do_sample=True, top_k=1)
    np.testing.assert_array_equal(likeliest.act(IMAGES, ["push"] * 5, draws=draws), greedy.act(IMAGES, ["push"] * 5))
    with pytest.raises(ValueError, match="got repetition_penalty"):
        LapaPolicy(*model_and_processor, do_sample=True, repetition_penalty=2.0).act(IMAGES, ["push"] * 5, draws=draws)


def test_draws_follow_the_softmax():
    scores = torch.full((4000, 8), float("-inf"))
    scores[:, 2:6] = torch.tensor([1.0, 0.0, -1.0, float("-inf")])
    draws = [np.random.default_rng(0)] * 4000
    for options, logits in (
        ({}, [1.0, 0.0, -1.0]),
        ({"temperature": 0.5}, [2.0, 0.0, -2.0]),
        ({"top_k": 2}, [1.0, 0.0]),
    ):
        processor = RowSamplingLogitsProcessor(draws, (2, 6), **options)
        chosen = processor(torch.zeros(4000, 1, dtype=torch.long), scores.clone()).argmax(-1)
        expected = torch.tensor(logits).softmax(0).numpy()
        shares = np.bincount(chosen.numpy(), minlength=8) / 4000
        # Four standard errors of a share are at most 0.032.
        np.testing.assert_allclose(shares[2 : 2 + len(expected)], expected, atol=0.032)
        assert shares[2 : 2 + len(expected)].sum() == 1.0
