"""UniPi: a video model that draws what it is told, and a policy that plays what it drew."""

import builtins
import json
from functools import partial

import numpy as np
import pytest
import torch
from baseline_worlds import INVERSE_DYNAMICS, SQUARE_SETTINGS, draw, moving_squares
from transformers import AutoModel

from lapa import LapaTokenizer
from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
from lapa.evaluation.baselines.configuration_video_diffusion import VideoDiffusionConfig
from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
from lapa.evaluation.baselines.inverse_dynamics_training import train_inverse_dynamics
from lapa.evaluation.baselines.training import Schedule
from lapa.evaluation.baselines.unipi import UniPiPolicy, write_unipi
from lapa.evaluation.baselines.video_diffusion import VideoDiffusionModel
from lapa.evaluation.baselines.video_diffusion_training import (
    ClipDataset,
    VideoSettings,
    clip_index,
    encode_instructions,
    train_video_model,
)
from lapa.evaluation.demo_tokenizer import build_tokenizer
from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation
from lapa.evaluation.policies import open_policy
from lapa.evaluation.rollout import roll_out

pytest.importorskip("diffusers")

START, NUM_FRAMES = np.array([6.0, 6.0]), 3
MOVES = {"go right": np.array([0.0, 1.0]), "go down": np.array([1.0, 0.0])}
SIZES = {
    "image_size": 16,
    "num_frames": NUM_FRAMES,
    "block_out_channels": [16, 32],
    "cross_attention_levels": [1],
    "attention_head_dim": 16,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "max_text_length": 40,
    "num_inference_steps": 8,
}


