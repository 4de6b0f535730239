"""Plan a training before it is started: memory, time of a step, bytes sent, time to finish; `fastskel plan`.

Operations, bytes and what is alive are counted on tensors without values (`fastskel.bench.plan_counts`); rates of a machine are
measured or its maker's; the rest is assumed. Every figure says which. The step as torch's own operators run it is counted, which
is what trains today; times are sums over launches of the longer of operations over the rate of products and bytes over that of a
copy, divided by the share of these rates that is reached. `python -m fastskel.bench.plan_check` puts a plan beside
measured steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from fastskel.bench.counting import COPY_BYTES_PER_S, MATMUL_FLOPS_PER_S
from fastskel.bench.machine import measure as measure_machine
from fastskel.bench.plan_counts import OPTIMIZER_STATES, Counts, count_step

from fastskel.data.packed import PackedDataset
from fastskel.recipes import USDRLRecipe
from fastskel.train import Stage

__all__ = ["MACHINES", "Figure", "Machine", "Plan", "Workload", "machine_of", "plan", "read_machine", "stage_of", "step_times"]

GIB, MIB = 2**30, 2**20
Basis = Literal["counted", "measured", "data sheet", "assumed", "predicted"]

# products reach 82 % of their rate, everything else 80 to 85 %: what docs/performance.md takes; not measured for this step
FILL = 0.8
# the rest of a GPU's memory is its context's, NCCL's, and lost between allocations
MEMORY_SHARE = 0.9
# what the host needs to start one operation of torch, and what one message between processes takes beside its bytes, for each
# doubling of the processes
LAUNCH_S, MESSAGE_S = 5e-6, 10e-6
# row loader-speed, native-float32 of bench/results/amd-epyc.jsonl: clips of 4 views (64, 2, 25, 3) by one core
LOADER_NUMBERS_PER_S = 69_614 * 4 * 64 * 2 * 25 * 3
# batches that native threads make ahead, and the one in use
LOADER_SLOTS = 3
# NTU RGB+D 60, cross-subject: clips to train on; and about how long they are
CLIPS, CLIP_FRAMES = 40_091, 80


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of one GPU, or of a processor, and of what connects it.

    Attributes:
        name: Of the machine.
        bf16: Operations per second of products of bfloat16; `fp32` of float32.
        copy: Bytes per second of a copy, read and written.
        memory: Bytes.
        link: Bytes per second that one process sends to another of its machine; `network` to another machine.
        gpu: Whether the host starts operations ahead of the device that runs them.
        rates: What the rates are, measured or promised; `memory_basis` and `links` what memory and connections are.
        source: Where all of it is from, for people.
    """

    name: str
    bf16: float
    fp32: float
    copy: float
    memory: float
    link: float
    network: float
    gpu: bool
    rates: Basis
    memory_basis: Basis
    links: Basis
    source: str


# NVLink's rates count both directions. The network is one adapter of 400 or 200 Gbit/s for each GPU, as the maker's own servers
# have
MACHINES = {
    "h200": Machine(
        "h200", MATMUL_FLOPS_PER_S, 67e12, COPY_BYTES_PER_S, 141e9, 450e9, 50e9, True, "measured", "data sheet", "data sheet",
        "bf16 products and copy measured on an H200 (bench/counting.py); fp32, memory and links NVIDIA's data sheet",
    ),
    "h100": Machine(
        "h100", 989e12, 67e12, 3.35e12, 80e9, 450e9, 50e9, True, "data sheet", "data sheet", "data sheet",
        "NVIDIA's data sheet, H100 SXM",
    ),
    "a100": Machine(
        "a100", 312e12, 19.5e12, 2.039e12, 80e9, 300e9, 25e9, True, "data sheet", "data sheet", "data sheet",
        "NVIDIA's data sheet, A100 SXM 80 GB",
    ),
}  # fmt: skip
# of a machine that only measured itself
LINK, NETWORK = 1e9, 1e9


def read_machine(name: str) -> Machine:
    """Return a machine by name, "this", or the file that `python -m fastskel.bench.machine --json` or `--out` made.

    A file may have `link_gb_per_s` and `network_gb_per_s` beside what was measured.

    Raises:
        ValueError: If there is no such name or file, or it lacks a rate.
    """
    if name in MACHINES:
        return MACHINES[name]
    if name == "this":
        return machine_of(measure_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "this machine")
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"plan: machine must be one of {', '.join(MACHINES)}, this, or a file, got {name!r}. Choose one.")
    text = path.read_text(encoding="utf-8").strip()
    try:
        return machine_of(json.loads(text.splitlines()[-1] if path.suffix == ".jsonl" else text), str(path))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"plan: machine must be what fastskel.bench.machine writes, got {path}: {type(error).__name__} {error}. "
            "Make it with --json."
        ) from error


