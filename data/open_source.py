"""Opens whatever holds robot or human video, and mixtures of them."""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lapa.data.episode_source import EpisodeSource

if TYPE_CHECKING:
    from lapa.data.mixture import FramePairSource
    from lapa.data.open_x import OpenXDataset
    from lapa.data.pair_filters import PairFilter

MIXTURE_ENDINGS = (".yaml", ".yml", ".json")
# Options that say the same thing in two ways: where a source of a mixture has one of them, neither is taken from outside.
SAME_MEANING = (("frame_gap", "frame_gap_seconds"), ("camera", "cameras"))


class SourceKind(NamedTuple):
    """A format: the class that reads it (imported when it is needed), and what it is recognised by."""

    module: str
    class_name: str
    sign: str

    def load(self) -> type[EpisodeSource]:
        """The class."""
        source_class: type[EpisodeSource] = getattr(import_module(self.module), self.class_name)
        return source_class


# In the order in which a path is tried: a folder of one of the first three holds videos or images, too.
SOURCE_KINDS = {
    "rlds": SourceKind("lapa.data.rlds", "RldsSource", "features.json and dataset_info.json in the folder"),
    "lerobot": SourceKind("lapa.data.lerobot_format", "LeRobotSource", "meta/info.json in the folder"),
    "something_something": SourceKind(
        "lapa.data.something_something",
        "SomethingSomethingSource",
        "20bn-something-something-v2 (a folder, or parts of the archive) or something-something-v2-*.json",
    ),
    "videos": SourceKind(
        "lapa.data.folders", "VideoFolderSource", "a video, or videos in the folder or not far below"
    ),
    "frames": SourceKind("lapa.data.folders", "FrameFolderSource", "images in folders not far below"),
}

SourceSpec = str | Path | Mapping[str, Any]


def open_source(spec: SourceSpec, **options: Any) -> EpisodeSource:
    """
    Opens a data set of any format that is known.

    ```python
    >>> open_source("bridge_rlds/1.0.0", split="train").num_episodes
    25
    >>> open_source({"path": "clips", "kind": "videos", "frame_gap_seconds": 1.2}).cameras
    ('video',)
    ```

    Args:
        spec: A local path or fsspec URL, or a mapping with `path`, optionally `kind` (one of `SOURCE_KINDS`, or
            `package.module:ClassName` for a reader of one's own, see `own_kind`) and the options of that kind. Without a
            kind it is told by what the folder holds.
        options: Options of the source (`split`, `cameras`, `frame_gap_seconds`, ...); they win over those of `spec`.

    Returns:
        The source, with everything checked that can be without reading an episode.

    Raises:
        ValueError: A path of no known format, an unknown kind, an option that the kind does not have, and what the source
            itself refuses.
    """
    if isinstance(spec, Mapping):
        if not isinstance(spec.get("path"), (str, Path)):
            raise ValueError(f"a source must name its `path`, got {dict(spec)}.")
        options = {**{name: value for name, value in spec.items() if name != "path"}, **options}
        spec = spec["path"]
    path, kind = str(spec), options.pop("kind", None)
    if kind is None:
        kind = source_kind(path)
    known = source_options(kind)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is no option of {path}, which is of kind {kind!r}; it has {', '.join(known)}."
        )
    cameras = options.get("cameras")
    if cameras is not None and (isinstance(cameras, str) or not isinstance(cameras, Sequence)):
        raise ValueError(f"`cameras` must be a list of names, got {cameras!r}.")
    made: Any = source_class(kind)
    source: EpisodeSource = made(path, **options)
    source.options = recorded_options(kind, options)
    return source


# Options that a source tells in another way: by its name, its shards, or the camera and gap of what reads it.
TOLD_OTHERWISE = ("split", "cameras", "frame_gap_seconds")


