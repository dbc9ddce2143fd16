"""Stage 1: the trainer learns, resumes exactly, and names what spoils a run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from memory_source import MemorySource
from PIL import Image
from quantizer_training import SMALL, StopAt, arguments, moving_square, trainer_for
from recordings import meta, quantizer_folder, tensors
from safetensors.torch import save_file
from tiny_models import quantizer_config
from transformers import TrainerCallback

from lapa import LapaQuantizer
from lapa.data.frame_pairs import FramePairCollator, FramePairDataset, episode_pairs
from lapa.data.mixture import FramePairSource, FramePairStream
from lapa.training.arguments import LapaQuantizerTrainingArguments
from lapa.training.codebook import (
    STATE_FILE,
    CodebookState,
    SampleNoise,
)
from lapa.training.quantizer_trainer import LapaQuantizerTrainer, reconstruction_grid


def test_pairs_stay_inside_an_episode():
    assert episode_pairs(5, 3).tolist() == [[0, 3], [1, 4]]
    assert episode_pairs(3, 3).tolist() == []
    frames = [
        np.full((5, 2, 2, 3), 10, np.uint8),
        np.full((2, 2, 2, 3), 20, np.uint8),
        np.full((4, 2, 2, 3), 30, np.uint8),
    ]
    dataset = FramePairDataset(frames, frame_gap=3)
    assert dataset.index.tolist() == [[0, 0, 3], [0, 1, 4], [2, 0, 3]]
    assert dataset.num_short_episodes == 1
    assert dataset[2]["frames"].dtype == torch.uint8 and dataset[2]["frames"].unique().tolist() == [30]
    pixels = FramePairCollator()([dataset[0], dataset[2]])["pixel_values"]
    assert pixels.shape == (2, 2, 3, 2, 2) and pixels.dtype == torch.float32
    assert pixels[:, 0, 0, 0, 0].tolist() == pytest.approx([10 / 255, 30 / 255])
    with pytest.raises(ValueError, match="no pair"):
        FramePairDataset(frames, frame_gap=5)
    with pytest.raises(ValueError, match="`frame_gap` must be at least 1"):
        FramePairDataset(frames, frame_gap=0)
    with pytest.raises(ValueError, match="uint8"):
        FramePairDataset([np.zeros((4, 2, 2, 3))], frame_gap=1)[0]


def test_pairs_resize():
    dataset = FramePairDataset([np.full((3, 6, 10, 3), 77, np.uint8)], frame_gap=1, image_size=(4, 8))
    assert dataset[1]["frames"].shape == (2, 3, 4, 8) and dataset[1]["frames"].unique().tolist() == [77]


def test_learns_and_every_parameter_moves(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=60, logging_steps=20, codebook_update="none")
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    still = {name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])}
    # Recorded as null: in self attention the published code normalises queries only. And the last bias of the
    # bottleneck cancels in (second frame - first frame).
    unused = {name for name in before if name.endswith("self_attention.context_norm.weight")}
    assert still - {"bottleneck.convolutions.1.bias"} == unused


def test_logs(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["reconstruction_loss"], rel=1e-5)
    shares = [log[f"code_usage/{code}"] for code in range(8)]
    assert sum(shares) == pytest.approx(1)
    # Two batches of 8 pairs of 4 tokens were counted.
    assert all(share * 64 == pytest.approx(round(share * 64)) for share in shares)
    assert log["codes_used"] == np.count_nonzero(shares)
    entropy = -sum(share * np.log(share) for share in shares if share)
    assert log["perplexity"] == pytest.approx(np.exp(entropy))
    evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluation["eval_loss"] == pytest.approx(evaluation["eval_reconstruction_loss"], rel=1e-5)
    assert 1 <= evaluation["eval_perplexity"] <= 8


@pytest.mark.parametrize("rule", ["reseed", "published"])
def test_resumed_equals_uninterrupted(tmp_path, rule):
    """Bit for bit, with NSVQ noise, codebook updates and usage counts; interrupted inside an update period."""
    settings = {"max_steps": 14, "codebook_update": rule, "codebook_update_interval": 4, "save_steps": 6}
    settings |= {"save_strategy": "steps", "codebook_update_threshold": 0.5 if rule == "reseed" else 0.1}
    windows = {}

    def watched(folder, **changes):
        trainer = trainer_for(tmp_path / folder, **changes, **settings)
        check, windows[folder] = trainer.watchdog.check, {}

        def watch(step, logs, counts):
            windows[folder][step] = counts.tolist()
            check(step, logs, counts)

        trainer.watchdog.check = watch
        return trainer

    whole = watched("whole")
    whole.train()
    trainer_for(tmp_path / "parts", callbacks=[StopAt(6)], **settings).train()
    resumed = watched("parts")
    resumed.train(resume_from_checkpoint=True)
    # Logged at step 10, over steps on both sides of the interruption.
    ours, theirs = (
        next(row for row in trainer.state.log_history if row["step"] == 10 and "loss" in row)
        for trainer in (resumed, whole)
    )
    names = {name for name in theirs if name.startswith(("code_usage/", "codes_", "perplexity"))}
    assert len(names) == 8 + 3 and {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert windows["parts"] == {10: windows["whole"][10]} and sum(windows["parts"][10]) == 4 * 32 + 16
    assert resumed.state.global_step == 14
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs), name
    assert torch.equal(resumed.codebook_state.usage_counts, whole.codebook_state.usage_counts)
    assert resumed.codebook_state.num_replaced == whole.codebook_state.num_replaced
    optimizers = [trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole)]
    assert all(
        torch.equal(ours[key], optimizers[1][index][key]) for index, ours in optimizers[0].items() for key in ours
    )
    if rule == "reseed":
        assert whole.codebook_state.num_replaced > 0


def test_checkpoint_holds_usage_counts(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, codebook_update_interval=100)
    trainer.train()
    state = CodebookState.load(tmp_path / "checkpoint-3", 8)
    assert int(state.usage_counts.sum()) == 3 * 8 * 4
    assert torch.equal(state.usage_counts, trainer.codebook_state.usage_counts)
    assert torch.equal(state.logged_counts, state.usage_counts) and torch.equal(
        state.watched_counts, state.usage_counts
    )
    # One of before the windows were kept begins them anew; one of a later version is refused.
    old, later = tmp_path / "old", tmp_path / "later"
    counts = {name: getattr(state, name) for name in ("usage_counts", "batch_counts")}
    for folder, metadata in ((old, {"num_replaced": 3}), (later, {"num_replaced": 3, "version": 3})):
        folder.mkdir()
        save_file(counts, folder / STATE_FILE, metadata={"lapa": json.dumps(metadata)})
    loaded = CodebookState.load(old, 8)
    assert torch.equal(loaded.usage_counts, state.usage_counts) and loaded.num_replaced == 3
    assert loaded.logged_counts.tolist() == loaded.watched_counts.tolist() == [0] * 8
    with pytest.raises(ValueError, match="has version 3; this version of lapa reads up to 2"):
        CodebookState.load(later, 8)
    with pytest.raises(ValueError, match="counts 8 codes, but the model has 5"):
        CodebookState.load(tmp_path / "checkpoint-3", 5)
    (tmp_path / "checkpoint-3" / STATE_FILE).write_bytes(b"cut short")
    with pytest.raises(ValueError, match="damaged"):
        CodebookState.load(tmp_path / "checkpoint-3", 8)
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match="cannot be resumed"):
        trainer_for(tmp_path, max_steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_quantizer_without_codebook_trains(tmp_path):
    sizes = {"quantizer": "fsq", "fsq_levels": [2, 4]}
    trainer = trainer_for(tmp_path, sizes=sizes, codebook_update_interval=1, max_steps=3, logging_steps=1)
    trainer.train()
    assert trainer.codebook is None
    assert trainer.state.log_history[0]["codes_used"] >= 1


@pytest.mark.parametrize("quantizer, init_batches", [("vq", 0), ("nsvq", 0), ("nsvq", 1), ("nsvq", 2)])
def test_accumulated_gradients_equal_one_batch(tmp_path, quantizer, init_batches):
    """NSVQ's noise and the codebook's start are drawn in the order of the samples of a step, however they are divided."""
    sizes = {"quantizer": quantizer}
    settings = {"max_steps": 3, "codebook_update": "none", "max_grad_norm": 0.5}
    settings |= {"codebook_init_from_data": init_batches > 0, "codebook_init_batches": max(init_batches, 1)}
    one = trainer_for(tmp_path, sizes=sizes, per_device_train_batch_size=8, **settings)
    one.train()
    split = trainer_for(
        tmp_path, sizes=sizes, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings
    )
    split.train()
    for (name, ours), theirs in zip(split.model.named_parameters(), one.model.parameters()):
        assert torch.allclose(ours, theirs, atol=2e-5), name
    assert torch.equal(split.codebook_state.usage_counts, one.codebook_state.usage_counts)


def test_sample_reconstructions(tmp_path):
    trainer = trainer_for(
        tmp_path, max_steps=3, num_sample_reconstructions=4, sample_interval=2, report_to="tensorboard"
    )
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-0000002.png", "step-0000003.png"]
    grid = np.asarray(Image.open(tmp_path / "samples" / names[1]))
    assert grid.shape == (4 * 16, 3 * 16, 3)
    assert np.array_equal(grid[:16, :16], moving_square()[0, 0])
    assert np.array_equal(grid[:16, 16:32], moving_square()[0, 2])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "runs").glob("*/events*")
    accumulator = EventAccumulator(str(events)).Reload()
    assert "samples/reconstructions" in accumulator.Tags()["images"]


def test_grid_by_hand():
    frames = torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)])[None]
    assert reconstruction_grid(frames, torch.full((1, 3, 1, 1), 2.0))[0, :, 0].tolist() == [0, 255, 255]
    assert reconstruction_grid(frames, torch.full((1, 3, 1, 1), 0.2))[0, :, 0].tolist() == [0, 255, 51]


@pytest.mark.parametrize("name", ["n4", "n1", "n2", "n16"])
def test_published_step_10_equals_recording(name, tmp_path, monkeypatch):
    """The whole trainer at the step where the published loop replaces codes."""
    recorded, io = tensors(f"laq/{name}.replace"), tensors(f"laq/{name}.io")
    settings = meta("laq")[name]["fwd_step10"]
    model = LapaQuantizer.from_pretrained(quantizer_folder(name))
    pairs = [{"pixel_values": video} for video in io["video"].transpose(1, 2)]
    trainer = LapaQuantizerTrainer(
        model,
        arguments(tmp_path, codebook_update="published", per_device_train_batch_size=len(pairs)),
        pairs,
        data_collator=lambda examples: {"pixel_values": torch.stack([e["pixel_values"] for e in examples])},
    )
    trainer.state.global_step = 10
    original = model.vector_quantizer.forward
    monkeypatch.setattr(model.vector_quantizer, "forward", lambda e, noise=None: original(e, io["noise"]))
    model.train()
    torch.manual_seed(settings["torch_manual_seed"])
    loss = trainer.compute_loss(model, {"pixel_values": torch.stack([p["pixel_values"] for p in pairs])})
    assert loss.item() == pytest.approx(settings["loss"], rel=1e-5)
    assert torch.allclose(trainer.codebook.detach(), recorded["fwd_step10.codebooks_after"], atol=1e-7)
    assert trainer.codebook_state.batch_counts.tolist() == recorded["fwd_step10.codebooks_used_after"].tolist()


@pytest.mark.parametrize("name", ["n4", "n1", "n2", "n16"])
def test_one_training_step_equals_recording(name, tmp_path, monkeypatch):
    """One step of the trainer with its default recipe: clipping at 0.5 and Adam."""
    io, after = tensors(f"laq/{name}.io"), tensors(f"laq/{name}.adam1")
    recorded = meta("laq")[name]
    model = LapaQuantizer.from_pretrained(quantizer_folder(name))
    original = model.vector_quantizer.forward
    monkeypatch.setattr(model.vector_quantizer, "forward", lambda e, noise=None: original(e, io["noise"]))
    video = io["video"].transpose(1, 2)
    settings = {"max_steps": 1, "logging_steps": 1, "learning_rate": 1e-4, "per_device_train_batch_size": len(video)}
    trainer = LapaQuantizerTrainer(
        model,
        arguments(tmp_path, codebook_update="published", **settings),
        [{"order": i} for i in range(len(video))],
        # The recorded noise belongs to the recorded order.
        data_collator=lambda examples: {"pixel_values": video[sorted(e["order"] for e in examples)]},
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(recorded["train_loss"], rel=1e-5)
    assert log["grad_norm"] == pytest.approx(recorded["adam1"]["grad_norm_before_clip"], rel=1e-4)
    ours = dict(model.named_parameters())
    names = published_names(name)
    compared = [key for key in after if key in names]
    assert len(compared) > 5
    for key in compared:
        assert torch.allclose(ours[names[key]], after[key].view_as(ours[names[key]]), atol=1e-6), key


def published_names(name):
    """Published parameter name -> ours, by the conversion's own table."""
    from lapa.conversion.checkpoint_mapping import QUANTIZER_TABLE, rename

    keys = meta("laq")[name]["state_dict_names"]
    return {theirs: ours for theirs, ours in rename(list(keys), QUANTIZER_TABLE, "checkpoint").items() if ours}


