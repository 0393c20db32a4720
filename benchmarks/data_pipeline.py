"""Images per second of the host pipeline on one core, beside what torchvision and Pillow do there, in one run.

  python benchmarks/data_pipeline.py [--data FOLDER] [--rounds 7] [--json FILE]

--data (default: $EUPE_DATA_DIR, else ../shared/data beside the repository) holds photos/*.jpg and
caltech101/train-*.tar; --images FOLDER measures any folder of images instead. The files lie in memory. Contenders take
turns after every few files, each with one thread, and every turn starts with another one; a ratio is the median over
rounds of both processor times of the same round, so that a busy machine disturbs all alike.

- here: RecordReader, as the loader calls it. Decoding, random-resized crop to 256; uint8 [256, 256, 3]. The rest is
  done by the accelerator.
- equal work: torchvision's loading and RandomResizedCrop on Pillow images; a Pillow image.
- full: all of DINOv3's second global crop on the host (torchvision_transform.py); a normalised float tensor.
  "as it fires": the authors' blur class hands 1 - p to its base class, so blur fires with 0.9; "as written": 0.1.

`ratio_full` (blur as it fires) and `ratio_equal_work` are those of the slower set. `device_augment_fraction`: time of
the jitted augmentation over that of a ViT-T stage-2 step without it, on this machine's devices. The step is the
student's alone (forward, backward, adapters, AdamW; the proxy's features are given): with a teacher in it, the fraction
is smaller. The table at the end says what one host of a pod must deliver at the step time --step_ms.
"""

import argparse
import json
import os
import platform
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIZE = 256
CHUNK = 8  # files of one turn
# One step of stage 2 as predicted for v5e 16x16 from the compiled program; a host of that slice has 4 chips and 112
# vCPUs (Google's ct5lp-hightpu-4t).
STAGE2 = {"batch": 8192, "chips": 256, "chips_per_host": 4, "vcpus_per_host": 112}


def file_sets(data: Path, images: Path | None, limit: int) -> dict[str, list[bytes]]:
    """{name of the set: encoded images}. Raises SystemExit where there are none."""
    if images is not None:
        from eupe_jax.data.host import BrokenRecord, decode
        from eupe_jax.data.sources import ImageFolder

        files = []
        try:
            source = ImageFolder(images)
            for record in (source[i] for i in range(min(limit, len(source)))):
                try:
                    decode(record)
                    files.append(record.data)
                except BrokenRecord as e:
                    print(f"left out: {e}")
        except (OSError, ValueError) as e:
            raise SystemExit(f"error: {e}") from e
        if not files:
            raise SystemExit(f"error: none of the first {limit} images in {images} can be decoded")
        return {images.name: files}
    shards, photos = sorted(data.glob("caltech101/train-*.tar")), sorted(data.glob("photos/*.jpg"))
    if not shards or not photos:
        raise SystemExit(f"error: no photos/*.jpg and caltech101/train-*.tar in {data}: name a folder with --images")
    with tarfile.open(shards[0]) as tar:
        members = [m for m in tar if m.name.endswith(".jpg")][:limit]
        caltech = [tar.extractfile(m).read() for m in members]
    return {"photos": [p.read_bytes() for p in photos[:limit]], "caltech101": caltech}


class InMemory:
    """A source of encoded images in memory."""

    digest = ""

    def __init__(self, files: list[bytes]):
        from eupe_jax.data.sources import Record

        self._records = [Record(data, f"file {i}") for i, data in enumerate(files)]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int):
        return self._records[index]


def contenders(files: list[bytes]) -> dict[str, Callable[[int, int], object]]:
    """{name: f(file number, round) -> image}."""
    from torchvision_transform import Transform, open_rgb, resized_crop

    from eupe_jax.data.host import HostConfig, RecordReader

    source, reader = InMemory(files), RecordReader(HostConfig(SIZE), seed=0)
    fires, written = Transform(SIZE, blur_p=0.9), Transform(SIZE, blur_p=0.1)
    return {
        "here": lambda i, r: reader(source, i, r, i),
        "equal work": lambda i, r: resized_crop(open_rgb(files[i]), SIZE),
        "full, as it fires": lambda i, r: fires(files[i]),
        "full, as written": lambda i, r: written(files[i]),
    }


