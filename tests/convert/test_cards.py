"""Cards of exports: every figure is the manifest's, what no manifest says is not known, and the header is YAML."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

torch = pytest.importorskip("torch")

from configs import common, stage1_proxy, stage2_vitt  # noqa: E402
from convert import cards, origins, statistics_card, teachers_to_orbax, to_torch, weights  # noqa: E402
from eupe_jax.distill.normalization import STD_FLOOR, Statistics  # noqa: E402
from eupe_jax.evals import report  # noqa: E402
from eupe_jax.evals.interface import Result  # noqa: E402
from eupe_jax.training import assemble  # noqa: E402
from eupe_jax.training.checkpoints import Checkpoints  # noqa: E402
from eupe_jax.training.encoders import load_encoder  # noqa: E402
from launch import measure_statistics  # noqa: E402
from tests.convert.conftest import VIT  # noqa: E402
from tests.docs.pages import ROOT, tables  # noqa: E402


def measured(config, teachers, seed):
    """Statistics of made-up outputs; the first two coordinates of class tokens never move."""
    rng, found = np.random.default_rng(seed), {}
    for name, teacher in teachers.items():
        mean = {k: rng.normal(size=d).astype(np.float32) for k, d in teacher.out_dims.items()}
        std = {k: rng.uniform(0.5, 4, d).astype(np.float32) for k, d in teacher.out_dims.items()}
        if "cls" in std:
            std["cls"][:2] = 0.0
        count = {k: 640 if k == "cls" else 40_960 for k in mean}
        found[name] = Statistics(mean, std, count, assemble.provenance(config, name, teacher))
    return found


def save_run(workdir, config, encoder, chains=None, headers=None):
    """The checkpoint that a run of this config leaves at its step 3, with the encoder's weights; its statistics."""
    teachers = assemble.Teachers(assemble.describe_teachers(config), {}, {}, chains or {}, headers or {})
    statistics = measured(config, teachers.by_name, len(str(workdir)))
    student = {
        "params": {"backbone": encoder.variables["params"], "adapters": {"a": np.zeros(1)}},
        "buffers": encoder.variables["buffers"],
        "optimizer": {"a": np.zeros(1)},
    }
    manager = Checkpoints(workdir, config.checkpoint)
    arrays = {name: each.arrays() for name, each in statistics.items()}
    state = {"step": np.int32(3), "students": {name: student for name in config.students}}
    manager.save(3, state, arrays, chains or {}, assemble.manifest(config, teachers, statistics), force=True)
    manager.wait()
    manager.close()
    return statistics


