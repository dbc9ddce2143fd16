"""The published JSON files: recorded rows, both directions, every way of being broken."""

import gzip
import io
import json
import tracemalloc

import numpy as np
import pytest
from shared_files import shared_path

from lapa.data.jsonl import MAX_ROW_BYTES, PublishedRow, read_rows, write_action_rows, write_latent_rows
from lapa.data.schema import ReadError
from lapa.training.sources import jsonl_steps

LATENT = {"vision": [1, 2], "instruction": "push", "delta": ["3", "0"]}
ACTION = {"vision": [1, 2], "instruction": "push", "raw_actions": ["0.5", 1], "action": [3, -1]}


def write(path, rows):
    text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz"])
def test_every_form_gives_the_same_rows(name, tmp_path):
    rows = [LATENT, {**LATENT, "delta": [3, 1], "image": "a.jpg", "id": 7}]
    first, second = read_rows(write(tmp_path / name, rows), "latent")
    assert first.latent_action_codes.tolist() == [3, 0] and second.latent_action_codes.tolist() == [3, 1]
    assert first.vision_codes.tolist() == [1, 2] and first.vision_codes.dtype == np.int64
    assert (first.image, first.row_id, second.image, second.row_id) == (None, None, "a.jpg", "7")


def test_published_latent_rows_come_back_byte_for_byte(tmp_path):
    published = shared_path("fixtures/data/latent.jsonl")
    rows = list(read_rows(published, "latent"))
    assert rows[0].sentence == "take the broccoli out of the pot" and rows[0].prompt == rows[0].instruction
    assert write_latent_rows(tmp_path / "rows.jsonl", rows) == len(rows) > 0
    assert (tmp_path / "rows.jsonl").read_bytes() == published.read_bytes()


def test_published_action_rows(tmp_path):
    """Before and after the published preprocessing: the same prompts and actions, and what is written is read again."""
    before = list(read_rows(shared_path("fixtures/finetune_preprocess/input.json"), "action"))
    after = list(read_rows(shared_path("fixtures/finetune_preprocess/n200_b16.jsonl"), "action"))
    assert len(before) == len(after) == 200
    for raw, row in zip(before, after):
        assert raw.prompt == row.prompt and raw.image == row.image and raw.row_id == row.row_id
        np.testing.assert_array_equal(raw.action, row.action)
        assert raw.action_tokens is None and len(row.action_tokens) == 7
    assert write_action_rows(tmp_path / "rows.jsonl.gz", after) == 200
    again = list(read_rows(tmp_path / "rows.jsonl.gz", "action"))
    for row, copy in zip(after, again):
        for name in ("action", "action_tokens", "vision_codes"):
            np.testing.assert_array_equal(getattr(row, name), getattr(copy, name))
        assert (row.prompt, row.image, row.row_id) == (copy.prompt, copy.image, copy.row_id)
    # In the order of the published script.
    with gzip.open(tmp_path / "rows.jsonl.gz", "rt") as file:
        ours = json.loads(file.readline())
    theirs = json.loads(shared_path("fixtures/finetune_preprocess/n200_b16.jsonl").read_text().splitlines()[0])
    assert list(ours) == list(theirs)


def test_a_plain_sentence_gets_the_published_prompt():
    from lapa.processing.processing_lapa import TRAINING_TEXT

    row = PublishedRow("push the {block}")
    assert row.sentence == "push the {block}" and row.prompt == TRAINING_TEXT.format(instruction="push the {block}")
    assert PublishedRow(row.prompt).prompt == row.prompt and PublishedRow(row.prompt).sentence == "push the {block}"


BROKEN_ROWS = {
    "no object": ([1, 2], "must be a JSON object"),
    "no instruction": ({"vision": [1], "delta": [1]}, "`instruction` is missing"),
    "empty instruction": ({**LATENT, "instruction": " "}, "`instruction` must be text"),
    "half a character": ({**LATENT, "instruction": "\ud800"}, "surrogates not allowed"),
    "no codes": ({"vision": [1], "instruction": "push"}, "`delta` is missing"),
    "no image": ({"delta": [1], "instruction": "push"}, "`vision` is missing"),
    "other order": ({**LATENT, "fields": "[vision],[instruction],delta"}, "`fields` must be"),
    "boolean": ({**LATENT, "delta": [True]}, "got True"),
    "fraction": ({**LATENT, "delta": ["1.5"]}, "'1.5'"),
    "negative": ({**LATENT, "vision": [-1]}, "integers from 0, got -1"),
    "huge": ({**LATENT, "vision": [2**80]}, "integers from 0"),
    "huge string": ({**LATENT, "delta": ["9" * 5000]}, "integers from 0"),
    "empty list": ({**LATENT, "delta": []}, "a list of integers"),
    "no list": ({**LATENT, "vision": {"a": 1}}, "a list of integers, got dict of 1"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("case", BROKEN_ROWS)
def test_a_broken_row_is_named_and_can_be_skipped(case, suffix, tmp_path):
    row, message = BROKEN_ROWS[case]
    path = write(tmp_path / f"rows{suffix}", [LATENT, row, LATENT])
    with pytest.raises(ReadError, match=f"{path}, (line 2|row 2 .line 1.): .*{message}"):
        list(read_rows(path, "latent"))
    errors = []
    assert len(list(read_rows(path, "latent", errors.append))) == 2 and len(errors) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["nan"], "finite numbers, got 'nan'"),
        ([1e39], "finite numbers"),
        ([True], "got True"),
        (["x"], "'x'"),
        ([None], "None"),
        ("0.5", "list of numbers"),
        ([0.5], "1 numbers, `action` 2"),
    ],
)
def test_broken_actions(values, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**ACTION, "raw_actions": values}])
    with pytest.raises(ReadError, match=message):
        list(read_rows(path, "action"))


