"""Every downstream task on the same few clips: what it leaves, that it repeats, and what it refuses in one readable line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastskel.cli import main
from fastskel.cli_evaluate import evaluate_commands
from fastskel.data import PackedDataset, open_dataset, pack_arrays
from fastskel.data.identity import dataset_identity
from fastskel.data.views import eval_view
from fastskel.evaluate import (
    TASKS,
    DenseConfig,
    Evaluation,
    FinetuneConfig,
    FrameHeadConfig,
    LinearConfig,
    ProposalConfig,
)
from fastskel.evaluate.fusion import evaluate_fusion
from fastskel.evaluate.seen import SeenClips
from fastskel.models import DSTE
from fastskel.models.encoder import Encoder, Features
from fastskel.skeleton import topology
from fastskel.train.checkpoint import save_checkpoint, weights

FRAMES = 6
CLASSES = ("sit", "wave", "kick", "bow")
SPLIT = SimpleNamespace(train=np.arange(16), test=np.arange(16, 24))
PROBE = LinearConfig(epochs=4, learning_rate=0.1, milestones=())
TUNED = FinetuneConfig(epochs=1, batch_size=8, warmup_epochs=0)
# the last class
UNSHOWN = 3


def fused(evaluation: Evaluation, out: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Two runs that are one."""
    return evaluate_fusion([evaluation, evaluation], out, config=PROBE, **settings)