def recorded_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a source is opened with, as it is recorded and compared with what an earlier run recorded.

    Args:
        kind: Of the source.
        options: As it takes them.

    Returns:
        Those that are not the default, by name, as JSON has them.
    """
    parameters = inspect.signature(source_class(kind)).parameters
    changed = {
        name: value
        for name, value in sorted(options.items())
        if name not in TOLD_OTHERWISE and value != parameters[name].default
    }
    recorded: dict[str, Any] = json.loads(json.dumps(changed, default=_recorded_value))
    return recorded


def _recorded_value(value: Any) -> str:
    """A path, or a function by its name: its address changes from run to run."""
    if callable(value):
        return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    return str(value)


def source_class(kind: str) -> type[EpisodeSource]:
    """
    The class that reads a kind.

    Args:
        kind: One of `SOURCE_KINDS`, or `package.module:ClassName`.

    Raises:
        ValueError: Another kind.
    """
    if isinstance(kind, str) and ":" in kind:
        return own_kind(kind)
    if kind not in SOURCE_KINDS:
        raise ValueError(
            f"`kind` must be one of {', '.join(SOURCE_KINDS)}, or package.module:ClassName, got {kind!r}."
        )
    return SOURCE_KINDS[kind].load()


def own_kind(kind: str) -> type[EpisodeSource]:
    """
    A reader that is not part of lapa: a subclass of `EpisodeSource` that Python finds by the name of its module.

    It takes the path, and its options as keyword-only arguments: at least `cameras`, better all that every kind has
    (`split`, `frame_gap_seconds`, `embodiment`, `unnorm_key`). To name one is to run its code, so it is only ever named by
    who runs a command or wrote a mixture: nothing that lies in a data set is imported.

    Args:
        kind: `package.module:ClassName`.

    Raises:
        ValueError: No such module or class, or a class that is no source.
    """
    module_name, _, class_name = kind.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise ValueError(f"`kind` must read package.module:ClassName, got {kind!r}.")
    try:
        found: Any = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`kind` {kind!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, EpisodeSource)):
        raise ValueError(f"`kind` {kind!r} is no subclass of lapa.data.episode_source.EpisodeSource.")
    return found


def source_options(kind: str) -> tuple[str, ...]:
    """Names of the options that sources of a kind take."""
    parameters = inspect.signature(source_class(kind)).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def source_kind(path: str) -> str:
    """
    The kind of what lies at a path.

    Raises:
        ValueError: None of the kinds that are known; what was looked for is listed.
    """
    exists = _exists(path)
    for kind, entry in SOURCE_KINDS.items():
        reader: Any = entry.load()
        if reader.recognises(path):
            return kind
    if not exists:
        raise ValueError(f"{path} does not exist.")
    looked = "; ".join(f"{kind}: {entry.sign}" for kind, entry in SOURCE_KINDS.items())
    raise ValueError(f"{path} is no data set of a known kind (looked for {looked}).")


def _exists(path: str) -> bool:
    """Whether something is there; a URL that cannot be asked is an error, which no format's own look would tell from no."""
    from fsspec.core import url_to_fs

    try:
        system, inner = url_to_fs(path)
        return bool(system.exists(inner))
    # A file system raises whatever the client raises that it talks through.
    except Exception as error:
        raise ValueError(f"{path} cannot be opened: {error or type(error).__name__}") from error


def is_mixture(spec: Any) -> bool:
    """Whether a specification is that of a mixture: a list of sources, or the name of a YAML or JSON file."""
    if isinstance(spec, (str, Path)):
        return str(spec).endswith(MIXTURE_ENDINGS)
    return isinstance(spec, Sequence)


def open_pair_source(spec: SourceSpec, **options: Any) -> "FramePairSource":
    """
    Opens a data set for its pairs of frames; of its cameras only the one whose frames are read.

    Args:
        spec: As for `open_source`; a mapping may also have `weight` (1 where it is not said), `camera`, `frame_gap`, and
            `filters` (see `read_filters`).
        options: Any of these; they win over those of `spec`.

    Raises:
        ValueError: As `open_source`, and a weight, camera, gap or filter that cannot be.
    """
    from lapa.data.mixture import FramePairSource

    options = {**(dict(spec) if isinstance(spec, Mapping) else {"path": spec}), **options}
    pairs = {name: options.pop(name, None) for name in ("weight", "camera", "frame_gap", "filters")}
    weight, camera, frame_gap = (pairs[name] for name in ("weight", "camera", "frame_gap"))
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ValueError(f"`weight` must be a number above 0, got {weight!r}.")
    if frame_gap is not None and type(frame_gap) is not int:
        raise ValueError(f"`frame_gap` must be a number of frames, got {frame_gap!r}.")
    if frame_gap is not None and options.get("frame_gap_seconds") is not None:
        raise ValueError(
            f"`frame_gap` ({frame_gap}) and `frame_gap_seconds` ({options['frame_gap_seconds']}) exclude each other; "
            "give one."
        )
    filters = read_filters(pairs["filters"])
    if camera is not None:
        options.setdefault("cameras", [camera])
    source = open_source(options)
    if camera is not None and camera not in source.cameras and len(source.cameras) == 1:
        # It was named by its role.
        camera = source.cameras[0]
    if len(source.cameras) > 1 and options.get("cameras") is None:
        # The others need not be read.
        source = open_source(options, cameras=[source.cameras[0]])
    return FramePairSource(source, float(weight), camera, frame_gap, filters=filters)


