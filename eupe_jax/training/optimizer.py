"""AdamW with warm-up, cosine decay, decay mask and clipping.

EUPE §4.1 gives base learning rates, a cosine schedule and weight decay 1e-4, and names neither optimiser, betas,
warm-up nor clipping; AdamW (.9, .999) with clipping at 3 is what DINOv3's distillation uses.
"""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from eupe_jax.distill.spikes import average_norm
from eupe_jax.sharding.rules import path_name

LR_SCALINGS = {
    "none": lambda batch_size: 1.0,
    "sqrt": lambda batch_size: 4.0 * (batch_size / 1024.0) ** 0.5,  # DINOv3's sqrt_wrt_1024 rule
    "linear": lambda batch_size: batch_size / 256.0,
}


def peak_learning_rate(config: ConfigDict, batch_size: int) -> float:
    """The base learning rate under `lr_scaling`: "none" is the paper's figure taken literally; "sqrt" and "linear"
    are the rules of the code base it grew from, and 11 or 32 times larger at batch 8192.

    Raises:
      ValueError: unknown rule.
    """
    if config.lr_scaling not in LR_SCALINGS:
        raise ValueError(f"optimizer.lr_scaling is {config.lr_scaling!r}: use one of {sorted(LR_SCALINGS)}")
    return config.learning_rate * LR_SCALINGS[config.lr_scaling](batch_size)


def make_schedule(config: ConfigDict, batch_size: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then a cosine to `min_learning_rate` at `total_steps`.

    Raises:
      ValueError: a warm-up that is longer than the run.
    """
    if not 0 <= config.warmup_steps <= total_steps:
        raise ValueError(f"optimizer.warmup_steps={config.warmup_steps} is not within total_steps={total_steps}")
    peak = peak_learning_rate(config, batch_size)
    return optax.warmup_cosine_decay_schedule(
        # warm-up starts one step in: a first step at rate zero would be wasted
        init_value=peak / max(config.warmup_steps, 1),
        peak_value=peak,
        warmup_steps=config.warmup_steps,
        decay_steps=max(total_steps, config.warmup_steps + 1),
        end_value=config.min_learning_rate,
    )


def decay_mask(params: Any) -> Any:
    """True for matmul and convolution kernels; biases, norms, LayerScale gains and tokens are not decayed.

    By name, not by rank: stacked blocks give biases a second axis.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith("/kernel"), params)


def make_optimizer(
    config: ConfigDict, batch_size: int, total_steps: int, *, spike_factor: float = 0.0
) -> optax.GradientTransformation:
    """The optimiser of one student. `clip_norm` <= 0 switches clipping off. `spike_factor`: as `distill.step.make_step`
    takes it; its state holds what that needs."""
    average = [average_norm()] if spike_factor > 0 else []
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    return optax.chain(
        *average,
        *clip,
        optax.adamw(
            make_schedule(config, batch_size, total_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