@dataclass(frozen=True)
class Case:
    """A way to call a task.

    Attributes:
        run: Called with an evaluation, a folder, and settings.
        settings: Of the task, as cheap as they can be.
        measures: Keys of the results that hold a share, or shares with their mean.
        needs: The features that the encoder must have.
        dense: Whether truth is in segments, not in labels.
        folders: What it leaves beside results.json.
    """

    run: Callable[..., dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    measures: tuple[str, ...] = ("top1", "top5", "mean_class")
    needs: str | None = None
    dense: bool = False
    folders: tuple[str, ...] = ()


def _case(name: str, *, pictured: bool = False, folders: tuple[str, ...] = (), **options: Any) -> Case:
    pictures = ("confusion.csv", "confusion.png") if pictured else ()
    return Case(TASKS[name].run, folders=(*pictures, *folders), **options)


HEAD = DenseConfig(FrameHeadConfig(epochs=2))
CASES = {
    "knn": _case("knn", settings={"k": 3}, pictured=True),
    "linear": _case("linear", settings={"config": PROBE}, pictured=True),
    "logistic": _case("logistic", pictured=True),
    "finetune": _case("finetune", settings={"config": TUNED}, pictured=True, folders=("checkpoints",)),
    "semi": _case("semi", settings={"fractions": (0.5,), "seeds": 2}, measures=("fractions",)),
    "retrieval": _case("retrieval", settings={"ks": (1, 3)}, measures=("top1", "map", "recall_at", "precision_at")),
    "transfer": _case("transfer", settings={"config": PROBE}, folders=("knn", "linear")),
    "fewshot": _case("fewshot", settings={"ways": 2, "episodes": 3}, measures=("top1",)),
    "oneshot": _case("oneshot", measures=("top1", "mean_class"), pictured=True),
    "zeroshot": _case(
        "zeroshot", settings={"unseen": CLASSES[2:], "penalty": 0.1}, measures=("top1", "mean_class"), pictured=True
    ),
    "detect": _case(
        "detect", settings={"config": HEAD}, measures=("map_action", "map_video", "f1"), needs="temporal", dense=True,
        folders=("proposals.json",),
    ),
    "segment": _case(
        "segment", settings={"config": HEAD}, measures=("accuracy", "edit", "f1@10", "f1@50"), needs="temporal", dense=True
    ),
    "early": _case("early", settings={"ratios": (0.5, 1.0), "config": PROBE}, folders=("curve.csv", "curve.png")),
    "early-causal": _case(
        "early", settings={"ratios": (0.5, 1.0), "config": PROBE, "causal": True}, needs="temporal",
        folders=("curve.csv", "curve.png"),
    ),
    "cluster": _case("cluster", settings={"seeds": 2}, measures=("accuracy", "nmi", "ari")),
    "fusion": Case(fused, folders=("confusion.csv", "confusion.png")),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", CASES)


def pack(folder: Path, skeleton: str = "kinect-20-ucla", channels: int = 3, bodies: int = 1) -> PackedDataset:
    """Clips of 12 to 15 frames; frames 2 to 8 of each show its class, which a segment says too."""
    layout, draw = topology(skeleton), np.random.default_rng(0)
    clips, labels = [], np.arange(24) % len(CLASSES)
    for number, label in enumerate(labels):
        clip = draw.normal(0, 0.1, (12 + number % 4, bodies, layout.num_joints, channels)).astype(np.float32)
        clip[2:8, 0, 2 + 3 * label, 1] += 2
        clips.append(clip)
    return pack_arrays(
        clips, out=folder, topology=skeleton, labels=labels, class_names=CLASSES,
        columns={"subject": np.arange(24) // 4}, segments=[(number, label, 2, 8) for number, label in enumerate(labels)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The packed data sets `data`, `ntu` of other joints, `flat` of two channels, `pair` of two bodies, and word vectors."""
    folder = tmp_path_factory.mktemp("tasks")
    pack(folder / "data")
    pack(folder / "ntu", "ntu-25")
    pack(folder / "flat", channels=2)
    pack(folder / "pair", bodies=2)
    np.save(folder / "words.npy", np.random.default_rng(1).normal(size=(len(CLASSES), 5)))
    return folder


def encoder_of(joints: int = 20) -> Encoder:
    torch.manual_seed(0)
    return DSTE(num_joints=joints, num_bodies=1, num_frames=FRAMES, width=8)


def evaluation_of(dataset: PackedDataset, split: Any = SPLIT, **options: Any) -> Evaluation:
    view = replace(eval_view(FRAMES, normalise="none"), topology="kinect-20-ucla")
    settings = {"encoder": encoder_of(), "view": view, "protocol": "halves", "run": "runs/one", "progress": False, **options}
    return Evaluation(dataset=dataset, split=split, **settings)


def run(name: str, place: Path, evaluation: Evaluation, out: Path | None = None, **settings: Any) -> dict[str, Any]:
    case = CASES[name]
    words = {"embeddings": place / "words.npy"} if name == "zeroshot" else {}
    return case.run(evaluation, out, **{**case.settings, **words, **settings})


def refusal(name: str, place: Path, evaluation: Evaluation, out: Path) -> str:
    """The one line that a task refuses with; nothing is left where the results would be."""
    with pytest.raises(ValueError, match=r"\A[^\n]{,400}\.\Z") as error:
        run(name, place, evaluation, out)
    assert not out.exists()
    return str(error.value)


class Oracle(Encoder):
    """Says which class every frame shows, as `pack` made it; made blind it says nothing."""

    num_features = num_token_features = len(CLASSES)
    shape = (FRAMES, 1, 20, 3)

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.scale = torch.nn.Parameter(torch.tensor(0.0 if blind else 1.0))

    def forward(self, view: Any, *, token_mask: Any = None, mode: str | None = None) -> Features:
        shown = (view.clips[:, :, 0, 2::3][..., : len(CLASSES), 1] > 1) * self.scale
        return Features(shown.amax(1), temporal=shown, spatial=shown.amax(1, keepdim=True))


def measured(name: str, result: dict[str, Any]) -> list[float]:
    return [share for measure in CASES[name].measures for share in shares(result[measure])]


def shares(value: Any) -> list[float]:
    """Every share in a measure: a number, means over seeds, numbers by name, rows."""
    if isinstance(value, dict) and "mean" in value:
        return [value["mean"], *value["values"]]
    if isinstance(value, dict):
        return [share for entry in value.values() for share in shares(entry)]
    if isinstance(value, list):
        return [share for row in value for share in shares({name: row[name] for name in ("top1", "top5", "mean_class")})]
    return [value]


def test_no_task_and_no_command_is_forgotten() -> None:
    tried = {name.partition("-")[0] for name in CASES}
    # fusion takes several evaluations, and logistic is `linear --solver exact`
    assert tried == {*TASKS, "fusion"}
    assert tried == {*evaluate_commands(), "logistic"}
    assert {name for name in TASKS if "temporal" in TASKS[name].needs} == {
        name for name, case in CASES.items() if case.needs == "temporal" and "-" not in name
    }


@EVERY
def test_results_are_complete_and_repeat(name: str, place: Path, tmp_path: Path) -> None:
    dataset = open_dataset(place / "data")
    texts = []
    # with and without cached features, in batches of other sizes
    for attempt, cache in (("one", None), ("two", tmp_path / "cache")):
        out = tmp_path / attempt / "out"
        evaluation = evaluation_of(dataset, cache=cache, batch_size=7 if cache else 256)
        result = run(name, place, evaluation, out)
        assert {path.name for path in out.iterdir()} == {"results.json", *CASES[name].folders}
        text = (out / "results.json").read_text()
        stored = json.loads(text, parse_constant=lambda value: pytest.fail(f"{value} is no JSON"))
        # nothing that only Python knows
        assert stored == json.loads(json.dumps(result))
        texts.append(text.replace(str(out), "OUT"))
    assert texts[0] == texts[1]
    # the exact solver is a way to do the linear probe
    task = "linear" if name == "logistic" else name.partition("-")[0]
    expected = evaluation.record(task, torch.arange(16), torch.arange(16, 24))
    assert set(expected) <= set(stored)
    assert stored["task"] == expected["task"] and stored["protocol"] == "halves"
    assert stored["num_classes"] == 4 and stored["dropped_train"] == stored["dropped_test"] == 0
    assert stored["dataset"] == expected["dataset"]
    found = measured(name, stored)
    assert len(found) >= len(CASES[name].measures) and all(0 <= share <= 1 for share in found)


@EVERY
def test_clips_of_another_skeleton(name: str, place: Path, tmp_path: Path) -> None:
    if name == "transfer":
        # joints are what it adapts; channels it cannot make up
        flat = evaluation_of(open_dataset(place / "flat"))
        assert "must read the 2 channels of" in refusal(name, place, flat, tmp_path / "out")
        message = refusal(name, place, evaluation_of(open_dataset(place / "data"), encoder=encoder_of(25)), tmp_path / "out")
        assert "the encoder's 25 joints, got 'kinect-20-ucla' of 20" in message
        return
    other = evaluation_of(open_dataset(place / "ntu"))
    assert "got skeleton kinect-20-ucla for ntu-25, joints 20 for 25" in refusal(name, place, other, tmp_path / "out")
    # a published file does not say what skeleton it is of
    silent = replace(other, view=eval_view(FRAMES))
    assert "joints 20 for 25" in refusal(name, place, silent, tmp_path / "out")
    for data, told in (("pair", "bodies 1 for 2"), ("flat", "channels 3 for 2")):
        assert told in refusal(name, place, evaluation_of(open_dataset(place / data)), tmp_path / "out")


@EVERY
def test_clips_without_labels(name: str, place: Path, tmp_path: Path) -> None:
    dataset = open_dataset(place / "data")
    bare = replace(dataset, labels=np.full(24, -1), segments=None)
    message = refusal(name, place, evaluation_of(bare), tmp_path / "out")
    assert str(place / "data") in message
    assert ("must have segments, got none" if CASES[name].dense else "must have labelled clips, got") in message
    if CASES[name].dense:
        # segments of the training part alone
        half = replace(dataset, segments=dataset.segments[:16])
        assert "the test split of" in refusal(name, place, evaluation_of(half), tmp_path / "out")


@EVERY
def test_labels_that_the_encoder_saw(name: str, place: Path, tmp_path: Path) -> None:
    dataset = open_dataset(place / "data")
    names = dataset.names.tolist()
    given = evaluation_of(dataset, seen=(SeenClips(dataset_identity(dataset), "custom", (names[23],), ()),))
    message = refusal(name, place, given, tmp_path / "out")
    assert "must not have seen labels of" in message and "got 1 of" in message and "clip-000023" in message
    # those of training clips are known, unless the test is of classes that nothing had shown, or of few labels
    given = replace(given, seen=(replace(given.seen[0], labelled=(names[0],)),))
    parts = {"oneshot": "the novel classes, got 1 of 24", "semi": "the part that few labels are drawn from, got 1 of 16"}
    if name in parts:
        assert f"labels of {parts[name]} clips" in refusal(name, place, given, tmp_path / "out")
    else:
        assert run(name, place, given)["test_labels_not_known"] is None


@EVERY
def test_parts_that_share_clips(name: str, place: Path, tmp_path: Path) -> None:
    leaking = SimpleNamespace(train=np.arange(17), test=np.arange(16, 24))
    message = refusal(name, place, evaluation_of(open_dataset(place / "data"), leaking), tmp_path / "out")
    assert "got 1" in message and "in both" in message and "clip-000016" in message


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.needs])
def test_encoders_without_what_is_needed(name: str, place: Path, tmp_path: Path, monkeypatch) -> None:
    needed, forward = CASES[name].needs, DSTE.forward
    monkeypatch.setattr(DSTE, "forward", lambda *given, **options: replace(forward(*given, **options), **{needed: None}))
    message = refusal(name, place, evaluation_of(open_dataset(place / "data")), tmp_path / "out")
    assert f"{name.partition('-')[0]}: the encoder must provide '{needed}' features, got none" in message


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.needs])
def test_pooled_features_are_enough_for_the_others(name: str, place: Path, monkeypatch) -> None:
    forward = DSTE.forward

    def pooled(*given: Any, **options: Any) -> Any:
        return replace(forward(*given, **options), temporal=None, spatial=None, tokens=None)

    monkeypatch.setattr(DSTE, "forward", pooled)
    run(name, place, evaluation_of(open_dataset(place / "data")))


