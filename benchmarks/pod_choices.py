"""What the choices of eupe_jax/training/kernels.py are worth on each generation of TPUs, and what they lose.

    python benchmarks/pod_choices.py --out docs/plans/choices [--parts mlp,accuracy,step] [--recipes stage2_vitb]

Nothing runs on a TPU: programs are compiled for chips that are not there (the `tpu` extra) and timed by the estimator
of launch/plan.py. "mlp" is one feed-forward layer of the frozen proxy by the form of its GELU: seconds a cell. "step"
is whole steps by attention, the teacher's GELU and asynchronous collectives: minutes a cell. "accuracy" is a frozen
ViT's tokens with tanh instead of erf, beside what bfloat16 changes: it runs here. Every cell is a small file in --out
as soon as it is there and is not made again: an interrupted run goes on where it stopped. Delete one to make it anew.
"""

import itertools
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this script lies executorch.py, a package's name
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # TPUs are compiled for, not used

import datetime  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from typing import Any  # noqa: E402

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from tqdm import tqdm  # noqa: E402

from convert import cli  # noqa: E402
from eupe_jax.models import zoo  # noqa: E402
from eupe_jax.models.layers import LayerNorm, Mlp, Scale, exact_gelu, tanh_gelu  # noqa: E402
from eupe_jax.planning import compiling, costs, plan  # noqa: E402
from eupe_jax.planning.report import milliseconds, table  # noqa: E402
from eupe_jax.sharding.chips import chip_of, topology  # noqa: E402
from eupe_jax.training import pipeline  # noqa: E402

TEACHER, IMAGES_A_STEP = "eupe_proxy", 8192  # stage 2


def erfc_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


FORMS = {"erfc (jax.nn.gelu)": erfc_gelu, "erf (exact_gelu)": exact_gelu, "tanh": tanh_gelu, "none": lambda x: x}
PARTS = ("mlp", "step", "accuracy")
# attention, teacher's GELU, asynchronous collectives: the first is the choice that "auto" is compared with
STEPS = (
    ("auto", "auto", "auto"),
    ("fused", "exact", "off"),
    ("fused", "tanh", "off"),
    ("fused", "exact", "on"),
    ("fused", "tanh", "on"),
    ("plain", "exact", "off"),
)
# width, depth, heads, images, side; init of weights so large that hidden activations fill the range where tanh errs
ACCURACY = ((192, 12, 3, 8, 256), (384, 12, 6, 8, 256), (768, 12, 12, 4, 256), (1024, 24, 16, 2, 256))


# ---- one layer


class HalfBlock(nn.Module):
    """x + gain * mlp(norm(x)), as in every block."""

    hidden: int
    gelu: Callable
    materialize: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mlp = Mlp(self.hidden, dtype=jnp.bfloat16, gelu=self.gelu, materialize=self.materialize)
        return x + Scale(1.0)(mlp(LayerNorm(1e-5, jnp.bfloat16)(x)))


