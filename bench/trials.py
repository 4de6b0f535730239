"""The downstream tasks with the settings that they are tried with on real data, and what is read of their results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from fastskel.bench.accuracy import PROBE

from fastskel import philox
from fastskel.evaluate import TASKS, DenseConfig, Evaluation, FinetuneConfig, FrameHeadConfig

__all__ = ["TRIALS", "Metrics", "Trial"]

Metrics = dict[str, float]
# the shares of a training part whose labels are known; a single clip of every class is the least
FRACTIONS = (0.01, 0.1, 0.2)
# a fifth of the classes is unseen, as twelve of sixty are where NTU RGB+D 60 is split so
UNSEEN_PARTS = 5


@dataclass(frozen=True)
class Trial:
    """A task with its settings, and what is read of its results.

    Attributes:
        run: From an evaluation and a seed to metrics that are fractions of one.
        trains: Whether the encoder itself is trained further, which raw coordinates cannot be.
        untrimmed: Whether it takes a column to leave out instead of a protocol.
        worded: Whether it is given a file of text embeddings of the class names too.
    """

    run: Callable[..., Metrics]
    trains: bool = False
    untrimmed: bool = False
    worded: bool = False


def _retrieval(evaluation: Evaluation, seed: int) -> Metrics:
    found = TASKS["retrieval"].run(evaluation)
    return {"top1": found["top1"], "map": found["map"], **{f"recall@{k}": v for k, v in found["recall_at"].items()}}


def _semi(evaluation: Evaluation, seed: int) -> Metrics:
    found = TASKS["semi"].run(evaluation, fractions=FRACTIONS, sampling="balanced", seeds=5)
    return {f"top1@{row['num_labels']}": row["top1"]["mean"] for row in found["fractions"]}


def _few_shot(evaluation: Evaluation, seed: int) -> Metrics:
    return {
        f"5-way {shots}-shot": TASKS["fewshot"].run(evaluation, ways=5, shots=shots, episodes=600, seed=seed)["top1"]["mean"]
        for shots in (1, 5)
    }


def _one_shot(evaluation: Evaluation, seed: int) -> Metrics:
    found = TASKS["oneshot"].run(evaluation)
    if found["train_clips_of_novel_classes"]:
        raise ValueError(
            f"downstream: the training part of {evaluation.protocol} must have no clip of a class that is tested, got "
            f"{found['train_clips_of_novel_classes']}. Use the protocol one-shot."
        )
    return {name: found[name] for name in ("top1", "mean_class")}


def _zero_shot(evaluation: Evaluation, seed: int, words: Path) -> Metrics:
    """Means over parts of the classes, each of which is unseen once."""
    order = philox.permutation(seed, 0, len(evaluation.class_names), philox.Use.SUBSET).tolist()
    parts = [
        TASKS["zeroshot"].run(evaluation, embeddings=words, unseen=order[part::UNSEEN_PARTS], seed=seed)
        for part in range(UNSEEN_PARTS)
    ]
    among_all = ("seen", "unseen", "harmonic")
    return {
        "top1": statistics.mean(found["top1"] for found in parts),
        "chance": statistics.mean(1 / len(found["unseen"]) for found in parts),
        **{name: statistics.mean(found["generalised"][name] for found in parts) for name in among_all},
    }


def _early(evaluation: Evaluation, seed: int) -> Metrics:
    found = TASKS["early"].run(evaluation, config=replace(PROBE, seed=seed))
    return {"area": found["area"], **{f"top1@{row['ratio']:g}": row["top1"] for row in found["curve"]}}


def _early_causal(evaluation: Evaluation, seed: int) -> Metrics:
    found = TASKS["early"].run(evaluation, finetune_config=FinetuneConfig(seed=seed), causal=True)
    return {"area": found["area"], **{f"top1@{row['ratio']:g}": row["top1"] for row in found["curve"]}}


def _cluster(evaluation: Evaluation, seed: int) -> Metrics:
    found = TASKS["cluster"].run(evaluation)
    return {name: found[name]["mean"] for name in ("accuracy", "nmi", "ari")}


def _linear(evaluation: Evaluation, seed: int) -> Metrics:
    return {"top1": TASKS["linear"].run(evaluation, config=replace(PROBE, seed=seed))["top1"]}


def _finetune(evaluation: Evaluation, seed: int) -> Metrics:
    return {"top1": TASKS["finetune"].run(evaluation, config=FinetuneConfig(seed=seed))["top1"]}


def _of_detection(found: Mapping[str, Any]) -> Metrics:
    return {name: found[name] for name in ("map_action", "map_video", "interpolated_map_action", "f1")}


def _of_segmentation(found: Mapping[str, Any]) -> Metrics:
    return {name: found[name] for name in ("accuracy", "majority_accuracy", "edit", "f1@10", "f1@25", "f1@50")}


def _detect(evaluation: Evaluation, seed: int) -> Metrics:
    config = DenseConfig(leave_one_out=evaluation.protocol, head=FrameHeadConfig(seed=seed))
    return _of_detection(TASKS["detect"].run(evaluation, config=config))


def _segment(head: Literal["linear", "tcn"]) -> Callable[[Evaluation, int], Metrics]:
    def run(evaluation: Evaluation, seed: int) -> Metrics:
        config = DenseConfig(leave_one_out=evaluation.protocol, head=FrameHeadConfig(head=head, seed=seed))
        return _of_segmentation(TASKS["segment"].run(evaluation, config=config))

    return run


def _tuned_frames(evaluation: Evaluation, seed: int) -> Metrics:
    """Detection and segmentation by the same fine-tunings, one for each fold."""
    # a training for every fold
    tuning = FinetuneConfig(seed=seed, epochs=20, warmup_epochs=2)
    config = DenseConfig(leave_one_out=evaluation.protocol)
    with TemporaryDirectory() as folder:
        detected = TASKS["detect"].run(evaluation, folder, config=config, finetune_config=tuning)
        # nothing is left to train
        segmented = TASKS["segment"].run(evaluation, folder, config=config, finetune_config=tuning, resume=True)
    return {**_of_detection(detected), **_of_segmentation(segmented)}


TRIALS: Mapping[str, Trial] = {
    "knn": Trial(lambda evaluation, seed: {"top1": TASKS["knn"].run(evaluation)["top1"]}),
    "retrieval": Trial(_retrieval),
    "linear": Trial(_linear),
    "exact": Trial(lambda evaluation, seed: {"top1": TASKS["logistic"].run(evaluation)["top1"]}),
    "semi": Trial(_semi),
    "fewshot": Trial(_few_shot),
    "oneshot": Trial(_one_shot),
    "zeroshot": Trial(_zero_shot, worded=True),
    "cluster": Trial(_cluster),
    "early": Trial(_early),
    "early-causal": Trial(_early_causal, trains=True),
    "finetune": Trial(_finetune, trains=True),
    "detect": Trial(_detect, untrimmed=True),
    "segment": Trial(_segment("linear"), untrimmed=True),
    "segment-tcn": Trial(_segment("tcn"), untrimmed=True),
    "frames-tuned": Trial(_tuned_frames, trains=True, untrimmed=True),
}
