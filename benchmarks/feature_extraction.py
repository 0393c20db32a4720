"""Images per second of frozen-feature extraction here and in PyTorch, side by side in one run.

  python benchmarks/feature_extraction.py [--model eupe_vitt16] [--batch 8] [--cores 2] [--json FILE]

Both run the same weights over the same JPEG files through `evals.features.extract`: the same decoding and cropping in
threads beside the computation, class tokens only. PyTorch is the readable module of convert/torch_vit.py, as it is and
compiled. "forward" is the encoder alone on a ready batch, "extraction" all of it. The contenders take turns, and every
round starts with another one; a ratio is the median over rounds of both times of the same round, so that a busy machine
disturbs all alike. Processor time is told beside. On a machine that others use too, measure with --cores=1: PyTorch's
threads wait for each other by spinning, which costs it far more there than on a machine of its own.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIDE = 224
LABELS = {"jax": "eupe_jax", "torch": "PyTorch eager", "compile": "torch.compile"}


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """JPEG files of 400 x 300 pixels: smooth random pictures, about as large as photographs of that size."""
    import io

    from PIL import Image

    rng = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        out = io.BytesIO()
        coarse.resize((400, 300), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


class Files:
    """A source of encoded images in memory."""

    def __init__(self, files: list[bytes]):
        from eupe_jax.data.sources import Record

        self._records = [Record(data, f"picture {i}") for i, data in enumerate(files)]
        self.digest = ""

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int):
        return self._records[index]


def contenders(model: str, cores: int) -> dict[str, Callable[[np.ndarray], dict]]:
    """{name: uint8 images -> tokens} with the same random weights, all as they are used elsewhere in the project."""
    import jax
    import jax.numpy as jnp
    import torch

    from convert.weights import to_module
    from eupe_jax.evals.encoders import FlaxEncoder
    from eupe_jax.models import zoo
    from eupe_jax.training.encoders import LoadedEncoder

    spec, module = zoo.spec(model), zoo.build(model)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))
    noise = np.random.default_rng(0)  # at the initial scale of LayerScale blocks would not matter
    params = jax.tree.map(lambda x: x + 0.02 * noise.standard_normal(x.shape, np.float32), variables["params"])
    variables = {**variables, "params": params}
    manifest = {"resolution": SIDE, "mean": list(spec.mean), "std": list(spec.std)}
    loaded = LoadedEncoder(model, {}, module, variables, manifest)
    torch.set_num_threads(cores)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (spec.mean, spec.std))

    def wrap(network):
        def encode(images: np.ndarray) -> dict:
            with torch.inference_mode():
                x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div(255).sub(mean).div(std)
                return {kind: tokens.numpy() for kind, tokens in network(x).items()}

        return encode

    network = to_module(loaded)
    return {"jax": FlaxEncoder(loaded), "torch": wrap(network), "compile": wrap(torch.compile(network))}


def measure(tasks: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{contender: {"wall", "cpu"}} seconds an image of every round; a task returns how many images it did."""
    names, times = list(tasks), {name: {"wall": [], "cpu": []} for name in tasks}
    for name in names:
        tasks[name]()  # compiles
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            count = tasks[name]()
            times[name]["wall"].append((time.perf_counter() - wall) / count)
            times[name]["cpu"].append((time.process_time() - cpu) / count)
    return times


def summarise(what: str, times: dict[str, dict[str, list[float]]]) -> list[dict]:
    """A row a contender: images per second, and how much faster eupe_jax is in the same rounds."""
    rows = []
    for name, t in times.items():
        ratio = {k: statistics.median(b / a for a, b in zip(times["jax"][k], t[k], strict=True)) for k in t}
        rows.append(
            {
                "what": what,
                "contender": LABELS[name],
                "images_per_s": round(1 / statistics.median(t["wall"]), 2),
                "best_images_per_s": round(1 / min(t["wall"]), 2),
                "cpu_ms_per_image": round(1000 * statistics.median(t["cpu"]), 2),
                "eupe_jax_is_faster_by": round(ratio["wall"], 3),
                "eupe_jax_is_faster_by_cpu_time": round(ratio["cpu"], 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="eupe_vitt16", help="a ViT or ConvNeXt student of the zoo")
    parser.add_argument("--batch", type=int, default=0, help="images a batch; 0: what extraction takes here")
    parser.add_argument("--images", type=int, default=128, help="images of one extraction")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender")
    parser.add_argument("--cores", type=int, default=0, help="processor cores for all contenders; 0: all there are")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    available = sorted(os.sched_getaffinity(0))
    cores = available[: args.cores or len(available)]
    os.sched_setaffinity(0, cores)  # before the runtimes start their threads

    import jax
    import torch

    from eupe_jax.evals import features

    args.batch = args.batch or features.default_batch_size()
    encoders = contenders(args.model, len(cores))
    if args.no_compile:
        del encoders["compile"]
    files = Files(jpegs(args.images))
    batch = np.stack([features.CentreCrop()(files[i]) for i in range(args.batch)])
    tokens = {name: np.asarray(encode(batch)["cls"]) for name, encode in encoders.items()}
    difference = max(float(np.abs(x - tokens["torch"]).max()) for x in tokens.values())
    if difference > 1e-3:
        raise SystemExit(f"error: the contenders disagree by {difference:.1e}: nothing to compare")

    def forward(encode):
        np.asarray(encode(batch)["cls"])
        return len(batch)

    def extraction(encode):
        options = dict(kinds=("cls",), prepare=features.CentreCrop(), threads=max(2, len(cores)))
        return len(features.extract(encode, files, args.batch, **options)["cls"])

    rows = []
    for what, task in (("forward", forward), ("extraction", extraction)):
        rows += summarise(what, measure({n: (lambda e=e, t=task: t(e)) for n, e in encoders.items()}, args.rounds))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    facts = {
        "model": args.model,
        "batch": args.batch,
        "cores": len(cores),
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "load_at_end": os.getloadavg()[0],
        "largest_difference": difference,
        "jax": jax.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(facts))
    if args.json:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
