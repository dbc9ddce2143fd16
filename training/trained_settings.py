"""What a quantizer was trained with: written beside it, and taken up where data are paired for it again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapa.data.mixture import FramePairSource, FramePairStream
    from lapa.data.open_source import MixtureEntry
    from lapa.training.script_arguments import QuantizerArguments, SourceArguments

SETTINGS_FILE = "training_settings.json"
GAPS = ("frame_gap", "frame_gap_seconds")
NAMES = (*GAPS, "frequency", "camera")


def training_settings(script_args: "QuantizerArguments", stream: "FramePairStream") -> dict[str, Any]:
    """
    What a training read, for `SETTINGS_FILE`.

    Args:
        script_args: Of the training.
        stream: Of its pairs.

    Returns:
        `frame_gap` or `frame_gap_seconds`, `frequency` and `camera` that were used, also where they were a default or stood
        in a mixture. What differed between the sources is None and named in `different`. `mixture` has all that the pairs
        depended on.
    """
    description = stream.description()
    sources = description["sources"]
    used = {
        "gap": [tuple(source[name] for name in GAPS) for source in sources],
        "frequency": [source["options"].get("frequency") for source in sources],
        "camera": [source["camera"] for source in sources],
    }
    same = {name: values[0] if len(set(values)) == 1 else None for name, values in used.items()}
    gap = same.pop("gap") or (None, None)
    if same["camera"] is None:
        # The name of a role (`primary`) stands for a camera of each data set.
        same["camera"] = script_args.camera
    different = [name for name, values in used.items() if len(set(values)) > 1 and not same.get(name)]
    more = {"different": different, "filters": script_args.filters, "data": script_args.data, "mixture": description}
    return {**dict(zip(GAPS, gap)), **same, **more}


def read_training_settings(model: str) -> dict[str, Any]:
    """
    What stands beside a quantizer; empty where there is nothing.

    Raises:
        ValueError: A file that is damaged.
    """
    path = Path(model) / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping.")
    return settings


def open_as_trained(
    arguments: "SourceArguments", settings: Mapping[str, Any]
) -> "tuple[tuple[FramePairSource, ...], list[str]]":
    """
    The sources, with gap, frequency and camera of the training where neither the arguments nor a mixture say anything.

    Each is decided by itself, for every source: a gap fits all; a frequency those whose kind takes one; a camera those that
    have it.

    Args:
        arguments: Which sources.
        settings: As of `read_training_settings`.

    Returns:
        The sources, and what was recorded that they could not take or what was not the same in the whole training, in words.

    Raises:
        ValueError: As `lapa.data.open_source.open_mixture`.
    """
    from lapa.data.open_source import open_pair_source

    recorded = {name: settings[name] for name in NAMES if settings.get(name) is not None}
    sources, notes = [], []
    for entry in arguments.source_entries():
        try:
            options, more = _with_settings(entry, recorded)
            pairs = open_pair_source(options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{entry.where}: {error}" if entry.where else str(error)) from error
        pairs.source.warnings = (*pairs.source.warnings, *entry.notes)
        sources.append(pairs)
        notes += [f"the quantizer was trained with {note}" for note in more]
        notes += _differences(entry, settings, pairs)
    return tuple(sources), notes


def _with_settings(entry: "MixtureEntry", recorded: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of a source with what was recorded, and what does not fit it."""
    from lapa.data.open_source import source_kind, source_options

    options: dict[str, Any] = dict(entry.options)
    notes: list[str] = []
    if not isinstance(options.get("path"), (str, Path)):
        # Opening it says what is wrong.
        return options, notes
    if all(options.get(name) is None for name in GAPS):
        options.update({name: recorded[name] for name in GAPS if name in recorded})
    if "frequency" in recorded and options.get("frequency") is None:
        kind = options.get("kind") or source_kind(str(options["path"]))
        options["kind"] = kind
        if "frequency" in source_options(kind):
            options["frequency"] = recorded["frequency"]
        else:
            notes.append(
                f"frequency {recorded['frequency']}, which {options['path']} takes none of: it tells its times"
            )
    if "camera" in recorded and options.get("camera") is None and options.get("cameras") is None:
        if _has_camera(options, recorded["camera"]):
            options["camera"] = recorded["camera"]
        else:
            notes.append(f"camera {recorded['camera']}, which {options['path']} lacks: its own is read")
    return options, notes


def _options_of(entry: "MixtureEntry") -> tuple[str, ...]:
    from lapa.data.open_source import source_kind, source_options

    return source_options(entry.options.get("kind") or source_kind(str(entry.options["path"])))


def _has_camera(options: Mapping[str, Any], camera: str) -> bool:
    """Whether a source has a camera of this name, or one that plays the role."""
    from lapa.data.open_source import open_source
    from lapa.data.rlds import RldsSource

    pairs = ("weight", "camera", "frame_gap", "filters")
    source = open_source({name: value for name, value in options.items() if name not in pairs})
    roles = source.dataset.cameras if isinstance(source, RldsSource) and source.dataset is not None else {}
    return camera in source.cameras or camera in roles


def _differences(entry: "MixtureEntry", settings: Mapping[str, Any], pairs: "FramePairSource") -> list[str]:
    """What had no single value in the training, so that a source takes its own."""
    different: Any = settings.get("different")
    different, notes = different if isinstance(different, list) else [], []
    if "gap" in different and all(entry.options.get(name) is None for name in GAPS):
        gap = f"{pairs.gap.frames} frames" if pairs.gap.frames is not None else f"{pairs.gap.seconds:g} s"
        notes.append(f"the quantizer was trained with several gaps; {pairs.name} is paired by its own, {gap}")
    if "camera" in different and entry.options.get("camera") is None:
        notes.append(f"the quantizer was trained with several cameras; of {pairs.name} {pairs.chosen_camera} is read")
    if "frequency" in different and entry.options.get("frequency") is None and "frequency" in _options_of(entry):
        notes.append(f"the quantizer was trained with several frequencies; that of {pairs.name} is not said")
    return notes


__all__ = ["SETTINGS_FILE", "open_as_trained", "read_training_settings", "training_settings"]
