"""Arguments of the training scripts that are no training arguments: data, models, sizes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapa.data.mixture import FramePairSource
    from lapa.data.open_source import MixtureEntry


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

    def open_sources(self) -> "tuple[FramePairSource, ...]":
        """
        The sources, with everything checked that can be without reading an episode.

        Raises:
            ValueError: As `lapa.data.open_source.open_mixture`.
        """
        from lapa.data.open_source import is_mixture, open_mixture, open_pair_source

        if is_mixture(self.data):
            return open_mixture(self.data, **self.source_options())
        return (open_pair_source(self.data, **self.source_options()),)

    def source_options(self) -> dict[str, Any]:
        """Options of the sources that are given."""
        names = ("kind", "split", "camera", "frame_gap", "frame_gap_seconds", "frequency", "filters")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def source_entries(self) -> "list[MixtureEntry]":
        """The same sources, not opened yet."""
        from lapa.data.open_source import MixtureEntry, is_mixture, mixture_entries

        if is_mixture(self.data):
            return mixture_entries(self.data, **self.source_options())
        return [MixtureEntry("", {"path": self.data, **self.source_options()})]


@dataclass(kw_only=True)
class QuantizerArguments(SourceArguments):
    """
    Arguments of `lapa train-quantizer`, beside those of `SourceArguments`.

    Args:
        quantizer_config (`dict` or `str`, *optional*): `LapaQuantizerConfig` fields that differ from the released sizes:
            a mapping in a recipe, JSON, or a JSON or YAML file.
        model (`str`, *optional*): Quantizer folder to train on, instead of a fresh one. With `task_centric: true` in
            `quantizer_config` it is the first stage, on which the second is built.
        action_share (`float`): Share of the episodes whose actions are shown to a quantizer with `action_dim`.
        buffer_size (`int`): Pairs that each loader worker keeps in memory to draw from.
        pairs_per_episode (`int`, *optional*): Pairs taken of each episode in an epoch, drawn at random; all by default.
        eval_episodes (`int`): Last episodes of each data set, held out for evaluation.
        eval_pairs (`int`): Most pairs of theirs that an evaluation takes, spread evenly over them and kept in memory.
    """

    quantizer_config: dict | str | None = field(
        default=None, metadata={"help": "LapaQuantizerConfig fields: JSON, or a JSON or YAML file."}
    )
    model: str | None = field(default=None, metadata={"help": "Quantizer folder to train on."})
    action_share: float = field(
        default=1.0, metadata={"help": "Share of the episodes whose actions are shown (`action_dim`)."}
    )
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
        if not 0 < self.action_share <= 1:
            raise ValueError(f"`action_share` must lie in (0, 1], got {self.action_share}.")


@dataclass(kw_only=True)
class LabelArguments(SourceArguments):
    """
    Arguments of `lapa label`.

    Args:
        model (`str`): Quantizer folder.
        output (`str`): Folder to write. A second run goes on after the units that are there.
        data, kind, split, camera, frame_gap, frame_gap_seconds, frequency, filters, on_error, max_skipped: As in
            `SourceArguments`; gap, frequency and camera that are not said are those the quantizer was trained with.
        format (`str`): `parquet` (a Hugging Face data set), or `jsonl` (published files; needs `vision_tokenizer`).
        vision_tokenizer (`str`, *optional*): Folder of a vision tokenizer or of a policy: rows get its codes.
        action (`bool`): Whether rows get the action, where the data have any.
        image_size (`int`, *optional*): Side of the stored images; as they are recorded by default.
        image_quality (`int`): Of stored JPEG images, 1 to 100.
        keep_jpeg (`bool`): Whether frames that are recorded as JPEG are stored as they are.
        batch_size (`int`): Pairs encoded at a time.
        episodes_per_unit (`int`): Most episodes of a file.
        num_threads (`int`): Of torch. Fixed, so that codes do not depend on the machine; more processes are the way to
            use more cores.
        device (`str`, *optional*): Where the models run (`cpu`, `cuda`); a GPU if there is one.
        dtype (`str`): Number format of the models.
        compile (`bool`): Whether the quantizer is compiled.
        num_workers (`int`): Processes that read and decode ahead of the models.
        shard_index, num_shards (`int`): Which part of the work this job does, of how many jobs (array jobs). Under
            `torchrun` each part is divided further among the processes.
        push_to_hub (`str`, *optional*): Data set repository that the complete folder is uploaded to.
        private (`bool`): Whether a repository that is made is private.
        license (`str`, *optional*): Licence of the labels in the card, as the Hub names it.
    """

    model: str = field(metadata={"help": "Quantizer folder."})
    output: str = field(metadata={"help": "Folder to write."})
    format: str = field(
        default="parquet", metadata={"help": "A data set, or published files.", "choices": ["parquet", "jsonl"]}
    )
    vision_tokenizer: str | None = field(
        default=None, metadata={"help": "Vision tokenizer or policy folder: rows get its codes."}
    )
    action: bool = field(default=True, metadata={"help": "Whether rows get the action, where there is one."})
    image_size: int | None = field(default=None, metadata={"help": "Side of stored images; as recorded by default."})
    image_quality: int = field(default=95, metadata={"help": "Of stored JPEG images, 1 to 100."})
    keep_jpeg: bool = field(default=True, metadata={"help": "Store frames that are JPEG already as they are."})
    batch_size: int = field(default=64, metadata={"help": "Pairs encoded at a time."})
    episodes_per_unit: int = field(default=256, metadata={"help": "Most episodes of a file."})
    num_threads: int = field(default=1, metadata={"help": "Threads of torch, the same for all processes."})
    device: str | None = field(default=None, metadata={"help": "Where the models run; a GPU if there is one."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Number format of the models.", "choices": ["float32", "bfloat16", "float16"]},
    )
    compile: bool = field(default=False, metadata={"help": "Compile the quantizer."})
    num_workers: int = field(default=2, metadata={"help": "Processes that read ahead of the models."})
    shard_index: int = field(default=0, metadata={"help": "Which array job this is, from 0."})
    num_shards: int = field(default=1, metadata={"help": "How many array jobs there are."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to upload the folder to."})
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    license: str | None = field(default=None, metadata={"help": "Licence of the labels, for the card."})

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("episodes_per_unit", 1),
            ("num_threads", 1),
            ("num_workers", 0),
            ("num_shards", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"`image_size` must be at least 1, got {self.image_size}.")
        if not 1 <= self.image_quality <= 100:
            raise ValueError(f"`image_quality` must lie in [1, 100], got {self.image_quality}.")
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(f"`shard_index` must lie in [0, {self.num_shards - 1}], got {self.shard_index}.")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"`max_skipped` must lie in [0, 1], got {self.max_skipped}.")
        if self.format == "jsonl" and self.vision_tokenizer is None:
            raise ValueError("`format` 'jsonl' needs `vision_tokenizer`: published rows hold vision codes, no images.")


@dataclass
class PretrainArguments:
    """
    Arguments of `lapa pretrain`.

    Args:
        data (`str`): Folder that `lapa label` wrote (local or an fsspec URL), several with commas between them, a `.yaml`
            file with a list of folders and weights, or a published `.jsonl` file (image codes and `delta`).
        model (`str`, *optional*): Policy folder to train on. Without it a fresh trunk is made from the next three.
        policy_config (`dict` or `str`, *optional*): `LapaConfig` fields that differ from the released sizes.
        vision_tokenizer (`str`, *optional*): Vision tokenizer folder of a fresh policy.
        tokenizer (`str`, *optional*): Sentencepiece file of a fresh policy.
        cache_vision_codes (`bool`): Whether images that have no codes yet are encoded once, before training; the codes are
            kept below the output folder.
        eval_episodes (`int`): Last episodes of each folder (rows of a file), held out for evaluation.
        shuffle_buffer (`int`): Steps of folders that the next one is drawn from, in each loader worker.
        quantizer (`str`, *optional*): Quantizer folder that made the labels: checked against them, and named in the
            policy's record.
        replace_quantizer (`bool`): Whether a `model` that learned another quantizer's codes may learn these instead.
        dtype, attn_implementation (`str`, *optional*): How `model` is loaded.
    """

    data: str = field(metadata={"help": "Folders of labels (commas, or a .yaml mixture), or a published .jsonl file."})
    model: str | None = field(default=None, metadata={"help": "Policy folder to train on."})
    policy_config: dict | str | None = field(
        default=None, metadata={"help": "LapaConfig fields of a fresh policy: JSON, or a JSON or YAML file."}
    )
    vision_tokenizer: str | None = field(default=None, metadata={"help": "Vision tokenizer of a fresh policy."})
    tokenizer: str | None = field(default=None, metadata={"help": "Sentencepiece file of a fresh policy."})
    cache_vision_codes: bool = field(default=True, metadata={"help": "Encode images once, before training."})
    eval_episodes: int = field(default=0, metadata={"help": "Last episodes, held out for evaluation."})
    shuffle_buffer: int = field(default=4096, metadata={"help": "Steps that the next one is drawn from."})
    quantizer: str | None = field(default=None, metadata={"help": "Quantizer of the labels, to check and record it."})
    replace_quantizer: bool = field(
        default=False, metadata={"help": "Learn the codes of another quantizer than the model's."}
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype of the loaded model.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the loaded model."})


@dataclass(kw_only=True)
class FinetuneArguments(SourceArguments):
    """
    Arguments of `lapa finetune`, beside those of `SourceArguments` and of trl's `ModelConfig` (`use_peft`, `lora_r`,
    `dtype`, ...). `data` may also be a published `.jsonl` file (image codes and `raw_actions`). `frame_gap`,
    `frame_gap_seconds` and `filters` are about pairs of frames, of which there are none here.

    Args:
        model (`str`): Policy folder, latent-pretrained or with action rows.
        unnorm_key (`str`, *optional*): Name of the action bins of a single data set; its own name by default. Bins that the
            model's processor already has under it are kept.
        action_bins (`str`, *optional*): csv with bin edges in the published layout, instead of fitting them.
        num_bins (`int`, *optional*): Most bins per dimension; the model's `action_vocab_size` by default.
        gripper_dimension (`str`): `last`, `none`, or the index of the dimension that is open or closed.
        action_horizon (`int`, *optional*): Steps of one prediction; as in `model` by default.
        past_end (`str`): What becomes of a step whose chunk of actions leaves the episode: `drop` leaves it out, `repeat`
            fills up with the last action, `mask` too, but without a loss on what was filled up.
        use_proprio (`bool`, *optional*): Whether prompts tell the state of the robot; as in `model` by default.
        keep_latent_head (`bool`, *optional*): Whether the policy can still decode latent codes; as in `model` by
            default. The data of this command hold none to learn from: the head stays, the trunk under it moves.
        augmentation (`bool`): Whether training images are cropped and their colours changed at random, as published for
            real robots (`LapaImageAugmentation`). The saved processor crops the middle then.
        cache_vision_codes (`bool`): Whether images of a small data set (one source, at most 20,000 steps, or a published
            file) are encoded once, before training, and kept in memory. Larger ones, mixtures, chunks and augmented images
            are streamed, and encoded in each step.
        buffer_size (`int`): Steps that each loader worker keeps in memory to draw from, of streamed data.
        eval_episodes (`int`): Last episodes of each data set (rows of a file), held out for evaluation.
        eval_examples (`int`): Most steps of theirs that an evaluation takes, of streamed data.
    """

    model: str = field(metadata={"help": "Policy folder."})
    unnorm_key: str | None = field(default=None, metadata={"help": "Name of the action bins."})
    action_bins: str | None = field(default=None, metadata={"help": "csv with published bin edges."})
    num_bins: int | None = field(default=None, metadata={"help": "Most bins per action dimension."})
    gripper_dimension: str = field(default="last", metadata={"help": "`last`, `none`, or an index."})
    action_horizon: int | None = field(
        default=None, metadata={"help": "Steps of one prediction; as in the model by default."}
    )
    past_end: str = field(
        default="drop",
        metadata={"help": "Steps whose actions leave the episode.", "choices": ["drop", "repeat", "mask"]},
    )
    use_proprio: bool | None = field(
        default=None, metadata={"help": "`true` or `false`: whether prompts tell the robot's state; as in the model."}
    )
    keep_latent_head: bool | None = field(
        default=None,
        metadata={"help": "`true` or `false`: whether latent codes can still be decoded; as in `model` by default."},
    )
    augmentation: bool = field(default=False, metadata={"help": "Crop training images and change colours at random."})
    cache_vision_codes: bool = field(
        default=True, metadata={"help": "Encode the images of a small data set once, before training."}
    )
    buffer_size: int = field(default=512, metadata={"help": "Steps that a loader worker keeps to draw from."})
    eval_episodes: int = field(
        default=0, metadata={"help": "Last episodes of each data set, held out for evaluation."}
    )
    eval_examples: int = field(default=512, metadata={"help": "Most steps of them that an evaluation takes."})

    def __post_init__(self) -> None:
        if self.gripper_dimension not in ("last", "none") and not self.gripper_dimension.lstrip("-").isdigit():
            raise ValueError(f"`gripper_dimension` must be last, none or an index, got {self.gripper_dimension!r}.")
        if self.eval_examples < 1:
            raise ValueError(f"`eval_examples` must be at least 1, got {self.eval_examples}.")
        for name in ("frame_gap", "frame_gap_seconds", "filters"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` is about pairs of frames, finetuning reads single steps.")


__all__ = [
    "FinetuneArguments",
    "LabelArguments",
    "PretrainArguments",
    "QuantizerArguments",
    "SourceArguments",
    "read_config",
]
