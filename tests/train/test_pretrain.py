"""The training loop: what it leaves behind, resuming bit for bit, and which folders and settings it resumes."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastskel.data import Loader, PackedDataset, make_synthetic
from fastskel.data.identity import dataset_identity
from fastskel.objectives import MGFD
from fastskel.recipes import RECIPES
from fastskel.train import Stage, checkpoint, load_encoder, pretrain, read_checkpoint, trained_clips
from fastskel.train.runlog import TIMINGS

NUM_CLIPS, BATCH_SIZE = 24, 8
TERMS = [f"{term}_{domain}" for domain in "tsi" for term in ("sim", "vac", "xcorr")]


class Interrupted(BaseException):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("data") / "packed"
    return make_synthetic(folder, num_clips=NUM_CLIPS, num_classes=3, num_subjects=4)


def make_stage(dataset: PackedDataset, *, name: str = "pretrain", **settings) -> Stage:
    small = dict(
        width=16, num_layers=1, frames=16, crop_min_frames=16, num_views=2, batch_size=BATCH_SIZE, epochs=2,
        milestones=(1,), warmup_steps=2, lr=5e-4, shear=1.0,
    )  # fmt: skip
    (stage,) = replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)
    return replace(stage, name=name)


def train(dataset: PackedDataset, out: Path, *, stage: Stage | None = None, **options) -> Path:
    return pretrain(stage or make_stage(dataset), dataset, out, device="cpu", progress=False, **options)


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def everything(run: Path) -> dict:
    """What must not depend on interruptions: last checkpoint, position, and log without its speeds."""
    last = checkpoint.newest(run)
    found = {path.name: load_file(path) for path in last.glob("*.safetensors")}
    log = [{k: v for k, v in record.items() if k not in TIMINGS} for record in log_of(run)]
    return {**found, "state": json.loads((last / "state.json").read_text()), "log": log}


def assert_same(found: dict, expected: dict) -> None:
    for kind in ("model.safetensors", "optimizer.safetensors"):
        assert found[kind].keys() == expected[kind].keys()
        # as bytes: equal bits, not equal numbers
        different = [
            name
            for name, value in expected[kind].items()
            if value.dtype != found[kind][name].dtype or value.numpy().tobytes() != found[kind][name].numpy().tobytes()
        ]
        assert different == []
    assert found["log"] == expected["log"]
    assert found["state"] == expected["state"]


def interrupt(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the n-th step from now on end the process, after the optimiser and before any checkpoint."""
    left = [steps]

    def after_step(self: MGFD) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted

    monkeypatch.setattr(MGFD, "after_step", after_step)


