"""Who may import whom, read from the syntax trees; the table here is the architecture."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# unit -> layer: a unit imports itself and units of lower layers, so units that share a layer never meet
LAYERS = {
    "fastskel.kernels": 0,
    "fastskel._native": 0,
    "fastskel.registry": 0,
    "fastskel.atomic": 0,
    "fastskel.provenance": 0,
    # the only units of layer 0 that may see another: see FOUNDATIONS
    "fastskel.philox": 0,
    "fastskel.skeleton": 0,
    "fastskel.dist": 1,
    "fastskel.nn": 1,
    "fastskel.data": 1,
    "fastskel.models": 2,
    "fastskel.objectives": 3,
    "fastskel.train": 4,
    "fastskel.evaluate": 5,
    "fastskel.recipes": 6,
    "fastskel.compat": 6,
    "fastskel.bench": 7,
    "fastskel.demo": 7,
    "fastskel.report": 7,
    "fastskel.cli_pack": 7,
    "fastskel.cli_bench": 8,
    "fastskel.cli_evaluate": 8,
    "fastskel.cli_plan": 8,
    "fastskel.cli_report": 8,
    "fastskel.cli": 9,
    "fastskel.__main__": 10,
}
# imports inside one layer that are part of the design
FOUNDATIONS = {("fastskel.philox", "fastskel._native"), ("fastskel.skeleton", "fastskel.registry")}
# where a contract is the only way in: importer, package -> modules of that package it may import
CONTRACTS_ONLY = {
    ("fastskel.models", "fastskel.data"): {"fastskel.data.batch"},
    ("fastskel.objectives", "fastskel.models"): {"fastskel.models.encoder"},
    ("fastskel.train", "fastskel.models"): {"fastskel.models.encoder"},
    ("fastskel.train", "fastskel.objectives"): {"fastskel.objectives.objective"},
}
# installed package -> its folder in the repository
FOLDERS = {"fastskel": "fastskel", "fastskel.kernels": "kernels", "fastskel.bench": "bench"}
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}
FOREIGN_TO_CORE = re.compile(r"#\s*include\s*[<\"](Python\.h|pybind11|torch|ATen|c10|numpy)")


def module_name(path: Path, package: str, folder: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[module_name(path, package, ROOT / folder)] = path
    return found


MODULES = modules()


def unit_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(source: str) -> Iterator[str]:
    """Names of everything a source imports, at any depth and under any condition; members of modules included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield f"{base}.{alias.name}" if node.level == 0 else base


def target_module(name: str) -> str:
    """The module that an imported name lies in: itself, or what it is a member of; at least its unit."""
    parts = name.split(".")
    if len(parts) > 1 and parts[1].startswith("__") and unit_of(name) not in LAYERS:
        return parts[0]
    while len(parts) > 2 and ".".join(parts) not in MODULES and ".".join(parts) not in LAYERS:
        parts.pop()
    return ".".join(parts)


def violations(module: str, source: str) -> list[str]:
    unit, wrong = unit_of(module), []
    for name in imports(source):
        root = name.split(".")[0]
        if name.startswith("."):
            wrong.append(f"{module}: relative import of {name}")
        elif root in ("tests", "conftest"):
            wrong.append(f"{module}: imports tests ({name})")
        elif root in ("kernels", "bench"):
            wrong.append(f"{module}: imports {name} by its folder instead of its package")
        elif unit == "fastskel.kernels" and root != "fastskel" and root not in KERNELS_MAY_IMPORT:
            wrong.append(f"{module}: kernels import torch, triton and the standard library only, not {name}")
        elif root == "fastskel":
            target = target_module(name)
            target_unit = unit_of(target)
            if target == "fastskel" or target_unit == unit or (unit, target_unit) in FOUNDATIONS:
                continue
            if module == "fastskel":
                wrong.append(f"fastskel: the package itself imports nothing of its own, not {name}")
            elif target_unit not in LAYERS or unit not in LAYERS:
                wrong.append(f"{module}: imports {name}, and one of the two has no layer")
            elif LAYERS[target_unit] >= LAYERS[unit]:
                wrong.append(f"{module} (layer {LAYERS[unit]}): imports {name} (layer {LAYERS[target_unit]})")
            elif target not in CONTRACTS_ONLY.get((unit, target_unit), {target}):
                wrong.append(f"{module}: imports {target}, past the contract of {target_unit}")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_every_unit_has_a_layer() -> None:
    units = {unit_of(module) for module in MODULES} - {"fastskel"}
    assert units <= set(LAYERS), f"give these a layer in the table: {sorted(units - set(LAYERS))}"


def test_every_package_has_an_init() -> None:
    # without one, setuptools leaves the folder out of the wheel
    missing = {
        str(parent.relative_to(ROOT))
        for path in MODULES.values()
        if (parent := path.parent) / "__init__.py" not in MODULES.values()
    }
    assert missing == set()


def test_core_knows_neither_python_nor_torch() -> None:
    sources = [path for path in (ROOT / "csrc" / "core").rglob("*") if path.suffix in (".h", ".cpp")]
    assert sources
    assert [path.name for path in sources if FOREIGN_TO_CORE.search(path.read_text(encoding="utf-8"))] == []


def test_only_bindings_know_pybind11() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
    knowing = [path for path in sources if "pybind11" in path.read_text()]
    assert knowing
    assert all(path.parent == ROOT / "csrc" and path.name.startswith("bindings") for path in knowing), knowing


def test_kernels_have_their_company() -> None:
    # what a kernel shares or was cut off one begins with an underscore
    for path in (ROOT / "kernels").glob("*.py"):
        if not path.stem.startswith("_"):
            assert (ROOT / "kernels" / "reference" / path.name).is_file(), f"no reference for {path.name}"
            assert (ROOT / "tests" / "kernels" / f"test_{path.name}").is_file(), f"no test for {path.name}"
            assert (ROOT / "bench" / "kernels" / f"bench_{path.name}").is_file(), f"no benchmark for {path.name}"


@pytest.mark.parametrize(
    "module, source",
    [
        ("fastskel.nn.block", "from fastskel.data.batch import View"),
        ("fastskel.data.loader", "import fastskel.nn"),
        ("fastskel.models.dste", "from fastskel.data import views"),
        ("fastskel.objectives.mgfd", "from fastskel.models import dste"),
        ("fastskel.train.loop", "def f():\n    from fastskel.evaluate import knn"),
        ("fastskel.kernels.philox", "import numpy as np"),
        ("fastskel.kernels.philox", "from fastskel.registry import Registry"),
        ("fastskel.newcomer.x", "from fastskel.registry import Registry"),
        ("fastskel.cli", "from fastskel.newcomer import x"),
        ("fastskel.cli", "from tests.conftest import data_dir"),
        ("fastskel.recipes.small", "import fastskel.compat"),
        ("fastskel.nn.block", "from . import mlp"),
        ("fastskel", "from fastskel.registry import Registry"),
        ("fastskel.bench.offline", "import kernels.philox"),
    ],
    ids=lambda value: value.replace("\n", " ")[-40:],
)
def test_a_violation_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1
