"""docs/recipe_reference.md has every field of every recipe, and the defaults that the code has."""

import ast
import fnmatch
import functools
import importlib
import pkgutil
import re

import pytest
from ml_collections import ConfigDict

import configs
from configs import common
from tests.docs.pages import ROOT, tables

PAGE = (ROOT / "docs" / "recipe_reference.md").read_text()
REQUIRED = "required"
# Dicts that are one value, though a ConfigDict holds them.
WHOLE = {"overrides", "kwargs", "options", "settings"}
TEMPLATES = {
    "students": (common.student(REQUIRED),),
    "teachers": (common.encoder_teacher(REQUIRED, ()), common.host_teacher(REQUIRED, 0)),
    "data.sources": (common.source(REQUIRED, REQUIRED),),
    "evals": (common.evaluation(REQUIRED, REQUIRED, 0),),
}
# Fields without a default of their own: arguments that must be given.
GIVEN = {
    "teachers.NAME.resolutions": REQUIRED,
    "evals.NAME.every": REQUIRED,
    "teachers.NAME.kind": "set by the function",
}


def fields(config: ConfigDict, prefix: str = "") -> dict:
    """{"loss.patch_cosine": 0.9, ...}; empty groups and the dicts of WHOLE are values."""
    found = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict) and name not in WHOLE and len(value):
            found |= fields(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value.to_dict() if isinstance(value, ConfigDict) else value
    return found


def value_of(cell: str):
    """The Python literal in a cell; `128 / 255` counts as one."""
    body = ast.parse(cell.strip("`"), mode="eval").body
    return ast.literal_eval(_divided(body))


def _divided(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.Tuple):
        return ast.Tuple([_divided(e) for e in node.elts], ast.Load())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return ast.Constant(ast.literal_eval(node.left) / ast.literal_eval(node.right))
    return node


@functools.cache
def recipes() -> dict[str, ConfigDict]:
    """Every recipe in configs/, modes of the quickstart apart: {"stage2_vitb": ..., "quickstart:stage1": ...}."""
    found = {}
    for module in pkgutil.iter_modules(configs.__path__):
        recipe = importlib.import_module(f"configs.{module.name}")
        if hasattr(recipe, "STEPS"):
            found |= {f"{module.name}:{mode}": recipe.get_config(mode) for mode in recipe.STEPS}
        elif hasattr(recipe, "get_config"):
            found[module.name] = recipe.get_config()
    return found


def code_defaults() -> dict:
    found = fields(common.base()) | {"loss.pair_scale.PAIR": 1.0}
    for group, templates in TEMPLATES.items():
        for template in templates:
            found |= {f"{group}.NAME.{name}": value for name, value in fields(template).items()}
    return found | GIVEN


def set_by(config: ConfigDict) -> dict:
    """What a recipe changes: {field: value}; `students.NAME.FIELD` stands for all of its students."""
    known, changed = code_defaults(), {}
    for name, value in fields(config).items():
        template = re.sub(r"^(students|teachers|data\.sources|evals)\.\w+\.", r"\1.NAME.", name)
        template = re.sub(r"^loss\.pair_scale\.\w+", "loss.pair_scale.PAIR", template)
        if template == "students.NAME.model" or template == "teachers.NAME.kind":
            continue  # in the list of recipes; by the function
        if known.get(template, REQUIRED) == value and template not in GIVEN:
            continue
        shown = template if template.startswith("students.") else name
        assert changed.setdefault(shown, value) == value, (
            f"students of one recipe differ in {shown}: say so in the page"
        )
    return changed


def recipe_tables():
    """(columns {pattern: index}, rows) of the tables that say what recipes set."""
    for header, rows in tables(PAGE):
        if header[0] == "field" and header[1].startswith("`"):
            yield {cell.strip("`"): i for i, cell in enumerate(header) if cell.startswith("`")}, rows


def test_every_default():
    listed = {}
    for header, rows in tables(PAGE):
        if header[:2] == ["field", "default"]:
            assert all(len(row) == len(header) for row in rows)
            listed |= {row[0].strip("`"): row[1] for row in rows}
    code = code_defaults()
    missing = [f"| `{name}` | `{code[name]!r}` | SOURCE | WHY |" for name in code if name not in listed]
    assert not missing, "add to docs/recipe_reference.md:\n" + "\n".join(missing)
    assert not set(listed) - set(code), f"fields that no config has: {sorted(set(listed) - set(code))}"
    wrong = []
    for name, cell in listed.items():
        written = value_of(cell) if cell.startswith("`") else cell
        if written != code[name]:
            wrong.append(f"{name} is {code[name]!r}, docs/recipe_reference.md says {cell}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", recipes())
def test_what_a_recipe_sets(name):
    for columns, rows in recipe_tables():  # noqa: B007 (used after the loop)
        if found := [i for pattern, i in columns.items() if fnmatch.fnmatch(name, pattern)]:
            break
    else:
        pytest.fail(f"no table of docs/recipe_reference.md has a column for configs/{name}")
    written = {row[0].strip("`"): value_of(row[found[0]]) for row in rows if row[found[0]]}
    wanted = set_by(recipes()[name])
    lines = [f"| `{field}` | `{value!r}` |" for field, value in wanted.items() if written.get(field, REQUIRED) != value]
    assert not lines, f"configs/{name} sets, unlike docs/recipe_reference.md:\n" + "\n".join(lines)
    assert not set(written) - set(wanted), f"configs/{name} leaves at the default: {sorted(set(written) - set(wanted))}"


def test_the_list_of_recipes():
    ((_, rows),) = [t for t in tables(PAGE) if t[0] == ["recipe", "students"]]
    listed = {}
    for names, students in rows:
        models = dict(re.findall(r"`(\w+)`: `(\w+)`", students))
        listed |= {name: models for name in re.findall(r"`([^`]+)`", names)}
    assert listed == {
        name: {student: entry.model for student, entry in config.students.items()} for name, config in recipes().items()
    }
