"""A study: methods trained on the same data, steps and seeds, and played on the same starts. One YAML file each in `studies/`.

A study trains what it compares; a suite (`suites.py`) plays what is there. `lapa evaluate --suite NAME` takes either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapa.evaluation.demo_settings import DemoSettings

if TYPE_CHECKING:
    from lapa.evaluation.study_worlds import World

KEYS = {
    "title",
    "world",
    "seeds",
    "settings",
    "columns",
    "methods",
    "points",
    "splits",
    "published",
    "quick",
    "claims",
}
REQUIRED = {"title", "seeds", "columns", "methods", "splits"}


@dataclass(frozen=True)
class StudySettings(DemoSettings):
    """
    Sizes and schedules of a study: the demo's, and what the other methods and worlds need. `families` are the tasks of the
    study's world; `num_blocks` and `thresholds` are of the tabletop alone.

    Args:
        rollouts_per_family: Reported episodes per family and split.
        validation_rollouts: Episodes per family on which each policy's finetuning and temperature are chosen.
        temperatures: Of sampling; candidates, the same for all methods.
        finetuning_candidates: Steps and learning rate of the finetunings that are tried, the same for all methods. Which
            one is played, and at which temperature, is chosen on the validation episodes.
        inverse_dynamics_steps, video_model_steps: Optimizer steps of VPT's and UniPi's models.
        inverse_dynamics_sizes: Channels of the stages of the former.
        video_model_finetuning_steps: Steps that UniPi's video model goes on with on the labelled episodes.
        video_model_batch_size, video_model_learning_rate, video_model_options: Of its training; the last are fields of its
            config.
        held_out_episodes: Labelled episodes per family on which token accuracy is measured; never trained on.
        tokenizer_episodes, tokenizer_codes, tokenizer_steps: Episodes per family, codebook size and optimizer steps of the
            image tokenizer, in a world for which none comes with the package.
        action_repeat, max_steps: Of MetaWorld: simulator steps (80 per second) that an action is held for, and after which an
            episode is cut off.
    """

    quantizer_options: dict[str, Any] = field(default_factory=dict)  # additive injection, where a method does not say
    rollouts_per_family: int = 60
    validation_rollouts: int = 20
    temperatures: tuple[float, ...] = (0.5, 1.0)
    finetuning_candidates: tuple[tuple[int, float], ...] = ((60, 3e-4), (60, 2e-3), (300, 1e-3))
    inverse_dynamics_steps: int = 800
    inverse_dynamics_sizes: tuple[int, ...] = (32, 64)
    video_model_steps: int = 1700
    video_model_finetuning_steps: int = 150
    video_model_batch_size: int = 32
    video_model_learning_rate: float = 2e-3
    video_model_options: dict[str, Any] = field(
        default_factory=lambda: {
            "num_frames": 2,
            "patch_size": 2,
            "block_out_channels": [32, 48, 64],
            "cross_attention_levels": [2],
            "attention_head_dim": 16,
            "text_hidden_size": 48,
            "text_num_layers": 1,
            "max_text_length": 24,
            "num_inference_steps": 5,
        }
    )
    held_out_episodes: int = 20
    tokenizer_episodes: int = 10
    tokenizer_codes: int = 256
    tokenizer_steps: int = 1000
    action_repeat: int = 5
    max_steps: int = 250


@dataclass(frozen=True)
class Method:
    """
    How a policy comes about.

    Args:
        label: For readers.
        targets: What stage 2 predicts: None (no stage 2), `"codes"`, `"pseudo_actions"`, `"actions"`, or `"frames"`: no
            policy at all but a video model that draws what it would see.
        quantizer_options: Fields of the quantizer's config that differ.
        keep_latent_head: Whether finetuning goes on to predict codes beside actions.
        decode_codes: No finetuning: the labelled steps train a decoder of the codes that stage 2 predicts.
    """

    label: str
    targets: str | None
    quantizer_options: Mapping[str, Any] = field(default_factory=dict)
    keep_latent_head: bool = False
    decode_codes: bool = False


PUBLISHED_QUANTIZER = {"action_injection": "cross_attention"}
METHODS = {
    "scratch": Method("Scratch", None),
    "unipi": Method("UniPi", "frames"),
    "vpt": Method("VPT", "pseudo_actions"),
    "lapa": Method("LAPA", "codes", PUBLISHED_QUANTIZER),
    "lapa-decoder": Method("LAPA, codes decoded", "codes", PUBLISHED_QUANTIZER, decode_codes=True),
    "actionvla": Method("ActionVLA", "actions"),
    "lapa-additive": Method("LAPA, additive injection", "codes"),
    "lapa-additive-decoder": Method("LAPA, additive injection, codes decoded", "codes", decode_codes=True),
    "lapa-additive-vq": Method("LAPA, additive injection, plain VQ", "codes", {"quantizer": "vq"}),
    "lapa-additive-no-stop-gradient": Method(
        "LAPA, additive injection, first frame not detached", "codes", {"stop_gradient_first_frame": False}
    ),
    "lapa-additive-keep-latent-head": Method(
        "LAPA, additive injection, latent head kept", "codes", keep_latent_head=True
    ),
}


@dataclass(frozen=True)
class Column:
    """
    A setting of the table.

    Args:
        name: Such as `in-domain`.
        video: Embodiment of the pretraining video, one of the study's world.
        labelled: Families of the labelled episodes; played are all of the study's.
    """

    name: str
    video: str
    labelled: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """
    A point of a scaling curve: settings that differ, and where it lies.

    Args:
        series: Name of the curve.
        value: Its place on the axis.
        settings: Fields of [`StudySettings`] that differ.
    """

    series: str
    value: float
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """
    What is trained, with which seeds, and what is played.

    Args:
        name: Of the file.
        title: For readers.
        settings: Sizes and schedules.
        seeds: Training seeds; each has data, initialisation and training of its own.
        columns: Settings of the table.
        methods: Keys of `METHODS`.
        splits: Of the world: `seen`, in the tabletop also `unseen`.
        points: Of scaling curves; every method is trained at every point. Empty for a table.
        published: Reference numbers in percent, `{method: {column: [seen, unseen]}}`, or free text.
        claims: Pairs of methods; the report says for each whether the first is above the second with separated intervals.
        world: Key of `study_worlds.WORLDS`: where all this takes place.
    """

    name: str
    title: str
    settings: StudySettings
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]
    methods: tuple[str, ...]
    splits: tuple[str, ...]
    points: tuple[Point, ...] = ()
    published: Mapping[str, Any] = field(default_factory=dict)
    claims: tuple[tuple[str, str], ...] = ()
    world: str = "tabletop"

    def at(self, point: Point | None) -> StudySettings:
        """Settings at a point."""
        return self.settings if point is None else _override(self.settings, point.settings, f"point {point.series}")


def study_names() -> list[str]:
    """Studies that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in files(__package__).joinpath("studies").iterdir())