@pytest.fixture(scope="module")
def runs(vit, tmp_path_factory):
    """A folder: "proxy" learned from three experts, "student" from that proxy, at a rate that no recipe has."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = stage1_proxy.get_config(), stage2_vitt.get_config()
    with first.unlocked(), second.unlocked():
        first.students.proxy = common.student("eupe_vitt16", **VIT)
        second.students.vitt.overrides.update(VIT)
        second.teachers.proxy = common.encoder_teacher("eupe_vitt16", (256,), checkpoint=str(folder / "proxy"), **VIT)
        second.optimizer.learning_rate = 7e-4
        second.data.sources.large.path = "/data/mine"
    experts = save_run(folder / "proxy", first, vit)
    chains = {"proxy": {"adapters": {"a": np.zeros(1)}, "statistics": {n: s.arrays() for n, s in experts.items()}}}
    headers = {"proxy": {"adapters": {}, "statistics": {name: each.header() for name, each in experts.items()}}}
    save_run(folder / "student", second, vit, chains, headers)
    found = Result({"top1": 0.4321}, images={"wrong": np.zeros((4, 4, 3), np.uint8)})
    header = {"eval": "knn", "encoder": "vitt", "data": "/data/photos"}
    report.write(folder / "student/evals/neighbours/vitt/3", found, header, 3)
    report.write(folder / "student/evals/older/vitt/2", Result({"top1": 0.1}), header, 2)
    return folder


def parsed(text):
    """(header, rest) of a card."""
    _, header, rest = text.split("---\n", 2)
    return yaml.safe_load(header), rest


def rows(text, first):
    """Rows of the table whose header begins so."""
    return [row for header, found in tables(text) for row in found if header[0] == first]


def test_a_card_says_what_the_manifests_say(runs, photographs, tmp_path):
    out = tmp_path / "student.safetensors"
    metadata = to_torch.convert(load_encoder(runs / "student"), out, photographs)
    names = {out.name, f"{out.name}.md", f"{out.name}.statistics.md", f"{out.name}.statistics.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    header, text = parsed((tmp_path / f"{out.name}.md").read_text())
    assert header["license"] == "unknown" and header["library_name"] == "pytorch"
    assert header["datasets"] == ["imagenet2012"] and "distillation" in header["tags"]

    taught = rows(text, "teacher")
    assert [row[0].replace("&nbsp;", " ").strip() for row in taught[:4]] == ["proxy", "dinov3", "pecore", "pelang"]
    assert [row[1].strip("`") for row in taught[1:4]] == ["dinov3_vith16plus", "pe_core_g14_448", "pe_lang_g14_448"]
    manifest = origins.read_manifest(runs / "student")
    assert taught[0][5] == f"`{manifest['teachers']['proxy']['fingerprint'][:16]}`"
    experts = manifest["chain"]["proxy"]["statistics"]
    assert [row[5].strip("`") for row in taught[1:4]] == [
        experts[row[0].split(";")[-1]]["provenance"]["teacher"][:16] for row in taught[1:4]
    ]

    said = {row[0]: row[1] for row in rows(text, "")}
    assert said["steps"] == "3 of 390000" and said["batch"] == "8192 images, 24,576 in all"
    assert said["digest of the config"] == f"`{origins.digest(manifest['config'])}`"
    assert said["nearest released recipe"].startswith("`configs/stage2_vitt.py`")
    changed = {row[0].strip("`"): row[1:] for row in rows(text, "field")}
    assert changed["optimizer.learning_rate"] == ["`2e-05`", "`0.0007`"]
    assert changed["students.vitt.overrides.depth"] == ["not there", "`2`"]
    assert said["mean, std"] == f"{list(metadata['mean'])}, {list(metadata['std'])}" and "640 pixels" not in text
    (parity,) = [row for row in rows(text, "between") if row[1] == "patches"]
    assert parity[2] == f"{metadata['gates']['flax_vs_torch']['patches']['max_abs']:.2e}"
    (result,) = rows(text, "evaluation")
    assert result == ["neighbours (knn)", "/data/photos", "top1", "0.4321"], "of this step alone"
    licences = {row[0]: row[2] for row in rows(text, "what")}
    assert licences["teacher pecore"] == "Apache-2.0" and licences["teacher dinov3"] == "DINOv3 License"
    assert licences["teacher proxy"] == "that of its own teachers"


def test_the_statistics_card_gives_their_figures(runs, tmp_path, caplog):
    statistics = origins.load_statistics(runs / "student")
    assert not caplog.messages, "reading a good checkpoint is nothing to warn of"
    measure_statistics.describe(origins.epath.Path(tmp_path), statistics)
    text = (tmp_path / statistics_card.CARD).read_text()
    each = statistics["proxy"]
    (row,) = [row for row in rows(text, "teacher") if row[1] == "class token"]
    dims, std = len(each.std["cls"]), each.std["cls"]
    assert row[2] == str(dims) and row[5] == f"{2 / dims:.1%}"
    assert row[4] == f"0, {np.median(std):.3g}, {std.max():.3g}"
    assert each.provenance.teacher in text and "640 (class token), 40,960 (patch tokens)" in text
    assert "/data/mine" in text and f"{STD_FLOOR:g}" in text
    with Image.open(tmp_path / statistics_card.PICTURE) as picture:
        assert picture.width > 600 and np.asarray(picture.convert("L")).std() > 5


def test_experts_keep_their_fingerprints_when_the_run_that_knew_them_is_gone(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    shutil.move(tmp_path / "runs/student", tmp_path / "student")
    there = origins.origin(load_encoder(tmp_path / "student"))
    manager = runs / "proxy/checkpoints"
    manager.rename(runs / "proxy/gone")
    try:
        gone = origins.origin(load_encoder(tmp_path / "student"))
    finally:
        (runs / "proxy/gone").rename(manager)
    for origin, known in ((there, True), (gone, False)):
        experts = origin.teachers[0].teachers
        assert [each.name for each in experts] == ["dinov3", "pecore", "pelang"]
        assert all((each.what != origins.NOT_KNOWN) == known for each in experts)
    fingerprints = [{each.name: each.fingerprint for each in origin.teachers[0].teachers} for origin in (there, gone)]
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints[0].values())) == 3


def test_weights_without_a_manifest_are_said_to_be_unknown(vit, tmp_path):
    facts = weights.describe(vit) | {"recomputed_periods": {"cls": {"max_abs": 0.25}}, "gates": {}}
    found = cards.files(vit, tmp_path / "hf", facts, library="transformers", inside=True)
    assert list(found) == [tmp_path / "hf" / cards.FOLDER_CARD], "no statistics, no card of them"
    header, text = parsed(found[tmp_path / "hf" / cards.FOLDER_CARD].decode())
    assert header == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["eupe", "vision", "image-feature-extraction", "eupe_vitt16"],
    }
    assert "how it was trained is not known" in text and "None measured by the run" in text
    assert "FAIR Noncommercial Research License" in text and "None measured." in text and "## Recipe" not in text


def test_converted_weights_carry_the_licence_of_the_published_ones(vit, photographs, tmp_path):
    to_torch.convert(vit, tmp_path / "theirs.safetensors", photographs)
    teachers_to_orbax.convert("eupe_vitt16", tmp_path / "theirs.safetensors", tmp_path / "teacher", overrides=VIT)
    encoder = load_encoder(tmp_path / "teacher")
    facts = weights.describe(encoder)
    text = cards.files(encoder, tmp_path / "x.pte", facts, library="executorch")[tmp_path / "x.pte.md"].decode()
    header, rest = parsed(text)
    assert (header["license"], header["license_name"]) == ("other", "fair-noncommercial-research-license")
    digest = re.search(r"sha256 `(\w{64})`", rest)[1]
    assert digest == origins.read_manifest(tmp_path / "teacher")["source"]["files"]["theirs.safetensors"]


def test_the_hub_reads_the_header(runs):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    encoder = load_encoder(runs / "student")
    text = cards.files(encoder, runs / "x.pt", weights.describe(encoder), library="pytorch")[runs / "x.pt.md"].decode()
    card = hub.ModelCard(text)
    assert card.data.library_name == "pytorch" and card.data.datasets == ["imagenet2012"]
    assert card.data.license == "unknown" and card.text.lstrip().startswith("# eupe_vitt16 (vitt)")


def test_a_run_that_started_from_another_says_so(runs, vit, tmp_path):
    third = stage2_vitt.get_config()
    with third.unlocked():
        third.students.vitt.overrides.update(VIT)
        third.students.vitt.init_from = str(runs / "student")
        third.teachers.proxy = common.encoder_teacher("eupe_vitt16", (256,), checkpoint=str(runs / "gone"), **VIT)
    save_run(tmp_path / "third", third, vit)
    origin = origins.origin(load_encoder(tmp_path / "third"))
    assert origin.before.student == "vitt" and origin.before.teachers[0].teachers, "its teachers count as well"
    text = cards.model_card(vit, origin, {}, "x.pt", "pytorch", None)
    assert f"It started from `{runs / 'student'}`, step 3. There it was taught by proxy" in text
    assert any(row[0] == "teacher dinov3" for row in rows(text, "what"))


def test_recipes_are_told_by_their_fields():
    config = json.loads(json.dumps(stage2_vitt.get_config().to_dict()))
    assert origins.nearest_recipe(config) == ("configs/stage2_vitt.py", {})
    changed = origins.digest(config | {"seed": 1})
    assert origins.digest(stage2_vitt.get_config().to_dict()) == origins.digest(config) != changed
    assert origins.nearest_recipe(config | {"seed": 1})[1] == {"seed": (0, 1)}


def test_licences_of_host_teachers_are_those_of_the_page():
    (listed,) = [found for head, found in tables((ROOT / "docs" / "licences.md").read_text()) if head[0] == "weights"]
    for kind, licence in origins.HOST_LICENCES.items():
        (row,) = [row for row in listed if f"`{kind}`" in row[1]]
        assert row[3].startswith(licence), kind


def test_a_teacher_from_a_file_is_said_to_come_from_there():
    own = common.host_teacher("eupe_jax.distill.host_teachers:OnnxTeacher", 128, path="mine.onnx", patches="map")
    packaged = common.host_teacher("eupe_jax.distill.host_teachers:EfficientNetLite0", 128)
    manifest = {"config": {"teachers": {"own": own.to_dict(), "packaged": packaged.to_dict()}}}
    manifest["teachers"] = {name: {} for name in manifest["config"]["teachers"]}
    assert [teacher.where for teacher in origins._teachers(manifest, 0)] == ["mine.onnx", "its package"]


def test_results_that_are_damaged_are_named(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs / "student", folder)
    (folder / "evals/neighbours/vitt/3/metrics.json").write_text("{")
    with pytest.raises(ValueError, match="neighbours/vitt/3/metrics.json is not the result"):
        origins.origin(load_encoder(folder))


def test_odd_manifests_make_cards_too(vit, runs):
    origin = origins.origin(load_encoder(runs / "student"))
    for manifest in ({}, {"config": {}, "teachers": {}}, {"config": {"data": None}, "step": None}):
        bare = dataclasses.replace(origin, manifest=manifest, teachers=(), statistics={}, evaluations={})
        assert "not known" in cards.model_card(vit, bare, {}, "x.pt", "pytorch", None)