def measure(tasks: dict[str, Callable[[int, int], object]], count: int, rounds: int) -> dict[str, dict[str, list]]:
    """{contender: {"wall", "cpu"}}: milliseconds an image of every round."""
    names = list(tasks)
    times = {name: {"wall": [], "cpu": []} for name in names}
    for name in names:
        tasks[name](0, 0)
    turn = 0
    for r in range(rounds):
        sums = {name: [0.0, 0.0] for name in names}
        for first in range(0, count, CHUNK):
            turn += 1
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                wall, cpu = time.perf_counter(), time.process_time()
                for i in range(first, min(first + CHUNK, count)):
                    tasks[name](i, r)
                sums[name][0] += time.perf_counter() - wall
                sums[name][1] += time.process_time() - cpu
        for name, (wall, cpu) in sums.items():
            times[name]["wall"].append(1000 * wall / count)
            times[name]["cpu"].append(1000 * cpu / count)
    return times


def summarise(times: dict[str, dict[str, list]]) -> dict[str, dict]:
    """A row a contender: speed of one core, and how much longer it takes than `here` in the same rounds."""
    rows = {}
    for name, t in times.items():
        ratio = {k: statistics.median(b / a for a, b in zip(times["here"][k], t[k], strict=True)) for k in t}
        rows[name] = {
            "images_per_s_and_core": round(1000 / statistics.median(t["cpu"]), 1),
            "cpu_ms": round(statistics.median(t["cpu"]), 3),
            "wall_ms": round(statistics.median(t["wall"]), 3),
            "ratio": round(ratio["cpu"], 3),
            "ratio_wall": round(ratio["wall"], 3),
        }
    return rows


def parts(files: list[bytes]) -> dict[str, float]:
    """Processor milliseconds an image of the pieces on both sides, one by one."""
    import torchvision_transform as tv
    from PIL import Image, ImageOps

    from eupe_jax.data.crop import crop_and_resize, random_crop_box
    from eupe_jax.data.decode import open_picture
    from eupe_jax.data.host import random_generator

    pictures = [open_picture(data, 80_000_000) for data in files]
    pixels = [p.decode(1) for p in pictures]
    boxes = [random_crop_box(p.width, p.height, (0.32, 1.0), (3 / 4, 4 / 3), random_generator(0, 0, i))
             for i, p in enumerate(pictures)]  # fmt: skip
    whole = [Image.fromarray(x) for x in pixels]
    small = [tv.resized_crop(image, SIZE) for image in whole]
    pieces = {
        "here: header": lambda i: open_picture(files[i], 80_000_000),
        "here: draws": lambda i: random_crop_box(500, 375, (0.32, 1.0), (3 / 4, 4 / 3), random_generator(0, 1, i)),
        "here: decode": lambda i: pictures[i].decode(1),
        "here: crop and resize": lambda i: crop_and_resize(pixels[i], boxes[i], SIZE),
        "torchvision: decode": lambda i: tv.open_rgb(files[i]),
        "torchvision: crop and resize": lambda i: tv.resized_crop(whole[i], SIZE),
        "torchvision: colour jitter": lambda i: tv.colour_jitter(small[i]),
        "torchvision: blur": lambda i: tv.gaussian_blur(small[i]),
        "torchvision: solarize": lambda i: ImageOps.solarize(small[i], 128),
        "torchvision: to tensor, normalise": lambda i: tv.normalize(tv.to_tensor(small[i])),
    }
    times = measure({name: (lambda i, r, f=f: f(i)) for name, f in pieces.items()}, len(files), 3)
    return {name: round(statistics.median(t["cpu"]), 3) for name, t in times.items()}


