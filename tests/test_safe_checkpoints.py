"""Robustness: killed saves, full disks, losses that are not finite, checkpoints of another kind, lineage."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_training import make_trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

from lapa import LapaForActionPrediction
from lapa.training.safe_checkpoints import STAGING_FOLDER, last_checkpoint, why_incomplete


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def run_killed(folder, points):
    command = [sys.executable, str(Path(__file__).with_name("killed_training.py")), str(folder), *map(str, points)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"killed"')]


def test_a_training_killed_in_its_saves_ends_where_an_untouched_one_does(tmp_path):
    """Killed at the first, at a random and at late writes; every time the newest whole checkpoint goes on."""
    points = [1, 5, *random.Random(0).sample(range(2, 15), 4), 7]
    attempts = run_killed(tmp_path / "out", points)
    assert [attempt["killed"] for attempt in attempts] == [True] * len(points) + [False]
    assert attempts[0]["last"] is None, "the first save had not finished"
    steps = [int(attempt["last"].rpartition("-")[2]) for attempt in attempts[1:] if attempt["last"]]
    assert steps == sorted(steps) and steps[-1] == 8
    assert not (tmp_path / "out" / STAGING_FOLDER).exists()
    whole = make_trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    whole.save_model()
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestIncomplete:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        make_trainer(folder, max_steps=3, save_total_limit=None).train()
        return folder

    def copy(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        return tmp_path / "run"

    def test_what_is_whole(self, run):
        assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
        assert all(why_incomplete(path) is None for path in run.iterdir())
        assert last_checkpoint(run) == str(run / "checkpoint-3")
        assert last_checkpoint(run / "nothing") is None

    @pytest.mark.parametrize("damage, reason", [
        (lambda path: (path / "trainer_state.json").unlink(), "it has no trainer_state.json"),
        (lambda path: (path / "trainer_state.json").write_text('{"a'), "its trainer_state.json is damaged"),
        (lambda path: (path / "model.safetensors").unlink(), "it has no weights"),
        (lambda path: os.truncate(path / "model.safetensors", 2000), "its model.safetensors is cut off"),
        (lambda path: os.truncate(path / "model.safetensors", 4), "its model.safetensors is cut off"),
    ])  # fmt: skip
    def test_damaged_ones_are_passed_over_by_name(self, run, tmp_path, caplog, damage, reason):
        folder = self.copy(run, tmp_path)
        damage(folder / "checkpoint-3")
        assert why_incomplete(folder / "checkpoint-3") == reason
        with caplog.at_level("WARNING"):
            assert last_checkpoint(folder) == str(folder / "checkpoint-2")
        assert f"checkpoint-3 is passed over: {reason}" in caplog.text

    def test_resuming_passes_over_it_too(self, run, tmp_path):
        from lapa.training.script_tools import run_training

        folder = self.copy(run, tmp_path)
        os.truncate(folder / "checkpoint-3" / "model.safetensors", 2000)
        trainer = make_trainer(folder, max_steps=4, resume_from_checkpoint="last", save_total_limit=None)
        run_training(trainer, trainer.args)
        assert trainer.state.global_step == 4
        damaged = make_trainer(folder, max_steps=5, resume_from_checkpoint=str(folder / "checkpoint-1"))
        (folder / "checkpoint-1" / "trainer_state.json").unlink()
        with pytest.raises(ValueError, match=r"checkpoint-1 cannot be resumed: it has no trainer_state\.json"):
            run_training(damaged, damaged.args)

    def test_best_checkpoint_and_rotation_know_the_final_names(self, tmp_path):
        changes = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
        trainer = make_trainer(tmp_path, max_steps=4, **changes)
        trainer.train()
        best = trainer.state.best_model_checkpoint
        assert Path(best).parent == tmp_path and why_incomplete(best) is None
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {Path(best).name, "checkpoint-4"}
        state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == best


class TestFullDisk:
    """A limit on the size of files stands for a disk that is full: the system refuses to write either way."""

    def test_checkpoint(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.train()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        again = make_trainer(tmp_path, max_steps=4)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(
                OSError, match=r"checkpoint-3 could not be written .*; nothing was changed, .*checkpoint-2"
            ):
                again.train(resume_from_checkpoint=last_checkpoint(tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        again = make_trainer(tmp_path, max_steps=4)
        again.train(resume_from_checkpoint=last_checkpoint(tmp_path))
        assert again.state.global_step == 4

    def test_final_model(self, tmp_path):
        trainer = make_trainer(tmp_path, save_strategy="no", max_steps=1)
        trainer.save_model()
        before = weights(tmp_path)
        trainer.train()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(OSError, match=r"model could not be written .*; nothing was changed"):
                trainer.save_model()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())
        LapaForActionPrediction.from_pretrained(tmp_path)

    def test_an_error_of_our_own_is_no_full_disk(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path, max_steps=1)
        monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: [][1])
        with pytest.raises(IndexError):
            trainer.train()
        assert not list(tmp_path.iterdir())


def test_a_smaller_model_leaves_no_weights_of_the_larger_behind(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"old")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    (tmp_path / "notes.txt").write_text("mine")
    make_trainer(tmp_path).save_model()
    assert not (tmp_path / "adapter_config.json").exists()
    LapaForActionPrediction.from_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


class TestNotFinite:
    def test_the_loss_names_its_examples_and_spares_the_weights(self, tmp_path):
        trainer = make_trainer(tmp_path, save_strategy="no", train_sampling_strategy="sequential")
        data = trainer.train_dataset
        data.instructions[6] = "zebra"
        data.example_ids = [f"robot/episode-{step // 6} step {step % 6}" for step in range(12)]
        vision = range(trainer.processor.vision_offset, trainer.processor.latent_offset)
        ids = sorted(set(data[6]["input_ids"].tolist()) - set(data[0]["input_ids"].tolist()) - set(vision))
        ids = [token for token in ids if token < trainer.processor.vision_offset]
        trainer.model.model.embed_tokens.weight.data[ids[0]] = torch.nan
        after_one_step = {}

        class Keep(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                after_one_step.update({name: value.clone() for name, value in trainer.model.state_dict().items()})

        trainer.add_callback(Keep())
        with pytest.raises(ValueError, match="the loss is nan at step 2, on ") as error:
            trainer.train()
        assert "robot/episode-1 step 0" in str(error.value) and "robot/episode-0 step 4" in str(error.value)
        assert "robot/episode-0 step 0" not in str(error.value) and "weights have not been changed" in str(error.value)
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value.nan_to_num(7.0), after_one_step[name].nan_to_num(7.0)), name

    def test_the_gradient_too(self, tmp_path):
        trainer = make_trainer(tmp_path, save_strategy="no", gradient_accumulation_steps=2)
        trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)
        with pytest.raises(ValueError, match="the norm of the gradient is (nan|inf) at step 1, on example") as error:
            trainer.train()
        assert str(error.value).count("example ") >= 8
