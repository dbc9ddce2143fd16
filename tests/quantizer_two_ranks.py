"""Run by `test_quantizer_ranks.py` under torchrun: trains a tiny quantizer and writes what the codebook and codes became."""

import sys

import torch
from torch.utils.data import Dataset

from lapa import LapaQuantizer, LapaQuantizerConfig
from lapa.training.arguments import LapaQuantizerTrainingArguments
from lapa.training.quantizer_trainer import LapaQuantizerTrainer

GLOBAL_BATCH, STEPS = 8, 12


class Squares(Dataset):
    """Pairs in which a square moves; every seventh has no action."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, item: int) -> dict:
        generator = torch.Generator().manual_seed(item)
        frames = torch.full((2, 3, 16, 16), 30, dtype=torch.uint8)
        top, left, dy, dx = torch.randint(3, 9, (4,), generator=generator).tolist()
        frames[0, :, top : top + 3, left : left + 3] = 220
        frames[1, :, top + dy - 6 : top + dy - 3, left + dx - 6 : left + dx - 3] = 220
        action = None if item % 7 == 0 else [float(dy - 6), float(dx - 6)]
        return {"frames": frames, "action": action, "source": "squares", "episode_id": str(item)}


def main(output: str, world_size: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LapaQuantizerConfig(
        hidden_size=16, head_dim=8, num_attention_heads=2, codebook_dim=4, image_size=16, patch_size=2,
        num_spatial_layers=1, num_temporal_layers=1, entropy_weight=0.01, action_dim=2,
    )  # fmt: skip
    arguments = LapaQuantizerTrainingArguments(
        f"{output}.run", max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH // world_size, learning_rate=3e-4,
        logging_steps=3, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, num_sample_reconstructions=2, sample_interval=3,
        codebook_update_interval=3, codebook_update_threshold=0.9, codebook_init_batches=2,
    )  # fmt: skip
    codes: list[torch.Tensor] = []
    trainer = LapaQuantizerTrainer(LapaQuantizer(config), arguments, Squares())
    count = trainer._count_batch

    def watch(counts, outputs, means):
        codes.append(trainer.accelerator.gather(outputs.latent_action_codes))
        count(counts, outputs, means)

    trainer._count_batch = watch
    trainer.train()
    assert trainer.accelerator.num_processes == world_size
    if trainer.is_world_process_zero():
        state = trainer.codebook_state
        torch.save(
            {
                "codebook": trainer.codebook.detach(),
                "codes": torch.cat(codes).view(STEPS, GLOBAL_BATCH, -1),
                "usage": state.usage_counts,
                "replaced": state.num_replaced,
                "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
                "action_losses": [row["action_loss"] for row in trainer.state.log_history if "loss" in row],
            },
            output,
        )
    if world_size > 1:
        # Left to the end of the interpreter, gloo's threads now and then outlive what they use.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
