"""The plugin that lets lerobot play our models, against lerobot where it can be imported and a stand-in elsewhere."""

import importlib
import sys
import tomllib
from pathlib import Path

import lerobot_stand_in
import numpy as np
import pytest
import torch
from hub_folders import picture, save_policy

from lapa.serving.policy import LapaPolicy

PLUGIN = Path(__file__).resolve().parents[1] / "examples" / "lerobot_policy_lapa"
CAMERA = "observation.images.top"
SENTENCES = ["push the cube", "pick the cup"]


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's package; lerobot finds it by its distribution's name and imports that."""
    try:
        importlib.import_module("lerobot.policies.pretrained")
    except ImportError:
        for name, module in lerobot_stand_in.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(PLUGIN / "src"))
    name = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["name"]
    assert name.startswith("lerobot_policy_")
    yield importlib.import_module(name)
    for module in [module for module in sys.modules if module.startswith("lerobot_policy_lapa")]:
        del sys.modules[module]


def configured(plugin, folder, **changes):
    types = importlib.import_module("lerobot.configs.types")
    features = {
        CAMERA: types.PolicyFeature(types.FeatureType.VISUAL, (3, 20, 24)),
        "observation.state": types.PolicyFeature(types.FeatureType.STATE, (3,)),
    }
    action = {"action": types.PolicyFeature(types.FeatureType.ACTION, (3,))}
    options = {"input_features": features, "output_features": action, "model": str(folder), "device": "cpu"}
    return plugin.LapaAdapterConfig(**{**options, **changes})


def policy_of(config):
    """As lerobot's factory finds it: `configuration_` becomes `modeling_`, `Config` becomes `Policy`."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    name = type(config).__name__.removesuffix("Config") + "Policy"
    return getattr(module, name)(config=config, dataset_stats=None, dataset_meta=None)


def batch_of(images):
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return {CAMERA: pixels, "observation.state": torch.zeros(len(images), 3), "task": SENTENCES[: len(images)]}


def test_it_plays_what_our_policy_plays(plugin, tmp_path):
    folder = save_policy(tmp_path / "model", "action")
    config = configured(plugin, folder)
    assert config.type == "lapa"
    policy = policy_of(config)
    assert policy.name == "lapa" and isinstance(policy, torch.nn.Module)
    images = [picture(0), picture(1)]
    expected = LapaPolicy.from_pretrained(str(folder)).act(images, SENTENCES)
    processor = importlib.import_module(type(config).__module__.replace("configuration_", "processor_"))
    before, after = getattr(processor, f"make_{config.type}_pre_post_processors")(config, dataset_stats=None)
    policy.reset()
    action = after(policy.select_action(before(batch_of(images))))
    assert action.shape == (2, 3) and action.dtype == torch.float32
    assert np.array_equal(action.numpy(), expected)
    chunk = policy.predict_action_chunk(before(batch_of(images)))
    assert chunk.shape == (2, 1, 3) and np.array_equal(chunk[:, 0].numpy(), expected)


def test_a_chunk_is_played_step_by_step_and_forgotten_at_a_reset(plugin, tmp_path):
    folder = save_policy(tmp_path / "model", "action", action_horizon=3)
    policy = policy_of(configured(plugin, folder, chunk_size=3, replan_every=2))
    chunks = [policy.predict_action_chunk(batch_of([picture(seed)])) for seed in range(3)]
    played = [policy.select_action(batch_of([picture(seed)])) for seed in (0, 1, 1)]
    assert torch.equal(torch.stack(played, 1), torch.cat([chunks[0][:, :2], chunks[1][:, :1]], 1))
    policy.reset()
    assert torch.equal(policy.select_action(batch_of([picture(2)])), chunks[2][:, 0])
    assert configured(plugin, folder, chunk_size=3).action_delta_indices == [0, 1, 2]


def test_it_trains_on_batches_of_lerobot(plugin, tmp_path):
    folder = save_policy(tmp_path / "model", "action", action_horizon=2)
    policy = policy_of(configured(plugin, folder, chunk_size=2)).train()
    batch = batch_of([picture(0), picture(1)])
    batch["action"] = torch.tensor([[[0.5, -0.5, 0.0], [2.0, 0.5, 1.0]]] * 2)
    batch["action_is_pad"] = torch.tensor([[False, False], [False, True]])
    preset = policy.config.get_optimizer_preset()
    optimizer = torch.optim.AdamW(
        policy.get_optim_params(), lr=3e-3, betas=preset.betas, weight_decay=preset.weight_decay
    )
    losses = []
    for _ in range(5):
        loss, told = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(told["loss"])
    assert losses[-1] < losses[0]
    # What lies beyond the end of an episode carries no loss.
    changed = {**batch, "action": batch["action"].clone()}
    changed["action"][1, 1] = torch.tensor([3.5, -0.5, 0.0])
    assert policy.forward(changed)[1]["loss"] == pytest.approx(policy.forward(batch)[1]["loss"], abs=1e-6)


def test_what_does_not_fit_is_named(plugin, tmp_path):
    folder = save_policy(tmp_path / "model", "action")
    types = importlib.import_module("lerobot.configs.types")
    image = types.PolicyFeature(types.FeatureType.VISUAL, (3, 20, 24))
    two = {"observation.images.a": image, "observation.images.b": image}
    five = {"action": types.PolicyFeature(types.FeatureType.ACTION, (5,))}
    for changes, message in (
        ({"model": ""}, "`model` must name"),
        ({"input_features": two}, "`camera` must be one of observation.images.a, observation.images.b, got None"),
        ({"input_features": {}}, "there are none"),
        ({"output_features": {}}, "must have 'action'"),
        ({"output_features": five}, r"has actions of 3 numbers, the environment takes \(5,\)"),
        ({"chunk_size": 4}, r"`chunk_size` must be the model's `action_horizon` \(1\), got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_of(configured(plugin, folder, **changes))
    with pytest.raises(ValueError, match="`temperature` needs `do_sample`"):
        configured(plugin, folder, temperature=0.5)
    assert (
        configured(plugin, folder, input_features=two, camera="observation.images.b").image_key
        == "observation.images.b"
    )
    batch = batch_of([picture(0)])
    del batch["task"]
    with pytest.raises(ValueError, match="needs a sentence"):
        policy_of(configured(plugin, folder)).select_action(batch)
