"""Where in a function the first value appears that is not finite: the function runs once more, and is looked at.

Works on any function that JAX can trace, its loops and gradients too: what is looked at is the traced program, so that
models need no hooks. Its operations are taken module by module, as flax names them. A module is to blame where what it
gives is worse than what it was given: NaN out of infinities or numbers, infinities out of numbers.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

FINITE, INFINITE, NAN = 0, 1, 2
NAMES = ("finite", "infinite", "NaN")

# Primitives that only wrap a program of their own, and the parameter that holds it.
_WRAPPERS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr",
             "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """One module's operations in a row, of a traced function.

    path: names of modules, from the outermost ("blocks/attn/qkv"), of the model of class `model`; both may be empty.
    loops: (turn, turns) of the loops it is in: the block of a stacked model. backward: whether of a gradient.
    """

    model: str = ""
    path: str = ""
    loops: tuple[tuple[int, int], ...] = ()
    backward: bool = False

    def __str__(self) -> str:
        layers = "".join(f", layer {turn} of {turns}" for turn, turns in self.loops)
        where = f"in {'the gradient through ' * self.backward}{self.path}" if self.path else "outside of all modules"
        return where + layers


def worst(tree: Any) -> jax.Array:
    """int8 []: FINITE, INFINITE or NAN, the worst that any number of a tree of arrays is."""
    found = jnp.int8(FINITE)
    for leaf in jax.tree.leaves(tree):
        found = jnp.maximum(found, kinds_along(leaf, 0))
    return found


def kinds_along(x: jax.Array, axes: int) -> jax.Array:
    """int8 [of the first `axes` axes of x]: the worst of what lies along the others."""
    if not _is_float(x):
        return jnp.zeros(np.shape(x)[:axes], jnp.int8)
    x = jnp.asarray(x)
    kinds = jnp.where(jnp.isnan(x), NAN, jnp.where(jnp.isinf(x), INFINITE, FINITE)).astype(jnp.int8)
    return jnp.max(kinds, axis=tuple(range(axes, x.ndim)), initial=FINITE)


class Watched:
    """`function`, watched: called under `jax.jit`, it gives what `function` gives, and int8 [places]: how bad what each
    of them gave is where it is to blame, FINITE elsewhere, in the order of computation. `places` says afterwards which
    they are.
    """

    def __init__(self, function: Callable) -> None:
        self._function = function
        self.places: list[Place] = []

    def __call__(self, *args: Any) -> tuple[Any, jax.Array]:
        traced, shape = jax.make_jaxpr(self._function, return_shape=True)(*args)
        found = _Found([], [])
        outputs = _run(traced.jaxpr, traced.consts, jax.tree.leaves(args), "", found)
        self.places = found.places
        flags = jnp.concatenate(found.flags) if found.flags else jnp.zeros(0, jnp.int8)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), flags

    def first(self, flags: np.ndarray) -> tuple[Place, str] | None:
        """The first place to blame, and what it gave ("NaN" or "infinite")."""
        bad = np.flatnonzero(flags)
        return (self.places[bad[0]], NAMES[flags[bad[0]]]) if bad.size else None


@dataclass
class _Found:
    """Places and, in pieces of int8 [n], how bad each of them made it."""

    places: list[Place]
    flags: list[jax.Array]


def _run(jaxpr: Jaxpr, consts: Any, args: Any, prefix: str, found: _Found) -> list:
    """`jax.core.eval_jaxpr`, which notes every module in `found`."""
    values: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    kinds: dict[Var, jax.Array] = {}

    def read(variable: Var | Literal) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    def most(variables: list[Var]) -> jax.Array:
        for variable in variables:
            if variable not in kinds:
                kinds[variable] = worst(values[variable])
        floats = [kinds[v] for v in variables if _is_float(values[v])]
        return functools.reduce(jnp.maximum, floats, jnp.int8(FINITE))

    for place, eqns in _groups(jaxpr, prefix):
        for eqn in eqns:
            inputs = [read(v) for v in eqn.invars]
            if eqn.primitive.name in _WRAPPERS:
                outputs = _run(*_inner(eqn, inputs), f"{prefix}/{eqn.source_info.name_stack}", found)
            elif eqn.primitive.name == "scan":
                outputs = _scan(eqn, inputs, f"{prefix}/{eqn.source_info.name_stack}", found)
            else:
                with eqn.ctx.manager:
                    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            values |= zip(eqn.outvars, outputs if eqn.primitive.multiple_results else [outputs], strict=True)
        if place is not None:
            taken, given = _boundary(jaxpr, eqns)
            before, after = most(taken), most(given)
            found.places.append(place)
            found.flags.append(jnp.where(after > before, after, jnp.int8(FINITE))[None])
    return [read(v) for v in jaxpr.outvars]


def _groups(jaxpr: Jaxpr, prefix: str) -> Iterator[tuple[Place | None, list[JaxprEqn]]]:
    """The operations, those of one module in a row together; None: one that holds a program of its own."""
    for (place, _), each in itertools.groupby(enumerate(jaxpr.eqns), lambda item: _place(prefix, *item)):
        yield place, [eqn for _, eqn in each]


def _boundary(jaxpr: Jaxpr, eqns: list[JaxprEqn]) -> tuple[list[Var], list[Var]]:
    """What a group of operations takes from outside, and what it gives to others."""
    made = {v for eqn in eqns for v in eqn.outvars}
    mine = {id(eqn) for eqn in eqns}
    wanted = _variables(v for eqn in jaxpr.eqns if id(eqn) not in mine for v in eqn.invars)
    wanted |= _variables(jaxpr.outvars)
    taken = _variables(v for eqn in eqns for v in eqn.invars)
    return [v for v in taken if v not in made], [v for eqn in eqns for v in eqn.outvars if v in wanted]


def _variables(found: Iterable[Var | Literal]) -> dict[Var, None]:
    """Without what stands in the program itself; each once, in order."""
    return {v: None for v in found if not isinstance(v, Literal)}


def _inner(eqn: JaxprEqn, inputs: list) -> tuple[Jaxpr, Any, list]:
    """The program that an operation wraps, and its arguments."""
    inner = eqn.params[_WRAPPERS[eqn.primitive.name]]
    jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
    if eqn.params.get("prevent_cse") and eqn.params.get("differentiated"):
        inputs = jax.lax.optimization_barrier(inputs)  # as lowering does, lest nothing be computed again
    return jaxpr, consts, inputs


def _scan(eqn: JaxprEqn, inputs: list, path: str, found: _Found) -> list:
    params, closed = eqn.params, eqn.params["jaxpr"]
    consts, carried = params["num_consts"], params["num_carry"]
    inside: list[Place] = []

    def body(carry: list, slices: list) -> tuple[list, tuple]:
        each = _Found([], [])
        outputs = _run(closed.jaxpr, closed.consts, [*inputs[:consts], *carry, *slices], path, each)
        inside[:] = each.places
        flags = jnp.concatenate(each.flags) if each.flags else jnp.zeros(0, jnp.int8)
        return outputs[:carried], (outputs[carried:], flags)

    carry, (stacked, flags) = jax.lax.scan(
        body, inputs[consts : consts + carried], inputs[consts + carried :], length=params["length"],
        reverse=params["reverse"],
    )  # fmt: skip
    turns = range(params["length"])
    order = list(reversed(turns)) if params["reverse"] else list(turns)
    found.places += [replace(p, loops=((turn, len(turns)), *p.loops)) for turn in order for p in inside]
    found.flags.append(flags[jnp.asarray(order, jnp.int32)].reshape(-1))
    return [*carry, *stacked]


def _is_float(value: Any) -> bool:
    dtype = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.floating)


_ROOT = re.compile(r"(transpose|jvp|vmap)\(")


def _place(prefix: str, number: int, eqn: JaxprEqn) -> tuple[Place | None, int]:
    """From names as flax and JAX stack them: "transpose(jvp(Model))/Model.method/blocks/attn/attn.method/ab,bc->ac".
    What holds a program of its own has no place, but its number, which no other has."""
    if eqn.primitive.name in _WRAPPERS or eqn.primitive.name == "scan":
        return None, number
    parts = [part for part in f"{prefix}/{eqn.source_info.name_stack}".split("/") if part]
    roots = [i for i, part in enumerate(parts) if _ROOT.match(part)]
    names = [re.sub(r"[\w.]+\(|\)", "", part) for part in (parts[roots[-1] :] if roots else parts)]
    models = [name for name in names if re.fullmatch(r"[A-Z]\w*", name)]
    path = [name for name in names if re.fullmatch(r"[a-z]\w*", name) and name != "rematted_computation"]
    backward = any(part.startswith("transpose(") for part in parts)
    return Place(models[0] if models else "", "/".join(path), (), backward), -1
