"""Stage 1: training the latent action quantizer without letting its codebook collapse."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput

from lapa.data.atomic_files import atomic_file
from lapa.data.shuffled_stream import ShuffledStream
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.modeling_lapa.vector_quantization_lapa import CodebookQuantizer, replace_unused_codes_published
from lapa.training.arguments import LapaQuantizerTrainingArguments
from lapa.training.codebook import (
    CodebookState,
    SampleNoise,
    clear_moments,
    codebook_from_embeddings,
    dead_codes,
    published_update_due,
    reseed_codes,
)
from lapa.training.codebook_watchdog import CodebookCollapse, CodebookWatchdog
from lapa.training.metrics import code_usage, count_codes, num_codes_used, perplexity
from lapa.training.metrics_trainer import MetricsTrainer
from lapa.training.pair_conditions import QuantizerCollator
from lapa.training.safe_checkpoints import SafeCheckpoints

logger = logging.getLogger(__name__)

# What a batch may hold beside the frames, under the name the model takes it by.
CONDITIONS = ("actions", "instruction_ids")
# Fields of the output that are logged.
LOSS_PARTS = ("reconstruction_loss", "feature_loss", "action_loss", "kl")

# Larger codebooks log no share per code: thousands of curves help nobody.
MAX_LOGGED_CODES = 64


class CodebookCallback(TrainerCallback):
    """Updates the codebook after an optimizer step, before anything is logged or saved."""

    def __init__(self, trainer: "LapaQuantizerTrainer") -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Re-seeds dead codes where the schedule says so."""
        self.trainer.update_codebook(state.global_step)