@EVERY
def test_classes_that_training_never_shows(name: str, place: Path) -> None:
    dataset = open_dataset(place / "data")
    train = SPLIT.train[dataset.labels[SPLIT.train] != UNSHOWN]
    result = run(name, place, evaluation_of(dataset, SimpleNamespace(train=train, test=SPLIT.test)))
    # they are tested like all others
    # the clips of two classes; one clip of the unshown class is its exemplar
    asked = {"zeroshot": 4, "oneshot": 7}.get(name, 8)
    assert result["num_test"] == asked and result["dropped_test"] == 0
    if name in ("oneshot", "zeroshot", "fewshot", "cluster"):
        # these show no training clip of the classes that they test, or no class at all
        return
    if CASES[name].dense:
        assert result["num_test_frames"] == dataset.num_frames[16:].sum()
        assert "bow" in result.get("per_class", ["bow"])
        return
    measured = result["fractions"][0] if name == "semi" else result
    # two of eight are missed, whatever else is right
    for share in shares(measured["top1"]):
        assert share <= 0.75
    if "confusion" in result:
        assert sum(result["confusion"][UNSHOWN]) == 2
    if name == "retrieval":
        assert result["num_without_match"] == 2


# what an oracle is told needs no search for settings, only enough steps
TAUGHT = LinearConfig(epochs=20, learning_rate=1.0, milestones=())
KEEN = {"config": DenseConfig(FrameHeadConfig(epochs=60, learning_rate=0.05))}
PERFECT = {
    **{name: {} for name in ("knn", "logistic", "retrieval", "fewshot", "oneshot", "cluster", "fusion")},
    **{name: {"config": TAUGHT} for name in ("linear", "transfer", "early", "early-causal")},
    "finetune": {"config": replace(TUNED, epochs=20, learning_rate=0.05)},
    "semi": {"sampling": "balanced"},
    "detect": {**KEEN, "proposals": ProposalConfig((0.5,))},
    "segment": KEEN,
}