@pytest.mark.parametrize("turns", [None, [], [1, 2], [{"value": "x"}], [{"value": 3}, {}], [{"value": "x"}, {}]])
def test_broken_conversations(turns, tmp_path):
    path = write(tmp_path / "rows.json", [{"image": "a.jpg", "conversations": turns}])
    with pytest.raises(ReadError, match="row 1"):
        list(read_rows(path, "action"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"vision": [1', "line 1: the line is no JSON"),
        (b"\n\n{]\n", "line 3: the line is no JSON"),
        (b"[" * 100_000, "line 1: JSON is nested too deeply"),
        (b'{"instruction": "\xff"}', "line 1: the line is no UTF-8"),
        (b'{"a": ' + b"9" * 6000 + b"}", "line 1: the line is no JSON"),
    ],
)
def test_broken_lines(content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ReadError, match=message):
        list(read_rows(path, "latent"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}', "must hold a JSON array"),
        (b"", "must hold a JSON array"),
        (b"[", "row 1 .* cut short"),
        (b"[1 2]", "row 2 .* a comma"),
        (b"[1", "row 2 .* a comma"),
        (b'[\n{"a": 1}\n{"a": 1}]', "row 2 .line 3.: a comma"),
        (b'[\n{"a": 1},\n\n{"a": ', "row 2 .line 4. is no JSON"),
        (b'[{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'[{"a": "\xff"}]', "utf-8"),
        (b"[] x", "goes on after"),
    ],
)
def test_broken_arrays_end_the_reading(content, message, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ReadError, match=message):
        list(read_rows(path, "latent", lambda error: None))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_an_endless_row_takes_bounded_memory(name, tmp_path):
    path = tmp_path / name
    text = b'[{"a": "' if ".json" in path.suffixes else b'{"a": "'
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb") if path.suffix == ".gz" else buffer as file:
        file.write(text + b"x" * (24 * MAX_ROW_BYTES))
        content = None if path.suffix == ".gz" else buffer.getvalue()
    path.write_bytes(buffer.getvalue() if content is None else content)
    del content
    tracemalloc.start()
    with pytest.raises(ReadError, match=str(MAX_ROW_BYTES)):
        list(read_rows(path, "latent"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * MAX_ROW_BYTES


def test_a_row_after_one_that_is_too_long_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * (3 * MAX_ROW_BYTES) + b'"}\n' + json.dumps(LATENT).encode())
    errors = []
    assert len(list(read_rows(path, "latent", errors.append))) == 1
    assert "line 1: the line is longer" in str(errors[0])


def test_a_broken_gzip_file_is_named(tmp_path):
    whole = write(tmp_path / "rows.jsonl.gz", [LATENT] * 1000).read_bytes()
    for content in (whole[:-200], b"no gzip", whole[:50] + b"\0" * 30 + whole[80:]):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(ReadError, match="rows.jsonl.gz"):
            list(read_rows(tmp_path / "rows.jsonl.gz", "latent"))


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="`target` must be one of latent, action, got 'delta'"):
        next(read_rows("rows.jsonl", "delta"))
    with pytest.raises(ValueError, match=r"rows.txt is no published data file"):
        next(read_rows("rows.txt", "latent"))
    with pytest.raises(ValueError, match="does not exist"):
        next(read_rows(tmp_path / "rows.jsonl", "latent"))
    with pytest.raises(ValueError, match=r"must end in .jsonl"):
        write_latent_rows(tmp_path / "rows.json", [])


def test_nothing_half_written_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_latent_rows(path, [PublishedRow("push", np.array([1]), np.array([2]))])
    before = path.read_bytes()
    good = PublishedRow("push", np.array([1]), np.array([3]))
    with pytest.raises(ValueError, match="without `latent_action_codes`"):
        write_latent_rows(path, [good, PublishedRow("push", np.array([1]))])
    with pytest.raises(ValueError, match="without `vision_codes`"):
        write_action_rows(path, [PublishedRow("push", action=np.ones(1), action_tokens=np.ones(1))])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_columns_in_memory_know_their_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.loads(shared_path("fixtures/data/latent.jsonl").read_text().splitlines()[0])
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    train, held = jsonl_steps(path, "latent").split(1)
    assert train.example_ids == [f"{path}, row {number}" for number in (1, 2, 3)]
    assert held.example_ids == [f"{path}, row 4"]
