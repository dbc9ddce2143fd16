"""The command line: help, exit codes, one line on bad input."""

import subprocess
import sys

import pytest

import lapa
from lapa.cli import COMMANDS, main


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


def test_no_command(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out
