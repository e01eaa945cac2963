"""How the tests lie: none imports another, what they share is there, and the checkout's folder may have any name."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import testkit

TESTS = testkit.ROOT / "tests"
MODULES = sorted(TESTS.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The modules that a file imports, each with the names that it takes from the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)


def test_no_test_module_imports_another():
    theirs = {path.stem for path in MODULES if path.stem.startswith("test_")} | {"conftest"}
    found = [(path.name, module) for path in MODULES for module, _ in imports(path) if module.split(".")[0] in theirs]
    assert found == []


def test_what_tests_take_from_testkit_is_there():
    """On machines without a GPU and without ComfyUI too, where the files that take it are skipped."""
    taken = {(module, name) for path in MODULES for module, names in imports(path) for name in names}
    missing = []
    for module, name in sorted((module, name) for module, name in taken if module.split(".")[0] == "testkit"):
        if not hasattr(import_module(module), name):
            try:
                import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{module}.{name}")
    assert missing == []


def test_a_checkout_may_have_the_name_of_a_module(tmp_path):
    """The tests of a checkout called `pack` are found, and those run that start processes of their own."""
    checkout = tmp_path / "pack"
    left_out = shutil.ignore_patterns(".*", "models", "demo_output", "__pycache__")
    shutil.copytree(testkit.ROOT, checkout, ignore=left_out, symlinks=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-k", "test_unlike_gpus"]
    run = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=170, check=False)
    assert run.returncode == 0 and " passed" in run.stdout and "error" not in run.stdout, run.stdout[-3000:]
