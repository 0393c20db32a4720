"""Small checkpoints, and ways to damage them."""

import random
from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict

from eupe_jax.training.checkpoints import Checkpoints

STATISTICS = {"teacher": {"mean": {"cls": jnp.ones(3)}}}
MANIFEST = {"students": {}}


def make_state(step):
    """A state that no other step has."""
    student = {
        "params": {"backbone": {"kernel": jnp.full((64, 64), step / 7)}, "adapters": {"kernel": jnp.full(8, step / 3)}},
        "buffers": {},
        "optimizer": {"mu": jnp.full((64, 64), step / 11)},
    }
    return {"step": jnp.int32(step), "students": {"s": student}}


def make_checkpoints(workdir, **settings):
    return Checkpoints(workdir, ConfigDict({"save_every": 1, "keep": 5, "keep_every": 0} | settings))


def make_run(workdir, steps=(1, 2)):
    """A workdir with checkpoints of these steps."""
    saver = make_checkpoints(workdir)
    for step in steps:
        saver.save(step, make_state(step), STATISTICS, {}, MANIFEST)
    saver.close()
    return workdir


def restored(workdir, **settings):
    """What a run in this workdir would go on from."""
    saver = make_checkpoints(workdir)
    try:
        return saver.restore_latest(make_state(0), **settings)
    finally:
        saver.close()


def flip(path: Path, moments: random.Random) -> None:
    """Turns one bit."""
    data = bytearray(path.read_bytes())
    data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
    path.write_bytes(data)


def cut(path: Path, moments: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: moments.randrange(path.stat().st_size)])


def remove(path: Path, moments: random.Random) -> None:
    path.unlink()


def empty(path: Path, moments: random.Random) -> None:
    path.write_bytes(b"")


def zero(path: Path, moments: random.Random) -> None:
    """A run of zeros somewhere, as lost blocks read; where zeros stood already, ones."""
    data = bytearray(path.read_bytes())
    begin = moments.randrange(len(data))
    block = data[begin : begin + 512]
    data[begin : begin + 512] = bytes(len(block)) if any(block) else b"\xff" * len(block)
    path.write_bytes(data)


def grow(path: Path, moments: random.Random) -> None:
    path.write_bytes(path.read_bytes() + moments.randbytes(moments.randrange(1, 64)))
