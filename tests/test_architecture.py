"""Imports point in one direction, and what must start fast or run without jax does not import it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up: a module may import what stands before it, and its own package.
ORDER = [
    "tars_jax.errors",
    "tars_jax.struct",
    "tars_jax.intervals",
    "tars_jax.optim",
    "tars_jax.config",
    "tars_jax.presets",
    "tars_jax.rows",
    "tars_jax.memory",
    "tars_jax.quant",
    "tars_jax.cache",
    "tars_jax.kernels",
    "tars_jax.compile_cache",
    "tars_jax.attention",
    "tars_jax.ops",
    "tars_jax.ranking",
    "tars_jax.sample_rows",
    "tars_jax.penalties",
    "tars_jax.filters",
    "tars_jax.sampling",
    "tars_jax.model",
    "tars_jax.sharding",
    "tars_jax.planning",
    "tars_jax.adapters",
    "tars_jax.tokenizer",
    "tars_jax.chat",
    "tars_jax.grammar",
    "tars_jax.store",
    "tars_jax.loaders",
    "tars_jax.hub",
    "tars_jax.engine",
    "tars_jax.perplexity",
    "tars_jax.evolve",
    "tars_jax.quantization",
    "tars_jax.bench",
    "tars_jax.load_test",
    "tars_jax.tuning",
    "tars_jax",
    "api",
    "tars_jax.cli",
]
FILES = sorted(path for folder in ("tars_jax", "api") for path in (ROOT / folder).rglob("*.py"))


def layer(module: str) -> int:
    """Place of a module in ORDER; the longest matching prefix counts."""
    matches = [name for name in ORDER if module == name or (module.startswith(name + ".") and name != "tars_jax")]
    assert matches, f"{module} has no place in ORDER"
    return ORDER.index(max(matches, key=len))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module of ours that a file imports, lazily and for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module in ("tars_jax", "api") or node.module.count(".") == 0
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return {name for name in found if name.split(".")[0] in ("tars_jax", "api")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    own = module_of(path)
    if own == "tars_jax":
        return  # the public names: it imports what it shows
    wrong = {name for name in imports(path) if name != "tars_jax.__version__" and layer(name) > layer(own)}
    assert not wrong


@pytest.mark.parametrize("module", ["api.app", "tars_jax.cli", "tars_jax.store", "tars_jax.hub", "tars_jax.engine.scheduler", "tars_jax"])
def test_starts_without_jax(module: str) -> None:
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    names = {path.relative_to(ROOT).parts[1].removesuffix(".py") for path in FILES if len(path.relative_to(ROOT).parts) > 1}
    assert not {name for name in names - {"__init__"} if name not in readme}
