"""Nine of ten public functions and methods of skipvar/ have a docstring: those of modules and of their public classes,
without setters, overloads, `forward` of a network, and methods that a base class or Protocol here documents."""

import ast
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

Classes = dict[str, ast.ClassDef]
"""All of the package, by their simple names."""


def last_name(expression: ast.expr) -> str:
    """`nn.Module` is `Module`, `Protocol[T]` is `Protocol`."""
    return ast.unparse(expression).split("[")[0].split(".")[-1]


def public_functions(body: Iterable[ast.stmt]) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Those of a module or a class, without setters and overloads."""
    functions = [node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    left_out = {"setter", "overload"}
    return [f for f in functions if f.name[0] != "_" and left_out.isdisjoint(map(last_name, f.decorator_list))]


def interfaces(home: ast.ClassDef, classes: Classes) -> set[str]:
    """The classes that it is derived from, and the Protocols whose every method it has, as a method or a field."""
    fields = {last_name(node.target) for node in home.body if isinstance(node, ast.AnnAssign)}
    own = fields | {method.name for method in public_functions(home.body)}
    protocols = [node for node in classes.values() if "Protocol" in map(last_name, node.bases)]
    met = {node.name for node in protocols if own >= {method.name for method in public_functions(node.body)}}
    return {last_name(base) for base in home.bases} | met


def documented_above(home: ast.ClassDef, classes: Classes, seen: frozenset[str] = frozenset()) -> set[str]:
    """The methods that a class need not document: its interfaces do, at any level."""
    names = interfaces(home, classes) - seen - {home.name}
    found = {"forward"} if "Module" in names else set[str]()
    for above in (classes[name] for name in names & classes.keys()):
        found |= {method.name for method in public_functions(above.body) if ast.get_docstring(method)}
        found |= documented_above(above, classes, seen | names)
    return found


def test_nine_of_ten_public_functions_are_documented() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sorted(REPOSITORY.glob("skipvar/**/*.py"))}
    found = [(path, node) for path, tree in trees.items() for node in tree.body if isinstance(node, ast.ClassDef)]
    classes = {home.name: home for _, home in found}
    counted = [(path, function) for path, tree in trees.items() for function in public_functions(tree.body)]
    for path, home in found:
        methods = public_functions(home.body) if home.name[0] != "_" else []
        known = documented_above(home, classes)
        counted += [(path, method) for method in methods if method.name not in known]
    bare = [f"{path}:{node.lineno} {node.name}" for path, node in counted if not ast.get_docstring(node)]
    assert len(bare) <= len(counted) / 10, "\n".join([f"{len(bare)} of {len(counted)} lack one:", *bare])
