"""What the commands of the stages take: bad arguments are named in one line, and every recipe fits its command."""

import json
from pathlib import Path

import pytest
import yaml
from command_errors import error_of
from shared_files import shared_path
from tiny_models import TINY_QUANTIZER

from lapa.training import scripts

CPU = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def bridge():
    return str(shared_path("data/bridge_rlds/1.0.0"))


def test_unknown_recipe_key_is_an_error(tmp_path, capsys, bridge):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_stepz: 3\n")
    output = tmp_path / "quantizer"
    code = scripts.train_quantizer(["--config", str(recipe), "--data", bridge, "--output_dir", str(output)])
    assert "max_stepz" in error_of(capsys, code)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max_stepz", "3"], "max_stepz"),
        (["--max_steps", "many"], "many"),
        (["--codebook_update", "never"], "never"),
        (["--camera", "image_9"], "image_9"),
        (["--split", "val"], "val"),
        (["--frame_gap", "0"], "frame_gap"),
        (["--frame_gap", "10"], "no pair"),
        (["--frame_gap", "3", "--frame_gap_seconds", "0.6"], "exclude each other"),
        (["--eval_pairs", "0"], "eval_pairs"),
        (["--max_steps", "-1"], "max_steps"),
        (["--max_skipped", "2"], "max_skipped"),
        (["--quantizer_config", '{"hiden_size": 3}'], "hiden_size"),
        (["--quantizer_config", '{"hidden_size": "big"}'], "hidden_size"),
        (["--eval_episodes", "25"], "eval_episodes"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "eval_episodes"),
        (["--model", "/nonexistent"], "/nonexistent"),
        (["--resume_from_checkpoint", "/nonexistent"], "resume_from_checkpoint"),
    ],
)
def test_bad_quantizer_arguments(tmp_path, capsys, bridge, arguments, named):
    output = tmp_path / "quantizer"
    base = ["--data", bridge, "--output_dir", str(output), *CPU]
    if not {"--quantizer_config", "--model"} & set(arguments):
        base += ["--quantizer_config", json.dumps(TINY_QUANTIZER)]
    assert named in error_of(capsys, scripts.train_quantizer([*base, *arguments]))
    assert not list(tmp_path.glob("quantizer/*"))


def test_missing_data_is_named(tmp_path, capsys):
    code = scripts.train_quantizer(["--data", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")])
    assert "nowhere" in error_of(capsys, code)


RECIPES = sorted(Path(scripts.__file__).parent.joinpath("recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", [path for path in RECIPES if not path.stem.startswith("mixture_")], ids=str)
def test_recipes_parse(recipe, tmp_path):
    """Every key of every recipe is an argument of its command, and its sizes are fields of the config."""
    from trl import ModelConfig

    from lapa import LapaConfig, LapaQuantizerConfig
    from lapa.training import arguments, script_arguments

    paths = ["--config", str(recipe), "--data", "x", "--output_dir", str(tmp_path), "--use_cpu"]
    if "quantizer" in recipe.stem:
        types = (script_arguments.QuantizerArguments, arguments.LapaQuantizerTrainingArguments)
    elif "pretrain" in recipe.stem:
        types = (script_arguments.PretrainArguments, arguments.LapaLatentPretrainingArguments)
    else:
        types = (script_arguments.FinetuneArguments, arguments.LapaActionFinetuningArguments, ModelConfig)
        paths += ["--model", "x"]
    parsed = scripts.make_parser(types, "lapa").parse_args_and_config(paths)
    if "quantizer" in recipe.stem:
        LapaQuantizerConfig(**script_arguments.read_config(parsed[0].quantizer_config, LapaQuantizerConfig, "x"))
    elif "pretrain" in recipe.stem:
        LapaConfig(**script_arguments.read_config(parsed[0].policy_config, LapaConfig, "x"))
    assert parsed[1].max_steps == yaml.safe_load(recipe.read_text())["max_steps"]
