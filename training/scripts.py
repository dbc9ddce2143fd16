"""The command line of the three stages.

```bash
lapa train-quantizer --config training/recipes/tiny_quantizer.yaml --data bridge_rlds/1.0.0 --output_dir quantizer
lapa label --model quantizer --data bridge_rlds/1.0.0 --output labels
lapa pretrain --config training/recipes/tiny_pretrain.yaml --data labels \
    --vision_tokenizer vision-tokenizer --tokenizer tokenizer.model --output_dir policy
lapa finetune --config training/recipes/tiny_finetune.yaml --model policy --data bridge_rlds/1.0.0 --output_dir robot
lapa finetune --model policy --data bridge_rlds/1.0.0 --output_dir robot --use_peft --lora_r 32
```

A recipe (`--config`, YAML) gives any of a command's arguments; the command line wins over it, and a key that no
argument has is an error. Each command is a function of its arguments that returns the exit code: 2 with one line on
bad input.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lapa.training.script_arguments import FinetuneArguments, LabelArguments, PretrainArguments, QuantizerArguments

logger = logging.getLogger(__name__)


def make_parser(dataclass_types: Sequence[type], prog: str) -> Any:
    """trl's parser of dataclasses (YAML and command line), with errors of one line."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise ValueError(message)

    return Parser(dataclass_types, prog=prog, allow_abbrev=False)


def _run(name: str, dataclass_types: Sequence[type], main: Callable[..., None], argv: Sequence[str] | None) -> int:
    try:
        main(*make_parser(dataclass_types, f"lapa {name}").parse_args_and_config(argv))
        _leave_process_group()
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        logger.debug("lapa %s failed", name, exc_info=True)
        print(f"lapa {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _leave_process_group() -> None:
    """Ends what `torchrun` began: left to the end of the interpreter, its threads now and then abort the process."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train_quantizer(argv: Sequence[str] | None = None) -> int:
    """`lapa train-quantizer`: stage 1."""
    from lapa.training.arguments import LapaQuantizerTrainingArguments
    from lapa.training.quantizer_script import run_train_quantizer

    return _run("train-quantizer", (QuantizerArguments, LapaQuantizerTrainingArguments), run_train_quantizer, argv)


def label(argv: Sequence[str] | None = None) -> int:
    """`lapa label`: latent action codes for every step."""
    from lapa.training.label_script import run_label

    return _run("label", (LabelArguments,), run_label, argv)


def pretrain(argv: Sequence[str] | None = None) -> int:
    """`lapa pretrain`: stage 2."""
    from lapa.training.arguments import LapaLatentPretrainingArguments
    from lapa.training.pretraining_script import run_pretrain

    return _run("pretrain", (PretrainArguments, LapaLatentPretrainingArguments), run_pretrain, argv)


def finetune(argv: Sequence[str] | None = None) -> int:
    """`lapa finetune`: stage 3."""
    from trl import ModelConfig

    from lapa.training.arguments import LapaActionFinetuningArguments
    from lapa.training.finetuning_script import run_finetune

    return _run("finetune", (FinetuneArguments, LapaActionFinetuningArguments, ModelConfig), run_finetune, argv)


__all__ = ["finetune", "label", "make_parser", "pretrain", "train_quantizer"]