def machine_of(facts: dict[str, Any], name: str) -> Machine:
    """Make a machine of what `fastskel.bench.machine.measure` found.

    Raises:
        KeyError: If a rate is missing.
    """
    gpu = bool(facts.get("gpu"))
    fp32, bf16 = (1e12 * facts[f"matmul_{kind}_tflop_per_s"] for kind in ("fp32", "bf16"))
    link, network = (1e9 * float(facts.get(key) or default / 1e9) for key, default in
                     (("link_gb_per_s", LINK), ("network_gb_per_s", NETWORK)))  # fmt: skip
    memory = GIB * facts["gpu_memory_gib" if gpu else "memory_gib"]
    links: Basis = "measured" if facts.get("link_gb_per_s") else "assumed"
    copy = 1e9 * facts["copy_gb_per_s"]
    source = f"measured, {facts.get('device', name)}"
    return Machine(name, bf16, fp32, copy, memory, link, network, gpu, "measured", "measured", links, source)


@dataclass(frozen=True)
class Workload:
    """What is trained on, and by how many.

    Attributes:
        gpus: Processes, each with a GPU.
        gpus_per_node: Most of them in one machine.
        clips: Clips of the training part.
        clip_frames: Mean frames of a clip, as they are stored.
        joints: V.
        bodies: M.
        fill: Share of the machine's rates that the step reaches.
    """

    gpus: int = 1
    gpus_per_node: int = 8
    clips: int = CLIPS
    clip_frames: int = CLIP_FRAMES
    joints: int = 25
    bodies: int = 2
    fill: float = FILL

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "clips", "clip_frames", "joints", "bodies"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} must be at least 1, got {getattr(self, name)}. Give a larger number.")
        if not 0 < self.fill <= 1:
            raise ValueError(f"plan: fill must be in (0, 1], got {self.fill}. It is the share of the machine's rates.")


@dataclass(frozen=True)
class Figure:
    """One line of a plan: part, name, number, its unit, and whether it is counted, measured, assumed or predicted."""

    part: str
    name: str
    value: float
    unit: str
    basis: Basis


@dataclass(frozen=True)
class Plan:
    """What is expected of a training.

    Attributes:
        title: What was planned, in a line.
        figures: All of them, in order.
        notes: What to know beside them.
    """

    title: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> float:
        return next(figure.value for figure in self.figures if figure.name == name)

    def table(self) -> str:
        """Lay the figures out for people."""
        lines, width = [self.title], max(len(figure.name) for figure in self.figures)
        for part in dict.fromkeys(figure.part for figure in self.figures):
            lines += ["", part]
            for figure in (each for each in self.figures if each.part == part):
                lines.append(f"  {figure.name:<{width}} {_number(figure.value):>12} {figure.unit:<10} {figure.basis}")
        return "\n".join([*lines, "", *self.notes])

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def stage_of(recipe: USDRLRecipe, joints: int, bodies: int) -> Stage:
    """Return a recipe's stage for clips (T, M, V, 3) that are not there yet."""
    shape = SimpleNamespace(frames=SimpleNamespace(shape=(0, bodies, joints, 3)))
    (stage,) = recipe.stages(cast(PackedDataset, shape))
    return stage


