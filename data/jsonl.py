"""The published data files: JSON rows of image codes and latent action codes, or of image codes and robot actions.

One row is one step. `.jsonl` has a row per line, `.json` one array of rows; either may be gzipped (`.gz`). A latent row,
as the published labelling script writes it:

```json
{"image": "data/images/traj0/img_00000.jpg", "vision": [54, 40, ...], "instruction": "<s> You are a helpful assistant. USER: What action should the robot take to `push the block` ASSISTANT:", "delta": ["5", "4", "4", "7"], "fields": "[instruction],[vision],delta"}
```

An action row, as the published finetuning script writes it (`action` holds bins, `raw_actions` physical units):

```json
{"id": "traj0_0", "image": "data/...jpg", "vision": [54, 40, ...], "raw_actions": [0.002, ..., 1.0], "action": [9, 7, 11, 0, 9, 9, 1], "fields": "[instruction],[vision],action", "instruction": "<s> You are ..."}
```

and as that script reads it, before bins are made:

```json
{"id": "traj0_0", "image": "data/...jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat action should the robot take to `push the block`"}, {"from": "gpt", "raw_actions": [0.002, ..., 1.0]}]}
```

Numbers may stand as strings: `delta` does in published files, and so do some actions.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from lapa.data.atomic_files import atomic_file
from lapa.data.episode_source import OnError, raise_error
from lapa.data.schema import ReadError

# The only order of fields in the published data files.
FIELDS = {"latent": "[instruction],[vision],delta", "action": "[instruction],[vision],action"}
# Longest row that is read; one with the 256 codes of an image has about 2 kB.
MAX_ROW_BYTES = 1 << 20
READ_BYTES = 1 << 16
# What the published script writes around the sentence it finds in a conversation, and takes away from it.
CONVERSATION_PROMPT, CONVERSATION_IMAGE = "<s> You are a helpful assistant. USER: {} ASSISTANT:", "<image>\n"
END_OF_PROMPT = "ASSISTANT:"
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
INTEGER = re.compile(r"\s*-?[0-9]{1,18}\s*", re.ASCII)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class PublishedRow:
    r"""
    A step of a published data file.

    Args:
        instruction (`str`): A sentence, or the whole prompt around it as published files have it.
        vision_codes (`NDArray`, *optional*): (num_image_tokens,) int64 codes of the vision tokenizer.
        latent_action_codes (`NDArray`, *optional*): (num_latent_tokens,) int64 codes of the quantizer (`delta`).
        action (`NDArray`, *optional*): (action_dim,) float32 in physical units (`raw_actions`).
        action_tokens (`NDArray`, *optional*): (action_dim,) int64 bins (`action`); -1 is what published files hold
            where a dimension is constant.
        image (`str`, *optional*): Path of the image as the file has it.
        row_id (`str`, *optional*): `id`.
    """

    instruction: str
    vision_codes: NDArray[np.int64] | None = field(default=None, repr=False)
    latent_action_codes: NDArray[np.int64] | None = None
    action: NDArray[np.float32] | None = None
    action_tokens: NDArray[np.int64] | None = None
    image: str | None = None
    row_id: str | None = None

    @property
    def prompt(self) -> str:
        """The whole prompt: the instruction itself where it is one already, or the published prompt around it."""
        from lapa.processing.processing_lapa import TRAINING_TEXT

        if self.instruction.rstrip().endswith(END_OF_PROMPT):
            return self.instruction
        return TRAINING_TEXT.format(instruction=self.instruction)

    @property
    def sentence(self) -> str:
        """What to do, without the published prompt around it; other prompts stay as they are."""
        from lapa.processing.processing_lapa import TRAINING_TEXT

        before, after = TRAINING_TEXT.split("{instruction}")
        text = self.instruction
        if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            return text[len(before) : -len(after)]
        return text


def is_published_file(path: str) -> bool:
    """Whether a name is that of such a file: `.jsonl` or `.json`, gzipped or not."""
    return path.removesuffix(".gz").endswith((".jsonl", ".json"))


def holds_published_rows(path: str) -> bool:
    """Whether a file is of published rows by its name, and, as a `.json` file may be a mixture as well, by what is in it."""
    if not is_published_file(path) or not path.endswith(".json"):
        return is_published_file(path)
    try:
        published_target(path)
    except ValueError:
        return False
    return True


def read_rows(path: str | Path, target: str, on_error: OnError = raise_error) -> Iterator[PublishedRow]:
    """
    Reads the rows of a file one by one, holding no more than one of them.

    Args:
        path: A `.jsonl` file with a row per line or a `.json` file with an array of rows, gzipped where it ends in
            `.gz`; a local path or any fsspec URL.
        target: What rows must have: `"latent"` (`delta`, and `vision` or `image`) or `"action"` (`raw_actions`, and
            `vision` or `image`). What else a row has of these is read too.
        on_error: Called with a row that is no such thing. Where it returns, reading goes on with the next one.

    Yields:
        The rows in order.

    Raises:
        ValueError: Another `target`, or no such file.
        ReadError: A row that cannot be read; file and line (of an array also the row) are named. A file that is cut
            short, and an array that is not JSON, end the reading whatever `on_error` does.
    """
    if target not in FIELDS:
        raise ValueError(f"`target` must be one of {', '.join(FIELDS)}, got {target!r}.")
    name = str(path)
    with _open_binary(name) as file:
        for where, content in _texts(file, name):
            try:
                yield _row(_parsed(content), target)
            except (ValueError, RecursionError) as error:
                # A nesting that Python's parser gives up on is as unreadable as anything else.
                reason = "JSON is nested too deeply" if isinstance(error, RecursionError) else str(error).rstrip(".")
                on_error(ReadError(f"{where}: {reason}."))


def published_target(path: str | Path) -> str:
    """
    What the rows of a file are for, by its first readable row: `"latent"` or `"action"`.

    Raises:
        ValueError: No such file, or a first row that is of neither kind.
    """
    with _open_binary(str(path)) as file:
        for where, content in _texts(file, str(path)):
            try:
                record = _parsed(content)
            except (ValueError, RecursionError):
                continue
            if "raw_actions" in record or "conversations" in record:
                return "action"
            if "delta" in record:
                return "latent"
            raise ReadError(
                f"{where}: no row of a published file, which has `delta`, `raw_actions` or `conversations`; "
                f"this one has {_short(', '.join(map(str, record)))}."
            )
    raise ReadError(f"{path} has no row that can be read.")


def write_latent_rows(path: str | Path, rows: Iterable[PublishedRow]) -> int:
    """
    Writes latent rows as the published loader reads them: `image` (where known), `vision`, `instruction` (the whole
    prompt), `delta` (a list of strings) and `fields`, in this order.

    Args:
        path: A local `.jsonl` file, or `.jsonl.gz`. It appears when it is complete, and replaces an older one.
        rows: Each with `vision_codes` and `latent_action_codes`.

    Returns:
        Number of rows.

    Raises:
        ValueError: A row without them, or another kind of file name.
    """
    return _write(path, (_latent_record(row) for row in rows))


def write_action_rows(path: str | Path, rows: Iterable[PublishedRow]) -> int:
    """
    Writes action rows as the published finetuning reads them: `id` and `image` (where known), `vision` (where known),
    `raw_actions`, `action`, `fields` and `instruction` (the whole prompt), in this order.

    Args:
        path: A local `.jsonl` file, or `.jsonl.gz`. It appears when it is complete, and replaces an older one.
        rows: Each with `action`, `action_tokens`, and `vision_codes` or `image` (which the published code takes only
            with augmentation).

    Returns:
        Number of rows.

    Raises:
        ValueError: A row without them, or another kind of file name.
    """
    return _write(path, (_action_record(row) for row in rows))


@contextmanager
def _open_binary(name: str) -> Iterator[IO[bytes]]:
    if not is_published_file(name):
        raise ValueError(
            f"{name} is no published data file: its name must end in .jsonl or .json (or in .gz after it)."
        )
    try:
        with ExitStack() as stack:
            file: Any = stack.enter_context(fsspec.open(name, "rb"))
            file = stack.enter_context(gzip.open(file, "rb")) if name.endswith(".gz") else file
            # Not every file of fsspec can read a line up to a limit; the buffer around it can.
            yield io.BufferedReader(file, READ_BYTES)
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ReadError(f"{name} is no complete gzip file: {error}.") from error


def _texts(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    """Place and content of every row."""
    return _lines(file, name) if name.removesuffix(".gz").endswith(".jsonl") else _array_items(file, name)


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    """Place and content of every line that is not blank; an error for one that is too long."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(READ_BYTES)
            yield where, ValueError(f"the line is longer than the {MAX_ROW_BYTES} bytes that a row may have")
            continue
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield where, line


