"""Zero-shot classification with the text tower of an expert (EUPE App. C, IN1k-ZS).

A distilled encoder has no text tower. Its class token goes back through the adapters (student -> proxy -> expert, each
hop undone with the statistics its targets were normalised with) into the space of an expert that has one, and is
compared there with the embeddings of class names in many prompts. The expert itself is measured in the same way, with
no hops.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from eupe_jax.data.host import decode
from eupe_jax.data.sources import Record
from eupe_jax.distill.normalization import denormalize
from eupe_jax.distill.teacher_spec import fingerprint as with_tokens
from eupe_jax.evals import classification
from eupe_jax.evals.features import extract, load_arrays, save_arrays
from eupe_jax.evals.interface import DataError, Encoder, Result
from eupe_jax.evals.labelled import LabelledImages, load_test
from eupe_jax.evals.similarity import Hop, load_chain, predict_experts
from eupe_jax.evals.tokenizer import tokenize
from eupe_jax.models.text_tower import ImageTextModel, unit
from eupe_jax.sharding.mesh import batch_sharding, make_mesh, replicated
from eupe_jax.training import checkpoints, encoders
from eupe_jax.training.fingerprint import fingerprint

LOGGER = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "imagenet_templates.txt"
SPACES = ("auto", "pool", "proj")
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_PIECE = 64  # classes whose embeddings are kept together


@dataclass(frozen=True)
class Settings:
    """The authors' choices by default, those of the expert's own harness where the paper is silent.

    Attributes:
      text_tower: checkpoint of the expert with its text tower (convert/teachers_to_orbax.py writes one). "": the only
        one of `data.teachers`, or the encoder's own checkpoint if it is that expert.
      class_names: file of names for the prompts, in the order of the labels: one a line, a JSON list, or a JSON object
        of lists. "": the data set's own class names, underscores as spaces.
      templates: file of prompts, one a line with {c} for the name, or JSON as above. "": the 80 prompts published with
        CLIP for ImageNet.
      key: which list of a JSON object.
      test_split: name of the split to measure on; "": whichever of "val", "validation" and "test" is there.
      expert: name of the expert in the chain. "": the only one whose class token is as wide as the tower's.
      space: what the expert's class token is: "pool" (before the projection, which is then applied), "proj" (the
        embedding itself), "auto": what the expert's checkpoint says.
      side: pixels of the image; the nearest multiple of the encoder's patches is taken. The whole picture is squashed.
      filter: of that resize, "bilinear" or "bicubic".
      logit_scale: factor of the cosines before the softmax whose values stand under the pictures; no effect on metrics.
      batch_size, text_batch, threads: images a forward pass, texts a forward pass, decoders.
      pictures: how many images are shown with their best classes.
    """

    text_tower: str = ""
    class_names: str = ""
    templates: str = ""
    key: str = "imagenet1k"
    test_split: str = ""
    expert: str = ""
    space: str = "auto"
    side: int = 224
    filter: str = "bilinear"
    logit_scale: float = 100.0
    batch_size: int = 32
    text_batch: int = 256
    threads: int = 4
    pictures: int = 16

    def __post_init__(self):
        for name, allowed in (("space", SPACES), ("filter", tuple(FILTERS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Expert:
    """An image-text model, as far as zero-shot needs it.

    Attributes:
      module: both towers. text: parameters of the text tower. projection: [width, output_dim] behind the image pool.
      image_weights: fingerprint of the image tower's parameters.
      fingerprint: of the image tower as a teacher with its native class token, as statistics record it.
    """

    module: ImageTextModel
    text: Mapping[str, Any]
    projection: np.ndarray
    image_weights: str
    fingerprint: str

    @classmethod
    def of(cls, module: ImageTextModel, variables: Mapping, mean: Sequence[float], std: Sequence[float]) -> "Expert":
        """From a model with its variables and pixel statistics; the image tower's weights are not kept."""
        params = variables["params"]
        image_weights, as_teacher = fingerprint(params["visual"]), fingerprint({"params": params["visual"]})
        digest = with_tokens(as_teacher, {"class_token": "native"}, mean, std)
        return cls(module, params["text"], np.asarray(params["visual"]["proj"], np.float32), image_weights, digest)

    @classmethod
    def load(cls, path: str) -> "Expert":
        """Raises like `encoders.load_image_text`."""
        module, variables, entry = encoders.load_image_text(path)
        return cls.of(module, variables, entry["mean"], entry["std"])


