"""Training a head on the patch tokens of a frozen encoder: resumable, evaluated at intervals, the best one kept."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from eupe_jax.evals import linear_head
from eupe_jax.evals.dense_transforms import centre_pad
from eupe_jax.evals.features import load_arrays, save_arrays
from eupe_jax.evals.interface import Encoder
from eupe_jax.evals.linear_head import AdamW, Head, Loss
from eupe_jax.sharding.mesh import batch_sharding, make_mesh, replicated

TrainMode = Literal["never", "until_first_eval", "always"]
TRAIN_MODES = ("never", "until_first_eval", "always")


class Schedule(Protocol):
    """Learning rate and Adam's beta1 in force at a 0-based iteration."""

    def learning_rate(self, iteration: int) -> float:
        """Rate of the update at `iteration`, counted from 0."""
        ...

    def beta1(self, iteration: int) -> float:
        """Momentum of the update at `iteration`."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long, how often, and how the backbone runs meanwhile.

    eval_interval: evaluations come after every so many iterations, and once at the end.
    save_every: iterations between saves besides those at evaluations.
    backbone_train_mode: while the encoder gets a key, which rescales the RoPE coordinates of ViTs.
    """

    iterations: int
    eval_interval: int
    save_every: int
    seed: int
    backbone_train_mode: TrainMode

    def backbone_trains(self, iteration: int) -> bool:
        """Whether the backbone is in training mode at this iteration, counted from 0."""
        if self.backbone_train_mode == "until_first_eval":
            return iteration < self.eval_interval
        return self.backbone_train_mode == "always"


@dataclass
class Progress:
    """All that a stopped training needs to go on.

    best: the head of the best evaluation; best_record: its entry of `history`, with what else it measured.
    history: {"iteration", metrics...} of every evaluation. losses: float32, one an iteration done.
    """

    iteration: int
    head: Head
    optimizer: Any
    best: Head
    best_record: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def encode(
    encoder: Encoder, images: np.ndarray, colour: tuple[float, ...], key: jax.Array | None = None
) -> tuple[jax.Array, tuple[int, int], tuple[int, int]]:
    """Patch tokens of float images padded around the centre to the encoder's patch multiple.

    Returns:
      (tokens [B, h, w, D], (height, width) of the padded image, (top, left) of the padding).
    """
    padded, offset = centre_pad(images, encoder.patch_size, colour)
    return jnp.asarray(encoder(padded, key=key)["patches"], jnp.float32), padded.shape[1:3], offset


def encode_in_batches(
    encoder: Encoder, images: list[np.ndarray], batch_size: int, colour: tuple[float, ...]
) -> list[np.ndarray]:
    """Patch tokens [h, w, D] of each float image, of any sizes; batches are padded, so that a size compiles once."""
    out: list[Any] = [None] * len(images)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(i)
    for members in by_size.values():
        for start in range(0, len(members), batch_size):
            chunk = members[start : start + batch_size]
            batch = np.stack([images[i] for i in chunk + chunk[-1:] * (batch_size - len(chunk))])
            tokens = np.asarray(encode(encoder, batch, colour)[0])
            for row, i in enumerate(chunk):
                out[i] = tokens[row]
    return out


