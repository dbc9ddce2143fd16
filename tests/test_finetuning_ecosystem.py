"""peft and trl on the policies: LoRA with new rows trainable, and trl's trainer."""

import pytest
import torch
from tiny_models import build, outputs_of, prompt, training_batch

from lapa import LapaForActionPrediction

peft = pytest.importorskip("peft")


def lora_config(policy) -> "peft.LoraConfig":
    start, end = policy.config.segment("action")
    rows = list(range(start, end))
    return peft.LoraConfig(
        r=4,
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        trainable_token_indices={"embed_tokens": rows, "lm_head": rows},
    )


def test_lora_trains_adapters_and_new_rows_only(tmp_path):
    policy = build("action")
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    start, end = policy.config.segment("action")
    model = peft.get_peft_model(policy, lora_config(policy)).train()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("vision_tokenizer" in name for name in names)
    assert any("q_proj" in name and "lora_A" in name for name in names)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batch = training_batch(policy)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        after = merged.state_dict()[name]
        assert torch.equal(after[:start], before[name][:start]), name
        assert not torch.equal(after[start:end], before[name][start:end]), name


def test_adapter_round_trip(tmp_path):
    policy = build("action")
    policy.save_pretrained(tmp_path / "base")
    base = LapaForActionPrediction.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, lora_config(policy)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**training_batch(policy)).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    expected = outputs_of_peft(model, policy)
    fresh = LapaForActionPrediction.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(outputs_of_peft(loaded, policy), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, outputs_of(policy), atol=1e-3)


def outputs_of_peft(model, policy) -> torch.Tensor:
    inputs = {name: value for name, value in training_batch(policy).items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("kind", ["latent", "action"])
def test_trl_sft_trainer_takes_a_step(kind, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    policy = build(kind)
    batch = {name: value for name, value in training_batch(policy, batch=4).items() if name != "pixel_values"}
    codes = policy.model.encode_images(prompt(policy.config, 4)["pixel_values"])
    filled = policy.model.fill_vision_codes(batch["input_ids"], codes)
    rows = Dataset.from_dict({"input_ids": filled.tolist(), "labels": batch["labels"].tolist()})
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )

    def collate(examples):
        tensors = {name: torch.tensor([row[name] for row in examples]) for name in ("input_ids", "labels")}
        return tensors | {"attention_mask": torch.ones_like(tensors["input_ids"])}

    class Tokenizer:
        pass

    before = policy.lm_head.weight.detach().clone()
    trainer = SFTTrainer(
        model=policy, args=arguments, train_dataset=rows, data_collator=collate, processing_class=tiny_tokenizer()
    )
    result = trainer.train()
    assert result.global_step == 1
    assert result.training_loss > 0
    assert not torch.equal(policy.lm_head.weight, before)


def tiny_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