def two_clips() -> tuple[np.ndarray, np.ndarray]:
    """Frames (2 * (1 + NUM_FRAMES), 16, 16, 3): from one start, to the right and down; and the index of both clips."""
    steps = range(NUM_FRAMES + 1)
    frames = np.stack([draw(START + step * move) for move in MOVES.values() for step in steps])
    return frames, np.arange(len(frames)).reshape(2, -1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> LapaTokenizer:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", list(MOVES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Video model, inverse dynamics model, and the policy made of both."""
    root = tmp_path_factory.mktemp("unipi")
    frames, clips = two_clips()
    config = VideoDiffusionConfig(**SIZES, text_vocab_size=len(tokenizer))
    settings = VideoSettings(Schedule(250, 16, 4e-3, num_checkpoints=1))
    rows = np.tile(clips, (16, 1))
    train_video_model(frames, rows, list(MOVES) * 16, tokenizer, config, settings, 0, root / "video")
    first, second, actions = moving_squares(600, seed=0)
    train_inverse_dynamics(first, second, actions, INVERSE_DYNAMICS, SQUARE_SETTINGS, 0, root / "inverse_dynamics")
    write_unipi(root / "video", root / "inverse_dynamics", root / "policy")
    return root


def tiny_video_model(**changes) -> VideoDiffusionModel:
    torch.manual_seed(0)
    return VideoDiffusionModel(VideoDiffusionConfig(**SIZES | {"text_vocab_size": 50} | changes))


IMAGES, SENTENCES = [draw(START)] * 2, list(MOVES)


def test_samples_follow_the_instruction(folders):
    plan = UniPiPolicy.from_pretrained(folders / "policy").plan(IMAGES, SENTENCES)
    frames, clips = two_clips()
    truth = torch.from_numpy(frames[clips]).permute(0, 1, 4, 2, 3) / 255
    assert plan.shape == truth.shape
    assert torch.allclose(plan[:, 0], truth[:, 0])
    errors = (plan[:, None] - truth[None]).square().flatten(2).mean(2)  # rows are samples, columns clips
    still = (truth[:, :1] - truth).square().mean()
    assert errors.diagonal().max() < 0.5 * still
    assert min(errors[0, 1], errors[1, 0]) > 3 * errors.diagonal().max()


def test_actions_are_read_off_the_plan(folders):
    chunk = UniPiPolicy.from_pretrained(folders / "policy").act_chunk(IMAGES, SENTENCES)
    assert chunk.shape == (2, NUM_FRAMES, 2)
    assert chunk.dtype == np.float32
    # One pixel per frame is ten units of the action.
    np.testing.assert_allclose(chunk.mean(1), [[0, 10], [10, 0]], atol=4)


def test_frames_further_apart_repeat_their_action(folders):
    policy = UniPiPolicy.from_pretrained(folders / "policy")
    plain = policy.act_chunk(IMAGES, SENTENCES)
    for model in (policy.video_model, policy.inverse_dynamics):
        model.config.frame_gap = 2
    policy.reseed(0)
    chunk = policy.act_chunk(IMAGES, SENTENCES)
    assert policy.action_horizon == chunk.shape[1] == 2 * NUM_FRAMES
    np.testing.assert_allclose(chunk[:, ::2], plain, atol=1e-4)
    assert np.array_equal(chunk[:, ::2], chunk[:, 1::2])


def test_sampling_depends_on_the_seed_alone(folders):
    policy = open_policy(str(folders / "policy"), action_dim=2)
    # It draws for all that are played together at once.
    assert not policy.mixes
    player = policy.controller.player.policy

    def chunk(seed):
        policy.reseed(seed)
        torch.rand(5)  # whatever else is drawn
        return player.act_chunk(IMAGES, SENTENCES)

    assert np.array_equal(chunk(1), chunk(1))
    assert not np.array_equal(chunk(1), chunk(2))


def test_a_folder_plays_and_plans_again_after_two_actions(folders, monkeypatch):
    policy = open_policy(str(folders / "policy"), action_dim=2)
    planned = []
    original = UniPiPolicy.plan
    monkeypatch.setattr(UniPiPolicy, "plan", lambda self, *args: planned.append(len(args[0])) or original(self, *args))
    make = partial(TabletopEvaluation, families=("reach",), image_size=16, num_blocks=2, max_steps=5)
    with EnvironmentPool(make, 3) as pool:
        rollouts = roll_out(pool, policy.controller, [("reach", seed) for seed in range(3)], description=None)
    assert [rollout.num_steps for rollout in rollouts] == [5, 5, 5]
    assert planned == [3, 3, 3]  # steps 0, 2 and 4, the three environments together
    assert policy.identity["replan_every"] == 2
    assert open_policy(str(folders / "policy"), 2, replan_every=3).identity["replan_every"] == 3


def test_the_identity_changes_with_either_model_and_with_the_way_of_sampling(folders, tmp_path):
    whole = open_policy(str(folders / "policy"), 2).identity
    assert whole == open_policy(str(folders / "policy"), 2).identity
    other = InverseDynamicsModel.from_pretrained(folders / "inverse_dynamics")
    with torch.no_grad():
        other.mlp[-1].bias += 1
    other.save_pretrained(tmp_path / "inverse_dynamics")
    write_unipi(folders / "video", tmp_path / "inverse_dynamics", tmp_path / "policy")
    changed = open_policy(str(tmp_path / "policy"), 2).identity
    assert {name for name in whole if whole[name] != changed[name]} == {"inverse_dynamics"}
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config | {"num_inference_steps": 3}))
    sampled = open_policy(str(tmp_path / "policy"), 2).identity
    assert {name for name in changed if changed[name] != sampled[name]} == {"configs"}


def test_the_video_model_loads_as_it_was_saved(folders, tmp_path, tokenizer):
    model = AutoModel.from_pretrained(folders / "policy")
    assert isinstance(model, VideoDiffusionModel)
    model.save_pretrained(tmp_path)
    again = VideoDiffusionModel.from_pretrained(tmp_path)
    frame = torch.rand(2, 3, 16, 16)
    ids, mask = encode_instructions(tokenizer, SENTENCES, 8)
    samples = [m.generate(frame, ids, mask, generator=torch.Generator().manual_seed(0)) for m in (model, again)]
    assert torch.equal(*samples)
    assert samples[0].min() >= 0
    assert samples[0].max() <= 1


CHANGES = [
    {},
    {"patch_size": 2, "prediction_type": "v_prediction"},
    {"predict_change": False, "prediction_type": "epsilon"},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_every_parameter_gets_a_gradient(changes):
    model = tiny_video_model(text_dropout=0.5, **changes)
    torch.manual_seed(1)
    ids = torch.randint(50, (8, 4))
    model(torch.rand(8, 3, 16, 16), torch.rand(8, NUM_FRAMES, 3, 16, 16), ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"patch_size": 4, "block_out_channels": [16, 16]}, {"predict_change": False}])
