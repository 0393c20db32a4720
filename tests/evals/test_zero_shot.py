"""Zero-shot: a chain of adapters in closed form gives the expert's own answers, and a wrong one does not."""

import copy
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import teachers_to_orbax
from eupe_jax.evals import features, zero_shot
from eupe_jax.evals.encoders import FlaxEncoder
from eupe_jax.evals.interface import DataError
from eupe_jax.evals.zero_shot import Settings
from eupe_jax.models import interchange, text_tower, zoo
from eupe_jax.training.encoders import LoadedEncoder, load_encoder, load_image_text
from tests.evals.chains import linear_adapter, statistics_of, write_checkpoint
from tests.evals.image_sets import write_shards

pytest.importorskip("instant_clip_tokenizer")

NAME, SIDE = "pe_core_t16_384", 32
VISUAL = {
    "width": 24, "depth": 1, "num_heads": 2, "mlp_dim": 48, "patch_size": 8, "image_size": SIDE, "pool_heads": 2,
    "output_dim": 16,
}  # fmt: skip
TEXT = {"context_length": 16, "width": 16, "depth": 1, "num_heads": 2, "output_dim": 16}
SETTINGS = Settings(side=SIDE, batch_size=8, text_batch=256, pictures=4)


@dataclasses.dataclass
class World:
    """A tiny expert with both towers, a real ViT that has seen nothing, and a labelled set.

    root: holds the expert as a converted checkpoint and the images. data: with the expert's text tower.
    tokens: {"expert" | "student": class tokens [N, D] of the test images}. logits: the expert's own, [N, C].
    """

    root: Path
    data: zero_shot.Data
    expert: FlaxEncoder
    student: FlaxEncoder
    tokens: dict
    logits: np.ndarray


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("zero_shot")
    module = text_tower.build(NAME)
    module = module.clone(visual=zoo.build(NAME, **VISUAL), text=module.text.clone(**TEXT))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *text_tower.FAMILY.example_inputs(module))
    rng = np.random.default_rng(3)

    def lively(x):
        """Parameters that tell images, and words, well apart."""
        return (rng.standard_normal(x.shape) * (0.5 if x.ndim < 2 else x.shape[-2] ** -0.5 * 2)).astype(np.float32)

    variables = jax.tree.map(lively, shapes)
    embedding = variables["params"]["text"]["token_embedding"]
    embedding[:] = rng.standard_normal(embedding.shape)
    save_file(interchange.family_export(NAME, text_tower.FAMILY, module, variables), root / "pe.safetensors")
    path = str(root / "expert")
    teachers_to_orbax.convert(NAME, root / "pe.safetensors", path, overrides=VISUAL, text_overrides=TEXT)
    write_shards(root / "images", train=3, test=24)
    data = zero_shot.load(root / "images", dataclasses.replace(SETTINGS, text_tower=path))
    encoders = {"expert": FlaxEncoder(load_encoder(path), checkpoint=path), "student": FlaxEncoder(untrained())}
    prepare = zero_shot.Squash(SIDE, "bilinear")
    tokens = {
        name: features.extract(encoder, data.images, 8, kinds=("cls",), prepare=prepare)["cls"]
        for name, encoder in encoders.items()
    }
    world = World(root, data, **encoders, tokens=tokens, logits=None)
    world.logits = logits_of(world, world.expert)
    return world


def untrained():
    """A tiny ViT."""
    overrides = {"embed_dim": 32, "depth": 1, "num_heads": 2, "layerscale_init": 0.5}
    module, spec = zoo.build("eupe_vitt16", **overrides), zoo.spec("eupe_vitt16", **overrides)
    variables = jax.jit(module.init)(jax.random.key(5), np.zeros((1, SIDE, SIDE, 3), np.float32))
    entry = {"model": "eupe_vitt16", "overrides": overrides, "resolution": SIDE}
    entry |= {"mean": list(spec.mean), "std": list(spec.std)}
    return LoadedEncoder("eupe_vitt16", overrides, module, variables, entry)


