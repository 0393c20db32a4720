"""Results side by side: which row, which column, and what stands under the table."""

import csv
import json

from PIL import Image

from eupe_jax.evals import paper
from tests.launch.test_commands import assert_one_line, run


def result(folder, evaluation, encoder="eupe_vitb16", checkpoint="runs/a", **content):
    folder.mkdir(parents=True)
    settings = content.pop("settings", {})
    content = {"eval": evaluation, "encoder": encoder, "checkpoint": checkpoint, "data": "/data", **content}
    (folder / "metrics.json").write_text(json.dumps({**content, "settings": settings}))


def test_table_names_checkpoints_and_settings_that_are_not_the_authors(tmp_path):
    result(tmp_path / "in" / "1", "knn", metrics={"top1": 0.8412, "top5": 0.9}, settings={"threads": 2})
    result(tmp_path / "in" / "2", "depth", metrics={"rmse": 0.3914}, settings={"schedule_scale": 0.5})
    result(tmp_path / "in" / "3", "knn", checkpoint="runs/b", metrics={"top1": 0.7})
    done = run("launch/compare.py", f"--out={tmp_path / 'out'}", tmp_path / "in")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "comparison.csv") as file:
        rows = {row["encoder"]: row for row in csv.DictReader(file)}
    first, second = rows["eupe_vitb16 (runs/a)"], rows["eupe_vitb16 (runs/b)"]
    assert (first["IN1k-KNN"], first["NYUv2"], second["IN1k-KNN"], second["NYUv2"]) == ("84.1", "0.391*", "70.0", "")
    assert rows["EUPE-ViT-B"]["SPair"] == "51.3" and len(rows) == 2 + len(paper.ROWS)
    assert "eupe_vitb16 (runs/a), NYUv2: schedule_scale=0.5" in done.stdout and "threads" not in done.stdout
    Image.open(tmp_path / "out" / "comparison.png").verify()


def test_nothing_to_compare_and_two_results_for_one_cell(tmp_path):
    assert_one_line(run("launch/compare.py", tmp_path), "metrics.json")
    assert_one_line(run("launch/compare.py"), "name at least one folder")
    assert_one_line(run("launch/compare.py", "--out=gs://bucket/x", tmp_path), "--out gs://bucket/x is remote")
    for name in "ab":
        result(tmp_path / name, "knn", metrics={"top1": 0.5})
    assert_one_line(run("launch/compare.py", tmp_path), "two results", "IN1k-KNN")