def test_what_noise_is_added_to_turns_back_into_the_frames(changes):
    model = tiny_video_model(**changes)
    frame, following = torch.rand(2, 3, 16, 16), torch.rand(2, NUM_FRAMES, 3, 16, 16)
    sample = model._to_sample(frame, following)
    patch = model.config.patch_size
    assert sample.shape == (2, NUM_FRAMES * 3 * patch**2, 16 // patch, 16 // patch)
    assert torch.allclose(model._to_frames(frame, sample), following, atol=1e-6)
    assert sample.abs().max() <= model.config.sample_scale


def test_guidance_moves_samples_away_from_those_without_an_instruction():
    model = tiny_video_model(text_dropout=0.5)
    torch.nn.init.normal_(model.instruction_encoder.nothing, std=3.0)
    frame, ids = torch.rand(1, 3, 16, 16), torch.tensor([[3, 4]])

    def sample(scale):
        return model.eval().generate(frame, ids, guidance_scale=scale, generator=torch.Generator().manual_seed(0))

    assert torch.equal(sample(1.0), sample(None))
    assert not torch.allclose(sample(3.0), sample(1.0), atol=1e-3)
    with pytest.raises(ValueError, match="`guidance_scale` is 2.0, but the model was trained without `text_dropout`"):
        tiny_video_model().generate(frame, ids, guidance_scale=2.0)


def test_a_training_goes_on_from_a_folder(folders, tmp_path, tokenizer):
    frames, clips = two_clips()
    fields = SIZES | {"text_vocab_size": len(tokenizer), "num_inference_steps": 5}
    settings = VideoSettings(Schedule(1, 2, 1e-9, num_checkpoints=1))

    def train(**changes):
        config = VideoDiffusionConfig(**fields | changes)
        train_video_model(frames, clips, SENTENCES, tokenizer, config, settings, 0, tmp_path, start=folders / "video")
        return VideoDiffusionModel.from_pretrained(tmp_path)

    model, before = train(), VideoDiffusionModel.from_pretrained(folders / "video").state_dict()
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in model.state_dict().items())
    assert model.config.num_inference_steps == 5
    with pytest.raises(ValueError, match=r"`start` .* has `block_out_channels` \[16, 32\], `config` has \[16, 16\]"):
        train(block_out_channels=[16, 16])


def test_padding_does_not_change_a_sample():
    model = tiny_video_model().eval()
    frame = torch.rand(1, 3, 16, 16)
    ids, padded = torch.tensor([[3, 4]]), torch.tensor([[3, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 0]])

    def sample(ids, mask):
        return model.generate(frame, ids, mask, generator=torch.Generator().manual_seed(0))

    assert torch.allclose(sample(ids, None), sample(padded, mask), atol=1e-4)


def test_clips_lie_within_their_episode():
    clips, episode = clip_index([5, 2, 6], num_frames=2, frame_gap=2)
    assert clips.tolist() == [[0, 2, 4], [7, 9, 11], [8, 10, 12]]
    assert episode.tolist() == [0, 2, 2]


def test_the_cards_say_what_the_folder_holds(folders):
    card = (folders / "policy" / "README.md").read_text()
    assert "| frames | 3 of 16 x 16 pixels, 1 control steps apart |" in card
    assert "- 250 steps" in card
    assert "lapa evaluate" in card
    assert "lapa evaluate" not in (folders / "video" / "README.md").read_text()
    inner = (folders / "policy" / "inverse_dynamics" / "README.md").read_text()
    assert inner == (folders / "inverse_dynamics" / "README.md").read_text()


def test_folders_that_cannot_act_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="is a video model alone"):
        open_policy(str(folders / "video"), 2)
    with pytest.raises(ValueError, match="is an inverse dynamics model: it labels video and does not act"):
        open_policy(str(folders / "inverse_dynamics"), 2)
    with pytest.raises(ValueError, match="has actions of 2 numbers, this suite's environment takes 7"):
        open_policy(str(folders / "policy"), 7)
    with pytest.raises(ValueError, match=r"`replan_every` must lie in \[1, 3\]"):
        open_policy(str(folders / "policy"), 2, replan_every=4)
    with pytest.raises(ValueError, match="`temperature` does not apply"):
        open_policy(str(folders / "policy"), 2, temperature=0.5)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json that is no JSON object"):
        open_policy(str(tmp_path), 2)
    with pytest.raises(ValueError, match="exists and holds no UniPi policy"):
        write_unipi(folders / "video", folders / "inverse_dynamics", tmp_path)