def exact_resize(x: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bicubic (a = -0.5) of [H, W, 3] in float64, rounded and clipped once, at the end."""

    def weights(n: int) -> np.ndarray:
        stretch = n / size
        support = max(stretch, 1.0)
        d = np.abs((np.arange(n)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * stretch) / support)
        w = np.where(d < 1, (1.5 * d - 2.5) * d * d + 1, np.where(d < 2, ((-0.5 * d + 2.5) * d - 4) * d + 2, 0))
        return w / w.sum(axis=1, keepdims=True)

    y = np.einsum("ij,jkc->ikc", weights(x.shape[0]), x.astype(np.float64), optimize=True)
    return np.clip(np.einsum("ij,kjc->kic", weights(x.shape[1]), y, optimize=True), 0, 255)


def agreement(files: list[bytes]) -> dict[str, float]:
    """Grey levels between pixels made here and by Pillow's crop().resize(), and of both from the exact result."""
    from PIL import Image
    from torchvision_transform import BICUBIC, crop_box, open_rgb

    from eupe_jax.data.crop import crop_and_resize
    from eupe_jax.data.decode import decode
    from eupe_jax.data.sources import Record

    decoded, between, ours, pillows = 0, [], [], []
    for data in files:
        image, pixels = open_rgb(data), decode(Record(data, "file"))
        decoded = max(decoded, int(np.abs(np.asarray(image).astype(int) - pixels).max()))
        box = crop_box(*image.size)
        mine = crop_and_resize(pixels, tuple(map(float, box)), SIZE).astype(float)
        theirs = np.asarray(Image.fromarray(pixels).crop(box).resize((SIZE, SIZE), BICUBIC)).astype(float)
        exact = exact_resize(pixels[box[1] : box[3], box[0] : box[2]], SIZE)
        between.append(np.abs(mine - theirs))
        ours.append(np.abs(mine - exact).mean())
        pillows.append(np.abs(theirs - exact).mean())
    between = np.stack(between)
    return {
        "decoded_max": decoded,
        "resized_mean": round(float(between.mean()), 4),
        "resized_99.9_percent": float(np.quantile(between, 0.999)),
        "resized_max": float(between.max()),
        "here_to_exact_mean": round(float(np.mean(ours)), 4),
        "pillow_to_exact_mean": round(float(np.mean(pillows)), 4),
    }


def device_augmentation(batch: int, rounds: int) -> dict:
    """Seconds of the jitted augmentation and of the ViT-T stage-2 step without it, taking turns."""
    import jax
    import jax.numpy as jnp

    from configs import stage2_vitt
    from eupe_jax.data.augment import AugmentConfig, augment, sample_keys
    from eupe_jax.distill import resolutions
    from eupe_jax.distill.step import Loss, make_step
    from eupe_jax.distill.teacher_spec import TeacherSpec
    from eupe_jax.distill.teachers import Teacher
    from eupe_jax.models import zoo
    from eupe_jax.training import assemble

    config = stage2_vitt.get_config()
    if jax.default_backend() == "cpu":
        config.students.vitt.dtype = "float32"
    proxy = zoo.spec("eupe_proxy")
    spec = TeacherSpec(
        "proxy", proxy.cls_dim, proxy.patch_dim, proxy.patch_size, SIZE, proxy.mean, proxy.std, fingerprint=""
    )
    teachers = {"proxy": Teacher(spec)}  # no module: its features come in the batch
    students = assemble.make_students(config, teachers)
    chosen = resolutions.Resolutions(SIZE, (("proxy", SIZE),))
    step = jax.jit(make_step(students, teachers, chosen, Loss(), seed=0))
    student = jax.jit(lambda: students["vitt"].init(jax.random.key(0), SIZE))()
    state = {"step": jnp.zeros((), jnp.int32), "students": {"vitt": student}}

    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8))
    dims, grid = teachers["proxy"].out_dims, spec.grid
    features = {
        "cls": jnp.asarray(rng.standard_normal((batch, dims["cls"]), np.float32)),
        "patches": jnp.asarray(rng.standard_normal((batch, grid, grid, dims["patches"]), np.float32)),
    }
    stats = {"proxy": {part: {k: jnp.full(n, v) for k, n in dims.items()} for part, v in (("mean", 0.0), ("std", 1.0))}}
    keys = sample_keys(jax.random.key(0), 0, jnp.arange(batch))
    settings = AugmentConfig(blur_inverted=True)
    floats = pixels.astype(jnp.float32) / 255
    data = {"image": pixels, "features": {"proxy": features}}
    tasks = {
        "augment": lambda: jax.block_until_ready(augment(keys, floats, settings)),
        "step": lambda: jax.block_until_ready(step(state, data, {}, stats)),
    }
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()  # compiles
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
    fraction = statistics.median(a / s for a, s in zip(times["augment"], times["step"], strict=True))
    return {
        "device_augment_fraction": round(fraction, 4),
        "augment_ms_per_image": round(1000 * statistics.median(times["augment"]) / batch, 3),
        "vitt_step_ms_per_image": round(1000 * statistics.median(times["step"]) / batch, 3),
        "device": jax.devices()[0].device_kind,
        "batch": batch,
    }


