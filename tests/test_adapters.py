"""LoRA, DoRA and QLoRA: what they train, what they save, and that every way of loading gives the same policy."""

import json
import shutil

import numpy as np
import pytest
import torch
from hub_folders import picture, policy_config, save_policy
from transformers import AutoModelForCausalLM, pipeline

from lapa import LapaForActionPrediction, LapaForLatentAction, LapaProcessor
from lapa.data.labelled_steps import LabelledStepDataset
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
from lapa.training.adapters import UNQUANTISED_MODULES, add_lora, quantization_config
from lapa.training.arguments import LapaActionFinetuningArguments

peft = pytest.importorskip("peft")
# Quantisation works on blocks of 64 weights.
TRUNK = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_dropout": 0.1},
}


def lora(**changes):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **changes)


def base(folder):
    """A latent-pretrained folder: its action rows are still to come."""
    return str(save_policy(folder / "base", "latent", text_config=dict(TRUNK)))


def trainer_for(model, folder, output, peft_config=None, **changes):
    processor = LapaProcessor.from_pretrained(folder)
    generator = np.random.default_rng(0)
    actions = generator.random((8, 3)).astype(np.float32)
    processor.action_horizon = model.config.action_horizon
    processor.fit_actions(actions, "robot", gripper_dimension=None)
    codes = generator.integers(0, 30, (8, 16))
    data = LabelledStepDataset(processor, ["push"] * 8, vision_codes=codes, actions=actions, unnorm_key="robot")
    quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    settings = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, **quiet, **changes}
    arguments = LapaActionFinetuningArguments(str(output), **settings)
    return LapaActionFinetuningTrainer(model, arguments, data, data, processor, "robot", peft_config)


def scores(policy, processor):
    inputs = processor(images=[picture(), picture(1)], instruction=["push", "pull the block"], target="action")
    return policy.eval().predict_action_tokens(**inputs, return_scores=True).scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_saved_policies_load_every_way(tmp_path, kind, merge):
    folder = base(tmp_path)
    model = LapaForActionPrediction.from_pretrained(folder, action_dim=3)
    trainer = trainer_for(model, folder, tmp_path / "out", lora(**KINDS[kind]), merge_adapter=merge)
    trainer.train()
    expected = scores(trainer.model.eval().get_base_model(), trainer.processor)
    trainer.save_merged()
    assert (tmp_path / "out" / "model.safetensors").exists() == merge
    processor = LapaProcessor.from_pretrained(tmp_path / "out")
    torch.manual_seed(99)  # fresh rows of the base are other ones
    loaded = LapaForActionPrediction.from_pretrained(tmp_path / "out")
    assert type(loaded) is LapaForActionPrediction and loaded.config.action_dim == 3
    torch.testing.assert_close(scores(loaded, processor), expected, atol=1e-5, rtol=1e-4)
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(automatic) is LapaForActionPrediction
    torch.testing.assert_close(scores(automatic, processor), expected, atol=1e-5, rtol=1e-4)
    policy = pipeline("robot-action", model=str(tmp_path / "out"))
    result = policy({"image": picture(), "instruction": "push"}, return_log_probs=True)
    np.testing.assert_allclose(result["log_probs"], expected[0].numpy(), atol=1e-4)
    assert result["action"].shape == (3,) and result["unnorm_key"] == "robot"


