"""Folders of labels that somebody else wrote: nothing outside them is opened, and damage is one message."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_files import label_rows, label_settings, write_label_folder

from lapa.data.file_tree import FileTree
from lapa.data.label_manifest import LabelManifest
from lapa.data.label_table import LabelFolder
from lapa.data.schema import ReadError

COLUMNS = ("instruction", "latent_action_codes", "image")


@pytest.fixture
def folder(tmp_path):
    rows = label_rows()
    write_label_folder(tmp_path / "labels", {0: rows, 1: rows[:4]}, label_settings(2))
    return tmp_path / "labels"


def change(folder, change):
    path = folder / "labels.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_whole_folder_is_read(folder):
    labels = LabelFolder(folder)
    tables = [
        table for file in range(2) for table in labels.read_groups(file, range(labels.group_count(file)), COLUMNS)
    ]
    assert [len(table) for table in tables] == [4, 4, 4] and labels.rows == (8, 4)


def unit(**values):
    return lambda manifest: manifest["units"][1].update(values)


def setting(**values):
    return lambda manifest: manifest["settings"].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unit(file="../../other.parquet"), r"`units\[1\].file` must be 'data/labels-00001-of-00002.parquet', got '../../"),
        (unit(file="/etc/passwd"), r"`units\[1\].file` must be"),
        (unit(file="data/../data/labels-00001-of-00002.parquet"), r"`units\[1\].file` must be"),
        (unit(file=None), r"`units\[1\].file` must be"),
        (unit(rows=1 << 60), r"`units\[1\].rows` must be a number from 0 to 4194304, got 1152921504606846976"),
        (unit(rows=-1), r"`units\[1\].rows` must be"),
        (unit(rows=2.5), r"`units\[1\].rows` must be"),
        (lambda manifest: manifest["units"][1].pop("rows"), r"`units\[1\].rows` is missing"),
        (lambda manifest: manifest["units"].pop(), r"`units` must list all 2 files, got 1"),
        (lambda manifest: manifest.update(units={}), "`units` must be a list of objects"),
        (lambda manifest: manifest.update(complete="yes"), "`complete` must be true or false, got 'yes'"),
        (setting(row_group_rows=0), "`settings.row_group_rows` must be a number from 1 to 1048576, got 0"),
        (setting(codebook_size="8"), "`settings.codebook_size` must be a number"),
        (setting(format="csv"), "`settings.format` must be one of parquet, jsonl, got 'csv'"),
        (setting(num_units=1 << 50), "`settings.num_units` must be"),
        (lambda manifest: manifest["settings"].pop("frame_size"), "`settings.frame_size` is missing"),
        (lambda manifest: manifest["settings"]["sources"][0].update(name=3), r"`settings.sources\[0\].name` must be text"),
        (lambda manifest: manifest.update(version=[9] * 99), "labels.json has version"),
        (lambda manifest: manifest.update(totals={"pairs": 1}), "labels.json is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_listing_is_refused(damage, message, folder):
    change(folder, damage)
    with pytest.raises(ValueError, match=message):
        LabelFolder(folder)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"[]", b"\xff", b'{"version": 1, "complete": true, "x": 1e999}', b""]
)
def test_a_listing_that_is_none(text):
    with pytest.raises(ValueError, match=r"labels.json is damaged"):
        LabelManifest.from_bytes(text, "labels.json")


def _replaced(table, name, values, kind=None):
    place = table.column_names.index(name)
    kind = table.schema.field(name).type if kind is None else kind
    return table.set_column(place, name, pa.array(values, kind))


@pytest.mark.parametrize(
    ("name", "values", "kind", "message"),
    [
        ("latent_action_codes", [[1, 2]] * 3 + [None], None, "has rows without 'latent_action_codes'"),
        ("latent_action_codes", [[1, None]] * 4, None, "has rows without 'latent_action_codes'"),
        ("latent_action_codes", [[1, 2]] * 3 + [[1]], None, r"has rows of \[1, 2\] codes, not of 2"),
        ("latent_action_codes", [[1, 8]] * 4, None, "has codes from 1 to 8; the codebook has 8"),
        ("latent_action_codes", [[-1, 2]] * 4, None, "has codes from -1 to 2"),
        ("image", [None] * 4, None, "has rows without 'image'"),
        ("image", [{"bytes": None, "path": "/etc/passwd"}] * 4, None, "has rows without 'image'"),
        ("instruction", [1, 2, 3, 4], pa.int64(), "has column 'instruction' of type int64, not string"),
    ],
)
def test_rows_that_are_no_labels_are_refused(name, values, kind, message, folder):
    path = folder / "data" / "labels-00001-of-00002.parquet"
    pq.write_table(_replaced(pq.read_table(path), name, values, kind), path, row_group_size=4)
    with pytest.raises(ReadError, match=message):
        list(LabelFolder(folder).read_groups(1, [0], COLUMNS))


def test_row_groups_of_another_size_are_refused(folder):
    path = folder / "data" / "labels-00000-of-00002.parquet"
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table.slice(0, 7))
        writer.write_table(table.slice(7))
    with pytest.raises(ReadError, match="has 7 rows of .* bytes in row group 0, not 4 rows"):
        list(LabelFolder(folder).read_groups(0, [0], COLUMNS))


def test_no_file_outside_a_folder_is_named(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").write_bytes(np.arange(4, dtype=np.uint8).tobytes())
    for tree in (FileTree(str(tmp_path / "inside")), FileTree(f"file://{tmp_path}/inside")):
        for name in ("../outside", "a/../../outside", "..", str(tmp_path / "outside")):
            for action in (tree.open, tree.location, tree.is_file, tree.is_folder, tree.entries):
                with pytest.raises(ReadError, match="does not lie below"):
                    action(name)
        # Dots inside a name are no way out.
        assert os.path.basename(tree.location("a..b/..c")) == "..c"