def demand(step_ms: float, speed: dict[str, float]) -> list[dict]:
    """What a host of a v5e 16x16 slice must deliver for stage 2, and how many cores like this one that takes."""
    hosts = STAGE2["chips"] // STAGE2["chips_per_host"]
    per_host = STAGE2["batch"] / (step_ms / 1000) / hosts
    return [
        {
            "stage": "stage 2, v5e 16x16",
            "batch": STAGE2["batch"],
            "step_ms": step_ms,
            "hosts": hosts,
            "images_per_s_and_host": round(per_host, 1),
            "files_like": name,
            "images_per_s_of_one_core_here": rate,
            "cores_needed": round(per_host / rate, 2),
            "vcpus_of_a_host": STAGE2["vcpus_per_host"],
        }
        for name, rate in speed.items()
    ]


def main() -> None:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("EUPE_DATA_DIR", beside)))
    parser.add_argument("--images", type=Path, help="a folder of images to measure instead")
    parser.add_argument("--limit", type=int, default=128, help="files of a set, at most")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender")
    parser.add_argument("--batch", type=int, default=8, help="images of a device step")
    parser.add_argument("--step_ms", type=float, default=258.0, help="predicted time of a stage-2 step on v5e 16x16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    for name in ("limit", "rounds", "batch", "step_ms"):
        if getattr(args, name) <= 0:
            raise SystemExit(f"error: --{name} must be positive, got {getattr(args, name)}")

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    load = [os.getloadavg()[0]]
    result = {"sets": {}}
    for name, files in file_sets(args.data, args.images, args.limit).items():
        rows = summarise(measure(contenders(files), len(files), args.rounds))
        result["sets"][name] = {"files": len(files), "contenders": rows, "parts_ms": parts(files),
                                "difference": agreement(files)}  # fmt: skip
        print(f"\n{name}: {len(files)} files, mean {np.mean([len(f) for f in files]) / 1000:.1f} kB")
        for contender, row in rows.items():
            print(f"  {contender:18s}", "  ".join(f"{key} {value}" for key, value in row.items()))
        for facts in ("parts_ms", "difference"):
            print(f"  {facts}:", "; ".join(f"{k} {v}" for k, v in result["sets"][name][facts].items()))
    load.append(os.getloadavg()[0])
    result["device"] = device_augmentation(args.batch, args.rounds)
    print("\ndevice augmentation:", "; ".join(f"{key} {value}" for key, value in result["device"].items()))
    speed = {name: s["contenders"]["here"]["images_per_s_and_core"] for name, s in result["sets"].items()}
    result["demand"] = demand(args.step_ms, speed)
    print()
    for row in result["demand"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))

    def lowest(contender: str) -> float:
        return min(s["contenders"][contender]["ratio"] for s in result["sets"].values())

    load.append(os.getloadavg()[0])
    result = {
        "ratio_full": lowest("full, as it fires"),
        "ratio_full_as_written": lowest("full, as written"),
        "ratio_equal_work": lowest("equal work"),
        "device_augment_fraction": result["device"]["device_augment_fraction"],
        "load": [round(x, 2) for x in load],
        "machine": platform.processor() or platform.machine(),
        **result,
    }
    print("\n" + json.dumps({k: v for k, v in result.items() if not isinstance(v, (dict, list))}))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
