"""What benchmarks/executorch.py measures: one encoder in each runtime, as a function of no arguments that runs it once.

Exports (.pte, .onnx) are kept in a folder under names that change with the weights, the code that made them and the
versions of the libraries, so that a second benchmark only measures.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.precision import random_variables
from convert import lowering, to_executorch, weights
from eupe_jax.evals.pte import PteProgram
from eupe_jax.models import zoo
from eupe_jax.training.encoders import LoadedEncoder

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = ("executorch", "executorch_naive", "onnxruntime", "openvino", "torch_eager", "torch_compile")
INT8 = ("executorch", "onnxruntime")  # the runtimes that are measured in int8
NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino", "onnx", "onnxscript")}
# Files on which an export and the facts kept with it depend.
READABLE = ("convert/torch_*.py", "convert/lowering.py", "convert/delegation.py", "benchmarks/runtimes.py")
REWRITTEN = (
    *READABLE, "convert/contract.py", "convert/export_*.py", "convert/folding.py", "convert/quantize.py",
    "convert/to_executorch.py", "convert/weights.py", "eupe_jax/evals/pte.py",
)  # fmt: skip
LIBRARIES = ("executorch", "torch", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino")
Run = Callable[[], Sequence[Any]]


def missing(runtime: str) -> list[str]:
    """What a runtime needs and is not installed."""
    if runtime == "torch_compile" and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
        return ["g++ or clang++"]
    return [name for name in NEEDS.get(runtime, ()) if util.find_spec(name) is None]


def version(library: str) -> str:
    """The version of a library, empty where it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def random_encoder(name: str) -> LoadedEncoder:
    """An encoder of random weights, of which every one matters: LayerScale around 0.5, no bias 0, no norm 1."""
    spec, module = zoo.spec(name), zoo.build(name)
    variables = {"params": random_variables(module, spec.resolution)}
    start = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2 * spec.patch_size, 2 * spec.patch_size, 3)))
    if "buffers" in start:
        variables["buffers"] = jax.tree.map(np.asarray, start["buffers"])
    manifest = {"model": name, "overrides": {}, "resolution": spec.resolution}
    manifest |= {"mean": list(spec.mean), "std": list(spec.std)}
    return LoadedEncoder(name, {}, module, variables, manifest)


@dataclasses.dataclass
class Contender:
    """One runtime at one precision: `run` once, and `facts` for its record (file_bytes, planned_bytes, ...)."""

    runtime: str
    precision: str
    run: Run
    facts: dict[str, Any]


class _Tuple(nn.Module):
    """The readable module, returning a tuple as exporters want it, without kinds of tokens that it has none of."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for value in self.module(image).values() if value.numel())


class Exports:
    """Makes the files of one encoder at one input size, or finds those made before."""

    def __init__(self, encoder: LoadedEncoder, module: nn.Module, side: int, folder: Path):
        self.encoder, self.module, self.side, self.folder = encoder, module, side, folder.resolve()
        self.image = torch.zeros(1, 3, side, side)
        folder.mkdir(parents=True, exist_ok=True)

    def executorch(self, precision: str) -> tuple[Path, dict[str, Any]]:
        """The .pte that convert/to_executorch.py makes (ungated), with its report."""

        def make(path: Path) -> dict[str, Any]:
            made = to_executorch.export(self.encoder, self.side, precision=precision)
            path.write_bytes(made.pte)
            (method,) = made.report["methods"].values()
            facts = {"delegated_flops": method["delegation"]["share_of_flops"]}
            facts |= {"partitions": method["delegation"]["partitions"], "planned_bytes": method["planned_bytes"]}
            return facts | {"export_seconds": made.report["export_seconds"], "memory_bytes": resident(path)}

        return self._kept(f"{precision}.pte", make, REWRITTEN)

    def naive(self) -> tuple[Path, dict[str, Any]]:
        """The .pte of the readable module as it is, through the same partitioner."""

        def make(path: Path) -> dict[str, Any]:
            lowered = lowering.lower({"forward": (_Tuple(self.module), (self.image,))})
            path.write_bytes(lowered.pte)
            summary = lowered.delegation["forward"]
            facts = {"delegated_flops": summary["share_of_flops"], "partitions": summary["partitions"]}
            return facts | {"planned_bytes": lowered.planned_bytes["forward"]}

        return self._kept("naive.pte", make)

    def onnx(self, precision: str) -> tuple[Path, dict[str, Any]]:
        """ONNX of the readable module; int8: dynamic, weights per channel, matrix products only."""
        if precision == "fp32":
            return self._kept("fp32.onnx", self._export_onnx)

        def quantise(path: Path) -> dict[str, Any]:
            from onnxruntime import quantization

            logging.disable(logging.WARNING)  # advice to simplify a graph that the exporter has simplified
            source, _ = self.onnx("fp32")
            quantization.quantize_dynamic(source, path, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])
            logging.disable(logging.NOTSET)
            return {}

        return self._kept("int8.onnx", quantise)

    def _export_onnx(self, path: Path) -> dict[str, Any]:
        with lowering.quiet(), torch.no_grad():
            program = torch.onnx.export(_Tuple(self.module), (self.image,), dynamo=True, verbose=False)
            program.save(path)
        return {}

    def _kept(
        self, suffix: str, make: Callable[[Path], dict[str, Any]], code: Sequence[str] = READABLE
    ) -> tuple[Path, dict[str, Any]]:
        """The file, made unless it is there."""
        path = self.folder / f"{self.encoder.name}-{self.side}-{self._key(code)}-{suffix}"
        facts = path.with_name(path.name + ".json")
        if not facts.exists():  # written last
            found = make(path)
            facts.write_text(json.dumps(found))
        return path, json.loads(facts.read_text()) | {"file_bytes": path.stat().st_size}

    def _key(self, code: Sequence[str]) -> str:
        files = sorted(path for pattern in code for path in ROOT.glob(pattern))
        parts = [self._weights, *(version(name) for name in LIBRARIES), *(path.read_text() for path in files)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    @functools.cached_property
    def _weights(self) -> str:
        return weights.digest({name: value.numpy() for name, value in self.module.state_dict().items()})


def resident(pte: Path) -> int:
    """Bytes of anonymous memory that loading a program and running it once adds to a process of its own. Those of the
    file are not counted: phones map it.

    Raises:
      RuntimeError: it does not run there; with the last line that it printed.
    """
    script = """
