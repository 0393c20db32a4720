"""How much memory and time convert/teachers_to_orbax.py takes for a checkpoint of full size.

  python benchmarks/convert_checkpoint.py --model=pe_core_g14_448 --json=convert.json

Random weights of the model are written to disk one tensor at a time, under the authors' names, and converted in a
process of its own whose anonymous memory (RssAnon; pages of a mapped file do not count) is read a hundred times a
second. The bar: at most 1.5 times the largest parameter plus 2 GB. Afterwards some parameters are held against the
file. Needs twice the model's size on disk under --workdir; what it wrote is removed.
"""

import json
import math
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from convert import cli
from eupe_jax.models import interchange, zoo
from eupe_jax.training import checkpoints
from eupe_jax.training.weight_files import open_weights

BAR_FACTOR, BAR_BYTES = 1.5, 2e9
ROOT = Path(__file__).resolve().parents[1]
Make = Callable[[str], np.ndarray]


def write_random_file(model: str, path: Path) -> None:
    """A .safetensors or .pt file of random float32 weights, one tensor in memory at a time."""
    spec = zoo.spec(model)
    family = zoo.FAMILIES[spec.family]
    layout = next(iter(family.layouts.values()))
    shapes = {(layout.within or "") + n: shape for n, shape in interchange.state_dict_shapes(model).items()}
    fixed = {(layout.within or "") + n: v for n, v in layout.constants(family.module(**spec.kwargs)).items()}

    def make(name: str) -> np.ndarray:
        """The same for a tensor and for those that repeat it."""
        seed = layout.aliases.get(name, name).encode()
        if name in fixed:
            return fixed[name]
        return np.random.default_rng([*seed]).standard_normal(shapes[name], np.float32)

    writer = {".safetensors": _write_safetensors, ".pt": _write_torch}[path.suffix]
    writer(path, shapes, make)


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], make: Make) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(make(name).tobytes())


def _write_torch(path: Path, shapes: Mapping[str, tuple[int, ...]], make: Make) -> None:
    """Saved without data, then filled through the mapped file."""
    import torch

    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape) for name, shape in shapes.items()}, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        for name, tensor in torch.load(path, mmap=True, weights_only=True, map_location="cpu").items():
            tensor.copy_(torch.from_numpy(make(name)))


def measure(command: list[str]) -> tuple[float, int]:
    """Runs a command; returns its seconds and the peak of its anonymous memory in bytes.

    Raises:
      RuntimeError: it failed.
    """
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")
    return time.perf_counter() - start, peak


def check(model: str, source: Path, out: Path, count: int = 6) -> list[str]:
    """Holds leaves of the checkpoint against the file: the smallest, the largest and some between; names them.

    Raises:
      RuntimeError: one differs.
    """
    spec = zoo.spec(model)
    family = zoo.FAMILIES[spec.family]
    step = checkpoints.step_directory(out)
    tree = ocp.PyTreeCheckpointHandler().metadata(step / "encoder.backbone").tree
    sizes = {path: math.prod(leaf.shape) for path, leaf in traverse_util.flatten_dict(dict(tree), sep="/").items()}
    ordered = sorted(sizes, key=sizes.__getitem__)
    chosen = {ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)}
    with open_weights(source) as weights:
        for path, expected in interchange.import_leaves(model, family, zoo.build(model), weights):
            if path not in chosen:
                continue
            only = traverse_util.unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)}, sep="/")
            item = jax.tree.map(lambda _: 0, only)
            arguments = ocp.args.PyTreeRestore(item=item, restore_args=only, partial_restore=True)
            with ocp.PyTreeCheckpointer() as checkpointer:
                (got,) = jax.tree.leaves(checkpointer.restore(step / "encoder.backbone", args=arguments))
            if not np.array_equal(got, expected.astype(got.dtype)):
                raise RuntimeError(f"{path} of the checkpoint differs from {source}")
            del got, expected
    return sorted(chosen)


def main(argv: list[str] | None = None) -> int:
    parser = cli.described(__doc__)
    add = parser.add_argument
    add("--model", default="pe_core_g14_448", help="zoo name (default: pe_core_g14_448)")
    add("--suffix", choices=(".pt", ".safetensors"), default=".pt", help="kind of file (default: .pt)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the kernels (default: float32)")
    add("--workdir", type=Path, help="where to write (default: the system's folder for temporary files)")
    add("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    shapes = interchange.state_dict_shapes(args.model)
    size = 4 * sum(map(math.prod, shapes.values()))
    module, side = zoo.build(args.model), zoo.spec(args.model).resolution
    variables = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, side, side, 3), np.float32))
    largest = max(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    if args.workdir:
        args.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.workdir, prefix="convert_checkpoint_") as folder:
        free, needed = shutil.disk_usage(folder).free, 2.1 * size
        if free < needed:
            print(f"error: {folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed", file=sys.stderr)
            return 1
        source, out = Path(folder, args.model + args.suffix), Path(folder, "out")
        write_random_file(args.model, source)
        command = [sys.executable, "convert/teachers_to_orbax.py", f"--model={args.model}", f"--dtype={args.dtype}"]
        seconds, peak = measure([*command, f"--checkpoint={source}", f"--out={out}"])
        checked = check(args.model, source, out)
    bar = BAR_FACTOR * largest + BAR_BYTES
    figures = {
        "model": args.model,
        "file": args.suffix,
        "dtype": args.dtype,
        "bytes": size,
        "seconds": round(seconds, 1),
        "mb_per_second": round(size / 1e6 / seconds, 1),
        "largest_parameter_bytes": largest,
        "peak_anonymous_bytes": peak,
        "bar_bytes": int(bar),
        "bar_met": peak <= bar,
        "checked": checked,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(
        f"{args.model}{args.suffix} to {args.dtype}: {size / 1e9:.2f} GB in {seconds:.1f} s "
        f"({figures['mb_per_second']} MB/s)\npeak anonymous memory {peak / 1e9:.2f} GB; largest parameter "
        f"{largest / 1e9:.2f} GB; bar {bar / 1e9:.2f} GB {'met' if peak <= bar else 'MISSED'}\n"
        f"{len(checked)} parameters equal those of the file"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if peak <= bar else 1


if __name__ == "__main__":
    sys.exit(main())
