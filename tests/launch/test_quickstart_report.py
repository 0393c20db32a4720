"""The report on a summary shaped like a real run's: numbers, words, escaping, missing parts, no outside resources."""

import base64
import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from launch import quickstart_figures
from launch.quickstart_report import show, write_report
from launch.quickstart_verdict import judge, margins_of, verdict

EXPERTS = {
    "efficientnet": {"title": "EfficientNet-Lite0", "cls_dim": 1280, "patch_dim": 112, "grid": 8, "resolution": 128,
                     "licence": "Apache-2.0", "what": "an ImageNet-1k classifier: what is in the picture"},
    "ocr": {"title": "PP-OCR detector", "cls_dim": None, "patch_dim": 96, "grid": 16, "resolution": 128,
            "licence": "Apache-2.0", "what": "a text detector: where there is writing"},
}  # fmt: skip


def scores(cls: float, first: float, second: float) -> dict:
    return {"efficientnet": {"cls": cls, "patches": first}, "ocr": {"patches": second}}


@pytest.fixture
def summary() -> dict:
    agreement = {
        "photographs": {
            "student": scores(0.142, 0.312, 0.471), "proxy": scores(0.151, 0.327, 0.483),
            "untrained": scores(0.011, 0.122, 0.301), "shuffled": scores(0.024, 0.183, 0.354),
            "position_map": scores(0.063, 0.225, 0.446),
        },
        "crops": {
            "student": scores(0.381, 0.402, 0.512), "proxy": scores(0.402, 0.421, 0.533),
            "untrained": scores(-0.031, 0.117, 0.312), "shuffled": scores(0.021, 0.172, 0.361),
            "position_map": scores(0.052, 0.231, 0.451),
        },
    }  # fmt: skip
    readout = {
        "photographs": {
            "student": {"efficientnet": 0.334, "ocr": 0.562}, "proxy": {"efficientnet": 0.351, "ocr": 0.571},
            "untrained": {"efficientnet": 0.291, "ocr": 0.568}, "shuffled": {"efficientnet": 0.271, "ocr": 0.502},
        }
    }  # fmt: skip
    stage = {"steps": 420, "batch_size": 32, "seconds": 131.2, "images_per_second": 102.4, "learning_rate": 1e-3}
    return {
        "images": {
            "source": "11 photographs shipped with scikit-image and scikit-learn, cut into crops",
            "train": 1920,
            "heldout": {
                "photographs": {"count": 96, "what": "crops of 3 photographs never trained on"},
                "crops": {"count": 256, "what": "unseen crops of the training photographs"},
            },
        },
        "experts": copy.deepcopy(EXPERTS),
        "models": {
            "proxy": {"model": "vitt16", "overrides": {"depth": 6, "embed_dim": 256}, "parameters": 6_412_032},
            "student": {"model": "vitt16", "parameters": 5_524_416, "resolutions": [64, 96, 128]},
        },
        "agreement": agreement,
        "readout": readout,
        "margins": margins_of(agreement),
        "agreement_resolution": 96,
        "student_by_resolution": {
            "photographs": {"64": scores(0.132, 0.297, 0.459), "128": scores(0.139, 0.309, 0.467)},
        },
        "parity": {
            "flax_vs_torch": {"max_abs": 3.1e-5, "cosine": 0.9999999},
            "torch_vs_pte": {"max_abs": 8.7e-5, "cosine": 0.9999995},
        },
        "pte": {"latency_ms": 17.31, "threads": 1, "resolution": 128, "megabytes": 22.4, "partitions": 1,
                "nodes_outside": 0},
        "stages": {
            "stage1": stage | {"student_resolutions": [96]},
            "stage2": stage | {"student_resolutions": [96], "steps": 260},
            "stage3": stage | {"student_resolutions": [64, 96, 128], "steps": 60},
            "shuffled": stage | {"student_resolutions": [96], "steps": 261},
        },
        "seconds": {"images and expert features": 38.2, "statistics": 4.1, "stage 1": 131.2, "stage 2": 84.0,
                    "stage 3": 33.8, "control": 80.1, "evaluation": 25.6, "export": 41.9, "total": 441.2},
        "machine": {"cpu": "2 cores", "memory": "8 GB", "platform": "Linux x86_64"},
        "versions": {"python": "3.11.2", "jax": "0.10.2", "flax": "0.12.8", "torch": "2.13.0", "executorch": "1.4.1"},
        "commands": [
            {"what": "Statistics", "command": "python launch/measure_statistics.py \\\n"
             "  --config=configs/quickstart.py:stage1 --out=runs/stats && echo <done>"},
            {"what": "Stage 1", "command": "python launch/train.py "
             "--config=configs/quickstart.py:stage1 --workdir=runs/quickstart/stage1"},
        ],
        "small": [
            {"what": "training images", "here": "1,920 crops", "full": "LVD-1689M, 1.7 billion images"},
            {"what": "steps of stage 1", "here": "420 steps of 32", "full": "hundreds of thousands of steps of 8,192"},
        ],
    }  # fmt: skip


