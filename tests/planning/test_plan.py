"""Plans end to end: what they say, what they refuse, and that one failing variant stops no other."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import plans
from configs import stage2_vitb, stage3_vitb
from eupe_jax.models.fused_attention import FusedAttention
from eupe_jax.models.layers import exact_gelu
from eupe_jax.planning import pairs, plan, report, sweep, traced
from eupe_jax.planning.compiling import Compiled, write_atomically
from eupe_jax.sharding import chips
from eupe_jax.training.model_flops import step_flops
from tests.launch.test_commands import run

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: the extra 'tpu'"
)
KEYS = {"fits", "hbm_free_fraction", "step_seconds", "predicted_mfu", "model_flops", "collectives", "chip_hours"}


def pair_result(config, chosen, seconds, free=0.4, **fields):
    """What one compiled pair gives, without its compiler."""
    capacity = chips.CHIPS["v5e"].hbm_bytes
    work = step_flops(config, chosen)
    result = {
        "pair": pairs.label(chosen), "compile_seconds": 1.0, "compile_rss_bytes": GIB,
        "model_flops_per_image": {"teachers": work.teachers, "students": work.students, "adapters": work.adapters,
                                  "per_image": work.per_image},
        "executed_flops_per_device": {"teachers": 1e12}, "problems": [],
        "xla_block_ratio": {"students.vitb": 1.005}, "fits": free >= 0, "hbm_bytes": {"temporaries": capacity},
        "hbm_needed": (1 - free) * capacity, "hbm_capacity": capacity, "hbm_free_fraction": free, "largest_tensors": [],
    }  # fmt: skip
    if seconds is not None:
        result |= {
            "step_seconds": seconds, "roofline_seconds": seconds / 2, "compiler_seconds": seconds,
            "exposed_seconds": 0.1, "copy_seconds": 0.0, "predicted_mfu": 0.5, "roofline_mfu": 0.9,
            "program_flops_per_device": 1e12, "flops_difference": 0.0, "kinds": {}, "operations": [],
            "collectives": [{"kind": "all-gather", "network": "ici", "axes": "fsdp", "group_size": 16, "runs": 3,
                             "bytes_each": 1e9, "bytes": 3e9, "seconds": 0.2, "exposed_seconds": 0.1, "of": "qkv",
                             "overlapped": False, "name": "all-gather.1"}],
        }  # fmt: skip
    return result | fields


def description(config):
    return {
        "config": "x.py", "topology": "v5e:16x16", "slices": 1, "date": "2026-01-01", "versions": ["jax 1"],
        "code": "0123456789ab",
        "chip": {"name": "v5e", "peak_flops": 197e12}, "devices": 256, "chips": 256, "hosts": 64,
        "mesh": {"data": 16, "fsdp": 16, "tensor": 1}, "batch_size": config.batch_size, "accumulate": 1,
        "batch_per_device": config.batch_size / 256, "total_steps": config.total_steps, "remat": {"vitb": "none"},
        "kernels": {"students.vitb": {"gelu": "exact_gelu"}}, "compiler_options": {},
        "parameters": {"students": {"vitb": {"backbone": 85_669_632}}, "teachers": {"proxy": 1_850_601_472}},
    }  # fmt: skip


def made(config, seconds, **fields):
    chosen = pairs.choose(config)
    about = description(config)
    about["pairs"] = [pair_result(config, c, s, **fields) for c, s in zip(chosen, seconds, strict=True)]
    return about | plan.add_up(about, config, chosen)


def test_a_stage_adds_up():
    """All work over all time, every pair drawn equally often."""
    config = stage3_vitb.get_config()
    whole = made(config, [0.4, 1.2, 1.0])
    work = [step_flops(config, p).per_image * config.batch_size for p in pairs.every_pair(config)]
    assert whole["model_flops"] == pytest.approx(sum(work) / 9)
    times = [e["step_seconds"] for e in whole["every_pair"]]
    assert whole["step_seconds"] == pytest.approx(sum(times) / 9) and len(times) == 9
    assert whole["predicted_mfu"] == pytest.approx(sum(work) / (sum(times) * 256 * 197e12))
    assert whole["chip_hours"] == pytest.approx(sum(times) / 9 * 100_000 / 3600 * 256)
    assert whole["days"] == pytest.approx(whole["chip_hours"] / 256 / 24)
    assert whole["images_per_second_per_host"] == pytest.approx(config.batch_size / whole["step_seconds"] / 64)
    assert KEYS <= set(whole) and json.loads(json.dumps(whole)) == whole


def test_a_report_says_what_it_predicts_and_assumes():
    text = report.markdown(made(stage3_vitb.get_config(), [0.4, 1.2, 1.0]))
    for words in ("predicted MFU", "fits, 40% of the HBM free", "chip-hours", "384:512", "arithmetic", "Assumptions",
                  "Predicted, not measured", "all-gather", "85.7M", "temporaries"):  # fmt: skip
        assert words in text
    assert "measured" not in text.replace("Predicted, not measured", "")


def test_kernels_are_named_and_settings_shown():
    assert [plan._named(value) for value in (FusedAttention(), exact_gelu, True)] == [
        "FusedAttention", "exact_gelu", "True"
    ]  # fmt: skip


def test_a_step_that_does_not_fit_says_by_how_much_and_which_tensors():
    tensors = [[4.5 * GIB, "bf16[12,32,261,3072]", "blocks/mlp/fc1"]]
    whole = made(stage2_vitb.get_config(), [None], free=-1.0, largest_tensors=tensors)
    assert whole["fits"] is False and whole["step_seconds"] is None and whole["chip_hours"] is None
    text = report.markdown(whole)
    assert "does not fit" in text and "15.75 GiB over" in text and "4.50 GiB bf16[12,32,261,3072]" in text
    assert "first change to try: keep fewer activations" in text and "--config.students.vitb.remat=names" in text


def test_a_tight_fit_is_no_error_but_gets_advice():
    whole = made(stage2_vitb.get_config(), [0.3], free=0.05)
    assert whole["fits"] and whole["advice"] and "under the 10% wanted" in report.markdown(whole)


def test_the_index_keeps_what_was_made_before_and_names_what_failed(tmp_path, monkeypatch):
    """No such recipe can be compiled without libtpu, or on a pod of five devices: the run goes on, and says so."""
    kept = plans.row("stage2_vitb", "v5e:16x16", made(stage2_vitb.get_config(), [0.3]))
    write_atomically(tmp_path / "index.json", json.dumps({plans.file_name("stage2_vitb", "v5e:16x16"): kept}).encode())
    monkeypatch.setattr(plans, "TOPOLOGIES", ("v5e:16x16", "v5e:5x1"))
    monkeypatch.setattr(sys, "argv", ["plans.py", "--topology=v5e:5x1", "--only=vitb", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        plans.main()
    text = (tmp_path / "README.md").read_text()
    assert ended.value.code == 1 and "300.0 ms" in text and "v5e:5x1" in text
    assert len([line for line in text.splitlines() if line.startswith(("| [stage", "| stage"))]) == 3


def test_a_step_that_compiles_and_does_not_fit_names_what_is_large():
    largest = ((20 * GIB, "f32[9]", "blocks"),)
    compiled = Compiled("", 0.0, 0.0, 0, {"temporaries": 20 * GIB}, {}, None, None, largest)
    found = plan._memory(compiled, chips.CHIPS["v5e"])
    assert not found["fits"] and found["largest_tensors"] == [[20 * GIB, "f32[9]", "blocks"]]


def test_a_step_that_compiles_and_does_not_fit_is_not_timed():
    """A plan's days are those of a run that can be run."""
    whole = made(stage2_vitb.get_config(), [0.3], fits=False)
    assert whole["step_seconds"] is None and whole["days"] is None and "predicted MFU" not in report.markdown(whole)


