"""VPT's inverse dynamics model: what it learns, what it keeps, and what labels depend on."""

import json

import numpy as np
import pytest
import torch
from baseline_worlds import INVERSE_DYNAMICS, SQUARE_SETTINGS, assert_resumed_as_uninterrupted, moving_squares
from transformers import AutoModel

from lapa.evaluation.baselines.action_regression import hold_out, r_squared
from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
from lapa.evaluation.baselines.inverse_dynamics_training import (
    FramePairActions,
    InverseDynamicsSettings,
    augment,
    label_actions,
    train_inverse_dynamics,
)
from lapa.evaluation.baselines.training import Schedule


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder and log of a model of the moving squares."""
    folder = tmp_path_factory.mktemp("baselines") / "inverse_dynamics"
    first, second, actions = moving_squares(600, seed=0)
    episode = np.arange(600) // 10
    log = train_inverse_dynamics(first, second, actions, INVERSE_DYNAMICS, SQUARE_SETTINGS, 0, folder, episode)
    return folder, log


def tiny_model(**changes) -> InverseDynamicsModel:
    torch.manual_seed(0)
    return InverseDynamicsModel(InverseDynamicsConfig.from_dict(INVERSE_DYNAMICS.to_dict() | changes))


def test_the_model_recovers_the_translation_of_squares_it_never_saw(trained):
    folder, log = trained
    model = InverseDynamicsModel.from_pretrained(folder)
    first, second, actions = moving_squares(200, seed=1)
    labels = label_actions(model, first, second, show_progress=False)
    assert r_squared(labels, actions).min() > 0.9
    # In the units of the data, which are far from those of the normalised actions.
    assert np.abs(labels - actions).mean() < 3
    assert log[-1]["loss"] < log[0]["loss"]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    evaluations = [row["eval_r2"] for row in history if "eval_r2" in row]
    assert len(evaluations) == SQUARE_SETTINGS.schedule.num_checkpoints  # one per checkpoint
    assert evaluations[-1] > 0.9


def test_the_order_of_the_frames_matters(trained):
    model = InverseDynamicsModel.from_pretrained(trained[0])
    first, second, actions = moving_squares(100, seed=1)
    assert r_squared(label_actions(model, second, first, show_progress=False), -actions).min() > 0.9


def test_save_and_load_give_the_same_labels_and_keep_the_statistics(trained, tmp_path):
    model = InverseDynamicsModel.from_pretrained(trained[0])
    _, _, actions = moving_squares(600, seed=0)
    assert np.allclose(model.config.action_std, actions.std(0), rtol=0.1)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, InverseDynamicsModel)
    pixels = torch.rand(3, 2, 3, 16, 16)
    assert torch.equal(model.predict_actions(pixels), again.predict_actions(pixels))
    assert torch.equal(again.action_std, model.action_std)


def test_labels_do_not_depend_on_what_else_is_in_the_batch_nor_on_the_mode(trained):
    model = InverseDynamicsModel.from_pretrained(trained[0]).train()
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    first, second, _ = moving_squares(30, seed=2)
    together = label_actions(model, first, second, batch_size=30, show_progress=False)
    assert model.training
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    for batch_size in (1, 7):
        apart = label_actions(model, first, second, batch_size=batch_size, show_progress=False)
        np.testing.assert_allclose(apart, together, atol=1e-3)
    # The training mode does depend on it: this is what is avoided.
    pixels = torch.from_numpy(np.stack((first, second), 1)).permute(0, 1, 4, 2, 3) / 255
    with torch.no_grad():
        assert not torch.allclose(model(pixels).actions[:2], model(pixels[:2]).actions, atol=0.1)


def test_an_untrained_model_normalises_by_its_config():
    plain, scaled = tiny_model(), tiny_model(action_mean=[5.0, -1.0], action_std=[2.0, 0.5])
    pixels = torch.rand(4, 2, 3, 16, 16)
    expected = plain.predict_actions(pixels) * torch.tensor([2.0, 0.5]) + torch.tensor([5.0, -1.0])
    assert torch.allclose(scaled.predict_actions(pixels), expected)
    # The loss is in units of the standard deviation.
    scaled.eval()
    actions = scaled(pixels).actions.detach() + torch.tensor([2.0, 0.5])
    assert scaled(pixels, actions).loss.item() == pytest.approx(1.0, abs=1e-5)


def test_every_parameter_gets_a_gradient():
    model = tiny_model()
    model(torch.rand(4, 2, 3, 16, 16), torch.rand(4, 2)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    first, second, actions = moving_squares(64, seed=0)
    settings = InverseDynamicsSettings(Schedule(8, 16, 1e-3, num_checkpoints=2), max_shift=1, held_out_share=0.25)

    def train(folder):
        train_inverse_dynamics(first, second, actions, INVERSE_DYNAMICS, settings, 3, folder)
        return InverseDynamicsModel.from_pretrained(folder).state_dict()

    assert_resumed_as_uninterrupted(train, tmp_path)


def test_pairs_are_held_out_by_episode():
    groups = np.repeat(np.arange(10), 5)
    held = hold_out(groups, 0.2, seed=0)
    assert held.sum() == 10
    assert len(set(groups[held])) == 2
    assert not set(groups[held]) & set(groups[~held])
    assert not hold_out(groups, 0.0, seed=0).any()
    assert hold_out(np.array([4, 7]), 0.01, seed=0).sum() == 1
    with pytest.raises(ValueError, match="needs at least 2 episodes, got 1"):
        hold_out(np.zeros(5), 0.2, seed=0)


def test_augmentation_moves_and_tints_both_frames_of_a_pair_alike():
    torch.manual_seed(0)
    frame = torch.rand(6, 1, 3, 8, 8).expand(6, 2, 3, 8, 8)
    changed = augment(frame, max_shift=2, colour_jitter=0.2)
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert not torch.equal(changed, frame)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.equal(augment(frame, 0, 0.0), frame)
    # A shift alone moves pixels: the middle is found again within two pixels of where it was.
    moved = augment(frame, max_shift=2, colour_jitter=0.0)[:, 0]
    places = [(y, x) for y in range(5) for x in range(5)]
    for before, after in zip(frame[:, 0], moved):
        found = [torch.equal(after[:, 2:6, 2:6], before[:, y : y + 4, x : x + 4]) for y, x in places]
        assert sum(found) == 1


def test_r_squared_known_values():
    true = np.array([[0.0, 1.0], [2.0, 1.0]])
    assert r_squared(true, true)[0] == 1
    assert r_squared(np.ones((2, 2)), true)[0] == 0  # the mean
    assert np.isnan(r_squared(true, true)[1])  # never changes


def test_the_card_says_what_the_folder_holds(trained):
    folder, _ = trained
    card = (folder / "README.md").read_text()
    results = json.loads((folder / "lapa_results.json").read_text())["results"]
    assert f"{results[0]['value']:.4g}" in card
    assert "| frames | 2 of 16 x 16 pixels, 1 control steps apart |" in card
    assert "- 300 steps" in card
    assert "inverse-dynamics-model" in card


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_sizes": [8], "depths": [1, 1]},
            "`hidden_sizes` and `depths` must name the same stages, got 1 and 2",
        ),
        ({"action_dim": 0}, "`action_dim` must be at least 1, got 0"),
        ({"action_dim": 2, "action_std": [1.0, 0.0]}, "`action_std` must be positive"),
        ({"action_dim": 2, "action_mean": [1.0]}, r"`action_mean` must be 2 finite numbers \(`action_dim`\), got"),
        ({"action_dim": 1, "action_mean": [float("nan")]}, "must be 1 finite numbers"),
    ],
)
def test_configs_refuse_what_cannot_be(fields, message):
    with pytest.raises(Exception, match=message):
        InverseDynamicsConfig(**fields)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    model = tiny_model()
    with pytest.raises(
        ValueError, match=r"`pixel_values` must have shape \(batch, 2, 3, 16, 16\), got \(1, 3, 16, 16\)"
    ):
        model(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="`pixel_values` must be floating"):
        model.predict_actions(torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"`actions` must have shape \(1, 2\), got \(1, 3\)"):
        model(torch.rand(1, 2, 3, 16, 16), torch.rand(1, 3))
    first, second, actions = moving_squares(4, seed=0)
    with pytest.raises(ValueError, match="`first` and `second` must have one shape"):
        FramePairActions(first, second[:3])
    with pytest.raises(ValueError, match=r"`second` must be \(num_pairs, height, width, channels\) uint8"):
        FramePairActions(first, second / 255)
    with pytest.raises(ValueError, match=r"`actions` must have shape \(4, action_dim\)"):
        FramePairActions(first, second, actions[:2])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        label_actions(model, first, second, batch_size=0)

    def train(actions, **options):
        train_inverse_dynamics(first, second, actions, INVERSE_DYNAMICS, SQUARE_SETTINGS, 0, tmp_path, **options)

    with pytest.raises(ValueError, match=r"`actions` must have shape \(num_pairs, 2\), got \(4, 1\)"):
        train(actions[:, :1])
    with pytest.raises(ValueError, match="`episode` has 3 rows for 4 actions"):
        train(actions, episode=[0, 0, 1])
    with pytest.raises(ValueError, match=r"`held_out_share` must lie in \[0, 1\), got 1"):
        InverseDynamicsSettings(held_out_share=1)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        Schedule(0, 1, 1e-3)
