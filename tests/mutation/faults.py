"""The faults of a Python module: every comparison, condition, operator, number and statement,
changed one at a time. Texts and annotations stay as they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {}
for _one, _other in (
    *((ast.Eq, ast.NotEq), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Is, ast.IsNot)),
    *((ast.In, ast.NotIn), (ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.FloorDiv)),
):
    SWAPPED |= {_one: _other, _other: _one}

REMOVED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Continue, ast.Break)
CHANGED = (
    *(ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.If, ast.IfExp, ast.While),
    *(ast.comprehension, ast.Return, ast.Constant, ast.Tuple, *REMOVED),
)


class Fault(NamedTuple):
    line: int
    was: str
    now: str
    tree: ast.Module


def faults(source: str, every: int = 1) -> Iterator[Fault]:
    """Each in a tree of its own; those of every N-th place."""
    for k, node in [*enumerate(_changed(ast.parse(source)))][::every]:
        for way in range(2 + len(_parts(node))):
            tree = ast.parse(source)
            changed = _change(tree, _changed(tree)[k], way)
            if changed is not None:
                yield Fault(*changed, ast.fix_missing_locations(tree))


def _changed(tree: ast.Module) -> list[ast.AST]:
    nodes = [*ast.walk(tree)]
    of_types = {id(node.slice) for node in nodes if isinstance(node, ast.Subscript)}
    return [node for node in nodes if isinstance(node, CHANGED) and id(node) not in of_types]


def _parts(node: ast.AST) -> list[ast.expr]:
    """What can be left out of a condition or a tuple."""
    if isinstance(node, ast.BoolOp):
        return node.values
    is_read = isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load)
    return node.elts if is_read and len(node.elts) > 1 else []


def _change(tree: ast.Module, node: ast.AST, way: int) -> tuple[int, str, str] | None:
    """Changes a node in one of its ways; None where there is no such way."""
    was = ast.unparse(node)
    now: ast.AST = node
    if way > 1 and isinstance(node, ast.BoolOp):
        node.values[way - 2] = ast.Constant(isinstance(node.op, ast.And))
    elif way > 1:
        del _parts(node)[way - 2]
    elif way == 1:
        now = _take_out(tree, node)
        if now is None:
            return None
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        node.ops[0] = SWAPPED[type(node.ops[0])]()
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in SWAPPED and not _text(node):
        node.op = SWAPPED[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node.op = ast.UAdd()
        node.operand = ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])
    elif isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        node.value = ast.Constant(None)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        node.value += 1
    else:
        return _negate(node)
    return node.lineno, was, ast.unparse(now)


def _negate(node: ast.AST) -> tuple[int, str, str] | None:
    if isinstance(node, ast.comprehension) and node.ifs:
        test = node.ifs.pop(0)
        return test.lineno, f"if {ast.unparse(test)}", "of every one"
    if not isinstance(node, ast.If | ast.IfExp | ast.While) or isinstance(node.test, ast.UnaryOp):
        return None
    was = ast.unparse(node.test)
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node.lineno, f"if {was}", f"if not ({was})"


def _take_out(tree: ast.Module, node: ast.AST) -> ast.AST | None:
    """Puts ``pass`` in the place of a statement inside a function."""
    if not isinstance(node, REMOVED):
        return None
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return None  # a docstring
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for parent in ast.walk(function):
            for name in ("body", "orelse", "finalbody"):
                block = getattr(parent, name, None)
                if isinstance(block, list) and node in block:
                    block[block.index(node)] = instead = ast.Pass()
                    return instead
    return None


def _text(node: ast.AST) -> bool:
    return any(
        isinstance(part, ast.JoinedStr)
        or (isinstance(part, ast.Constant) and isinstance(part.value, str))
        for part in ast.walk(node)
    )
