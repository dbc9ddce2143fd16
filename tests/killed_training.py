"""Trains a tiny policy again and again, killed in the middle of its saves; run by `test_safe_checkpoints.py`.

Prints one JSON line per attempt: the checkpoint that the next attempt starts from.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from hub_folders import policy_config
from shared_files import shared_path

from lapa import LapaForActionPrediction, LapaImageProcessor, LapaProcessor, LapaTokenizer
from lapa.data.labelled_steps import LabelledStepDataset
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
from lapa.training.arguments import LapaActionFinetuningArguments
from lapa.training.safe_checkpoints import last_checkpoint


def make_trainer(folder: str | Path, **changes) -> LapaActionFinetuningTrainer:
    torch.manual_seed(0)
    model = LapaForActionPrediction(policy_config(has_action_segment=True))
    tokenizer = LapaTokenizer(str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")))
    processor = LapaProcessor.from_config(model.config, LapaImageProcessor(size=16), tokenizer)
    generator = np.random.default_rng(0)
    actions = generator.random((12, 3)).astype(np.float32)
    processor.fit_actions(actions, "robot", gripper_dimension=None)
    data = LabelledStepDataset(
        processor, ["push"] * 12, vision_codes=generator.integers(0, 30, (12, 16)), actions=actions, unnorm_key="robot"
    )
    settings = {"max_steps": 8, "save_steps": 1, "save_total_limit": 2, "per_device_train_batch_size": 4}
    quiet = {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = LapaActionFinetuningArguments(str(folder), **{**settings, **quiet, **changes})
    evaluated = data if "eval_strategy" in changes else None
    return LapaActionFinetuningTrainer(model, arguments, data, evaluated, processor, "robot")


def kill_at_write(number: int, half_written: bool) -> None:
    """The process dies at the `number`-th file that it opens to write or moves in the output folder."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
        if (writes or event == "os.rename") and "out" in str(arguments[0]):
            count += 1
            if count == number:
                if half_written and writes and isinstance(arguments[0], (str, os.PathLike)):
                    Path(arguments[0]).write_bytes(b'{"global_')
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(folder: str, points: list[int]) -> None:
    for attempt, point in enumerate([*points, 0]):
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)
            if point:
                kill_at_write(point, half_written=attempt % 2 == 0)
            trainer = make_trainer(folder)
            trainer.train(resume_from_checkpoint=last_checkpoint(folder))
            trainer.save_model()
            os._exit(0)
        _, status = os.waitpid(process, 0)
        print(json.dumps({"killed": os.WIFSIGNALED(status), "last": last_checkpoint(folder)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(point) for point in sys.argv[2:]])
