"""Closed-loop success while training: it acts in the simulator, logs, and leaves the training as it was."""

from functools import partial

import numpy as np
import pytest
import torch
from hub_folders import policy_config
from shared_files import shared_path

from lapa import LapaForActionPrediction, LapaImageProcessor, LapaProcessor, LapaTokenizer
from lapa.data.labelled_steps import LabelledStepDataset
from lapa.serving.policy import LapaPolicy
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
from lapa.training.arguments import LapaActionFinetuningArguments
from lapa.training.closed_loop import ClosedLoopCallback


def make_trainer(folder, callbacks=()):
    from peft import LoraConfig

    torch.manual_seed(0)
    model = LapaForActionPrediction(policy_config(has_action_segment=True, action_dim=2))
    tokenizer = LapaTokenizer(str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")))
    processor = LapaProcessor.from_config(model.config, LapaImageProcessor(size=16), tokenizer)
    generator = np.random.default_rng(0)
    actions = generator.uniform(-1, 1, (8, 2)).astype(np.float32)
    processor.fit_actions(actions, "tabletop", gripper_dimension=None)
    data = LabelledStepDataset(
        processor, ["push"] * 8, vision_codes=generator.integers(0, 30, (8, 16)), actions=actions
    )
    arguments = LapaActionFinetuningArguments(
        str(folder), max_steps=5, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    # Dropout draws from torch's generator at every step.
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.2)
    return LapaActionFinetuningTrainer(
        model, arguments, data, processor=processor, peft_config=lora, callbacks=callbacks
    )


def test_success_in_the_tabletop_is_logged(tmp_path):
    pytest.importorskip("pymunk")
    from lapa.evaluation.environment_pool import EnvironmentPool
    from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation
    from lapa.evaluation.rollout import PolicyController, roll_out

    modes = []

    def success(model, processor):
        modes.append((model.training, torch.is_grad_enabled()))
        # Sampling and numpy's own generator: what the training must not notice.
        np.random.random(3)
        policy = LapaPolicy(model, processor, do_sample=True)
        with EnvironmentPool(partial(TabletopEvaluation, families=["reach"], max_steps=2), 2) as pool:
            rollouts = roll_out(pool, PolicyController(policy), [("reach", seed) for seed in range(2)])
        assert [rollout.num_steps for rollout in rollouts] == [2, 2]
        return {"success": np.mean([rollout.success for rollout in rollouts]), "episodes": len(rollouts)}

    played = make_trainer(tmp_path / "played", [ClosedLoopCallback(success, interval=2)])
    played.train()
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    logs = [log for log in played.state.log_history if "closed_loop/success" in log]
    assert [log["step"] for log in logs] == [2, 4, 5] and all(log["closed_loop/episodes"] == 2 for log in logs)
    assert all(0 <= log["closed_loop/success"] <= 1 for log in logs)
    assert modes == [(False, False)] * 3 and played.model.training
    for (name, ours), theirs in zip(played.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_single_number_is_success(tmp_path):
    callback = ClosedLoopCallback(lambda model, processor: 0.25, interval=100)
    with pytest.raises(ValueError, match="belongs to no trainer yet"):
        callback.play()
    trainer = make_trainer(tmp_path, [callback])
    assert callback.play() == {"closed_loop/success": 0.25}
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "closed_loop/success" in log] == [5]
    with pytest.raises(ValueError, match="`interval` must be at least 1"):
        ClosedLoopCallback(lambda model, processor: 0.0, interval=0)