class SampleReconstructionsCallback(TrainerCallback):
    """Draws first frame, second frame and reconstruction of a few fixed pairs."""

    def __init__(self, trainer: "LapaQuantizerTrainer") -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws every `sample_interval` steps and at the end, on the main process."""
        due = state.global_step % self.trainer.args.sample_interval == 0 or state.global_step >= state.max_steps
        if due and state.is_world_process_zero:
            self.trainer.draw_samples(state.global_step)


def reconstruction_grid(frames: torch.Tensor, reconstructions: torch.Tensor) -> np.ndarray:
    """
    Rows of first frame, second frame, reconstruction.

    Args:
        frames: (batch, 2, 3, height, width) float in [0, 1].
        reconstructions: (batch, 3, height, width) float, clipped here.

    Returns:
        (batch * height, 3 * width, 3) uint8.
    """
    rows = torch.cat((frames, reconstructions.unsqueeze(1)), dim=1).clamp(0, 1)
    # b k c h w -> (b h) (k w) c
    batch, columns, channels, height, width = rows.shape
    grid = rows.permute(0, 3, 1, 4, 2).reshape(batch * height, columns * width, channels)
    return (grid * 255).round().to(torch.uint8).cpu().numpy()


class LapaQuantizerTrainer(SafeCheckpoints, MetricsTrainer):
    r"""
    Trainer of [`LapaQuantizer`].

    ```python
    >>> trainer = LapaQuantizerTrainer(
    ...     LapaQuantizer(config), LapaQuantizerTrainingArguments("quantizer"), FramePairDataset(episodes, frame_gap=3)
    ... )
    >>> trainer.train()
    ```

    Beside the loss it logs its parts, how many codes were used since the last log, their perplexity and shares, and how
    many were replaced so far. A checkpoint holds the usage counts, so that a resumed training goes on exactly as if it
    had not stopped. What is drawn for a sample (noise, re-seeding) depends on its place in the batch over all processes,
    so that one process and several with the same global batch give the same codes and the same codebook.

    Args:
        model: The quantizer. With `quantizer="fsq"` and `"continuous"` there is no codebook to look after.
        args: Training arguments.
        train_dataset: `FramePairStream`, `FramePairDataset`, or anything that gives `frames` (2, 3, height, width) uint8;
            `action` and `instruction` too, for models that take them.
        eval_dataset: As `train_dataset`, but no stream.
        callbacks: Further callbacks.
        data_collator: Batches the examples; `QuantizerCollator` when None.
        kwargs: Further arguments of [`~transformers.Trainer`].
    """

    args: LapaQuantizerTrainingArguments

    def __init__(
        self,
        model: LapaQuantizer,
        args: LapaQuantizerTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        data_collator: Callable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=QuantizerCollator(model.config) if data_collator is None else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks or ()),
            **kwargs,
        )
        self.codebook_size: int = model.config.codebook_size
        self.codebook_state = CodebookState.new(self.codebook_size)
        self._step_embeddings: list[torch.Tensor] = []
        # Frames of the first step, in the parts that are accumulated, until the codebook has started from them.
        self._first_batches: list[torch.Tensor] = []
        self._noise = SampleNoise(args.seed)
        self.watchdog = CodebookWatchdog(model.config, args)
        self._samples: list[Any] = []
        # First, so that samples, logs and checkpoints see the updated codebook.
        self.callback_handler.callbacks.insert(0, CodebookCallback(self))
        if args.num_sample_reconstructions:
            self.add_callback(SampleReconstructionsCallback(self))

    @property
    def quantizer(self) -> LapaQuantizer:
        """The model without what wraps it for distributed training."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def codebook(self) -> nn.Parameter | None:
        """The codebook; None for a quantizer that has none (FSQ)."""
        bottleneck = self.quantizer.vector_quantizer
        return bottleneck.codebook if isinstance(bottleneck, CodebookQuantizer) else None

    @property
    def codebook_update_until(self) -> int:
        """Last step that may re-seed."""
        until = self.args.codebook_update_until
        return self.state.max_steps * 4 // 5 if until is None else until

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in [`~transformers.Trainer`]; the codebook of a fresh model starts from the whole first step."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.state.global_step == 0:
            self._first_batches = [batch["pixel_values"] for batch in batches]
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of a batch; in training also counts its codes."""
        if model.training and self.state.global_step == 0 and not self._step_embeddings:
            self._start_codebook(self._first_batches or [inputs["pixel_values"]])
            self._first_batches = []
        conditions = {name: inputs[name] for name in CONDITIONS if name in inputs}
        noise = self._draw_noise(inputs["pixel_values"]) if model.training else None
        outputs = model(pixel_values=inputs["pixel_values"], noise=noise, **conditions)
        means = {name: outputs[name] for name in LOSS_PARTS if outputs.get(name) is not None}
        counts = None
        if outputs.latent_action_codes is not None:
            counts = count_codes(outputs.latent_action_codes, self.codebook_size)
        if model.training:
            # Before the published rule takes its codes from them.
            self.refuse_bad_loss(outputs.loss, inputs)
            self._count_batch(counts, outputs, means)
        else:
            if counts is not None:
                self._eval_counts += counts.cpu()
            self._eval_means.add(means, weight=len(inputs["pixel_values"]))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _draw_noise(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        config = self.quantizer.config
        if config.quantizer not in ("nsvq", "continuous") or not self.args.noise_by_sample:
            return None  # the model draws from torch's generator, which checkpoints restore
        rows = len(pixel_values) * config.num_noise_tokens
        processes = self.accelerator.process_index, self.accelerator.num_processes
        noise = self._noise.draw(self.state.global_step, *processes, rows, config.codebook_dim)
        return noise.to(pixel_values.device)

    def _count_batch(self, counts: torch.Tensor | None, outputs: Any, means: dict[str, torch.Tensor]) -> None:
        embeddings = outputs.latent_action_embeddings.detach().flatten(0, 1)
        spread = embeddings.float()
        self._means.add(
            means
            | {"embedding_std": spread.std(0, correction=0).mean(), "embedding_rms": spread.square().mean().sqrt()}
        )
        self._step_embeddings.append(embeddings)
        if counts is None:
            return
        # To the CPU once: every copy waits for the device.
        counts = self.accelerator.reduce(counts, "sum").cpu()
        self.codebook_state.count(counts)
        # The published loop replaces between the forward and the backward pass of a step.
        if (
            self.codebook is not None
            and self.args.codebook_update == "published"
            and published_update_due(self.state.global_step)
        ):
            self._replace_published(outputs.latent_action_codes.shape[0])

    @torch.no_grad()
    def _start_codebook(self, batches: list[torch.Tensor]) -> None:
        codebook = self.codebook
        if codebook is None or not self.args.codebook_init_from_data:
            return
        if self.quantizer.name_or_path:
            logger.info("The codebook of %s is kept: it is not a fresh model.", self.quantizer.name_or_path)
            return
        parts = [
            self.quantizer.encode(pixel_values.to(codebook.device)).latent_action_embeddings.flatten(0, 1)
            for pixel_values in batches
        ]
        codebook_from_embeddings(codebook, self._gather(parts), self._generator(0))
        self._share_codebook(codebook)
        if self.args.codebook_init_batches > 1:
            self.codebook_state.first_embeddings = torch.zeros(0, codebook.shape[1])

    def _replace_published(self, batch_size: int) -> None:
        codebook, state = self.codebook, self.codebook_state
        assert codebook is not None
        # What is counted is batches in which a code occurred, what it is divided by is the batch size: as published.
        state.num_replaced += replace_unused_codes_published(
            codebook.data,
            state.batch_counts,
            batch_size * self.accelerator.num_processes,
            self.args.codebook_update_threshold,
        )
        self._share_codebook(codebook)
        state.reset_counts()

    @torch.no_grad()
    def update_codebook(self, step: int) -> None:
        """Re-seeds dead codes after step number `step` (from 1) if that is due; called by the callback."""
        embeddings, self._step_embeddings = self._step_embeddings, []
        codebook, args = self.codebook, self.args
        if codebook is not None and self.codebook_state.first_embeddings is not None:
            self._collect_first(codebook, step, embeddings)
            return
        if codebook is None or args.codebook_update != "reseed" or step > self.codebook_update_until:
            return
        if step % args.codebook_update_interval:
            return
        dead = dead_codes(self.codebook_state.usage_counts, args.codebook_update_threshold)
        if dead.any():
            reseed_codes(codebook, dead, self._gather(embeddings), self._generator(step))
            self._share_codebook(codebook)
            clear_moments(self.optimizer, codebook, dead)
            self.codebook_state.num_replaced += int(dead.sum())
            logger.info("step %d: re-seeded %d of %d codes", step, int(dead.sum()), self.codebook_size)
        self.codebook_state.reset_counts()

    def _gather(self, embeddings: list[torch.Tensor]) -> torch.Tensor:
        """A step's embeddings of all processes, in the order of the samples of the global batch."""
        return torch.cat([self.accelerator.gather(part.contiguous()) for part in embeddings])

    def _collect_first(self, codebook: nn.Parameter, step: int, embeddings: list[torch.Tensor]) -> None:
        state = self.codebook_state
        state.collect(self._gather(embeddings))
        if step < self.args.codebook_init_batches:
            return
        assert state.first_embeddings is not None
        codebook_from_embeddings(codebook, state.first_embeddings, self._generator(step))
        self._share_codebook(codebook)
        clear_moments(self.optimizer, codebook, torch.ones(len(codebook), dtype=torch.bool))
        state.first_embeddings = None
        state.reset_counts()

    def _generator(self, step: int) -> torch.Generator:
        # Its own generator: the draws depend on the seed and the step alone, and leave torch's generator as it is.
        seed = np.random.SeedSequence([self.args.seed, step]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))

    def _share_codebook(self, codebook: nn.Parameter) -> None:
        """Gives every process the codebook of the first."""
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast(codebook.data, src=0)

    def training_metrics(self) -> dict[str, float]:
        """The use of the codes since the last training log, and how many were replaced so far."""
        if not self.quantizer.config.has_codes:
            return {}
        metrics = self._usage_metrics(self.codebook_state.logged_counts)
        self.codebook_state.logged_counts.zero_()
        return metrics | {"codes_replaced": float(self.codebook_state.num_replaced)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `MetricsTrainer`; then stops a training whose codes collapsed."""
        super().log(logs, start_time)
        if "loss" in logs:
            self.watchdog.check(self.state.global_step, logs, self.codebook_state.watched_counts)

    def evaluation_metrics(self) -> dict[str, float]:
        """The use of the codes in the evaluation."""
        if not self.quantizer.config.has_codes:
            return {}
        counts = self.accelerator.reduce(self._eval_counts.to(self.accelerator.device), "sum")
        return self._usage_metrics(counts.cpu())

    def _usage_metrics(self, counts: torch.Tensor) -> dict[str, float]:
        metrics = {"perplexity": perplexity(counts), "codes_used": float(num_codes_used(counts))}
        if self.codebook_size <= MAX_LOGGED_CODES:
            metrics |= {f"code_usage/{code}": float(share) for code, share in enumerate(code_usage(counts))}
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `MetricsTrainer`."""
        self._eval_counts = torch.zeros(self.codebook_size, dtype=torch.int64)
        return super().evaluation_loop(*args, **kwargs)

    def _sample_examples(self) -> list[Any]:
        """The fixed pairs that are drawn."""
        dataset: Any = self.eval_dataset if isinstance(self.eval_dataset, Dataset) else self.train_dataset
        count = self.args.num_sample_reconstructions
        if isinstance(dataset, ShuffledStream):
            self._samples = self._samples or dataset.sample(count)
            return self._samples
        chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
        return [dataset[int(item)] for item in chosen]

    @torch.no_grad()
    def draw_samples(self, step: int) -> None:
        """Writes `samples/step-*.png` below the output folder, and the same picture to tensorboard."""
        batch = self._prepare_inputs(self.data_collator(self._sample_examples()))
        # Not the actions: there is a loss of them, and no part in the picture.
        instructions = {"instruction_ids": batch["instruction_ids"]} if "instruction_ids" in batch else {}
        quantizer, was_training = self.quantizer, self.quantizer.training
        quantizer.eval()
        try:
            reconstruction = quantizer(batch["pixel_values"], **instructions).reconstruction
        finally:
            quantizer.train(was_training)
        grid = reconstruction_grid(quantizer.align(batch["pixel_values"]), reconstruction)
        with atomic_file(Path(self.args.output_dir) / "samples" / f"step-{step:07d}.png") as partial:
            Image.fromarray(grid).save(partial, format="PNG")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("samples/reconstructions", grid, step, dataformats="HWC")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.codebook_state.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.codebook_state = CodebookState.load(resume_from_checkpoint, self.codebook_size)


__all__ = [
    "CodebookCallback",
    "CodebookCollapse",
    "LapaQuantizerTrainer",
    "SampleReconstructionsCallback",
    "reconstruction_grid",
]