def test_an_adapter_from_an_auto_class_that_was_passed_its_base(tmp_path):
    """What transformers does with an adapter on the Hub: the class comes from the base model."""
    folder = base(tmp_path)
    trainer = trainer_for(
        LapaForActionPrediction.from_pretrained(folder), folder, tmp_path / "out", lora(), merge_adapter=False
    )
    trainer.train()
    trainer.save_merged()
    expected = scores(trainer.model.get_base_model(), trainer.processor)
    loaded = LapaForLatentAction.from_pretrained(folder, adapter_kwargs={"_adapter_model_path": str(tmp_path / "out")})
    assert type(loaded) is LapaForActionPrediction
    torch.testing.assert_close(scores(loaded, trainer.processor), expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_without_its_base(tmp_path):
    folder = base(tmp_path)
    trainer = trainer_for(
        LapaForActionPrediction.from_pretrained(folder), folder, tmp_path / "out", lora(), merge_adapter=False
    )
    trainer.save_merged()
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"belongs to the base model '.*base', which is not there"):
        LapaForActionPrediction.from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"without the config\.json of its model"):
        LapaForActionPrediction.from_pretrained(tmp_path / "out")


def test_the_kept_latent_head_is_trained_too(tmp_path):
    model = LapaForActionPrediction(policy_config(has_action_segment=True, keep_latent_head=True))
    wrapped = add_lora(model, lora())
    (settings,) = wrapped.peft_config.values()
    rows = settings.trainable_token_indices["lm_head"]
    assert rows == [*range(*model.config.segment("latent")), *range(*model.config.segment("action"))]


def test_both_losses_with_weights(tmp_path):
    model = LapaForActionPrediction(policy_config(has_action_segment=True, keep_latent_head=True))
    save_policy(tmp_path / "base", "action")
    trainer = trainer_for(model, tmp_path / "base", tmp_path / "out", latent_loss_weight=0.25, max_steps=2)
    part, processor = trainer.train_dataset, trainer.processor
    codes = LabelledStepDataset(
        processor, ["push"] * 8, vision_codes=part.vision_codes, latent_action_codes=[[1, 2, 3, 4]] * 8
    )
    trainer.train_dataset = trainer.eval_dataset = torch.utils.data.ConcatDataset([part, codes])
    trainer.train()
    for log in trainer.state.log_history[:2]:
        assert log["loss"] == pytest.approx(log["action_loss"] + 0.25 * log["latent_loss"], rel=1e-4)
        assert log["latent_loss"] > 0 < log["action_loss"]
    # The examples of codes have no say in the errors of actions.
    metrics = trainer.evaluate()
    trainer.eval_dataset = part
    for name, value in trainer.evaluate().items():
        if "token_accuracy" in name or "action_error" in name:
            assert metrics[name] == pytest.approx(value, abs=1e-6), name
    trainer.save_model()
    assert LapaForActionPrediction.from_pretrained(tmp_path / "out").config.latent_loss_weight == 0.25
    with pytest.raises(ValueError, match="`latent_loss_weight` must be at least 0"):
        LapaActionFinetuningArguments(str(tmp_path), use_cpu=True, latent_loss_weight=-1.0)


