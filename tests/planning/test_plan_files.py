"""Work in another process, and what is kept of it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import stage2_vitb
from eupe_jax.planning import background, compiling, pairs
from eupe_jax.planning.compiling import Compiled, Request, kept_json, write_atomically

ROOT = Path(__file__).resolve().parents[2]


def test_interrupted_work_ends_at_once():
    """Ctrl-C in the middle of the work, which would take a minute."""
    code = "import sys, time; from eupe_jax.planning import background; print('up', flush=True); "
    code += "background.run(time.sleep, 60, title='t')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        p.stdout.readline()
        time.sleep(1)
        begun = time.monotonic()
        p.send_signal(signal.SIGINT)
        p.communicate(timeout=30)
    assert p.returncode != 0 and time.monotonic() - begun < 30


def test_another_process_gives_its_result_its_errors_and_its_death():
    assert background.run(divmod, 7, 2, title="t") == (3, 1)
    with pytest.raises(ValueError, match="invalid literal"):
        background.run(int, "x", title="t")
    with pytest.raises(background.ChildFailed, match="status 3"):
        background.run(os._exit, 3, title="t")
    with pytest.raises(background.ChildFailed, match="t: ZeroDivisionError") as error:
        background.run(divmod, 1, 0, title="t")
    assert "Traceback" in error.value.__notes__[0]


def test_a_kept_result_is_not_made_again(tmp_path):
    path = tmp_path / "a" / "result.json"
    assert kept_json(path, lambda: {"x": 1}) == {"x": 1}
    assert kept_json(path, lambda: pytest.fail("made again")) == {"x": 1}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_what_the_cache_holds_in_another_form_is_made_again(tmp_path):
    """Broken files, and entries of an older project."""
    (tmp_path / "a.json").write_text("{")
    assert kept_json(tmp_path / "a.json", lambda: {"x": 1}) == {"x": 1}
    entry = dataclasses.asdict(Compiled("d", 1.0, 2.0, 3, {"batch": 1}, {}, None, None))
    forms = {"good": entry, "old": entry | {"gone": 1}, "short": {"digest": "d", "out_of_memory": None}, "empty": {}}
    for name, fields in forms.items():
        write_atomically(tmp_path / f"{name}.json", json.dumps(fields).encode())
    assert compiling._kept(tmp_path, "good").hbm == {"batch": 1}
    assert [compiling._kept(tmp_path, name) for name in ("old", "short", "empty", "a", "none")] == [None] * 5


def test_equal_requests_differ_by_what_compilers_are_told(tmp_path, monkeypatch):
    config = stage2_vitb.get_config("runlocal")
    request = Request(config, "v5e:2x2", 1, pairs.every_pair(config)[0], tmp_path)
    digest = request.digest()
    assert request.digest() == digest
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_x=1")
    assert request.digest() != digest


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
