"""A training killed at random moments, and resumed, ends as one that was not: bit for bit.

    python tests/train/kill_proof.py --kills 100
    python tests/train/kill_proof.py --kills 100 --processes 2 --signals KILL TERM

Trains once without interruption. Then trains the same again and again, ended after a random time by SIGKILL or SIGTERM and
resumed by the next, until the asked number of kills is reached; of several processes that train together one, or all, are
sent the signal, and those that are left end by themselves. Every training that ends is compared with the first:
each tensor of its last checkpoint, model and optimiser, and each record of its log but for its times. A kill that left
a half-written or half-removed checkpoint behind is counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

from fastskel.data import make_synthetic, open_dataset
from fastskel.recipes import RECIPES
from fastskel.train import Preempted, TrainingStopped, pretrain
from fastskel.train.checkpoint import newest
from fastskel.train.runlog import TIMINGS

NUM_CLIPS, BATCH_SIZE = 16, 8
# a process lives this part of an uninterrupted training at most, so a training takes several
LONGEST_LIFE = 0.4
# imported once, by the server that processes are forked from; the optimiser would import the last one in each
PRELOADED = ["fastskel.train", "fastskel.recipes", "torch._dynamo"]
# after which the machine, not the training, is at fault
PATIENCE_SECONDS = 600
# how long processes that lost another one may take to end by themselves, and asked to
GRACE_SECONDS = 15
# exit codes: saved and asked to go on, and left alone by a process that was killed
SAVED, LEFT = 75, 3


@dataclass(frozen=True)
class Training:
    """One small training with a checkpoint after every step, as each of its processes is told."""

    data: str
    run: str
    epochs: int
    precision: str
    processes: int


def train(told: Training, rank: int, port: int) -> None:
    """Start or resume it."""
    if told.processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": told.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
    # the lock of its own takes a semaphore, which a killed process leaves behind
    tqdm.set_lock(threading.RLock())
    dataset = open_dataset(told.data)
    recipe = replace(
        RECIPES["usdrl-demo"](), width=16, num_layers=1, frames=16, crop_min_frames=16, num_views=2, epochs=told.epochs,
        batch_size=BATCH_SIZE, milestones=(told.epochs // 2,), warmup_steps=5, precision=told.precision, checkpoint_steps=1,
        average=0.9,
    )  # fmt: skip
    (stage,) = recipe.stages(dataset)
    try:
        pretrain(stage, dataset, told.run, resume="if-started", device="cpu", progress=False)
    except Preempted:
        sys.exit(SAVED)
    except TrainingStopped:
        sys.exit(LEFT)


def digest(run: Path) -> dict[str, str]:
    """Sha256 of every tensor of the last checkpoint, and of the log without its times."""
    checkpoint = newest(run)
    assert checkpoint is not None, f"{run} has no checkpoint"
    found = {"step": checkpoint.name}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, value in load_file(path).items():
            about = f"{value.dtype} {tuple(value.shape)} ".encode()
            found[f"{path.stem}/{name}"] = hashlib.sha256(about + value.numpy().tobytes()).hexdigest()
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in records:
        for name in TIMINGS & record.keys():
            del record[name]
    found["log"] = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def live(context: BaseContext, told: Training, seconds: float, number: int, victims: Sequence[int]) -> bool:
    """Let processes train; send some of them a signal after some seconds. Returns whether they ended by themselves."""
    port = free_port()
    together = [
        context.Process(target=train, args=(told, rank, port))  # type: ignore[attr-defined]
        for rank in range(told.processes)
    ]
    for process in together:
        process.start()
    end = time.monotonic() + seconds
    for process in together:
        process.join(max(0.0, end - time.monotonic()))
    ended = all(process.exitcode is not None for process in together)
    for rank in [] if ended else victims:
        # it may have ended in this moment
        with contextlib.suppress(ProcessLookupError):
            os.kill(together[rank].pid, number)
    for process in together:
        process.join(GRACE_SECONDS)
        # as torchrun does: one that waits for a process which died before it arrived would wait for minutes
        process.terminate()
    for process in together:
        process.join(GRACE_SECONDS)
    codes = [process.exitcode for process in together]
    if None in codes:
        raise SystemExit(f"FAILED: processes must end when they are asked to, got exit codes {codes}")
    done = all(code == 0 for code in codes)
    if (ended and not done) or not set(codes) <= {0, SAVED, LEFT, -signal.SIGKILL, -signal.SIGTERM}:
        raise SystemExit(f"FAILED: training processes ended with exit codes {codes}")
    return done


def where(run: Path) -> str:
    """What a kill interrupted, from what it left behind."""
    names = [path.name for path in (run / "checkpoints").glob(".*")]
    if not run.exists():
        return "before the run folder"
    if any(name.startswith(".doomed") for name in names):
        return "removing a checkpoint"
    return "writing a checkpoint" if names else "elsewhere"


def prove(told: Training, kills: int, signals: Sequence[str], seed: int, start: str, folder: Path) -> str:
    """Kill, resume, compare. Returns the summary; exits with an error at the first difference."""
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    told = replace(told, data=str(make_synthetic(folder / "data", num_clips=NUM_CLIPS, num_classes=2, num_subjects=2).path))
    for name in ("warm-up", "whole"):
        # the first one waits for the imports
        began = time.perf_counter()
        live(context, replace(told, run=str(folder / name)), PATIENCE_SECONDS, signal.SIGKILL, [])
    seconds, expected = time.perf_counter() - began, digest(folder / "whole")
    chance, moments, sent, trainings = random.Random(seed), Counter[str](), Counter[str](), 0
    while moments.total() < kills:
        run = folder / f"killed-{trainings}"
        while True:
            left = moments.total() < kills
            name, all_of_them = chance.choice(signals), chance.random() < 0.5
            victims = range(told.processes) if all_of_them else [chance.randrange(told.processes)]
            life = chance.uniform(0, LONGEST_LIFE * seconds) if left else PATIENCE_SECONDS
            if live(context, replace(told, run=str(run)), life, getattr(signal, f"SIG{name}"), victims):
                break
            moments[where(run)] += 1
            sent[f"{name} of {'all' if len(victims) == told.processes else 'one'}"] += 1
        found = digest(run)
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if different:
            raise SystemExit(f"FAILED: training {trainings} differs after {moments.total()} kills in {different[:5]}")
        trainings += 1

    def shown(counts: Counter[str]) -> str:
        return ", ".join(f"{count} {what}" for what, count in counts.most_common())

    steps = told.epochs * (NUM_CLIPS // BATCH_SIZE)
    return (
        f"{moments.total()} kills ({shown(moments)}; {shown(sent)}) over {trainings} trainings of {steps} steps in "
        f"{told.processes} process{'es' if told.processes > 1 else ''}, {told.precision}, seed {seed}: "
        f"all {len(expected) - 2} tensors and the log equal those of the uninterrupted training, bit for bit"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--signals", nargs="+", choices=("KILL", "TERM"), default=["KILL"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--start", choices=("forkserver", "spawn"), default="forkserver", help="how processes begin")
    given = parser.parse_args()
    told = Training("", "", given.epochs, given.precision, given.processes)
    with tempfile.TemporaryDirectory() as folder:
        print(prove(told, given.kills, given.signals, given.seed, given.start, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