def logits_of(world, encoder, settings=SETTINGS):
    """Logits [N, C] of the test images, by the pieces that `run` is made of."""
    embed, _ = zero_shot.embedder(encoder, world.data.expert, settings)
    texts = zero_shot.class_embeddings(world.data.expert, world.data.names, world.data.templates, 256)
    return 100 * embed(world.tokens["expert" if encoder is world.expert else "student"]) @ texts.T


def distil(world, folder, *, wrong=None, space="pool"):
    """The student with two hops solved by least squares on the test images: it has more dimensions than they are.

    `wrong`: whose statistics are swapped for another set, "proxy" or "expert".
    """
    rng, tokens = np.random.default_rng(0), world.tokens["expert"]
    if space == "proj":
        tokens = tokens @ world.data.expert.projection
    # The proxy mixes the expert's token into one of its own; it loses nothing, so there is a way back.
    proxy = tokens @ rng.normal(size=(tokens.shape[1], tokens.shape[1] + 8)) + rng.normal(size=1)

    def solve(x, y):
        statistics = statistics_of(cls=y)
        wanted = (y - statistics["mean"]["cls"]) / statistics["std"]["cls"]
        solution = np.linalg.lstsq(np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64), wanted)[0]
        return linear_adapter(solution[:-1], solution[-1]), jax.tree.map(np.float32, statistics)

    to_proxy, to_expert = solve(world.tokens["student"], proxy), solve(proxy, tokens)
    statistics = {"proxy": to_proxy[1], "expert": to_expert[1]}
    if wrong:
        other = tokens if wrong == "expert" else proxy
        statistics[wrong] = jax.tree.map(np.float32, statistics_of(cls=rng.normal(2, 3, other.shape)))
    hops = [
        ("proxy", {"cls": to_proxy[0]}, statistics["proxy"], "some"),
        ("pe", {"cls": to_expert[0]}, statistics["expert"], world.data.expert.fingerprint),
    ]
    return at(world.student, write_checkpoint(folder, world.student.loaded, hops))


def at(encoder, path):
    """The same encoder as if it came from `path`."""
    placed = copy.copy(encoder)
    placed.checkpoint = path
    return placed


def test_the_expert_itself_scores_as_its_two_towers_do(world):
    module, variables, entry = load_image_text(world.expert.checkpoint)
    # By hand, one class at a time.
    prepare = zero_shot.Squash(SIDE, "bilinear")
    pixels = np.stack([prepare(world.data.images[i]) for i in range(4)]) / 255.0
    pixels = ((pixels - entry["mean"]) / entry["std"]).astype(np.float32)
    expected, score = np.zeros((4, 3)), jax.jit(module.apply)
    for label, name in enumerate(("disc", "stripes", "plain")):
        prompts = [t.replace("{c}", name) for t in world.data.templates]
        out = score(variables, pixels, zero_shot.tokenize(prompts, 16))
        mean = np.asarray(out["text"], np.float64).mean(0)
        expected[:, label] = 100 * np.asarray(out["image"], np.float64) @ (mean / np.linalg.norm(mean))
    np.testing.assert_allclose(world.logits[:4], expected, atol=2e-3)
    result = zero_shot.run(world.expert, world.data, SETTINGS)
    assert result.details["hops"] == 0 and result.details["templates"] == 80
    assert result.metrics["top1"] == pytest.approx((world.logits.argmax(1) == world.data.images.labels).mean())
    assert result.images["guesses"].dtype == np.uint8
    assert len(set(world.logits.argmax(1))) > 1  # comparisons would say nothing if it took all for one class


