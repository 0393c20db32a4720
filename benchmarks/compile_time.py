"""Trace and compile time of the 50-layer proxy, blocks scanned against unrolled, forward and forward + backward.

python benchmarks/compile_time.py [--model eupe_proxy] [--json FILE]

Nothing is computed and no weights are made: the programs are traced and compiled from shapes. Variants are run in turn,
each compiled afresh.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from eupe_jax.models import zoo


def measure(model: str, side: int, unroll: int, backward: bool) -> dict:
    """Seconds to trace and lower, and to compile, for one image of side `side`, and megabytes of program text."""
    module = zoo.build(model, scan_unroll=unroll, dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    rest = {name: value for name, value in variables.items() if name != "params"}

    def forward(params, rest, image):
        tokens = module.apply({"params": params, **rest}, image)
        return sum(jnp.mean(jnp.square(value)) for value in tokens.values() if value.size)

    # a fresh function every time: jit would find the last one's trace
    program = jax.jit(jax.grad(forward) if backward else lambda *args: forward(*args))
    start = time.perf_counter()
    lowered = program.lower(variables["params"], rest, image)
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter()
    return {
        "model": model,
        "pass": "forward + backward" if backward else "forward",
        "blocks": "scanned" if unroll == 1 else "unrolled",
        "trace_s": round(traced - start, 2),
        "compile_s": round(compiled - traced, 2),
        "program_mb": round(len(lowered.as_text()) / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="eupe_proxy", help="zoo name")
    parser.add_argument("--side", type=int, default=256, help="image side in pixels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    depth = zoo.spec(args.model).kwargs["depth"]
    rows = []
    for backward in (False, True):
        for unroll in (1, depth):
            rows.append(measure(args.model, args.side, unroll, backward))
            row = rows[-1]
            print(
                f"{row['model']}, {row['pass']:<18} {row['blocks']:<8}  trace {row['trace_s']:6.2f} s   "
                f"compile {row['compile_s']:6.2f} s   program {row['program_mb']:6.2f} MB",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
