"""A plan as text: Markdown that also reads well on a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from eupe_jax.planning.plan import FREE_WANTED

OPERATIONS_SHOWN = 14
COLLECTIVES_SHOWN = 14


def markdown(plan: dict[str, Any]) -> str:
    """The whole report of `plan.make_plan`'s result."""
    parts = [f"# {_title(plan)}", _introduction(plan), "## Verdict", _verdict(plan), "## Run", _run(plan)]
    parts += ["## HBM of one device", _memory(plan), "## FLOPs", _flops(plan)]
    if any("step_seconds" in pair for pair in plan["pairs"]):
        parts += ["## Step time, predicted", _times(plan), "## Collectives", _collectives(plan)]
        parts += [_operations(pair) for pair in plan["pairs"] if "operations" in pair]
    parts += ["## Assumptions", "\n".join(f"- {sentence}" for sentence in plan["assumptions"])]
    return "\n\n".join(parts) + "\n"


def _title(plan: dict[str, Any]) -> str:
    slices = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
    return f"{plan['config']} on {slices}{plan['topology']}"


def _introduction(plan: dict[str, Any]) -> str:
    made = f"{', '.join(plan['versions'])}, this project's code {plan['code']}"
    lines = [f"Made {plan['date']} by launch/plan.py ({made}); everything is predicted."]
    if plan.get("overrides"):
        lines.append(f"Overrides: `{' '.join(plan['overrides'])}`.")
    return " ".join(lines)


def _verdict(plan: dict[str, Any]) -> str:
    free = plan["hbm_free_fraction"]
    if not plan["fits"]:
        lines = [f"- **does not fit**: {_over(plan)}"]
    else:
        enough = "" if free >= FREE_WANTED else f" (under the {FREE_WANTED:.0%} wanted)"
        lines = [f"- fits, {free:.0%} of the HBM free{enough}"]
    if plan["advice"]:
        lines.append(f"- first change to try: {plan['advice']}")
    lines += [f"- PROBLEM: {problem}" for problem in plan["problems"]]
    if plan["step_seconds"] is not None:
        lines += [
            f"- {milliseconds(plan['step_seconds'])} a step, {plan['images_per_second']:,.0f} images/s: "
            f"predicted MFU {plan['predicted_mfu']:.1%}",
            f"- {plan['total_steps']:,} steps: {plan['days']:.1f} days, {plan['chip_hours']:,.0f} chip-hours",
            f"- each of {plan['hosts']} hosts must bring {plan['images_per_second_per_host']:,.0f} images/s",
        ]
    return "\n".join(lines)


def _over(plan: dict[str, Any]) -> str:
    said = []
    for pair in plan["pairs"]:
        if not pair["fits"]:
            over, held = pair["hbm_needed"] - pair["hbm_capacity"], pair["largest_tensors"][:6]
            tensors = "; ".join(f"{gib(size)} {shape} ({origin})" for size, shape, origin in held)
            largest = f"; largest tensors: {tensors}" if tensors else ""
            said.append(
                f"{pair['pair']}: {gib(over)} over, {gib(pair['hbm_needed'])} of {gib(pair['hbm_capacity'])}{largest}"
            )
    return " | ".join(said)