def _array_items(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    """Place and value of every item of the JSON array that a file holds; what is no array of objects raises."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    decoder, buffer, position, line, row, ended = json.JSONDecoder(), "", 0, 1, 0, False

    def refill() -> None:
        nonlocal buffer, position, line, ended
        line += buffer.count("\n", 0, position)
        try:
            more = text.read(READ_BYTES)
        except UnicodeDecodeError as error:
            raise ReadError(f"{name}, after line {line}: {error}.") from error
        ended = not more
        buffer, position = buffer[position:] + more, 0

    def next_character() -> str:
        nonlocal position
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n":
                position += 1
            if position < len(buffer) or ended:
                return buffer[position : position + 1]
            refill()

    def where() -> str:
        return f"{name}, row {row} (line {line + buffer.count(chr(10), 0, position)})"

    if next_character() != "[":
        raise ReadError(f"{name} must hold a JSON array of rows, as `.json` files do; a row per line is `.jsonl`.")
    position += 1
    while next_character() != "]":
        row += 1
        if row > 1:
            if next_character() != ",":
                raise ReadError(f"{where()}: a comma must stand between rows, or the file is cut short.")
            position += 1
        if not next_character():
            raise ReadError(f"{where()}: the file is cut short.")
        while True:
            try:
                value, end = decoder.raw_decode(buffer, position)
                # A number could go on in what is not read yet.
                if end < len(buffer) or ended:
                    break
            except RecursionError as error:
                raise ReadError(f"{where()} is no JSON that can be read: it is nested too deeply.") from error
            except ValueError as error:
                if ended or len(buffer) - position > MAX_ROW_BYTES:
                    bound = "" if ended else f" within the {MAX_ROW_BYTES} bytes that a row may have"
                    raise ReadError(f"{where()} is no JSON{bound}: {error}.") from error
            refill()
        yield where(), value
        position = end
    position += 1
    if next_character():
        raise ReadError(f"{name} goes on after its array of rows.")


def _parsed(content: Any) -> Mapping[str, Any]:
    if isinstance(content, ValueError):
        raise content
    if isinstance(content, bytes):
        try:
            content = json.loads(content)
        except UnicodeDecodeError as error:
            raise ValueError(f"the line is no UTF-8: {error}") from error
        except ValueError as error:
            raise ValueError(f"the line is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"a row must be a JSON object, got {_short(content)}")
    return content


def _row(record: Mapping[str, Any], target: str) -> PublishedRow:
    if target == "action" and "conversations" in record:
        record = _from_conversation(record)
    key = "delta" if target == "latent" else "raw_actions"
    fields = record.get("fields", FIELDS[target])
    if fields != FIELDS[target]:
        raise ValueError(f"`fields` must be {FIELDS[target]!r}, got {_short(fields)}")
    missing = [name for name in ("instruction", key) if record.get(name) is None]
    if missing:
        raise ValueError(f"`{missing[0]}` is missing")
    if record.get("vision") is None and record.get("image") is None:
        raise ValueError("`vision` is missing, and so is `image`, from which it could be computed")
    for name in ("instruction", "image"):
        value = record.get(name)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"`{name}` must be text, got {_short(value)}")
        # JSON can spell half a character, which no file can be written with.
        (value or "").encode()

    def column(name: str, convert: Any, *more: Any) -> Any:
        return None if record.get(name) is None else convert(name, record[name], *more)

    action, tokens = column("raw_actions", _floats), column("action", _integers, -1)
    if action is not None and tokens is not None and len(action) != len(tokens):
        raise ValueError(f"`raw_actions` has {len(action)} numbers, `action` {len(tokens)}")
    return PublishedRow(
        instruction=record["instruction"],
        vision_codes=column("vision", _integers, 0),
        latent_action_codes=column("delta", _integers, 0),
        action=action,
        action_tokens=tokens,
        image=record.get("image"),
        row_id=None if record.get("id") is None else str(record["id"]),
    )


def _from_conversation(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row as the published finetuning script reads it -> one as it writes it, but for the bins."""
    turns = record["conversations"]
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        raise ValueError(f"`conversations` must hold the turns of the person and of the robot, got {_short(turns)}")
    text = turns[0].get("value")
    if not isinstance(text, str):
        raise ValueError(f"`value` of the first turn must be text, got {_short(text)}")
    return {
        **record,
        "instruction": CONVERSATION_PROMPT.format(text.replace(CONVERSATION_IMAGE, "")),
        "raw_actions": turns[1].get("raw_actions"),
    }


def _integers(name: str, values: Any, least: int) -> NDArray[np.int64]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"`{name}` must be a list of integers, got {_short(values)}")
    numbers = []
    for value in values:
        if isinstance(value, str) and INTEGER.fullmatch(value):
            value = int(value)
        if type(value) is not int or not least <= value < 2**31:
            raise ValueError(f"`{name}` must hold integers from {least}, got {_short(value)}")
        numbers.append(value)
    return np.array(numbers, dtype=np.int64)


