"""Images per second of the stage-2 training step here and in PyTorch, side by side in one run, in float32.

  python benchmarks/train_step.py [--students eupe_vitt16 eupe_vits16] [--batch 16] [--cores 2] [--json FILE]

One step: pixels to [0, 1] and to each model's statistics, a frozen ViT (6 blocks of width 256, the proxy's stand-in),
normalised targets, student, adapters (3072 wide), class and patch losses, gradients, clipping, AdamW. Augmentation and
the RoPE rescale of training are off. Here it is the jitted step of a real run; PyTorch has the readable modules of
convert/torch_vit.py, eager and through torch.compile (both with scaled_dot_product_attention and fused AdamW). Weights
and images are the same, and so must be the losses of the first three steps (to 1e-4), or there is nothing to compare.
Then the contenders take turns, and every round starts with another one: figures are medians over rounds, so that a
busy machine disturbs all alike. Processor time is told beside. All run in one process whose malloc keeps freed memory
(training/host_memory.py); --malloc=default leaves it as it is.
JSON: "students" has a dict of figures for every student; jax_images_per_s, torch_eager_images_per_s,
torch_compile_images_per_s and ratio (the first over the larger of the other two) at the top are those of "student",
the one with the lowest ratio. "ratio_cpu_time" is the same of processor time.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

STUDENTS = ("eupe_vitt16", "eupe_vits16")
PROXY = {"embed_dim": 256, "depth": 6, "num_heads": 4, "ffn_ratio": 4.0}
CHECK_STEPS, TOLERANCE = 3, 1e-4
NAME = "proxy"  # of the teacher


def recipe(student: str, batch: int, side: int, hidden: int, **overrides: Any) -> Any:
    """Stage 2 as its config has it, but for a small teacher, float32, and a rate that moves the first losses.

    overrides: constructor fields of student and teacher, for toy sizes.
    """
    from configs import common, stage2_vitt

    config = stage2_vitt.get_config()
    with config.unlocked():
        fields = {"rope_rescale": None} | overrides
        config.students = {student: common.student(student, dtype="float32", **fields)}
        config.teachers = {NAME: common.encoder_teacher("eupe_proxy", (side,), **(PROXY | overrides))}
        config.teachers[NAME].dtype = "float32"
        config.batch_size, config.student_resolutions, config.data.image_size = batch, (side,), side
        config.adapter.hidden_dim = hidden
        config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 0
        config.mesh.fsdp = 1
    return config.lock()


def random_like(tree: Any, seed: int) -> Any:
    """Every leaf moved by noise, so that LayerScale (1e-5 at first), norms and biases take part."""
    import jax

    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.02) * rng.standard_normal(x.shape, np.float32), tree)


class JaxStep:
    """The jitted step of a run: `step()` trains once on the same batch and returns the loss."""

    def __init__(self, config: Any, images_BxSxSx3: np.ndarray):
        import jax

        from eupe_jax.distill.step import Loss, make_step
        from eupe_jax.sharding.mesh import make_mesh
        from eupe_jax.training import assemble, kernels, pipeline
        from eupe_jax.training.flat_rows import with_flat_rows

        mesh = make_mesh(devices=jax.devices()[:1])
        self.teachers = assemble.describe_teachers(config, mesh)
        self.students = assemble.make_students(config, self.teachers, mesh)
        (self.name,) = self.students
        state = jax.jit(lambda: assemble.fresh_state(config, self.students))()
        student = state["students"][self.name]
        student["params"] = jax.tree.map(jax.numpy.asarray, random_like(student["params"], 1))
        module, side = self.teachers[NAME].module, config.student_resolutions[0]
        variables = jax.jit(module.init)(jax.random.key(1), np.zeros((1, side, side, 3), np.float32))
        variables["params"] = jax.tree.map(jax.numpy.asarray, random_like(variables["params"], 2))
        rng = np.random.default_rng(3)
        widths = self.teachers[NAME].out_dims
        draw = {"mean": lambda n: rng.normal(0, 0.3, n), "std": lambda n: rng.uniform(0.5, 2, n)}
        moments = {
            what: {k: np.float32(of(n)) for k, n in widths.items()} for what, of in draw.items()
        }  # as measured ones would be
        # weights as NumPy arrays, before the first step takes their memory
        self.student = jax.tree.map(np.array, {"params": student["params"], "buffers": student["buffers"]})
        self.teacher, self.moments = jax.tree.map(np.array, variables), moments

        (chosen,) = pipeline.every_pair(config)
        step = with_flat_rows(make_step(self.students, self.teachers, chosen, Loss(), seed=0), mesh)
        options = kernels.compiler_options(config.compute, mesh)
        batch, arguments = {"image": jax.numpy.asarray(images_BxSxSx3)}, ({NAME: variables}, {NAME: moments})
        self._arguments = (batch, *arguments)
        self._state = state
        self._step = jax.jit(step, donate_argnums=0, compiler_options=options).lower(state, *self._arguments).compile()

    def compiled_text(self) -> str:
        """The compiled program, as XLA writes it."""
        return self._step.as_text()

    def __call__(self) -> float:
        import jax

        self._state, metrics = self._step(self._state, *self._arguments)
        jax.block_until_ready(self._state)
        return float(metrics[f"{self.name}/loss"])


def torch_encoder(model: str, config_entry: Any, variables: Mapping, side: int) -> Any:
    """The readable PyTorch module with these weights."""
    from convert.weights import to_module
    from eupe_jax.models import zoo
    from eupe_jax.training.encoders import LoadedEncoder

    spec, overrides = zoo.spec(model, **config_entry.overrides), config_entry.overrides.to_dict()
    manifest = {"resolution": side, "mean": list(spec.mean), "std": list(spec.std)}
    return to_module(LoadedEncoder(model, overrides, zoo.build(model, **overrides), variables, manifest))


def torch_adapter(params: Mapping, eps: float) -> Any:
    """Linear, LayerNorm, exact GELU, linear, with the weights of a `distill.adapters.Adapter`."""
    import torch
    from torch import nn

    (width, hidden), out = params["fc1"]["kernel"].shape, params["fc2"]["kernel"].shape[1]
    adapter = nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.LayerNorm(hidden, eps), nn.GELU(), nn.Linear(hidden, out, bias=False)
    )
    weights = {
        "0.weight": params["fc1"]["kernel"].T,
        "1.weight": params["norm"]["scale"],
        "1.bias": params["norm"]["bias"],
        "3.weight": params["fc2"]["kernel"].T,
    }
    adapter.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()})
    return adapter


class TorchStep:
    """The same step in PyTorch, from the weights of a `JaxStep` that has not stepped yet."""

    def __init__(self, config: Any, jax_step: JaxStep, images_BxSxSx3: np.ndarray, *, compile: bool):
        import torch
        import torch.nn.functional as F
        from torch import nn

        from eupe_jax.distill.normalization import STD_FLOOR
        from eupe_jax.training.optimizer import make_schedule

        name, settings, side = jax_step.name, config.optimizer, config.student_resolutions[0]
        student = torch_encoder(name, config.students[name], self._backbone(jax_step.student), side).train()
        teacher = torch_encoder("eupe_proxy", config.teachers[NAME], jax_step.teacher, side).requires_grad_(False)
        adapters = nn.ModuleDict({
            kind: torch_adapter(jax_step.student["params"]["adapters"][f"{NAME}_{kind}"], config.adapter.eps)
            for kind in ("cls", "patches")
        })  # fmt: skip
        pixels = {
            id(model): [torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std)]
            for model, spec in ((student, jax_step.students[name]), (teacher, jax_step.teachers[NAME].spec))
        }
        moments = {
            kind: [torch.from_numpy(jax_step.moments[what][kind]) for what in ("mean", "std")] for kind in adapters
        }

        def view(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
            mean, std = pixels[id(model)]
            return (images - mean) / std

        def loss_of(images_uint8: torch.Tensor) -> torch.Tensor:
            images = images_uint8.permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                targets = teacher(view(teacher, images))
                targets = {k: (targets[k] - mean) / std.clamp(min=STD_FLOOR) for k, (mean, std) in moments.items()}
            tokens = student(view(student, images))
            cls, patches = (adapters[kind](tokens[kind]) for kind in ("cls", "patches"))
            of_class = 1 - F.cosine_similarity(cls, targets["cls"], dim=-1).mean()
            of_patches = 1 - F.cosine_similarity(patches, targets["patches"], dim=-1).mean()
            smooth_l1 = F.smooth_l1_loss(patches, targets["patches"], beta=config.loss.smooth_l1_beta)
            return of_class + config.loss.patch_cosine * of_patches + config.loss.patch_smooth_l1 * smooth_l1

        self._parameters = [*student.parameters(), *adapters.parameters()]
        modules = [*student.modules(), *adapters.modules()]
        decayed = {id(module.weight) for module in modules if isinstance(module, (nn.Linear, nn.Conv2d))}
        groups = [
            {"params": [p for p in self._parameters if (id(p) in decayed) is chosen], "weight_decay": decay}
            for chosen, decay in ((True, settings.weight_decay), (False, 0.0))
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=1.0, betas=(settings.b1, settings.b2), eps=settings.eps, fused=True,
        )  # fmt: skip
        self._schedule = make_schedule(settings, config.batch_size, config.total_steps)
        self.images, self.clip_norm, self._done = images_BxSxSx3, settings.clip_norm, 0
        self._pixels = torch.from_numpy(images_BxSxSx3)
        self._loss_of = torch.compile(loss_of) if compile else loss_of

    @staticmethod
    def _backbone(student: Mapping) -> dict:
        return {"params": student["params"]["backbone"], "buffers": student["buffers"]}

    def __call__(self) -> float:
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = float(self._schedule(self._done))
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss_of(self._pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self.clip_norm)
        self._optimizer.step()
        self._done += 1
        return loss.item()


Steps = Mapping[str, Callable[[], float]]


def contenders(config: Any, seed: int = 0, *, compile: bool = True) -> dict[str, Callable[[], float]]:
    """{"jax", "torch_eager", "torch_compile"}: a step of each, from the same weights on the same images."""
    side = config.student_resolutions[0]
    images = np.random.default_rng(seed).integers(0, 256, (config.batch_size, side, side, 3), np.uint8)
    jax_step = JaxStep(config, images)
    steps = {"jax": jax_step, "torch_eager": TorchStep(config, jax_step, images, compile=False)}
    if compile:
        steps["torch_compile"] = TorchStep(config, jax_step, images, compile=True)
    return steps


def check(steps: Steps) -> dict[str, list[float]]:
    """The losses of the first steps, which must be the same for all contenders.

    Raises:
      ValueError: they are not; it names whose.
    """
    losses = {name: [step() for _ in range(CHECK_STEPS)] for name, step in steps.items()}
    for name, found in losses.items():
        if not np.allclose(found, losses["jax"], rtol=TOLERANCE, atol=0):
            raise ValueError(f"losses of {name} {found} and of jax {losses['jax']} differ by more than {TOLERANCE}")
    return losses


def measure(steps: Steps, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{contender: {"wall", "cpu"}}: seconds of its step in every round."""
    names, times = list(steps), {name: {"wall": [], "cpu": []} for name in steps}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            times[name]["wall"].append(time.perf_counter() - wall)
            times[name]["cpu"].append(time.process_time() - cpu)
    return times


