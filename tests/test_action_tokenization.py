"""Action bins: pandas' edges, the recorded assignments, constant dimensions, clear errors."""

import json

import numpy as np
import pytest
from shared_files import shared_path

from lapa.processing.action_tokenization_lapa import ActionTokenizer


def recorded_actions() -> np.ndarray:
    rows = json.loads(shared_path("fixtures/finetune_preprocess/input.json").read_text())
    return np.array([[float(value) for value in row["conversations"][1]["raw_actions"]] for row in rows])


@pytest.mark.parametrize("num_bins", [16, 256])
def test_fit_equals_recording(num_bins):
    fitted = ActionTokenizer.fit(recorded_actions(), num_bins=num_bins)
    folder = "fixtures/finetune_preprocess/"
    assert fitted == ActionTokenizer.from_csv(shared_path(f"{folder}n200_b{num_bins}.csv"))
    rows = shared_path(f"{folder}n200_b{num_bins}.jsonl").read_text().splitlines()
    expected = np.array([json.loads(row)["action"] for row in rows])
    # The published binning gives a constant dimension (3) bin -1; here it has one valid bin.
    assert (expected[:, 3] == -1).all()
    expected[:, 3] = 0
    np.testing.assert_array_equal(fitted.encode(recorded_actions()), expected)


@pytest.mark.parametrize("num_bins", [16, 256])
def test_decode_equals_recorded_unnormalise(num_bins):
    tokenizer = ActionTokenizer.from_csv(shared_path(f"fixtures/finetune_preprocess/n200_b{num_bins}.csv"))
    recorded = json.loads(shared_path("fixtures/finetune_preprocess/meta.json").read_text())
    recorded = recorded[f"n200_b{num_bins}"]["unnormalise"]
    compared = 0
    for ids, actions in zip(recorded["action_ids"], recorded["actions"]):
        for dimension, (bin_index, action) in enumerate(zip(ids, actions)):
            if 0 <= bin_index < tokenizer.num_bins[dimension] and dimension != 3:
                tokens = np.zeros(7, dtype=np.int64)
                tokens[dimension] = bin_index
                assert tokenizer.decode(tokens)[dimension] == np.float32(action)
                compared += 1
    assert compared >= 30


@pytest.mark.parametrize("num_bins", [1, 3, 7, 100, 256, 300])
def test_edges_equal_pandas_qcut(num_bins):
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(num_bins)
    columns = [
        rng.normal(size=997),
        rng.standard_cauchy(size=997),
        rng.integers(0, 5, size=997).astype(float),
        np.where(rng.random(997) < 0.9, 0.0, rng.normal(size=997)),
        rng.normal(size=997).astype(np.float32).astype(float),
    ]
    fitted = ActionTokenizer.fit(np.stack(columns, axis=1), num_bins=num_bins, gripper_dimension=None)
    for row, column in zip(fitted.edges, columns):
        _, edges = pandas.qcut(pandas.Series(column), num_bins, labels=False, retbins=True, duplicates="drop")
        np.testing.assert_array_equal(row, edges)


def test_bins_are_left_closed_and_clip():
    tokenizer = ActionTokenizer(((0.0, 1.0, 3.0), (5.0,)))
    assert tokenizer.num_bins == (2, 1) and tokenizer.action_dim == 2
    values = [[-9.0, -9.0], [0.0, 5.0], [0.999, 5.0], [1.0, 5.0], [3.0, 9.0], [99.0, 5.0]]
    assert tokenizer.encode(values).tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 0], [1, 0]]
    assert tokenizer.encode(values).dtype == np.int64
    decoded = tokenizer.decode(np.array([[0, 0], [1, 0]]))
    assert decoded.tolist() == [[0.5, 5.0], [2.0, 5.0]] and decoded.dtype == np.float32