def test_bad_arguments(tmp_path):
    for changes, named in (
        ({"codebook_update": "never"}, "codebook_update"),
        ({"codebook_update_interval": 0}, "codebook_update_interval"),
        ({"codebook_init_batches": 0}, "codebook_init_batches"),
        ({"codebook_update": "published", "gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"codebook_update_threshold": 1.5}, "codebook_update_threshold"),
        ({"num_sample_reconstructions": -1}, "num_sample_reconstructions"),
    ):
        with pytest.raises(ValueError, match=f"`{named}`"):
            arguments(tmp_path, **changes)


def test_defaults_are_the_published_recipe(tmp_path):
    args = LapaQuantizerTrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.per_device_train_batch_size, args.learning_rate, args.weight_decay) == (64, 1e-4, 0)
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm, args.max_steps) == (0.9, 0.99, 0.5, 100_005)
    assert args.lr_scheduler_type == "constant"
    assert json.dumps(args.to_dict())
    assert SimpleNamespace(**args.to_dict()).codebook_update == "reseed"


def test_a_run_that_diverges_stops(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 5:
                with torch.no_grad():
                    model.to_pixels.bias[0] = float("nan")

    trainer = trainer_for(tmp_path, callbacks=[Poison()], max_steps=20, logging_steps=7)
    with pytest.raises(
        ValueError, match="the loss is nan at step 6, on episode . steps . and .*`learning_rate`"
    ) as error:
        trainer.train()
    assert trainer.state.global_step == 5 and str(error.value).count("episode ") == 8


def test_a_pair_that_spoils_the_loss_is_named_before_the_weights_change(tmp_path):
    """On a stream, as `lapa train-quantizer` reads, and long before a log is due."""

    class OneBadAction(MemorySource):
        def _episode(self, shard, number, length):
            episode = super()._episode(shard, number, length)
            if number == 2:
                episode.action[3] = np.inf
            return episode

    torch.manual_seed(0)
    model = LapaQuantizer(quantizer_config(**{**SMALL, "action_dim": 2}))
    source = OneBadAction("robot", [[6, 6, 6, 6]], size=16, action_dim=2)
    stream = FramePairStream([FramePairSource(source, frame_gap=2)], rank=0, world_size=1)
    settings = {"max_steps": 40, "logging_steps": 40, "per_device_train_batch_size": 2}
    trainer = LapaQuantizerTrainer(model, arguments(tmp_path, **settings), stream)
    before = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            before.update({name: weight.clone() for name, weight in trainer.model.state_dict().items()})

    trainer.add_callback(Keep())
    message = r"the loss is inf at step \d+, on .*robot 0/2 steps (2 and 4|3 and 5).*have not been changed"
    with pytest.raises(ValueError, match=message) as error:
        trainer.train()
    assert str(error.value).count(" steps ") == 2
    if trainer.state.global_step:  # the first batch also draws the codebook
        assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_a_gradient_that_is_not_finite_names_all_pairs_of_the_step(tmp_path, max_grad_norm):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_grad_norm": max_grad_norm}
    trainer = trainer_for(tmp_path, **settings)
    trainer.model.to_pixels.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(ValueError, match="the norm of the gradient is (nan|inf) at step 1, on episode") as error:
        trainer.train()
    assert str(error.value).count("episode ") == 6


def test_noise_belongs_to_a_sample():
    whole = SampleNoise(7).draw(step=3, rank=0, world_size=1, rows=8, width=5)
    parts = [SampleNoise(7), SampleNoise(7)]
    # Two processes, two parts of the step each.
    found = [[noise.draw(3, rank, 2, 2, 5) for rank, noise in enumerate(parts)] for _ in range(2)]
    assert torch.equal(torch.cat([rows for part in found for rows in part]), whole)
    assert not torch.equal(SampleNoise(7).draw(4, 0, 1, 8, 5), whole)
    assert not torch.equal(SampleNoise(8).draw(3, 0, 1, 8, 5), whole)
    many = SampleNoise(0).draw(0, 0, 1, 20000, 2)
    assert many.dtype == torch.float32 and abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


@pytest.mark.parametrize("by_sample", [True, False])
def test_noise_by_sample_or_from_torch_as_published(tmp_path, by_sample):
    trainer = trainer_for(tmp_path, max_steps=1, logging_steps=1, noise_by_sample=by_sample)
    given = []
    # The first call only looks for the codebook's start.
    trainer.model.vector_quantizer.register_forward_pre_hook(lambda module, args: given.append(args[1:]))
    trainer.train()
    assert given[0] == () and len(given) == 2
    if by_sample:
        assert torch.equal(given[1][0], SampleNoise(42).draw(0, 0, 1, 32, 4))
    else:
        assert given[1] == (None,)


def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, **settings)
    save = CodebookState.save

    def full(state, folder):
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(state, folder)

    monkeypatch.setattr(CodebookState, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*No space left.*checkpoint-2 is whole"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*")] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / STATE_FILE).is_file()
