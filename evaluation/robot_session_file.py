"""Session files of a real-robot evaluation: policies, tasks with partial credits, and the rollouts to play, as YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

# The three kinds of generalisation of the paper; a file may name others.
TYPE_TITLES = {
    "unseen_combinations": "seen objects in unseen combinations",
    "unseen_objects": "unseen objects",
    "unseen_instructions": "unseen instructions that need reasoning",
}
DEFAULT_ROLLOUTS = 6
# Blind labels are letters.
MAX_POLICIES = 26
POLICY_OPTIONS = {"unnorm_key": str, "do_sample": bool, "temperature": float, "replan_every": int}
PHOTO_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
MAX_PHOTO_BYTES = 20 << 20


@dataclass(frozen=True)
class Credit:
    """
    A step of a task that earns partial credit.

    Args:
        score (`float`): In (0, 1]; what a rollout gets that comes so far.
        text (`str`): What must have happened.
    """

    score: float
    text: str


@dataclass(frozen=True)
class Trial:
    """
    An initial position that every policy plays.

    Args:
        task, kind (`str`): Task, and type of generalisation.
        number (`int`): Among those of the same task and type, from 1.
        instruction (`str`): The sentence.
        position (`str`): How to set the scene; empty where the file does not say.
        photo (`str`, *optional*): Picture of it, absolute.
    """

    task: str
    kind: str
    number: int
    instruction: str
    position: str = ""
    photo: str | None = None


@dataclass(frozen=True)
class PolicyEntry:
    """
    A policy of a session.

    Args:
        name (`str`): In the report.
        location (`str`): Model folder or Hub name, or the URL of a server that speaks OpenVLA's protocol.
        options (`Mapping`): `unnorm_key`, `do_sample`, `temperature`, `replan_every`.
    """

    name: str
    location: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class SessionFile:
    """
    What is played in a session.

    Args:
        name (`str`): Of the session.
        policies (`tuple[PolicyEntry, ...]`): Who plays.
        credits (`Mapping[str, tuple[Credit, ...]]`): Of each task, rising to 1.
        trials (`tuple[Trial, ...]`): Initial positions in the order in which they are played.
        seed (`int`, *optional*): Of the order of the policies; drawn when the session begins if None.
        published (`Mapping`): Published numbers that stand beside the table.
    """

    name: str
    policies: tuple[PolicyEntry, ...]
    credits: Mapping[str, tuple[Credit, ...]]
    trials: tuple[Trial, ...]
    seed: int | None = None
    published: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form: what a result depends on."""
        return asdict(self)


def type_title(kind: str) -> str:
    """A type of generalisation in words."""
    return TYPE_TITLES.get(kind, kind.replace("_", " "))


def example_session() -> str:
    """The session file that comes with the package: the paper's three tasks and three types, six rollouts each."""
    return files(__package__).joinpath("templates", "robot_session_example.yaml").read_text(encoding="utf-8")


