"""Codes decoded to actions: the decoder, its training, and the policy that plays a latent-pretrained model with it."""

import json
import re

import numpy as np
import pytest
import torch
from baseline_worlds import assert_resumed_as_uninterrupted
from hub_folders import picture, policy_config, save_policy
from transformers import AutoModel

from lapa import LapaForLatentAction, LapaProcessor
from lapa.evaluation.baselines.action_regression import r_squared
from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig
from lapa.evaluation.baselines.latent_decoder import LatentActionDecoder
from lapa.evaluation.baselines.latent_decoder_policy import LatentDecoderPolicy, write_latent_decoder_policy
from lapa.evaluation.baselines.latent_decoder_training import LatentDecoderSettings, train_latent_decoder
from lapa.evaluation.baselines.training import Schedule
from lapa.evaluation.policies import open_policy
from lapa.hub_cards.checkpoint import DECODER_FOLDER

CONFIG = LatentActionDecoderConfig(action_dim=2, embedding_size=8, mlp_hidden_size=32)
SETTINGS = LatentDecoderSettings(Schedule(300, 64, 1e-2, num_checkpoints=2))


def labelled_steps(num_steps=400, seed=0):
    """Codes (num_steps, 4) of 8 values; the first moves along x, the third along y, the others say nothing."""
    codes = np.random.default_rng(seed).integers(0, 8, (num_steps, 4))
    actions = np.stack([10.0 * codes[:, 0] - 35, 0.01 * codes[:, 2]], axis=1).astype(np.float32)
    return codes, actions


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "decoder"
    train_latent_decoder(*labelled_steps(), CONFIG, SETTINGS, 0, folder, episode=np.arange(400) // 20)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained):
    """A latent-pretrained model with a decoder."""
    place = tmp_path_factory.mktemp("policy")
    save_policy(place / "latent", "latent")
    write_latent_decoder_policy(place / "latent", trained, place / "policy")
    return place / "policy"


def test_the_decoder_learns_what_each_place_of_a_latent_action_stands_for(trained):
    decoder = LatentActionDecoder.from_pretrained(trained)
    codes, actions = labelled_steps(seed=1)
    assert r_squared(decoder.predict_actions(torch.from_numpy(codes)), actions).min() > 0.95
    # Units of the data, though one dimension is a thousand times the other.
    exact = decoder.predict_actions(torch.tensor([[7, 0, 0, 0]]))[0]
    assert exact[0] == pytest.approx(35, abs=4) and exact[1] == pytest.approx(0, abs=0.008)


def test_it_opens_by_its_config_and_its_card_says_what_it_is(trained):
    decoder = AutoModel.from_pretrained(trained)
    assert isinstance(decoder, LatentActionDecoder)
    assert decoder.config.action_mean == pytest.approx(decoder.action_mean.tolist())
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert "4 of 8 values" in card and "2-dimensional actions" in card
    value = json.loads((trained / "lapa_results.json").read_text(encoding="utf-8"))["results"][0]["value"]
    assert f"{value:.3f}"[:4] in card
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    scope = {}
    exec(code.replace('"decoder"', repr(str(trained))), scope)
    assert scope["actions"].shape == (1, 2)


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    settings = LatentDecoderSettings(Schedule(8, 16, 1e-3, num_checkpoints=2))

    def train(folder):
        train_latent_decoder(*labelled_steps(64), CONFIG, settings, 3, folder)
        return LatentActionDecoder.from_pretrained(folder).state_dict()

    assert_resumed_as_uninterrupted(train, tmp_path)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.long),
            r"`latent_action_codes` must be integers of shape \(batch, 4\), got \(2, 3\)",
        ),
        (torch.zeros(2, 4), r"must be integers of shape .* torch.float32"),
        (torch.full((2, 4), 8), r"must lie in \[0, 8\), got 8 to 8"),
    ],
)
def test_codes_of_another_kind_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        LatentActionDecoder(CONFIG).predict_actions(codes)


