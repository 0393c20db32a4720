"""What the project's modules define, read from their text: nothing is imported."""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import ROOT

PACKAGES = ("eupe_jax", "configs", "convert", "launch")


@dataclass(frozen=True)
class Definition:
    """A public class, function or method, or a module as a whole.

    where: FILE:LINE. name: its import path. doc: its docstring, "" for none. owner: that of the class around it.
    """

    where: str
    name: str
    node: ast.AST
    doc: str
    owner: str = ""


def modules(*packages: str) -> list[Path]:
    """Every module of these packages; empty ones, which have nothing to say, are left out."""
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py")) if path.stat().st_size]


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse(path.read_text())


def import_path(path: Path) -> str:
    """eupe_jax/evals/knn.py -> eupe_jax.evals.knn"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def definitions(path: Path) -> Iterator[Definition]:
    """The module, and everything public in it but what functions define inside."""
    tree, where, module = parsed(path), path.relative_to(ROOT), import_path(path)
    yield Definition(f"{where}:1", module, tree, ast.get_docstring(tree) or "")

    def inside(body: list[ast.stmt], prefix: str, owner: str) -> Iterator[Definition]:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                doc = ast.get_docstring(node) or ""
                yield Definition(f"{where}:{node.lineno}", f"{prefix}.{node.name}", node, doc, owner)
                if isinstance(node, ast.ClassDef):
                    yield from inside(node.body, f"{prefix}.{node.name}", doc)

    yield from inside(tree.body, module, "")


def _bound(nodes: list[ast.stmt]) -> dict[str, ast.AST]:
    """Names that these statements bind, also under `if` and `try`."""
    found: dict[str, ast.AST] = {}
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found |= {name.id: node for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            found |= _bound([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])
    return found


@functools.cache
def _names(path: Path) -> dict[str, ast.AST]:
    return _bound(parsed(path).body)


@functools.cache
def _module(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if name.split(".")[0] in PACKAGES and path.is_file():
            return path
    return None


def exists(name: str) -> bool:
    """Whether an import path of ours leads to something: a module, a name in it, or a member of a class there.

    A name that a module only imports from a package of others counts, and what is looked up in it is not checked.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if path := _module(".".join(parts[:end])):
            return _has(path, parts[end:])
    return False


def _has(path: Path, parts: list[str]) -> bool:
    if not parts:
        return True
    names = _names(path)
    node = names.get(parts[0])
    if node is None:  # given by a module's __getattr__
        return "__getattr__" in names and parts[0] in _strings(names.get("__all__"))
    if isinstance(node, ast.ImportFrom):
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == parts[0])
        return node.module.split(".")[0] not in PACKAGES or exists(".".join([node.module, original, *parts[1:]]))
    return len(parts) == 1 or not isinstance(node, ast.ClassDef) or _has_member(path, node, parts[1])


def _has_member(path: Path, node: ast.ClassDef, name: str) -> bool:
    if name in members(node):
        return True
    names = _names(path)
    for base in node.bases:
        found = names.get(base.id) if isinstance(base, ast.Name) else None
        if isinstance(found, ast.ClassDef):
            if _has_member(path, found, name):
                return True
        elif isinstance(found, ast.ImportFrom) and found.module.split(".")[0] in PACKAGES:
            if exists(f"{found.module}.{base.id}.{name}"):
                return True
        elif ast.unparse(base) not in ("Protocol", "NamedTuple"):
            return True  # a class of others: who knows
    return False


def _strings(node: ast.AST | None) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} if node else set()


def members(node: ast.ClassDef) -> set[str]:
    """Names of a class's fields, methods, and what its methods set on self."""
    set_on_self = {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and getattr(n.value, "id", "") == "self"
    }
    return set(_bound(node.body)) | set_on_self


@functools.cache
def words_of_code(path: Path) -> set[str]:
    """Every identifier of a module's code, and the words of its strings but for docstrings."""
    tree, found = parsed(path), set()
    docstrings = {id(n.body[0].value) for n in ast.walk(tree) if getattr(n, "body", None) and _is_docstring(n.body)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found |= set(re.findall(r"\w+", node.value))
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str):
                found |= set(value.split("."))
    return found


def _is_docstring(body: object) -> bool:
    first = body[0] if isinstance(body, list) else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
