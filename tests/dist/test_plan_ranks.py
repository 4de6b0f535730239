"""Bytes that a plan says processes exchange, against those that 2 processes hand to torch.distributed."""

from __future__ import annotations

import datetime
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fastskel.bench.plan import stage_of
from fastskel.bench.plan_check import make_step
from fastskel.bench.plan_counts import count_step
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from fastskel.recipes import RECIPES
from fastskel.train import Stage

WORLD, JOINTS, BODIES = 2, 13, 1
CASES = {
    # few samples and wide embeddings: all rows are gathered; many and narrow ones: D x D matrices are summed
    "gathered": dict(width=32, batch_size=16), "summed": dict(width=8, batch_size=512, num_views=2),
    "chunks": dict(width=16, batch_size=48, chunk=16), "norms": dict(width=16, batch_size=16, synchronise_norms=True),
    "bf16": dict(width=16, batch_size=16, precision="bf16"),
}  # fmt: skip


def make_stage(case: str) -> Stage:
    recipe = replace(RECIPES["usdrl-demo"](), frames=16, crop_min_frames=16, num_layers=1, drop_path=0.0, **CASES[case])
    return stage_of(recipe, JOINTS, BODIES)


def exchanged(case: str) -> list[int]:
    """Count the bytes of sums, of gathered results, and of gradients in one step."""
    found = {"summed": 0, "gathered": 0, "gradients": 0}
    differentiate, _, gradients = make_step(make_stage(case), WORLD)
    module = getattr(gradients, "module", None) or gradients.step

    def counting(name, key, position):
        original = getattr(dist, name)

        def call(*args, **options):
            found[key] += args[position].numel() * args[position].element_size()
            return original(*args, **options)

        return call

    def hook(state, bucket):
        found["gradients"] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    module.register_comm_hook(None, hook)
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting("all_reduce", "summed", 0))
        patch.setattr(dist, gather, counting(gather, "gathered", 0))
        differentiate()
    # the hook sums buckets by the same function
    found["summed"] -= found["gradients"]
    return list(found.values())


def test_bytes_are_those_that_are_exchanged(run_processes) -> None:
    ranks = run_processes(__file__, WORLD)
    assert ranks[0] == ranks[1]
    for case in CASES:
        counts = count_step(make_stage(case), WORLD, gpu=False)
        summed, gathered, gradients = ranks[0][case]
        assert (counts.traffic.summed, counts.traffic.gathered) == (summed, gathered), case
        assert counts.gradients.summed == gradients, case
    # both forms were met
    assert ranks[0]["gathered"][1] > 2 * ranks[0]["gathered"][0]
    assert ranks[0]["summed"][0] > 2 * ranks[0]["summed"][1]


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(minutes=2))
    # torch looks for parameters that no process used, and finds none
    warnings.filterwarnings("ignore", message=".*find_unused_parameters")
    torch.save({case: exchanged(case) for case in CASES}, folder / f"{rank}.pt")
    dist.destroy_process_group()
