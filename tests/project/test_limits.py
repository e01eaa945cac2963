"""The folders show the architecture, and what lies in them is small enough to be read."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import testkit

PRODUCT = ("distributed", "wanvideo", "nodes")
FOLDERS = (*PRODUCT, "benchmarks", "tests", "tools")
MODULES_IN_A_FOLDER = 14
LINES_OF_A_FUNCTION = 60
METHODS_OF_A_CLASS = 20

FILES = sorted(path for folder in FOLDERS for path in (testkit.ROOT / folder).rglob("*.py"))
PRODUCT_FILES = [path for path in FILES if path.relative_to(testkit.ROOT).parts[0] in PRODUCT]
PACKAGES = sorted(path.parent for path in PRODUCT_FILES if path.name == "__init__.py")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(testkit.ROOT).as_posix()


def definitions(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[Path, ast.AST]]:
    """Every definition of a kind in the product, with its file."""
    for path in PRODUCT_FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield path, node


def test_no_folder_holds_more_modules_than_a_reader_can_take_in() -> None:
    counts = Counter(name_of(path.parent) for path in FILES)
    assert {folder: count for folder, count in counts.items() if count > MODULES_IN_A_FOLDER} == {}


def test_the_name_of_a_module_is_the_name_of_one_module() -> None:
    counts = Counter(path.name for path in PRODUCT_FILES if path.name != "__init__.py")
    assert {name: count for name, count in counts.items() if count > 1} == {}


def test_the_name_of_a_class_is_the_name_of_one_class() -> None:
    counts = Counter(
        node.name
        for path in PRODUCT_FILES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert {name: count for name, count in counts.items() if count > 1} == {}


def test_no_function_is_longer_than_a_page() -> None:
    """Schemas of nodes are lists of inputs, and a kernel of Triton is one function."""
    long = {
        f"{name_of(path)}:{node.name}": lines
        for path, node in definitions((ast.FunctionDef, ast.AsyncFunctionDef))
        if (lines := node.end_lineno - node.lineno + 1) > LINES_OF_A_FUNCTION
        and not path.stem.endswith("_triton")
        and node.name != "define_schema"
    }
    assert long == {}


def test_no_class_has_more_methods_than_one_subject_needs() -> None:
    large = {
        f"{name_of(path)}:{node.name}": count
        for path, node in definitions(ast.ClassDef)
        if (count := sum(isinstance(member, Function) for member in node.body)) > METHODS_OF_A_CLASS
    }
    assert large == {}


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_a_package_says_what_it_is_what_it_may_import_and_which_file_to_open(package: Path) -> None:
    said = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert "May import" in said
    first = re.search(r"Open ([\w/]+\.py) first", said)
    assert first and (package / first[1]).is_file(), said


def test_what_is_public_has_a_docstring() -> None:
    bare = [
        f"{name_of(path)}:{name}"
        for path in PRODUCT_FILES
        for name, node in _public(ast.parse(path.read_text(encoding="utf-8")))
        if not ast.get_docstring(node)
    ]
    assert bare == []


def _public(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Functions of a module and methods of its classes that others call; what overrides an interface of torch,
    ComfyUI or of a class with a docstring is described there."""
    described = {
        member.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, Function) and ast.get_docstring(member)
    }
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, Function) and not member.name.startswith("_") and member.name not in described:
                    yield f"{node.name}.{member.name}", member


def test_modules_that_are_imported_late_are_there() -> None:
    """Kernels of Triton are imported by name, on GPUs alone."""
    missing = [
        f"{name_of(path)}: {called.args[0].value}"
        for path, called in definitions(ast.Call)
        if getattr(called.func, "id", getattr(called.func, "attr", "")) in ("import_module", "tried_out")
        and called.args
        and isinstance(called.args[0], ast.Constant)
        and str(called.args[0].value).startswith(".")
        and not _sibling(path, called.args[0].value)
    ]
    assert missing == []


def _sibling(path: Path, relative: str) -> bool:
    name = relative.lstrip(".")
    folder = path.parents[len(relative) - len(name) - 1]
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()
