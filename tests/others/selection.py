"""Which tests concern weight norm: what their sources say. Nothing is imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

MENTION = re.compile(r"weight_?norm(?!al)", re.IGNORECASE)
ALL = "*"


def select(path: Path, library: str) -> dict[str, list[str]]:
    """File -> names of its test functions that concern weight norm, or ``[ALL]``.

    A function does if it mentions it, or uses what does in its file. A file that imports a class of
    ``library`` whose own file mentions it is taken as a whole, because most tests of models stand
    in base classes somewhere else.
    """
    found: dict[str, list[str]] = {}
    for file in [path] if path.is_file() else sorted(path.rglob("test*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        if not MENTION.search(source) and not (library and library in source):
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:  # meant to be, for tests of parsers
            continue
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library
            for alias in node.names
        }
        chosen = [ALL] if imported and imported & _classes(library) else _concerned(tree)
        if chosen:
            found[str(file.resolve())] = chosen
    return found


@functools.cache
def _classes(library: str) -> set[str]:
    """The classes of an installed library whose files mention weight norm."""
    spec = importlib.util.find_spec(library)
    found: set[str] = set()
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).rglob("*.py"):
            source = file.read_text(encoding="utf-8", errors="replace")
            if "weight_norm(" in source:
                found.update(re.findall(r"^class (\w+)", source, re.MULTILINE))
    return found


def _concerned(tree: ast.Module) -> list[str]:
    names: dict[str, set[str]] = defaultdict(set)  # what each definition of the file names
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            tests = [n for n in node.body if getattr(n, "name", "").startswith("test")]
            names[node.name] |= _names([*node.bases, *(n for n in node.body if n not in tests)])
            for test in tests:
                names[test.name] |= _names([test]) | {node.name}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names[node.name] |= _names([node])
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                names[alias.asname or alias.name].add(alias.name)
        elif isinstance(node, ast.Assign):
            for target in _names(node.targets):
                names[target] |= _names([node.value])
    concerned = {name for name, said in names.items() if any(map(MENTION.search, {name} | said))}
    while more := {name for name, said in names.items() if said & concerned} - concerned:
        concerned |= more
    return sorted(name for name in concerned if name.startswith("test"))


def _names(nodes: Iterable[ast.AST]) -> set[str]:
    """Names, attributes and strings."""
    fields = [getattr(n, f, 0) for x in nodes for n in ast.walk(x) for f in ("id", "attr", "value")]
    return {field for field in fields if isinstance(field, str)}