def train(
    encoder: Encoder, loss: Loss, optimizer: AdamW, schedule: Schedule, plan: Plan, *,
    outputs: int,
    batches: Callable[[int, int], Iterator[tuple[np.ndarray, np.ndarray]]],
    colour: tuple[float, ...],
    evaluate: Callable[[Head], tuple[dict[str, float], Any]],
    better: Callable[[dict[str, float], dict[str, float]], bool],
    workdir: Path | None,
    fingerprint: str,
    progress: str,
) -> Progress:  # fmt: skip
    """Trains the head from where `workdir` says, or from the start.

    Args:
      outputs: channels of the head.
      batches: (first, last) iteration -> float images and targets of each.
      colour: of padding to the encoder's patch multiple.
      evaluate: metrics of a head, and anything else JSON holds that is wanted of the best one.
      better: whether the first metrics beat the second.
      fingerprint: of encoder, data and settings; what is saved serves the same fingerprint only.
      progress: label of the progress bar.

    Raises:
      ValueError: the loss is not finite, or the encoder does not take the images.
    """
    path = Path(workdir) / f"head_{fingerprint[:16]}.safetensors" if workdir is not None else None
    state = _start(encoder.patch_dim, outputs, optimizer, plan.seed)
    if path is not None and (saved := load_arrays(path, fingerprint)) is not None:
        state = _unpack(saved, state)
    mesh = make_mesh(devices=jax.local_devices())
    state.head, state.optimizer = jax.device_put((state.head, state.optimizer), replicated(mesh))
    step = linear_head.make_step(loss, optimizer)
    rope_key, drop_key = jax.random.split(jax.random.key(plan.seed + 1))
    saved_at, pending = state.iteration, None
    bar = tqdm(total=plan.iterations, initial=state.iteration, desc=progress, unit="it")
    with bar:
        for images, targets in batches(state.iteration, plan.iterations):
            i = state.iteration
            key = jax.random.fold_in(rope_key, i) if plan.backbone_trains(i) else None
            features, _, _ = encode(encoder, images, colour, key)
            spread = (replicated if len(images) % mesh.size else batch_sharding)(mesh)
            features, targets = jax.device_put((features, targets), spread)
            state.head, state.optimizer, value = step(
                state.head, state.optimizer, features, targets, jax.random.fold_in(drop_key, i), jnp.int32(i),
                jnp.float32(schedule.learning_rate(i)), jnp.float32(schedule.beta1(i)),
            )  # fmt: skip
            state.iteration += 1
            bar.update()
            if pending is not None:  # read one late, so that host and device work side by side
                state.losses.append(_finite(pending, i - 1))
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
            pending = value
            last = state.iteration == plan.iterations
            evaluates = last or state.iteration % plan.eval_interval == 0
            if evaluates or state.iteration - saved_at >= plan.save_every:
                state.losses.append(_finite(pending, i))
                pending = None
                if evaluates:
                    _evaluate(state, evaluate, better)
                if path is not None:
                    save_arrays(path, _pack(state), fingerprint)
                    saved_at = state.iteration
    return state


def loss_table(state: Progress, schedule: Schedule, rows: int = 200) -> list[dict[str, float]]:
    """The loss curve in at most `rows` stretches: last iteration of each, its mean loss, the rate in force there."""
    table = []
    for part in np.array_split(np.arange(len(state.losses)), min(rows, len(state.losses))):
        mean = float(np.mean([state.losses[i] for i in part]))
        rate = schedule.learning_rate(int(part[-1]))
        table.append({"iteration": int(part[-1]) + 1, "loss": mean, "learning_rate": rate})
    return table


def _start(width: int, outputs: int, optimizer: AdamW, seed: int) -> Progress:
    head = linear_head.init(jax.random.key(seed), width, outputs)
    return Progress(0, head, optimizer.init(head["params"]), head)


def _evaluate(state: Progress, evaluate: Callable, better: Callable) -> None:
    metrics, details = evaluate(jax.device_get(state.head))
    if not state.best_record or better(metrics, state.best_record["metrics"]):
        state.best = state.head
        state.best_record = {"iteration": state.iteration, "metrics": metrics, "details": details}
    state.history.append({"iteration": state.iteration, **metrics})


def _finite(loss: jax.Array, iteration: int) -> float:
    value = float(loss)
    if not np.isfinite(value):
        raise ValueError(
            f"the loss of iteration {iteration} is {value}: check that the encoder's features are finite, "
            "or lower learning_rate"
        )
    return value


def _pack(state: Progress) -> dict[str, np.ndarray]:
    trees = {"head": state.head, "optimizer": state.optimizer, "best": state.best}
    arrays = {}
    for name, tree in trees.items():
        arrays |= {f"{name}.{i:02d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    rest = {"iteration": state.iteration, "best_record": state.best_record, "history": state.history}
    arrays["losses"] = np.asarray(state.losses, np.float32)
    arrays["rest"] = np.frombuffer(json.dumps(rest).encode(), np.uint8)
    return arrays


def _unpack(arrays: dict[str, np.ndarray], like: Progress) -> Progress:
    def tree(name: str, example: Any) -> Any:
        leaves = [arrays[key] for key in sorted(arrays) if key.startswith(f"{name}.")]
        return jax.tree.map(jnp.asarray, jax.tree.unflatten(jax.tree.structure(example), leaves))

    rest = json.loads(arrays["rest"].tobytes())
    return Progress(
        head=tree("head", like.head), optimizer=tree("optimizer", like.optimizer), best=tree("best", like.best),
        losses=arrays["losses"].tolist(), **rest,
    )  # fmt: skip
