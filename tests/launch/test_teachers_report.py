"""The report on teachers as a user calls it: a recipe's teachers and others, what it writes, and what it refuses."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from configs import stage1_proxy
from launch.teacher_sets import open_teachers
from tests.evals.image_sets import jpeg, picture
from tests.launch.test_commands import assert_one_line, run

TOYS = '''
import numpy as np
from eupe_jax.distill.teacher_spec import TeacherSpec

class Fine:
    """The colours of 8 x 8 pixels."""
    stride = 8
    def __init__(self):
        zero, one = (0.0,) * 3, (1.0,) * 3
        self.spec = TeacherSpec(type(self).__name__, None, 3, self.stride, 32, zero, one, type(self).__name__)
    def __call__(self, images):
        b, side, s = len(images), images.shape[1], self.stride
        cells = images.reshape(b, side // s, s, side // s, s, 3).mean(axis=(2, 4)) / 255
        return {"patches": cells.astype(np.float32)}

class Coarse(Fine):
    """The same of 16 x 16 pixels."""
    stride = 16
'''
NAMED = ["fine=host:report_toys:Fine", "coarse=host:report_toys:Coarse"]
BOTH = ["launch/teachers_report.py", *(f"--teachers={text}" for text in NAMED)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """66 pictures, and beside them a module with two teachers."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "report_toys.py").write_text(TOYS)
    (folder / "images").mkdir()
    for i in range(66):
        (folder / "images" / f"{i:02d}.jpg").write_bytes(jpeg(picture(i % 3, i)))
    return folder


def test_what_it_prints_and_writes(folder, tmp_path):
    command = [*BOTH, f"--data={folder / 'images'}", f"--out={tmp_path / 'out'}", "--patch_mean"]
    done = run(*command, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    assert "66 images of" in done.stdout and "largest/median" in done.stdout
    assert "The class tokens of coarse are all but contained in those of fine (R2 1.00)" in done.stdout
    with open(tmp_path / "out" / "pairs.csv") as file:
        pairs = {row["tokens"]: row for row in csv.DictReader(file)}
    assert float(pairs["cls"]["cka"]) == pytest.approx(1.0, abs=1e-3)  # both are the mean colour of the picture
    assert 0.1 < float(pairs["patches"]["r2_one_to_other"]) < 0.8  # one of four fine patches is not their mean
    with open(tmp_path / "out" / "teachers.csv") as file:
        assert {(row["tokens"], row["teacher"], row["width"]) for row in csv.DictReader(file)} == {
            (kind, name, "3") for kind in ("cls", "patches") for name in ("fine", "coarse")
        }
    Image.open(tmp_path / "out" / "compatibility.png").verify()
    assert (tmp_path / "out" / "summary.txt").read_text().count("\n") > 3
    assert not (tmp_path / "out" / "work").exists()

    again = run(*command, "--json", PYTHONPATH=str(folder))
    found = json.loads(again.stdout)
    assert found == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["details"]["pairs"][0]["one"] == "fine" and found["details"]["grid"] == [4, 4]


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(picture(0, 0)))
    assert_one_line(run(*BOTH, f"--data={tmp_path}", f"--out={tmp_path / 'out'}"), "holds 1 image", "at least 64")
    assert not (tmp_path / "out").exists()


def test_teachers_that_cannot_be_named_are_refused(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    for named, words in (
        (["fine"], "expected NAME=CHECKPOINT"),
        (["fine="], "expected NAME=CHECKPOINT"),
        ([NAMED[0], NAMED[0]], "there is a teacher 'fine' already"),
        ([NAMED[0], "x=host:report_toys:Nothing"], "no class 'Nothing'"),
        (NAMED[:1], "two teachers or more"),
    ):
        with pytest.raises(ValueError, match=words):
            open_teachers(None, named)


def test_the_teachers_of_a_recipe_are_those_of_its_run(folder, monkeypatch):
    """In graph, with the recipe's choice of class token, at the largest resolution, and others beside them."""
    monkeypatch.syspath_prepend(str(folder))
    config = stage1_proxy.get_config("runlocal").unlock()
    config.teachers = {k: v for k, v in config.teachers.items() if v.class_token == "none"}
    (name,) = config.teachers
    config.teachers[name].resolutions = (28, 56)
    found = open_teachers(config.lock(), NAMED[:1])
    assert list(found) == [name, "fine"]
    teacher, images = found[name], np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), np.uint8)
    assert teacher.resolution == 56 and teacher.cls_dim is None
    tokens = teacher(images)
    side = 56 // teacher.patch_size
    assert {kind: x.shape for kind, x in tokens.items()} == {"patches": (8, side, side, teacher.patch_dim)}
    part = teacher(images[:3])["patches"]  # a batch that does not divide over the devices
    np.testing.assert_allclose(part, tokens["patches"][:3], rtol=1e-4, atol=1e-5)
