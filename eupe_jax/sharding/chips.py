"""What a chip can do at most, and topologies of chips that are not there.

Figures are public: compute, HBM bandwidth and interconnect from Cloud TPU's architecture pages (one a generation under
docs.cloud.google.com/tpu/docs), HBM capacity as the compiler reports it (a little is reserved), clocks as peak over the
multiply-adds a cycle of the matrix units. They hold for one *device* as JAX counts: a TPU7x chip is two devices, and so
is a v4 chip where its cores are not joined ("megacore", which is how v4 machines run).
"""

import dataclasses
import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peak figures of one device.

    Attributes:
      name: generation, "v5e".
      peak_flops: bfloat16 floating-point operations a second (a multiply-add counts two).
      hbm_bytes, hbm_bandwidth: memory that programs can use, bytes; bytes a second.
      clock_hz: cycles a second, for the compiler's own cycle counts.
      ici_bandwidth: bytes a second of a ring along one torus axis, both directions together; 90% of what is published
        for a link, which is what transfers reach.
      dcn_bandwidth: bytes a second between slices, a device's share of its host's network (an assumption: it depends on
        the machine).
      devices: devices a chip, as compile-only topologies and JAX count them.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    clock_hz: float
    ici_bandwidth: float
    dcn_bandwidth: float
    devices: int = 1


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 137.5e12, int(15.25 * GIB), 0.614e12, 1.05e9, 2 * 45e9 / 2, 6.25e9 / 2, devices=2),
        Chip("v5e", 197e12, int(15.75 * GIB), 0.82e12, 1.5e9, 2 * 45e9, 3.125e9),
        Chip("v5p", 459e12, int(95.74 * GIB), 2.765e12, 1.75e9, 2 * 90e9, 6.25e9),
        Chip("v6e", 918e12, int(31.25 * GIB), 1.64e12, 1.75e9, 2 * 90e9, 12.5e9),
        Chip("tpu7x", 1153.5e12, int(94.75 * GIB), 3.69e12, 2.2e9, 2 * 90e9 / 2, 12.5e9 / 2, devices=2),
    )
}
# Dense bfloat16 peaks, memory, clock and NVLink (one direction; PCI Express for cards whose bridges join only a few) of
# NVIDIA's data sheets: for the MFU that training prints. Nothing is planned for GPUs.
GPUS = {
    chip.name: chip
    for chip in (
        Chip("A100", 312e12, 80 * GIB, 2.04e12, 1.41e9, 300e9, 25e9),
        Chip("H100", 989e12, 80 * GIB, 3.35e12, 1.83e9, 450e9, 50e9),
        Chip("H100 PCIe", 756e12, 80 * GIB, 2.0e12, 1.62e9, 64e9, 50e9),
        Chip("H100 NVL", 835e12, 94 * 10**9, 3.9e12, 1.54e9, 64e9, 50e9),
        Chip("H200", 989e12, 141 * 10**9, 4.8e12, 1.83e9, 450e9, 50e9),
        Chip("H200 NVL", 835e12, 141 * 10**9, 4.8e12, 1.54e9, 64e9, 50e9),
    )
}

_KINDS = {  # device_kind -> name
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip

# Largest slice of each generation, along each axis of its torus.
_LARGEST = {"v4": (16, 16, 16), "v5e": (16, 16), "v5p": (16, 16, 24), "v6e": (16, 16), "tpu7x": (16, 16, 36)}
KNOWN = (
    "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16",
    "v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16",
    "v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8",
    "v5p:8x8x16", "v5p:8x16x16", "v5p:16x16x16", "v4:2x2x1", "v4:4x4x4", "v4:4x4x8", "tpu7x:2x2x1", "tpu7x:4x4x4",
)  # fmt: skip

# A compile-only client asks neither a metadata server nor the other hosts; two processes may compile at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # unread where the topology is named, but asked for
}


def chip_of(device: Any) -> Chip | None:
    """What `device` (a real one, or one of a topology) can do; None for a CPU or an unknown kind."""
    if name := _KINDS.get(device.device_kind):
        chip = CHIPS[name]
        if chip.devices > 1 and getattr(device, "num_cores", 1) == chip.devices:
            return _whole(chip)  # both cores of the chip are one device ("megacore")
        return chip
    return _gpu(device)


def _gpu(device: Any) -> Chip | None:
    """By the words of its name ("NVIDIA H100 PCIe"); None where it is only a part of one ("... MIG 1g.10gb")."""
    words = set(re.split(r"[ -]", device.device_kind))
    found = [gpu for name, gpu in GPUS.items() if words.issuperset(name.split())]
    if not found or "MIG" in words:
        return None
    gpu = max(found, key=lambda chip: len(chip.name.split()))
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # another process's device
        stats = {}
    # one kind comes with 40 and 80 GB, and a part of the memory may be reserved
    return dataclasses.replace(gpu, hbm_bytes=stats.get("bytes_limit", gpu.hbm_bytes))


def _whole(chip: Chip) -> Chip:
    fields = ("peak_flops", "hbm_bytes", "hbm_bandwidth", "ici_bandwidth", "dcn_bandwidth")
    return dataclasses.replace(chip, devices=1, **{f: getattr(chip, f) * chip.devices for f in fields})


def on_slice(chip: Chip, name: str) -> Chip:
    """`chip` in a slice of topology `name`: with half the bandwidth where an axis of more than one does not wrap.

    Slices of v5e and v6e wrap along axes of 16 chips, those of the other generations along multiples of 4.
    """
    unit = 16 if chip.name in ("v5e", "v6e") else 4
    if all(int(side) == 1 or int(side) % unit == 0 for side in name.partition(":")[2].split("x")):
        return chip
    return dataclasses.replace(chip, ici_bandwidth=chip.ici_bandwidth / 2)


def topology(name: str, slices: int = 1) -> list[jax.Device]:
    """Devices of `slices` slices of topology `name` ("v5e:16x16"), good for compiling and nothing else.

    Raises:
      ValueError: an unknown topology, or fewer than one slice; names what is known.
      ImportError: libtpu, which compiles for TPUs, is not installed.
    """
    _check(name, slices)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for TPUs needs libtpu (no TPU is needed): pip install 'eupe_jax[tpu]'")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device a chip, as v4 machines run; meshes need it
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={name}: {str(error).splitlines()[0]}; {_nearest(name)}") from None
    return list(devices)


def _nearest(name: str) -> str:
    generation = [known for known in KNOWN if known.split(":")[0] == name.partition(":")[0]]
    near = difflib.get_close_matches(name, generation or KNOWN, n=4, cutoff=0.5) or generation or KNOWN
    return f"such as {', '.join(near)}"


def _check(name: str, slices: int) -> None:
    generation, _, layout = name.partition(":")
    sides = tuple(int(side) for side in layout.split("x")) if re.fullmatch(r"\d+(x\d+)+", layout) else ()
    largest = _LARGEST.get(generation, ())
    fits = len(sides) == len(largest) and all(1 <= a <= b for a, b in zip(sorted(sides), sorted(largest), strict=True))
    if not fits or not sides:
        generations = ", ".join(_LARGEST)
        raise ValueError(f"--topology={name} is unknown: give GENERATION:SIDES, of {generations}, {_nearest(name)}")
    if slices < 1:
        raise ValueError(f"--slices={slices}: there must be at least one slice")
