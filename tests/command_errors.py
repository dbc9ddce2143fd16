"""What a command says when it ends in an error."""

from typing import Any


def error_of(capsys: Any, code: int, start: str = "") -> str:
    """The one line that says so; it must begin with `start`, be the last, and come with exit code 2 and no traceback."""
    said = capsys.readouterr().err
    assert code == 2
    # Progress bars may come before it.
    last = said.splitlines()[-1]
    assert "error:" in last and said.count("error:") == 1 and "Traceback" not in said, said
    assert last.startswith(start), said
    return last