@dataclass(frozen=True)
class Times:
    """Seconds of a step of one process: products, everything else that moves bytes, starting them, and exchanges.

    Attributes:
        gradients: Of the exchange of gradients, most of which the backward pass of the last chunk may hide.
        hidden: What it may hide.
    """

    products: float
    moving: float
    starting: float
    exchanges: float
    gradients: float
    hidden: float
    gpu: bool

    @property
    def computing(self) -> float:
        """Until the device is done: a GPU works while the host starts what follows."""
        working = self.products + self.moving
        return max(working, self.starting) if self.gpu else working + self.starting

    @property
    def exposed(self) -> float:
        """Of the exchange of gradients, what the step waits for."""
        return max(self.gradients - self.hidden, 0.0)

    @property
    def step(self) -> float:
        """The whole step."""
        return self.computing + self.exchanges + self.exposed

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {
            "matrix products": self.products, "memory traffic": self.moving, "the host's launches": self.starting,
            "communication": self.exchanges + self.exposed,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


def step_times(counts: Counts, stage: Stage, machine: Machine, workload: Workload) -> Times:
    """Predict the times of a step over views (n, T, M, V, C) from its counts."""
    products = moving = last_backward = 0.0
    for phase, (times, entries) in counts.phases.items():
        low = stage.precision != "fp32" and phase not in ("loss", "optimiser")
        rate = machine.bf16 if low else machine.fp32
        own = [max(e.flops / rate, e.bytes / machine.copy) / workload.fill for e in entries]
        products += times * sum(s for s, e in zip(own, entries, strict=True) if e.is_product)
        moving += times * sum(s for s, e in zip(own, entries, strict=True) if not e.is_product)
        if phase == "backward":
            last_backward = sum(own)
    # a ring is as fast as its slowest connection
    rate = machine.link if workload.gpus <= workload.gpus_per_node else machine.network
    message = MESSAGE_S * math.log2(max(workload.gpus, 2))
    exchanges, gradients = (t.sent / rate + message * t.messages if t.world > 1 else 0.0
                            for t in (counts.traffic, counts.gradients))  # fmt: skip
    starting = LAUNCH_S * counts.launches
    return Times(products, moving, starting, exchanges, gradients, last_backward, machine.gpu)


def plan(name: str, recipe: USDRLRecipe, machine: Machine, workload: Workload) -> Plan:
    """Plan a training.

    Args:
        name: Of the recipe.
        recipe: Its settings; batch and chunk count the clips of all processes.
        machine: What each process runs on.
        workload: Data of clips (T, M, V, C), and processes.
    Raises:
        ValueError: If the batch cannot be shared out, or is larger than the data.
    """
    stage = stage_of(recipe, workload.joints, workload.bodies)
    if stage.batch_size > workload.clips:
        raise ValueError(
            f"plan: batch_size must be at most the {workload.clips} clips, got {stage.batch_size}. An epoch would have no step."
        )
    world = workload.gpus
    counts = count_step(stage, world, gpu=machine.gpu)
    times = step_times(counts, stage, machine, workload)
    efficiency = 1.0
    if world > 1:
        chunk = counts.chunk_rows if stage.batch_size > counts.chunk_rows else None
        # the same batch and chunks: also what one could not hold at once
        alone = replace(stage, chunk=chunk)
        single = step_times(count_step(alone, 1, gpu=machine.gpu), alone, machine, replace(workload, gpus=1))
        efficiency = single.step / (world * times.step)
    figures = (*_memory(stage, counts, machine), *_speed(stage, counts, times, machine, workload, efficiency))
    parts = "in one piece" if counts.chunks == 1 else f"in {counts.chunks} chunks of at most {counts.chunk_rows}"
    title = (
        f"{name} on {world} x {machine.name}: batch {stage.batch_size:,}, {counts.rows:,} clips in each process {parts}, "
        f"{stage.precision}, {stage.optimizer}"
    )
    return Plan(title, figures, _notes(stage, counts, times, machine, workload, figures))


def _state(stage: Stage, counts: Counts) -> dict[str, int]:
    weight = 4 * counts.parameters
    return {
        "weights": weight, f"state of {stage.optimizer}": OPTIMIZER_STATES[stage.optimizer] * weight,
        "running average": 4 * counts.encoder_parameters if stage.average else 0,
    }  # fmt: skip


def _view_numbers(stage: Stage) -> int:
    """Numbers of all views of a clip."""
    sizes = (int(stage.encoder_options[f"num_{name}"]) for name in ("frames", "bodies", "joints", "channels"))
    return len(stage.views) * math.prod(sizes)


def _memory(stage: Stage, counts: Counts, machine: Machine) -> list[Figure]:
    state, gradients = _state(stage, counts), 4 * counts.parameters
    clip = 4 * _view_numbers(stage)
    # those in use, and the next ones on their way
    views = 2 * counts.chunk_rows * clip
    total = sum(state.values()) + counts.peak + views
    batch = counts.embeddings * (2 if counts.chunks > 1 else 1)
    working = max(counts.chunk_peak - gradients, 1)
    room = MEMORY_SHARE * machine.memory - sum(state.values()) - gradients - 2 * counts.embeddings
    largest = max(int(room / (working / counts.chunk_rows + 2 * clip)), 0)
    found = [Figure("memory of each process", "parameters", counts.parameters, "", "counted")]
    lines = {
        **state, "gradients": gradients, "views on the device": views, "activations of a chunk": counts.activations,
        "embeddings of the batch" + (", and their gradient" if counts.chunks > 1 else ""): batch,
        "what the loss has alive": counts.loss_peak, "most of all at a time": total,
    }  # fmt: skip
    found += [Figure(found[0].part, key, value / GIB, "GiB", "counted") for key, value in lines.items()]
    per_view = counts.activations / counts.chunk_rows / len(stage.views) / 1e6
    return [
        *found, Figure(found[0].part, "activations of a view", per_view, "MB", "counted"),
        Figure(found[0].part, "memory there is", machine.memory / GIB, "GiB", machine.memory_basis),
        Figure(found[0].part, "largest chunk of a process", largest, "clips", "predicted"),
        Figure(found[0].part, "loader slots, host", LOADER_SLOTS * counts.chunk_rows * clip / GIB, "GiB", "counted"),
    ]  # fmt: skip


def _speed(
    stage: Stage, counts: Counts, times: Times, machine: Machine, workload: Workload, efficiency: float
) -> list[Figure]:
    steps = workload.clips // stage.batch_size
    rate = stage.batch_size / times.step
    # a batch in chunks is read twice
    made = rate * (2 if counts.chunks > 1 else 1) * _view_numbers(stage)
    read = made / _view_numbers(stage) * workload.clip_frames * workload.bodies * workload.joints * 3 * 4
    nodes = -(-workload.gpus // workload.gpus_per_node)
    lines: dict[str, list[tuple[str, float, str, Basis]]] = {
        "one step of one process": [
            ("operations", counts.flops / 1e12, "TFLOP", "counted"),
            ("bytes moved", counts.bytes_moved / 1e9, "GB", "counted"),
            ("launches", counts.launches, "", "counted"),
            ("sent for gradients", counts.gradients.sent / 1e6, "MB", "counted"),
            ("sent for the loss and norms", counts.traffic.sent / 1e6, "MB", "counted"),
            ("share of rates that is reached", workload.fill, "", "assumed"),
            ("matrix products", 1e3 * times.products, "ms", "predicted"),
            ("memory traffic", 1e3 * times.moving, "ms", "predicted"),
            ("the host's launches", 1e3 * times.starting, "ms", "assumed"),
            ("exchanges of the loss", 1e3 * times.exchanges, "ms", "predicted"),
            ("exchange of gradients, not hidden", 1e3 * times.exposed, "ms", "predicted"),
            ("step", 1e3 * times.step, "ms", "predicted"),
        ],
        "the training": [
            ("clips per second", rate, "", "predicted"),
            ("steps", steps * stage.epochs, "", "counted"),
            ("time to finish", steps * stage.epochs * times.step / 3600, "h", "predicted"),
            ("efficiency against one GPU", 100 * efficiency, "%", "predicted"),
            ("loader cores for each GPU", made / workload.gpus / LOADER_NUMBERS_PER_S, "", "predicted"),
            ("read from disk by each machine", read / nodes / 1e9, "GB/s", "predicted"),
        ],
    }
    return [Figure(part, *line) for part, several in lines.items() for line in several]


def _notes(
    stage: Stage, counts: Counts, times: Times, machine: Machine, workload: Workload, figures: Sequence[Figure]
) -> tuple[str, ...]:
    notes = [f"bound by {times.bound}; rates: {machine.source}; links: {machine.links}"]
    total = next(f.value for f in figures if f.name == "most of all at a time") * GIB
    if total > MEMORY_SHARE * machine.memory:
        notes.append(
            f"does not fit: {total / GIB:.1f} GiB are more than {100 * MEMORY_SHARE:.0f} % of the memory; take a smaller chunk"
        )
    if counts.chunks > 1 and not stage.synchronise_norms:
        notes.append(f"BatchNorm takes the statistics of {counts.chunk_rows} clips at a time")
    notes.append(
        f"loader: {LOADER_NUMBERS_PER_S / 1e9:.2f}e9 numbers per second and core, measured on an AMD EPYC; mean clip of "
        f"{workload.clip_frames} frames and no page cache assumed"
    )
    return tuple(notes)
