"""A training killed with SIGKILL at random moments, and resumed, ends as one that was not: bit for bit.

    python tests/train/kill_proof.py --kills 100

Trains once without interruption. Then trains the same again and again, each process killed after a random time and its
run resumed by the next, until the asked number of kills is reached; every training that ends is compared with the first:
each tensor of its last checkpoint, model and optimiser, and each record of its log but for the speed. A kill that left
a half-written or half-removed checkpoint behind is counted apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

from fastskel.data import make_synthetic, open_dataset
from fastskel.recipes import RECIPES
from fastskel.train import pretrain
from fastskel.train.checkpoint import newest

NUM_CLIPS, BATCH_SIZE = 16, 8
# a process lives this part of an uninterrupted training at most, so a training takes several
LONGEST_LIFE = 0.4
# imported once, by the server that processes are forked from; the optimiser would import the last one in each
PRELOADED = ["fastskel.train", "fastskel.recipes", "torch._dynamo"]
# after which the machine, not the training, is at fault
PATIENCE_SECONDS = 600


def train(data: str, out: str, epochs: int, precision: str) -> None:
    """Start or resume one small training with a checkpoint after every step."""
    # the lock of its own takes a semaphore, which a killed process leaves behind
    tqdm.set_lock(threading.RLock())
    dataset = open_dataset(data)
    recipe = replace(
        RECIPES["usdrl-demo"](), width=16, num_layers=1, frames=16, crop_min_frames=16, num_views=2, epochs=epochs,
        batch_size=BATCH_SIZE, milestones=(epochs // 2,), warmup_steps=5, precision=precision, checkpoint_steps=1,
    )  # fmt: skip
    (stage,) = recipe.stages(dataset)
    pretrain(stage, dataset, out, resume=Path(out).exists(), device="cpu", progress=False)


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
        del record["samples_per_s"]
    found["log"] = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    return found


def live(context: BaseContext, arguments: tuple[str, str, int, str], seconds: float) -> bool:
    """Let a process train; kill it after some seconds. Returns whether it ended by itself."""
    process = context.Process(target=train, args=arguments)  # type: ignore[attr-defined]
    process.start()
    process.join(seconds)
    ended = process.exitcode is not None
    if not ended:
        process.kill()
        process.join()
    elif process.exitcode != 0:
        raise SystemExit(f"FAILED: a training process ended with exit code {process.exitcode}")
    return ended


def where(run: Path) -> str:
    """What a kill interrupted, from what it left behind."""
    names = [path.name for path in (run / "checkpoints").glob(".*")]
    if not run.exists():
        return "before the run folder"
    if any(name.startswith(".doomed") for name in names):
        return "removing a checkpoint"
    return "writing a checkpoint" if names else "elsewhere"


def prove(kills: int, epochs: int, precision: str, seed: int, start: str, folder: Path) -> str:
    """Kill, resume, compare. Returns the summary; exits with an error at the first difference."""
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    data = str(make_synthetic(folder / "data", num_clips=NUM_CLIPS, num_classes=2, num_subjects=2).path)
    for name in ("warm-up", "whole"):
        # the first one waits for the imports
        began = time.perf_counter()
        live(context, (data, str(folder / name), epochs, precision), PATIENCE_SECONDS)
    seconds, expected = time.perf_counter() - began, digest(folder / "whole")
    chance, counts, trainings = random.Random(seed), Counter[str](), 0
    while counts.total() < kills:
        run = folder / f"killed-{trainings}"
        arguments = (data, str(run), epochs, precision)
        while True:
            left = counts.total() < kills
            if live(context, arguments, chance.uniform(0, LONGEST_LIFE * seconds) if left else PATIENCE_SECONDS):
                break
            counts[where(run)] += 1
        found = digest(run)
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if different:
            raise SystemExit(f"FAILED: training {trainings} differs after {counts.total()} kills in {different[:5]}")
        trainings += 1
    moments = ", ".join(f"{count} {moment}" for moment, count in counts.most_common())
    steps = epochs * (NUM_CLIPS // BATCH_SIZE)
    return (
        f"{counts.total()} kills ({moments}) over {trainings} trainings of {steps} steps, {precision}, seed {seed}: "
        f"all {len(expected) - 2} tensors and the log equal those of the uninterrupted training, bit for bit"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--start", choices=("forkserver", "spawn"), default="forkserver", help="how processes begin")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(prove(given.kills, given.epochs, given.precision, given.seed, given.start, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