@pytest.fixture
def curves() -> dict:
    def stage(student: str, teachers: dict, steps: int) -> list[dict]:
        lines = []
        for step in range(20, steps + 1, 20):
            fall = np.exp(-step / 150)
            parts = {}
            for teacher, (kinds, floor) in teachers.items():
                for i, kind in enumerate(kinds):
                    parts[f"{student}/{teacher}/{kind}"] = floor + (1 - floor) * fall * (1 - 0.2 * i)
            lines.append({"step": step, f"{student}/loss": sum(parts.values()), **parts, "learning_rate": 1e-3})
        return [*lines, {"step": steps, "agreement/ocr": 0.4}]  # an evaluation logs a line of its own

    every = ("cls_cosine", "patch_cosine", "patch_smooth_l1")
    experts = {"efficientnet": (every, 0.35), "ocr": (every[1:], 0.25)}
    return {
        "stage1": stage("proxy", experts, 420),
        "stage2": stage("student", {"proxy": (every, 0.2)}, 260),
        "stage3": stage("student", {"proxy": (every, 0.15)}, 60),
        "shuffled": stage("student", {"proxy": (every, 0.7)}, 260),
    }


@pytest.fixture
def panels() -> dict:
    side, rows = 48, 3
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([[x * 255, y * 255, (x + y) * 127 * (i + 1) / rows] for i in range(rows)]).astype(np.uint8)
    image = image.transpose(0, 2, 3, 1)
    columns = ["image", "EfficientNet-Lite0", "PP-OCR detector", "proxy", "student", "untrained student"]
    waves = [np.sin((k + 2) * np.pi * image / 255.0) / 2 + 0.5 for k in range(5)]
    return dict(zip(columns, [image, *waves], strict=True))


class Page(HTMLParser):
    """Checks that tags close in order, and collects text, tags and everything a browser would load."""

    VOID = {"meta", "img", "source", "br", "link"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.text, self.tags, self.loads, self.images = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.text))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "srcset", "href", "data", "poster"):
                self.loads.append(value)
            assert not key.startswith("on")
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_numbers_pictures_and_commands_land_in_the_page(tmp_path, summary, curves, panels):
    path = write_report(tmp_path / "new", summary, curves, panels)
    assert path == tmp_path / "new" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    page = read(path)
    for text in ("0.312", "0.225", "-0.031", "0.334", "3.1e-05", "0.9999995", "17.3", "5.5 million", "7 min 21 s",
                 "2 min 11 s", "261", "96 images: crops of 3 photographs", "Apache-2.0", "64, 96, 128",
                 "depth=6, embed_dim=256", "1.7 billion", "executorch", "One run with one seed is no evidence",
                 "--out=runs/stats && echo <done>", "LVD-1689M", "Training images: 1,920",
                 "at 96 pixels", "64 px 0.297 0.132 0.459"):  # fmt: skip
        assert text in page.text, text
    # 2 sets x 2 token kinds, 4 stages, each in two themes; 3 x 6 panels.
    svg = [uri for uri in page.loads if uri.startswith("data:image/svg+xml;base64,")]
    png = [uri for uri in page.loads if uri.startswith("data:image/png;base64,")]
    assert (len(svg), len(png)) == (2 * (4 + 4), 18)
    assert all(image["alt"] for image in page.images)
    assert len({base64.b64decode(uri.split(",", 1)[1]) for uri in svg}) == len(svg)


