"""Empty modules in the place of absent ones, while a package is imported that names them and does without."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def stand_in_modules(stand_ins: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """
    Puts stand-ins into `sys.modules` and takes them out again at the end, whatever happens.

    A package that is installed or imported already is left as it is, with all that belongs to it. What was imported
    meanwhile keeps the stand-ins it asked for.

    Args:
        stand_ins: Dotted module name to what the module holds. A package stands before its parts.

    Yields:
        Names of the modules that were stood in for.
    """
    absent = [name for name in stand_ins if not _is_there(name.split(".")[0])]
    try:
        for name in absent:
            module = ModuleType(name, "Stands in for a module that is not installed.")
            # A package, so that its parts can be imported.
            module.__path__ = []
            vars(module).update(stand_ins[name])
            sys.modules[name] = module
            parent, _, part = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], part, module)
        yield absent
    finally:
        for name in absent:
            sys.modules.pop(name, None)


def _is_there(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


__all__ = ["stand_in_modules"]