def _floats(name: str, values: Any) -> NDArray[np.float32]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"`{name}` must be a list of numbers, got {_short(values)}")
    numbers = []
    for value in values:
        try:
            # Anything else that float() takes, a boolean above all, is no number here.
            number = float(value) if type(value) in (int, float, str) else float("nan")
        except (ValueError, OverflowError):
            number = float("nan")
        if not abs(number) <= LARGEST_FLOAT32:
            raise ValueError(f"`{name}` must hold finite numbers, got {_short(value)}")
        numbers.append(number)
    return np.array(numbers, dtype=np.float32)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, (list, dict)) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _required(row: PublishedRow, *names: str) -> None:
    for name in names:
        if getattr(row, name) is None:
            raise ValueError(f"`rows` has a row without `{name}`: {row}.")


def _numbers(values: NDArray[Any]) -> list[Any]:
    return [value.item() for value in np.asarray(values).reshape(-1)]


def _latent_record(row: PublishedRow) -> dict[str, Any]:
    _required(row, "vision_codes", "latent_action_codes")
    assert row.vision_codes is not None and row.latent_action_codes is not None
    record = {} if row.image is None else {"image": row.image}
    return record | {
        "vision": _numbers(row.vision_codes),
        "instruction": row.prompt,
        "delta": [str(code) for code in _numbers(row.latent_action_codes)],
        "fields": FIELDS["latent"],
    }


