"""Where an encoder comes from, as the manifests on its road say: teachers, their own teachers, recipe, evaluations.

Nothing is guessed: what no manifest says is left out, and the card says that it is not known.
"""

import dataclasses
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax.traverse_util import empty_node, flatten_dict

import configs
from eupe_jax.distill.normalization import Statistics
from eupe_jax.evals import report
from eupe_jax.models import zoo
from eupe_jax.training import weight_files
from eupe_jax.training.checkpoints import read_manifest, step_directory
from eupe_jax.training.encoders import LoadedEncoder, load_statistics

NOT_KNOWN = "not known"
RANDOM = "none: random weights, for smoke tests"
DEPTH = 5  # runs that are followed back, one learning from the other
# Of the weights that these classes read; docs/licences.md has them with their sources.
HOST_LICENCES = {"EfficientNetLite0": "Apache-2.0", "PPOCRv4Detector": "Apache-2.0"}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """name: in its run. what: model or class. teachers: its own, where it was itself distilled."""

    name: str
    fingerprint: str
    what: str = NOT_KNOWN
    where: str = NOT_KNOWN
    licence: str = NOT_KNOWN
    resolutions: tuple[int, ...] = ()
    class_token: str = NOT_KNOWN
    teachers: tuple["Teacher", ...] = ()

    def all(self) -> list["Teacher"]:
        """This one and those it learned from."""
        return [self, *(each for teacher in self.teachers for each in teacher.all())]


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a checkpoint says of one of its students. manifest: of the step; {} for weights without one.

    before: the run whose weights it started from, where that has a manifest.
    """

    manifest: Mapping[str, Any]
    student: str
    step: epath.Path | None
    teachers: tuple[Teacher, ...] = ()
    statistics: Mapping[str, Statistics] = dataclasses.field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    started_from: str = ""
    started_with_licence: str = ""
    before: "Origin | None" = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of its run, as JSON keeps it; {} where it had none."""
        return self.manifest.get("config") or {}


def origin(encoder: LoadedEncoder) -> Origin:
    """Of an encoder as `load_encoder` or `weights.load` gives it.

    Raises:
      ValueError, OSError: what there is of it is damaged.
    """
    path = encoder.manifest.get("path")
    if not path:
        return Origin({}, encoder.student, None)
    step = step_directory(path)
    return _origin(step, encoder.student, evaluations(step, encoder.student), DEPTH)


def _origin(step: epath.Path, student: str, evaluated: Mapping, depth: int) -> Origin:
    manifest = read_manifest(step)
    statistics = load_statistics(step) if manifest.get("statistics") else {}
    entry = _field(manifest, "config", "students", student) or {}
    started, licence, before = str(entry.get("init_from") or ""), "", None
    if started and weight_files.is_weights(started):
        licence = _licence(entry.get("model"))
    elif started and (earlier := _readable(started)) and depth:
        names = read_manifest(earlier)["students"]
        name = student if student in names else next(iter(names))
        before = _origin(earlier, name, {}, depth - 1)
        if not before.teachers:  # weights of other hands, converted
            licence = str(names[name].get("licence") or NOT_KNOWN)
    elif started:
        licence = NOT_KNOWN
    teachers = _teachers(manifest, depth)
    return Origin(manifest, student, step, teachers, statistics, evaluated, started, licence, before)


def _teachers(manifest: Mapping, depth: int) -> tuple[Teacher, ...]:
    found = []
    for name, spec in (manifest.get("teachers") or {}).items():
        entry = _field(manifest, "config", "teachers", name) or {}
        chain = _field(manifest, "chain", name, "statistics") or {}
        own = tuple(
            Teacher(expert, str(_field(header, "provenance", "teacher") or NOT_KNOWN),
                    resolutions=tuple(_field(header, "provenance", "resolution") or ()))
            for expert, header in chain.items()
        )  # fmt: skip
        known = {}
        if entry.get("kind") == "host":
            factory = str(entry.get("factory"))
            where = str(_field(entry, "kwargs", "path") or "its package")  # an ONNX file is where its recipe found it
            known = {"what": factory, "where": where, "licence": _host_licence(factory)}
        elif entry.get("checkpoint") == "random":
            known = {"what": str(entry.get("model")), "where": "random", "licence": RANDOM}
        elif entry:
            where = str(entry.get("checkpoint"))
            known = {"what": str(entry.get("model")), "where": where, "licence": _licence(entry.get("model"))}
            if chain:
                known["licence"] = "that of its own teachers"
                step = _readable(where) if depth else None
                if step and json.dumps(read_manifest(step).get("statistics")) == json.dumps(chain):
                    own = _teachers(read_manifest(step), depth - 1)  # the very run that this chain tells of
        resolutions = tuple(entry.get("resolutions") or (spec.get("resolution"),))
        token = str(spec.get("class_token", NOT_KNOWN))
        digest = str(spec.get("fingerprint", NOT_KNOWN))
        found.append(Teacher(name, digest, resolutions=resolutions, class_token=token, teachers=own, **known))
    return tuple(found)


def _field(tree: Any, *names: str) -> Any:
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _readable(path: str) -> epath.Path | None:
    """The step directory, where what a config names is still there."""
    try:
        step = step_directory(path)
        read_manifest(step)
        return step
    except (OSError, ValueError):
        return None


def _licence(model: Any) -> str:
    try:
        return zoo.spec(str(model)).licence or NOT_KNOWN
    except ValueError:
        return NOT_KNOWN


def _host_licence(factory: str) -> str:
    module, _, kind = factory.partition(":")
    return HOST_LICENCES.get(kind, NOT_KNOWN) if module == "eupe_jax.distill.host_teachers" else NOT_KNOWN


def evaluations(step: epath.Path, student: str) -> dict[str, dict[str, Any]]:
    """{name: metrics.json} of the evaluations inside training of this very step.

    Raises:
      ValueError: one is damaged.
    """
    folder, found = step.parent.parent / "evals", {}
    if step.parent.name != "checkpoints" or not folder.exists():
        return found
    for each in sorted(folder.iterdir()):
        if result := report.read(each / student / step.name):
            found[each.name] = result
    return found


def digest(config: Mapping) -> str:
    """16 hexadecimal digits of a config."""
    return hashlib.sha256(json.dumps(_plain(config), sort_keys=True).encode()).hexdigest()[:16]


def nearest_recipe(config: Mapping) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The released recipe that differs in the fewest fields, and these: {field: (there, here)}; None: no such field."""
    here = _fields(config)
    differences = {}
    for name, recipe in released().items():
        there = _fields(recipe)
        fields = sorted(here.keys() | there.keys())
        differences[name] = {f: (there.get(f), here.get(f)) for f in fields if there.get(f) != here.get(f)}
    name = min(differences, key=lambda each: len(differences[each]))
    return name, differences[name]


def released() -> dict[str, Mapping]:
    """Every recipe of configs/, by the name that --config takes."""
    found = {}
    for module in pkgutil.iter_modules(configs.__path__):
        recipe = importlib.import_module(f"configs.{module.name}")
        if hasattr(recipe, "get_config"):
            for mode in getattr(recipe, "STEPS", ("",)):
                name = f"configs/{module.name}.py" + (f":{mode}" if mode else "")
                found[name] = recipe.get_config(mode).to_dict()
    return found


def _fields(config: Mapping) -> dict[str, Any]:
    flat = flatten_dict(_plain(config), sep=".", keep_empty_nodes=True)
    return {name: {} if value is empty_node else value for name, value in flat.items()}


def _plain(config: Mapping) -> dict:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(config))
