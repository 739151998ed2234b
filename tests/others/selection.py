"""Which tests of a checkout concern weight norm: what their sources say, nothing is imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

MENTION = re.compile(r"weight_?norm(?!al)", re.IGNORECASE)
ALL = "*"
_SETS_UP = {"setUp", "setUpClass", "setup_method", "setup_class"}


def tests_of(path: Path, library: str) -> dict[str, list[str]]:
    """File -> names of its test functions that concern weight norm, or ``[ALL]``.

    A function concerns it if it mentions it, or uses another function or a class of its file that
    does. Where a file imports a class from ``library`` whose own file mentions it, as tests of
    models do, all tests of the file are taken: most stand in base classes somewhere else.
    """
    found: dict[str, list[str]] = {}
    for file in [path] if path.is_file() else sorted(path.rglob("test*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        if not MENTION.search(source) and not (library and library in source):
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue  # made so on purpose, for tests of parsers
        imported = set(_imported(tree, library))
        chosen = [ALL] if imported and imported & _classes(library) else _concerned(tree)
        if chosen:
            found[str(file.resolve())] = chosen
    return found


@functools.cache
def _classes(library: str) -> set[str]:
    """The classes of an installed library whose files mention weight norm."""
    spec = importlib.util.find_spec(library) if library else None
    found: set[str] = set()
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).rglob("*.py"):
            source = file.read_text(encoding="utf-8", errors="replace")
            if re.search(r"\bweight_norm\(", source):
                found.update(re.findall(r"^class (\w+)", source, re.MULTILINE))
    return found


def _imported(tree: ast.Module, library: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library:
            yield from (alias.name for alias in node.names)


def _concerned(tree: ast.Module) -> list[str]:
    names: dict[str, set[str]] = {}  # of each definition: what it names
    methods: dict[str, list[str]] = {}  # of each class
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods[node.name] = []
            inside = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            for method in inside:
                methods[node.name].append(method.name)
                names.setdefault(method.name, set()).update(_names(method))
            outside = [n for n in node.body if n not in inside]
            names.setdefault(node.name, set()).update(*map(_names, outside))
        elif isinstance(node, ast.FunctionDef):
            names.setdefault(node.name, set()).update(_names(node))
    concerned = {name for name, said in names.items() if any(map(MENTION.search, {name} | said))}
    while True:
        more = {name for name, said in names.items() if said & concerned}
        for cls, own in methods.items():
            # A class whose tests share a weight norm; or one with a method that has one, for those
            # who only name the class.
            if cls in concerned or _SETS_UP & concerned & set(own):
                more.update(own)
            if not any(name.startswith("test") for name in own) and concerned & set(own):
                more.add(cls)
        if more <= concerned:
            return sorted(name for name in concerned if name.startswith("test"))
        concerned |= more


def _names(node: ast.AST) -> set[str]:
    said: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name):
            said.add(n.id)
        elif isinstance(n, ast.Attribute):
            said.add(n.attr)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str):
            said.add(n.value)
    return said
