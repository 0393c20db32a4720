"""The card that goes with every export: what it is, how to feed it, where it comes from, what was measured, licences.

Markdown with the header that Hugging Face reads. Everything is taken from manifests, reports and results of evaluations
(origins.py); what they do not say is said to be not known.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

import eupe_jax
from convert import origins, statistics_card
from convert.origins import NOT_KNOWN, Origin, Teacher
from eupe_jax.models import zoo
from eupe_jax.planning.report import table
from eupe_jax.training.encoders import LoadedEncoder

FOLDER_CARD, FOLDER_STATISTICS = "README.md", "STATISTICS.md"  # in a folder that is one export
DIFFERENCES, METRICS = 40, 12  # shown, of the recipe and of each evaluation
HUB_LICENCES = {"Apache-2.0": "apache-2.0"}  # as Hugging Face calls them
PAIRS = {
    "flax_vs_torch": "Flax and PyTorch", "flax_vs_transformers": "Flax and transformers",
    "torch_vs_pte": "PyTorch and the program", "torch_vs_onnx": "PyTorch and ONNX",
}  # fmt: skip
# What an export is, by the library that opens it, as Hugging Face calls that.
KINDS = {
    "pytorch": "PyTorch weights under the authors' names, with how to feed them",
    "transformers": "a folder for `transformers.AutoModel.from_pretrained`",
    "executorch": "a program for the ExecuTorch runtime on mobile CPUs; the same facts are inside and beside it",
}
USES = (
    "Frozen features of photographs: class tokens for retrieval and classification, patch tokens for segmentation, "
    "depth, correspondence and as the eyes of language models, with a head of your own on top."
)
LIMITS = (
    "It has no head: it names nothing by itself.",
    "It is as good as the pictures and teachers that it learned from, and has their gaps and biases; none were looked "
    "for. Medical, satellite, infrared and other pictures unlike those need measurements of their own.",
    "Nothing is known about fairness between groups of people: do not use it to recognise, judge or watch them.",
    "Sizes, pixel normalisation and channel order are part of the model: others give other features without an error.",
)


def files(
    encoder: LoadedEncoder, out: Path, facts: Mapping[str, Any], *, library: str, inside: bool = False
) -> dict[Path, bytes]:
    """The cards of an export, to be written with it.

    Args:
      out: the file that is exported, or the folder (`inside`: cards go into it).
      facts: its metadata, or the report beside a program: how to feed it, gates.
      library: which of KINDS it is.

    Raises:
      ValueError, OSError: what there is of the encoder's origin is damaged.
    """
    origin = origins.origin(encoder)
    card, statistics = (out / FOLDER_CARD, out / FOLDER_STATISTICS) if inside else paths(out)
    found: dict[Path, bytes] = {}
    if origin.statistics:
        picture = statistics.with_suffix(".png")
        if png := statistics_card.histograms(origin.statistics):
            found[picture] = png
        text = statistics_card.card(origin.statistics, picture.name if png else None)
        found[statistics] = text.encode()
    text = model_card(encoder, origin, facts, out.name, library, statistics.name if origin.statistics else None)
    found[card] = text.encode()
    return found


def paths(out: Path) -> tuple[Path, Path]:
    """(model card, statistics card) of an exported file."""
    return out.with_name(f"{out.name}.md"), out.with_name(f"{out.name}.statistics.md")


def model_card(
    encoder: LoadedEncoder, origin: Origin, facts: Mapping[str, Any], name: str, library: str, statistics: str | None
) -> str:
    """The whole card of the file or folder `name`. statistics: the name of the statistics card."""
    title = f"{encoder.name} ({origin.student})" if origin.student and origin.teachers else encoder.name
    parts = [
        header(origin, facts, library, encoder.name),
        f"# {title}",
        _introduction(encoder, origin, name, library),
        "## How to feed it",
        _feeding(encoder, facts),
        "## Where it comes from",
        *_provenance(origin),
    ]
    if origin.config:
        parts += ["## Recipe", *_recipe(origin)]
    parts += ["## Statistics of the teachers", *_statistics(origin, statistics)]
    parts += ["## Parity of this export", *_parity(facts)]
    parts += ["## Evaluations", *_evaluations(origin)]
    parts += ["## Intended use", USES, "## Limits", "\n".join(f"- {limit}" for limit in LIMITS)]
    parts += ["## Licences", *_licences(encoder, origin)]
    versions = origin.manifest.get("versions") or {}
    trained = ", ".join(f"{package} {version}" for package, version in versions.items())
    parts += ["## Made with", f"eupe_jax {eupe_jax.__version__}" + (f"; the checkpoint with {trained}" * bool(trained))]
    return "\n\n".join(parts) + "\n"


def header(origin: Origin, facts: Mapping[str, Any], library: str, model: str) -> str:
    """The YAML between lines of dashes."""
    content: dict[str, Any] = {}
    licence = str(facts.get("licence") or "") if _converted(origin) else ""
    if licence in HUB_LICENCES:
        content["license"] = HUB_LICENCES[licence]
    elif licence:
        content |= {"license": "other", "license_name": re.sub(r"[^a-z0-9]+", "-", licence.lower()).strip("-")}
    else:
        content["license"] = "unknown"  # whoever passes it on chooses one: see the card's last part
    content["library_name"] = library
    content["pipeline_tag"] = "image-feature-extraction"
    content["tags"] = ["eupe", "vision", "image-feature-extraction", model]
    if origin.teachers:
        content["tags"].append("distillation")
    if datasets := _datasets(origin):
        content["datasets"] = datasets
    return "---\n" + yaml.safe_dump(content, sort_keys=False) + "---"


def _converted(origin: Origin) -> bool:
    """Whether these are weights of other hands, turned into a checkpoint and not trained since."""
    return "source" in origin.manifest and not origin.teachers


def _datasets(origin: Origin) -> list[str]:
    """Public sets that the config names; folders have no name that would mean anything elsewhere."""
    sources = _sources(origin).values()
    return sorted({str(s.get("path")).partition(":")[0] for s in sources if s.get("kind") == "tfds"})


def _sources(origin: Origin) -> Mapping[str, Mapping[str, Any]]:
    return (origin.config.get("data") or {}).get("sources") or {}


def _introduction(encoder: LoadedEncoder, origin: Origin, name: str, library: str) -> str:
    spec = zoo.spec(encoder.name, **encoder.overrides)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(encoder.variables["params"]))
    text = f"An image encoder of the family {spec.family}, {_millions(numbers)} parameters"
    if encoder.overrides:
        changed = ", ".join(f"{k}={v}" for k, v in encoder.overrides.items())
        text += f" (the zoo's `{encoder.name}`, changed: `{changed}`)"
    if origin.teachers:
        text += f", distilled from {_and(map(_taught, origin.teachers))}"
    return f"{text}. `{name}` is {KINDS[library]}."


def _taught(teacher: Teacher) -> str:
    return teacher.name + (f" (itself from {_and(t.name for t in teacher.teachers)})" if teacher.teachers else "")


def _feeding(encoder: LoadedEncoder, facts: Mapping[str, Any]) -> str:
    trained = encoder.manifest.get("resolutions") or [encoder.resolution]
    rows = [
        ["resolution", f"{encoder.resolution} pixels (trained at {', '.join(map(str, trained))})"],
        ["pixels", facts.get("pixels", NOT_KNOWN)],
        ["mean, std", f"{list(encoder.mean)}, {list(encoder.std)}"],
        ["patch size", f"{facts.get('patch_size', NOT_KNOWN)} pixels"],
        ["tokens", facts.get("token_layout", NOT_KNOWN)],
        ["widths", f"class token {facts.get('cls_dim')}, patch tokens {facts.get('patch_dim')}; "
                   f"{facts.get('num_storage_tokens')} storage tokens"],
    ]  # fmt: skip
    for method, each in (facts.get("methods") or {}).items():
        outputs = ", ".join(f"{o['name']} {o['shape']}" for o in each["outputs"])
        rows.append([f"method `{method}`", f"{each['input']['dtype']} {each['input']['shape']} -> {outputs}"])
    if "precision" in facts:
        rows.append(["precision, backend", f"{facts['precision']}, {facts['backend']}"])
    if kept := facts.get("float_layers"):
        rows.append(["layers kept float", ", ".join(kept)])
    rows.append(["sha256 of the weights", f"`{facts.get('weights_sha256', NOT_KNOWN)}`"])
    return table(["", ""], rows)


def _provenance(origin: Origin) -> list[str]:
    if origin.step is None:
        return ["It was made of a weights file without a manifest: how it was trained is not known."]
    if source := origin.manifest.get("source"):
        names = [f"`{name}` (sha256 `{digest}`)" for name, digest in (source.get("files") or {}).items()]
        return [f"Converted, not trained by eupe_jax, from {_and(names)}. How those were trained they do not say."]
    parts = [f"Step {origin.manifest.get('step', NOT_KNOWN)} of a run of eupe_jax."]
    earlier, before = origin, origin.before
    if not origin.started_from:
        parts[0] += " It started from random weights." if origin.config else ""
    while earlier.started_from:
        step = f", step {before.manifest.get('step')}" if before else ""
        parts.append(f"It started from `{earlier.started_from}`{step}." if earlier is origin else
                     f"That run had started from `{earlier.started_from}`{step}.")  # fmt: skip
        if before and before.teachers:
            taught = _and(f"{t.name} (`{t.fingerprint[:16]}`)" for t in before.teachers)
            parts[-1] += f" There it was taught by {taught}."
        earlier, before = (before, before.before) if before else (Origin({}, "", None), None)
    if not origin.teachers:
        return [*parts, "Its teachers are not known."]
    rows = list(_teacher_rows(origin.teachers))
    columns = ["teacher", "what", "weights from", "sides, px", "class token", "fingerprint"]
    return [*parts, "Teachers, and under each those that it learned from itself:", table(columns, rows)]


def _teacher_rows(teachers: Iterable[Teacher], depth: int = 0) -> Iterable[list[str]]:
    for each in teachers:
        sides = ", ".join(map(str, each.resolutions)) or NOT_KNOWN
        name = "&nbsp;" * 4 * depth + each.name
        yield [name, f"`{each.what}`", f"`{each.where}`", sides, each.class_token, f"`{each.fingerprint[:16]}`"]
        yield from _teacher_rows(each.teachers, depth + 1)


def _recipe(origin: Origin) -> list[str]:
    config = origin.config
    step, batch = origin.manifest.get("step"), config.get("batch_size")
    recipe, differences = origins.nearest_recipe(config)
    rows = [
        ["steps", f"{step} of {config.get('total_steps')}"],
        ["batch", f"{batch} images, {int(step or 0) * int(batch or 0):,} in all"],
        ["sides of the student's images", ", ".join(map(str, config.get("student_resolutions") or [])) + " px"],
        ["digest of the config", f"`{origins.digest(config)}`"],
        ["nearest released recipe", f"`{recipe}`, {len(differences)} fields differ"],
    ]
    for name, source in _sources(origin).items():
        rows.append(
            [f"pictures, `{name}`", f"{source.get('kind')} `{source.get('path')}`, weight {source.get('weight')}"]
        )
    parts = [table(["", ""], rows)]
    if differences:
        shown = list(differences.items())[:DIFFERENCES]
        parts.append(
            table(["field", "released recipe", "this run"],
                  [[f"`{field}`", _value(there), _value(here)] for field, (there, here) in shown])
        )  # fmt: skip
    if len(differences) > DIFFERENCES:
        parts.append(f"{len(differences) - DIFFERENCES} more differ; the checkpoint's manifest has the whole config.")
    return parts


def _value(value: Any) -> str:
    return "not there" if value is None else f"`{value!r}`"


def _statistics(origin: Origin, card: str | None) -> list[str]:
    if not card:
        return ["Not known." if not _converted(origin) else "None: it was not distilled by eupe_jax."]
    where = origin.config.get("statistics_from") or origin.config.get("statistics") or NOT_KNOWN
    words = f"Targets were normalised with these frozen statistics, from `{where}`; more in [{card}]({card})."
    return [words, statistics_card.summary(origin.statistics)]


def _parity(facts: Mapping[str, Any]) -> list[str]:
    rows = []
    groups = {"": facts} if "gates" in facts else facts.get("methods") or {}
    for method, each in groups.items():
        for pair, words in PAIRS.items():
            for tokens, figures in (each.get("gates") or {}).get(pair, {}).items():
                rows.append([*([f"`{method}`"] if method else []), words, tokens, f"{figures['max_abs']:.2e}",
                             f"{figures['mean_cosine']:.6f}", f"{figures['cosine']:.6f}"])  # fmt: skip
    if not rows:
        return ["None measured."]
    columns = [*(["method"] if "methods" in facts else []), "between", "tokens", "largest difference", "mean cosine",
               "least cosine"]  # fmt: skip
    parts = [
        "On real photographs, before the file was written; differences are in standard deviations of the features."
    ]
    parts.append(table(columns, rows))
    if moved := facts.get("recomputed_periods"):
        far = ", ".join(f"{tokens} by {figures['max_abs']:.2e}" for tokens, figures in moved.items())
        parts.append(f"RoPE periods were computed anew, which moved features before those comparisons: {far}.")
    return parts


def _evaluations(origin: Origin) -> list[str]:
    if not origin.evaluations:
        return ["None measured by the run at this step."]
    rows = []
    for name, found in origin.evaluations.items():
        metrics = list(found["metrics"].items())
        what = f"{name} ({found['eval']})"
        rows += [[what, found.get("data", NOT_KNOWN), metric, f"{value:.4g}"] for metric, value in metrics[:METRICS]]
        if len(metrics) > METRICS:
            rows.append([what, "", f"{len(metrics) - METRICS} more in its metrics.json", ""])
    words = "Measured by the run itself, on this very step, in Flax; fractions, not percentages."
    return [words, table(["evaluation", "data", "metric", "value"], rows)]


def _licences(encoder: LoadedEncoder, origin: Origin) -> list[str]:
    own = zoo.spec(encoder.name).licence or NOT_KNOWN
    published = f"the published weights called {encoder.name}"
    if _converted(origin):
        return [
            f"These are weights of other hands; {published} are under: {own}. Whether these are those was not checked."
        ]
    if not origin.teachers:
        return [f"Not known. Should these be {published}, they are under: {own}."]
    rows = [
        [f"teacher {t.name}", f"`{t.what}`", t.licence]
        for each in _runs(origin)
        for p in each.teachers
        for t in p.all()
    ]
    rows += [["weights it started from", f"`{each.started_from}`", each.started_with_licence]
             for each in _runs(origin) if each.started_with_licence]  # fmt: skip
    rows += [["pictures", f"`{s.get('path') or s.get('kind')}`", "not recorded"] for s in _sources(origin).values()]
    return [
        "Nobody has chosen a licence for these weights yet: whoever passes them on does, and writes it at the top of "
        "this card. What it has to respect, as far as it is known:",
        table(["what", "which", "licence"], [list(row) for row in dict.fromkeys(map(tuple, rows))]),
        "A licence is that of the published weights of this name; whether those were used is for the checkpoint's "
        "maker to say. Some licences reach what is learned from a model's outputs.",
    ]


def _runs(origin: Origin) -> Iterable[Origin]:
    """This run, and those before it."""
    each: Origin | None = origin
    while each is not None:
        yield each
        each = each.before


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _and(words: Iterable[str]) -> str:
    found: Sequence[str] = list(words)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}" if found else NOT_KNOWN
