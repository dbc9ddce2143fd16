"""The command line: help, exit codes, one line on bad input."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lapa
from lapa.cli import COMMANDS, main
from lapa.training.script_arguments import FinetuneArguments


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert lapa.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_the_table_of_options_names_the_commands_that_take_them(capsys):
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    table = text[text.index("| option | commands |") :].split("\n\n")[0].splitlines()[2:]
    told = {row.split("|")[1].split("`")[1]: row.split("|")[2].strip().split(", ") for row in table}
    assert told.pop("data") == ["all"] and len(told) == 9
    for command in ("inspect", "train-quantizer", "label", "pretrain", "finetune"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        listed = set(re.findall(r"--(\w+)", capsys.readouterr().out))
        if command == "finetune":
            listed -= {name for name in ("frame_gap", "frame_gap_seconds", "filters") if _is_refused(name)}
        assert {name for name, commands in told.items() if command in commands} == listed & set(told), command


def _is_refused(name):
    """Whether `lapa finetune` has an option only to say that it means nothing there."""
    try:
        FinetuneArguments(data="x", model="y", **{name: "static" if name == "filters" else 1})
    except ValueError:
        return True
    return False


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "convert" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "lapa.cli", "convert", "quantizer", "--checkpoint", str(tmp_path / "none.pt"),
               "--output", str(output)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "none.pt" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_line_without_usage(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--no-such-option"]) == 2
    captured = capsys.readouterr()
    # A library may log something while a training command imports it.
    lines = [line for line in captured.err.splitlines() if "lapa" in line or "usage" in line]
    assert len(lines) == 1 and lines[0].startswith(f"lapa {command}: ") and captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], "required: quantizer|vision-tokenizer|policy"),
        (["convert", "quantiser"], "invalid choice: 'quantiser'"),
        (["convert", "policy", "--output", "x", "--outptu", "y"], "unrecognized arguments: --outptu y"),
        (["convert", "quantizer", "--output", "x"], "required: --checkpoint"),
        (["convert", "policy", "--output", "x", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["export", "--model", "x", "--output"], "--output: expected one argument"),
        (["demo", "--seed", "one"], "--seed: invalid int value: 'one'"),
        (["demo", "--output", "x", "y"], "unrecognized arguments: y"),
    ],
)
def test_bad_arguments_are_one_line_without_usage(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lapa {arguments[0]}: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


def test_no_command(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out
