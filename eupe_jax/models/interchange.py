"""Weights between our variables and the state_dicts of other code, both ways, bit for bit. Pure numpy, no I/O.

Every family declares a table for each layout in which its weights exist (`spec.Layout`: "official" for the authors'
names, "transformers" for Hugging Face's); this module only applies it. Nothing is skipped in silence: all that is
missing, unexpected or misshapen is collected into one error, and tensors that are known to belong to something else
(`extras`) are logged by name.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from eupe_jax.models import zoo
from eupe_jax.models.spec import TRANSFORMS, EncoderSpec, Family, Layout, Tensor, Transform

logger = logging.getLogger(__name__)


class InterchangeError(ValueError):
    """State_dict and encoder do not fit. `problems` lists every mismatch, the message shows them all."""

    def __init__(self, model: str, problems: list[str]):
        self.problems = problems
        super().__init__(f"{len(problems)} mismatches between the weights and {model}:\n  " + "\n  ".join(problems))


def import_leaves(
    model: str, family: Family, module: Any, tensors: Mapping[str, Any], layout: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """An encoder's variables from a state_dict, one leaf at a time.

    Names, shapes, dtypes and everything that the architecture fixes are checked before this function returns; a tensor
    is only read while its leaf is being filled. The peak is one leaf and one tensor, for who lets go of a leaf before
    asking for the next.

    Args:
      model: what messages call the encoder.
      family, module: what kind of encoder, and the very one.
      tensors: name -> array, or anything with `shape`, `dtype` (numpy or ml_dtypes) and `__array__`.
      layout: key of `family.layouts`; None: the one whose names the tensors have.

    Returns:
      An iterator over ("params/blocks/mlp/fc1/kernel", float32 array), in the order of the layout's table.

    Raises:
      InterchangeError: anything missing, unexpected, misshapen, not floating point of at most 32 bits, or not as the
        architecture fixes it.
      ValueError: the family has no such layout.
    """
    found = _layout(family, layout or detect_layout(family, tensors))
    own, left_out = _own_tensors(tensors, found)
    if left_out:
        logger.warning("%s: left out %d tensors that are no part of it: %s", model, len(left_out), list(left_out))
    rows, implied = _rows(family, module, found)
    problems = _misfits(rows, found, module, own)
    if problems:
        raise InterchangeError(model, problems)

    def leaves():
        for row in rows:
            yield row.path, row.read(own)
        yield from implied.items()

    return leaves()


def from_state_dict(
    spec_or_name: EncoderSpec | str, state_dict: Mapping[str, Any], *, layout: str | None = None, **overrides: Any
) -> dict[str, Any]:
    """The variables of an encoder from a state_dict.

    Args:
      spec_or_name: an `EncoderSpec` or a zoo name.
      state_dict, layout: as for `import_leaves`.
      **overrides: constructor arguments that differ from the spec's.

    Returns:
      {"params": ..., "buffers": ...} of float32 numpy arrays ("buffers" where the family has some).

    Raises:
      InterchangeError, ValueError: as `import_leaves`.
    """
    return family_import(*_resolve(spec_or_name, overrides), state_dict, layout)


def family_import(
    model: str, family: Family, module: Any, state_dict: Mapping[str, Any], layout: str | None = None
) -> dict[str, Any]:
    """`from_state_dict` for a module of any `Family`, in the zoo or not; `model` names it in messages."""
    return traverse_util.unflatten_dict(dict(import_leaves(model, family, module, state_dict, layout)), sep="/")


def to_state_dict(
    spec_or_name: EncoderSpec | str, variables: Mapping[str, Any], *, layout: str | None = None, **overrides: Any
) -> dict[str, np.ndarray]:
    """The state_dict of an encoder's variables: the exact inverse of `from_state_dict`.

    What a layout has no place for is refused, unless encoding never reads it: that is left out, with a warning. In the
    "transformers" layout of a ViT this is the key third of a masked qkv bias.

    Args:
      layout: key of the family's `layouts`; None: the first, which is the authors' where there is one.

    Raises:
      InterchangeError: a variable is missing, unexpected, misshapen, or has a value that the layout cannot hold.
      ValueError: the family has no such layout.
    """
    return family_export(*_resolve(spec_or_name, overrides), variables, layout)


def family_export(
    model: str, family: Family, module: Any, variables: Mapping[str, Any], layout: str | None = None
) -> dict[str, np.ndarray]:
    """`to_state_dict`, which see for errors raised, for a module of any `Family`; `model` names it in messages."""
    found = _layout(family, layout)
    rows, implied = _rows(family, module, found)
    flat = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    problems: list[str] = []

    def take(path: str, shape: tuple[int, ...]) -> np.ndarray | None:
        value = flat.pop(path, None)
        if value is None:
            problems.append(f"missing {path} {list(shape)}")
        elif np.shape(value) != shape:
            problems.append(f"{path} has shape {list(np.shape(value))}, expected {list(shape)}")
        else:
            return np.asarray(value)
        return None

    state_dict: dict[str, np.ndarray] = {}
    dropped: list[str] = []
    for row in rows:
        value = take(row.path, row.leaf.shape)
        if value is not None:
            dropped += row.write(value, state_dict)
    for path, expected in implied.items():
        value = take(path, expected.shape)
        # A few units in the last place come from the order of the operations.
        if value is None or np.allclose(value, expected, rtol=1e-6, atol=0):
            continue
        if path in found.unread:
            dropped.append(path)
        else:
            gap = np.max(np.abs(value - expected) / np.abs(expected))
            problems.append(f"{path} is computed in this layout, not stored, and would change by up to {gap:.2%}")
    problems += [f"unexpected {path} {list(np.shape(value))}" for path, value in flat.items()]
    if problems:
        raise InterchangeError(model, problems)
    if dropped:
        logger.warning("%s: left out what encoding never reads: %s", model, dropped)
    state_dict.update(found.constants(module))
    state_dict.update({name: state_dict[source].copy() for name, source in found.aliases.items()})
    return state_dict


def state_dict_shapes(
    spec_or_name: EncoderSpec | str, *, layout: str | None = None, **overrides: Any
) -> dict[str, tuple[int, ...]]:
    """Every name of the encoder's state_dict with its shape, buffers and aliases included."""
    return family_shapes(*_resolve(spec_or_name, overrides)[1:], layout)