def _action_record(row: PublishedRow) -> dict[str, Any]:
    _required(row, "action", "action_tokens", *([] if row.image is not None else ["vision_codes"]))
    assert row.action is not None and row.action_tokens is not None
    record: dict[str, Any] = {"id": row.row_id, "image": row.image}
    if row.vision_codes is not None:
        record["vision"] = _numbers(row.vision_codes)
    record = {name: value for name, value in record.items() if value is not None}
    return record | {
        "raw_actions": _numbers(np.asarray(row.action, dtype=np.float32)),
        "action": _numbers(row.action_tokens),
        "fields": FIELDS["action"],
        "instruction": row.prompt,
    }


def _write(path: str | Path, records: Iterable[Mapping[str, Any]]) -> int:
    path = Path(path)
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        raise ValueError(f"`path` must end in .jsonl or .jsonl.gz, got {path}.")
    count = 0
    with atomic_file(path) as partial, ExitStack() as stack:
        file: Any = stack.enter_context(partial.open("wb"))
        if path.suffix == ".gz":
            # No time stamp and no name, so that equal rows are equal files.
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


__all__ = [
    "FIELDS",
    "MAX_ROW_BYTES",
    "PublishedRow",
    "holds_published_rows",
    "is_published_file",
    "published_target",
    "read_rows",
    "write_action_rows",
    "write_latent_rows",
]