def test_the_index_refuses_a_recipe_that_does_not_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plans.py", "--only=nosuch", f"--out={tmp_path / 'new'}"])
    with pytest.raises(SystemExit) as ended:
        plans.main()
    assert ended.value.code == 2 and "--only=nosuch: no such recipe" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- what is refused before anything is compiled


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e-256", "such as v5e:"),
        ("v5litepod:4x4", "GENERATION:SIDES"),
        ("v5e:4x4x4", "is unknown"),
        ("v5e:64x64", "such as v5e:"),
        ("h100:8", "of v4, v5e, v5p, v6e, tpu7x"),
    ],
)
def test_unknown_topologies_are_refused_with_near_ones(topology, words):
    with pytest.raises(ValueError, match="--topology=") as error:
        chips.topology(topology)
    assert words in str(error.value)


def test_chips_are_told_by_their_devices():
    def device(kind, **fields):
        return type("Device", (), {"device_kind": kind, "memory_stats": lambda self: None, **fields})()

    assert chips.chip_of(device("TPU v5 lite")).name == "v5e" and chips.chip_of(device("TPU v5")).name == "v5p"
    assert chips.chip_of(device("cpu")) is None
    half, whole = chips.chip_of(device("TPU v4", num_cores=1)), chips.chip_of(device("TPU v4", num_cores=2))
    assert whole.peak_flops == 2 * half.peak_flops == 275e12 and half.devices == 2 and whole.devices == 1
    peaks = {
        "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12,
    }  # fmt: skip
    assert {kind: chips.chip_of(device(kind)).peak_flops for kind in peaks} == peaks
    for other in ("NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10"):
        assert chips.chip_of(device(other)) is None
    small = device("NVIDIA A100-SXM4-40GB", memory_stats=lambda self: {"bytes_limit": 30 * 2**30})
    assert chips.chip_of(small).hbm_bytes == 30 * 2**30


