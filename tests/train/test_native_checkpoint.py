"""Native checkpoints: complete, strict, and clear about what is wrong with a damaged one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastskel.data.views import eval_view, usdrl_views
from fastskel.models import DSTE, STTR
from fastskel.objectives import MGFD
from fastskel.train import checkpoint as native
from fastskel.train.checkpoint import (
    load_encoder,
    load_weights,
    newest,
    prune,
    read_checkpoint,
    save_checkpoint,
    weights,
)


def make_modules(seed: int = 0, **options) -> dict[str, torch.nn.Module]:
    torch.manual_seed(seed)
    encoder = DSTE(num_joints=5, num_bodies=1, num_frames=4, width=4, **options)
    return {"encoder": encoder, "objective": MGFD(encoder, usdrl_views(4))}


def state_of(modules: dict[str, torch.nn.Module]) -> dict:
    return {
        "encoder": {"name": "usdrl-dste", "config": modules["encoder"].config},
        "objective": {"name": "mgfd", "options": {}},
        "eval_view": eval_view(4, "bone", "none"),
        "topology": "ntu-25",
    }


@pytest.fixture
def saved(tmp_path) -> Path:
    modules = make_modules()
    optimizer = {"encoder.spe/exp_avg": torch.ones(1, 5, 4)}
    return save_checkpoint(tmp_path / "run" / "checkpoints", 7, weights(modules), state_of(modules), optimizer)


def test_shared_attention_is_stored_once():
    stored = weights(make_modules())
    assert not [name for name in stored if ".DSA.attn." in name]
    assert sum(".CA.attn." in name for name in stored) == 4 * 4
    parameters = sum(p.numel() for module in make_modules().values() for p in module.parameters())
    buffers = sum(b.numel() for b in stored.values()) - parameters
    # the sine table and three projectors of two BatchNorms with mean, variance and count
    assert buffers == 200 * 4 + 3 * 2 * (2 * 8 + 1)
    assert "encoder.tpe.pe" in stored and "objective.t_proj.1.running_var" in stored
    # what can be rebuilt is not stored
    assert not [name for name in stored if name.endswith("keep")]


def test_a_checkpoint_comes_back(saved):
    modules, other = make_modules(), make_modules(seed=1)
    for path in (saved, saved.parents[1]):
        checkpoint = read_checkpoint(path, optimizer=True)
        assert checkpoint.path == saved and checkpoint.state["step"] == 7
        load_weights(other, checkpoint.model, checkpoint.path)
        for name, value in weights(modules).items():
            assert torch.equal(value, weights(other)[name]), name
        assert torch.equal(checkpoint.optimizer["encoder.spe/exp_avg"], torch.ones(1, 5, 4))
    assert read_checkpoint(saved).optimizer == {}
    encoder, view, checkpoint = load_encoder(saved)
    assert not encoder.training and view == replace(eval_view(4, "bone", "none"), topology="ntu-25")
    assert torch.equal(encoder.spe, modules["encoder"].spe)
    # both halves of a layer still share one attention
    assert encoder.t_tr.CA.attn is encoder.t_tr.DSA.attn


def test_loading_is_strict():
    modules, path = make_modules(), Path("somewhere/model.safetensors")
    whole = weights(make_modules(seed=1))
    before = {name: value.clone() for name, value in weights(modules).items()}
    missing = {k: v for k, v in whole.items() if k != "encoder.spe"}
    for stored, message in (
        (missing, r"got missing \['encoder.spe'\]"),
        (whole | {"encoder.x": torch.zeros(1)}, r"unexpected \['encoder.x'\]"),
        (whole | {"encoder.spe": torch.zeros(1, 4, 4)}, r"of another shape \['encoder.spe'\]"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_weights(modules, stored, path)
        assert str(path) in str(caught.value)
    # nothing was copied before the refusal
    assert all(torch.equal(value, before[name]) for name, value in weights(modules).items())


@pytest.mark.parametrize("options", [{"num_layers": 3}, {"gap": 2, "num_layers": 1}], ids=str)
def test_weights_of_another_configuration_are_refused(options):
    with pytest.raises(
        ValueError, match=r"must hold exactly the model's tensors, got (missing \['encoder|.*unexpected \['encoder)"
    ):
        load_weights(make_modules(**options), weights(make_modules()), Path("x"))


def damage(name: str, content: bytes | None):
    def act(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return act


def other_version(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format_version": 99}))


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def without_checksums(folder: Path) -> None:
    """As older versions wrote it."""
    state = json.loads((folder / "state.json").read_text())
    del state["checksums"]
    (folder / "state.json").write_text(json.dumps(state))


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def alter_the_state(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"step": 8}))


def drop_tensor(folder: Path) -> None:
    without_checksums(folder)
    stored = load_file(folder / "model.safetensors")
    stored.pop("encoder.spe")
    save_file(stored, folder / "model.safetensors")


DAMAGES = {
    "no state": (damage("state.json", None), "must be a run or checkpoint folder, got .* without state.json"),
    "no json": (damage("state.json", b'{"format_ver'), "state.json must be JSON, got "),
    "not text": (damage("state.json", b"\xff\xfe\x00"), "state.json must be JSON, got "),
    "a list": (damage("state.json", b"[1]"), "state.json must have format_version 1, got None"),
    "other version": (other_version, "state.json must have format_version 1, got 99. Use the fastskel version"),
    "other state": (alter_the_state, "state.json must be as it was saved, got sha256 .* instead of "),
    "no model": (damage("model.safetensors", None), "model.safetensors must be the safetensors .*, got .*No such file"),
    "no tensors": (damage("model.safetensors", b"hello"), "model.safetensors must be the safetensors that were saved, got "),
    "empty": (damage("model.safetensors", b""), "model.safetensors must be the safetensors that were saved, got "),
    "one bit": (flip_a_bit, "model.safetensors must be the safetensors that were saved, got sha256 .* instead of "),
    "truncated": (truncate, "model.safetensors must be the safetensors that were saved, got "),
    "tensor missing": (drop_tensor, r"model.safetensors must hold exactly .* missing \['encoder.spe'\]"),
}


@pytest.mark.parametrize("act, message", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(act, message, saved):
    act(saved)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(saved)
    assert str(saved) in str(caught.value)


def test_checkpoints_of_older_versions_are_read(saved):
    expected = read_checkpoint(saved, optimizer=True)
    without_checksums(saved)
    found = read_checkpoint(saved, optimizer=True)
    assert all(torch.equal(found.model[name], value) for name, value in expected.model.items())
    assert found.optimizer.keys() == expected.optimizer.keys()


def test_a_damaged_optimizer_hurts_only_who_reads_it(saved):
    (saved / "optimizer.safetensors").write_bytes(b"")
    read_checkpoint(saved)
    with pytest.raises(ValueError, match="optimizer.safetensors must be the safetensors"):
        read_checkpoint(saved, optimizer=True)


@pytest.mark.parametrize("name", ["absent", "file"])
def test_paths_that_are_no_run_are_refused(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"must be a run or checkpoint folder, got .*{name}"):
        read_checkpoint(tmp_path / name)


def test_a_failing_write_leaves_the_old_checkpoint(saved, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    modules = make_modules(seed=1)
    monkeypatch.setattr(native, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(saved.parent, 8, weights(modules), state_of(modules))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert newest(saved.parents[1]) == saved


def test_a_step_can_be_saved_again(saved):
    modules = make_modules(seed=1)
    assert save_checkpoint(saved.parent, 7, weights(modules), state_of(modules)) == saved
    assert torch.equal(read_checkpoint(saved).model["encoder.spe"], modules["encoder"].spe)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("act", ["save again", "prune"])
def test_a_kill_during_a_removal_leaves_no_incomplete_checkpoint(act, saved, monkeypatch):
    """A folder loses its name before it loses its first file."""

    class Killed(BaseException):
        pass

    def kill(path: Path, **_: object) -> None:
        if path.exists():
            next(path.glob("model*")).unlink()
            raise Killed

    modules, folder = make_modules(), saved.parent
    later = save_checkpoint(folder, 8, weights(modules), state_of(modules), {"encoder.spe/exp_avg": torch.zeros(1)})
    monkeypatch.setattr(native.shutil, "rmtree", kill)
    remove = {
        "prune": lambda: prune(saved.parents[1], 1),
        "save again": lambda: save_checkpoint(folder, 8, weights(modules), state_of(modules)),
    }
    with pytest.raises(Killed):
        remove[act]()
    monkeypatch.undo()
    complete = sorted(folder.glob("step-*"))
    assert complete == ([later] if act == "prune" else [saved])
    assert read_checkpoint(saved.parents[1], optimizer=True).path == complete[0]
    prune(saved.parents[1], 2)
    assert list(folder.iterdir()) == complete


def test_prune_keeps_the_newest_and_clears_what_killed_writers_left(saved):
    modules, folder = make_modules(), saved.parent
    for step in (8, 9, 10):
        save_checkpoint(folder, step, weights(modules), state_of(modules))
    (folder / ".step-000000011.abc").mkdir()
    prune(saved.parents[1], 2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000009", "step-000000010"]
    assert newest(saved.parents[1]).name == "step-000000010"


def test_sttr_comes_back(tmp_path):
    encoder = STTR(num_joints=5, num_bodies=1, num_frames=4, width=4)
    state = {"encoder": {"name": "usdrl-sttr", "config": encoder.config}, "eval_view": eval_view(4), "topology": "ntu-25"}
    loaded, _, _ = load_encoder(save_checkpoint(tmp_path, 0, weights({"encoder": encoder}), state))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), encoder.state_dict().values(), strict=True)
    )
