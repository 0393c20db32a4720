"""Agreement with the experts: known exactly where adapters are, beside a position map, over resolutions."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from eupe_jax.evals import features, similarity
from eupe_jax.evals.encoders import FlaxEncoder
from eupe_jax.evals.folders import Subset
from eupe_jax.evals.interface import DataError
from eupe_jax.evals.similarity import Settings
from eupe_jax.models import zoo
from eupe_jax.training import integrity
from eupe_jax.training.encoders import LoadedEncoder, load_encoder
from tests.evals.chains import linear_adapter, statistics_of, write_checkpoint
from tests.evals.image_sets import jpeg, picture

SIDE, WIDTH = 32, 32
SETTINGS = Settings(resolutions=(32, 48), images=6, control_images=6, batch_size=4)


@pytest.fixture(scope="module")
def teacher():
    """A tiny ViT at 32 pixels, whose blocks are visible."""
    overrides = {"embed_dim": WIDTH, "depth": 1, "num_heads": 2, "layerscale_init": 0.5}
    module, spec = zoo.build("eupe_vitt16", **overrides), zoo.spec("eupe_vitt16", **overrides)
    variables = jax.jit(module.init)(jax.random.key(5), np.zeros((1, SIDE, SIDE, 3), np.float32))
    entry = {"model": "eupe_vitt16", "overrides": overrides, "resolution": SIDE}
    entry |= {"mean": list(spec.mean), "std": list(spec.std)}
    return FlaxEncoder(LoadedEncoder("eupe_vitt16", overrides, module, variables, entry), name="teacher")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for i in range(15):
        (path / f"{i:02d}.jpg").write_bytes(jpeg(picture(i % 3, i)))
    return path


@pytest.fixture(scope="module")
def tokens(teacher, folder):
    """The teacher's tokens of all pictures."""
    source = similarity.load(folder, dataclasses.replace(SETTINGS, images=7, control_images=8)).images._source
    return features.extract(teacher, source, 4, prepare=features.Squash(SIDE))


def student_of(teacher, tokens, path, *, class_token="native", hops=2):
    """The teacher's own network as the student of itself, through a proxy that turns and shifts its tokens."""
    rng = np.random.default_rng(0)
    own = {kind: x.astype(np.float64) for kind, x in tokens.items()}
    if class_token == "patch_mean":
        own["cls"] = own["patches"].mean((1, 2))
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    proxy = {kind: x @ turn + 3.0 for kind, x in tokens.items()}

    def adapter(kind, weights, offset, statistics):
        mean, std = statistics["mean"][kind], statistics["std"][kind]
        return linear_adapter(weights / std, (offset - mean) / std)

    of_proxy, of_teacher = statistics_of(**proxy), statistics_of(**own)
    to_proxy = {kind: adapter(kind, turn, np.full(WIDTH, 3.0), of_proxy) for kind in proxy}
    back = {kind: adapter(kind, turn.T, -3.0 * turn.T.sum(0), of_teacher) for kind in proxy}
    if hops == 1:
        back = {kind: adapter(kind, np.eye(WIDTH), np.zeros(WIDTH), of_teacher) for kind in proxy}
    known = similarity._as_teacher(teacher, class_token)
    last = ("vit", back, jax.tree.map(np.float32, of_teacher), known)
    chain = [("proxy", to_proxy, jax.tree.map(np.float32, of_proxy), "p"), last][2 - hops :]
    placed = write_checkpoint(path, teacher.loaded, chain)
    return FlaxEncoder(load_encoder(placed), checkpoint=placed, student="s")


def data_of(folder, teacher, settings=SETTINGS):
    return dataclasses.replace(similarity.load(folder, settings), teachers={"vit": teacher})


@pytest.mark.parametrize("hops", [1, 2])
def test_a_perfect_student_agrees_at_its_resolution_and_less_elsewhere(teacher, tokens, folder, tmp_path, hops):
    student, data = student_of(teacher, tokens, tmp_path, hops=hops), data_of(folder, teacher)
    result = similarity.run(student, data, SETTINGS)
    metrics = result.metrics
    assert metrics["vit_cls_32"] > 0.999 and metrics["vit_patches_32"] > 0.999
    assert metrics["vit_cls_48"] < 0.99 and metrics["vit_patches_48"] < 0.99
    assert set(metrics) == {f"vit_{k}_{r}" for k in ("cls", "patches") for r in ("32", "48", "position_map")}
    assert result.details["experts"] == {"vit": {"class_token": "native", "recognised": True}}
    table = result.tables["agreement"]
    assert [(row["tokens"], row["resolution"]) for row in table] == [
        ("cls", 32), ("cls", 48), ("patches", 32), ("patches", 48)
    ]  # fmt: skip
    assert table[0]["above_position_map"] == pytest.approx(metrics["vit_cls_32"] - metrics["vit_cls_position_map"])
    plot = result.images["agreement"]
    assert plot.dtype == np.uint8 and plot.shape[2] == 3 and (plot < 200).any()


def test_the_position_map_is_the_mean_of_other_pictures(teacher, tokens, folder, tmp_path):
    student, data = student_of(teacher, tokens, tmp_path), data_of(folder, teacher)
    scored, control = set(data.images._indices), set(data.control._indices)
    assert len(scored) == len(control) == 6 and not scored & control
    statistics = statistics_of(**tokens)
    for kind in ("cls", "patches"):
        x = (tokens[kind] - statistics["mean"][kind]) / statistics["std"][kind]
        mean, targets = x[sorted(control)].mean(0), x[sorted(scored)]
        dot = (mean * targets).sum(-1) / np.linalg.norm(mean, axis=-1) / np.linalg.norm(targets, axis=-1)
        found = similarity.run(student, data, dataclasses.replace(SETTINGS, resolutions=(32,))).metrics
        assert found[f"vit_{kind}_position_map"] == pytest.approx(dot.mean(), abs=1e-4)


