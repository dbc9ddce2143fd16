"""Stages 2 and 3: losses and steps of the recordings, exact resume, LoRA, evaluation in physical units."""

import json
import math

import numpy as np
import pytest
import torch
from recordings import policy_folder, tensors, to_id_space
from safetensors.torch import load_file
from shared_files import shared_path
from tiny_models import policy_config
from transformers import TrainerCallback

from lapa import LapaForActionPrediction, LapaForLatentAction, LapaImageProcessor, LapaProcessor, LapaTokenizer
from lapa.data.labelled_steps import LabelledStepDataset
from lapa.processing.image_augmentation_lapa import LapaImageAugmentation
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer, add_lora
from lapa.training.arguments import LapaActionFinetuningArguments, LapaLatentPretrainingArguments
from lapa.training.label_latent_actions import encode_images
from lapa.training.latent_pretraining_trainer import LapaLatentPretrainingTrainer

DIRECTIONS = ("left", "right", "up", "down")


def tokenizer():
    return LapaTokenizer(str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")))


def latent_model(**changes):
    torch.manual_seed(0)
    config = policy_config(action_dim=2, **changes)
    config.text_config.vocab_size = len(tokenizer())
    return LapaForLatentAction(config)


def action_model(**changes):
    torch.manual_seed(0)
    config = policy_config(action_dim=2, has_action_segment=True, **changes)
    config.text_config.vocab_size = len(tokenizer())
    return LapaForActionPrediction(config)


def processor_for(model, image_processor=None, **overrides):
    image_processor = image_processor or LapaImageProcessor(size=8)
    return LapaProcessor.from_config(model.config, image_processor, tokenizer(), **overrides)


def columns(num_steps=24):
    """Images whose brightness tells the code and the action."""
    generator = np.random.default_rng(0)
    kinds = generator.integers(0, 4, num_steps)
    images = (kinds[:, None, None, None] * 60 + generator.integers(0, 8, (num_steps, 8, 8, 3))).astype(np.uint8)
    codes = np.stack([kinds, kinds + 4, 3 - kinds, kinds], axis=1)
    actions = np.stack([kinds - 1.5, kinds % 2], axis=1).astype(np.float32)
    return [f"go {DIRECTIONS[kind]}" for kind in kinds], images, codes, actions


def arguments(kind, folder, **changes):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(str(folder), **{**defaults, **changes})


def latent_trainer(folder, model=None, callbacks=None, **changes):
    model = latent_model() if model is None else model
    processor = processor_for(model)
    instructions, images, codes, _ = columns()
    dataset = LabelledStepDataset(processor, instructions, images=images, latent_action_codes=codes)
    args = arguments(LapaLatentPretrainingArguments, folder, **changes)
    return LapaLatentPretrainingTrainer(model, args, dataset, dataset, processor, callbacks)


def action_trainer(folder, model=None, callbacks=None, peft_config=None, augmentation=None, **changes):
    model = action_model() if model is None else model
    processor = processor_for(model)
    instructions, images, _, actions = columns()
    processor.fit_actions(actions, "toy")
    dataset = LabelledStepDataset(processor, instructions, images=images, actions=actions, augmentation=augmentation)
    args = arguments(LapaActionFinetuningArguments, folder, **changes)
    return LapaActionFinetuningTrainer(
        model, args, dataset, dataset, processor, peft_config=peft_config, callbacks=callbacks
    )


def lora(**changes):
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **changes)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_examples_need_one_picture_and_a_target():
    processor = processor_for(latent_model())
    instructions, images, codes, actions = columns(3)
    with pytest.raises(ValueError, match="exactly one of `images` and `vision_codes`"):
        LabelledStepDataset(processor, instructions, latent_action_codes=codes)
    with pytest.raises(ValueError, match="must be given"):
        LabelledStepDataset(processor, instructions, images=images)
    with pytest.raises(ValueError, match="`images` has 2 rows for 3 instructions"):
        LabelledStepDataset(processor, instructions, images=images[:2], latent_action_codes=codes)
    processor.fit_actions(actions, "toy")
    actions[1, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        LabelledStepDataset(processor, instructions, images=images, actions=actions)


def test_augmentation_changes_with_the_epoch_only():
    model = action_model()
    processor = processor_for(model, image_processor=LapaImageProcessor(size=8, do_center_crop=True))
    instructions, images, _, actions = columns(3)
    processor.fit_actions(actions, "toy")
    plain, augmented, unchanged = (
        LabelledStepDataset(processor, instructions, images=images, actions=actions, augmentation=augmentation)
        for augmentation in (None, LapaImageAugmentation(), LapaImageAugmentation(1.0, colour_probability=0.0))
    )
    first = augmented[1]["pixel_values"]
    assert not np.array_equal(first, plain[1]["pixel_values"])
    assert np.array_equal(first, augmented[1]["pixel_values"])
    augmented.start_epoch(1)
    assert not np.array_equal(first, augmented[1]["pixel_values"])
    # The crop of the augmentation stands for the processor's.
    uncropped = processor.image_processor(images[1], do_center_crop=False)["pixel_values"][0]
    assert np.array_equal(unchanged[1]["pixel_values"], uncropped)


def test_latent_pretraining_learns(tmp_path):
    trainer = latent_trainer(tmp_path, max_steps=60, logging_steps=20)
    vision = {name: value.clone() for name, value in trainer.policy.model.vision_tokenizer.state_dict().items()}
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    losses, accuracies = logged(trainer, "latent_loss"), logged(trainer, "latent_accuracy")
    assert losses[-1] < 0.7 * losses[0] and accuracies[-1] > accuracies[0]
    weight = trainer.model.config.text_loss_weight
    for loss, latent, text in zip(*(logged(trainer, name) for name in ("loss", "latent_loss", "text_loss"))):
        assert loss == pytest.approx((1 - weight) * latent + weight * text, rel=1e-4)
    tokenizer_now = trainer.policy.model.vision_tokenizer
    assert all(torch.equal(value, vision[name]) for name, value in tokenizer_now.state_dict().items())
    assert not tokenizer_now.training and not any(p.requires_grad for p in tokenizer_now.parameters())
    still = [n for n, p in trainer.model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert not still
    metrics = trainer.evaluate()
    assert metrics["eval_latent_loss"] < losses[0] and 0 <= metrics["eval_latent_accuracy"] <= 1
    with torch.no_grad():
        examples = trainer.data_collator([trainer.eval_dataset[i] for i in range(24)])
        assert metrics["eval_loss"] == pytest.approx(trainer.model.eval()(**examples).loss.item(), rel=1e-4)


def test_precomputed_image_codes_train_the_same(tmp_path):
    whole = latent_trainer(tmp_path / "whole", max_steps=2)
    model = latent_model()
    processor = processor_for(model)
    instructions, images, codes, _ = columns()
    vision_codes = encode_images(
        model.model.vision_tokenizer, processor.image_processor, images, 5, show_progress=False
    )
    assert vision_codes.shape == (24, model.config.vision_tokenizer_config.num_image_tokens)
    dataset = LabelledStepDataset(
        processor, instructions, vision_codes=vision_codes, latent_action_codes=codes, cache=True
    )
    assert "pixel_values" not in dataset[0] and dataset[0] is dataset[0]
    args = arguments(LapaLatentPretrainingArguments, tmp_path / "codes", max_steps=2)
    precomputed = LapaLatentPretrainingTrainer(model, args, dataset, processor=processor)
    whole.train()
    precomputed.train()
    for (name, ours), theirs in zip(precomputed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs), name


def test_image_codes_do_not_depend_on_mixed_precision(tmp_path):
    seen = []
    for precision in ({}, {"bf16": True}):
        trainer = latent_trainer(tmp_path, max_steps=1, **precision)
        original = trainer.model.model.fill_vision_codes

        def fill(input_ids, codes, original=original):
            seen.append(codes.clone())
            return original(input_ids, codes)

        trainer.model.model.fill_vision_codes = fill
        trainer.train()
    assert len(seen) == 2 and torch.equal(*seen)
    with torch.autocast("cpu", torch.bfloat16):
        images = next(iter(trainer.get_train_dataloader()))["pixel_values"]
        assert not torch.equal(trainer.model.model.encode_images(images), seen[0]), "autocast would change them"


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("kind", ["latent", "action", "lora", "augmented"])
def test_resumed_equals_uninterrupted(tmp_path, kind):
    # LoRA's dropout draws from torch's generator.
    more = {"peft_config": lora(lora_dropout=0.1)} if kind == "lora" else {}
    if kind == "augmented":
        more = {"augmentation": LapaImageAugmentation()}
    build = latent_trainer if kind == "latent" else action_trainer
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, **more}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    build(tmp_path / "parts", callbacks=[StopAt(5)], **settings).train()
    resumed = build(tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert resumed.state.global_step == 10
    assert whole.train_dataset.epoch == resumed.train_dataset.epoch == 3  # 3 steps each
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("build", [latent_trainer, action_trainer])
def test_accumulated_gradients_equal_one_batch(tmp_path, build):
    one = build(tmp_path / "one", max_steps=3, per_device_train_batch_size=8)
    one.train()
    split = build(tmp_path / "split", max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    split.train()
    for (name, ours), theirs in zip(split.model.named_parameters(), one.model.parameters()):
        assert torch.allclose(ours, theirs, atol=2e-5), name
    assert logged(split, "loss") == pytest.approx(logged(one, "loss"), rel=1e-4)


def test_finetuning_learns_and_says_how_far_off(tmp_path):
    trainer = action_trainer(tmp_path, max_steps=60, logging_steps=20)
    start = trainer.evaluate()
    trainer.train()
    assert logged(trainer, "action_loss") == pytest.approx(logged(trainer, "loss"), rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_token_accuracy"] > max(0.8, start["eval_token_accuracy"])
    assert metrics["eval_token_accuracy"] == pytest.approx(metrics["eval_action_accuracy"], abs=1e-6)
    *_, actions = columns()
    baseline = np.abs(actions - actions.mean(0)).mean(0)
    assert metrics["eval_mean_action_error/0"] == pytest.approx(baseline[0], rel=1e-4)
    assert metrics["eval_mean_action_error/1"] == pytest.approx(baseline[1], rel=1e-4)
    assert metrics["eval_action_error"] < metrics["eval_mean_action_error"]


def test_evaluation_by_hand(tmp_path):
    """Predictions are the most likely bins that a dimension has; errors are in physical units."""
    trainer = action_trainer(tmp_path)
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(24)])
    start, end = trainer.model.config.segment("action")
    with torch.no_grad():
        logits = trainer.model.eval()(**{k: v for k, v in batch.items() if k != "action"}).logits
    targets = batch["labels"][:, 1:]
    chosen = (targets >= start) & (targets < end)
    logits = logits[:, :-1][chosen].view(24, 2, -1)[..., start:end]
    num_bins = trainer.processor.action_tokenizer("toy").num_bins
    predicted = torch.stack([logits[:, d, : num_bins[d]].argmax(-1) for d in range(2)], dim=1)
    decoded = trainer.processor.decode_actions(predicted)
    metrics = trainer.evaluate()
    assert metrics["eval_action_error/0"] == pytest.approx(
        (decoded - batch["action"]).abs().mean(0)[0].item(), rel=1e-4
    )
    right = predicted == targets[chosen].view(24, 2) - start
    assert metrics["eval_token_accuracy/1"] == pytest.approx(right[:, 1].double().mean().item())


def test_saved_policy_acts(tmp_path):
    trainer = action_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_merged()
    policy, processor = LapaForActionPrediction.from_pretrained(tmp_path), LapaProcessor.from_pretrained(tmp_path)
    assert processor.target == "action"
    assert policy.config.action_num_bins == list(processor.action_tokenizer("toy").num_bins)
    # Training must not turn the cache of the saved model off.
    assert getattr(policy.config, "use_cache", True)
    _, images, _, _ = columns()
    inputs = processor(images=list(images[:3]), instruction=["go left"] * 3)
    tokens = policy.predict_action_tokens(**inputs)
    assert torch.equal(tokens, trainer.model.eval().predict_action_tokens(**inputs))
    assert processor.decode_actions(tokens).shape == (3, 2)


def test_latent_rows_do_not_move_in_finetuning(tmp_path):
    # Rows without a gradient are still subject to weight decay.
    trainer = action_trainer(tmp_path, max_steps=3, weight_decay=0.1)
    start, end = trainer.model.config.segment("latent")
    rows = [
        trainer.model.model.embed_tokens.weight[start:end].clone(),
        trainer.model.lm_head.weight[start:end].clone(),
    ]
    trainer.train()
    assert torch.equal(trainer.model.model.embed_tokens.weight[start:end], rows[0])
    assert torch.equal(trainer.model.lm_head.weight[start:end], rows[1])


def test_lora_trains_adapters_and_new_rows_only(tmp_path):
    model = action_model()
    old = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = action_trainer(tmp_path, model, peft_config=lora(), max_steps=40, logging_steps=20)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trainable)
    assert sum("lora_A" in name for name in trainable) == 2 * 7, "every linear layer of both layers"
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.9 * losses[0]
    still = [n for n, p in trainer.model.named_parameters() if n in trainable and torch.equal(p, before[n])]
    assert not still
    start, end = model.config.segment("action")
    _, images, _, _ = columns()
    inputs = trainer.processor(images=list(images[:3]), instruction=["go left"] * 3)
    scores = trainer.model.eval().get_base_model().predict_action_tokens(**inputs, return_scores=True).scores
    trainer.save_merged(tmp_path / "merged")
    merged = LapaForActionPrediction.from_pretrained(tmp_path / "merged")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new = merged.state_dict()[name]
        assert torch.equal(new[:start], old[name][:start]), "old rows moved"
        assert (new[start:end] != old[name][start:end]).any(1).all() or name == "model.embed_tokens.weight"
        assert not torch.equal(new[start:end], old[name][start:end])
    vision = [name for name in old if "vision_tokenizer" in name]
    assert vision and all(torch.equal(merged.state_dict()[name], old[name]) for name in vision)
    again = merged.predict_action_tokens(**inputs, return_scores=True)
    assert torch.allclose(again.scores, scores, atol=1e-5)


def test_adapter_alone_round_trips(tmp_path):
    """The adapter holds the new rows: on a base whose action rows are drawn anew it gives the same model."""
    from peft import PeftModel

    latent_model().save_pretrained(tmp_path / "base")
    base = LapaForActionPrediction.from_pretrained(tmp_path / "base")
    trainer = action_trainer(tmp_path / "run", base, peft_config=lora(), max_steps=4, merge_adapter=False)
    trainer.train()
    trainer.save_merged(tmp_path / "adapter")
    # The adapter holds its own rows, not the tables they belong to.
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [name for name, value in adapter.items() if len(value) == base.config.vocab_size]
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    torch.manual_seed(123)
    fresh = LapaForActionPrediction.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(4)])
    batch.pop("action")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, trainer.model.eval()(**batch).logits)