@pytest.mark.parametrize("name", PERFECT)
def test_perfect_features_give_a_perfect_result(name: str, place: Path) -> None:
    result = run(name, place, evaluation_of(open_dataset(place / "data"), encoder=Oracle()), **PERFECT[name])
    # means and entropies of doubles
    assert measured(name, result) == pytest.approx([1.0] * len(measured(name, result)), abs=1e-12)


@EVERY
def test_features_that_say_nothing(name: str, place: Path) -> None:
    result = run(name, place, evaluation_of(open_dataset(place / "data"), encoder=Oracle(blind=True)))
    json.dumps(result, allow_nan=False)
    assert all(0 <= share <= 1 for share in measured(name, result))
    if "top1" in CASES[name].measures:
        # balanced classes: one answer for all of them is right once in four
        chance = 0.5 if name in ("fewshot", "zeroshot") else 0.25
        assert shares(result["top1"])[0] == pytest.approx(chance, abs=1e-12)


def test_without_proposals_nothing_is_found(place: Path) -> None:
    silent = {"proposals": ProposalConfig((0.999,))}
    result = run("detect", place, evaluation_of(open_dataset(place / "data"), encoder=Oracle(blind=True)), **silent)
    assert result["num_proposals"] == 0 and result["num_segments"] == 8
    assert measured("detect", result) == [0.0] * 3 and set(result["per_class"].values()) == {0.0}


