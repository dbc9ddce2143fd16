"""Training arguments of the three stages. The defaults are the published recipes."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

CODEBOOK_UPDATES = ("reseed", "published", "none")


def _check_at_least(arguments: TrainingArguments, least: dict[str, int]) -> None:
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


@dataclass
class LapaQuantizerTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`LapaQuantizerTrainer`] (stage 1).

    Only what is specific to this stage is listed; everything else is in [`~transformers.TrainingArguments`]. The
    recipe is that of `laq_openx.pt`: Adam with betas 0.9 and 0.99, constant rate 1e-4, no weight decay, gradients
    clipped at 0.5, 64 pairs per step, 100,005 steps. Weight decay 0 makes the AdamW used here Adam.

    Parameters:
        > Parameters that control the codebook

        codebook_init_from_data (`bool`, *optional*, defaults to `True`):
            Whether the codebook of a fresh model starts as random embeddings of the data. A random codebook far from
            the embeddings falls to one code at once. Models loaded from a checkpoint keep theirs.
        codebook_init_batches (`int`, *optional*, defaults to `4`):
            Steps from whose embeddings: the codebook starts from the first one, and is drawn anew from those of all
            these steps at the end of the last of them. 1 keeps the first step's.
        codebook_update (`str`, *optional*, defaults to `"reseed"`):
            What happens to codes that are not used: `"reseed"` puts them where current embeddings are, `"published"`
            copies used entries over them by the published rule and schedule (no accumulated gradients with it), `"none"`
            leaves them.
        codebook_update_interval (`int`, *optional*, defaults to `20`):
            Steps between two re-seedings, over which usage is counted.
        codebook_update_until (`int`, *optional*):
            Last step that may re-seed; None means four fifths of the training, so that the codebook settles.
        codebook_update_threshold (`float`, *optional*, defaults to `0.1`):
            `"reseed"`: a code is dead when its share of all codes is below this part of an even share
            (`1 / codebook_size`). `"published"`: the published meaning, uses per sample of a batch.
        noise_by_sample (`bool`, *optional*, defaults to `True`):
            Whether a sample's noise (NSVQ, continuous) is drawn by its place in the batch over all processes, so that one
            process and several train alike. `False` draws from torch's generator, as the published loop does.

        > Parameters of the watchdog

        min_perplexity (`float`, *optional*):
            Perplexity of the codes between two logs below which the training stops with `CodebookCollapse`; None means a
            quarter of the codebook, 0 sets no limit.
        min_codes_used (`float`, *optional*, defaults to `0.5`):
            Share of the codebook in use between two logs below which it stops; 0 sets no limit.
        min_perplexity_from (`int`, *optional*, defaults to `1000`):
            First step at which that is looked at: codebooks fill up in the beginning.

        > Parameters that control the sample reconstructions

        num_sample_reconstructions (`int`, *optional*, defaults to `8`):
            Frame pairs drawn as first frame, second frame and reconstruction, side by side; 0 draws none. They go to
            tensorboard and, as PNG files, to `output_dir/samples`.
        sample_interval (`int`, *optional*, defaults to `1000`):
            Steps between two drawings; the last step draws too.

        > Parameters whose defaults differ from TrainingArguments

        per_device_train_batch_size (`int`, defaults to `64`), learning_rate (`float`, defaults to `1e-4`),
        lr_scheduler_type (`str`, defaults to `"constant"`), adam_beta2 (`float`, defaults to `0.99`),
        max_grad_norm (`float`, defaults to `0.5`), max_steps (`int`, defaults to `100005`),
        logging_steps (`float`, defaults to `50`), report_to (defaults to `"tensorboard"`),
        remove_unused_columns (`bool`, defaults to `False`).
    """

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Frame pairs per device and step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of Adam."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Beta2 of Adam."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Largest norm of the gradient."})
    max_steps: int = field(default=100_005, metadata={"help": "Steps to train; -1 counts in `num_train_epochs`."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logs."})
    report_to: str | None = field(default="tensorboard", metadata={"help": "Where metrics are reported."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: the data are frame pairs."})

    codebook_init_from_data: bool = field(
        default=True, metadata={"help": "Start the codebook of a fresh model from embeddings of the data."}
    )
    codebook_init_batches: int = field(default=4, metadata={"help": "Steps from whose embeddings it is drawn."})
    codebook_update: str = field(
        default="reseed",
        metadata={"help": "What happens to unused codes.", "choices": list(CODEBOOK_UPDATES)},
    )
    codebook_update_interval: int = field(default=20, metadata={"help": "Steps between two re-seedings."})
    codebook_update_until: int | None = field(
        default=None, metadata={"help": "Last step that may re-seed; four fifths of the training by default."}
    )
    codebook_update_threshold: float = field(
        default=0.1, metadata={"help": "A code used less than this part of an even share is re-seeded."}
    )
    min_perplexity: float | None = field(
        default=None,
        metadata={
            "help": "Stop when the codes' perplexity is below this; a quarter of the codebook by default, 0 never."
        },
    )
    min_codes_used: float = field(
        default=0.5, metadata={"help": "Stop when a smaller share of the codebook is in use; 0 never."}
    )
    min_perplexity_from: int = field(default=1000, metadata={"help": "First step at which that is looked at."})
    noise_by_sample: bool = field(
        default=True, metadata={"help": "Draw noise by a sample's place in the global batch."}
    )
    num_sample_reconstructions: int = field(
        default=8, metadata={"help": "Frame pairs drawn beside their reconstruction; 0 draws none."}
    )
    sample_interval: int = field(default=1000, metadata={"help": "Steps between two drawings."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook_update not in CODEBOOK_UPDATES:
            raise ValueError(
                f"`codebook_update` must be one of {', '.join(CODEBOOK_UPDATES)}, got {self.codebook_update!r}."
            )
        if self.codebook_update == "published" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "`gradient_accumulation_steps` must be 1 with `codebook_update` 'published', which replaces codes between "
                f"the forward and the backward pass of a batch, got {self.gradient_accumulation_steps}."
            )
        if not 0 <= self.codebook_update_threshold < 1:
            raise ValueError(f"`codebook_update_threshold` must lie in [0, 1), got {self.codebook_update_threshold}.")
        if self.min_perplexity is not None and self.min_perplexity != 0 and self.min_perplexity < 1:
            raise ValueError(
                f"`min_perplexity` must be at least 1, which one code has, or 0 for no limit, got {self.min_perplexity}."
            )
        if not 0 <= self.min_codes_used <= 1:
            raise ValueError(f"`min_codes_used` is a share and must lie in [0, 1], got {self.min_codes_used}.")
        _check_at_least(
            self,
            {
                "codebook_init_batches": 1,
                "codebook_update_interval": 1,
                "min_perplexity_from": 0,
                "codebook_update_until": 0,
                "num_sample_reconstructions": 0,
                "sample_interval": 1,
            },
        )


@dataclass
class LapaPolicyTrainingArguments(TrainingArguments):
    r"""
    What stages 2 and 3 share: AdamW with betas 0.9 and 0.95, constant rate 2e-5, no weight decay, gradients clipped at
    1.0, batches in bf16 where an accelerator can.

    Parameters:
        > Parameters that control the batches

        max_length (`int`, *optional*):
            Most ids of a training example (published: 384, which is 385 here); a longer one is an error. None sets no limit.
        pad_to_max_length (`bool`, *optional*, defaults to `False`):
            Whether every batch is `max_length` wide (published) instead of as wide as its longest example.

        > Parameters whose defaults differ from TrainingArguments

        per_device_train_batch_size (`int`, defaults to `32`), learning_rate (`float`, defaults to `2e-5`),
        lr_scheduler_type (`str`, defaults to `"constant"`), adam_beta2 (`float`, defaults to `0.95`),
        bf16 (`bool`, *optional*, defaults to on where an accelerator supports it and fp16 is off),
        logging_nan_inf_filter (`bool`, defaults to `False`),
        logging_steps (`float`, defaults to `10`), report_to (defaults to `"tensorboard"`),
        remove_unused_columns (`bool`, defaults to `False`).
    """

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training examples per device and step."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    report_to: str | None = field(default="tensorboard", metadata={"help": "Where metrics are reported."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: the collator needs all."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Keep False: a loss that is not finite ends the run at once."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Compute in bf16; on by default where an accelerator supports it."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Most ids of an example; longer ones are errors."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every batch to `max_length`."})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            # A check of the device itself would set up the distributed state too early.
            self.bf16 = (
                not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        super().__post_init__()
        _check_at_least(self, {"max_length": 1})
        if self.pad_to_max_length and self.max_length is None:
            raise ValueError("`max_length` must be given with `pad_to_max_length`, got None.")


@dataclass
class LapaLatentPretrainingArguments(LapaPolicyTrainingArguments):
    r"""
    Arguments of [`LapaLatentPretrainingTrainer`] (stage 2). The published Open-X run took 70,000 steps of 256 examples
    (32 on each of 8 devices).

    Parameters:
        > Parameters whose defaults differ from LapaPolicyTrainingArguments

        max_steps (`int`, defaults to `70000`).

        > Parameters that control the loss

        text_loss_weight (`float`, *optional*):
            Share of the text loss; the latent loss has the rest. As in the model's config (published: 0.01) when None.
    """

    max_steps: int = field(default=70_000, metadata={"help": "Steps to train; -1 counts in `num_train_epochs`."})
    text_loss_weight: float | None = field(
        default=None, metadata={"help": "Share of the text loss, in [0, 1]; as in the model by default."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_loss_weight is not None and not 0 <= self.text_loss_weight <= 1:
            raise ValueError(f"`text_loss_weight` must lie in [0, 1], got {self.text_loss_weight}.")


@dataclass
class LapaActionFinetuningArguments(LapaPolicyTrainingArguments):
    r"""
    Arguments of [`LapaActionFinetuningTrainer`] (stage 3). The published runs took 128 examples per step (32 on each of
    4 devices), 2,000 steps on a real robot and 500 on SIMPLER.

    Parameters:
        > Parameters that control saving

        merge_adapter (`bool`, *optional*, defaults to `True`):
            Whether the final folder of a LoRA run holds the merged model; otherwise the adapter alone. Checkpoints
            hold the adapter.

        > Parameters that control the loss

        latent_loss_weight (`float`, *optional*):
            What the latent loss is multiplied with before it is added to the action loss, where the policy keeps its
            latent head and the data hold latent codes. As in the model's config (1.0) when None.

        > Parameters whose defaults differ from LapaPolicyTrainingArguments

        max_steps (`int`, defaults to `2000`).
    """

    max_steps: int = field(default=2000, metadata={"help": "Steps to train; -1 counts in `num_train_epochs`."})
    merge_adapter: bool = field(default=True, metadata={"help": "Save a LoRA run as a merged model."})
    latent_loss_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the latent loss beside the action loss; as in the model by default."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_loss_weight is not None and not self.latent_loss_weight >= 0:
            raise ValueError(f"`latent_loss_weight` must be at least 0, got {self.latent_loss_weight}.")


__all__ = [
    "CODEBOOK_UPDATES",
    "LapaActionFinetuningArguments",
    "LapaLatentPretrainingArguments",
    "LapaPolicyTrainingArguments",
    "LapaQuantizerTrainingArguments",
]
