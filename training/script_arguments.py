"""Arguments of the training scripts that are no training arguments: data, models, sizes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapa.data.mixture import FramePairSource


def read_config(value: dict | str | None, config_class: Any, argument: str) -> dict[str, Any]:
    """
    Fields of a config, from a mapping in a recipe, JSON on the command line, or a JSON or YAML file.

    Args:
        value: What was given; None is no field.
        config_class: Whose fields are accepted.
        argument: Name of the argument, for errors.

    Raises:
        ValueError: What is no mapping, or a field that the config does not have.
    """
    import yaml

    if value is None:
        return {}
    if isinstance(value, str):
        text = value
        if Path(value).suffix in (".json", ".yaml", ".yml"):
            if not Path(value).is_file():
                raise ValueError(f"`{argument}` names a file that does not exist: {value}.")
            text = Path(value).read_text(encoding="utf-8")
        try:
            value = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"`{argument}` cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{argument}` must be a mapping of {config_class.__name__} fields, got {value!r}.")
    unknown = sorted(set(value) - set(config_class.__dataclass_fields__))
    if unknown:
        raise ValueError(f"`{argument}` has no {config_class.__name__} field {', '.join(unknown)}.")
    return dict(value)


@dataclass(kw_only=True)
class SourceArguments:
    """
    Which episodes a command reads, and which pairs of their frames.

    Args:
        data (`str`): A data set of any kind that `lapa.data.open_source` knows (RLDS, LeRobot, Something-Something v2,
            videos, frame folders), local or an fsspec URL; or a mixture of them, a `.yaml` or `.json` file.
        kind (`str`, *optional*): Kind of the data set; told by what it holds when None.
        split (`str`, *optional*): Split to read; what each kind reads by default when None.
        camera (`str`, *optional*): Camera to read; the first one by default.
        frame_gap (`int`, *optional*): Frames between the two of a pair.
        frame_gap_seconds (`float`, *optional*): The same in seconds; exclusive with `frame_gap`. With neither it is what
            the data set says: 0.6 s for robots, 2.4 s for people.
        frequency (`float`, *optional*): Frames per second, for data that do not record it.
        filters (`str`, *optional*): Comma-separated rules that leave pairs out: `static`, `shot_cut`, `blank`.
        on_error (`str`): `raise` stops at what cannot be read, `skip` counts it and goes on.
        max_skipped (`float`): Share of episodes that may be skipped, in [0, 1]; more ends the run.
    """

    data: str = field(metadata={"help": "Data set of any known kind, or a mixture (.yaml, .json)."})
    kind: str | None = field(default=None, metadata={"help": "Kind of the data set; told by its content by default."})
    split: str | None = field(default=None, metadata={"help": "Split to read; the kind's own default otherwise."})
    camera: str | None = field(default=None, metadata={"help": "Camera to read; the first one by default."})
    frame_gap: int | None = field(default=None, metadata={"help": "Frames between the two of a pair."})
    frame_gap_seconds: float | None = field(
        default=None, metadata={"help": "The gap in seconds instead; the data set's own by default."}
    )
    frequency: float | None = field(default=None, metadata={"help": "Frames per second, where data do not tell."})
    filters: str | None = field(default=None, metadata={"help": "Comma-separated: static, shot_cut, blank."})
    on_error: str = field(
        default="raise",
        metadata={"help": "What cannot be read stops the run or is skipped.", "choices": ["raise", "skip"]},
    )
    max_skipped: float = field(default=0.05, metadata={"help": "Share of episodes that may be skipped."})

    def open_sources(self, **defaults: Any) -> "tuple[FramePairSource, ...]":
        """
        The sources, with everything checked that can be without reading an episode.

        Args:
            defaults: Values of `camera`, `frame_gap`, `frame_gap_seconds` and `frequency` where these arguments say nothing.

        Raises:
            ValueError: As `lapa.data.open_source.open_mixture`.
        """
        from lapa.data.open_source import is_mixture, open_mixture, open_pair_source

        names = ("kind", "split", "camera", "frame_gap", "frame_gap_seconds", "frequency", "filters")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        if {"frame_gap", "frame_gap_seconds"} & set(options):
            # A gap that is given replaces one that was recorded, in whichever unit.
            defaults = {name: value for name, value in defaults.items() if not name.startswith("frame_gap")}
        options = {**{name: value for name, value in defaults.items() if value is not None}, **options}
        if is_mixture(self.data):
            return open_mixture(self.data, **options)
        return (open_pair_source(self.data, **options),)


@dataclass(kw_only=True)
class QuantizerArguments(SourceArguments):
    """
    Arguments of `lapa train-quantizer`, beside those of `SourceArguments`.

    Args:
        quantizer_config (`dict` or `str`, *optional*): `LapaQuantizerConfig` fields that differ from the released sizes:
            a mapping in a recipe, JSON, or a JSON or YAML file.
        model (`str`, *optional*): Quantizer folder to train on, instead of a fresh one.
        buffer_size (`int`): Pairs that each loader worker keeps in memory to draw from.
        pairs_per_episode (`int`, *optional*): Pairs taken of each episode in an epoch, drawn at random; all by default.
        eval_episodes (`int`): Last episodes of each data set, held out for evaluation.
        eval_pairs (`int`): Most pairs of theirs that an evaluation takes, spread evenly over them and kept in memory.
    """

    quantizer_config: dict | str | None = field(
        default=None, metadata={"help": "LapaQuantizerConfig fields: JSON, or a JSON or YAML file."}
    )
    model: str | None = field(default=None, metadata={"help": "Quantizer folder to train on."})
    buffer_size: int = field(default=1024, metadata={"help": "Pairs that a loader worker keeps to draw from."})
    pairs_per_episode: int | None = field(
        default=None, metadata={"help": "Pairs taken of each episode in an epoch; all by default."}
    )
    eval_episodes: int = field(
        default=0, metadata={"help": "Last episodes of each data set, held out for evaluation."}
    )
    eval_pairs: int = field(default=512, metadata={"help": "Most pairs of them that an evaluation takes."})

    def __post_init__(self) -> None:
        if self.eval_pairs < 1:
            raise ValueError(f"`eval_pairs` must be at least 1, got {self.eval_pairs}.")


@dataclass
class LabelArguments:
    """
    Arguments of `lapa label`.

    Args:
        model (`str`): Quantizer folder.
        data (`str`): RLDS folder.
        output (`str`): Folder to write. A second run goes on after the last complete shard.
        split, camera, frame_gap, frame_gap_seconds, frequency: As in `QuantizerArguments`; what is not said is as the
            quantizer was trained.
        batch_size (`int`): Pairs encoded at a time.
        episodes_per_shard (`int`): Episodes per file.
        device (`str`, *optional*): Where the quantizer runs; a GPU if there is one.
    """

    model: str = field(metadata={"help": "Quantizer folder."})
    data: str = field(metadata={"help": "RLDS folder."})
    output: str = field(metadata={"help": "Folder to write."})
    split: str = field(default="train", metadata={"help": "Split to read."})
    camera: str | None = field(default=None, metadata={"help": "Camera; the quantizer's by default."})
    frame_gap: int | None = field(default=None, metadata={"help": "Frames between the two of a pair."})
    frame_gap_seconds: float | None = field(default=None, metadata={"help": "The gap in seconds instead."})
    frequency: float | None = field(default=None, metadata={"help": "Control steps per second of the data."})
    batch_size: int = field(default=64, metadata={"help": "Pairs encoded at a time."})
    episodes_per_shard: int = field(default=256, metadata={"help": "Episodes per file."})
    device: str | None = field(default=None, metadata={"help": "Where the quantizer runs."})

    def __post_init__(self) -> None:
        for name in ("batch_size", "episodes_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass
class PretrainArguments:
    """
    Arguments of `lapa pretrain`.

    Args:
        data (`str`): Folder that `lapa label` wrote, or a published `.jsonl` file (image codes and `delta`).
        model (`str`, *optional*): Policy folder to train on. Without it a fresh trunk is made from the next three.
        policy_config (`dict` or `str`, *optional*): `LapaConfig` fields that differ from the released sizes.
        vision_tokenizer (`str`, *optional*): Vision tokenizer folder of a fresh policy.
        tokenizer (`str`, *optional*): Sentencepiece file of a fresh policy.
        cache_vision_codes (`bool`): Whether images are encoded once, before training.
        eval_episodes (`int`): Last episodes (rows of a file), held out for evaluation.
        dtype, attn_implementation (`str`, *optional*): How `model` is loaded.
    """

    data: str = field(metadata={"help": "Folder of labels, or a published .jsonl file."})
    model: str | None = field(default=None, metadata={"help": "Policy folder to train on."})
    policy_config: dict | str | None = field(
        default=None, metadata={"help": "LapaConfig fields of a fresh policy: JSON, or a JSON or YAML file."}
    )
    vision_tokenizer: str | None = field(default=None, metadata={"help": "Vision tokenizer of a fresh policy."})
    tokenizer: str | None = field(default=None, metadata={"help": "Sentencepiece file of a fresh policy."})
    cache_vision_codes: bool = field(default=True, metadata={"help": "Encode images once, before training."})
    eval_episodes: int = field(default=0, metadata={"help": "Last episodes, held out for evaluation."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype of the loaded model.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the loaded model."})


@dataclass
class FinetuneArguments:
    """
    Arguments of `lapa finetune`, beside those of trl's `ModelConfig` (`use_peft`, `lora_r`, `dtype`, ...).

    Args:
        model (`str`): Policy folder, latent-pretrained or with action rows.
        data (`str`): RLDS folder, or a published `.jsonl` file (image codes and `raw_actions`).
        split, camera: As in `QuantizerArguments`.
        unnorm_key (`str`, *optional*): Name of the action bins; the data set's name by default. Bins that the model's
            processor already has under it are kept.
        action_bins (`str`, *optional*): csv with bin edges in the published layout, instead of fitting them.
        num_bins (`int`, *optional*): Most bins per dimension; the model's `action_vocab_size` by default.
        gripper_dimension (`str`): `last`, `none`, or the index of the dimension that is open or closed.
        keep_latent_head (`bool`, *optional*): Whether the policy can still decode latent codes; as in `model` by
            default. The data of this command hold none to learn from: the head stays, the trunk under it moves.
        augmentation (`bool`): Whether training images are cropped and their colours changed at random, as published for
            real robots (`LapaImageAugmentation`). The saved processor crops the middle then.
        cache_vision_codes (`bool`): Whether images are encoded once, before training; augmented ones never are.
        eval_episodes (`int`): Last episodes (rows of a file), held out for evaluation.
    """

    model: str = field(metadata={"help": "Policy folder."})
    data: str = field(metadata={"help": "RLDS folder, or a published .jsonl file."})
    split: str = field(default="train", metadata={"help": "Split to read."})
    camera: str | None = field(default=None, metadata={"help": "Camera to read; the first one by default."})
    unnorm_key: str | None = field(default=None, metadata={"help": "Name of the action bins."})
    action_bins: str | None = field(default=None, metadata={"help": "csv with published bin edges."})
    num_bins: int | None = field(default=None, metadata={"help": "Most bins per action dimension."})
    gripper_dimension: str = field(default="last", metadata={"help": "`last`, `none`, or an index."})
    keep_latent_head: bool | None = field(
        default=None,
        metadata={"help": "`true` or `false`: whether latent codes can still be decoded; as in `model` by default."},
    )
    augmentation: bool = field(default=False, metadata={"help": "Crop training images and change colours at random."})
    cache_vision_codes: bool = field(default=True, metadata={"help": "Encode images once, before training."})
    eval_episodes: int = field(default=0, metadata={"help": "Last episodes, held out for evaluation."})

    def __post_init__(self) -> None:
        if self.gripper_dimension not in ("last", "none") and not self.gripper_dimension.lstrip("-").isdigit():
            raise ValueError(f"`gripper_dimension` must be last, none or an index, got {self.gripper_dimension!r}.")


__all__ = [
    "FinetuneArguments",
    "LabelArguments",
    "PretrainArguments",
    "QuantizerArguments",
    "SourceArguments",
    "read_config",
]
