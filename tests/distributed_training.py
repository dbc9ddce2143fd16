"""What two processes train, each way; run under torchrun by `test_distributed_training.py`.

`distributed_training.py ddp FOLDER` trains through the Trainer; `fsdp FOLDER CONFIG` shards as accelerate does with a
shipped config, trains three steps by hand, and saves a whole checkpoint.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from killed_training import make_trainer

LEARNING_RATE = 1e-2


def train(folder: str, world_size: int, **changes):
    """Through the Trainer, with the same global batch for any number of processes."""
    settings = {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 4 // world_size}
    trainer = make_trainer(folder, learning_rate=1e-3, **{**settings, **changes})
    trainer.train()
    trainer.save_model()
    return [
        {name: log[name] for name in ("loss", "action_loss", "grad_norm", "action_accuracy")}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def fsdp_plugin(config_file: str):
    """accelerate's plugin, from the environment that `accelerate launch --config_file` would set."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(
        ["--config_file", config_file, "--main_process_ip", "localhost", "x.py"]
    )
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    os.environ.update({name: value for name, value in environment.items() if name.startswith("FSDP_")})
    return FullyShardedDataParallelPlugin()


def steps(model, batches):
    """Three steps of AdamW, and what an evaluation of the last batch gives."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    model.train()
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        logits = model(**batches[-1], use_cache=False, target_segment="action").segment_logits
    return losses, logits


def batches_of(trainer, rank: int, world_size: int):
    """Three batches of four; each process has its rows of them."""
    rows = [trainer.train_dataset[index] for index in range(12)]
    parts = [rows[start + rank : start + 4 : world_size] for start in (0, 4, 8)]
    return [trainer._for_model(trainer.data_collator(part)) for part in parts]


def shard(model, config_file: str):
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=fsdp_plugin(config_file)), torch_device_mesh=None, mixed_precision="no",
        device=torch.device("cpu"), is_main_process=dist.get_rank() == 0,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


def train_sharded(folder: str, config_file: str) -> list[float]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    trainer = make_trainer(folder, save_strategy="no")
    model = shard(trainer.model, config_file)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) != ("vision_tokenizer" in name), name
    losses, logits = steps(model, batches_of(trainer, rank, world_size))
    for loss in losses:
        dist.all_reduce(loss)
    assert logits.shape == (4 // world_size * 3, model.config.action_vocab_size)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        trainer.processor.save_pretrained(folder)
    dist.barrier()
    dist.destroy_process_group()
    return [loss.item() / world_size for loss in losses]


def main(kind: str, folder: str, *more: str) -> None:
    torch.set_num_threads(1)
    world_size = int(os.environ["WORLD_SIZE"])
    log = train(folder, world_size) if kind == "ddp" else train_sharded(folder, *more)
    if int(os.environ["RANK"]) == 0:
        Path(folder, "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(*sys.argv[1:])
