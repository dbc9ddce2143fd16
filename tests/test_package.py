"""The package as installed: who imports whom, what importing costs, and what the wheel holds."""

import ast
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Who may import whom (docs/architecture.md). The front door `lapa/` may import everything.
ALLOWED = {
    "configuration": set(),
    "processing": {"configuration"},
    "modeling_lapa": {"configuration"},
    "hub_cards": {"configuration"},
    "data": {"configuration", "processing"},
    "training": {"configuration", "processing", "modeling_lapa", "hub_cards", "data"},
    "serving": {"configuration", "processing", "modeling_lapa"},
    "conversion": {"configuration", "processing", "modeling_lapa"},
    "evaluation": {"configuration", "processing", "modeling_lapa", "hub_cards", "data", "training", "serving"},
}
HEAVY = ("trl", "peft", "av", "gymnasium", "torchvision")


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Every imported module of a file, and whether the import stands at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", id(node) in top))
    return found


def sources() -> list[Path]:
    return [path for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    folder = path.relative_to(ROOT).parts[0]
    for module, _ in imports_of(path):
        assert module.split(".")[0] not in ALLOWED, f"{path}: {module} is a second copy of lapa.{module}"
        assert not module.startswith("torchvision")
        if module == "lapa" or module.startswith("lapa."):
            target = module.partition(".")[2].partition(".")[0]
            assert target == folder or target in ALLOWED[folder], f"{path} must not import {module}"


def test_heavy_modules_are_imported_where_they_are_used():
    for folder in ("configuration", "processing", "modeling_lapa", "conversion", "serving", "lapa"):
        for path in (ROOT / folder).rglob("*.py"):
            top = [module.split(".")[0] for module, at_top in imports_of(path) if at_top]
            assert not set(top) & {*HEAVY, "datasets", "msgpack", "bitsandbytes"}, path


def test_importing_lapa_is_quick_and_light():
    script = (
        "import sys, time\n"
        "from transformers import AutoModel\n"
        "start = time.perf_counter()\n"
        "import lapa\n"
        "print(time.perf_counter() - start, *sorted(sys.modules))"
    )
    seconds = []
    for _ in range(3):
        output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        duration, *modules = output.split()
        seconds.append(float(duration))
        assert not {module.split(".")[0] for module in modules} & set(HEAVY)
        assert "lapa.configuration.configuration_lapa" in modules
    assert min(seconds) < 0.5


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
               "--wheel-dir", str(folder), str(ROOT)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("lapa-*.whl")
    return path


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    """An environment that sees the installed dependencies but no editable install, in another folder."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but the .pth files inside it, the editable install's too, are not.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    script = (
        "import importlib, json, pkgutil, lapa, transformers\n"
        "names = [m.name for m in pkgutil.walk_packages(lapa.__path__, 'lapa.') if not m.name.endswith('finetune')]\n"
        "files = {name: importlib.import_module(name).__file__ for name in names}\n"
        "[getattr(lapa, name) for name in lapa.__all__]\n"
        "print(json.dumps({'files': files, 'version': lapa.__version__}))"
    )
    output = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    result = json.loads(output.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(site) for file in result["files"].values())
    expected = {"lapa." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources()}
    expected = {name.removesuffix(".__init__") for name in expected if not name.endswith("finetune")}
    assert expected <= set(result["files"])
    # Data files travel too.
    shipped = {path.relative_to(ROOT) for pattern in ("training/recipes/*.yaml", "hub_cards/templates/*")
               for path in ROOT.glob(pattern)}  # fmt: skip
    assert shipped
    assert all((site / "lapa" / path).exists() for path in shipped)
    help_text = subprocess.run([environment / "bin" / "lapa", "--help"], capture_output=True, text=True, check=True)
    assert "convert" in help_text.stdout