def test_lora_settings(tmp_path):
    settings = lora()
    add_lora(action_model(), settings)
    assert settings.trainable_token_indices is None and settings.target_modules is None, "the caller's config changed"
    wrapped = add_lora(action_model(), lora(target_modules=["q_proj"], use_dora=True))
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == 2
    with pytest.raises(ValueError, match="`trainable_token_indices`"):
        add_lora(action_model(), lora(modules_to_save=["lm_head"]))


@pytest.mark.parametrize("kind", ["latent", "finetune"])
def test_two_training_steps_equal_recordings(kind, tmp_path):
    """The published loss, gradient norm and parameters after each AdamW step, through the trainers."""
    recorded = tensors(f"train/{kind}")
    metrics = json.loads(shared_path(f"fixtures/train/{kind}.json").read_text())["metrics_per_step"]
    if kind == "latent":
        model = LapaForLatentAction.from_pretrained(policy_folder("delta", "fp32"))
        trainer_class, arguments_class = LapaLatentPretrainingTrainer, LapaLatentPretrainingArguments
    else:
        model = LapaForActionPrediction.from_pretrained(policy_folder("delta", "fp32"), action_vocab_size=16)
        start, end = model.config.segment("action")
        model.model.embed_tokens.weight.data[start:end] = recorded["init.transformer/ate/embedding"]
        model.lm_head.weight.data[start:end] = recorded["init.action_head/kernel"].t()
        trainer_class, arguments_class = LapaActionFinetuningTrainer, LapaActionFinetuningArguments
    batches = [recorded_batch(recorded, step, model.config) for step in (1, 2)]
    size = len(batches[0]["input_ids"])
    args = arguments_class(
        str(tmp_path), max_steps=2, logging_steps=1, per_device_train_batch_size=size, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = trainer_class(
        model, args, [{"row": row} for row in range(2 * size)],
        data_collator=lambda examples: batches[examples[0]["row"] // size],
    )  # fmt: skip
    assert (args.learning_rate, args.adam_beta2, args.max_grad_norm, args.weight_decay) == (2e-5, 0.95, 1.0, 0)
    after = []
    trainer.add_callback(
        type("Keep", (TrainerCallback,), {
            "on_step_end": lambda self, args, state, control, **kwargs: after.append(
                {name: value.detach().clone() for name, value in model.named_parameters()}
            )
        })
    )  # fmt: skip
    trainer.train()
    names = {"loss": "loss", "latent_loss": "delta_loss", "text_loss": "text_loss", "action_loss": "action_loss",
             "latent_accuracy": "delta_acc", "action_accuracy": "action_acc", "grad_norm": "gradient_norm"}  # fmt: skip
    compared = 0
    for step in range(2):
        log = trainer.state.log_history[step]
        for ours, theirs in names.items():
            if ours in log and theirs in metrics[step]:
                assert log[ours] == pytest.approx(metrics[step][theirs], rel=1e-5, abs=1e-7), (step, ours)
                compared += 1
        for name, value in published_parameters(recorded, f"param_after.step{step + 1}.", model.config).items():
            moved = after[step][name]
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                moved = torch.cat([moved[start:end] for start, end in value[1]])
                value = value[0]
            # By norm: Adam's first step is the sign of the gradient, which rounding decides where that is near zero.
            assert (moved - value).norm() < 1e-6 * value.norm(), (step, name)
    assert compared >= 6


def recorded_batch(recorded, step, config):
    """Recorded inputs and targets, which are shifted against each other, as aligned ids and labels."""
    batch = {k.split(f"batch.step{step}.")[1]: v for k, v in recorded.items() if k.startswith(f"batch.step{step}.")}

    def ids(side):
        masks = [batch.get(f"{side}_{segment}_masks") for segment in ("vision", "delta", "action")]
        return to_id_space(batch[f"{'input' if side == 'input' else 'target'}_tokens"], *masks, config)

    labels = torch.where(batch["loss_masks"] > 0, ids("target"), -100)
    column = torch.ones(len(labels), 1, dtype=torch.long)
    # The published training passes no attention mask.
    return {
        "input_ids": torch.cat((ids("input"), column), dim=1),
        "labels": torch.cat((-100 * column, labels), dim=1),
    }


def published_parameters(recorded, prefix, config):
    """Recorded parameters by our names, laid out as ours; tables of rows with the bounds of their segments."""
    from lapa.conversion.checkpoint_mapping import POLICY_LAYER, POLICY_SEGMENTS, STACKED_LAYERS, halves_from_pairs

    found = {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}
    parameters = {"model.norm.weight": found["transformer/ln_f/kernel"]}
    segments = [name for name, (embedding, _) in POLICY_SEGMENTS.items() if embedding in found]
    if segments:
        rows = torch.cat([found[POLICY_SEGMENTS[name][0]] for name in segments])
        parameters["model.embed_tokens.weight"] = (rows, [config.segment(name) for name in segments])
    segments = [name for name, (_, head) in POLICY_SEGMENTS.items() if head in found]
    rows = torch.cat([found[POLICY_SEGMENTS[name][1]].t() for name in segments])
    parameters["lm_head.weight"] = (rows, [config.segment(name) for name in segments])
    head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    for leaf, (name, layout) in POLICY_LAYER.items():
        stacked = found.get(f"{STACKED_LAYERS}/{leaf}")
        for layer in range(0 if stacked is None else len(stacked)):
            value = stacked[layer] if layout == "copy" else stacked[layer].t()
            value = halves_from_pairs(value.contiguous(), head_dim) if layout == "rope" else value
            parameters[f"model.layers.{layer}.{name}"] = value
    return parameters


def test_defaults(tmp_path):
    for kind, steps in ((LapaLatentPretrainingArguments, 70_000), (LapaActionFinetuningArguments, 2000)):
        args = kind(str(tmp_path), use_cpu=True)
        assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (2e-5, 0.9, 0.95)
        assert (args.max_grad_norm, args.weight_decay, args.max_steps) == (1.0, 0, steps)
        assert args.bf16 is False and args.lr_scheduler_type == "constant"
    with pytest.raises(ValueError, match="`max_length` must be given"):
        LapaLatentPretrainingArguments(str(tmp_path), use_cpu=True, pad_to_max_length=True)
    assert math.isclose(LapaActionFinetuningArguments(str(tmp_path), use_cpu=True).adam_epsilon, 1e-8)