class TestQuantised:
    @pytest.fixture
    def folder(self, tmp_path):
        pytest.importorskip("bitsandbytes")
        return base(tmp_path)

    @pytest.fixture
    def policy(self, folder):
        torch.manual_seed(3)
        return LapaForActionPrediction.from_pretrained(folder, quantization_config=quantization_config(True))

    def test_the_trunk_is_quantised_and_nothing_else(self, policy):
        kinds = {name: type(module).__name__ for name, module in policy.named_modules()}
        quantised = {name for name, kind in kinds.items() if kind == "Linear4bit"}
        assert len(quantised) == 7 and all(".layers." in name for name in quantised)
        assert not any(skipped in name for name in quantised for skipped in UNQUANTISED_MODULES)
        assert policy.model.vision_tokenizer.dtype == torch.float32
        assert policy.lm_head.weight.shape[0] == policy.config.vocab_size

    def test_gradients_are_those_of_the_dequantised_trunk(self, folder, policy):
        import bitsandbytes

        plain = LapaForActionPrediction.from_pretrained(folder)
        state = policy.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            plain.get_parameter(name).data.copy_(state[name])  # the same fresh rows
        for name, module in policy.named_modules():
            if type(module).__name__ == "Linear4bit":
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.data.copy_(weight)
        gradients = []
        for model in (policy, plain):
            torch.manual_seed(0)
            wrapped = add_lora(model, lora(init_lora_weights=False)).train()
            ids = torch.tensor([[1, 5, 6, *range(*model.config.segment("action")), 2]])
            wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            gradients.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
        assert len(gradients[0]) == 2 * 7 + 2 and gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert gradient.abs().sum() > 0, name
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3)

    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_training_and_both_ways_of_saving(self, folder, policy, tmp_path, kind):
        # Evaluation between steps, for which bitsandbytes packs the weights of a CPU in another way.
        evaluation = {"eval_strategy": "steps", "eval_steps": 4}
        trainer = trainer_for(policy, folder, tmp_path / "out", lora(**KINDS[kind]), max_steps=8, **evaluation)
        rows = policy.lm_head.weight.detach().clone()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        quantised = scores(trainer.model.eval().get_base_model(), trainer.processor)
        trainer.args.merge_adapter = False
        trainer.save_merged(str(tmp_path / "adapter"))
        trainer.args.merge_adapter = True
        trainer.save_merged(str(tmp_path / "merged"))
        again = LapaForActionPrediction.from_pretrained(
            tmp_path / "adapter", quantization_config=quantization_config(True)
        )
        torch.testing.assert_close(scores(again, trainer.processor), quantised, atol=1e-4, rtol=1e-3)
        merged = LapaForActionPrediction.from_pretrained(tmp_path / "merged")
        assert not getattr(merged, "is_quantized", False)
        kinds = {type(module).__name__ for module in merged.modules()}
        assert "Linear4bit" not in kinds and "LoraLayer" not in kinds
        start, end = merged.config.segment("action")
        assert not torch.allclose(merged.lm_head.weight[start:end], rows[start:end], atol=1e-4), "new rows trained"
        assert torch.equal(merged.lm_head.weight[:start], rows[:start])
        # The same adapter on the stored weights instead of their 4 bits: near, not equal.
        plain = LapaForActionPrediction.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(
            scores(merged, trainer.processor), scores(plain, trainer.processor), atol=1e-4, rtol=1e-3
        )
        # Of the first token: the later ones follow what was decoded before them.
        difference = (scores(merged, trainer.processor) - quantised)[:, 0].abs()
        assert 0 < difference[difference.isfinite()].max() < 1

    def test_by_the_command(self, folder, tmp_path, capsys):
        from lapa.training import scripts

        generator = np.random.default_rng(0)
        rows = [
            {"vision": generator.integers(0, 30, 16).tolist(), "instruction": "push", "raw_actions": action.tolist()}
            for action in generator.random((8, 3))
        ]
        (tmp_path / "robot.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["--model", folder, "--data", str(tmp_path / "robot.jsonl"), "--output_dir", str(tmp_path / "out")]
        command += ["--gripper_dimension", "none", "--max_steps", "2", "--per_device_train_batch_size", "4"]
        command += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
        assert scripts.finetune([*command, "--load_in_4bit"]) == 2
        assert "need `use_peft`" in capsys.readouterr().err
        assert scripts.finetune([*command, "--load_in_4bit", "--use_peft", "--merge_adapter", "false"]) == 0
        assert not (tmp_path / "out" / "model.safetensors").exists()
        loaded = LapaForActionPrediction.from_pretrained(tmp_path / "out")
        assert not getattr(loaded, "is_quantized", False)
        assert loaded.config.action_num_bins == list(
            LapaProcessor.from_pretrained(tmp_path / "out").action_tokenizer().num_bins
        )

    def test_what_cannot_be(self, folder, policy, tmp_path):
        with pytest.raises(ValueError, match="through an adapter only"):
            trainer_for(policy, folder, tmp_path / "out")
        with pytest.raises(ValueError, match="exclude each other"):
            quantization_config(load_in_4bit=True, load_in_8bit=True)
        assert quantization_config() is None
