"""The norm of sharded gradients is that of all processes."""

import math
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lapa.training.metrics_trainer import global_norm


def norms_of_a_process(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    layer = torch.nn.Linear(1, 2, bias=False)
    fully_shard(layer, mesh=mesh)
    found = []
    for value in (3.0, 4.0), (math.inf, 1.0):
        local = torch.full((1, 1), value[rank])
        layer.weight.grad = DTensor.from_local(local, layer.weight.device_mesh, layer.weight.placements)
        norm = get_total_norm([layer.weight.grad])
        assert isinstance(norm, DTensor)
        found.append(global_norm(norm))
    Path(folder, f"{rank}.txt").write_text(" ".join(map(str, found)))
    torch.distributed.destroy_process_group()


def test_every_process_sees_the_norm_of_all_shards(tmp_path):
    """A value that is not finite in one shard stops every process, not one of them."""
    torch.multiprocessing.spawn(norms_of_a_process, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["5.0 inf"] * 2


def test_other_norms():
    assert global_norm(torch.tensor(2.5)) == global_norm(2.5) == 2.5
