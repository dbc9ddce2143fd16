"""Copies the modules a checkpoint needs into one flat folder, where transformers loads them as remote code."""

import ast
import importlib.util
from pathlib import Path

PACKAGE = "lapa"


def module_path(module: str) -> Path:
    """Source file of a module of this package, found without importing the module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"the module {module} is not installed.")
    return Path(spec.origin)


def _sibling_imports(tree: ast.Module, module: str) -> list[ast.ImportFrom]:
    """The imports of `lapa.<package>.<module>`; any other way of importing `lapa` cannot be made flat."""
    siblings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            inside = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            inside = ["." * node.level + name] if node.level or name.split(".")[0] == PACKAGE else []
            if not node.level and name.startswith(f"{PACKAGE}.") and name.count(".") == 2 and node in tree.body:
                siblings.append(node)
                continue
        else:
            continue
        if inside:
            raise ValueError(
                f"{module}, line {node.lineno}: `{inside[0]}` cannot become part of a flat folder; accepted: "
                "`from lapa.<package>.<module> import name` at the top of the file."
            )
    return siblings


def flatten_source(source: str, module: str) -> tuple[str, list[str]]:
    """
    Rewrites imports of this package to imports of files beside it.

    Args:
        source (`str`): Python source.
        module (`str`): Its name, for messages.

    Returns:
        The source with `from lapa.<package>.<module> import` as `from .<module> import`, and the modules so imported.

    Raises:
        ValueError: An import of this package that cannot be rewritten so.
    """
    # The columns that `ast` gives count UTF-8 bytes.
    lines = source.encode("utf-8").splitlines(keepends=True)
    siblings = _sibling_imports(ast.parse(source), module)
    for node in siblings:
        assert node.module is not None
        line, start = lines[node.lineno - 1], node.col_offset
        old = f"from {node.module} import".encode()
        new = f"from .{node.module.rpartition('.')[2]} import".encode()
        if line[start : start + len(old)] != old:
            raise ValueError(f"{module}, line {node.lineno}: write `{old.decode()} ...` with single spaces.")
        lines[node.lineno - 1] = line[:start] + new + line[start + len(old) :]
    return b"".join(lines).decode("utf-8"), [node.module for node in siblings if node.module]


def collect_modules(entries: tuple[str, ...]) -> dict[str, str]:
    """
    Flat sources of modules and of everything of this package that they import.

    Args:
        entries (`tuple[str, ...]`): Modules such as `lapa.modeling_lapa.modeling_lapa`.

    Returns:
        File name to source.

    Raises:
        ValueError: Two modules that would share a file name, or an import that cannot be made flat.
    """
    files: dict[str, str] = {}
    owners: dict[str, str] = {}
    pending = list(entries)
    while pending:
        module = pending.pop()
        name = f"{module.rpartition('.')[2]}.py"
        if owners.setdefault(name, module) != module:
            raise ValueError(f"{module} and {owners[name]} would both become {name}.")
        if name not in files:
            files[name], imported = flatten_source(module_path(module).read_text(encoding="utf-8"), module)
            pending += imported
    return dict(sorted(files.items()))
