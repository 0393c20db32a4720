"""benchmarks/family.py: what it counts, and a toy run of all of it."""

import json

import pytest

from benchmarks import family
from configs import common, stage2_family


def test_six_students_cost_a_quarter_of_six_runs():
    published, reduced = family.flops(stage2_family.get_config()), family.flops(family.reduced(8))
    assert set(published) == {*common.FAMILY, family.FAMILY}
    assert family.ratio(published) <= 0.25
    assert abs(family.ratio(reduced) - family.ratio(published)) < 0.01, "the reduced size keeps the proportions"
    proxy = 0.9857e12  # forward, 256 pixels; shared by all six, so that five of it are saved
    saved = sum(published.values()) - 2 * published[family.FAMILY]
    assert saved == pytest.approx(5 * proxy, rel=1e-3)


@pytest.mark.slow
def test_a_toy_run_measures_both(tmp_path, monkeypatch, capsys):
    toy = family.reduced(2, 32, shallow=True)
    toy.augment.update({"jitter_p": 0.0, "blur_p": 0.0})  # quick to compile
    members = ("vitt", "convnext_tiny")
    with toy.unlocked():
        for name in set(toy.students) - set(members):
            del toy.students[name]
    monkeypatch.setattr(family, "reduced", lambda batch: toy)
    monkeypatch.setattr("sys.argv", ["family.py", "--rounds", "1", "--json", str(tmp_path / "found.json")])
    family.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["seconds"]) == set(found["cpu_seconds"]) == {*members, family.FAMILY}
    assert 0 < found["seconds_ratio"] < 1 and 0 < found["cpu_seconds_ratio"] < 1
    assert f"{found['flops_ratio']:.3f} of the FLOPs" in capsys.readouterr().out
