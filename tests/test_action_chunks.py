"""Chunks of actions, several embodiments in one model, and the robot's state in the prompt."""

import numpy as np
import pytest
import torch
from hub_folders import EDGES, picture, policy_config, run_without, save_policy
from shared_files import shared_path
from torch.utils.data import ConcatDataset
from transformers import pipeline

from lapa import LapaForActionPrediction, LapaImageProcessor, LapaProcessor, LapaTokenizer
from lapa.data.encoded_steps import EncodedStepDataset
from lapa.data.labelled_steps import LabelledStepDataset, action_windows
from lapa.hub_cards.export import export
from lapa.modeling_lapa.generation_lapa import bins_of_tokens, chunks_of_tokens
from lapa.processing.action_tokenization_lapa import ActionTokenizer
from lapa.processing.proprio_lapa import ProprioTokenizer
from lapa.serving.policy import ChunkPlayer, LapaPolicy
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
from lapa.training.arguments import LapaActionFinetuningArguments

ARM = ActionTokenizer(EDGES)  # 3, 2 and 2 bins
BASE = ActionTokenizer(((0.0, 1.0, 2.0, 3.0), (0.0, 2.0)))  # 3 and 1
CODES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]


def build(**changes):
    torch.manual_seed(0)
    return LapaForActionPrediction(policy_config(has_action_segment=True, **changes)).eval()


def processor_of(model, statistics=None):
    tokenizer = LapaTokenizer(str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")))
    processor = LapaProcessor.from_config(model.config, LapaImageProcessor(size=16), tokenizer)
    for key, bins in (statistics or {"arm": ARM}).items():
        processor.set_action_statistics(key, bins)
    return processor


def arguments(folder, **changes):
    defaults = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 2}
    quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return LapaActionFinetuningArguments(str(folder), **{**defaults, **quiet, **changes})


class TestWindows:
    def test_windows_stop_at_the_end_of_their_episode(self):
        actions = [[0.0], [1.0], [2.0], [10.0]]
        windows, valid = action_windows(actions, ["a", "a", "a", "b"], 2)
        assert windows[..., 0].tolist() == [[0, 1], [1, 2], [2, 2], [10, 10]]
        assert valid.tolist() == [2, 2, 1, 1] and windows.dtype == np.float32

    def test_episodes_of_one_name_that_do_not_touch_are_two(self):
        windows, valid = action_windows([[0.0], [1.0], [2.0]], ["a", "b", "a"], 3)
        assert windows[..., 0].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]] and valid.tolist() == [1, 1, 1]

    def test_steps_beyond_the_end_carry_no_loss(self):
        processor = processor_of(build(action_horizon=2))
        chunk = [[2, 1, 0], [1, 0, 1]]
        whole = processor.encode_example("push", CODES, action_tokens=chunk)
        cut = processor.encode_example("push", CODES, action_tokens=chunk, num_valid_steps=1)
        assert cut["input_ids"] == whole["input_ids"]
        start = processor.action_offset
        assert [i - start for i in whole["labels"] if i >= start] == [2, 1, 0, 1, 0, 1]
        assert [i - start for i in cut["labels"] if i >= start] == [2, 1, 0]
        assert sum(a != b for a, b in zip(cut["labels"], whole["labels"])) == 3
        with pytest.raises(ValueError, match=r"`num_valid_steps` must lie in \[1, 2\], got 3"):
            processor.encode_example("push", CODES, action_tokens=chunk, num_valid_steps=3)

    def test_a_chunk_must_be_whole(self):
        processor = processor_of(build(action_horizon=2))
        with pytest.raises(ValueError, match=r"2 steps of 3 bins \(`action_dim`\), got 3"):
            processor.encode_example("push", CODES, action_tokens=[2, 1, 0])


