"""Fixtures of the distillation pieces: resizing, losses, adapters, statistics."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from eupe_jax.distill.adapters import Adapter
from eupe_jax.distill.losses import cosine_loss, patch_losses
from eupe_jax.distill.normalization import Accumulator, Provenance, normalize
from eupe_jax.models.resize import resize
from tests.golden_kinds.common import Fixture, to_nchw, to_nhwc


def _target_size(case: str) -> tuple[int, int]:
    height, width = case.split("_to_")[1].split("x")
    return int(height), int(width)


def check_resize_tokens(path: Path) -> None:
    fixture = Fixture(path)
    for case, grid in fixture.inputs.items():
        for method in ("bicubic", "bilinear"):
            fixture.check(f"{case}/{method}", to_nchw(resize(to_nhwc(grid), _target_size(case), method)), 1e-5)
    fixture.assert_all_checked()


def check_resize_images(path: Path) -> None:
    fixture = Fixture(path)
    for case, image in fixture.inputs.items():
        x, size = jnp.asarray(to_nhwc(image[None]), jnp.float32), _target_size(case)
        for method in ("bicubic", "bilinear"):
            smooth = to_nchw(resize(x / 255.0, size, method, antialias=True))
            fixture.check(f"{case}/{method}_antialias", smooth, 2e-5)
            rounded = to_nchw(jnp.round(jnp.clip(resize(x, size, method, antialias=True), 0, 255)))
            fixture.check(f"{case}/{method}_antialias_u8_rounded", rounded, 1.0)
        plain = to_nchw(resize(x / 255.0, size, "bilinear"))[:, :, ::4, ::4]
        fixture.check(f"{case}/bilinear_no_antialias_sub", plain, 2e-5)
    fixture.assert_all_checked()


def check_losses(path: Path) -> None:
    fixture = Fixture(path)
    meta = fixture.meta

    def terms(student_cls, student_patches, teacher_cls, teacher_patches):
        patch = patch_losses(student_patches, teacher_patches, meta["smooth_l1_beta"])
        parts = {
            "cls_cos": cosine_loss(student_cls, teacher_cls),
            "patch_cos": patch["cosine"],
            "patch_smooth_l1": patch["smooth_l1"],
            "patch": meta["alpha"] * patch["cosine"] + meta["beta"] * patch["smooth_l1"],
        }
        parts["total"] = parts["cls_cos"] + parts["patch"]
        return parts["total"], parts

    for case in meta["cases"]:
        name = case["name"]
        tokens = []
        for who in ("student", "teacher"):
            patches = fixture.inputs[f"{name}/{who}_patch"]
            shape = (len(patches), *case[f"{who}_grid"], patches.shape[-1])
            tokens += [fixture.inputs[f"{name}/{who}_cls"], patches.reshape(shape)]
        (grad_cls, grad_patch), parts = jax.grad(terms, argnums=(0, 1), has_aux=True)(*tokens)
        for part, value in parts.items():
            fixture.check(f"{name}/{part}", value, 5e-6)
        fixture.check(f"{name}/grad_student_cls", grad_cls, 1e-6)
        student = fixture.inputs[f"{name}/student_patch"]
        fixture.check(f"{name}/grad_student_patch", grad_patch.reshape(student.shape), 1e-6)
    fixture.assert_all_checked()


def check_adapter(path: Path) -> None:
    fixture = Fixture(path)
    weights = fixture.weights
    params = {
        "fc1": {"kernel": weights["0.weight"].T},
        "norm": {"scale": weights["1.weight"], "bias": weights["1.bias"]},
        "fc2": {"kernel": weights["3.weight"].T},
    }
    adapter = Adapter(fixture.meta["hidden"], fixture.meta["out"], fixture.meta["eps"])
    fixture.check("y", adapter.apply({"params": params}, fixture.inputs["x"]), 1e-5)
    fixture.assert_all_checked()


def check_token_stats(path: Path) -> None:
    fixture = Fixture(path)
    accumulator = Accumulator()
    batches = sum(name.startswith("cls_") for name in fixture.inputs)
    for i in range(batches):
        accumulator.add({"cls": fixture.inputs[f"cls_{i}"], "patches": fixture.inputs[f"patch_{i}"]})
    statistics = accumulator.finish(Provenance("fixture", "", (), (), (), ""))
    counts = np.array([statistics.count["patches"], statistics.count["cls"]])
    fixture.check("count", counts if counts[0] == fixture.outputs["count"][0] else counts[::-1], 0)
    for ours, theirs in (("cls", "cls"), ("patches", "patch")):
        n = statistics.count[ours]
        variance = statistics.std[ours].astype(np.float64) ** 2
        fixture.check(f"{theirs}/mean", statistics.mean[ours], 1e-4)
        fixture.check(f"{theirs}/var_population", variance, 1e-4)
        fixture.check(f"{theirs}/var_sample", variance * n / (n - 1), 1e-4)
        every = [fixture.inputs[f"{theirs}_{i}"] for i in range(batches)]
        rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in every])[:5]
        fixture.check(
            f"{theirs}/normalised_population", normalize(rows, statistics.mean[ours], statistics.std[ours]), 1e-4
        )
    fixture.assert_all_checked()


KINDS = {
    "resize_tokens": check_resize_tokens,
    "resize_images": check_resize_images,
    "losses": check_losses,
    "adapter": check_adapter,
    "token_stats": check_token_stats,
}