def test_constant_and_gripper():
    actions = np.array([[0.25, 0.0], [0.25, 1.0], [0.25, 1.0]])
    tokenizer = ActionTokenizer.fit(actions)
    assert tokenizer.edges == ((0.25, 0.25), (-0.5, 0.5, 1.5))
    assert tokenizer.encode(actions).tolist() == [[0, 0], [0, 1], [0, 1]]
    np.testing.assert_array_equal(tokenizer.decode(tokenizer.encode(actions)), actions.astype(np.float32))
    assert ActionTokenizer.fit(actions[:, ::-1], gripper_dimension=0).edges[0] == (-0.5, 0.5, 1.5)


def test_published_csv_and_round_trips(tmp_path):
    published = ActionTokenizer.from_csv(shared_path("data/lapa/simpler.csv"))
    assert published.action_dim == 7
    assert all(count in (243, 244, 245) for count in published.num_bins[:6]) and published.num_bins[6] == 2
    published.to_csv(tmp_path / "bins.csv")
    assert ActionTokenizer.from_csv(tmp_path / "bins.csv") == published
    assert [path.name for path in tmp_path.iterdir()] == ["bins.csv"]
    recorded = shared_path("fixtures/finetune_preprocess/n200_b16.csv")
    ActionTokenizer.from_csv(recorded).to_csv(tmp_path / "recorded.csv")
    lines, expected = (path.read_text().splitlines() for path in (tmp_path / "recorded.csv", recorded))
    # Line 4 is the constant dimension, whose one edge is written twice.
    assert (lines[4], expected[4]) == ("0.125,0.125" + "," * 15, "0.125" + "," * 16)
    assert lines[:4] + lines[5:] == expected[:4] + expected[5:]
    assert ActionTokenizer.from_dict(json.loads(json.dumps(published.to_dict()))) == published
    constant = ActionTokenizer(((0.125, 0.125), (0.0, 1.0, 2.0)))
    constant.to_csv(tmp_path / "constant.csv")
    assert (tmp_path / "constant.csv").read_text() == "0,1,2\n0.125,0.125,\n0.0,1.0,2.0\n"
    assert ActionTokenizer.from_csv(tmp_path / "constant.csv") == constant


def test_errors_name_what_is_wrong(tmp_path):
    tokenizer = ActionTokenizer(((0.0, 1.0, 3.0), (0.0, 1.0)))
    bad = np.zeros((4, 2))
    bad[2, 1] = np.nan
    for call in (tokenizer.encode, ActionTokenizer.fit):
        with pytest.raises(ValueError, match=r"actions\[2, 1\] is nan"):
            call(bad)
    bad[2, 1] = -np.inf
    with pytest.raises(ValueError, match=r"actions\[2, 1\] is -inf"):
        tokenizer.encode(bad)
    with pytest.raises(ValueError, match="bin 1 for dimension 1, which has 1 bins"):
        tokenizer.decode([[1, 1]])
    with pytest.raises(ValueError, match="bin -1 for dimension 0, which has 2 bins"):
        tokenizer.decode([[-1, 0]])
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\), got float64"):
        tokenizer.decode([[0.0, 0.0]])
    with pytest.raises(ValueError, match=r"\(\.\.\., 2\) array, got shape \(3,\)"):
        tokenizer.encode([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"gripper \(dimension 1\) must lie in \[0, 1\]"):
        ActionTokenizer.fit([[0.0, -1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="gripper_dimension"):
        ActionTokenizer.fit([[0.0, 1.0]], gripper_dimension=2)
    with pytest.raises(ValueError, match="num_bins"):
        ActionTokenizer.fit([[0.0, 1.0]], num_bins=0)
    with pytest.raises(ValueError, match="dimension 0 must be finite and rise"):
        ActionTokenizer(((1.0, 0.0),))
    (tmp_path / "bad.csv").write_text("0,1\n0.5,x\n")
    with pytest.raises(ValueError, match="line 2, column 2: 'x'"):
        ActionTokenizer.from_csv(tmp_path / "bad.csv")
    (tmp_path / "empty.csv").write_text("0,1\n")
    with pytest.raises(ValueError, match="no row of bin edges"):
        ActionTokenizer.from_csv(tmp_path / "empty.csv")
