"""The table of kernel choices: cells are kept, tables come from cells, wrong flags are one line."""

from benchmarks import pod_choices


def test_cells_are_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pod_choices, "ACCURACY", ((32, 1, 2, 1, 32),))
    arguments = ["--out", str(tmp_path / "choices"), "--parts", "accuracy"]
    assert pod_choices.main(arguments) == 0
    cell = tmp_path / "choices" / "accuracy_32x1.json"
    errors = pod_choices.compiling.kept_json(cell, dict)["errors"]
    assert 0 < errors["tanh, float32"]["patches"] < errors["erf, bfloat16"]["patches"] < 0.05
    made = cell.stat().st_mtime_ns
    monkeypatch.setattr(pod_choices, "accuracy_cell", lambda *size: 1 / 0)
    assert pod_choices.main(arguments) == 0 and cell.stat().st_mtime_ns == made
    text = (tmp_path / "choices.md").read_text()
    assert "32 x 1" in text and f"{errors['erf, bfloat16']['cls']:.1e}" in text and "Whole steps" not in text
    assert pod_choices.main([*arguments[:2], "--parts", "mlps"]) == 1
    assert "error: --parts has no mlps" in capsys.readouterr().err
