"""The import rule of DESIGN.md ("Layout"), read off the sources: data flows down, nobody reaches back up."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

BASE = {"config", "checks", "types", "errors"}
MODEL = {"model", *BASE}
SKIP = {"skip", *MODEL}
ROOMS = {"engine", "shards", "quality", "report"}
PRODUCT = {"distributed", "local", *ROOMS, *SKIP}
ALLOWED = {
    "config": {"checks", "types", "errors"},
    "checks": {"errors"},
    "types": set[str](),
    "errors": set[str](),
    "model": BASE,
    "skip": MODEL,
    "shards": SKIP,
    "engine": SKIP,
    "quality": {"engine", "shards", *SKIP},
    "report": {"quality", "shards", *SKIP},
    "local": {"engine", "shards", "quality", *SKIP},
    "front_door": {"local", "engine", "shards", *SKIP},
    "skipvar": {"front_door"},
    "distributed": {"local", *ROOMS, *SKIP},
    "parity": {"engine", *SKIP},
    "benchmarks": PRODUCT,
    "training": {*ROOMS, *SKIP},
    "cli": {"parity", "benchmarks", "training", *PRODUCT},
    "jobs": {"cli"},
}
"""What each part may import, besides itself."""

PURE = [
    "skipvar",
    "skipvar.types",
    "skipvar.config",
    "skipvar.skip.strategy",
    "skipvar.engine.batcher",
    "skipvar.shards.ledger",
]
"""Modules that load neither torch nor ray."""

SOURCES = sorted([*REPOSITORY.glob("skipvar/**/*.py"), *REPOSITORY.glob("jobs/*.py")])


def part_of(module: str) -> str:
    """`skipvar.engine.sampler` is of `engine`, `skipvar.config_file` of `config`, `jobs.parity` of `jobs`."""
    names = module.split(".")
    if names[0] == "jobs":
        return "jobs"
    part = names[1] if len(names) > 1 else "skipvar"
    return "config" if part.startswith("config") else part


def module_of(path: Path) -> str:
    names = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports_of(source: str) -> Iterator[str]:
    """All modules that a source names in import statements, at its top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" if module in ("skipvar", "jobs") else module for alias in node.names)


def breaches(module: str, source: str) -> list[str]:
    """What a module imports against the rule."""
    part, found = part_of(module), []
    for name in imports_of(source):
        root = name.split(".")[0]
        if root in ("skipvar", "jobs"):
            if part_of(name) not in {part, *ALLOWED[part]}:
                found.append(f"{module} imports {name}")
        elif root == "ray" and part != "distributed":
            found.append(f"{module} imports ray")
    return found


def test_every_part_is_known() -> None:
    assert {part_of(module_of(path)) for path in SOURCES} <= ALLOWED.keys()


def test_nobody_reaches_back_up() -> None:
    found = [line for path in SOURCES for line in breaches(module_of(path), path.read_text())]
    assert not found, "\n".join(found)


def test_no_modules_import_each_other() -> None:
    """Neither two nor a longer circle: modules can be put in an order in which each imports only earlier ones."""
    modules = {module_of(path) for path in SOURCES}
    imported = {module_of(path): modules & set(imports_of(path.read_text())) for path in SOURCES}
    list(graphlib.TopologicalSorter(imported).static_order())  # raises CycleError, which names the circle


def test_a_class_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module_of(path))
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_the_rule_bites() -> None:
    assert breaches("skipvar.model.vae", "from skipvar.skip.probe import take_probe")
    assert breaches("skipvar.engine.engine", "def f():\n    import ray")
    assert breaches("jobs.generate", "import ray.util")
    assert breaches("skipvar.training.vae", "from skipvar import distributed")
    assert breaches("skipvar.shards.writer", "import skipvar.engine.engine")
    assert not breaches("skipvar.distributed.driver", "import ray\nfrom skipvar.engine import engine")


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_load_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_import_has_a_side_effect_on_threads() -> None:
    """Entry points set threads and seeds; libraries do not, at their top level."""
    forbidden = {"set_num_threads", "manual_seed", "basicConfig", "set_grad_enabled"}
    for path in SOURCES:
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                called = statement.value.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                assert name not in forbidden, f"{path}: {name} at import"