def test_losses_of_single_resolution_pairs_are_left_to_the_log(curves):
    """A stage over several resolutions logs up to nine of them; the total is their mean."""
    pairs = [{**line, f"pair/s64_t{64 + 16 * i}/student/loss": 0.3} for i, line in enumerate(curves["stage3"])]
    assert quickstart_figures.loss_curves(pairs) == quickstart_figures.loss_curves(curves["stage3"])


def test_the_page_loads_nothing_and_runs_nothing(tmp_path, summary, curves, panels):
    path = write_report(tmp_path, summary, curves, panels)
    page = read(path)
    assert page.loads and all(uri.startswith("data:image/") for uri in page.loads)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    without_data = re.sub(r"data:image/[^\"]+", "", path.read_text())
    assert "http" not in without_data and "url(" not in without_data and "@import" not in without_data


def test_a_pointer_to_the_summary_only_where_it_lies(tmp_path):
    assert "summary.json" not in read(write_report(tmp_path, {}, {}, {})).text
    (tmp_path / "summary.json").write_text("{}")
    assert read(write_report(tmp_path, {}, {}, {})).loads == ["summary.json"]


def test_same_inputs_same_bytes(tmp_path, summary, curves, panels):
    del summary["agreement"]["crops"]
    curves = {"stage1": curves["stage1"]}
    first = write_report(tmp_path / "a", summary, curves, panels).read_bytes()
    assert write_report(tmp_path / "b", summary, curves, panels).read_bytes() == first


def test_everything_is_escaped(tmp_path, summary):
    del summary["agreement"]["crops"]
    summary["images"]["source"] = "<script>alert(1)</script>"
    summary["experts"]["ocr"]["title"] = 'x"><b>$y_$'
    page = read(write_report(tmp_path, summary, {}, {}))
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text


def with_margins(summary: dict, *margins: float) -> dict:
    """The summary with student patch scores set so far from the best control, in the order of the sets and experts."""
    summary = copy.deepcopy(summary)
    values = iter(margins)
    for rows in summary["agreement"].values():
        for expert, score in rows["student"].items():
            score["patches"] = rows["position_map"][expert]["patches"] + next(values)
    summary["margins"] = margins_of(summary["agreement"])
    return summary


def test_words_follow_the_margins(tmp_path, summary):
    good = verdict(with_margins(summary, 0.087, 0.05, 0.2, 0.06))
    assert good["tone"] == "learned" and "0.050 to 0.200" in good["sentence"] and "all 4" in good["sentence"]
    assert "0.087 above the best control (position map, 0.225): it learned" in good["details"][0]["text"]

    slight = verdict(with_margins(summary, 0.049, 0.01, 0.02, 0.03))
    assert slight["tone"] == "slight" and "slightly above the best control in 4" in slight["sentence"]
    assert "too little to call it learning" in slight["details"][0]["text"]

    mixed = verdict(with_margins(summary, 0.087, 0.02, -0.01, 0.06))
    assert mixed["tone"] == "slight"
    assert "by 0.05 or more in 2, slightly above it in 1 and not above it in 1" in mixed["sentence"]

    worse = with_margins(summary, -0.012, 0.0, -0.2, -0.001)
    bad = verdict(worse)
    assert bad["tone"] == "none" and "not above the best control in any comparison" in bad["sentence"]
    assert "0.012 below it" in bad["details"][0]["text"] and "level with it" in bad["details"][1]["text"]
    assert not any("learned" in d["text"] for d in bad["details"] + slight["details"])
    assert bad["sentence"] in read(write_report(tmp_path, {"margins": worse["margins"]}, {}, {})).text