def mlp_cell(topology_name: str, form: str, materialize: bool) -> dict[str, Any]:
    """Predicted seconds of one layer on one device with its share of stage 2's batch."""
    devices = topology(topology_name)
    spec = zoo.build(TEACHER)
    module = HalfBlock(int(spec.embed_dim * spec.ffn_ratio), FORMS[form], materialize)
    tokens = (256 // spec.patch_size) ** 2 + 1 + spec.num_storage_tokens
    one = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    x = jax.ShapeDtypeStruct((IMAGES_A_STEP // len(devices), tokens, spec.embed_dim), jnp.float32, sharding=one)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16 if path[-1].key == "kernel" else leaf.dtype, sharding=one
        ),
        jax.eval_shape(module.init, jax.random.key(0), x),
    )
    compiled = jax.jit(module.apply, donate_argnums=1).trace(variables, x).lower(lowering_platforms=("tpu",)).compile()
    found, chip = costs.estimate(compiled.as_text(), chip_of(devices[0])), chip_of(devices[0])
    return {
        "chip": chip.name, "form": form, "materialize": materialize, "seconds": found.step_seconds,
        "roofline_seconds": found.roofline_step_seconds, "ideal_seconds": found.flops / chip.peak_flops,
    }  # fmt: skip


# ---- whole steps


def step_cell(recipe: str, topology_name: str, choice: tuple[str, str, str]) -> dict[str, Any]:
    """The plan of a recipe's first pair of resolutions with these kernels."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    with config.unlocked():
        config.compute.update(dict(zip(("attention", "teacher_gelu", "async_collectives"), choice, strict=True)))
    chosen = pipeline.every_pair(config)[:1]
    made = plan.make_plan(config, recipe, topology_name, 1, chosen, compiling.default_cache())
    pair = made["pairs"][0]
    figures = ("step_seconds", "roofline_seconds", "compiler_seconds", "exposed_seconds", "predicted_mfu")
    return {
        "recipe": recipe, "topology": topology_name, "choice": list(choice), "pair": pair["pair"],
        "hbm_free_fraction": pair["hbm_free_fraction"], "compile_seconds": pair["compile_seconds"],
        "problems": made["problems"], **{figure: pair.get(figure) for figure in figures},
    }  # fmt: skip


# ---- accuracy


def accuracy_cell(width: int, depth: int, heads: int, images: int, side: int) -> dict[str, Any]:
    """Relative error (2-norm over all tokens) of a random ViT's patch and class tokens against exact GELU in float32.

    Gains are 1 and the weights before GELU as large as it takes for its input to have a standard deviation of 1.5: most
    of it lies where tanh errs (0.5 to 3.5), more than in trained encoders.
    """
    fields = {"embed_dim": width, "depth": depth, "num_heads": heads, "layerscale_init": 1.0}
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((images, side, side, 3)), jnp.float32)
    exact = zoo.build("eupe_vitb16", **fields)
    variables = jax.jit(exact.init)(jax.random.key(0), pixels[:1])
    wide = 1.5 / (0.02 * width**0.5)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: x * wide if [getattr(k, "key", "") for k in path[-2:]] == ["fc1", "kernel"] else x, variables
    )

    def tokens(**options: Any) -> dict[str, jax.Array]:
        module = zoo.build("eupe_vitb16", **fields, **options)
        return jax.jit(module.apply)(variables, pixels)

    reference = tokens()
    errors = {}
    for name, options in {
        "tanh, float32": {"gelu": tanh_gelu},
        "erf, bfloat16": {"dtype": jnp.bfloat16},
        "tanh, bfloat16": {"gelu": tanh_gelu, "dtype": jnp.bfloat16},
    }.items():
        found = tokens(**options)
        errors[name] = {
            kind: float(jnp.linalg.norm(found[kind] - reference[kind]) / jnp.linalg.norm(reference[kind]))
            for kind in ("cls", "patches")
        }
    return {"width": width, "depth": depth, "images": images, "side": side, "errors": errors}


# ---- cells and tables


def cells(args: Any, parts: Sequence[str]) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(file name, what makes it) of all cells of these parts that were asked for."""
    topologies = args.topologies.split(",")
    if "mlp" in parts:
        for where, form, written in itertools.product(topologies, FORMS, (False, True)):
            label = f"mlp_{where.replace(':', '-')}_{form.split()[0]}{'_written' * written}"
            yield label, lambda where=where, form=form, written=written: mlp_cell(where, form, written)
    if "accuracy" in parts:
        for size in ACCURACY:
            yield f"accuracy_{size[0]}x{size[1]}", lambda size=size: accuracy_cell(*size)
    if "step" in parts:
        for recipe, where, choice in itertools.product(args.recipes.split(","), topologies, STEPS):
            label = f"step_{recipe}_{where.replace(':', '-')}_{'-'.join(choice)}"
            yield label, lambda recipe=recipe, where=where, choice=choice: step_cell(recipe, where, choice)


def markdown(records: dict[str, dict]) -> str:
    """All cells that there are, as tables."""
    parts = {kind: [r for name, r in records.items() if name.startswith(kind)] for kind in PARTS}
    text = [
        "# Kernel choices by chip",
        f"Made by `benchmarks/pod_choices.py` on {datetime.datetime.now(datetime.UTC).date()} with"
        f" {', '.join(compiling.versions())}. Times are predicted by the estimator of `launch/plan.py`:"
        " nothing ran on a TPU.",
    ]
    if parts["mlp"]:
        rows = [
            [r["chip"], r["form"], "yes" if r["materialize"] else "", milliseconds(r["seconds"]),
             milliseconds(r["roofline_seconds"]), f"{r['ideal_seconds'] / r['seconds']:.0%}"]
            for r in parts["mlp"]
        ]  # fmt: skip
        text += [
            "## One feed-forward layer of the frozen proxy, by the form of its GELU",
            "Written out: norm and GELU are stored before the products that read them (`materialize` of the models), so"
            " that no product computes them again for every tile.",
            table(("chip", "GELU", "written out", "predicted", "roofline", "of peak"), rows),
        ]
    if parts["step"]:
        rows = [
            [r["recipe"], r["topology"], *r["choice"],
             milliseconds(r["step_seconds"]) if r["step_seconds"] else "does not fit",
             f"{r['predicted_mfu']:.1%}" if r["predicted_mfu"] else "",
             milliseconds(r["exposed_seconds"]) if r["step_seconds"] else "",
             f"{r['hbm_free_fraction']:.0%}", "; ".join(r["problems"])]
            for r in parts["step"]
        ]  # fmt: skip
        columns = ("recipe", "topology", "attention", "teacher's GELU", "async collectives")
        text += [
            "## Whole steps",
            table((*columns, "step", "MFU", "exposed collectives", "HBM free", "remarks"), rows),
        ]
    if parts["accuracy"]:
        names = list(parts["accuracy"][0]["errors"])
        rows = [
            [f"{r['width']} x {r['depth']}", str(r["side"]),
             *(f"{r['errors'][n]['cls']:.1e} / {r['errors'][n]['patches']:.1e}" for n in names)]
            for r in parts["accuracy"]
        ]  # fmt: skip
        text += [
            "## What tanh costs a frozen teacher",
            "Relative error (2-norm over all tokens, class / patches) of a ViT of random weights against erf in"
            " float32. Inputs of GELU have a standard deviation of 1.5, gains are 1.",
            table(("width x depth", "side", *names), rows),
        ]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = cli.described(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="gets the cells; the tables go to FOLDER.md")
    add("--parts", default=",".join(PARTS), help="what to make (default: all)")
    add("--recipes", default="stage2_vitb", metavar="NAME,...", help="files in configs/ (default: stage2_vitb)")
    add("--topologies", default="v5e:16x16,v5p:4x4x8,v6e:16x16", metavar="NAME,...", help="pods")
    args = parser.parse_args(argv)
    try:
        if unknown := set(args.parts.split(",")) - set(PARTS):
            raise ValueError(f"--parts has no {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
        with tqdm(list(cells(args, args.parts.split(","))), unit="cell") as bar:
            for name, make in bar:
                bar.set_postfix_str(name)
                compiling.kept_json(args.out / f"{name}.json", make)
        made = {name: args.out / f"{name}.json" for name, _ in cells(args, PARTS)}  # what was made before belongs to it
        records = {name: json.loads(path.read_text()) for name, path in made.items() if path.exists()}
        compiling.write_atomically(args.out.with_suffix(".md"), markdown(records).encode())
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {cli.one_line(e)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