def test_models_that_do_not_fit_together_are_refused(tokenizer):
    other = InverseDynamicsModel(InverseDynamicsConfig.from_dict(INVERSE_DYNAMICS.to_dict() | {"frame_gap": 2}))
    with pytest.raises(
        ValueError, match=r"`frame_gap` of the video model \(1\) and of the inverse dynamics model \(2\)"
    ):
        UniPiPolicy(tiny_video_model(), other, tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replan_every": 9}, r"`replan_every` must lie in \[1, 3\] \(`num_frames` x `frame_gap`\), got 9"),
        ({"guidance_scale": 2.0}, "`guidance_scale` must be at least 1, and 1 without `text_dropout`"),
        ({"image_size": 17}, r"`image_size` \(17\) is not a multiple of 2"),
        ({"cross_attention_levels": [2]}, r"`cross_attention_levels` must name levels 0 to 1, got \[2\]"),
        ({"prediction_type": "noise"}, "`prediction_type` must be one of v_prediction, epsilon, sample, got 'noise'"),
        ({"block_out_channels": [12, 32]}, r"must be multiples of `norm_num_groups` \(8\)"),
        ({"attention_head_dim": 24}, r"of level 1 \(32\) is not a multiple of `attention_head_dim` \(24\)"),
        ({"num_inference_steps": 2000}, r"must be at most `num_train_timesteps` \(1000\)"),
        ({"sample_scale": 0.0}, "`sample_scale` must be positive"),
        ({"text_num_heads": 3}, r"`text_hidden_size` \(16\) is not a multiple of `text_num_heads` \(3\)"),
    ],
)
def test_configs_refuse_what_cannot_be(fields, message):
    with pytest.raises(Exception, match=message):
        VideoDiffusionConfig(**SIZES | fields)


def test_data_that_do_not_fit_are_refused_by_name(tokenizer, tmp_path):
    frames, clips = two_clips()
    with pytest.raises(ValueError, match=r"`clips` must lie in \[0, 7\], the frames, got 0 to 8"):
        ClipDataset(frames, clips + np.array([[0], [1]]), SENTENCES, tokenizer, 8)
    with pytest.raises(ValueError, match="`clips` must have a row for each of 1 instructions"):
        ClipDataset(frames, clips, SENTENCES[:1], tokenizer, 8)
    with pytest.raises(ValueError, match=r"`frames` must be \(num_frames, height, width, channels\) uint8"):
        ClipDataset(frames / 255, clips, SENTENCES, tokenizer, 8)
    with pytest.raises(
        ValueError, match=r"an instruction has \d+ tokens, more than `max_text_length` \(8\): 'go right"
    ):
        ClipDataset(frames, clips, ["go right " * 9, "go down"], tokenizer, 8)

    def train(clips, **fields):
        config = VideoDiffusionConfig(**SIZES | {"text_vocab_size": len(tokenizer)} | fields)
        train_video_model(frames, clips, SENTENCES, tokenizer, config, VideoSettings(), 0, tmp_path)

    with pytest.raises(ValueError, match=r"`clips` must have 4 columns \(1 \+ `num_frames`\), got 3"):
        train(clips[:, :3])
    with pytest.raises(ValueError, match=r"`text_vocab_size` \(7\) is less than the tokenizer's"):
        train(clips, text_vocab_size=7)
    model = tiny_video_model()
    frame, ids = torch.rand(1, 3, 16, 16), torch.tensor([[1]])
    with pytest.raises(ValueError, match=r"`next_frames` must have shape \(1, 3, 3, 16, 16\)"):
        model(frame, torch.rand(1, 2, 3, 16, 16), ids)
    with pytest.raises(ValueError, match=r"`frame` must have shape \(batch, 3, 16, 16\)"):
        model.generate(frame[0], ids)
    with pytest.raises(ValueError, match="`frame` must be floating"):
        model.generate((frame * 255).to(torch.uint8), ids)
    with pytest.raises(ValueError, match=r"`input_ids` must have shape \(1, length\) with at most 40 tokens"):
        model.generate(frame, torch.zeros(1, 41, dtype=torch.int64))


def test_a_missing_diffusers_names_the_extra(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("diffusers"):
            raise ImportError("No module named 'diffusers'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs diffusers: pip install 'lapa\[unipi\]'"):
        tiny_video_model()