@needs_libtpu
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("batch_size", 6, "batch_size"),
        ("mesh.fsdp", 3, "mesh.fsdp=3"),
        ("mesh.tensor", 4, "heads"),
        ("accumulate", 5, "accumulate"),
        ("students", {}, "students is empty"),
    ],
)
def test_impossible_requests_are_refused_before_compiling(field, value, words):
    config = stage2_vitb.get_config("runlocal")
    with config.unlocked():
        if "." in field:
            config.mesh[field.partition(".")[2]] = value
        elif value == {}:
            del config.students["vitb"]
        else:
            config[field] = value
    with pytest.raises(ValueError, match=words):
        plan.check(config, "v5e:2x2", 1)


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "launch/plan.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}, **environment},
    )  # fmt: skip


def test_the_command_refuses_in_one_line():
    result = run("launch/plan.py", "--config=configs/stage2_vitb.py:runlocal", "--topology=v5e-256")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: --topology=v5e-256 is unknown")


def test_flags_that_would_do_nothing_or_fail_after_hours_are_refused(tmp_path):
    """In a process of its own: commands define the same flags."""
    (tmp_path / "file").write_text("")
    refused = {
        f"--json={tmp_path}": "is a folder", f"--sweep --json={tmp_path}": "is a folder",
        f"--out={tmp_path}/file/x.md": "--out: the folder", f"--hlo={tmp_path}/file": "--hlo: the folder",
        f"--sweep --hlo={tmp_path}/hlo": "--hlo is for one plan", "--json=gs://b/x": "is remote",
        "--remat=full": "--remat compares variants",
        "--product": "--product compares", "--sweep --accumulate=1,x": "--accumulate=1,x: give whole numbers",
        "--sweep --remat=": "--remat=: give at least one",
    }  # fmt: skip
    code = """
import json, sys
from pathlib import Path
from absl import flags
from absl.testing import flagsaver
from launch import plan
said = {}
for words in json.loads(sys.argv[1]):
    with flagsaver.flagsaver():
        try:
            flags.FLAGS(["plan.py", *words.split(" ")])
            plan._check_flags()
        except (flags.Error, ValueError) as error:
            said[words] = str(error)
overrides = plan._overrides(["--config=a.py", "--config.b=1", "--config.c", "2", "--json=x", "--config.d", "--sweep"])
try:
    plan._copy_hlo({"pairs": [{"pair": "1:1", "digest": "gone", "fits": True}]}, Path("no"), Path("no"))
except ValueError as error:
    said["gone"] = str(error)
print(json.dumps([said, overrides, plan.AXES["fsdp"].value]))
"""
    fine = [f"--sweep --json={tmp_path}/sweep --accumulate=1,2", f"--json={tmp_path}/a/b.json --out={tmp_path}/x.md"]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([*refused, *fine])], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said, overrides, default = json.loads(done.stdout)
    assert "no/gone.hlo.gz is gone" in said.pop("gone") and said.keys() == refused.keys()
    for words, part in refused.items():
        assert part in said[words]
    assert (tmp_path / "sweep_rows").is_dir() and (tmp_path / "a").is_dir()
    assert overrides == ["--config.b=1", "--config.c=2", "--config.d"] and default == list(sweep.AXES["fsdp"])