@dataclass(frozen=True)
class Data:
    """images: the test split. names: of the classes, for prompts. templates: prompts with {c}. teachers: encoders whose
    checkpoint may hold the text tower. expert: the loaded text tower, if the settings name one."""

    images: LabelledImages
    names: tuple[str, ...]
    templates: tuple[str, ...]
    teachers: Mapping[str, Encoder] = field(default_factory=dict)
    expert: Expert | None = None


def load(folder: Path, settings: Settings) -> Data:
    """The test split of a labelled set (`labelled`), names, prompts, and the text tower if the settings name one.

    Raises:
      DataError: a broken set, an unreadable list, a prompt without {c}, or not one name a class.
    """
    images = load_test(Path(folder), settings.test_split)
    if settings.class_names:
        names = read_list(Path(settings.class_names), settings.key)
        if len(names) != len(images.classes):
            raise DataError(
                f"{settings.class_names}: {len(names)} names for the {len(images.classes)} classes of {folder}"
            )
    else:
        names = tuple(name.replace("_", " ") for name in images.classes)
        if all(name[0] == "n" and name[1:].isdigit() for name in names):
            raise DataError(
                f"the classes of {folder} are WordNet ids such as {names[0]}: give class_names, a file of words"
            )
    source = Path(settings.templates) if settings.templates else TEMPLATES
    templates = read_list(source, settings.key)
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            raise DataError(f"{source}, entry {number}: {template!r} has no {{c}} for the class name")
    return Data(images, names, templates, expert=Expert.load(settings.text_tower) if settings.text_tower else None)


