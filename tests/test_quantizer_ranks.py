"""One process and two with the same global batch train the same quantizer: codes, codebook, re-seeding, losses."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("quantizer_two_ranks.py")


def train(folder: Path, world_size: int) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(world_size), "--master_port", str(port)]
    output = folder / f"{world_size}.pt"
    command = [sys.executable, *(launcher if world_size > 1 else ()), str(SCRIPT), str(output), str(world_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(output, weights_only=True)


def test_two_processes_train_the_same_quantizer_as_one(tmp_path):
    """With NSVQ noise, entropy loss, actions that some pairs lack, a codebook from two steps, re-seeding, and pictures."""
    one, two = train(tmp_path, 1), train(tmp_path, 2)
    # The first process draws them alone: no sum over processes may wait for the other.
    assert len(list((tmp_path / "2.pt.run" / "samples").glob("step-*.png"))) == 4
    assert one["replaced"] > 0
    assert two["replaced"] == one["replaced"]
    assert torch.equal(two["codes"], one["codes"])
    assert torch.equal(two["usage"], one["usage"])
    torch.testing.assert_close(two["codebook"], one["codebook"], atol=1e-6, rtol=0)
    # The entropy loss and the mean over the pairs that have an action are those of the whole batch.
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-4)
    assert two["action_losses"] == pytest.approx(one["action_losses"], rel=1e-3)
