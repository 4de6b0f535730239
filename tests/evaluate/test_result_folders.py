"""Names of the folders that evaluations leave results in: every setting that changes results shows, nothing else does."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fastskel.cli_evaluate import evaluate_commands
from fastskel.cli_evaluate.dense import EncoderOptions, TuningOptions
from fastskel.cli_evaluate.options import LONGEST_NAME, EvaluateOptions, _folder_name, changed
from fastskel.data import make_synthetic
from fastskel.evaluate import DenseConfig, FinetuneConfig, FrameHeadConfig, ProposalConfig, Windows

COMMANDS = evaluate_commands()
# task -> another value of each setting, and what has to be given with it
SETTINGS: dict[str, dict[str, Any]] = {
    "knn": {"k": 3},
    "linear": {"learning_rate": 0.5, "published": "pku2-xsub", "epochs": 3, "seed": 1, "solver": "exact", "penalty": 0.1},
    "retrieval": {"ks": (1, 3), "skip_map": True},
    "semi": {"fractions": (0.5,), "sampling": "balanced", "seeds": 2, "solver": "sgd"},
    "fewshot": {
        "ways": 2, "shots": 3, "queries": 1, "episodes": 10, "classifier": "logistic", "classes": ("sit",),
        "classes_file": "names", "centre": True, "seed": 1,
    },
    "oneshot": {"novel": ("sit",), "novel_file": "names", "exemplars": "names"},
    "zeroshot": {"embeddings": Path("others.npy"), "unseen": ("wave",), "unseen_file": "names", "penalty": 0.1, "seed": 1},
    "cluster": {"part": "all", "num_clusters": 3, "raw": True, "seeds": 2, "restarts": 1},
    "finetune": {},
    "transfer": {"trained_on": "ntu-25", "plane": "xy", "scale": 0.01, "k": 3, "fine_tune": True},
    "early": {"ratios": (0.5, 1.0), "train_full": True, "causal": True, "fine_tune": True},
    "fusion": {"weights": (2.0, 1.0), "k": 3, "epochs": 3, "seed": 1, "modalities": ("joint", "bone")},
}  # fmt: skip
# those of untrimmed recordings, whose settings are dataclasses; another value of each field
HEADS = {
    "head": "tcn", "hidden": 8, "layers": 2, "epochs": 3, "learning_rate": 0.1, "weight_decay": 0.1, "class_weights": True,
    "smoothing": 0.15, "seed": 1,
}  # fmt: skip
WINDOWS = {"window": 20, "overlap": 0.0, "weighting": "flat", "spatial": True}
PROPOSALS = {"thresholds": (0.1, 0.3), "nms": 0.3}
WITH = {("linear", "penalty"): {"solver": "exact"}, ("zeroshot", "unseen_file"): {"unseen": ()}}
# say where, not what; settings of a fine-tuning have a test of their own
NOT_SETTINGS = {"run", "data", "paths", "common", "resume", "settings"}
TUNED = {
    "epochs": 60, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1, "layer_decay": 1.0, "weight_decay": 0.0,
    "momentum": 0.5, "warmup_epochs": 0.0, "schedule": "step", "milestones": (3, 5), "decay": 0.5, "label_smoothing": 0.0,
    "drop_path": 0.0, "frozen_epochs": 1, "start": "random", "crop": 0.5, "evaluate_every": 1, "seed": 1,
}  # fmt: skip


class Asked(Exception):
    """Carries what a command shows of its settings."""


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Call a command up to the choice of its folder, and return what it shows."""
    (tmp_path / "names").write_text("kick\n")

    def prepare(task, run, data, options, shown=(), parts=None, skeleton=None, reads=None):
        raise Asked([*shown, options.modality])

    def call(task: str, **settings: Any) -> str:
        command = COMMANDS[task]
        monkeypatch.setattr(sys.modules[command.__module__], "prepare", prepare)
        given = {name: tmp_path / value if value == "names" else value for name, value in settings.items()}
        if task == "zeroshot":
            given = {"embeddings": Path("words.npy"), "unseen": ("sit",)} | given
        # a file, as a published checkpoint is
        run = tmp_path / "names"
        where = {"paths": (run, Path("b"), tmp_path)} if task == "fusion" else {"run": run, "data": tmp_path}
        with pytest.raises(Asked) as asked:
            command(**where, **given)
        return "-".join(map(str, asked.value.args[0]))

    return call


