"""notebooks/*.ipynb: clean, referring to what is there, and executed.

Those that look and inspect run here cell by cell in this process, on the folder of a run that is written for them: a
kernel for each would import everything again, and a step would have to be compiled. The slow test trains a tiny run and
executes all three in Jupyter's kernel, as a reader does; the third alone takes torch and ExecuTorch.
"""

import ast
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from configs import common
from eupe_jax.training.loop import train
from eupe_jax.training.measure import measure_statistics
from tests.docs.definitions import PACKAGES, exists
from tests.docs.pages import ROOT
from tests.docs.written_run import write_run

FOLDER = ROOT / "notebooks"
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}


def cells(name: str, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOKS[name].read_text())["cells"] if cell["cell_type"] == kind]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def is_parameters(cell: dict) -> bool:
    return "parameters" in cell["metadata"].get("tags", ())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_clean_and_complete(name):
    notebook = json.loads(NOTEBOOKS[name].read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert not notebook["metadata"].keys() - {"kernelspec", "language_info"}
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in cells(name):
        assert cell["outputs"] == [] and cell["execution_count"] is None, "clear all outputs before saving"
    assert NOTEBOOKS[name].stat().st_size < 50_000, "pictures inside?"
    (parameters,) = [cell for cell in cells(name) if is_parameters(cell)]
    assert parameters == cells(name)[0], "what a reader changes comes first"
    assert all(isinstance(node, ast.Assign) for node in ast.parse(text(parameters)).body)
    told = "\n".join(text(cell) for cell in cells(name, "markdown"))
    assert "make quickstart" in told and "your own" in told.replace("\n", " "), (
        "say what to change for a run of one's own"
    )
    for path in re.findall(r"\b(?:docs|launch|convert|configs)/[\w/]+\.\w+", told):
        assert (ROOT / path).is_file(), f"{name} speaks of {path}, which is not there"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_it_imports_is_there(name):
    tree = ast.parse("\n".join(text(cell) for cell in cells(name)))
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            known |= {alias.name: alias.name for alias in node.names if alias.name in PACKAGES}
    used = {
        f"{known[node.value.id]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known
    }
    missing = [path for path in {*known.values(), *used} if not exists(path)]
    assert known and not missing, f"{name} uses {missing}, which is not there"


def prepared(folder):
    """A recipe of seconds, with its pictures and statistics in `folder`."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((48, 48), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{i:02d}.png")
    config = common.base()
    config.total_steps, config.batch_size, config.log_every, config.statistics_steps = 4, 8, 1, 1
    config.students.vit = common.student("eupe_vitt16", dtype="float32", layerscale_init=0.5, **common.TINY["vit"])
    config.teachers.cells = common.host_teacher("tests.faults.spoilt_teacher:Cells", 48, spoilt=0)
    config.student_resolutions, config.adapter.hidden_dim = (32,), 16
    config.optimizer.learning_rate = 1e-2
    config.data.sources.pictures = common.source("images", str(folder / "pictures"))
    config.data.image_size, config.data.threads = 48, 2
    config.augment.update({name: 0.0 for name in config.augment if name.endswith("_p")})  # compiles for nothing
    config.checkpoint.save_every = 2
    config.statistics = str(folder / "statistics")
    measure_statistics(config, config.statistics)
    return config


def with_bad_steps(config):
    """The same with a teacher that gives NaN for about one image of eleven."""
    config = config.copy_and_resolve_references()
    config.teachers.cells.kwargs.spoilt = 11
    return config


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of two runs, one with a bad step, as training writes them, with random weights."""
    folder = tmp_path_factory.mktemp("notebooks")
    config = prepared(folder)
    write_run(config, folder / "clean")
    write_run(with_bad_steps(config), folder / "run", bad=frozenset({2}))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same two, trained."""
    folder = tmp_path_factory.mktemp("trained")
    config = prepared(folder)
    train(config, folder / "clean")
    train(with_bad_steps(config), folder / "run")
    return folder


def parameters(name: str, place) -> dict:
    """What a reader would write into the first cell for the tiny run."""
    run, clean, pictures = str(place / "run"), str(place / "clean"), str(place / "pictures")
    return {
        "look_at_features": {"CHECKPOINT": run, "IMAGES": pictures, "COUNT": 2, "SEARCHED": 7},
        "inspect_run": {"RUN": run, "BESIDE": {"without bad steps": clean}},
        "evaluate_and_export": {
            "CHECKPOINT": run, "EXPERTS_OF": clean, "IMAGES": pictures, "COUNT": 60, "AGREEMENT": 4,
            "OUT": str(place / "out"),
        },
    }[name]  # fmt: skip


def executed(name: str, place, monkeypatch) -> dict:
    """Every cell, in order, in this process; returns the names that are left."""
    monkeypatch.chdir(FOLDER)
    namespace = {"__name__": "__main__"}
    for cell in cells(name):
        exec(compile(text(cell), f"{name}.ipynb:{cell['id']}", "exec"), namespace)
        if is_parameters(cell):
            changed = parameters(name, place)
            assert changed.keys() <= namespace.keys(), "the first cell has other names by now"
            namespace |= changed
    return namespace


@pytest.fixture
def pyplot():
    """Figures that are drawn into memory, and closed afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_look_at_features(written, monkeypatch, pyplot, capsys):
    names = executed("look_at_features", written, monkeypatch)
    said = capsys.readouterr().out
    assert "eupe_vitt16, 0.0" in said and "'patches': (2, 2, 2, 32)" in said
    assert names["nearest"].shape == (3, 5) and not (names["nearest"] == names["queries"][:, None]).any()
    assert names["rows"]["trained"][0, 1, 1] == pytest.approx(1), "the patch under the cross is like itself"
    assert not np.allclose(names["rows"]["trained"], names["rows"]["random weights"])
    shown = [pyplot.figure(number).axes for number in pyplot.get_fignums()]
    assert [sum(bool(ax.images) for ax in axes) for axes in shown] == [6, 6, 18]


def test_inspect_run(written, monkeypatch, pyplot, capsys):
    names = executed("inspect_run", written, monkeypatch)
    said = capsys.readouterr().out
    assert "without bad steps: teachers.cells.kwargs.spoilt is 0, here 11" in said
    assert "1 bad steps\nstep 2 (s32_t48): 8 records of pictures\n  vit: loss nan" in said
    assert "steps kept: [2, 4] of 4" in said and "vit.backbone" in said and "6 coordinates over 72 tokens" in said
    assert names["curve"]("this run", "vit/loss").shape == (2, 3), "the bad step has no loss"
    assert names["curve"]("without bad steps", "vit/loss").shape == (2, 4)
    assert len(pyplot.get_fignums()) == 4  # losses, optimizer, speed, statistics
    for number in pyplot.get_fignums():
        for ax in pyplot.figure(number).axes:
            assert ax.lines or ax.collections, f"nothing is drawn in {ax.get_title()!r}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_in_a_kernel(name, trained, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    (at,) = [i for i, cell in enumerate(notebook.cells) if is_parameters(cell)]
    changed = "\n".join(f"{field} = {value!r}" for field, value in parameters(name, trained).items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(changed))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == {"look_at_features": 3, "inspect_run": 4, "evaluate_and_export": 2}[name]
    said = "".join(output.get("text", "") for output in outputs)
    if name == "inspect_run":
        bad = (trained / "run" / "bad_steps.jsonl").read_text().splitlines()
        assert f"{len(bad)} bad steps\nstep {json.loads(bad[0])['step']} (s32_t48)" in said
    if name == "evaluate_and_export":
        (least,) = re.findall(r"least cosine (\S+)", said)
        assert float(least) > 0.9999
        assert {"student.pte", "student.json", "student.safetensors"} <= set(os.listdir(trained / "out"))
        rows = re.findall(r"cells +(?:cls|patches) +32 px: cosine", said)
        assert len(rows) == 2
