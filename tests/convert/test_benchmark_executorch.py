"""What the benchmark of phone programs reports is about what it measured."""

import argparse
import json
import math
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch", reason="the phone export needs `pip install eupe_jax[export]`")

from benchmarks import executorch as benchmark  # noqa: E402
from benchmarks import matmul_bound, runtimes  # noqa: E402
from convert import weights  # noqa: E402
from convert.torch_vit import VisionTransformer  # noqa: E402


@pytest.mark.parametrize("side", [32, 64])
def test_the_products_are_all_of_the_models(side):
    vit = VisionTransformer(dim=64, depth=3, num_heads=2, hidden=96).eval()
    operations = sum(2 * math.prod(shape) * count for shape, count in matmul_bound.shapes(vit, side).items())
    assert operations == benchmark.flops(vit, torch.zeros(1, 3, side, side))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 8, 5), (2, 7, 8, 5)])
def test_every_library_computes_the_same_shape(shape):
    rows = [7, 5] if len(shape) == 3 else [2, 7, 5]
    found = matmul_bound.contenders(shape, threads=1)
    assert {"torch", "xnnpack", "jax"} <= set(found)
    for run in found.values():
        results = run()
        results = list(results.values()) if hasattr(results, "values") else list(results)
        assert [list(result.shape) for result in results] == [rows] * matmul_bound.COPIES


def test_all_take_turns_and_are_timed():
    order = []
    times = benchmark.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 4, 10, "")
    assert order == list("ab" * 5)  # the first round warms up
    found = benchmark.spread(times["a"])
    assert found["runs"] == 4 and 0 <= found["p10_ms"] <= found["median_ms"] <= found["p90_ms"] < 1000


def test_no_more_than_three_rounds_beyond_the_time():
    assert len(benchmark.take_turns({"a": lambda: None}, 50, 0, "")["a"]) == 3


def _record(runtime, median_ms, model="eupe_vitt16", precision="fp32"):
    record = {"model": model, "resolution": 256, "precision": precision, "runtime": runtime, "threads": 1}
    return record | {"median_ms": median_ms, "delegated_flops": 1.0, "file_bytes": 2e6}


def test_records_are_kept_or_replaced(tmp_path):
    path = tmp_path / "figures.json"
    benchmark.merge(path, [_record("executorch", 1.0), _record("openvino", 2.0)], append=False)
    benchmark.merge(path, [_record("executorch", 3.0), _record("torch_eager", 4.0)], append=True)
    found = {r["runtime"]: r["median_ms"] for r in json.loads(path.read_text())}
    assert found == {"openvino": 2.0, "executorch": 3.0, "torch_eager": 4.0}
    benchmark.merge(path, [_record("executorch", 5.0)], append=False)
    assert [r["median_ms"] for r in json.loads(path.read_text())] == [5.0]


def test_tables_hold_the_figures():
    records = [_record("executorch", 10.0), _record("openvino", 20.0), _record("executorch", 35.0, "eupe_vits16")]
    lines = benchmark.table(records).splitlines()
    assert lines[0].startswith("model | px | precision | threads | executorch | openvino | MB")
    assert lines[2].startswith("eupe_vitt16 | 256 | fp32 | 1 | 10.0 | 20.0 | 2.0")
    assert "eupe_vits16 | 256 | 2.51 | 3.50 | -" in benchmark.beside_paper(records)


@pytest.mark.parametrize("flags", [["--models=eupe_vitt"], ["--precisions=fp16"], ["--threads=0"], ["--runs=0"]])
def test_wrong_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(flags)
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


def test_what_fails_is_left_out_and_the_others_are_measured(vit, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("no such\nkernel")

    def wrong(exports, precision, threads, image):
        return runtimes.Contender("openvino", precision, lambda: [-v.detach() for v in module(image).values()], {})

    monkeypatch.setattr(runtimes, "MAKERS", runtimes.MAKERS | {"onnxruntime": broken, "openvino": wrong})
    module, names = weights.to_module(vit), ["onnxruntime", "openvino", "torch_eager"]
    args = argparse.Namespace(runtimes=names, precisions=["fp32"], workdir=tmp_path, runs=3, seconds=1, bound=True)
    threads = torch.get_num_threads()
    try:
        (record,) = benchmark.measure(vit, module, 32, 1, args)
    finally:
        torch.set_num_threads(threads)
    assert record["runtime"] == "torch_eager" and record["cosine"] == 1 and record["runs"] == 3
    first, second = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert "onnxruntime fp32: 'no such" in first and "openvino fp32: a runtime computes something else" in second


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", {"clang++": "/bin/clang++"}.get)
    assert runtimes.missing("torch_compile") == []
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert runtimes.missing("torch_compile") == ["g++ or clang++"] and runtimes.missing("torch_eager") == []


def test_exports_are_kept_by_all_weights_and_versions(vit, tmp_path, monkeypatch):
    module = weights.to_module(vit)

    def key():
        return runtimes.Exports(vit, module, 32, tmp_path)._key(runtimes.READABLE)

    before = key()
    assert key() == before
    assert runtimes.Exports(vit, module, 32, tmp_path)._key(runtimes.REWRITTEN) != before
    with torch.no_grad():
        module.norm.bias[-1] += 1
    changed = key()
    monkeypatch.setattr(runtimes, "version", lambda name: "0.0")
    assert len({before, changed, key()}) == 3
    for pattern in runtimes.REWRITTEN:
        assert list(runtimes.ROOT.glob(pattern)), pattern


@pytest.mark.slow
def test_a_program_that_does_not_run_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.pte").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"^x\.pte does not run .*no program that the ExecuTorch runtime can load"):
        runtimes.resident(Path("x.pte"))


@pytest.mark.parametrize("name", ["executorch", "int8_accuracy"])
def test_importing_a_benchmark_changes_nothing(name):
    environment, path = dict(os.environ), list(sys.path)
    runpy.run_path(str(runtimes.ROOT / "benchmarks" / f"{name}.py"), run_name=name)
    assert dict(os.environ) == environment and sys.path == path