def test_without_libtpu_the_extra_is_named_after_what_is_wrong_with_the_config(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = stage2_vitb.get_config("runlocal")
    with pytest.raises(ImportError, match=r"pip install 'eupe_jax\[tpu\]'"):
        plan.check(config, "v5e:2x2", 1)
    config.total_steps = 0
    with pytest.raises(ValueError, match="total_steps"):
        plan.check(config, "v5e:2x2", 1)


@needs_libtpu
def test_a_plan_from_the_command_line_to_json(tmp_path):
    flags = ("--config=configs/stage2_vitb.py:runlocal", "--topology=v5e:2x2", f"--cache={tmp_path}/cache")
    result = command(*flags, f"--json={tmp_path}/plan.json", f"--out={tmp_path}/plan.md", f"--hlo={tmp_path}/hlo")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert KEYS <= set(found) and found["fits"] and 0.9 < found["hbm_free_fraction"] < 1
    assert found["step_seconds"] > 0 and 0 < found["predicted_mfu"] < 1 and not found["problems"]
    assert abs(found["pairs"][0]["flops_difference"]) <= plan.FLOPS_TOLERANCE
    report_ = (tmp_path / "plan.md").read_text()
    assert report_ in result.stdout and found["code"] in report_
    assert [p.name for p in (tmp_path / "hlo").iterdir()] == ["32_32.hlo.gz"]
    assert not list(tmp_path.rglob("*.tmp"))
    # again, from the cache; with a problem in it, the status says so
    (kept,) = (tmp_path / "cache").glob("pair-*.json")
    write_atomically(kept, json.dumps(json.loads(kept.read_text()) | {"problems": ["no gradient"]}).encode())
    begun = time.monotonic()
    again = command(*flags)
    assert again.returncode == 1 and "0:0" not in again.stderr and time.monotonic() - begun < 120
    lines = [line for line in again.stdout.splitlines() if line != "- PROBLEM: no gradient"]
    assert (
        lines[2].startswith("Made ")
        and lines[:2] + lines[3:] == result.stdout.splitlines()[:2] + (result.stdout.splitlines()[3:])
    )


# ---- sweeps


def test_variants_change_one_thing_at_a_time_or_all():
    config = stage2_vitb.get_config()
    axes = {"remat": ("none", "full"), "accumulate": (1, 2), "fsdp": (8, config.mesh.fsdp)}
    found = list(sweep.variants(config, axes))
    own = {axis: sweep.read(config, axis) for axis in axes}
    assert found[0] == own and len(found) == 1 + sum(v != own[a] for a, values in axes.items() for v in values)
    assert all(sum(cell[a] != own[a] for a in axes) <= 1 for cell in found)
    assert len(list(sweep.variants(config, axes, product=True))) == 8


def test_a_variant_is_a_copy_with_its_values():
    config = stage2_vitb.get_config()
    other = sweep.changed(config, {"remat": "full", "accumulate": 4, "fsdp": 32})
    assert other.students.vitb.remat == "full" and other.accumulate == 4 and other.mesh.fsdp == 32
    assert config.accumulate == 1 and config.mesh.fsdp != 32


def test_a_failing_variant_stops_no_other_and_every_row_is_kept(tmp_path):
    """Nothing can be planned for a topology that does not exist: both rows end in an error, and are written."""
    config = stage2_vitb.get_config()
    cells = [{"accumulate": 1}, {"accumulate": 2}]
    rows = sweep.run(config, "x", "v5e:3x5", 1, pairs.choose(config), tmp_path / "cache", cells, tmp_path / "rows")
    assert len(rows) == 2 and all(row["error"] for row in rows)
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == ["accumulate-1.json", "accumulate-2.json"]
    assert sweep.markdown(rows).count("\n") == 3


@needs_libtpu
@pytest.mark.slow
def test_a_sweep_of_real_plans(tmp_path):
    config = stage2_vitb.get_config("runlocal")
    for student in config.students.values():
        student.remat = "none"
    cells = list(sweep.variants(config, {"accumulate": (1, 3), "remat": ("none", "full")}))
    rows = sweep.run(config, "x", "v5e:2x2", 1, pairs.choose(config), tmp_path / "cache", cells, tmp_path / "rows")
    assert len(rows) == 3 and len(list((tmp_path / "rows").iterdir())) == 3
    assert [row["variant"]["accumulate"] for row in rows if row["error"]] == [3]  # three do not divide the batch
    times = [row["plan"]["step_seconds"] for row in rows[:2]]
    assert times == sorted(times) and all(not row["plan"]["problems"] for row in rows[:2])
    executed = {row["variant"]["remat"]: row["plan"]["pairs"][0]["executed_flops_per_device"] for row in rows[:2]}
    assert traced.RECOMPUTED in executed["full"] and traced.RECOMPUTED not in executed["none"]


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_names_what_is_large(tmp_path):
    """The real stage-2 step with 128 images on each of four chips: the compiler refuses."""
    config = stage2_vitb.get_config()
    config.batch_size, config.mesh.fsdp = 512, 4
    for student in config.students.values():
        student.remat = "none"
    whole = plan.make_plan(config, "x", "v5e:2x2", 1, pairs.choose(config), tmp_path)
    (pair,) = whole["pairs"]
    assert not whole["fits"] and whole["hbm_free_fraction"] < 0 and whole["chip_hours"] is None
    assert pair["hbm_needed"] > pair["hbm_capacity"] and pair["largest_tensors"]
    assert "remat" in whole["advice"] and "does not fit" in report.markdown(whole)


@needs_libtpu
@pytest.mark.slow
def test_slices_move_gradients_over_the_data_centre_network(tmp_path):
    config = stage2_vitb.get_config("runlocal")
    whole = plan.make_plan(config, "x", "v5e:2x2", 2, pairs.choose(config), tmp_path)
    assert whole["mesh"]["data"] == 8 and whole["devices"] == 8 and not whole["problems"]
    assert {c["network"] for c in whole["collectives"]} >= {"dcn"}


def test_rows_are_ordered_by_predicted_time_with_those_that_do_not_fit_last():
    config = stage2_vitb.get_config()
    slow, fast = made(config, [0.5]), made(config, [0.3])
    full = made(config, [None], free=-1.0)
    rows = [{"variant": {"fsdp": i}, "error": None, "plan": p} for i, p in enumerate((full, slow, fast))]
    rows.append({"variant": {"fsdp": 3}, "error": "no", "plan": None})
    rows.sort(key=sweep._order)
    assert [row["variant"]["fsdp"] for row in rows] == [2, 1, 0, 3]
    assert "300.0 ms" in sweep.markdown(rows).splitlines()[2]
    whole = sweep.document(rows)
    assert KEYS <= set(whole) and whole["fits"] and whole["step_seconds"] == pytest.approx(0.3)
    assert whole["variant"] == {"fsdp": 2} and whole["rows"] == rows
    none = sweep.document(rows[3:])
    assert KEYS <= set(none) and not none["fits"] and none["problems"] == ["no"] and none["step_seconds"] is None
    assert sweep.document(rows[2:])["fits"] is False
