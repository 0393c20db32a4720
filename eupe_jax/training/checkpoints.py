"""Checkpoints: what is in them, how they are written and restored (encoders.py loads models from them).

One Orbax step directory holds, apart so that each can be loaded alone:
  STUDENT.backbone, STUDENT.adapters, STUDENT.optimizer   for every student
  statistics    {teacher: {"mean", "std"}} that its targets were normalised with
  chain         {teacher: {"adapters", "statistics"}} of every teacher that was itself distilled: the way back to the
                experts (zero-shot needs it). Never a teacher's backbone.
  manifest      JSON a person can read: models, resolution, pixel statistics, config, versions
  checksums.json  of all the files (see integrity.py), compared before anything is restored
What convert/teachers_to_orbax.py writes from other hands' weights is such a directory with one student, "encoder",
without adapters and optimizer, and perhaps with
  text          the text tower that belongs to the encoder, {"params": {"text", "logit_scale"}}
  extras        {name: array}, tensors of the file that are no part of the encoder
"""

import contextlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental.multihost_utils import sync_global_devices
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from eupe_jax.training import integrity
from eupe_jax.training.best import Best

LOGGER = logging.getLogger(__name__)

FORMAT = "eupe_jax/1"
MANIFEST = "manifest"
TEXT = "text"
EXTRAS = "extras"
# A save has failed after so long, by the clock of the day (Orbax's). Several hosts wait that long for one that failed.
SAVE_SECONDS, SAVE_SECONDS_TOGETHER = 1200, 300
TOKEN_LAYOUT = "class, storage, patches in rows from the top left"


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a checkpoint means."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}