@pytest.mark.parametrize("space", ["pool", "proj"])
def test_the_chain_of_adapters_gives_the_experts_own_answers(world, tmp_path, space):
    student, settings = distil(world, tmp_path, space=space), dataclasses.replace(SETTINGS, space=space)
    np.testing.assert_allclose(logits_of(world, student, settings), world.logits, atol=0.05)
    # The checkpoint is a whole one: the backbone comes out of it, too.
    loaded = FlaxEncoder(load_encoder(student.checkpoint), checkpoint=student.checkpoint, student="s")
    result = zero_shot.run(loaded, world.data, settings)
    assert result.metrics == zero_shot.run(world.expert, world.data, SETTINGS).metrics
    assert result.details["hops"] == 2 and result.details["expert"] == "pe" and result.details["same_expert"]


@pytest.mark.parametrize("wrong", ["proxy", "expert"])
def test_another_set_of_statistics_breaks_it(world, tmp_path, wrong):
    mine = logits_of(world, distil(world, tmp_path, wrong=wrong))
    assert np.abs(mine - world.logits).max() > 5
    assert (mine.argmax(1) != world.logits.argmax(1)).mean() > 0.2


def test_the_tower_of_another_expert_is_reported(world, tmp_path, caplog):
    expert = dataclasses.replace(world.data.expert, fingerprint="another")
    _, route = zero_shot.embedder(distil(world, tmp_path), expert, SETTINGS)
    assert route["same_expert"] is False and "not the teacher 'pe'" in caplog.text


def test_where_the_text_tower_comes_from(world, tmp_path):
    student, bare = distil(world, tmp_path), dataclasses.replace(world.data, expert=None)
    same = lambda expert: expert.fingerprint == world.data.expert.fingerprint  # noqa: E731
    assert same(zero_shot.find_expert(student, world.data))
    assert same(zero_shot.find_expert(student, dataclasses.replace(bare, teachers={"x": world.expert})))
    assert same(zero_shot.find_expert(world.expert, bare))
    with pytest.raises(ValueError, match="needs a text tower: set text_tower"):
        zero_shot.find_expert(student, bare)
    with pytest.raises(ValueError, match=r"one teacher, got \['a', 'b'\]"):
        zero_shot.find_expert(student, dataclasses.replace(bare, teachers={"b": world.expert, "a": student}))
    with pytest.raises(ValueError, match="holds no text tower"):
        zero_shot.find_expert(student, dataclasses.replace(bare, teachers={"x": student}))


def test_encoders_without_a_way_are_refused(world, tmp_path):
    student, expert = distil(world, tmp_path), world.data.expert
    with pytest.raises(ValueError, match=r"\(proj\) is 16 wide; the chain of .* leads to \{'pe': 24\}"):
        zero_shot.embedder(student, expert, dataclasses.replace(SETTINGS, space="proj"))
    with pytest.raises(ValueError, match="leads to"):
        zero_shot.embedder(student, expert, dataclasses.replace(SETTINGS, expert="dinov3"))
    with pytest.raises(ValueError, match="has no adapters into the expert's space"):
        zero_shot.embedder(world.student, expert, SETTINGS)
    student.cls_dim = None
    with pytest.raises(ValueError, match="has no class token"):
        zero_shot.embedder(student, expert, SETTINGS)


@pytest.mark.parametrize("hops", [1, 2])
def test_a_chain_without_class_tokens_is_refused(world, tmp_path, hops):
    """The case of encoders that were distilled on patch tokens alone."""
    statistics = {"mean": {"patches": np.zeros(24, np.float32)}, "std": {"patches": np.ones(24, np.float32)}}
    hop = ("pe", {"patches": linear_adapter(np.zeros((32, 24)), np.zeros(24))}, statistics, "")
    student = at(world.student, write_checkpoint(tmp_path, world.student.loaded, [hop] * hops))
    with pytest.raises(ValueError, match="no class-token adapter"):
        zero_shot.embedder(student, world.data.expert, SETTINGS)