class TestDecoding:
    def test_a_chunk_is_the_greedy_continuation_step_by_step(self):
        model = build(action_horizon=3)
        processor = processor_of(model)
        inputs = processor(images=[picture(), picture(1)], instruction=["push", "pull the block"])
        tokens = model.predict_action_tokens(**inputs)
        assert tokens.shape == (2, 3, 3) and tokens.dtype == torch.int64
        assert (tokens < torch.tensor([3, 2, 2])).all(), "every step is masked to the bins of its dimensions"
        start = model.config.action_offset
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for index in range(9):
            with torch.no_grad():
                logits = model(ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -1]
            best = logits[:, start : start + ARM.num_bins[index % 3]].argmax(-1)
            assert torch.equal(best, tokens[:, index // 3, index % 3])
            ids = torch.cat((ids, start + best[:, None]), 1)
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
        actions = processor.decode_actions(tokens)
        assert actions.shape == (2, 3, 3)
        assert torch.equal(actions[1, 2], processor.decode_actions(tokens[1:2, 2])[0])

    def test_one_step_keeps_its_shape(self):
        model = build()
        assert model.predict_action_tokens(**processor_of(model)(images=picture(), instruction="push")).shape == (1, 3)

    def test_without_known_bins(self):
        model = build(action_horizon=2)
        processor = processor_of(model, {"a": ARM, "b": ARM})
        inputs = processor(images=picture(), instruction="push")
        assert "action_num_bins" not in inputs and model.predict_action_tokens(**inputs).shape == (1, 2, 3)

    def test_tokens_of_unequal_rows(self):
        num_bins = torch.tensor([[3, 2, 2], [3, 1, 0]])
        assert bins_of_tokens(num_bins, 2).tolist() == [[3, 2, 2, 3, 2, 2], [3, 1, 3, 1, 0, 0]]
        tokens = torch.tensor([[2, 1, 0, 1, 0, 1], [2, 0, 1, 0, 0, 0]])
        chunks = chunks_of_tokens(tokens, num_bins, 2)
        assert chunks.tolist() == [[[2, 1, 0], [1, 0, 1]], [[2, 0, -1], [1, 0, -1]]]


class TestEmbodiments:
    @pytest.fixture(scope="class")
    def model(self):
        return build(action_horizon=2)

    @pytest.fixture(scope="class")
    def processor(self, model):
        return processor_of(model, {"arm": ARM, "base": BASE})

    def test_each_decodes_its_own_number_of_dimensions(self, model, processor):
        arm = model.predict_action_tokens(**processor(images=picture(), instruction="push", unnorm_key="arm"))
        base = model.predict_action_tokens(**processor(images=picture(), instruction="push", unnorm_key="base"))
        assert arm.shape == (1, 2, 3) and base.shape == (1, 2, 2)
        assert processor.decode_actions(base, "base").shape == (1, 2, 2)

    def test_a_mixed_batch_equals_each_alone(self, model, processor):
        images, texts, keys = [picture(), picture(1)], ["push", "pull the block"], ["arm", "base"]
        inputs = processor(images=images, instruction=texts, unnorm_key=keys)
        assert inputs["action_num_bins"].tolist() == [[3, 2, 2], [3, 1, 0]]
        prediction = model.predict_action_tokens(**inputs, return_scores=True)
        together = prediction.action_tokens
        assert (together[1, :, 2] == -1).all() and torch.isfinite(prediction.scores.max(-1).values).all()
        for row, key in enumerate(keys):
            alone = model.predict_action_tokens(
                **processor(images=images[row], instruction=texts[row], unnorm_key=key)
            )
            width = len(processor.action_tokenizer(key).num_bins)
            assert torch.equal(together[row, :, :width], alone[0]), key
        # The dimension that the base lacks is left out by name of its key, and by no other.
        assert processor.decode_actions(together[1:], "base").shape == (1, 2, 2)
        with pytest.raises(ValueError, match="bin -1 for dimension 2"):
            processor.decode_actions(together[1:], "arm")
        with pytest.raises(ValueError, match=r"`tokens` must be integers of shape \(\.\.\., 2\)"):
            processor.decode_actions(together[:1], "base")

    def test_targets_end_with_the_dimensions_of_the_key(self, processor):
        example = processor.encode_example("push", CODES, action_tokens=[[2, 0], [1, 0]], unnorm_key="base")
        start = processor.action_offset
        assert [i - start for i in example["labels"] if i >= start] == [2, 0, 1, 0]
        with pytest.raises(ValueError, match="2 steps of 2 bins"):
            processor.encode_example("push", CODES, action_tokens=[[2, 0, 1], [1, 0, 1]], unnorm_key="base")

    def test_a_key_for_every_row(self, processor):
        with pytest.raises(ValueError, match=r"`unnorm_key` \(1\) must be one key, or one for each of 2 rows"):
            processor(images=[picture(), picture()], instruction=["push", "pull"], unnorm_key=["arm"])
        with pytest.raises(ValueError, match="4 dimensions, `action_dim` is 3"):
            processor.set_action_statistics("wide", ActionTokenizer(((0.0, 1.0),) * 4))

    def test_training_on_both_and_saving(self, tmp_path):
        model = build(action_horizon=2)
        processor = processor_of(model, {"arm": ARM, "base": BASE})
        generator = np.random.default_rng(0)
        codes = generator.integers(0, 30, (6, 16))
        parts, actions = [], {}
        for key, dim in (("arm", 3), ("base", 2)):
            actions[key] = generator.random((6, 2, dim)).astype(np.float32)
            parts.append(
                LabelledStepDataset(
                    processor, [f"go {key}"] * 6, vision_codes=codes, actions=actions[key], unnorm_key=key,
                    num_valid_steps=[2, 2, 2, 2, 2, 1],
                )
            )  # fmt: skip
        data = ConcatDataset(parts)
        trainer = LapaActionFinetuningTrainer(model, arguments(tmp_path), data, data, processor)
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model()
        for key, dim in (("arm", 3), ("base", 2)):
            assert f"eval_{key}/action_error/{dim - 1}" in metrics and f"eval_{key}/action_error/{dim}" not in metrics
            assert {f"eval_{key}/action_error/step_0", f"eval_{key}/action_error/step_1"} <= set(metrics)
            mean = actions[key][:, 0].mean(0)
            valid = np.concatenate([actions[key][:, 0], actions[key][:5, 1]])
            expected = np.abs(valid - mean).mean(0)
            assert metrics[f"eval_{key}/mean_action_error/0"] == pytest.approx(expected[0], rel=1e-5)
        assert 0 <= metrics["eval_token_accuracy"] <= 1
        loaded, its = LapaForActionPrediction.from_pretrained(tmp_path), LapaProcessor.from_pretrained(tmp_path)
        assert loaded.config.action_num_bins is None and its.action_horizon == 2
        inputs = its(vision_codes=codes[0], instruction="go base", unnorm_key="base")
        assert loaded.predict_action_tokens(**inputs).shape == (1, 2, 2)

    def test_two_arms(self, tmp_path):
        """14 dimensions, as of a robot with two arms, beside a single arm's 7."""
        model = build(action_dim=14)
        both = ActionTokenizer(((0.0, 0.5, 1.0),) * 14)
        processor = processor_of(model, {"two_arms": both, "one_arm": ActionTokenizer(both.edges[:7])})
        actions = np.random.default_rng(0).random((4, 14)).astype(np.float32)
        data = LabelledStepDataset(
            processor, ["fold the towel"] * 4, vision_codes=[CODES] * 4, actions=actions, unnorm_key="two_arms"
        )
        trainer = LapaActionFinetuningTrainer(model, arguments(tmp_path, max_steps=2), data, data, processor)
        trainer.train()
        assert "eval_action_error/13" in trainer.evaluate()
        for key, dim in (("two_arms", 14), ("one_arm", 7)):
            tokens = model.predict_action_tokens(**processor(images=picture(), instruction="fold", unnorm_key=key))
            assert processor.decode_actions(tokens, key).shape == (1, dim)

    def test_model_and_processor_must_agree(self, tmp_path):
        model = build(action_horizon=2)
        processor = processor_of(build())
        with pytest.raises(ValueError, match="`processor` has `action_horizon` 1, but the model has 2"):
            LapaActionFinetuningTrainer(model, arguments(tmp_path), processor=processor)


class TestProprio:
    def test_two_digits_per_dimension(self):
        states = ProprioTokenizer((0.0, -1.0, 5.0), (1.0, 1.0, 5.0))
        assert states.encode([0.5, 1.0, 5.0]) == "50 99 00"
        assert states.encode([-3.0, 7.0, 9.0]) == "00 99 00"
        assert ProprioTokenizer.from_dict(states.to_dict()) == states
        fitted = ProprioTokenizer.fit(np.stack([np.arange(101.0), np.full(101, 2.0)], axis=1))
        assert fitted.low == (1.0, 2.0) and fitted.high == (99.0, 2.0)
        with pytest.raises(ValueError, match=r"shape \(\.\.\., 3\), got \(2,\)"):
            states.encode([0.0, 1.0])
        with pytest.raises(ValueError, match=r"must be finite, but at position \(1,\) it is nan"):
            states.encode([0.0, np.nan, 1.0])

    @pytest.fixture(scope="class")
    def processor(self):
        processor = processor_of(build(use_proprio=True))
        processor.set_proprio_statistics("arm", ProprioTokenizer((0.0, 0.0), (1.0, 2.0)))
        return processor

    def test_prompt_and_example_tell_the_state(self, processor):
        def text(ids):
            return processor.tokenizer.decode([i for i in ids if i < processor.text_vocab_size])

        ids = processor(images=picture(), instruction="push", proprio=[0.5, 2.0])["input_ids"][0].tolist()
        assert "take to `push` State: 50 99. ASSISTANT:" in text(ids)
        example = processor.encode_example("push", CODES, action_tokens=[0, 0, 0], proprio=[0.5, 2.0])
        assert "take to `push` State: 50 99. ASSISTANT:" in text(example["input_ids"])
        batch = processor(
            images=[picture()] * 2, instruction=["push"] * 2, proprio=torch.tensor([[0.5, 2.0], [0.0, 0.0]])
        )
        assert batch["input_ids"][0].tolist() == ids and batch["input_ids"][1].tolist() != ids

    def test_missing_or_unwanted_state(self, processor):
        with pytest.raises(ValueError, match=r"`proprio` must be given: this model reads the robot's state"):
            processor(images=picture(), instruction="push")
        with pytest.raises(ValueError, match="`proprio` must be given"):
            processor.encode_example("push", CODES, action_tokens=[0, 0, 0])
        with pytest.raises(ValueError, match="no `proprio` can be written"):
            processor.encode_example("push", CODES, action_tokens=[0, 0, 0], proprio=[0, 0], raw_instruction=True)
        with pytest.raises(ValueError, match="'base' has no proprio statistics; known keys: 'arm'"):
            processor(images=picture(), instruction="push", proprio=[0.5, 2.0], unnorm_key="base")
        with pytest.raises(ValueError, match=r"`proprio` \(1\) must have one state for each of 2 rows"):
            processor(images=[picture()] * 2, instruction=["push"] * 2, proprio=[[0.5, 2.0]])
        with pytest.raises(ValueError, match=r"`use_proprio` is False"):
            processor_of(build())(images=picture(), instruction="push", proprio=[0.5])

    def test_a_policy_learns_from_the_state_alone(self, tmp_path):
        """Same image, same words: only the state tells what to do."""
        model = build(use_proprio=True, action_dim=1)
        processor = processor_of(model, {"arm": ActionTokenizer(((0.0, 1.0, 2.0),))})
        proprio = np.array([[0.0], [1.0]] * 8)
        processor.fit_proprio(proprio, "arm")
        data = LabelledStepDataset(
            processor, ["go"] * 16, vision_codes=[CODES] * 16, actions=proprio + 0.5, proprio=proprio, unnorm_key="arm"
        )
        assert data[0]["input_ids"].tolist() != data[1]["input_ids"].tolist()
        trainer = LapaActionFinetuningTrainer(
            model,
            arguments(tmp_path, max_steps=60, per_device_train_batch_size=16, learning_rate=2e-2),
            data,
            data,
            processor,
        )
        trainer.train()
        assert trainer.evaluate()["eval_token_accuracy"] == 1.0
        trainer.save_model()
        policy = LapaPolicy.from_pretrained(str(tmp_path))
        actions = [
            policy.model.predict_action_tokens(
                **policy.processor(vision_codes=CODES, instruction="go", proprio=[state])
            ).item()
            for state in (0.0, 1.0)
        ]
        assert actions == [0, 1]


class TestPipelineAndExport:
    def test_pipeline_gives_chunks_and_takes_the_state(self, tmp_path):
        save_policy(tmp_path, "action", action_horizon=2, use_proprio=True)
        processor = LapaProcessor.from_pretrained(tmp_path)
        processor.set_proprio_statistics("toy", ProprioTokenizer((0.0,), (1.0,)))
        processor.save_pretrained(tmp_path)
        policy = pipeline("robot-action", model=str(tmp_path))
        result = policy({"image": picture(), "instruction": "push", "proprio": [0.25]})
        assert result["action"].shape == (2, 3) and np.shape(result["action_tokens"]) == np.shape(result["scores"])
        assert np.array_equal(result["action"], processor.decode_actions([result["action_tokens"]])[0])
        with pytest.raises(ValueError, match="`proprio` must be given"):
            policy({"image": picture(), "instruction": "push"})
        several = policy(
            [{"image": picture(i), "instruction": "push", "proprio": [i / 2]} for i in range(3)], batch_size=3
        )
        assert [one["action"].shape for one in several] == [(2, 3)] * 3
        export(tmp_path, tmp_path / "hub")
        code = """
import sys, numpy as np
from transformers import pipeline
policy = pipeline("robot-action", model="hub", trust_remote_code=True)
image = np.zeros((20, 24, 3), dtype=np.uint8)
print(policy({"image": image, "instruction": "push", "proprio": [0.25]})["action"].shape)
"""
        assert "(2, 3)" in run_without(("lapa", "peft", "trl"), code, tmp_path)
        assert "Its actions are chunks of 2 steps" in (tmp_path / "hub" / "README.md").read_text()


class Counting:
    """A policy whose chunks count up, and which says how many robots it was asked for."""

    action_horizon = 3

    def __init__(self):
        self.calls = []

    def act_chunk(self, images, instructions, proprio=None):
        self.calls.append(len(images))
        base = 10 * len(self.calls)
        return np.stack([np.stack([[base + step, step % 2] for step in range(3)]) for _ in images]).astype(np.float32)


class TestPlaying:
    def test_open_loop_and_replanning(self):
        image = [np.zeros((2, 2, 3), np.uint8)]
        player = ChunkPlayer(Counting())
        assert [player.act(image, ["go"])[0, 0] for _ in range(5)] == [10, 11, 12, 20, 21]
        player = ChunkPlayer(Counting(), replan_every=2)
        assert [player.act(image, ["go"])[0, 0] for _ in range(5)] == [10, 11, 20, 21, 30]
        with pytest.raises(ValueError, match=r"`replan_every` must lie in \[1, 3\]"):
            ChunkPlayer(Counting(), replan_every=4)

    def test_robots_keep_their_own_chunks(self):
        player = ChunkPlayer(Counting())
        images, texts = [np.zeros((2, 2, 3), np.uint8)] * 2, ["go"] * 2
        assert player.act(images, texts, robots=["a", "b"])[:, 0].tolist() == [10, 10]
        player.reset(["b"])
        assert player.act(images, texts, robots=["b", "a"])[:, 0].tolist() == [20, 11]
        assert player.policy.calls == [2, 1]

    def test_a_patient_gripper_does_not_flicker(self):
        image = [np.zeros((2, 2, 3), np.uint8)]
        quick, patient = ChunkPlayer(Counting()), ChunkPlayer(Counting(), gripper_patience=2)
        assert [quick.act(image, ["go"])[0, 1] for _ in range(6)] == [0, 1, 0, 0, 1, 0]
        assert [patient.act(image, ["go"])[0, 1] for _ in range(6)] == [0] * 6
        asked = iter([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
        assert [patient._hold("r", next(asked)) for _ in range(6)] == [0, 0, 1, 1, 1, 1]

    def test_in_the_tabletop(self, tmp_path):
        pytest.importorskip("pymunk")
        from lapa.evaluation.environments.tabletop import TabletopEnvironment
        from lapa.evaluation.rollout import ChunkController, roll_out

        class Policy(Counting):
            def act_chunk(self, images, instructions, proprio=None):
                self.calls.append(len(images))
                return np.full((len(images), 3, 2), 0.1, dtype=np.float32)

        policy = Policy()
        rollouts = roll_out(
            lambda: TabletopEnvironment(families=["reach"], max_steps=5), ChunkController(ChunkPlayer(policy)),
            [("reach", seed) for seed in range(4)], num_environments=2,
        )  # fmt: skip
        assert [rollout.num_steps for rollout in rollouts] == [5] * 4
        # Two predictions for five steps; the second episodes begin with a new one.
        assert policy.calls == [2, 2, 2, 2]


def test_encoded_steps_take_chunks():
    processor = processor_of(build(action_horizon=2))
    tokens = np.array([[[2, 1, 0], [1, 0, 1]]])
    quick = EncodedStepDataset(processor, ["push"], [CODES], action_tokens=tokens)[0]
    slow = LabelledStepDataset(processor, ["push"], vision_codes=[CODES], action_tokens=tokens)[0]
    assert quick["input_ids"].tolist() == slow["input_ids"].tolist()
    assert quick["labels"].tolist() == slow["labels"].tolist()