def open_mixture(spec: str | Path | Sequence[SourceSpec], **options: Any) -> "tuple[FramePairSource, ...]":
    """
    Opens the sources of a mixture.

    ```yaml
    - path: bridge_rlds/1.0.0        # relative to the folder of this file
      weight: 2
      camera: image_0
    - path: 20bn-something-something-v2
      kind: something_something
      frame_gap_seconds: 2.4
      filters: [static, {shot_cut: {max_distance: 0.4}}]
    - open_x: magic_soup_plus        # a published mixture of Open X-Embodiment
      path: open_x                   # the folder (or URL) that holds the folders of its data sets
      allow_missing: true
    ```

    Args:
        spec: A YAML or JSON file with a list of sources, or such a list. A source is a path or a mapping of `path`,
            `kind`, `weight` (1 where it is not said), `camera` (its name, or `primary`, `secondary` or `wrist` of an Open-X
            data set), `frame_gap`, `filters` (see `read_filters`) and the options of its kind. With `open_x` it stands for
            all data sets of a published mixture, which are looked for below `path` by their names, each with its published
            weight (times `weight`) and with the other options; those that are absent are an error, or with
            `allow_missing: true` left out and named in the `warnings` of the first source.
        options: Any of these, for all sources that do not say otherwise themselves.

    Returns:
        The sources in order, as a `FramePairStream` takes them.

    Raises:
        ValueError: A file that is no such list, an unknown key, and what `open_source` refuses; the source is named.
    """
    sources = []
    for entry in mixture_entries(spec, **options):
        try:
            pairs = open_pair_source(entry.options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{entry.where}: {error}") from error
        pairs.source.warnings = (*pairs.source.warnings, *entry.notes)
        sources.append(pairs)
    return tuple(sources)


class MixtureEntry(NamedTuple):
    """
    One data set of a mixture, not opened yet.

    Args:
        where (`str`): Which one it is, for messages.
        options (`dict`): As `open_pair_source` takes them.
        notes (`tuple[str, ...]`): Warnings about the mixture that come with it.
    """

    where: str
    options: dict[str, Any]
    notes: tuple[str, ...] = ()


def mixture_entries(spec: str | Path | Sequence[SourceSpec], **options: Any) -> list[MixtureEntry]:
    """
    The data sets of a mixture, without opening one; arguments as of `open_mixture`.

    Raises:
        ValueError: A file that is no list of sources, or a mixture of Open X-Embodiment that is not there.
    """
    folder, entries = "", spec
    if isinstance(spec, (str, Path)):
        folder, entries = str(Path(spec).parent), _read_list(Path(spec))
    if not isinstance(entries, Sequence) or isinstance(entries, (str, bytes)) or not entries:
        raise ValueError(f"a mixture must be a list of at least one source, got {type(entries).__name__} {entries!r}.")
    found = []
    for number, entry in enumerate(entries, start=1):
        own = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
        where, path = f"source {number} of the mixture ({own.get('path')})", own.get("path")
        if folder and isinstance(path, (str, Path)) and "://" not in str(path):
            own["path"] = os.path.join(folder, str(path))
        decided = {name for names in SAME_MEANING if own.keys() & set(names) for name in names}
        own = {**{name: value for name, value in options.items() if name not in decided}, **own}
        try:
            found += _open_x_entries(where, own) if "open_x" in own else [MixtureEntry(where, own)]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    return found


def _open_x_entries(where: str, entry: Mapping[str, Any]) -> list[MixtureEntry]:
    """The data sets of a mixture of Open X-Embodiment, from below `path`."""
    from lapa.data.open_x import open_x_mixture

    options = {
        name: value for name, value in entry.items() if name not in ("open_x", "path", "allow_missing", "weight")
    }
    name, root, allow_missing = entry["open_x"], entry.get("path"), entry.get("allow_missing", False)
    weight = entry.get("weight", 1.0)
    if not isinstance(root, (str, Path)):
        raise ValueError(f"`open_x` needs the `path` that holds the folders of its data sets, got {root!r}.")
    if not isinstance(allow_missing, bool):
        raise ValueError(f"`allow_missing` must be true or false, got {allow_missing!r}.")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ValueError(f"`weight` must be a number above 0, got {weight!r}.")
    rows = open_x_mixture(name)
    folders = [_open_x_folder(str(root), row) for row in rows]
    missing = [row.name for row, folder in zip(rows, folders) if folder is None]
    if missing and (not allow_missing or len(missing) == len(rows)):
        hint = "" if len(missing) == len(rows) else " (`allow_missing: true` leaves them out)"
        raise ValueError(
            f"{root} lacks {len(missing)} of the {len(rows)} data sets of {name}{hint}: {', '.join(missing)}."
        )
    found = []
    for row, folder in zip(rows, folders):
        if folder is not None:
            assert row.weight is not None
            own = {"path": folder, "kind": "rlds", **options, "weight": row.weight * weight}
            found.append(MixtureEntry(f"{where}: {row.name}", own))
    if missing:
        note = f"{len(missing)} data sets of {name} are left out, which {root} lacks: {', '.join(missing)}"
        found[0] = found[0]._replace(notes=(note,))
    return found


def _open_x_folder(root: str, row: "OpenXDataset") -> str | None:
    """Where a data set lies: in the version that the table is of, or else in whichever there is."""
    from lapa.data.tfds_folder import FEATURES_FILE, newest_version

    for name in (row.name, *row.aliases):
        folder = f"{root.rstrip('/')}/{name}"
        for candidate in [f"{folder}/{version}" for version in reversed(row.versions)]:
            if _exists(f"{candidate}/{FEATURES_FILE}"):
                return candidate
        newest = newest_version(folder)
        if _exists(f"{newest}/{FEATURES_FILE}"):
            return newest
    return None


def read_filters(spec: Any) -> "tuple[PairFilter, ...]":
    """
    Filters of pairs from their names.

    Args:
        spec: None, a comma-separated text, or a list of names (`static`, `shot_cut`, `blank`) and of mappings from a name
            to its arguments, as `{"static": {"min_change": 0.01}}`.

    Raises:
        ValueError: An unknown name or argument.
    """
    from lapa.data.pair_filters import BlankFrames, PairFilter, ShotCuts, StaticPairs, check_filters

    known: dict[str, Any] = {item.name: item for item in (StaticPairs, ShotCuts, BlankFrames)}
    entries: Any = spec.split(",") if isinstance(spec, str) else spec or []
    if not isinstance(entries, Sequence):
        raise ValueError(f"`filters` must be a list of {', '.join(known)}, got {spec!r}.")
    filters: list[PairFilter] = []
    for entry in entries:
        if isinstance(entry, PairFilter):
            filters.append(entry)
            continue
        name, arguments = next(iter(entry.items())) if isinstance(entry, Mapping) and len(entry) == 1 else (entry, {})
        name = name.strip() if isinstance(name, str) else name
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"`filters` must hold some of {', '.join(known)}, got {entry!r}.")
        accepted = inspect.signature(known[name]).parameters
        if not isinstance(arguments, Mapping) or set(arguments) - set(accepted):
            raise ValueError(f"filter {name!r} takes {', '.join(accepted)}, got {arguments!r}.")
        filters.append(known[name](**arguments))
    return check_filters(filters)


def _read_list(path: Path) -> Any:
    if path.suffix not in MIXTURE_ENDINGS:
        raise ValueError(f"{path} is no mixture: its name must end in {', '.join(MIXTURE_ENDINGS)}.")
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


__all__ = [
    "SOURCE_KINDS",
    "MixtureEntry",
    "SourceKind",
    "SourceSpec",
    "is_mixture",
    "mixture_entries",
    "open_mixture",
    "open_pair_source",
    "open_source",
    "own_kind",
    "read_filters",
    "recorded_options",
    "source_class",
    "source_kind",
    "source_options",
]