def _run(plan: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    rows = [
        ("chips", f"{plan['chips']} {plan['chip']['name']} on {plan['hosts']} hosts, {plan['devices']} devices"),
        ("mesh", mesh),
        ("batch", f"{plan['batch_size']} a step, {plan['accumulate']} micro-batches of {plan['batch_per_device']:g}"
                  " a device"),
    ]  # fmt: skip
    for name, parts in plan["parameters"]["students"].items():
        sizes = ", ".join(f"{part} {millions(count)}" for part, count in parts.items())
        rows.append((f"student {name}", f"{sizes}; remat {plan['remat'][name]}{_kernels(plan, f'students.{name}')}"))
    for name, count in plan["parameters"]["teachers"].items():
        rows.append((f"teacher {name}", f"{millions(count)}{_kernels(plan, f'teachers.{name}')}"))
    options = " ".join(f"{k}={v}" for k, v in plan["compiler_options"].items())
    rows.append(("compiler options", options or "the compiler's own"))
    return table(("", ""), rows)


def _kernels(plan: dict[str, Any], model: str) -> str:
    return "".join(f"; {field} {value}" for field, value in plan["kernels"].get(model, {}).items())


def _memory(plan: dict[str, Any]) -> str:
    labels = [pair["pair"] for pair in plan["pairs"]]
    kinds = list(dict.fromkeys(kind for pair in plan["pairs"] for kind in pair["hbm_bytes"]))
    rows = [(kind, *(gib(pair["hbm_bytes"].get(kind, 0)) for pair in plan["pairs"])) for kind in kinds]
    rows.append(("**needed**", *(gib(pair["hbm_needed"]) for pair in plan["pairs"])))
    rows.append(("capacity", *(gib(pair["hbm_capacity"]) for pair in plan["pairs"])))
    rows.append(("free", *(f"{pair['hbm_free_fraction']:.1%}" for pair in plan["pairs"])))
    return table(("", *labels), rows)


def _flops(plan: dict[str, Any]) -> str:
    labels = [pair["pair"] for pair in plan["pairs"]]
    each = [pair["model_flops_per_image"] for pair in plan["pairs"]]
    rows: list[tuple[str, ...]] = []
    for kind, factor in (("teachers", 1), ("students", 3), ("adapters", 3)):
        for name in each[0][kind]:
            label = f"{kind.removesuffix('s')} {name}" if kind != "adapters" else f"adapters of {name}"
            rows.append((f"{label}, forward x {factor}", *(giga(factor * flops[kind][name]) for flops in each)))
    rows.append(("**model FLOPs**", *(giga(flops["per_image"]) for flops in each)))
    images = plan["batch_size"] / plan["devices"]
    terms = list(dict.fromkeys(term for pair in plan["pairs"] for term in pair["executed_flops_per_device"]))
    for term in terms:
        rows.append((f"executed: {term}", *(giga(p["executed_flops_per_device"].get(term, 0) / images)
                                            for p in plan["pairs"])))  # fmt: skip
    rows.append(("**executed, from the trace**", *(giga(sum(p["executed_flops_per_device"].values()) / images)
                                                   for p in plan["pairs"])))  # fmt: skip
    if all("program_flops_per_device" in pair for pair in plan["pairs"]):
        rows.append(("**found in the program**", *(
            f"{giga(p['program_flops_per_device'] / images)} ({p['flops_difference']:+.2%})" for p in plan["pairs"]
        )))  # fmt: skip
    text = "GFLOP an image.\n\n" + table(("", *labels), rows)
    ratios = [pair["xla_block_ratio"] for pair in plan["pairs"]]
    checks = [(name, *(f"{ratio[name]:.4f}" for ratio in ratios)) for name in ratios[0]]
    text += "\n\nXLA's own count of one more block, unrolled, over the count from the architecture (XLA also counts "
    return text + "norms and activations):\n\n" + table(("", *labels), checks)


def _times(plan: dict[str, Any]) -> str:
    columns = ("pair", "roofline", "compiler's cycles", "exposed collectives", "waiting for copies", "step", "MFU",
               "MFU by roofline")  # fmt: skip
    rows = [
        (p["pair"], milliseconds(p["roofline_seconds"]), milliseconds(p["compiler_seconds"]),
         milliseconds(p["exposed_seconds"]), milliseconds(p["copy_seconds"]), milliseconds(p["step_seconds"]),
         f"{p['predicted_mfu']:.1%}", f"{p['roofline_mfu']:.1%}")
        for p in plan["pairs"] if "step_seconds" in p
    ]  # fmt: skip
    text = table(columns, rows)
    kinds = [
        (p["pair"], *(milliseconds(p["kinds"].get(k, {"seconds": 0})["seconds"])
                      for k in ("matmul", "kernel", "layout", "other")))
        for p in plan["pairs"] if "kinds" in p
    ]  # fmt: skip
    text += "\n\nOf the compiler's cycles:\n\n"
    text += table(("pair", "products (fused with what follows)", "attention kernels", "copies", "other"), kinds)
    if len(plan.get("every_pair", ())) > len(plan["pairs"]):
        rows = [
            (e["pair"], milliseconds(e["step_seconds"]), f"{e['predicted_mfu']:.1%}",
             "compiled" if e["compiled"] else "arithmetic") for e in plan["every_pair"]
        ]  # fmt: skip
        text += "\n\nAll pairs, drawn equally often. By arithmetic: seconds = c + a x teachers' FLOPs + b x trained "
        text += "FLOPs through the compiled pairs. The stage's MFU is all work over all time.\n\n"
        text += table(("pair", "step", "MFU", ""), rows)
    return text


def _collectives(plan: dict[str, Any]) -> str:
    """Totals by network and kind; then the exposed ones by name."""
    sums: dict[tuple, list[float]] = {}
    for c in plan["collectives"]:
        entry = sums.setdefault((c["pair"], c["network"].upper(), c["kind"], c["axes"]), [0, 0.0, 0.0, 0.0])
        for i, key in enumerate(("runs", "bytes", "seconds", "exposed_seconds")):
            entry[i] += c[key]
    rows = [
        (*key, f"{runs:,}", gib(size), milliseconds(seconds), milliseconds(exposed))
        for key, (runs, size, seconds, exposed) in sorted(sums.items())
    ]
    columns = ("pair", "network", "kind", "axes", "runs", "bytes", "seconds", "exposed")
    exposed = sorted((c for c in plan["collectives"] if c["exposed_seconds"] > 0), key=lambda c: -c["exposed_seconds"])
    names = [
        (c["pair"], c["kind"], f"{c['group_size']} ({c['axes']})", f"{c['runs']:,} x {gib(c['bytes_each'])}",
         milliseconds(c["exposed_seconds"]), short(c["of"] or c["name"]))
        for c in exposed[:COLLECTIVES_SHOWN]
    ]  # fmt: skip
    text = table(columns, rows) + "\n\nExposed:\n\n"
    if not names:
        return text + "none."
    left = sum(c["exposed_seconds"] for c in exposed[COLLECTIVES_SHOWN:])
    more = f"\n\n{len(exposed) - COLLECTIVES_SHOWN} more: {milliseconds(left)}." if left else ""
    return text + table(("pair", "kind", "devices", "bytes", "exposed", "of"), names) + more


def _operations(pair: dict[str, Any]) -> str:
    rows = [
        (o["kind"], f"{o['runs']:,}", milliseconds(o["seconds"]), milliseconds(o["roofline_seconds"]),
         short(o["of"] or o["name"])) for o in pair["operations"][:OPERATIONS_SHOWN]
    ]  # fmt: skip
    return f"## Where the time goes, {pair['pair']}\n\n" + table(("kind", "runs", "cycles", "roofline", "of"), rows)


# ---- pieces


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, with columns of one width."""
    lines = [list(columns), *([cell.replace("|", "/") for cell in row] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]])


def gib(size: float) -> str:
    """Bytes in words: GiB, or MiB below a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def millions(count: int) -> str:
    """A count in millions."""
    return f"{count / 1e6:,.1f}M"


def giga(flops: float) -> str:
    """FLOPs in GFLOP."""
    return f"{flops / 1e9:,.2f}"


def milliseconds(seconds: float) -> str:
    """Seconds in words, as milliseconds."""
    return f"{seconds * 1e3:,.1f} ms"


def short(name: str, length: int = 90) -> str:
    """The end of an operation's name, where what it is stands."""
    return name if len(name) <= length else "..." + name[3 - length :]