def test_the_choice_of_class_token_is_recognised(teacher, tokens, folder, tmp_path):
    student = student_of(teacher, tokens, tmp_path, class_token="patch_mean")
    settings = dataclasses.replace(SETTINGS, resolutions=(32,))
    result = similarity.run(student, data_of(folder, teacher), settings)
    assert result.details["experts"]["vit"] == {"class_token": "patch_mean", "recognised": True}
    # The target is the mean patch token, which this student does not predict.
    assert result.metrics["vit_cls_32"] < 0.9 < result.metrics["vit_patches_32"]


def test_another_teacher_is_reported(teacher, tokens, folder, tmp_path, caplog):
    student = student_of(teacher, tokens, tmp_path)
    variables = jax.tree.map(lambda x: x * 1.01, teacher.loaded.variables)
    other = FlaxEncoder(dataclasses.replace(teacher.loaded, variables=variables), name="other")
    settings = dataclasses.replace(SETTINGS, resolutions=(32,))
    result = similarity.run(student, data_of(folder, other), settings)
    assert result.details["experts"]["vit"]["recognised"] is False
    assert "other is not the very teacher 'vit'" in caplog.text


def test_a_run_that_is_repeated_reads_what_it_kept(teacher, tokens, folder, tmp_path):
    student, data = student_of(teacher, tokens, tmp_path / "run"), data_of(folder, teacher)
    whole = similarity.run(student, data, SETTINGS, workdir=tmp_path / "work")
    kept = sorted((tmp_path / "work").rglob("*.safetensors"))
    kept[0].unlink()
    again = similarity.run(student, data, SETTINGS, workdir=tmp_path / "work")
    assert again.metrics == whole.metrics == similarity.run(student, data, SETTINGS).metrics
    assert kept[0].exists()


def test_what_cannot_be_compared_is_refused(teacher, tokens, folder, tmp_path):
    student, data = student_of(teacher, tokens, tmp_path / "run"), data_of(folder, teacher)
    with pytest.raises(ValueError, match="teacher comes from no training checkpoint"):
        similarity.run(teacher, data, SETTINGS)
    with pytest.raises(ValueError, match=r"with its experts \['vit'\]: name some"):
        similarity.run(student, dataclasses.replace(data, teachers={}), SETTINGS)
    with pytest.raises(ValueError, match=r"leads to \['vit'\], not to \['pe'\]"):
        similarity.run(student, dataclasses.replace(data, teachers={"pe": teacher}), SETTINGS)
    narrow = FlaxEncoder(teacher.loaded)
    narrow.patch_dim = 8
    with pytest.raises(ValueError, match="'patches': 8.* wide, but the chain predicts {'patches': 32}"):
        similarity.run(student, dataclasses.replace(data, teachers={"vit": narrow}), SETTINGS)


def test_checkpoints_without_one_way_back_are_refused(teacher, tokens, tmp_path):
    student = student_of(teacher, tokens, tmp_path)
    path = next(tmp_path.rglob("manifest")) / "metadata"
    manifest = json.loads(path.read_text())

    def write(changed):
        path.write_text(json.dumps(changed))
        integrity.seal(epath.Path(path.parent.parent))

    write({**manifest, "chain": {**manifest["chain"], "second": manifest["chain"]["proxy"]}})
    with pytest.raises(ValueError, match=r"several proxies \(\['proxy', 'second'\]\)"):
        similarity.load_chain(student.checkpoint)
    manifest["students"]["s"]["adapters"] = None
    write(manifest)
    with pytest.raises(ValueError, match="without adapters"):
        similarity.load_chain(student.checkpoint)


def test_folders(folder, tmp_path):
    data = similarity.load(folder, Settings(images=3, control_images=2))
    assert (len(data.images), len(data.control)) == (3, 2)
    data = similarity.load(folder, Settings(images=200, control_images=100))  # 15 pictures shared two to one
    assert (len(data.images), len(data.control)) == (10, 5)
    assert [len(part) for part in data.images.batches(4)] == [4, 4, 2]
    with pytest.raises(DataError, match="no such image folder"):
        similarity.load(tmp_path / "none", Settings())
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="holds 1 image"):
        similarity.load(tmp_path, Settings())
    with pytest.raises(ValueError, match="must be positive"):
        Settings(resolutions=(0,))


def test_a_hop_restricted_to_kinds(teacher, tokens, tmp_path):
    (hop,) = similarity.load_chain(student_of(teacher, tokens, tmp_path, hops=1).checkpoint)
    assert hop.widths == {"vit": {"cls": WIDTH, "patches": WIDTH}}
    only = hop.only("cls")
    assert only.widths == {"vit": {"cls": WIDTH}} and hop.only("storage").widths == {}
    cls = tokens["cls"][:2]
    np.testing.assert_array_equal(only({"cls": cls})["vit"]["cls"], hop({**tokens, "cls": cls})["vit"]["cls"])


def test_subsets_have_their_own_digest(folder):
    source = similarity.load(folder, SETTINGS).images._source
    assert Subset(source, [0, 1]).digest != Subset(source, [1, 0]).digest
    assert Subset(source, [3])[0].name == source[3].name
