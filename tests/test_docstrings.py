"""What is public says what it does, and in which shapes; read from the syntax trees, so nothing is imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "fastskel").rglob("*.py"))}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Function = ast.FunctionDef | ast.AsyncFunctionDef

ARRAY = re.compile(r"\b(NDArray|ArrayLike|ndarray|memmap|Tensor|LongTensor)\b")
MAPPING = re.compile(r"\b(dict|Dict|Mapping|MutableMapping|Callable)\[")
# one extent: a letter or expression of the field (N, T', M*V*C, K+1), a number, `...`, or a named count (out_frames)
EXTENT = r"(?:\.\.\.|[A-Z0-9][\w']*(?:\s?[*+/-]\s?[\w']+)*|sum T|sumT|[a-z]+(?:_[a-z]+)*(?:\s?[*+/-]\s?\w+)*)"
SHAPE = re.compile(rf"\(({EXTENT}),(?:\s*{EXTENT})?(?:,\s*{EXTENT})*\)|\bscalar\b")
TYPED_ARGUMENT = re.compile(r"^\s+\*{0,2}\w+ \([^)]*\):", re.MULTILINE)


def exported(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def definitions(tree: ast.Module) -> dict[str, Definition]:
    """What a module defines at its top level, also under a condition; the last definition of a name counts."""
    found: dict[str, Definition] = {}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition) and not isinstance(node, Definition):
                found[child.name] = child
    return found


def names_array(annotation: ast.expr | None) -> bool:
    """Whether an annotation is an array, or a union or tuple of them; a mapping's arrays have no common shape."""
    if annotation is None:
        return False
    text = ast.unparse(annotation)
    return bool(ARRAY.search(text)) and not MAPPING.search(text)


def handles_arrays(function: Function) -> bool:
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    annotations = [parameter.annotation for parameter in parameters] + [function.returns]
    return any(names_array(node) for node in annotations)


def decorated(function: Function, name: str) -> bool:
    return any(name in ast.unparse(decorator) for decorator in function.decorator_list)


def complaints(tree: ast.Module) -> list[str]:
    found, known = [], definitions(tree)
    for name in exported(tree):
        node = known.get(name)
        if node is None:
            continue
        documentation = ast.get_docstring(node)
        if not documentation:
            found.append(f"{name}: no docstring")
        functions = [(name, node)] if isinstance(node, Function) else []
        if isinstance(node, ast.ClassDef):
            public = (child for child in node.body if isinstance(child, Function) and not child.name.startswith("_"))
            functions = [(f"{name}.{child.name}", child) for child in public]
        for title, function in functions:
            text = ast.get_docstring(function) or ""
            if handles_arrays(function) and not decorated(function, "overload") and not SHAPE.search(text):
                found.append(f"{title}: takes or returns arrays, but states no shape")
        for title, documented in {name: node, **dict(functions)}.items():
            if TYPED_ARGUMENT.search(ast.get_docstring(documented) or ""):
                found.append(f"{title}: repeats a type that its annotation gives")
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_public_names_are_documented(source: str) -> None:
    tree = ast.parse(SOURCES[source].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    assert complaints(tree) == []


@pytest.mark.parametrize(
    "text",
    [
        "(N, T, M, V, C)",
        "(N,)",
        "(..., 4)",
        "(out_frames, M, V, C)",
        "(N, M*V, T*C)",
        "(N, T', D)",
        "scalar",
        "(n + 1,)",
    ],
)
def test_shape_is_recognised(text: str) -> None:
    assert SHAPE.search(f"Features, {text}, metres.")


@pytest.mark.parametrize("text", ["the clip", "(see there)", "a function f(x)", "(T)", "[N, T]", "(so, it does not)"])
def test_prose_is_no_shape(text: str) -> None:
    assert not SHAPE.search(f"Return {text}.")


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("def f(x: int) -> int:\n    return x", "f: no docstring"),
        ("def f(x: Tensor) -> int:\n    '''Do.'''", "f: takes or returns arrays, but states no shape"),
        (
            "class f:\n    '''Do.'''\n    def g(self, x: Tensor): ...",
            "f.g: takes or returns arrays, but states no shape",
        ),
        (
            "def f(x: int):\n    '''Do.\n\n    Args:\n        x (int): It.\n    '''",
            "f: repeats a type that its annotation gives",
        ),
    ],
    ids=["none", "function", "method", "type"],
)
def test_a_gap_is_seen(body: str, complaint: str) -> None:
    assert complaints(ast.parse(f"__all__ = ['f']\n{body}")) == [complaint]