def read_list(path: Path, key: str) -> tuple[str, ...]:
    """Texts of a file: its lines, or a JSON list, or the list `key` of a JSON object.

    Raises:
      DataError: cannot be read, is empty, has an empty entry or no such key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix == ".json" else text.rstrip().splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as a list of texts: {error}") from None
    if isinstance(entries, dict):
        if key not in entries:
            raise DataError(f"{path} has no list {key!r}, only {', '.join(sorted(entries))}: set key")
        entries = entries[key]
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected a list of texts, found {'none' if not entries else type(entries).__name__}")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, str) or not entry.strip():
            raise DataError(f"{path}, entry {number}: expected a text, got {entry!r}")
    return tuple(entry.strip() for entry in entries)


@dataclass(frozen=True)
class Squash:
    """Record -> uint8 [side, side, 3], the whole picture."""

    side: int
    filter: str

    def __call__(self, record: Record) -> np.ndarray:
        return np.asarray(Image.fromarray(decode(record)).resize((self.side, self.side), FILTERS[self.filter]))


def run(encoder: Encoder, data: Data, settings: Settings, *, workdir: Path | None = None) -> Result:
    """Top-1, top-5 and mean-per-class accuracy; embeddings of texts and features of images are kept in `workdir`.

    Raises:
      ValueError: no text tower, no class token, no way from the encoder into the tower's space, or several.
    """
    expert = find_expert(encoder, data)
    to_embedding, route = embedder(encoder, expert, settings)
    side = max(round(settings.side / encoder.patch_size), 1) * encoder.patch_size
    texts = class_embeddings(expert, data.names, data.templates, settings.text_batch, workdir)
    cls = extract(
        encoder, data.images, settings.batch_size, kinds=("cls",), prepare=Squash(side, settings.filter),
        workdir=workdir, threads=settings.threads, progress=f"{encoder.name}: {data.images.split}",
    )["cls"]  # fmt: skip
    images = np.concatenate([to_embedding(cls[i : i + 4096]) for i in range(0, len(cls), 4096)])
    logits = settings.logit_scale * images @ texts.T
    ranked, labels = classification.rank(logits), data.images.labels
    table = classification.class_table(ranked[:, 0], labels, data.names)
    details = {
        "side": side,
        "images": len(labels),
        "classes": len(data.names),
        "templates": len(data.templates),
        **route,
    }
    pictures = {"guesses": _picture(data, logits, settings.pictures)} if settings.pictures else {}
    return Result(classification.accuracies(ranked, labels), {"by_class": table}, pictures, details)


def find_expert(encoder: Encoder, data: Data) -> Expert:
    """The image-text model: of the settings, of the teachers given, or the encoder's own checkpoint.

    Raises:
      ValueError: there is none, or several.
    """
    if data.expert is not None:
        return data.expert
    if len(data.teachers) == 1:
        (teacher,) = data.teachers.values()
        return Expert.load(getattr(teacher, "checkpoint", ""))
    if data.teachers:
        raise ValueError(f"zero_shot needs one teacher, got {sorted(data.teachers)}: set text_tower")
    if getattr(encoder, "checkpoint", "") and _way_back(encoder) is None:
        return Expert.load(encoder.checkpoint)
    raise ValueError("zero_shot needs a text tower: set text_tower to a converted pe_core checkpoint that has one")


def embedder(encoder: Encoder, expert: Expert, settings: Settings):
    """(class tokens [B, D] -> embeddings [B, E] of unit length in the expert's space, what to report about the way).

    Raises:
      ValueError: no class token or no way into that space.
    """
    visual = expert.module.visual
    space = visual.cls_output if settings.space == "auto" else settings.space
    widths = {"pool": visual.width, "proj": visual.output_dim}
    if space not in widths:
        raise ValueError(f"the expert's checkpoint has cls_output={space!r}, no class token: set space")
    if encoder.cls_dim is None:
        raise ValueError(f"{encoder.name} has no class token, so there is nothing to compare with texts")
    chain = _way_back(encoder)
    if chain is None:
        _require_own(encoder, expert, space, widths)
        name, route = "", {"hops": 0, "space": space}
    else:
        chain = [hop.only("cls") for hop in chain]
        name = _pick(encoder, chain, settings.expert, space, widths[space])
        known = chain[-1].fingerprints.get(name, "")
        same = known == expert.fingerprint
        if not same:
            LOGGER.warning(
                "the text tower's image tower is not the teacher %r that %s learned from", name, encoder.name
            )
        route = {"hops": len(chain), "space": space, "expert": name, "same_expert": same}

    def embed(cls_BxD: np.ndarray) -> np.ndarray:
        if chain is not None:
            predicted = predict_experts({"cls": cls_BxD}, chain)[name]["cls"]
            statistics = chain[-1].statistics[name]
            cls_BxD = denormalize(predicted, statistics["mean"]["cls"], statistics["std"]["cls"])
        if space == "pool":
            cls_BxD = jnp.matmul(cls_BxD, expert.projection, precision=jax.lax.Precision.HIGHEST)
        return np.asarray(unit(cls_BxD), np.float32)

    return embed, route


def _way_back(encoder: Encoder) -> list[Hop] | None:
    """The adapters behind an encoder; None where its source has none (a converted teacher, a file of weights)."""
    path = getattr(encoder, "checkpoint", "")
    if not path or Path(path).is_file():
        return None
    manifest = checkpoints.read_manifest(path)
    student = encoders.pick_student(manifest, getattr(encoder, "student", "") or None, path)
    return load_chain(path, student) if manifest["students"][student].get("adapters") else None


def _require_own(encoder: Encoder, expert: Expert, space: str, widths: Mapping[str, int]) -> None:
    """Refuses an encoder that is neither distilled nor the expert itself."""
    loaded = getattr(encoder, "loaded", None)
    if loaded is not None:
        own = fingerprint(loaded.variables["params"]) == expert.image_weights
    else:
        own = encoder.cls_dim == widths[space]
    if not own:
        raise ValueError(
            f"{encoder.name} has no adapters into the expert's space and is not the expert itself: zero_shot takes "
            "training checkpoints, whose adapters and statistics lead back to the expert, or the expert"
        )


def _pick(encoder: Encoder, chain: Sequence[Hop], wanted: str, space: str, width: int) -> str:
    """The expert at the end of the chain whose class token has the tower's width."""
    for hop in chain[:-1]:
        if len(hop.widths) != 1:
            raise ValueError(
                f"{encoder.name}: no class-token adapter leads from it to its proxy, so no way to the texts"
            )
    found = {teacher: kinds["cls"] for teacher, kinds in chain[-1].widths.items()}
    if not found:
        raise ValueError(f"{encoder.name}: its chain has no class-token adapter, so there is no way to the texts")
    fitting = [t for t, n in found.items() if n == width and wanted in ("", t)]
    if len(fitting) != 1:
        raise ValueError(
            f"the text tower's class token ({space}) is {width} wide; the chain of {encoder.name} leads to {found}: "
            f"set {'expert' if len(fitting) > 1 else 'text_tower, expert or space'}"
        )
    return fitting[0]


def class_embeddings(
    expert: Expert, names: Sequence[str], templates: Sequence[str], batch_size: int, workdir: Path | None = None
) -> np.ndarray:
    """One vector a class, float32 [C, E]: the unit embeddings of its prompts, averaged, and made unit again."""
    text = expert.module.text
    facts = (tuple(names), tuple(templates), fingerprint(expert.text), jnp.dtype(text.dtype).name)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    mesh = make_mesh(devices=jax.local_devices())
    variables = jax.device_put({"params": expert.text}, replicated(mesh))
    batch_size = -(-batch_size // mesh.size) * mesh.size
    pieces = []
    with tqdm(total=len(names), desc="texts", unit="class", disable=None) as bar:
        for start in range(0, len(names), _PIECE):
            chosen = names[start : start + _PIECE]
            kept = workdir and Path(workdir) / "texts" / f"{digest[:16]}-{start:06d}.safetensors"
            found = load_arrays(kept, digest) if kept else None
            if found is None:
                prompts = [template.replace("{c}", name) for name in chosen for template in templates]
                ids = tokenize(prompts, text.context_length)
                ids = np.concatenate([ids, np.repeat(ids[-1:], -len(ids) % batch_size, axis=0)])
                batches = (ids[i : i + batch_size] for i in range(0, len(ids), batch_size))
                rows = [np.asarray(_embed(text, variables, jax.device_put(b, batch_sharding(mesh)))) for b in batches]
                each = np.concatenate(rows)[: len(prompts)].reshape(len(chosen), len(templates), -1)
                found = {"texts": np.asarray(unit(jnp.asarray(each.mean(axis=1))))}
                if kept:
                    save_arrays(kept, found, digest)
            pieces.append(found["texts"])
            bar.update(len(chosen))
    return np.concatenate(pieces)


@functools.partial(jax.jit, static_argnums=0)
def _embed(text: nn.Module, variables: Mapping, ids_BxT: jax.Array) -> jax.Array:
    return unit(text.apply(variables, ids_BxT))


def _picture(data: Data, logits: np.ndarray, count: int) -> np.ndarray:
    """Images, evenly spread, in rows of four, above their best class and its probability; green where it is right."""
    cells = []
    for i in np.linspace(0, len(logits) - 1, min(count, len(logits))).astype(int):
        guess, probability = int(logits[i].argmax()), np.exp(logits[i] - logits[i].max())
        colour = classification.GREEN if guess == data.images.labels[i] else classification.RED
        caption = f"{1 / probability.sum():.2f} {data.names[guess]}"
        cells.append((decode(data.images[i]), caption, colour))
    return classification.captioned_grid([cells[i : i + 4] for i in range(0, len(cells), 4)])