def is_study(name: str) -> bool:
    """Whether `--suite NAME` names a study: one of the package's, or a YAML file that has `methods`."""
    import yaml

    if name in study_names():
        return True
    if not name.endswith((".yaml", ".yml")) or not Path(name).is_file():
        return False
    try:
        values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return False  # the suite's loader says what is wrong
    return isinstance(values, Mapping) and "methods" in values


def load_study(name: str, quick: bool = False, **changes: Any) -> Study:
    """
    A study by its name, or from a YAML file of one's own.

    Args:
        name: Of the study.
        quick: Take the small variant that the file describes under `quick`.
        changes: `seeds` and `methods` that replace the file's, where not None.

    Raises:
        ValueError: A file that is no study; the key is named.
    """
    import yaml

    from lapa.evaluation.study_worlds import WORLDS

    path: Any = Path(name) if name.endswith((".yaml", ".yml")) else files(__package__) / "studies" / f"{name}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, Mapping) or not REQUIRED <= set(values) <= KEYS:
        raise ValueError(
            f"{path} must be a mapping with {', '.join(sorted(REQUIRED))} and nothing but {', '.join(sorted(KEYS))}."
        )
    values = dict(values)
    settings = _override(StudySettings(), values.pop("settings", None) or {}, f"{path}: `settings`")
    if quick:
        small = dict(values.get("quick") or {})
        if not small:
            raise ValueError(f"{path} has no `quick` variant.")
        settings = _override(settings, small.pop("settings", {}), f"{path}: `quick.settings`")
        values |= small
    values |= {key: value for key, value in changes.items() if value is not None}
    (name_of_world,) = _choices("world", [values.get("world", "tabletop")], WORLDS, path)
    world = WORLDS[name_of_world]
    _choices("settings.families", settings.families, world.families, path)
    return Study(
        name=Path(name).stem + ("-quick" if quick else ""),
        title=str(values["title"]),
        settings=settings,
        seeds=_seeds(values["seeds"], path),
        columns=tuple(_column(name, entry, settings, world, path) for name, entry in values["columns"].items()),
        methods=_choices("methods", values["methods"], METHODS, path),
        splits=_choices("splits", values["splits"], world.splits, path),
        points=_points(values.get("points") or {}, path),
        published=values.get("published") or {},
        claims=tuple((str(first), str(second)) for first, second in values.get("claims") or ()),
        world=name_of_world,
    )


def _seeds(values: Any, path: Any) -> tuple[int, ...]:
    seeds = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    if (
        not seeds
        or any(type(seed) is not int or not 0 <= seed < 100 for seed in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise ValueError(f"{path}: `seeds` must be different whole numbers in [0, 99], got {values!r}.")
    return seeds


def _choices(key: str, values: Any, known: Any, path: Any) -> tuple[str, ...]:
    wanted = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    unknown = [value for value in wanted if value not in known]
    if not wanted or unknown:
        raise ValueError(f"{path}: `{key}` must be a list out of {', '.join(known)}, got {values!r}.")
    return wanted


def _column(name: str, entry: Any, settings: StudySettings, world: "World", path: Any) -> Column:
    if not isinstance(entry, Mapping) or set(entry) != {"video", "labelled"}:
        raise ValueError(f"{path}: `columns.{name}` must have `video` and `labelled`, got {entry!r}.")
    if entry["video"] not in world.embodiments:
        raise ValueError(
            f"{path}: `columns.{name}.video` must be one of {', '.join(world.embodiments)}, got {entry['video']!r}."
        )
    labelled = settings.families if entry["labelled"] == "all" else entry["labelled"]
    return Column(str(name), entry["video"], _choices(f"columns.{name}.labelled", labelled, settings.families, path))


def _points(values: Mapping[str, Any], path: Any) -> tuple[Point, ...]:
    points = []
    for series, entries in values.items():
        for entry in entries:
            if not isinstance(entry, Mapping) or set(entry) != {"value", "settings"}:
                raise ValueError(f"{path}: entries of `points.{series}` must have `value` and `settings`.")
            points.append(Point(str(series), float(entry["value"]), entry["settings"]))
    return tuple(points)


def _override(settings: StudySettings, values: Mapping[str, Any], where: str) -> StudySettings:
    known = {entry.name: getattr(settings, entry.name) for entry in fields(settings)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    # YAML has lists where the settings have tuples.
    return replace(settings, **{name: tuple(v) if isinstance(known[name], tuple) else v for name, v in values.items()})


__all__ = ["METHODS", "Column", "Method", "Point", "Study", "StudySettings", "is_study", "load_study", "study_names"]
