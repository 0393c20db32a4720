"""Weights between our variables and the state_dicts of the authors, both ways, bit for bit. Pure numpy, no I/O.

Every family declares one table (`spec.Family.table`); this module only applies it. Nothing is skipped in silence:
all that is missing, unexpected or misshapen is collected into one error, and tensors that are known to belong to
something else (`spec.Family.extras`) are logged by name.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from eupe_jax.models import zoo
from eupe_jax.models.spec import EncoderSpec, Family, Tensor

logger = logging.getLogger(__name__)

# layout -> axes of our leaf in terms of the state_dict's, and the way back.
_IMPORT_AXES = {"copy": None, "linear": (1, 0), "conv": (2, 3, 1, 0)}
_EXPORT_AXES = {"copy": None, "linear": (1, 0), "conv": (3, 2, 0, 1)}


class InterchangeError(ValueError):
    """State_dict and encoder do not fit. `problems` lists every mismatch, the message shows them all."""

    def __init__(self, model: str, problems: list[str]):
        self.problems = problems
        super().__init__(f"{len(problems)} mismatches between the weights and {model}:\n  " + "\n  ".join(problems))


def from_state_dict(
    spec_or_name: EncoderSpec | str, state_dict: Mapping[str, np.ndarray], **overrides: Any
) -> dict[str, Any]:
    """The variables of an encoder from the authors' state_dict.

    Args:
      spec_or_name: an `EncoderSpec` or a zoo name.
      state_dict: name -> array, floating point of at most 32 bits.
      **overrides: constructor arguments that differ from the spec's.

    Returns:
      {"params": ..., "buffers": ...} of float32 numpy arrays ("buffers" where the family has some).

    Raises:
      InterchangeError: anything missing, unexpected, misshapen or not as the architecture fixes it.
    """
    return family_import(*_resolve(spec_or_name, overrides), state_dict)


def family_import(model: str, family: Family, module: Any, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`from_state_dict` for a module of any `Family`, in the zoo or not; `model` names it in messages."""
    tensors, left_out = _own_tensors(state_dict, family)
    if left_out:
        logger.warning("%s: left out %d tensors that are no part of it: %s", model, len(left_out), left_out)
    problems: list[str] = []
    used: set[str] = set()

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        used.add(name)
        if name not in tensors:
            problems.append(f"missing {name} {list(shape)}")
            return np.zeros(shape, np.float32)
        array = np.asarray(tensors[name])
        # bfloat16 is not a subtype of np.floating, so ask jax.
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize > 4:
            problems.append(f"{name} has dtype {array.dtype}, expected floating point of at most 32 bits")
        elif array.shape == shape:
            return array.astype(np.float32)
        else:
            problems.append(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
        return np.zeros(shape, np.float32)

    flat = {}
    for row, leaf in _rows(family, module):
        names, shape = _names(row, leaf), _foreign_shape(row, leaf)
        arrays = [_permute(take(name, shape), _IMPORT_AXES[row.layout]) for name in names]
        flat[tuple(row.path.split("/"))] = np.stack(arrays) if _stacked(row) else np.asarray(arrays[0], order="C")

    fixed = family.constants(module)
    fixed.update({name: tensors.get(source, tensors.get(name)) for name, source in family.aliases.items()})
    for name, expected in fixed.items():
        before = len(problems)
        if not np.array_equal(take(name, np.shape(expected)), expected) and len(problems) == before:
            what = f"a copy of {family.aliases[name]}" if name in family.aliases else "what the architecture fixes"
            problems.append(f"{name} is not {what}")
    problems += [f"unexpected {name} {list(np.shape(tensors[name]))}" for name in tensors if name not in used]
    if problems:
        raise InterchangeError(model, problems)
    return traverse_util.unflatten_dict(flat)


def to_state_dict(
    spec_or_name: EncoderSpec | str, variables: Mapping[str, Any], **overrides: Any
) -> dict[str, np.ndarray]:
    """The authors' state_dict of an encoder's variables: the exact inverse of `from_state_dict`.

    Raises:
      InterchangeError: a variable is missing, unexpected or misshapen.
    """
    return family_export(*_resolve(spec_or_name, overrides), variables)


def family_export(model: str, family: Family, module: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`to_state_dict` for a module of any `Family`, in the zoo or not; `model` names it in messages."""
    flat = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    problems: list[str] = []
    state_dict: dict[str, np.ndarray] = {}
    for row, leaf in _rows(family, module):
        value = flat.pop(row.path, None)
        if value is None:
            problems.append(f"missing {row.path} {list(leaf.shape)}")
        elif np.shape(value) != leaf.shape:
            problems.append(f"{row.path} has shape {list(np.shape(value))}, expected {list(leaf.shape)}")
        else:
            value = np.asarray(value)
            arrays = value if _stacked(row) else [value]
            for name, array in zip(_names(row, leaf), arrays, strict=True):
                state_dict[name] = np.asarray(_permute(array, _EXPORT_AXES[row.layout]), order="C")
    problems += [f"unexpected {path} {list(np.shape(value))}" for path, value in flat.items()]
    if problems:
        raise InterchangeError(model, problems)
    state_dict.update(family.constants(module))
    state_dict.update({name: state_dict[source].copy() for name, source in family.aliases.items()})
    return state_dict


def state_dict_shapes(spec_or_name: EncoderSpec | str, **overrides: Any) -> dict[str, tuple[int, ...]]:
    """Every name of the encoder's state_dict with its shape, buffers and aliases included."""
    return family_shapes(*_resolve(spec_or_name, overrides)[1:])


def family_shapes(family: Family, module: Any) -> dict[str, tuple[int, ...]]:
    """`state_dict_shapes` for a module of any `Family`, in the zoo or not."""
    shapes = {name: _foreign_shape(row, leaf) for row, leaf in _rows(family, module) for name in _names(row, leaf)}
    shapes.update({name: value.shape for name, value in family.constants(module).items()})
    shapes.update({name: shapes[source] for name, source in family.aliases.items()})
    return shapes


def _resolve(spec_or_name: EncoderSpec | str, overrides: Mapping[str, Any]) -> tuple[str, Family, Any]:
    """Name, family and module of an encoder."""
    if isinstance(spec_or_name, str):
        spec = zoo.spec(spec_or_name, **overrides)
        return spec.name, zoo.FAMILIES[spec.family], zoo.FAMILIES[spec.family].module(**spec.kwargs)
    family = zoo.FAMILIES[spec_or_name.family]
    return spec_or_name.name, family, family.module(**{**spec_or_name.kwargs, **overrides})


def _rows(family: Family, module: Any) -> Iterable[tuple[Tensor, jax.ShapeDtypeStruct]]:
    """The table rows this module has, with the abstract leaf of each; a leaf without a row is a bug of the table."""
    if family.example_inputs is not None:
        inputs = family.example_inputs(module)
    else:
        side = max(64, 2 * getattr(module, "patch_size", 0))
        inputs = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    rows = [(row, leaves.pop(row.path)) for row in family.table if row.path in leaves]
    if leaves:
        raise InterchangeError(family.name, [f"no table row for variable {path}" for path in leaves])
    return rows


def _stacked(row: Tensor) -> bool:
    return "{i}" in row.name


def _names(row: Tensor, leaf: jax.ShapeDtypeStruct) -> list[str]:
    return [row.name.replace("{i}", str(i)) for i in range(leaf.shape[0])] if _stacked(row) else [row.name]


def _foreign_shape(row: Tensor, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    shape = leaf.shape[1:] if _stacked(row) else leaf.shape
    axes = _EXPORT_AXES[row.layout]
    return shape if axes is None else tuple(shape[a] for a in axes)


def _permute(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return array if axes is None else array.transpose(axes)


def _own_tensors(state_dict: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """The tensors of the encoder itself under their bare names, and the names of those known to belong elsewhere."""
    tensors = _strip_prefixes(state_dict, family.prefixes)
    left_out = [name for name in tensors if name.startswith(family.extras)]
    if family.within and any(name.startswith(family.within) for name in tensors):
        left_out += [name for name in tensors if not name.startswith((family.within, *family.extras))]
    known_elsewhere = set(left_out)
    own = {name: value for name, value in tensors.items() if name not in known_elsewhere}
    return _strip_prefixes(own, (family.within,) if family.within else ()), left_out


def _strip_prefixes(state_dict: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """Removes each prefix that every name carries; repeated until none applies ("module.teacher.")."""
    tensors, prefixes, stripped = dict(state_dict), tuple(prefixes), True
    while tensors and stripped:
        stripped = False
        for prefix in prefixes:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
                stripped = True
    return tensors