def train_in_pieces(monkeypatch, dataset, out, stage, steps, **options) -> int:
    """Train, interrupted after every so many steps; returns the number of interruptions."""
    for interruptions in range(100):
        interrupt(monkeypatch, steps)
        try:
            train(dataset, out, stage=stage, resume=out.exists(), **options)
        except Interrupted:
            continue
        return interruptions
    raise AssertionError("the training never ends")


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    """A finished run with a checkpoint after each epoch; only to be read."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(dataset, run, recipe={"name": "usdrl-demo", "protocol": None})
    return run


def test_run_folder(dataset, finished) -> None:
    assert sorted(path.name for path in finished.iterdir()) == ["checkpoints", "config.json", "log.jsonl"]
    assert checkpoints(finished) == ["step-000000003", "step-000000006"]
    last = finished / "checkpoints" / "step-000000006"
    assert sorted(path.name for path in last.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"] == {"name": "usdrl-demo", "protocol": None}
    assert config["command"] == sys.argv
    assert {"python", "torch", "numpy", "fastskel", "triton"} == config["versions"].keys()
    assert config["versions"]["torch"] == metadata.version("torch")
    assert (config["data"], config["device"]) == (str(dataset.path), "cpu")
    assert "commit" in config
    assert config["identity"]["stage"]["lr"] == 5e-4
    assert config["identity"]["data"] == config["described"]["sha256"] == dataset_identity(dataset)
    told = {key: config["described"][key] for key in ("source", "topology", "units", "up_axis", "channels")}
    assert told == {key: dataset.meta[key] for key in told}
    assert config["threads"] == torch.get_num_threads()
    state = json.loads((last / "state.json").read_text())
    assert (state["step"], state["total_steps"], state["topology"]) == (6, 6, "ntu-25")
    assert (state["epoch"], state["loader"]["epoch"], state["loader"]["position"]) == (2, 2, 0)
    first = json.loads((last.with_name("step-000000003") / "state.json").read_text())
    assert (first["epoch"], first["step"]) == (1, 3)
    # of the step that comes next
    assert first["optimizer"] == {"name": "adam", "lr": pytest.approx(5e-5), "weight_decay": 1e-5}
    assert read_checkpoint(finished).path == last
    encoder, view, _ = load_encoder(finished)
    assert (encoder.num_features, view.frames, encoder.training) == (32, 16, False)


def test_log_names_every_term(dataset, finished) -> None:
    records = log_of(finished)
    assert [record["step"] for record in records] == list(range(6))
    assert [record["epoch"] for record in records] == [0, 0, 0, 1, 1, 1]
    for record in records:
        # the rank is read in the first record of an epoch, and in the last
        ranked = {"embedding_rank"} if record["step"] in (0, 3, 5) else set()
        times = {"samples_per_s", "model_tflop_per_s", "mfu", "data_stall", "memory_gib"}
        assert set(record) == {"step", "epoch", "lr", "loss", "embedding_std", "gradient_norm", *times, *ranked, *TERMS}
        assert record["samples_per_s"] > 0 and 0 <= record["data_stall"] < 1 and 0.05 < record["memory_gib"] < 64
        assert all(1 < record[name] <= BATCH_SIZE for name in ranked)
        # both sums are of fp32 numbers, in another order
        similar, correlated = (
            record[f"{term}_i"] + 0.5 * (record[f"{term}_t"] + record[f"{term}_s"]) for term in ("sim", "xcorr")
        )
        varied = record["vac_i"] + 0.5 * (record["vac_t"] + record["vac_s"])
        assert record["loss"] == pytest.approx(5 * similar + varied + 1e-3 * correlated, rel=1e-5)
    assert [record["lr"] for record in records] == pytest.approx([2.5e-4, 5e-4, 5e-4, 5e-5, 5e-5, 5e-5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpoint_steps, steps", [(1, 2), (3, 4), (0, 4)], ids=["each", "third", "epoch"])
def test_resuming_changes_no_bit(dataset, tmp_path, monkeypatch, precision, checkpoint_steps, steps) -> None:
    # one step is done again after every interruption; each one leaves the run at another step
    stage = make_stage(dataset, precision=precision, checkpoint_steps=checkpoint_steps)
    monitors = [lambda encoder, epoch: {"norm": float(sum(p.detach().norm() for p in encoder.parameters()))}]
    train(dataset, tmp_path / "whole", stage=stage, monitors=monitors)
    interruptions = train_in_pieces(monkeypatch, dataset, tmp_path / "pieces", stage, steps, monitors=monitors)
    assert interruptions == (5 if checkpoint_steps == 1 else 1)
    assert_same(everything(tmp_path / "pieces"), everything(tmp_path / "whole"))
    config = json.loads((tmp_path / "pieces" / "config.json").read_text())
    steps_resumed = [1, 2, 3, 4, 5] if checkpoint_steps == 1 else [3]
    assert [session["step"] for session in config["resumed"]] == steps_resumed
    assert config["resumed"][0]["versions"] == config["versions"]


def test_resuming_before_the_first_checkpoint(dataset, tmp_path, monkeypatch, finished) -> None:
    interrupt(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(dataset, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []
    assert len(log_of(tmp_path / "run")) == 2
    monkeypatch.undo()
    train(dataset, tmp_path / "run", resume=True)
    assert_same(everything(tmp_path / "run"), everything(finished))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_threads_change_nothing(dataset, tmp_path, finished, num_threads) -> None:
    train(dataset, tmp_path / "run", stage=make_stage(dataset, num_threads=num_threads))
    assert_same(everything(tmp_path / "run"), everything(finished))


def test_a_resumed_run_may_change_what_changes_no_bit(dataset, tmp_path, monkeypatch, finished) -> None:
    interrupt(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(dataset, tmp_path / "run")
    monkeypatch.undo()
    stage = make_stage(dataset, name="again", num_threads=2, checkpoint_steps=2)
    train(dataset, tmp_path / "run", stage=stage, resume=True)
    assert checkpoints(tmp_path / "run") == ["step-000000004", "step-000000006"]
    assert_same(everything(tmp_path / "run"), everything(finished))


def test_a_resumed_run_may_make_its_batches_elsewhere(dataset, tmp_path, monkeypatch, finished) -> None:
    interrupt(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(dataset, tmp_path / "run")
    monkeypatch.undo()
    made = []

    def by_numpy(*arguments, **options) -> Loader:
        made.append(Loader(*arguments, **options, engine="numpy"))
        return made[-1]

    monkeypatch.setattr(sys.modules["fastskel.train.pretrain"], "Loader", by_numpy)
    train(dataset, tmp_path / "run", resume=True)
    assert [loader.epoch for loader in made] == [1]
    assert_same(everything(tmp_path / "run"), everything(finished))


def test_torchs_generator_is_neither_used_nor_moved(dataset, tmp_path, finished) -> None:
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    train(dataset, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(everything(tmp_path / "run"), everything(finished))


def test_seed_and_indices_matter(dataset, tmp_path, finished) -> None:
    expected = everything(finished)["model.safetensors"]["objective.i_proj.6.weight"]
    train(dataset, tmp_path / "seed", stage=make_stage(dataset, seed=1))
    assert not torch.equal(everything(tmp_path / "seed")["model.safetensors"]["objective.i_proj.6.weight"], expected)
    train(dataset, tmp_path / "indices", indices=np.arange(NUM_CLIPS)[::-1])
    assert not torch.equal(everything(tmp_path / "indices")["model.safetensors"]["objective.i_proj.6.weight"], expected)


def test_resuming_a_finished_run_does_nothing(dataset, finished) -> None:
    def files() -> dict[Path, tuple[int, bytes]]:
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in finished.rglob("*") if p.is_file()}

    before = files()
    assert train(dataset, finished, resume=True) == finished / "checkpoints" / "step-000000006"
    assert files() == before


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"lr": 1e-3}, "other lr than"),
        ({"epochs": 3}, "other epochs than"),
        ({"seed": 7, "batch_size": 4}, "other batch_size, seed than"),
        ({"alpha": 0.25}, "other encoder_options than"),
        ({"shear": 0.5}, "other views than"),
        ({"weighting": "journal"}, "other objective_options than"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_resuming_with_another_configuration_is_refused(dataset, finished, settings, named) -> None:
    with pytest.raises(ValueError, match=f"pretrain: a resumed run must keep its configuration and data, got {named}"):
        train(dataset, finished, stage=make_stage(dataset, **settings), resume=True)


def test_the_same_frames_of_another_skeleton_are_other_data(dataset, finished) -> None:
    other = replace(dataset, topology=replace(dataset.topology, name="ntu-25-reordered"))
    with pytest.raises(ValueError, match="got other data than in"):
        train(other, finished, resume=True)


def test_a_run_knows_its_clips(dataset, finished, tmp_path) -> None:
    assert trained_clips(finished, dataset).tolist() == list(range(len(dataset)))
    some = np.array([5, 2, 9, 11, 3, 1, 0, 8])
    train(dataset, tmp_path / "some", stage=make_stage(dataset, epochs=1, batch_size=4), indices=some)
    assert trained_clips(tmp_path / "some", dataset).tolist() == some.tolist()
    other = make_synthetic(tmp_path / "other", num_clips=NUM_CLIPS, num_classes=3, num_subjects=4, seed=1)
    assert trained_clips(tmp_path / "some", other).tolist() == []
    assert trained_clips(tmp_path, dataset) is None
    (tmp_path / "some" / "indices.npy").unlink()
    with pytest.raises(ValueError, match=r"config.json and indices.npy must be the record of a run"):
        trained_clips(tmp_path / "some", dataset)


def test_resuming_with_other_threads_warns(dataset, tmp_path) -> None:
    train(dataset, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**record, "threads": 64}))
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    with pytest.warns(UserWarning, match="goes on with other threads than it began with"):
        train(dataset, tmp_path / "run", resume=True)


def test_resuming_with_other_data_is_refused(dataset, finished, tmp_path) -> None:
    other = make_synthetic(tmp_path / "other", num_clips=NUM_CLIPS, num_classes=3, num_subjects=4, seed=1)
    with pytest.raises(ValueError, match="got other data than in"):
        train(other, finished, resume=True)
    with pytest.raises(ValueError, match="got other indices than in"):
        train(dataset, finished, indices=np.arange(NUM_CLIPS), resume=True)


def test_folders_that_cannot_be_used(dataset, finished, tmp_path) -> None:
    with pytest.raises(ValueError, match="must be new, got the folder of another run. Resume it, or choose another"):
        train(dataset, finished)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine must be new, got something that is there. Choose another folder"):
        train(dataset, tmp_path / "mine")
    with pytest.raises(ValueError, match="mine must hold a run to resume, got no config.json. Start it without"):
        train(dataset, tmp_path / "mine", resume=True)
    (tmp_path / "mine" / "config.json").write_text("{]")
    with pytest.raises(ValueError, match="config.json must be the record of a run, got one that cannot be read"):
        train(dataset, tmp_path / "mine", resume=True)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.json", "thesis.txt"]


def test_monitors_read_the_encoder_after_each_epoch(dataset, tmp_path, finished) -> None:
    seen = []

    def monitor(encoder, epoch: int) -> dict[str, float]:
        seen.append((epoch, any(module.training for module in encoder.modules())))
        torch.rand(3)
        return {"knn": 0.25 + epoch}

    train(dataset, tmp_path / "run", monitors=[monitor, lambda encoder, epoch: {"second": 1.0}, lambda *_: {}])
    assert seen == [(0, False), (1, False)]
    records = log_of(tmp_path / "run")
    read = [record for record in records if "knn" in record]
    assert read == [
        {"step": 2, "epoch": 0, "knn": 0.25, "second": 1.0},
        {"step": 5, "epoch": 1, "knn": 1.25, "second": 1.0},
    ]
    # reading changes nothing
    found = everything(tmp_path / "run")
    found["log"] = [record for record in found["log"] if "knn" not in record]
    assert_same(found, everything(finished))


def test_a_run_killed_in_a_monitor_reads_it_again(dataset, tmp_path) -> None:
    calls = []

    def monitor(encoder, epoch: int) -> dict[str, float]:
        calls.append(epoch)
        if len(calls) == 1:
            raise Interrupted
        return {"knn": 1.0}

    stage = make_stage(dataset, checkpoint_steps=1)
    with pytest.raises(Interrupted):
        train(dataset, tmp_path / "run", stage=stage, monitors=[monitor])
    assert checkpoints(tmp_path / "run") == ["step-000000001", "step-000000002"]
    train(dataset, tmp_path / "run", stage=stage, monitors=[monitor], resume=True)
    assert calls == [0, 0, 1]
    assert [record["step"] for record in log_of(tmp_path / "run") if "knn" in record] == [2, 5]


def test_tensorboard_present(dataset, tmp_path, monkeypatch) -> None:
    written, opened = [], []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def close(self) -> None:
            opened.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    interrupt(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(dataset, tmp_path / "run", tensorboard=True)
    monkeypatch.setattr(MGFD, "after_step", lambda self: None)
    train(dataset, tmp_path / "run", tensorboard=True, resume=True)
    folder = str(tmp_path / "run" / "tensorboard")
    assert opened == [(folder, 0), "closed", (folder, 3), "closed"]
    assert [step for name, step in written if name == "loss"] == [0, 1, 2, 3, 4, 3, 4, 5]
    assert {name for name, _ in written} >= {"loss", "lr", "samples_per_s", *TERMS}


def test_two_checkpoints_stay_and_leftovers_go(dataset, tmp_path, monkeypatch) -> None:
    stage = make_stage(dataset, checkpoint_steps=1)
    interrupt(monkeypatch, 4)
    with pytest.raises(Interrupted):
        train(dataset, tmp_path / "run", stage=stage)
    assert checkpoints(tmp_path / "run") == ["step-000000002", "step-000000003"]
    for name in (".step-000000004.abc", ".doomed-step-000000001"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
        (tmp_path / "run" / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    monkeypatch.undo()
    train(dataset, tmp_path / "run", stage=stage, resume=True)
    assert checkpoints(tmp_path / "run") == ["step-000000005", "step-000000006"]


def test_settings_newer_than_the_record_count(dataset, tmp_path, finished) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    del config["identity"]["stage"]["chunk"], config["identity"]["stage"]["schedule"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a resumed run must keep its configuration and data, got other chunk, schedule"):
        train(dataset, run, stage=make_stage(dataset, chunk=4, schedule="cosine"), resume=True)
    assert train(dataset, run, resume=True).name == "step-000000006"


def test_a_full_disk_leaves_the_last_checkpoint(dataset, tmp_path, monkeypatch, finished) -> None:
    def save_file(tensors, path) -> None:
        if "step-000000006" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(tensors, path)

    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="No space left on device"):
        train(dataset, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-000000003"]
    monkeypatch.undo()
    train(dataset, tmp_path / "run", resume=True)
    assert_same(everything(tmp_path / "run"), everything(finished))


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(dataset, tmp_path, monkeypatch, finished) -> None:
    stage = make_stage(dataset, checkpoint_steps=1)
    interrupt(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(dataset, tmp_path / "run", stage=stage)
    monkeypatch.undo()
    damaged = tmp_path / "run" / "checkpoints" / "step-000000004"
    whole = (damaged / "optimizer.safetensors").read_bytes()
    (damaged / "optimizer.safetensors").write_bytes(whole[: len(whole) // 2])
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"step-000000004/optimizer.safetensors must be .*Remove .*step-000000004 to go on"
    ):
        train(dataset, tmp_path / "run", stage=stage, resume=True)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    for path in damaged.iterdir():
        path.unlink()
    damaged.rmdir()
    train(dataset, tmp_path / "run", stage=stage, resume=True)
    assert_same(everything(tmp_path / "run"), everything(finished))