@pytest.mark.parametrize("task", SETTINGS)
def test_every_setting_shows(shown, task: str) -> None:
    asked = set(inspect.signature(COMMANDS[task]).parameters) - NOT_SETTINGS
    assert set(SETTINGS[task]) == asked, "a setting without another value here"
    names = [shown(task, **WITH.get((task, name), {}), **{name: value}) for name, value in SETTINGS[task].items()]
    assert len({shown(task), *names}) == 1 + len(names), names


def test_every_command_is_tried() -> None:
    assert {*SETTINGS, "detect", "segment"} == set(COMMANDS)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_every_setting_of_frames_shows(shown, task: str) -> None:
    def named(**settings: Any) -> str:
        return shown(task, common=EvaluateOptions(protocol="xsub"), **settings)

    others = {"detect": {"frame_rate": 30.0}, "segment": {"count_background": True}}[task]
    proposals = PROPOSALS if task == "detect" else {}
    asked = set(inspect.signature(COMMANDS[task]).parameters) - NOT_SETTINGS
    assert asked == {*others, *(["proposals"] if proposals else []), "config", "encoder", "tuning"}
    tuning = {field.name: TUNED[field.name] for field in fields(TuningOptions)}
    for of, values in ((FrameHeadConfig, HEADS), (Windows, WINDOWS), (ProposalConfig, PROPOSALS)):
        assert set(values) == {field.name for field in fields(of)}
    # which values of a column are tested is the protocol, and timelines are drawn, no number depends on them
    assert {field.name for field in fields(DenseConfig)} == {
        "head", "windows", "drop_reversed", "leave_one_out", "num_timelines",
    }  # fmt: skip
    configs = [DenseConfig(head=replace(FrameHeadConfig(), **{name: value})) for name, value in HEADS.items()]
    configs += [DenseConfig(windows=replace(Windows(), **{name: value})) for name, value in WINDOWS.items()]
    names = [named(config=config) for config in [*configs, DenseConfig(drop_reversed=True)]]
    tuned = EncoderOptions(fine_tune=True)
    adapted = EncoderOptions(adapt=True, trained_on="ntu-25")
    encoders = [tuned, adapted, replace(adapted, trained_on="kinect-20-utd"), replace(adapted, scale=0.01)]
    names += [named(encoder=encoder) for encoder in encoders]
    names += [named(encoder=tuned, tuning=replace(TuningOptions(), **{name: value})) for name, value in tuning.items()]
    names += [named(proposals=replace(ProposalConfig(), **{name: value})) for name, value in proposals.items()]
    names += [named(**{name: value}) for name, value in others.items()]
    assert len({named(), *names}) == 1 + len(names), names
    assert named(encoder=replace(tuned, resume=True)) == named(encoder=tuned)
    assert named(config=DenseConfig(num_timelines=9)) == named()


@pytest.mark.parametrize("task", ["finetune", "transfer", "early"])
def test_every_setting_of_a_fine_tuning_shows(shown, task: str) -> None:
    free = {"save_every"}
    assert set(TUNED) == {field.name for field in fields(FinetuneConfig)} - free
    tune = {} if task == "finetune" else {"fine_tune": True}
    names = {shown(task, settings=replace(FinetuneConfig(), **{name: value}), **tune) for name, value in TUNED.items()}
    usual = shown(task, **tune)
    assert len(names | {usual}) == 1 + len(TUNED)
    assert shown(task, settings=FinetuneConfig(save_every=1), **tune) == usual
    assert shown(task, resume=True, **tune) == usual
    # what is trained without a fine-tuning has a seed
    if tune:
        assert shown(task, settings=FinetuneConfig(seed=1)) != shown(task)