def test_texts_are_kept_and_go_on(world, tmp_path, monkeypatch):
    expert, names = world.data.expert, [f"thing {i}" for i in range(5)]
    monkeypatch.setattr(zero_shot, "_PIECE", 2)
    whole = zero_shot.class_embeddings(expert, names, ("a {c}", "the {c}"), 8)
    kept = zero_shot.class_embeddings(expert, names, ("a {c}", "the {c}"), 8, tmp_path)
    np.testing.assert_array_equal(whole, kept)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    files = sorted((tmp_path / "texts").iterdir())
    assert len(files) == 3
    files[1].unlink()
    calls = []
    real = zero_shot.tokenize
    monkeypatch.setattr(zero_shot, "tokenize", lambda texts, length: calls.append(len(texts)) or real(texts, length))
    np.testing.assert_array_equal(zero_shot.class_embeddings(expert, names, ("a {c}", "the {c}"), 8, tmp_path), whole)
    assert calls == [4]  # two classes in two prompts
    other = zero_shot.class_embeddings(expert, names, ("a {c}", "that {c}"), 8, tmp_path)
    assert np.abs(other - whole).max() > 1e-3


def test_the_published_prompts():
    templates = zero_shot.read_list(zero_shot.TEMPLATES, "")
    assert len(templates) == len(set(templates)) == 80
    assert all(t.count("{c}") == 1 for t in templates)
    assert {"a photo of a {c}.", "itap of my {c}.", "the {c} in a video game."} < set(templates)


def test_names_from_files(world, tmp_path):
    expected = ("tench", "goldfish", "great white shark")
    (tmp_path / "names.txt").write_text("\n".join(expected) + "\n")
    (tmp_path / "list.json").write_text(json.dumps(expected))
    (tmp_path / "object.json").write_text(json.dumps({"imagenet1k": expected, "other": ["x"]}))
    for file in ("names.txt", "list.json", "object.json"):
        settings = dataclasses.replace(SETTINGS, class_names=str(tmp_path / file))
        assert zero_shot.load(world.root / "images", settings).names == expected


BROKEN = {
    "names.txt": ("a\nb\n", "2 names for the 3 classes"),
    "empty.txt": ("a\n\nc\n", "entry 2"),
    "nothing.txt": ("", "expected a list of texts"),
    "bad.json": ("{", "cannot be read"),
    "number.json": ("[1, 2, 3]", "entry 1: expected a text, got 1"),
    "keys.json": ('{"a": ["x"]}', "no list 'imagenet1k', only a: set key"),
    "missing.txt": (None, "cannot be read"),
}


@pytest.mark.parametrize("file", BROKEN)
def test_broken_lists_are_named(world, tmp_path, file):
    content, message = BROKEN[file]
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=f"{file}.*{message}"):
        zero_shot.load(world.root / "images", dataclasses.replace(SETTINGS, class_names=str(tmp_path / file)))


def test_prompts_and_classes_that_make_no_sense(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("a {c}\na photo\n")
    with pytest.raises(DataError, match="prompts.txt, entry 2: 'a photo'"):
        zero_shot.load(world.root / "images", dataclasses.replace(SETTINGS, templates=str(tmp_path / "prompts.txt")))
    folder = write_shards(tmp_path / "wordnet")
    for path in sorted(folder.glob("*.tar")):
        path.unlink()
    for name in ("n01440764", "n01443537"):
        target = folder / "val" / name
        target.mkdir(parents=True)
        (target / "0.jpg").write_bytes(world.data.images[0].data)
    (folder / "classes.txt").unlink()
    assert len(zero_shot.load(world.root / "images", dataclasses.replace(SETTINGS, test_split="train")).images) == 3
    with pytest.raises(DataError, match="WordNet ids such as n01440764: give class_names"):
        zero_shot.load(folder, SETTINGS)
    for field in ("space", "filter"):
        with pytest.raises(ValueError, match=field):
            Settings(**{field: "cubic"})
