"""Two processes train what one does: through the Trainer, and sharded as the shipped FSDP2 configs shard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_training as script
import pytest
import torch
import yaml
from killed_training import make_trainer
from safetensors.torch import load_file

from lapa import LapaForActionPrediction, LapaProcessor
from lapa.training import scripts

CONFIGS = sorted(Path(scripts.__file__).parent.joinpath("recipes", "accelerate").glob("*.yaml"))


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [str(Path(__file__).with_name("distributed_training.py")), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((Path(arguments[1]) / "log.json").read_text())


def assert_same_weights(folder, other, atol):
    ours, theirs = load_file(Path(folder) / "model.safetensors"), load_file(Path(other) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_train_what_one_does(tmp_path):
    """The same loss curve to 1e-5, and weights to 2e-5 of an absolute change of up to 4e-3 (four steps of 1e-3)."""
    alone = script.train(str(tmp_path / "one"), 1)
    together = torchrun("ddp", tmp_path / "two")
    assert len(alone) == len(together) == 4 and alone[0]["loss"] != alone[-1]["loss"]
    for ours, theirs in zip(together, alone):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=2e-5)


@pytest.mark.parametrize("config", [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if "multi" in path.stem else []) for path in CONFIGS
])  # fmt: skip
def test_sharded_training_saves_what_one_process_loads(tmp_path, config):
    losses = torchrun("fsdp", tmp_path / "sharded", config)
    trainer = make_trainer(tmp_path / "one", save_strategy="no")
    expected, logits = script.steps(trainer.model, script.batches_of(trainer, 0, 1))
    assert losses == pytest.approx([loss.item() for loss in expected], rel=1e-5)
    trainer.save_model()
    assert_same_weights(tmp_path / "sharded", tmp_path / "one", atol=1e-4)
    loaded = LapaForActionPrediction.from_pretrained(tmp_path / "sharded").eval()
    LapaProcessor.from_pretrained(tmp_path / "sharded")
    with torch.no_grad():
        last = script.batches_of(trainer, 0, 1)[-1]
        found = loaded(**last, use_cache=False, target_segment="action").segment_logits
    torch.testing.assert_close(found, logits, atol=1e-3, rtol=1e-3)


def test_the_configs_differ_in_their_machines_only():
    one, several = (yaml.safe_load(path.read_text()) for path in sorted(CONFIGS, reverse=True))
    assert {key for key in one if one[key] != several[key]} == {
        "num_machines", "num_processes", "rdzv_backend", "same_network",
    }  # fmt: skip
    assert several["num_processes"] == 8 * several["num_machines"]


@pytest.mark.parametrize("changes", [
    {"activation_checkpointing": True},
    {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    {"pad_to_max_length": True, "max_length": 120},
], ids=["activation_checkpointing", "compile", "inductor", "published_layout"])  # fmt: skip
def test_flags_that_change_speed_and_memory_change_no_weight(tmp_path, changes):
    plain = script.train(str(tmp_path / "plain"), 1)
    flagged = script.train(str(tmp_path / "flagged"), 1, **changes)
    for ours, theirs in zip(flagged, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert_same_weights(tmp_path / "flagged", tmp_path / "plain", atol=2e-5)
    LapaForActionPrediction.from_pretrained(tmp_path / "flagged")