def family_shapes(family: Family, module: Any, layout: str | None = None) -> dict[str, tuple[int, ...]]:
    """`state_dict_shapes` for a module of any `Family`, in the zoo or not."""
    found = _layout(family, layout)
    shapes = {name: row.shape for row in _rows(family, module, found)[0] for name in row.stored}
    shapes.update({name: value.shape for name, value in found.constants(module).items()})
    shapes.update({name: shapes[source] for name, source in found.aliases.items()})
    return shapes


def extras(family: Family, tensors: Mapping[str, Any], layout: str | None = None) -> dict[str, Any]:
    """The tensors that imports leave out, known to be no part of the encoder: adapters, heads, another tower.

    Their names lose the prefixes that all tensors carry; arguments are as for `import_leaves`.
    """
    return _own_tensors(tensors, _layout(family, layout or detect_layout(family, tensors)))[1]


def detect_layout(family: Family, tensors: Mapping[str, Any]) -> str:
    """The key of `family.layouts` whose table has most of the tensors' names; the first one where none has any."""

    def hits(name: str) -> int:
        found = family.layouts[name]
        table = {_numberless(n) for row in found.table for n in row.names}
        return sum(_numberless(n) in table for n in _own_tensors(tensors, found)[0])

    return max(family.layouts, key=hits)


