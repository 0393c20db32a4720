"""Which record stands at which place: a computed permutation, so that order needs no memory and no state.

The nth draw from a source of N records is record permutation(n mod N) of epoch n // N. Every epoch is its own
permutation (without replacement), computed from (seed, epoch) in O(1) memory whatever N is.
"""

import numpy as np

_ROUNDS = 8


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection on uint64 [...] whose every output bit depends on every input bit."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(*words: int | np.ndarray) -> np.ndarray:
    """One uint64 from several integers (broadcast against each other); order matters."""
    h = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in words:
            h = mix((h ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return np.asarray(h)


def uniform(*words: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from several integers."""
    return (hash_words(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: np.ndarray, length: int, key: int | np.ndarray) -> np.ndarray:
    """Image of `index` (int64, each in [0, length)) under the permutation of range(length) named by `key`.

    `key` may differ from element to element. A Feistel network over a x b >= length whose halves are added modulo a
    and b, so that at most a values lie outside and walking the cycle back inside is rare. Any shape [...], kept.

    Raises:
      ValueError: no records, or an index that is not among them.
    """
    index = np.asarray(index, np.int64)
    if length < 1:
        raise ValueError(f"cannot permute {length} records")
    if index.size and (index.min() < 0 or index.max() >= length):
        raise ValueError(f"index outside [0, {length})")
    a = int(np.ceil(np.sqrt(length)))
    b = -(-length // a)
    x = index.astype(np.uint64).reshape(-1)
    keys = np.broadcast_to(np.asarray(key).astype(np.uint64), index.shape).reshape(-1)
    todo = np.arange(x.size)
    while todo.size:
        x[todo] = _feistel(x[todo], np.uint64(a), np.uint64(b), keys[todo])
        todo = todo[x[todo] >= length]
    return x.astype(np.int64).reshape(index.shape)


def _feistel(x: np.ndarray, a: np.uint64, b: np.uint64, key: np.ndarray) -> np.ndarray:
    left, right = x % a, x // a
    for r in range(_ROUNDS):
        if r % 2 == 0:
            left = (left + hash_words(key, r, right) % a) % a
        else:
            right = (right + hash_words(key, r, left) % b) % b
    return left + a * right


def record_index(seed: int, draw: np.ndarray, length: int) -> np.ndarray:
    """Record (int64 in [0, length)) of each of `draw` (int64 [...]: how many came before it from this source)."""
    draw = np.asarray(draw, np.int64)
    return permute(draw % length, length, hash_words(seed, 0x6F72646572, draw // length))
