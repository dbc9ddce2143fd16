"""`lapa train-decoder`: from labels with actions and a latent-pretrained model to a policy."""

import re

import numpy as np
import pytest
import torch
from hub_folders import picture, save_policy
from label_files import label_rows, label_settings, write_label_folder

from lapa.cli import main
from lapa.data.label_table import LabelFolder
from lapa.evaluation.baselines.latent_decoder_policy import LatentDecoderPolicy
from lapa.evaluation.decoder_cli import read_steps
from lapa.evaluation.policies import open_policy


def rows(num_steps=16, **changes):
    """Two episodes, whose first code is the second number of the action."""
    return [
        row
        | {"latent_action_codes": [row["step_index"] % 8, 7], "action": [1.0, float(row["step_index"] % 8)]}
        | changes
        for row in label_rows(num_steps)
    ]


@pytest.fixture
def model(tmp_path):
    return save_policy(tmp_path / "pretrained", "latent", num_latent_tokens=2)


def run(tmp_path, model, units, settings=None, *more):
    write_label_folder(tmp_path / "labels", units, settings or label_settings(len(units)))
    command = [
        "--labels",
        tmp_path / "labels",
        "--model",
        model,
        "--output",
        tmp_path / "policy",
        "--steps",
        "200",
        *more,
    ]
    return main(["train-decoder", *map(str, command)])


def test_the_labels_make_a_policy(tmp_path, model, capsys):
    assert (
        run(tmp_path, model, {0: rows(), 1: rows()}, None, "--learning-rate", "0.02", "--held-out-share", "0.25") == 0
    )
    out = capsys.readouterr().out
    # Episodes of two files are not one, though their names are.
    assert "64 steps of 4 episodes, 2-dimensional actions" in out
    # The first dimension never varies and has no R2; the mean is the other's.
    (value,) = re.findall(r"R2 on 1 held-out episodes: (\S+) ", out)
    assert float(value) > 0.9 and "below 0" not in out
    assert "# action_decoder" in (tmp_path / "policy" / "action_decoder" / "README.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels", "policy", "pretrained"]
    policy = LatentDecoderPolicy.from_pretrained(tmp_path / "policy")
    assert policy.decoder.config.quantizer_hash == "abc"
    decoded = policy.decoder.predict_actions(torch.tensor([[step, 7] for step in range(8)])).numpy()
    np.testing.assert_allclose(decoded, [[1.0, step] for step in range(8)], atol=0.5)
    assert policy.act([picture()], ["push"]).shape == (1, 2)
    assert open_policy(str(tmp_path / "policy"), 2).name == str(tmp_path / "policy")


def test_codes_that_tell_nothing_are_said_to(tmp_path, model, capsys):
    generator = np.random.default_rng(0)
    random = [row | {"action": generator.normal(size=2).tolist()} for row in rows()]
    assert run(tmp_path, model, {0: random, 1: random[::-1]}, None, "--held-out-share", "0.25") == 0
    assert "always playing the mean action would be as good" in capsys.readouterr().out


def test_rows_without_an_action_are_left_out_and_robots_are_not_mixed(tmp_path):
    mixed = rows(4, unnorm_key="widowx") + rows(4, unnorm_key="google") + rows(4, action=None, unnorm_key="person")
    write_label_folder(tmp_path / "labels", {0: mixed}, label_settings(1))
    labels = LabelFolder(tmp_path / "labels")
    with pytest.raises(ValueError, match="`unnorm_key` must be given: .* have google, widowx"):
        read_steps(labels, None)
    codes, actions, episode = read_steps(labels, "google")
    assert codes.shape == (8, 2) and actions.shape == (8, 2) and len(set(episode.tolist())) == 2
    with pytest.raises(
        ValueError, match=r"no row with an action of `unnorm_key` 'person' \(there is google, widowx\)"
    ):
        read_steps(labels, "person")


@pytest.mark.parametrize(
    ("units", "settings", "message"),
    [
        (
            {0: [{k: v for k, v in row.items() if k != "action"} for row in rows(4)]},
            {"action": False},
            "have no column `action`",
        ),
        ({0: rows(4, action=None)}, {}, "have no row with an action"),
        ({0: [*rows(4), *rows(4, action=[1.0])]}, {}, "actions of 1 and 2 numbers"),
        ({0: [*rows(2), *rows(2, action=[1.0])]}, {"row_group_rows": 8}, "`action` of 1 and 2 numbers"),
        (
            {0: rows(4, latent_action_codes=[1])},
            {"num_latent_tokens": 1},
            "has `num_latent_tokens` 2, the labels have",
        ),
    ],
)
def test_labels_that_cannot_teach_are_refused(tmp_path, model, capsys, units, settings, message):
    assert run(tmp_path, model, units, label_settings(1, **settings)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "policy").exists()


def test_labels_of_another_quantizer_are_refused(tmp_path, capsys):
    model = save_policy(tmp_path / "pretrained", "latent", num_latent_tokens=2, quantizer_hash="d" * 64)
    assert run(tmp_path, model, {0: rows(4)}) == 2
    assert "the same code means something else" in capsys.readouterr().err
    assert not (tmp_path / "policy").exists()


def test_a_finetuned_model_and_a_folder_of_something_else_are_refused_before_the_training(tmp_path, model, capsys):
    assert run(tmp_path, save_policy(tmp_path / "finetuned", "action", num_latent_tokens=2), {0: rows(4)}) == 2
    assert "is finetuned to predict actions" in capsys.readouterr().err
    (tmp_path / "policy").mkdir()
    command = ["--labels", tmp_path / "labels", "--model", model, "--output", tmp_path / "policy"]
    assert main(["train-decoder", *map(str, command)]) == 2
    assert "exists and holds no policy with an action decoder" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_rows_without_a_key_go_by_their_source(tmp_path):
    write_label_folder(tmp_path / "labels", {0: rows(4) + rows(4, source="other/train")}, label_settings(1))
    labels = LabelFolder(tmp_path / "labels")
    with pytest.raises(ValueError, match="`unnorm_key` must be given: .* have other/train, set/train"):
        read_steps(labels, None)
    assert len(read_steps(labels, "other/train")[0]) == 8


def test_an_output_inside_the_model_is_refused(tmp_path, model, capsys):
    write_label_folder(tmp_path / "labels", {0: rows(4)}, label_settings(1))
    command = ["--labels", tmp_path / "labels", "--model", model, "--output", model / "decoded"]
    assert main(["train-decoder", *map(str, command)]) == 2
    assert "lies in `model`" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    assert run(tmp_path, tmp_path, {0: rows(4)}) == 2
    assert f"`model` ({tmp_path}) is no model folder" in capsys.readouterr().err
