"""The quantizer's further losses and bottlenecks: entropy, continuous, features, instructions in two stages, actions."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from shared_files import shared_path
from test_training_quantizer import SMALL, arguments, moving_square
from tiny_models import TINY_QUANTIZER, build, feature_backbone, quantizer_config, training_batch
from torch.utils.data import Dataset

from lapa import LapaQuantizer
from lapa.data.frame_pairs import FramePairDataset
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerEncoder
from lapa.modeling_lapa.quantizer_targets_lapa import (
    FrozenFeatures,
    LapaQuantizerActionHead,
    LapaQuantizerInstruction,
    features_per_token,
)
from lapa.modeling_lapa.vector_quantization_lapa import ContinuousBottleneck, NoiseSubstitutionQuantizer
from lapa.training import scripts
from lapa.training.codebook_watchdog import CodebookCollapse
from lapa.training.label_latent_actions import label_latent_actions
from lapa.training.pair_conditions import QuantizerCollator, action_statistics, hash_instruction, shows_action
from lapa.training.quantizer_trainer import LapaQuantizerTrainer

CPU = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]


class ConditionedPairs(Dataset):
    """Pairs of the moving square that say which way it goes, in words and as an action."""

    WAYS = ("right", "down", "left", "up")
    MOVES = ((0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0))

    def __init__(self):
        self.pairs = FramePairDataset(moving_square(num_episodes=8), frame_gap=2)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, item):
        episode = int(self.pairs.index[item][0])
        return self.pairs[item] | {
            "instruction": f"Move {self.WAYS[episode % 4]}!",
            "action": np.array(self.MOVES[episode % 4], np.float32),
            "source": "squares",
            "episode_id": str(episode),
        }


def train(folder, model=None, sizes=None, callbacks=None, **changes):
    if model is None:
        torch.manual_seed(0)
        model = LapaQuantizer(quantizer_config(**{**SMALL, **(sizes or {})}))
    settings = {"max_steps": 30, "logging_steps": 10, "learning_rate": 3e-3}
    data = ConditionedPairs()
    trainer = LapaQuantizerTrainer(model, arguments(folder, **{**settings, **changes}), data, data, callbacks)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


class TestEntropy:
    def quantizer(self, weight=2.0):
        config = quantizer_config(codebook_dim=1, codebook_size=2, entropy_weight=weight, entropy_temperature=0.5)
        quantizer = NoiseSubstitutionQuantizer(config)
        quantizer.codebook.data = torch.tensor([[0.0], [1.0]])
        return quantizer

    def test_by_hand(self):
        # Squared distances 0, 1, 1, 0 have mean 0.5, times 0.5: exponents 0 and -4.
        p = 1 / (1 + np.exp(-4.0))
        own = -(p * np.log(p) + (1 - p) * np.log(1 - p))
        loss = self.quantizer().entropy_loss(torch.tensor([[0.0], [1.0]]))
        assert loss.item() == pytest.approx(2 * (own - np.log(2)), rel=1e-5)
        # All on one code: sure of it, and no diversity.
        assert self.quantizer().entropy_loss(torch.tensor([[0.0], [0.0]])).item() == pytest.approx(0, abs=1e-6)
        # The scale of the embeddings does not matter.
        small = self.quantizer()
        small.codebook.data *= 1e-3
        assert small.entropy_loss(torch.tensor([[0.0], [1e-3]])).item() == pytest.approx(loss.item(), rel=1e-4)
        assert self.quantizer(0.0).entropy_loss(torch.ones(2, 1)) == 0

    def test_pulls_embeddings_apart(self):
        embeddings = torch.tensor([[0.3], [0.35]], requires_grad=True)
        self.quantizer().entropy_loss(embeddings).backward()
        assert embeddings.grad[0] > 0 > embeddings.grad[1]

    @pytest.mark.parametrize("quantizer", [{"quantizer": "fsq", "fsq_levels": [2, 4]}, {"quantizer": "continuous"}])
    def test_needs_a_codebook(self, quantizer):
        with pytest.raises(StrictDataclassError, match="`entropy_weight`"):
            quantizer_config(entropy_weight=0.1, **quantizer)


class TestContinuous:
    def test_by_hand(self):
        bottleneck = ContinuousBottleneck(quantizer_config(quantizer="continuous", codebook_dim=1, kl_weight=0.5))
        for layer, bias in ((bottleneck.mean, 0.0), (bottleneck.log_variance, np.log(4.0))):
            layer.weight.data.fill_(1.0 if layer is bottleneck.mean else 0.0)
            layer.bias.data.fill_(bias)
        output = bottleneck(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
        assert output.quantized.item() == pytest.approx(3 + 2)
        assert output.kl.item() == pytest.approx((9 + 4 - 1 - np.log(4)) / 2)
        assert output.loss.item() == pytest.approx(output.kl.item() / 2)
        assert output.codes is None and output.perplexity is None
        assert bottleneck.eval()(torch.tensor([[3.0]])).quantized.item() == pytest.approx(3)

    def test_trains_logs_and_has_no_codes(self, tmp_path):
        trainer = train(tmp_path, sizes={"quantizer": "continuous"})
        assert trainer.codebook is None
        assert logged(trainer, "reconstruction_loss")[-1] < logged(trainer, "reconstruction_loss")[0]
        assert logged(trainer, "kl") and not logged(trainer, "perplexity")
        assert not {name for name in trainer.evaluate() if "perplexity" in name}
        model = trainer.model.eval()
        pairs = torch.stack([ConditionedPairs()[i]["frames"] for i in range(2)]).float() / 255
        encoded = model.encode(pairs)
        assert encoded.latent_action_codes is None and encoded.latent_action_embeddings.shape == (2, 4, 4)
        with pytest.raises(ValueError, match="no codes to label with: its latent actions are `latent_action_embed"):
            label_latent_actions(model, ConditionedPairs(), show_progress=False)
        with pytest.raises(ValueError, match="`codes` mean nothing"):
            model.decode(pairs[:, 0], torch.zeros(2, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match="exactly one of `codes` and `embeddings`"):
            model.decode(pairs[:, 0])

    def test_a_collapsed_posterior_stops_the_run(self, tmp_path):
        with pytest.raises(CodebookCollapse, match="`kl_weight`"):
            train(
                tmp_path, sizes={"quantizer": "continuous", "kl_weight": 1000.0}, min_perplexity_from=10, max_steps=90
            )

    def test_label_command_refuses_by_name(self, tmp_path, capsys):
        bridge = str(shared_path("data/bridge_rlds/1.0.0"))
        LapaQuantizer(quantizer_config(quantizer="continuous")).save_pretrained(tmp_path / "quantizer")
        arguments = ["--model", str(tmp_path / "quantizer"), "--data", bridge, "--output", str(tmp_path / "labels")]
        assert scripts.label([*arguments, "--device", "cpu"]) == 2
        assert '`quantizer="continuous"`' not in capsys.readouterr().out
        assert not (tmp_path / "labels").exists()


class TestFeatures:
    def test_blocks_of_features_by_hand(self):
        features = torch.arange(16.0).view(1, 4, 4, 1)
        assert features_per_token(features, 2).tolist() == [
            [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
        ]

    def test_backbone_stays_out_of_the_checkpoint(self, tmp_path):
        model = build("features")
        model(**training_batch(model))
        model.save_pretrained(tmp_path)
        names = load_file(tmp_path / "model.safetensors")
        assert {name.split(".")[0] for name in names if "features" in name} == {"to_features"}
        assert json.loads((tmp_path / "config.json").read_text())["feature_backbone"] == feature_backbone()
        # Only the loss needs it.
        loaded = LapaQuantizer.from_pretrained(tmp_path)
        pairs = training_batch(model)["pixel_values"]
        loaded.decode(pairs[:, 0], loaded.encode(pairs).latent_action_codes)
        assert loaded._frozen_features.model is None
        assert LapaQuantizerEncoder.from_pretrained(tmp_path)(pairs).latent_action_codes.shape == (3, 4)

    def test_targets_are_the_models_own_features(self):
        from transformers import Dinov2Model

        model = build("features")
        frames = training_batch(model)["pixel_values"][:, 1]
        backbone = Dinov2Model.from_pretrained(feature_backbone())
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        # 8 x 8 patches, 2 x 2 features each, of 2 pixels: 32 pixels, as the frames have.
        with torch.no_grad():
            expected = backbone((frames - mean) / std).last_hidden_state[:, 1:]
        expected = torch.nn.functional.layer_norm(expected, (16,)).view(3, 16, 16, 16)
        torch.testing.assert_close(FrozenFeatures(model.config)(frames), expected)

    def test_pixels_alone_or_beside(self):
        def gradients(**weights):
            model = build("features", stop_gradient_first_frame=True, **weights).train()
            torch.manual_seed(1)
            model(**training_batch(model)).loss.backward()
            return model

        model = gradients(pixel_loss_weight=0.0)
        assert model.to_pixels.weight.grad.abs().sum() > 0
        reference = model.decoder.layers[0].feed_forward.up_proj.weight.grad
        # The pixels taught nothing else: without the layer's own loss the rest has the same gradient.
        again = build("features", pixel_loss_weight=0.0).train()
        torch.manual_seed(1)
        again(**training_batch(again)).feature_loss.backward()
        assert torch.equal(again.decoder.layers[0].feed_forward.up_proj.weight.grad, reference)
        beside = gradients(pixel_loss_weight=1.0)
        assert not torch.equal(beside.decoder.layers[0].feed_forward.up_proj.weight.grad, reference)

    def test_learns_features(self, tmp_path):
        sizes = {"feature_backbone": feature_backbone(), "feature_dim": 16, "feature_loss_weight": 1.0}
        trainer = train(tmp_path, sizes={**sizes, "pixel_loss_weight": 0.0})
        losses = logged(trainer, "feature_loss")
        assert losses[-1] < 0.8 * losses[0]
        assert not any(parameter.requires_grad for parameter in trainer.model._frozen_features.model.parameters())

    def test_refusals(self):
        with pytest.raises(StrictDataclassError, match="must be given together"):
            quantizer_config(feature_backbone="dinov2")
        with pytest.raises(StrictDataclassError, match="nothing would be learned"):
            quantizer_config(pixel_loss_weight=0.0)
        model = build("features", feature_dim=8)
        with pytest.raises(ValueError, match="`feature_dim` is 8, .* width 16"):
            model(**training_batch(model))


class TestInstructionStages:
    def test_words_hash_to_the_same_ids_everywhere(self):
        assert hash_instruction("Move left!", 1000) == hash_instruction("move   LEFT", 1000) == [906, 486]
        assert hash_instruction(None, 1000) == []
        assert all(1 <= word < 5 for word in hash_instruction("take the broccoli out of the pot", 5))
        batch = QuantizerCollator(quantizer_config(instruction_vocab_size=1000))(
            [ConditionedPairs()[0], {**ConditionedPairs()[0], "instruction": None}]
        )
        assert batch["instruction_ids"].tolist() == [hash_instruction("move right", 1000), [0, 0]]

    def test_pictures_are_drawn_with_the_instruction(self, tmp_path):
        model = LapaQuantizer(quantizer_config(**SMALL, instruction_vocab_size=64))
        given = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: given.append((module.training, kwargs.get("instruction_ids"))),
            with_kwargs=True,
        )
        train(tmp_path, model=model, max_steps=1, num_sample_reconstructions=2, sample_interval=1)
        (drawn,) = [ids for training, ids in given if not training]
        expected = [hash_instruction(ConditionedPairs()[item]["instruction"], 64) for item in (0, -1)]
        assert drawn.tolist() == expected

    def test_mean_of_the_words_that_are_there(self):
        layer = LapaQuantizerInstruction(quantizer_config(hidden_size=1, instruction_vocab_size=4))
        layer.embedding.weight.data = torch.tensor([[100.0], [1.0], [3.0], [8.0]])
        assert layer(torch.tensor([[1, 2, 0], [3, 0, 0], [0, 0, 0]])).flatten().tolist() == [2.0, 8.0, 0.0]

    def test_the_decoder_is_told_the_instruction(self):
        model = build("instruction").eval()
        batch = training_batch(model)
        told = model(**batch).reconstruction
        other = model(**{**batch, "instruction_ids": batch["instruction_ids"] % 48 + 1}).reconstruction
        assert not torch.allclose(told, other)
        with pytest.raises(ValueError, match="`instruction_ids` must be given"):
            model.train()(batch["pixel_values"])
        with pytest.raises(ValueError, match="no `instruction_vocab_size`"):
            build("nsvq")(batch["pixel_values"], instruction_ids=batch["instruction_ids"])

    def test_second_stage_on_top_of_the_first(self, tmp_path):
        sizes = {"instruction_vocab_size": 64, "interleave_latent_tokens": False}
        first = train(tmp_path / "run", sizes=sizes, max_steps=6).model.eval()
        first.save_pretrained(tmp_path / "first")
        second = LapaQuantizer.from_first_stage(str(tmp_path / "first"))
        pairs = training_batch(first)["pixel_values"]
        # What the first stage saw is what the frozen half sees.
        assert torch.equal(second.encode(pairs).irrelevant_codes, first.encode(pairs).latent_action_codes)
        assert second.config.task_centric and second.config.instruction_vocab_size is None
        codebook = second.irrelevant_quantizer.codebook.clone()
        own = second.vector_quantizer.codebook.clone()
        trainer = train(tmp_path / "second", model=second, max_steps=6)
        assert torch.equal(trainer.model.irrelevant_quantizer.codebook, codebook)
        assert not torch.equal(trainer.model.vector_quantizer.codebook, own)
        # A fresh codebook starts from data; that of a loaded model would not.
        assert (trainer.model.vector_quantizer.codebook - own).abs().mean() > 0.1
        trainer.save_model(tmp_path / "saved")
        again = LapaQuantizer.from_pretrained(tmp_path / "saved").eval()
        codes = label_latent_actions(again, ConditionedPairs(), show_progress=False)
        assert codes.shape == (len(ConditionedPairs()), 4)
        for folder in ("saved", "plain"):
            if folder == "plain":
                build("nsvq").save_pretrained(tmp_path / folder)
            with pytest.raises(ValueError, match="is no first stage"):
                LapaQuantizer.from_first_stage(str(tmp_path / folder))

    def test_by_the_command_on_real_data(self, tmp_path, capsys):
        bridge = str(shared_path("data/bridge_rlds/1.0.0"))
        common = ["--data", bridge, "--frame_gap", "3", "--max_steps", "2", "--per_device_train_batch_size", "4",
                  "--num_sample_reconstructions", "2", *CPU]  # fmt: skip
        sizes = json.dumps({**TINY_QUANTIZER, "instruction_vocab_size": 64})
        first, second = str(tmp_path / "first"), str(tmp_path / "second")
        assert scripts.train_quantizer([*common, "--quantizer_config", sizes, "--output_dir", first]) == 0
        onto = ["--quantizer_config", '{"task_centric": true}', "--output_dir", second]
        assert scripts.train_quantizer([*common, *onto, "--model", first, "--eval_episodes", "2"]) == 0
        assert LapaQuantizer.from_pretrained(second).config.task_centric
        assert scripts.train_quantizer([*common, *onto]) == 2
        assert "`task_centric` needs a first stage" in capsys.readouterr().err


class TestActions:
    def test_only_pairs_with_an_action_count(self):
        config = quantizer_config(
            action_dim=2, codebook_dim=1, num_latent_tokens=1, action_mean=[1.0, 0.0], action_std=[2.0, 1.0]
        )
        head = LapaQuantizerActionHead(config)
        head.projection.weight.data.zero_()
        head.projection.bias.data.zero_()
        nan = float("nan")
        # Standardised: (1, 0) and (0, 3); means of squares 0.5 and 4.5.
        actions = torch.tensor([[3.0, 0.0], [nan, 1.0], [1.0, 3.0]])
        embeddings = torch.zeros(3, 1, 1, requires_grad=True)
        assert head.loss(embeddings, actions).item() == pytest.approx(2.5)
        loss = head.loss(embeddings, torch.full((3, 2), nan))
        loss.backward()
        assert loss.item() == 0 and embeddings.grad.isfinite().all()

    def test_batches_and_statistics(self):
        data = ConditionedPairs()
        collator = QuantizerCollator(quantizer_config(action_dim=2))
        bare = {"frames": data[0]["frames"]}
        actions = collator([data[0], bare])["actions"]
        assert actions[0].tolist() == [0.0, 1.0] and actions[1].isnan().all()
        examples = [data[i] for i in range(len(data))]
        statistics = action_statistics(examples, 2)
        assert statistics["action_mean"] == pytest.approx([0, 0])
        assert statistics["action_std"] == pytest.approx([np.sqrt(0.5)] * 2)
        assert action_statistics([{**data[0], "action": [4.0, 0.0]}], 2)["action_std"] == [1.0, 1.0]
        with pytest.raises(ValueError, match="none of 1 pairs"):
            action_statistics([bare], 2)
        with pytest.raises(ValueError, match="`action_dim` of the quantizer is 3, but squares has actions of shape"):
            QuantizerCollator(quantizer_config(action_dim=3))([data[0]])

    def test_a_share_of_the_episodes(self):
        examples = [{"source": "a", "episode_id": str(i)} for i in range(2000)]
        shown = [shows_action(example, 0.1) for example in examples]
        assert 150 < sum(shown) < 250
        assert all(shows_action(example, 1.0) for example in examples)
        assert shown == [shows_action(example, 0.1) for example in examples]

    def test_embeddings_learn_the_action(self, tmp_path):
        sizes = {"action_dim": 2, "action_loss_weight": 1.0}
        trainer = train(tmp_path, sizes=sizes, max_steps=60, logging_steps=20)
        losses = logged(trainer, "action_loss")
        assert losses[-1] < 0.5 * losses[0]
        assert trainer.evaluate()["eval_action_loss"] < losses[0]

    def test_by_the_command_on_real_data(self, tmp_path):
        bridge = str(shared_path("data/bridge_rlds/1.0.0"))
        sizes = json.dumps({**TINY_QUANTIZER, "action_dim": 7})
        command = ["--data", bridge, "--frame_gap", "3", "--max_steps", "2", "--per_device_train_batch_size", "4",
                   "--action_share", "0.5", "--quantizer_config", sizes, "--output_dir", str(tmp_path), *CPU]  # fmt: skip
        assert scripts.train_quantizer([*command, "--num_sample_reconstructions", "0"]) == 0
        config = LapaQuantizer.from_pretrained(tmp_path).config
        assert len(config.action_mean) == 7 and min(config.action_std) > 0