def test_data_that_do_not_fit_are_refused_by_name(tmp_path):
    codes, actions = labelled_steps(10)
    for wrong, message in (
        ((codes[:9], actions), r"`codes` must be integers of shape \(10, 4\), got \(9, 4\)"),
        ((codes.astype(float), actions), "`codes` must be integers .* float64"),
        ((codes, actions[:, :1]), r"`actions` must have shape \(num_pairs, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train_latent_decoder(*wrong, CONFIG, SETTINGS, 0, tmp_path / "x")
    with pytest.raises(Exception, match="`codebook_size` must be at least 1, got 0"):
        LatentActionDecoderConfig(codebook_size=0)
    with pytest.raises(Exception, match="`action_std` must be positive"):
        LatentActionDecoderConfig(action_dim=1, action_std=[0.0])


def test_the_policy_plays_the_decoded_codes_of_the_model(folder):
    policy = LatentDecoderPolicy.from_pretrained(folder)
    images, sentences = [picture(0), picture(1)], ["push the red block", "stop"]
    processor = LapaProcessor.from_pretrained(folder)
    inputs = processor(images=images, instruction=sentences, padding="longest", return_tensors="pt")
    codes = LapaForLatentAction.from_pretrained(folder).predict_latent_action(**inputs)
    expected = LatentActionDecoder.from_pretrained(folder, subfolder=DECODER_FOLDER).predict_actions(codes)
    assert np.array_equal(policy.act(images, sentences), expected.numpy())
    assert policy.act(images, sentences).dtype == np.float32


def test_a_robots_draws_do_not_depend_on_the_others(folder):
    policy = LatentDecoderPolicy.from_pretrained(folder, do_sample=True, temperature=2.0, top_k=0)
    images = [picture(i) for i in range(6)]

    def draws(rows):
        return [np.random.default_rng(row) for row in rows]

    together = policy.act(images, ["stop"] * 6, draws=draws(range(6)))
    alone = policy.act(images[4:5], ["stop"], draws=draws([4]))
    np.testing.assert_allclose(together[4], alone[0], atol=1e-5)
    greedy = LatentDecoderPolicy.from_pretrained(folder).act(images, ["stop"] * 6)
    assert not np.allclose(together, greedy)


def test_an_evaluation_opens_it_and_tells_it_from_others(folder, tmp_path, trained):
    played = open_policy(str(folder), 2)
    assert played.identity["decoder"] != played.identity["policy"]
    assert open_policy(str(folder), 2).identity == played.identity
    sampling = open_policy(str(folder), 2, do_sample=True)
    assert sampling.identity != played.identity
    assert sampling.mixes and played.mixes
    with pytest.raises(ValueError, match="has actions of 2 numbers, this suite's environment takes 7"):
        open_policy(str(folder), 7)
    with pytest.raises(ValueError, match="`replan_every` does not apply"):
        open_policy(str(folder), 2, replan_every=1)
    with pytest.raises(ValueError, match="is an action decoder alone"):
        open_policy(str(trained), 2)
    save_policy(tmp_path / "latent", "latent")
    with pytest.raises(ValueError, match="is a latent-pretrained model without action_decoder/: finetune it"):
        open_policy(str(tmp_path / "latent"), 2)


def test_models_that_do_not_fit_together_are_refused(folder, tmp_path, trained):
    model, processor = LapaForLatentAction.from_pretrained(folder), LapaProcessor.from_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"`latent_vocab_size` of the model \(8\) and `codebook_size` of the decoder \(5\)"
    ):
        LatentDecoderPolicy(model, LatentActionDecoder(LatentActionDecoderConfig(codebook_size=5)), processor)
    config = policy_config(quantizer_hash="a" * 64)
    other = LatentActionDecoder(LatentActionDecoderConfig(quantizer_hash="b" * 64))
    with pytest.raises(ValueError, match="the same code means something else"):
        LatentDecoderPolicy(LapaForLatentAction(config), other, processor)


def test_what_stands_in_the_place_of_the_policy_is_not_overwritten(folder, tmp_path, trained):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="exists and holds no policy with an action decoder"):
        write_latent_decoder_policy(folder, trained, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text(encoding="utf-8") == "mine"
    # One that was written like this is replaced, and a decoder that was there does not stay.
    write_latent_decoder_policy(folder, trained, tmp_path / "policy")
    write_latent_decoder_policy(folder, trained, tmp_path / "policy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "policy"]