def summarise(times: Mapping[str, Mapping[str, list[float]]], batch: int) -> dict:
    """Images per second of every contender, and how many times as fast eupe_jax is as the faster of the others."""
    medians = {kind: {name: statistics.median(t[kind]) for name, t in times.items()} for kind in ("wall", "cpu")}
    figures = {f"{name}_images_per_s": round(batch / seconds, 3) for name, seconds in medians["wall"].items()}
    figures |= {f"{name}_cpu_s_per_image": round(seconds / batch, 4) for name, seconds in medians["cpu"].items()}
    for kind, key in (("wall", "ratio"), ("cpu", "ratio_cpu_time")):
        fastest = min(seconds for name, seconds in medians[kind].items() if name != "jax")
        figures[key] = round(fastest / medians[kind]["jax"], 3)
    return figures


def run(config: Any, rounds: int, *, compile: bool = True) -> dict:
    """Figures of one student."""
    steps = contenders(config, compile=compile)
    losses = check(steps)
    times = measure(steps, rounds)
    return {**summarise(times, config.batch_size), "losses": losses, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=STUDENTS, metavar="NAME", help="ViT students of the zoo")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--side", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender")
    parser.add_argument("--cores", type=int, default=2, help="processor cores, and threads, for all contenders")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="of freed memory, for all alike")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # as PyTorch here; read when JAX is imported, which what follows does
    from eupe_jax.models import zoo
    from eupe_jax.training.host_memory import keep_freed_memory

    if wrong := [f for f in ("batch", "side", "rounds", "cores") if getattr(args, f) < 1]:
        raise SystemExit(f"error: --{wrong[0]} must be positive, got {getattr(args, wrong[0])}")
    for student in args.students:
        try:
            family = zoo.spec(student).family
        except ValueError as error:
            raise SystemExit(f"error: --students: {error}") from None
        if family != "vit":
            raise SystemExit(f"error: --students: {student} is of the family {family!r}, this compares 'vit' students")
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)  # before the runtimes start their threads
    kept = args.malloc == "keep" and keep_freed_memory()

    import jax
    import torch

    torch.set_num_threads(len(cores))
    found = {}
    for student in args.students:
        try:
            found[student] = run(recipe(student, args.batch, args.side, 3072), args.rounds)
        except ValueError as error:
            raise SystemExit(f"error: {student}: {error}") from None
        print(student, {k: v for k, v in found[student].items() if k not in ("losses", "seconds")}, flush=True)
    worst = min(found, key=lambda name: found[name]["ratio"])
    figures = {key: value for key, value in found[worst].items() if key not in ("losses", "seconds")}
    facts = {
        "batch": args.batch,
        "side": args.side,
        "platform": jax.default_backend(),
        "cores": len(cores),
        "malloc": "keep" if kept else "default",
        "machine": platform.processor() or platform.machine(),
        "load_at_end": os.getloadavg()[0],
        "jax": jax.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps({"student": worst, **figures, **facts}))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        partial = args.json.with_name(f".{args.json.name}.partial")
        partial.write_text(json.dumps({"student": worst, **figures, **facts, "students": found}, indent=2) + "\n")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
