"""Trainers on streams: a resumed run is the uninterrupted one, bit for bit, and says what it read."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_source import MemorySource
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from lapa.data.mixture import FramePairSource, FramePairStream
from lapa.data.pair_filters import StaticPairs
from lapa.data.schema import ReadError
from lapa.training.metrics_trainer import MetricsTrainer
from lapa.training.stream_training import REPORT_FILE

ROBOT = [[7, 5, 9], [6, 8, 4], [12]]
VIDEO = [[9, 3, 11, 5]]


def pair_stream(**options):
    sources = [
        FramePairSource(MemorySource("robot", ROBOT), weight=2, frame_gap=2, filters=[StaticPairs()]),
        FramePairSource(MemorySource("video", VIDEO), frame_gap_seconds=0.6),
    ]
    return FramePairStream(sources, **{"seed": 3, "buffer_size": 8, "pairs_per_episode": 4, **options})


class PairLoss(nn.Module):
    """One weight per pixel, and noise from torch's generator: the result tells order and draws apart."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3 * 4 * 4))

    def forward(self, pixels):
        first, second = pixels.flatten(2).unbind(1)
        return ((first * self.weight - second + 0.1 * torch.randn_like(first)) ** 2).mean()


def collate(examples):
    return {"pixels": torch.stack([example["frames"] for example in examples]).float() / 255}


class PairTrainer(MetricsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen.append(inputs["pixels"].sum().item())
        return model(inputs["pixels"])


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trainer_for(folder, stream=None, stop=None, **settings):
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": 9, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_steps": 4, "logging_steps": 3,
            "use_cpu": True, "disable_tqdm": True, "report_to": "none", "remove_unused_columns": False, **settings,
        },
    )  # fmt: skip
    trainer = PairTrainer(
        PairLoss(),
        arguments,
        train_dataset=pair_stream() if stream is None else stream,
        data_collator=collate,
        callbacks=[] if stop is None else [StopAt(stop)],
    )
    trainer.seen = []
    return trainer


def report_of(folder):
    return json.loads((Path(folder) / REPORT_FILE).read_text())