def load_session(path: Path) -> SessionFile:
    """
    Reads a session file. Photos are looked up beside it.

    Raises:
        ValueError: No such file, no YAML, or a key that is wrong; it is named.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"`session` names a file that does not exist: {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`session` ({path}) is no YAML: {error}") from error
    return _Reader(path).session(values)


class _Reader:
    """Checks the values of a session file; errors say which key of which file is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def session(self, values: Any) -> SessionFile:
        self.keys(values, "the file", {"policies", "tasks"}, {"name", "rollouts", "seed", "published"})
        seed = values.get("seed")
        if seed is not None and (type(seed) is not int or seed < 0):
            raise self.error("seed", "a whole number from 0", seed)
        rollouts = self.count("rollouts", values.get("rollouts", DEFAULT_ROLLOUTS))
        credits: dict[str, tuple[Credit, ...]] = {}
        trials: list[Trial] = []
        for task, entry in self.mapping("tasks", values["tasks"]).items():
            where = f"tasks.{task}"
            self.keys(entry, where, {"credits", "types"})
            credits[str(task)] = self.credits(f"{where}.credits", entry["credits"])
            for kind, cell in self.mapping(f"{where}.types", entry["types"]).items():
                trials += self.trials(f"{where}.types.{kind}", str(task), str(kind), cell, rollouts)
        return SessionFile(
            str(values.get("name", self.path.stem)),
            self.policies(values["policies"]),
            credits,
            tuple(trials),
            seed,
            self.mapping("published", values["published"]) if values.get("published") else None,
        )

    def policies(self, values: Any) -> tuple[PolicyEntry, ...]:
        entries = []
        for name, value in self.mapping("policies", values).items():
            where = f"policies.{name}"
            entry = {"location": value} if isinstance(value, str) else value
            self.keys(entry, where, {"location"}, set(POLICY_OPTIONS))
            options = {key: entry[key] for key in POLICY_OPTIONS if entry.get(key) is not None}
            for key, value in options.items():
                accepted = (int, float) if POLICY_OPTIONS[key] is float else (POLICY_OPTIONS[key],)
                if type(value) not in accepted:
                    raise self.error(f"{where}.{key}", f"of type {POLICY_OPTIONS[key].__name__}", value)
            entries.append(PolicyEntry(str(name), self.text(f"{where}.location", entry["location"]), options))
        if len(entries) > MAX_POLICIES:
            raise self.error("policies", f"at most {MAX_POLICIES} policies", len(entries))
        return tuple(entries)

    def credits(self, where: str, values: Any) -> tuple[Credit, ...]:
        scores = list(self.mapping(where, values))
        numbers = all(type(score) in (int, float) and 0 < score <= 1 for score in scores)
        if not numbers or scores != sorted(scores) or scores[-1] != 1:
            raise self.error(where, "scores in (0, 1] that rise to 1, each with what it is given for", scores)
        return tuple(Credit(float(score), self.text(f"{where}.{score}", text)) for score, text in values.items())

    def trials(self, where: str, task: str, kind: str, cell: Any, rollouts: int) -> list[Trial]:
        self.keys(cell, where, set(), {"instruction", "instructions", "positions", "rollouts"})
        if ("instruction" in cell) == ("instructions" in cell):
            raise self.error(where, "a mapping with either `instruction` or `instructions`", cell)
        sentences = cell.get("instructions", [cell.get("instruction")])
        if not isinstance(sentences, Sequence) or isinstance(sentences, str) or not sentences:
            raise self.error(f"{where}.instructions", "a list of sentences", sentences)
        sentences = [self.text(f"{where}.instructions", sentence) for sentence in sentences]
        count = self.count(f"{where}.rollouts", cell.get("rollouts", rollouts))
        positions = cell.get("positions") or [""] * count
        if not isinstance(positions, Sequence) or isinstance(positions, str) or len(positions) != count:
            raise self.error(f"{where}.positions", f"a list of {count}, one for each rollout", positions)
        if count % len(sentences):
            raise self.error(f"{where}.instructions", f"of a number that divides {count} rollouts", len(sentences))
        return [
            Trial(task, kind, number + 1, sentences[number % len(sentences)], *self.position(where, position))
            for number, position in enumerate(positions)
        ]

    def position(self, where: str, value: Any) -> tuple[str, str | None]:
        entry = {"text": value} if isinstance(value, str) else value
        self.keys(entry, f"{where}.positions", set(), {"text", "photo"})
        photo = entry.get("photo")
        if photo is not None:
            photo = str((self.path.parent / self.text(f"{where}.positions.photo", photo)).resolve())
            read_photo(Path(photo))
        return str(entry.get("text", "")), photo

    def mapping(self, where: str, values: Any) -> Mapping[Any, Any]:
        if not isinstance(values, Mapping) or not values:
            raise self.error(where, "a mapping with at least one entry", values)
        return values

    def keys(self, values: Any, where: str, required: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        if not isinstance(values, Mapping) or not required <= set(values) <= required | optional:
            told = f"a mapping with {', '.join(sorted(required)) or 'none but'}"
            if optional:
                told += f" (and {', '.join(sorted(optional))})"
            raise self.error(where, told, sorted(map(str, values)) if isinstance(values, Mapping) else values)

    def count(self, where: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= 1000:
            raise self.error(where, "a whole number from 1 to 1000", value)
        return value

    def text(self, where: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.error(where, "a text", value)
        return value.strip()

    def error(self, where: str, wanted: str, got: Any) -> ValueError:
        shown = repr(got)
        shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
        return ValueError(f"`session` ({self.path}): `{where}` must be {wanted}, got {shown}.")


def read_photo(path: Path) -> tuple[bytes, str]:
    """
    A photo of an initial position, and its media type.

    Raises:
        ValueError: No file, one that is neither PNG nor JPEG, or one above 20 MiB.
    """
    if not path.is_file():
        raise ValueError(f"a photo of the session does not exist: {path}.")
    if path.stat().st_size > MAX_PHOTO_BYTES:
        raise ValueError(f"a photo of the session is larger than {MAX_PHOTO_BYTES >> 20} MiB: {path}.")
    content = path.read_bytes()
    for start, media_type in PHOTO_TYPES.items():
        if content.startswith(start):
            return content, media_type
    raise ValueError(f"a photo of the session is neither PNG nor JPEG: {path}.")


__all__ = [
    "Credit",
    "PolicyEntry",
    "SessionFile",
    "Trial",
    "example_session",
    "load_session",
    "read_photo",
    "type_title",
]