def test_nan_is_never_learning(summary):
    told = verdict(with_margins(summary, float("nan"), 0.2, 0.2, 0.2))
    assert told["tone"] == "slight" and "without a number in 1" in told["sentence"]
    summary["agreement"]["crops"]["shuffled"]["ocr"]["patches"] = float("nan")
    entry = margins_of(summary["agreement"])["crops"]["ocr"]
    assert entry["best_control"] == "shuffled" and judge(entry["margin"]) == "unknown"
    summary["margins"]["crops"]["ocr"] = {"student": 0.5, "best_control": "untrained", "best": 0.3, "margin": 0.2}
    told = verdict(summary)["details"][3]  # margins that overlooked it do not count against the scores
    assert told["heldout"] == "crops" and told["judged"] == "unknown"
    assert verdict({})["tone"] == "unknown"


def test_missing_controls_and_few_images_are_said(summary):
    del summary["agreement"]["photographs"]["position_map"]
    summary["margins"] = margins_of(summary["agreement"])
    caveats = " ".join(verdict(summary)["caveats"])
    assert "On photographs, these controls are missing: position map" in caveats
    assert "Few held-out images: photographs (96)." in caveats


def test_margins_take_the_best_control_of_each_expert(summary):
    summary["agreement"]["crops"]["shuffled"]["ocr"]["patches"] = 0.5
    margins = margins_of(summary["agreement"])["crops"]
    assert margins["ocr"]["best_control"] == "shuffled" and margins["ocr"]["margin"] == pytest.approx(0.012)
    assert margins["efficientnet"]["best_control"] == "position_map"


def test_read_out_is_judged_against_its_controls_too(tmp_path, summary):
    page = read(write_report(tmp_path, {k: summary[k] for k in ("experts", "readout")}, {}, {}))
    assert "EfficientNet-Lite0: the student is slightly above (0.043) the best control, untrained student." in page.text
    assert "PP-OCR detector: the student is not above (-0.006) the best control, untrained student." in page.text


def test_any_part_may_be_missing(tmp_path, summary, curves, panels):
    write_report(tmp_path, {}, curves, panels)
    del summary["agreement"]["crops"], summary["margins"]["crops"]
    for part in summary:
        write_report(tmp_path, {k: v for k, v in summary.items() if k != part}, {}, {})
        page = read(tmp_path / "report.html")
        if part in ("margins", "agreement"):  # each stands in for the other
            assert "it learned features that it was shown" in page.text
        if part == "readout":
            assert "Read-out" not in page.text
    emptied = {key: type(value)() for key, value in summary.items()}
    for nothing in ({}, emptied):
        page = read(write_report(tmp_path, nothing, {}, {}))
        assert "nothing can be said about learning" in page.text and "h2" not in page.tags
    read(write_report(tmp_path, {}, {"stage1": [{"step": 1}], "other": []}, {}))


def test_panels_of_wrong_shape_are_refused(tmp_path, panels):
    with pytest.raises(ValueError, match="panels\\['flat'\\].*\\(3, 4\\)"):
        write_report(tmp_path, {}, {}, {"flat": np.zeros((3, 4))})
    with pytest.raises(ValueError, match="same number of rows.*'proxy': 2"):
        write_report(tmp_path, {}, {}, panels | {"proxy": panels["proxy"][:2]})
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (True, "yes"), (12345, "12,345"), (0.0, "0"), (0.0004, "4.0e-04"),
     (0.001, "0.001"), (102.44, "102.4"), ([64, 96], "64, 96"), ({"depth": 6}, "depth=6"), ("a", "a")],
)  # fmt: skip
def test_show(value, text):
    assert show(value) == text