@dataclass(frozen=True)
class _Row:
    """A table row as a given model has it.

    `names` holds, for every block, the tensors of its parts; None for a part that is not stored.
    """

    path: str
    leaf: jax.ShapeDtypeStruct
    transform: Transform
    stacked: bool
    names: tuple[tuple[str | None, ...], ...]

    @property
    def stored(self) -> list[str]:
        return [name for parts in self.names for name in parts if name is not None]

    @property
    def part_shape(self) -> tuple[int, ...]:
        shape = self.leaf.shape[int(self.stacked) :]
        n_parts = len(self.names[0])
        return shape if n_parts == 1 else (*shape[:-1], shape[-1] // n_parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each tensor."""
        return self.transform.shape(_permuted(self.part_shape, self.transform.axes))

    def read(self, tensors: Mapping[str, Any]) -> np.ndarray:
        """The leaf, float32."""
        leaf = np.zeros(self.leaf.shape, np.float32)
        for name, part in self._parts(leaf):
            if name is not None:
                self._fill(part, np.asarray(tensors[name]))  # in no variable: gone when the next one is read
        return leaf

    def _fill(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        axes = self.transform.axes
        theirs = theirs.reshape(_permuted(self.part_shape, axes))
        if axes is None:
            ours[...] = theirs
            return
        theirs = theirs.transpose(np.argsort(axes))
        # In strips of a cache line: four times as fast as a large matrix transposed at once.
        for i in range(0, ours.shape[-1], 16):
            ours[..., i : i + 16] = theirs[..., i : i + 16]

    def write(self, leaf: np.ndarray, state_dict: dict[str, np.ndarray]) -> list[str]:
        """Puts the leaf's tensors into `state_dict`; returns the path if a part that is not stored is not zero."""
        lost = False
        for name, part in self._parts(leaf):
            if name is None:
                lost = lost or bool(part.any())
            else:
                array = part if self.transform.axes is None else part.transpose(self.transform.axes)
                state_dict[name] = np.asarray(array.reshape(self.shape), order="C")
        return [f"a part of {self.path}"] if lost else []

    def _parts(self, leaf: np.ndarray) -> Iterator[tuple[str | None, np.ndarray]]:
        """Views of the leaf, each with the name of its tensor."""
        for i, names in enumerate(self.names):
            block = leaf[i, ...] if self.stacked else leaf
            yield from zip(names, [block] if len(names) == 1 else np.split(block, len(names), axis=-1), strict=True)


def _permuted(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    return shape if axes is None else tuple(shape[a] for a in axes)


def _resolve(spec_or_name: EncoderSpec | str, overrides: Mapping[str, Any]) -> tuple[str, Family, Any]:
    """Name, family and module of an encoder."""
    if isinstance(spec_or_name, str):
        spec = zoo.spec(spec_or_name, **overrides)
        return spec.name, zoo.FAMILIES[spec.family], zoo.FAMILIES[spec.family].module(**spec.kwargs)
    family = zoo.FAMILIES[spec_or_name.family]
    return spec_or_name.name, family, family.module(**{**spec_or_name.kwargs, **overrides})


def _layout(family: Family, name: str | None) -> Layout:
    """The layout of that name, the first one for None."""
    if name is not None and name not in family.layouts:
        raise ValueError(f"the family {family.name!r} has no layout {name!r}, only {', '.join(family.layouts)}")
    return family.layouts[name or next(iter(family.layouts))]


def _rows(family: Family, module: Any, layout: Layout) -> tuple[list[_Row], dict[str, np.ndarray]]:
    """The table rows this module has, and the values of its leaves that the layout does not store.

    A leaf that is neither is one that the layout cannot hold.
    """
    if family.example_inputs is not None:
        inputs = family.example_inputs(module)
    else:
        side = 4 * getattr(module, "patch_size", 16)
        inputs = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    absent = layout.absent(module)
    rows = [_row(row, leaves.pop(row.path), absent) for row in layout.table if row.path in leaves]
    implied = {path: value for path, value in layout.implied(module).items() if leaves.pop(path, None) is not None}
    if leaves:
        raise InterchangeError(family.name, [f"the layout has no place for {path}" for path in leaves])
    return rows, implied


def _row(row: Tensor, leaf: jax.ShapeDtypeStruct, absent: Collection[str]) -> _Row:
    names = [None if name in absent else name for name in row.names]
    blocks = range(leaf.shape[0] if row.stacked else 1)
    numbered = tuple(tuple(name and name.replace("{i}", str(i)) for name in names) for i in blocks)
    return _Row(row.path, leaf, TRANSFORMS[row.transform], row.stacked, numbered)


def _misfits(rows: Iterable[_Row], layout: Layout, module: Any, tensors: Mapping[str, Any]) -> list[str]:
    """Everything that keeps `tensors` from being the state_dict; reads only what the architecture fixes."""
    expected = {name: row.shape for row in rows for name in row.stored}
    constants = layout.constants(module)
    expected.update({name: value.shape for name, value in constants.items()})
    expected.update({name: expected[source] for name, source in layout.aliases.items()})
    whole = {name for name, value in constants.items() if jnp.issubdtype(value.dtype, jnp.integer)}
    misfits = {name: _misfit(name, shape, tensors, name in whole) for name, shape in expected.items()}
    for name in (*constants, *layout.aliases):
        source = layout.aliases.get(name)
        if misfits[name] or misfits.get(source):
            continue
        value = constants[name] if source is None else np.asarray(tensors[source])
        if not np.array_equal(np.asarray(tensors[name]), value):
            what = "what the architecture fixes" if source is None else f"a copy of {source}"
            misfits[name] = f"{name} is not {what}"
    problems = [problem for problem in misfits.values() if problem]
    return problems + [f"unexpected {name} {list(t.shape)}" for name, t in tensors.items() if name not in expected]


def _misfit(name: str, shape: tuple[int, ...], tensors: Mapping[str, Any], whole: bool) -> str | None:
    """What is wrong with one tensor, from its shape and dtype alone. `whole`: of integers, as some constants are."""
    if name not in tensors:
        return f"missing {name} {list(shape)}"
    tensor = tensors[name]
    # bfloat16 is not a subtype of np.floating, so ask jax.
    if whole and not jnp.issubdtype(tensor.dtype, jnp.integer):
        return f"{name} has dtype {tensor.dtype}, expected integers"
    if not whole and (not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize > 4):
        return f"{name} has dtype {tensor.dtype}, expected floating point of at most 32 bits"
    if tuple(tensor.shape) != shape:
        return f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
    return None


def _own_tensors(tensors: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of the encoder itself under their bare names, and those known to belong elsewhere."""
    tensors = _strip_prefixes(tensors, layout.prefixes)
    nested = layout.within is not None and any(name.startswith(layout.within) for name in tensors)
    own, left_out, strays = {}, {}, {}
    for name, value in tensors.items():
        outside = nested and not name.startswith(layout.within)
        if name.startswith(layout.extras) or (outside and name.startswith(layout.beside)):
            left_out[name] = value
        elif outside:
            strays[name] = value
        else:
            bare = name.removeprefix(layout.within) if nested else name
            own[_renamed(bare, layout.renames)] = value
    for name, value in strays.items():  # not known to belong anywhere: to be reported as unexpected
        own[name if name not in own else f"{name} (outside {layout.within})"] = value
    if len(own) + len(left_out) < len(tensors):
        twice = [name for name in tensors if (new := _renamed(name, layout.renames)) != name and new in tensors]
        raise InterchangeError("their layout", [f"{name} is there under two names" for name in twice])
    return own, left_out


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    prefix = next((prefix for prefix in renames if name.startswith(prefix)), "")
    return renames.get(prefix, "") + name.removeprefix(prefix)


def _strip_prefixes(tensors: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """Removes each prefix that every name carries; repeated until none applies ("module.teacher.")."""
    tensors, prefixes, stripped = dict(tensors), tuple(prefixes), True
    while tensors and stripped:
        stripped = False
        for prefix in prefixes:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
                stripped = True
    return tensors


def _numberless(name: str) -> str:
    """A name with its block, stage and layer numbers taken out, as in a table's `{i}`."""
    return re.sub(r"\.(\d+|\{i\})(?=\.)", ".#", name)