@pytest.mark.parametrize(("workers", "accumulated"), [(0, 1), (0, 3), (2, 1), (2, 2)])
def test_resumed_equals_uninterrupted(tmp_path, workers, accumulated):
    settings = {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulated}
    whole = trainer_for(tmp_path / "whole", **settings)
    whole.train()
    begun = trainer_for(tmp_path / "parts", stop=5, **settings)
    begun.train()
    stream = pair_stream()
    resumed = trainer_for(tmp_path / "parts", stream, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert len(whole.seen) == 9 * accumulated
    # The very next batches, and none before them.
    assert resumed.seen == whole.seen[4 * accumulated :] and begun.seen == whole.seen[: 5 * accumulated]
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert report_of(tmp_path / "parts") == report_of(tmp_path / "whole")
    logs = [
        [{k: v for k, v in row.items() if "loss" not in k and "per_second" not in k and "runtime" not in k} for row in rows]
        for rows in (resumed.state.log_history[-2:], whole.state.log_history[-2:])
    ]  # fmt: skip
    assert logs[0] == logs[1] and logs[0][0]["epoch"] == 1.0 and resumed.args.ignore_data_skip is False


def test_only_what_is_next_is_read(tmp_path):
    trainer_for(tmp_path, stop=4).train()
    stream = pair_stream()
    trainer = trainer_for(tmp_path, stream, max_steps=5)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    opened = sum(len(part.source.opened) for part in stream.parts)
    # The buffer of 8 pairs again, and what four more take.
    assert 0 < opened <= 12


def test_logs_and_report_say_what_was_read(tmp_path):
    trainer_for(tmp_path).train()
    report = report_of(tmp_path)
    state = json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text())
    (log,) = [row for row in state["log_history"] if row["step"] == 9]
    total = report["total"]
    # 36 pairs were handed out, 7 or 8 more lie in the buffer.
    assert total["pairs"] in (43, 44) and log["data/pairs"] == total["pairs"]
    assert log["data/episodes"] == total["episodes"]
    assert log["data/pairs/robot"] + log["data/pairs/video"] == total["pairs"]
    assert 0.3 < log["data/gap_seconds_mean"] < 0.6
    video = report["sources"]["video"]
    # Three of its steps are the gap; the episode of 3 steps gives nothing.
    assert video["gap_frames"] == {"3": video["items"]} and video["gap_seconds"] == {"60": video["items"]}
    assert video["skipped_groups"] == {"too_short": log["data/skipped_episodes/too_short"]}
    assert report["sources"]["robot"]["gap_frames"] == {"2": report["sources"]["robot"]["items"]}
    assert report["stream"]["sources"][0]["filters"] == [repr(StaticPairs())]


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"max_steps": -1}, {}, "`max_steps` must be given to train on a stream"),
        ({}, {"repeat": False}, "must be a stream with `repeat=True`"),
        ({}, {"rank": 1, "world_size": 2}, "reads share 1 of 2, but this is process 0 of 1"),
        ({"auto_find_batch_size": True}, {}, "`auto_find_batch_size` must be False"),
        ({"dataloader_in_order": False}, {}, "`dataloader_in_order` must be True"),
    ],
)
def test_what_a_stream_needs(tmp_path, settings, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, pair_stream(**options), **settings)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    trainer_for(tmp_path, stop=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    (state,) = checkpoint.glob("stream_state_*")
    for stream, settings, message in (
        (pair_stream(seed=4), {}, r"checkpoint-4 cannot be resumed on this stream: `seed` is 4, .* made with 3"),
        (FramePairStream([FramePairSource(MemorySource("robot", ROBOT))]), {}, "cannot be resumed on this stream"),
        (None, {"dataloader_num_workers": 2}, "`num_workers` of the loader is 2, the state was made with 1"),
        ([{"frames": torch.zeros(2, 3, 4, 4)}], {}, "is of a training on a stream, but `train_dataset` is none"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_for(tmp_path, stream, **settings).train(resume_from_checkpoint=str(checkpoint))
    text = state.read_text()
    state.write_text(text[:100])
    with pytest.raises(ValueError, match=f"{state.name} is damaged"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    state.rename(checkpoint / "stream_state_00000_of_00002.json")
    with pytest.raises(
        ValueError, match="has no stream_state_00000_of_00001.json .it has stream_state_00000_of_00002"
    ):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "stream_state_00000_of_00002.json").unlink()
    with pytest.raises(ValueError, match="no state of a stream at all"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_skips_too_much_fails(tmp_path, workers):
    lengths = [[5, 0, 0, 5, 0, 5]]

    def stream(**options):
        return FramePairStream([FramePairSource(MemorySource("torn", lengths), frame_gap=1)], buffer_size=4, **options)

    settings = {"max_steps": 4, "dataloader_num_workers": workers}
    with pytest.raises(ReadError, match="^torn-000, record [124]: checksum$"):
        trainer_for(tmp_path, stream(), **settings).train()
    with pytest.raises(ReadError, match="episodes could not be read, more than the share of 0.05"):
        trainer_for(tmp_path, stream(on_error="skip"), **settings).train()
    skipped = report_of(tmp_path)["sources"]["torn"]["skipped"]
    assert skipped["num_skipped"] > 0 and all("checksum" in reason for reason in skipped["reasons"])
    trainer_for(tmp_path, stream(on_error="skip", max_skipped=0.6), **settings).train()


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_stream_training import trainer_for
for name, stop, resume in (("whole", None, None), ("parts", 5, None), ("parts", None, "parts/checkpoint-4")):
    trainer = trainer_for(name, stop=stop, dataloader_num_workers=2, gradient_accumulation_steps=2, max_steps=7)
    trainer.train(resume_from_checkpoint=resume)
    result = {{"seen": trainer.seen, "weight": trainer.model.weight.detach()}}
    torch.save(result, f"{{name}}/result-{{trainer.args.process_index}}.pt")
"""


def run_ranks(script):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=environment, cwd=script.parent, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_ranks_resume_exactly(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(script)
    states = sorted(path.name for path in (parts / "checkpoint-4").glob("stream_state_*"))
    assert states == ["stream_state_00000_of_00002.json", "stream_state_00001_of_00002.json"]
    results = [[torch.load(folder / f"result-{rank}.pt") for rank in (0, 1)] for folder in (whole, parts)]
    for ours, theirs in zip(*results):
        assert theirs["seen"] == ours["seen"][8:] and torch.equal(ours["weight"], theirs["weight"])
    # Each rank read pairs of its own.
    assert not set(results[0][0]["seen"]) & set(results[0][1]["seen"])
    assert report_of(parts) == report_of(whole)
