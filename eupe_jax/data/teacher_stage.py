"""Host teachers beside the input pipeline: augment on the CPU, run the teachers, ship pixels and features together.

They must see the very image that the student sees, so augmentation happens here, once, and not again on device. The
stage runs in a thread of its own, some batches ahead of the training step.
"""

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait

import numpy as np

from eupe_jax.data import threads
from eupe_jax.distill.host_teachers import HostTeacher, check_features

log = logging.getLogger(__name__)

_PATIENCE = 60  # seconds that closing waits for the batch in hand

# (step, uint8 [b, S, S, 3], their positions in the global batch: int [b], None: from 0 on) -> the same
AugmentFn = Callable[[int, np.ndarray, np.ndarray | None], np.ndarray]
Features = dict[str, dict[str, np.ndarray]]


def run_teachers(teachers: Mapping[str, HostTeacher], images: np.ndarray) -> Features:
    """{name: {"cls": f32 [b, Dc] if it has one, "patches": f32 [b, h, w, Dp]}} of uint8 [b, S, S, 3].

    Teachers run at the same time: with one thread each, two share two cores without waiting for one another.
    Raises ValueError when a teacher fails or its output is not what its spec says.
    """
    pending = {name: threads.start(teacher, images, name=f"teacher {name}") for name, teacher in teachers.items()}
    wait(pending.values())
    features = {name: _result(name, future) for name, future in pending.items()}
    for name, teacher in teachers.items():
        check_features(teacher.spec, features[name], len(images))
    return features


def _result(name: str, future: Future) -> dict[str, np.ndarray]:
    try:
        return future.result()
    except (Exception, SystemExit) as error:  # teachers are anybody's code: what they raise is of any kind
        raise ValueError(f"host teacher {name!r} failed: {type(error).__name__}: {error}") from error


def with_host_teachers(
    batches: Iterable[dict],
    teachers: Mapping[str, HostTeacher],
    augment_fn: AugmentFn | None = None,
    *,
    start_step: int = 0,
    positions: np.ndarray | None = None,
    ahead: int = 2,
) -> "Background":
    """Adds to batch["features"] and replaces batch["image"] by the augmented pixels, `ahead` batches in advance.

    batches: `loader.batches(start_step, positions)`. augment_fn: `host_augment(...)`; None: no augmentation. What goes
    wrong in the thread is raised by the consumer's next(). Close the result (or leave its `with` block) to stop the
    thread and close `batches`.
    """

    def stage(batches: Iterator[dict]) -> Iterator[dict]:
        for step, batch in enumerate(batches, start_step):
            images = augment_fn(step, batch["image"], positions) if augment_fn else batch["image"]
            yield {**batch, "image": images, "features": batch.get("features", {}) | run_teachers(teachers, images)}

    return Background(stage, iter(batches), ahead)


_END = object()


class Background:
    """Iterates `stage(source)` in a thread behind a queue of `ahead` items; an error ends it and reaches next()."""

    def __init__(self, stage: Callable[[Iterator], Iterator], source: Iterator, ahead: int):
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        self._queue: queue.Queue = queue.Queue(ahead)
        self._stop = threading.Event()
        self._done = False
        # The thread holds no reference to self: dropping the last one stops it.
        arguments = (stage, source, self._queue, self._stop)
        self._thread = threading.Thread(target=_produce, args=arguments, name="host-teachers", daemon=True)
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        if self._done:
            raise StopIteration
        item, error = self._queue.get()
        if item is _END:
            self.close()
            if error is not None:
                raise error
            raise StopIteration
        return item

    def close(self):
        """Stops the thread after the batch in hand, and closes the batches behind it. Safe to call twice.

        A thread that is stuck in that batch is left behind after a while: whoever closes has something to tell.
        """
        self._done = True
        self._stop.set()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            log.warning("the thread that makes batches is stuck, and is left behind")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _produce(stage, source, items: queue.Queue, stop: threading.Event):
    def put(item, error=None):
        while not stop.is_set():
            try:
                return items.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    try:
        for item in stage(source):
            put(item)
            if stop.is_set():
                break
        put(_END)
    except BaseException as e:  # whatever it is, the consumer must hear of it instead of waiting
        put(_END, e)
    finally:
        if close := getattr(source, "close", None):
            close()
