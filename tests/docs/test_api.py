"""docs/api.md and the docstrings that the API reference is made of."""

import ast
import re
import subprocess
import sys

import pytest

import eupe_jax
from tests.docs.definitions import (
    PACKAGES,
    Definition,
    definitions,
    exists,
    import_path,
    members,
    modules,
    parsed,
    words_of_code,
)
from tests.docs.pages import ROOT, tables

PAGE = ROOT / "docs" / "api.md"
# What docstrings may call by name though it is neither in the file nor ours: names of PyTorch, XLA, ExecuTorch, ...
OF_OTHERS = set(
    "save_to_disk data_source interpolate async_collective_name estimated_cycles as_text compiled vmem_limit_bytes "
    "memory_analysis distributed initialize native_layer_norm bmm scaled_dot_product_attention topologies args with "
    "tfds experimental jax encode_256 encode_256x320 wait_s data_s log_s best_metric".split()
)
ARRAY = re.compile(r"(jax\.Array|np\.ndarray|Tokens|Tensor)( \||$)")
OF_FRAMEWORKS = {"forward", "setup", "main"}  # PyTorch's, Flax's, absl's: the class or the module says what it is
SHAPE_IN_NAME = re.compile(r"_(?:[A-Za-z0-9]{1,3}x)*[A-Z][A-Za-z0-9]*$")


def public(*packages):
    """(module, every public definition in it)"""
    return [(path, definition) for path in modules(*packages) for definition in definitions(path)]


def takes_arrays(node: ast.FunctionDef) -> list[str]:
    """Parameters that are arrays and whose names do not say their shape."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arrays = [a.arg for a in arguments if a.annotation and ARRAY.match(ast.unparse(a.annotation))]
    return [name for name in arrays if not SHAPE_IN_NAME.search(name) and not name.endswith("key") and name != "state"]


def raises(node: ast.FunctionDef) -> set[str]:
    """Names of the exceptions that the function's own body raises."""
    thrown = (n.exc for n in ast.walk(node) if isinstance(n, ast.Raise) and n.exc is not None)
    names = {ast.unparse(e.func if isinstance(e, ast.Call) else e) for e in thrown}
    return {name for name in names if re.fullmatch(r"[A-Z]\w*", name)}


def problem(definition: Definition) -> str | None:
    """What a docstring lacks."""
    node, doc, around = definition.node, definition.doc, definition.owner
    if getattr(node, "name", "") in OF_FRAMEWORKS:
        return None
    if not doc:
        return "has no docstring"
    if not isinstance(node, ast.FunctionDef):
        return None
    if (arrays := takes_arrays(node)) and not re.search(r"\[[^]]*\]|scalar|array", f"{doc} {around}"):
        return f"does not say what shape {', '.join(arrays)} has"
    if (errors := raises(node)) and not re.search(r"[Rr]aise|[Rr]efuse", f"{doc} {around}"):
        return f"does not say that it raises {', '.join(sorted(errors))}"
    return None


def references(path, definition):
    """Names in backticks of a docstring that lead nowhere."""
    known = words_of_code(path)
    for quoted in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", definition.doc):
        if re.match(rf"({'|'.join((*PACKAGES, 'benchmarks', 'docs', 'tests'))})/\S*\.\w+$", quoted.split()[0]):
            if not (ROOT / quoted.split()[0]).is_file():
                yield quoted
        elif re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(\))?", quoted) and not quoted.startswith("config."):
            head, *rest = quoted.removesuffix("()").split(".")
            if {head, *rest} - known - EVERYWHERE - OF_OTHERS - {"py"}:
                yield quoted
            elif rest and exists(f"{import_path(path)}.{head}") and not exists(f"{import_path(path)}.{head}.{rest[0]}"):
                yield quoted


EVERYWHERE = {
    name
    for path, definition in public(*PACKAGES)
    for name in (path.stem, getattr(definition.node, "name", ""))
    + tuple(members(definition.node) if isinstance(definition.node, ast.ClassDef) else ())
}


def test_every_public_name_is_documented():
    found = public("eupe_jax", "convert")
    assert len(found) > 800, "hardly anything is public: does this test still read the modules?"
    wrong = [f"{d.where}: {d.name} {said}" for _, d in found if (said := problem(d))]
    assert not wrong, "\n".join(wrong)


def test_what_docstrings_refer_to_is_there():
    wrong = [f"{d.where}: `{name}`" for path, d in public("eupe_jax", "convert") for name in references(path, d)]
    assert not wrong, "these names in docstrings lead nowhere:\n" + "\n".join(wrong)


def test_the_page_names_what_exists():
    ((_, rows),) = tables(PAGE.read_text())
    names = [name.strip("`") for name, _ in rows if name.startswith("`")]
    assert len(names) > 30
    assert not [name for name in names if not exists(name)]
    assert {f"eupe_jax.{name}" for name in eupe_jax.__all__} <= set(names)
    documented = {d.name: d for _, d in public(*PACKAGES)}
    for name, said in rows:
        node = documented.get(name.strip("`"))
        if node is not None and isinstance(node.node, ast.ClassDef):  # `.member` in its line
            assert not set(re.findall(r"`\.(\w+)`", said)) - members(node.node), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(): pass", "has no docstring"),
        ("class C: pass", "has no docstring"),
        ("def f(x: jax.Array): 'Doubles.'", "what shape x has"),
        ("def f(x: jax.Array): 'Doubles [B, D].'", None),
        ("def f(x_BxD: np.ndarray): 'Doubles.'", None),
        ("def f(x):\n    'Doubles.'\n    raise ValueError(x)", "raises ValueError"),
        ("def f(x):\n    'Doubles; raises ValueError.'\n    raise ValueError(x)", None),
    ],
)
def test_what_is_lacking_is_noticed(text, said):
    node = ast.parse(text).body[0]
    found = problem(Definition("x.py:1", "x", node, ast.get_docstring(node) or ""))
    assert found is None if said is None else said in found


def test_names_are_looked_up_in_what_modules_define(tmp_path):
    for name in ("eupe_jax.load_encoder", "eupe_jax.evals.knn.Settings.ks", "eupe_jax.data.sources.Source", "convert"):
        assert exists(name), name
    for name in ("eupe_jax.load_encoders", "eupe_jax.evals.knn.Settings.kss", "eupe_jax.evals.knns", "numpy.array"):
        assert not exists(name), name
    module = ROOT / "eupe_jax" / "evals" / "knn.py"
    for doc, wrong in (("`Settings.ks`", []), ("`Settings.kss` and `x_ClassifyMe`", ["Settings.kss", "x_ClassifyMe"])):
        assert list(references(module, Definition("x", "x", parsed(module), doc))) == wrong


@pytest.mark.slow
def test_the_reference_has_a_page_for_every_module(tmp_path):
    pytest.importorskip("pdoc")
    command = [sys.executable, "docs/build_api.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for path in modules("eupe_jax", "convert"):
        page = tmp_path / f"{import_path(path).replace('.', '/')}.html"
        for definition in definitions(path):
            name = definition.name.removeprefix(import_path(path)).lstrip(".")
            assert f'id="{name}"' in page.read_text() or not name, f"{page.name} has nothing of {name}"
    assert "LoadedEncoder" in (tmp_path / "eupe_jax.html").read_text()