# the others draw clips, weights or centres by the number of a class
@pytest.mark.parametrize("name", ["knn", "logistic", "retrieval", "oneshot", "zeroshot", "semi", "cluster"])
def test_numbers_of_classes_are_names(name: str, place: Path) -> None:
    dataset = open_dataset(place / "data")
    order = np.array([2, 0, 3, 1])
    names = [CLASSES[number] for number in np.argsort(order)]
    other = replace(dataset, labels=order[dataset.labels], meta={**dataset.meta, "class_names": names})
    words = {name: row.tolist() for name, row in zip(CLASSES, np.load(place / "words.npy"), strict=True)}
    (place / "words.json").write_text(json.dumps(words))
    given = {"embeddings": place / "words.json"} if name == "zeroshot" else {}
    results = [run(name, place, evaluation_of(data), **given) for data in (dataset, other)]
    assert measured(name, results[0]) == pytest.approx(measured(name, results[1]), abs=1e-12)
    assert len({repr(result.get("confusion")) for result in results}) == (2 if "confusion" in results[0] else 1)


@pytest.mark.parametrize("name", ["knn", "logistic", "retrieval", "oneshot", "zeroshot"])
def test_the_order_of_a_split_changes_nothing(name: str, place: Path) -> None:
    dataset, draw = open_dataset(place / "data"), np.random.default_rng(2)
    mixed = SimpleNamespace(train=draw.permutation(SPLIT.train), test=draw.permutation(SPLIT.test))
    results = [run(name, place, evaluation_of(dataset, split)) for split in (SPLIT, mixed)]
    assert measured(name, results[0]) == pytest.approx(measured(name, results[1]), abs=1e-12)
    assert results[0].get("confusion") == results[1].get("confusion")


@pytest.fixture
def commands(place: Path, tmp_path: Path, monkeypatch) -> Path:
    """Beside the data a checkpoint in `run`, of an encoder of 20 joints."""
    monkeypatch.chdir(place)
    encoder = encoder_of()
    state = {
        "encoder": {"name": "usdrl-dste", "config": encoder.config}, "eval_view": eval_view(FRAMES), "topology": "kinect-20-ucla",
    }  # fmt: skip
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, weights({"encoder": encoder}), state)
    return tmp_path / "run"


def test_untrimmed_tasks_name_leaving_one_out(commands: Path, capsys) -> None:
    assert main(["evaluate", "detect", str(commands), "data", "--quiet"]) == 2
    assert "leave_one_out, protocol or split_file must be given for detect, got none." in capsys.readouterr().err


@pytest.mark.parametrize("task", ["knn", "segment"])
def test_commands_refuse_in_one_line(task: str, commands: Path, capsys) -> None:
    def refused(data: str, split: dict[str, list[int]]) -> str:
        (commands / "parts.json").write_text(json.dumps(split))
        assert main(["evaluate", task, str(commands), data, "--split-file", str(commands / "parts.json"), "--quiet"]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and "Traceback" not in shown.err
        (line,) = shown.err.splitlines()
        assert line.startswith("error: ")
        return line

    parts = {"train": list(range(16)), "test": list(range(16, 24))}
    line = refused("ntu", parts)
    assert "kinect-20-ucla" in line and "ntu-25" in line
    assert "in both" in refused("data", {**parts, "train": list(range(17))})
    none = pack_arrays(
        [np.ones((9, 1, 20, 3))] * 24, out=commands / "bare", topology="kinect-20-ucla", labels=None, class_names=CLASSES
    )
    assert ("must have segments" if task == "segment" else "must have labelled clips") in refused(str(none.path), parts)
    assert not list(commands.glob(f"{task}*"))