@pytest.mark.parametrize("task", ["transfer", "early", "detect", "segment"])
def test_what_is_of_a_fine_tuning_is_refused_without_one(task: str, tmp_path: Path) -> None:
    where = {"run": tmp_path, "data": tmp_path}
    if task in ("transfer", "early"):
        settings = {"settings": FinetuneConfig(epochs=60, label_smoothing=0.0, save_every=1, seed=1), "resume": True}
        names, one = "epochs60, label_smoothing0, save_every1, resume", {"resume": True}
    else:
        settings = {"tuning": TuningOptions(label_smoothing=0.0), "encoder": EncoderOptions(resume=True)}
        settings["config"], names = DenseConfig(leave_one_out="subject"), "label_smoothing0, resume"
        one = {**settings, "tuning": TuningOptions()}
        make_synthetic(tmp_path / "data", num_clips=4, num_classes=2, num_subjects=2)
        where["data"] = tmp_path / "data"
    with pytest.raises(ValueError, match=f"evaluate: {names} must be left out without fine_tune, which they are of. Pass"):
        COMMANDS[task](**where, **settings)
    with pytest.raises(ValueError, match="evaluate: resume must be left out without fine_tune, which it is of. Pass"):
        COMMANDS[task](**where, **one)


def test_what_every_evaluation_is_asked_for_shows() -> None:
    others = {
        "precision": "bf16", "average": True, "normalise": "center", "modality": "bone", "num_head": 2, "gap": 2, "alpha": 0.3,
    }  # fmt: skip
    elsewhere = {"protocol": "xview", "split_file": Path("a.json"), "out": Path("out"), "device": "cuda", "quiet": True}
    assert {*others, *elsewhere} == {field.name for field in fields(EvaluateOptions)}
    names = [_folder_name(["knn"], EvaluateOptions(**{name: value})) for name, value in others.items()]
    assert names == ["knn-bf16", "knn-average", "knn-center", "knn-bone", "knn-num_head2", "knn-gap2", "knn-alpha0.3"]
    assert _folder_name(["knn"], EvaluateOptions(**elsewhere)) == "knn"


@pytest.mark.parametrize(
    "settings, usual, name",
    [
        ({"seed": 0}, {"seed": 0}, []),
        ({"rate": 0.123456789, "scale": 2.0}, {"rate": 1.0, "scale": 1.0}, ["rate0.123456789", "scale2"]),
        ({"thresholds": [0.1, 1.0]}, {"thresholds": ()}, ["thresholds0.1-1"]),
        ({"solver": "exact", "raw": True}, {"solver": "sgd", "raw": False}, ["exact", "raw"]),
        (FrameHeadConfig(smoothing=0.15, class_weights=True), FrameHeadConfig(), ["class_weights", "smoothing0.15"]),
        (Windows(window=20, weighting="flat"), Windows(), ["window20", "flat"]),
        ({"k": 5}, lambda run, k=1: None, ["k5"]),
    ],
)
def test_what_is_not_as_usual_is_named(settings, usual, name) -> None:
    assert changed(settings, usual) == name


def test_names_that_no_file_system_takes_are_told_by_digests() -> None:
    lists = [("draw x", "clap"), ("draw", "x clap"), ("a-b", "c"), ("a", "b-c"), ("a/b",), ("..", "/"), ("é",), ("name",) * 60]
    found = [changed({"unseen": names}, {"unseen": ()}) for names in lists]
    assert len({json.dumps(name) for name in found}) == len(lists)
    assert all(len(name[0]) == len("unseen-") + 8 and name[0].isascii() and "/" not in name[0] for name in found)
    long = [_folder_name(["knn", "é" * 150, str(number)], EvaluateOptions()) for number in range(2)]
    assert long[0] != long[1] and all(len(name.encode()) <= LONGEST_NAME + 9 for name in long)
