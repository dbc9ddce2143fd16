"""Small quantizers and what they are trained on, for tests of stage 1."""

import numpy as np
import torch
from tiny_models import quantizer_config
from transformers import TrainerCallback

from lapa import LapaQuantizer
from lapa.data.frame_pairs import FramePairDataset
from lapa.training.arguments import LapaQuantizerTrainingArguments
from lapa.training.quantizer_trainer import LapaQuantizerTrainer

SMALL = {"image_size": 16, "patch_size": 2, "hidden_size": 16, "head_dim": 8, "codebook_dim": 4}


def moving_square(num_episodes=6, num_frames=8, size=16):
    """Episodes in which a bright square goes one way each."""
    generator = np.random.default_rng(0)
    episodes = np.full((num_episodes, num_frames, size, size, 3), 30, np.uint8)
    for episode in range(num_episodes):
        dy, dx = [(0, 1), (1, 0), (0, -1), (-1, 0)][episode % 4]
        y, x = generator.integers(4, size - 4, 2)
        for step in range(num_frames):
            top, left = (y + dy * step) % (size - 3), (x + dx * step) % (size - 3)
            episodes[episode, step, top : top + 3, left : left + 3] = (250, 200, 40)
    return episodes


def arguments(folder, **changes):
    defaults = {
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "num_sample_reconstructions": 0,
    }
    return LapaQuantizerTrainingArguments(str(folder), **{**defaults, **changes})


def trainer_for(folder, model=None, callbacks=None, sizes=None, **changes):
    if model is None:
        torch.manual_seed(0)
        model = LapaQuantizer(quantizer_config(**{**SMALL, **(sizes or {})}))
    dataset = FramePairDataset(moving_square(), frame_gap=2)
    return LapaQuantizerTrainer(model, arguments(folder, **changes), dataset, dataset, callbacks)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