import re, sys
from eupe_jax.evals.pte import PteProgram, set_threads
from pathlib import Path
import torch

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

set_threads(1)
pte = Path(sys.argv[1]).read_bytes()
before = anonymous()
program = PteProgram(pte)
(method, (height, width)), = program.sizes.items()
program.execute(method, torch.zeros(1, 3, height, width))
print(anonymous() - before)
"""
    done = subprocess.run([sys.executable, "-c", script, pte.resolve()], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(f"{pte} does not run in a process of its own: {said[-1]}")
    return int(done.stdout.split()[-1])


def executorch(exports: Exports, precision: str, threads: int, image: Tensor) -> Contender:
    path, facts = exports.executorch(precision)
    program = PteProgram(path.read_bytes(), path.name)
    (method,) = program.sizes
    return Contender("executorch", precision, lambda: program.execute(method, image), facts)


def executorch_naive(exports: Exports, precision: str, threads: int, image: Tensor) -> Contender:
    from executorch.runtime import Runtime

    path, facts = exports.naive()
    pte = path.read_bytes()
    method = Runtime.get().load_program(pte).load_method("forward")
    return Contender("executorch_naive", precision, lambda pte=pte: method.execute((image,)), facts)


def onnxruntime(exports: Exports, precision: str, threads: int, image: Tensor) -> Contender:
    path, facts = exports.onnx(precision)
    session = ort_session(str(path), threads)
    feed = {session.get_inputs()[0].name: image.numpy()}
    return Contender("onnxruntime", precision, lambda: session.run(None, feed), facts)


def ort_session(model: str | bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def openvino(exports: Exports, precision: str, threads: int, image: Tensor) -> Contender:
    path, facts = exports.onnx(precision)
    request = ov_request(str(path), threads)
    pixels = image.numpy()

    def run() -> list[np.ndarray]:
        return list(request.infer([pixels], share_inputs=True, share_outputs=True).values())

    return Contender("openvino", precision, run, facts)


def ov_request(model: str | bytes, threads: int) -> Any:
    """An OpenVINO request that computes in float32: where the CPU can, it would take bfloat16 unasked."""
    import openvino

    core = openvino.Core()
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    config |= {"NUM_STREAMS": "1", "ENABLE_CPU_PINNING": False}
    return core.compile_model(core.read_model(model), "CPU", config).create_infer_request()


def torch_eager(exports: Exports, precision: str, threads: int, image: Tensor) -> Contender:
    network = _Tuple(exports.module)

    @torch.inference_mode()
    def run() -> tuple[Tensor, ...]:
        return network(image)

    return Contender("torch_eager", precision, run, {})


def torch_compile(exports: Exports, precision: str, threads: int, image: Tensor) -> Contender:
    torch._dynamo.reset()  # generated code is for a fixed number of threads
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(exports.folder / "inductor"))
    network = torch.compile(_Tuple(exports.module))

    @torch.inference_mode()
    def run() -> tuple[Tensor, ...]:
        return network(image)

    run()
    return Contender("torch_compile", precision, run, {})


MAKERS = {maker.__name__: maker for maker in (executorch, executorch_naive, onnxruntime, openvino, torch_eager)}
MAKERS["torch_compile"] = torch_compile