class Checkpoints:
    """The checkpoints of one run: asynchronous, atomic, checksummed saves under `workdir/checkpoints`."""

    def __init__(self, workdir: epath.PathLike, config: ConfigDict) -> None:
        """`config`: save_every (steps), keep (newest kept), keep_every (steps kept for good, 0 for none), and perhaps
        keep_best, best_metric and best_mode (best.py).

        Raises:
          OSError: the folder cannot be made. ValueError: what is known of the best checkpoints is damaged.
        """
        self.directory = absolute(workdir) / "checkpoints"
        self.damaged = absolute(workdir) / "damaged"
        self._save_every = config.save_every
        self._saving, self._pending = -1, False
        self._kept = [checkpoint_managers.LatestN(config.keep)]
        if config.keep_every:
            self._kept.append(checkpoint_managers.EveryNSteps(config.keep_every))
        self._best = Best(absolute(workdir) / "best.json", config) if config.get("keep_best") else None
        if self._best:
            self._kept.append(self._best)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        self.directory.mkdir(parents=True, exist_ok=True)  # on every host: what a network disk has cached may be old
        together = jax.process_count() > 1
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(self._kept),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # of saves that a kill or a full disk cut short
                lightweight_initialize=True,  # steps are told by their names: no clock is asked, nor believed
                single_host_load_and_broadcast=together,  # hosts may list a folder differently for a while
                async_options=ocp.AsyncOptions(
                    timeout_secs=SAVE_SECONDS_TOGETHER if together else SAVE_SECONDS,
                    post_finalization_callback=self._seal,
                ),
            ),
        )

    def _seal(self) -> None:
        """Called by the first host, in the background, when all is written and nothing is committed yet."""
        self._manager._non_blocking_metadata_store.wait_until_finished()  # writes one of the files in the background
        names = (str(self._saving), f"{self._saving}.orbax-checkpoint-tmp")  # in a bucket; else renamed when committed
        for step in self.directory.iterdir():
            if step.name == names[0] or step.name.startswith(names[1]):
                integrity.seal(step)

    @property
    def latest_step(self) -> int | None:
        """The newest step that is kept whole; None before the first save."""
        return self._manager.latest_step()

    @property
    def saving(self) -> bool:
        """Whether a save is being written in the background."""
        # Not `is_saving_in_progress`: where another host's save fails, it says so for ever.
        return self._pending and self._manager._finalize_thread.map(lambda thread: thread and thread.is_alive())

    def save(
        self, step: int, state: Mapping, statistics: Mapping, chain: Mapping, manifest: Mapping, *, force: bool = False
    ) -> None:
        """Starts a save every `save_every` steps, or now (`force`); returns once the state is off the devices.

        `step` is given, not read from the state: reading would wait for the devices at every step.

        Raises:
          OSError: this save, or an earlier one in the background, failed; names the checkpoint, the cause and the last
            good one, which stays.
        """
        self.check()
        if self._manager.latest_step() == step or not (force or step % self._save_every == 0):
            return
        items: dict[str, Any] = {}
        for name, student in state["students"].items():
            params = student["params"]
            items[f"{name}.backbone"] = {"params": params["backbone"], "buffers": student["buffers"]}
            items[f"{name}.adapters"] = params["adapters"]
            items[f"{name}.optimizer"] = student["optimizer"]
        items["statistics"] = dict(statistics)
        if chain:
            items["chain"] = dict(chain)
        self.wait()  # as Orbax does itself, but before `_saving` changes, and before there are copies
        args = {key: ocp.args.StandardSave(value) for key, value in _apart(items).items()}
        args[MANIFEST] = ocp.args.JsonSave({**manifest, "format": FORMAT, "step": step})
        self._saving, self._pending = step, True
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def check(self) -> None:
        """To be called after every step: raises what went wrong in a save in the background, as `save` does."""
        if self._pending and not self.saving:
            self.wait()  # it is over: did it fail?

    def note(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes what evaluations gave for the checkpoint of `step`, {"EVALUATION/SCALAR": value}: the best are kept.

        Raises:
          ValueError: `best_metric` is no scalar that its evaluation gives. OSError: it cannot be written down.
        """
        if self._best and self._best.note(step, scalars):
            LOGGER.info("the checkpoint of step %d is the best so far", step)

    def restore(self, state: Mapping, step: int) -> dict:
        """The state at `step`, placed as `state` (arrays or ShapeDtypeStructs with shardings) says.

        Works on another mesh and another number of hosts than the checkpoint was written on.

        Raises:
          CorruptCheckpoint: its files are not those that were written. OSError: they cannot be read.
          ValueError: the checkpoint holds other students or shapes than this run.
        """
        integrity.verify_on_all_hosts(self.directory / str(step))
        args = {MANIFEST: ocp.args.JsonRestore()}
        for name, student in state["students"].items():
            params = student["params"]
            backbone = {"params": params["backbone"], "buffers": student["buffers"]}
            args[f"{name}.backbone"] = ocp.args.StandardRestore(abstract(backbone))
            args[f"{name}.adapters"] = ocp.args.StandardRestore(abstract(params["adapters"]))
            args[f"{name}.optimizer"] = ocp.args.StandardRestore(abstract(student["optimizer"]))
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(**args))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(f"checkpoint {self.directory / str(step)} does not fit this config: {error}") from error
        if (written := items[MANIFEST].get("step")) != step:
            raise integrity.CorruptCheckpoint(f"{self.directory / str(step)} holds the checkpoint of step {written}")
        students = {
            name: {
                "params": {"backbone": items[f"{name}.backbone"]["params"], "adapters": items[f"{name}.adapters"]},
                "buffers": items[f"{name}.backbone"]["buffers"],
                "optimizer": items[f"{name}.optimizer"],
            }
            for name in state["students"]
        }
        counter = jax.device_put(np.int32(step), getattr(state["step"], "sharding", None))
        return {"step": counter, "students": students}

    def restore_latest(self, state: Mapping, *, fallback: bool = False) -> dict | None:
        """The state of the newest checkpoint, as `restore` gives it; None where there is none yet.

        Args:
          fallback: where the newest is damaged, put it aside (into `workdir/damaged`) and take the newest intact one.

        Raises:
          CorruptCheckpoint: the newest is damaged and `fallback` is not set, or none is intact.
          ValueError: `fallback` in a bucket. OSError: files cannot be read, which is no reason to fall back.
        """
        if fallback and "://" in str(self.directory):
            raise ValueError(
                f"--on_corrupt=fallback moves folders, which buckets cannot do at once ({self.directory}): leave it "
                "out, and move checkpoints that are named as damaged to another place yourself"
            )
        damaged: dict[int, integrity.CorruptCheckpoint] = {}
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                state = self.restore(state, step)
                break
            except integrity.CorruptCheckpoint as error:
                damaged[step] = error
                if not fallback and step != steps[-1]:
                    raise integrity.CorruptCheckpoint(
                        f"{error}; bring its files back, or go on from an older one with --on_corrupt=fallback"
                    ) from None
        else:
            if damaged:
                raise integrity.CorruptCheckpoint(f"{damaged[steps[0]]}; none is intact: bring its files back")
            return None
        for step, error in damaged.items():
            LOGGER.warning("%s; it is put aside into %s", error, self.damaged)
            self._put_aside(step)
        return state

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            self.damaged.mkdir(parents=True, exist_ok=True)
            taken = [re.fullmatch(rf"{step}(?:\.(\d+))?", p.name) for p in self.damaged.iterdir()]
            last = max((int(match[1] or 0) for match in taken if match), default=None)
            (self.directory / str(step)).rename(self.damaged / (str(step) if last is None else f"{step}.{last + 1}"))
        sync_global_devices(f"checkpoint {step} put aside")
        self.close()
        self._manager = self._open()

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          OSError: it failed, as `save` says.
        """
        with self._explained():
            self._manager.wait_until_finished()
        self._pending = False

    def _others(self) -> list[int]:
        """Steps of finished checkpoints, but for the one being saved."""
        with contextlib.suppress(OSError):
            return [int(p.name) for p in self.directory.iterdir() if p.name.isdigit() and int(p.name) != self._saving]
        return []

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of storage, which come from many layers, as one that says what was lost, and what was not."""
        try:
            yield
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            self._pending = False
            first = _first(error)
            if isinstance(error, jax.errors.JaxRuntimeError) and isinstance(first, jax.errors.JaxRuntimeError):
                raise  # nothing is wrong with storage here
            held = "those before it are as they were" if self._others() else "there is none before it"
            raise OSError(
                f"checkpoint {self.directory / str(self._saving)} cannot be written: {_words(first)}; {held}: "
                "mend that, then run the same command again"
            ) from first  # and not from what followed: other hosts that wait in vain

    def close(self) -> None:
        """Waits for what is under way."""
        self._manager.close()
        with contextlib.suppress(OSError):  # which the next save meets as well
            self._manager._maybe_await_cleanup_tmp_directory()  # two at a time would be in each other's way


def _apart(items: dict[str, Any]) -> dict[str, Any]:
    """What is saved while the next step runs. Accelerators' arrays are copied to the host first, by Orbax; those of
    processors would be held until they are written, and the next step, which is to write over them, would wait."""
    return jax.block_until_ready(_copies(items)) if jax.default_backend() == "cpu" else items


@jax.jit
def _copies(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _first(error: BaseException) -> BaseException:
    """What went wrong first."""
    while earlier := error.__cause__ or error.__context__:
        error = earlier
    return error


def _words(error: BaseException) -> str:
    """An error in its own words, without where in which library."""
    return re.sub(r"\s*\[(source locations|tensorstore_spec)=.*", "", str(error), flags=re.DOTALL)


def abstract(tree: Any) -> Any:
    """ShapeDtypeStructs, with shardings where the leaves have them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def absolute(path: epath.PathLike) -> epath.Path:
    """Orbax takes no relative paths."""
    return epath.Path(path) if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def step_directory(path: epath.PathLike) -> epath.Path:
    """The step directory that a workdir, its `checkpoints` folder or a step directory stands for (newest step).

    The newest is the one that a run would go on from, whole or damaged: what reads it compares its checksums.

    Raises:
      FileNotFoundError: no such path, or nothing in it is a finished checkpoint.
    """
    path = absolute(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: no such path")
    if any((path / name).exists() for name in (MANIFEST, integrity.CHECKSUMS, integrity.STEP_METADATA)):
        return path
    root = path / "checkpoints" if (path / "checkpoints").exists() else path
    finished = list(ocp.step.standard_name_format().find_all(root)) if root.is_dir() else []
    if not finished:
        raise FileNotFoundError(
            f"no finished checkpoint in {path}: expected a training workdir, a step directory, or what "
            "convert/teachers_to_orbax.py makes of a weights file"
        )
    return max(finished, key=lambda found: found.step).path


def read_manifest(path: epath.PathLike) -> dict:
    """The manifest of a checkpoint (see `step_directory` for what `path` may be).

    Raises:
      FileNotFoundError: nothing there. ValueError: not ours, or damaged.
    """
    step = step_directory(path)
    integrity.verify(step, [MANIFEST])
    try:
        manifest = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(step / MANIFEST)
    except (ValueError, OSError) as error:
        raise ValueError(f"{step / MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{step} is not a checkpoint of eupe_jax (its manifest is not of format {FORMAT!r})")
    needed = {"model", "overrides", "resolution", "mean", "std"}
    students = manifest.get("students")
    if not isinstance(students, dict) or not all(isinstance(s, dict) and needed <= s.keys() for s in students.values()):
        raise ValueError(f"{step / MANIFEST} is damaged: every one of its students needs {sorted(needed)}")
    return manifest


def restore_item(step: epath.Path, item: str, target: Any | None = None, *, as_it_is: bool = False) -> Any:
    """One item of a step directory: as `target` (abstract, with shardings) says, else as numpy arrays.

    Args:
      as_it_is: in the types it is stored in, whatever those of `target` are: nothing is converted.

    Raises:
      FileNotFoundError: the checkpoint has no such item.
      CorruptCheckpoint: its files are not those that were written.
      ValueError: its shapes or names differ from `target`, or its arrays cannot be read.
    """
    if not (step / item).exists():
        raise FileNotFoundError(f"{step} holds no {item!r}")
    integrity.verify(step, [item])
    try:
        return _restore(step, item, _as_stored(step, item, target) if as_it_is else target)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ValueError(f"{step / item} is damaged: {error}") from error  # Orbax has no kind of its own for it


def _restore(step: epath.Path, item: str, target: Any | None) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        if target is not None:
            try:
                return checkpointer.restore(step / item, abstract(target))
            except (ValueError, KeyError) as error:
                raise ValueError(f"{step / item} does not fit the model its manifest names: {error}") from error
    tree = ocp.PyTreeCheckpointHandler().metadata(step / item).tree
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(step / item, args=ocp.args.PyTreeRestore(restore_args=arguments))


def _as_stored(step: epath.Path, item: str, target: Any) -> Any:
    """`target`, abstract, in the types that the item is stored in: restoring then converts nothing."""
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(step / item).tree
    except (ValueError, OSError):
        return target  # the restore will say what is wrong
    types = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def stored(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = types.get(jax.tree_util.keystr(path)) or leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(stored, target)
