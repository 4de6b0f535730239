"""Commands that judge frozen features by few labels, by none, or by the names of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastskel.cli_evaluate.options import Data, EvaluateOptions, Run, changed, prepare, say, warn_if_seen

__all__ = ["cluster", "fewshot", "oneshot", "semi", "zeroshot"]


def _listed(option: str, names: Sequence[str], file: Path | None) -> list[str] | None:
    """Names from the command line, or from a file with one in each line; None if neither is given."""
    if file is None:
        return list(names) or None
    if names:
        raise ValueError(f"evaluate: {option} must be given by name or by file, got both. Leave one out.")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"evaluate: {file} must name something, one in each line, got nothing. Correct the file.")
    return found


def _spread(row: Mapping[str, Any]) -> str:
    """Mean and deviation in percent."""
    deviation = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
    return f"{100 * row['mean']:.1f}{deviation} %"


def semi(
    run: Run,
    data: Data,
    fractions: tuple[float, ...] = (0.01, 0.05, 0.1),
    sampling: Literal["random", "balanced"] = "random",
    seeds: int = 5,
    solver: Literal["exact", "sgd"] = "exact",
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Train linear probes on small parts of the training labels.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        fractions: Parts of the labelled training clips.
        sampling: Which clips are labelled: random, as in the reference, or equally many of each class.
        seeds: Parts drawn of each fraction.
        solver: exact: a logistic regression to convergence; sgd with the reference's schedule.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import LinearConfig, LogisticConfig, evaluate_semi

    config = LogisticConfig() if solver == "exact" else LinearConfig(learning_rate=None, standardise=None)
    shown = changed({"fractions": fractions, "sampling": sampling, "seeds": seeds, "solver": solver}, semi)
    evaluation, folder = prepare("semi", run, data, common, shown)
    result = evaluate_semi(evaluation, folder, fractions=fractions, sampling=sampling, seeds=seeds, config=config)
    warn_if_seen(result)
    for row in result["fractions"]:
        # a balanced part has one clip of each class at least, which may be more than was asked for
        asked, known = int(result["num_train"] * row["fraction"]), row["num_labels"]
        filled = f", {100 * known / result['num_train']:.1f} %: one of each class" if known > asked else ""
        head = f"{100 * row['fraction']:g} % of the labels ({known} clips{filled})"
        print(f"{head}  top1 {_spread(row['top1'])}  mean_class {_spread(row['mean_class'])}")
    print(f"{sampling} parts, {seeds} seeds   ({result['num_train']} train, {result['num_test']} test clips; {folder})")


def fewshot(
    run: Run,
    data: Data,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 1000,
    classifier: Literal["mean", "logistic"] = "mean",
    classes: tuple[str, ...] = (),
    classes_file: Path | None = None,
    centre: bool = False,
    seed: int = 0,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Tell a few classes apart by a few clips of each, over many episodes of test clips.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        ways: Classes of an episode.
        shots: Clips shown of each.
        queries: Clips asked for of each, where there are as many.
        episodes: Episodes, each drawn anew.
        classifier: mean: the nearest class mean by angle; logistic: a regression on the clips shown.
        classes: Classes to draw from, by name or number; by default all with enough test clips.
        classes_file: The same, one in each line of a text file.
        centre: Subtract the mean of the training clips' features first.
        seed: Key of the draws.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_fewshot
    from fastskel.report.numbers import figures

    chosen = _listed("classes", classes, classes_file)
    settings = {"queries": queries, "episodes": episodes, "classifier": classifier, "centre": centre, "seed": seed}
    shown = [f"{ways}way", f"{shots}shot", *changed({**settings, "classes": chosen or ()}, fewshot)]
    evaluation, folder = prepare("fewshot", run, data, common, shown)
    result = evaluate_fewshot(
        evaluation, folder, ways=ways, shots=shots, queries=queries, episodes=episodes, classifier=classifier, classes=chosen,
        centre=centre, seed=seed,
    )  # fmt: skip
    warn_if_seen(result)
    (top1,) = figures({"top1": result["top1"]})
    print(
        f"{ways}-way {shots}-shot top1 {top1.text}   ({episodes} episodes, {len(result['classes'])} classes, "
        f"{result['num_test']} test clips; {folder})"
    )


def oneshot(
    run: Run,
    data: Data,
    novel: tuple[str, ...] = (),
    novel_file: Path | None = None,
    exemplars: Path | None = None,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Recognise clips of novel classes by one clip of each.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set; for NTU RGB+D 120 use --protocol one-shot.
        novel: Novel classes, by name or number; by default those of the protocol, or of the test part.
        novel_file: The same, one in each line of a text file.
        exemplars: Text file of clip names, one clip of each novel class; by default those of the protocol, or the first
            of each class.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_oneshot

    settings = {"novel": _listed("novel", novel, novel_file), "exemplars": _listed("exemplars", (), exemplars)}
    shown = changed(settings, {"novel": None, "exemplars": None})
    evaluation, folder = prepare("oneshot", run, data, common, shown)
    result = evaluate_oneshot(evaluation, folder, **settings)
    say(result, folder, ("top1", "mean_class"))


def zeroshot(
    run: Run,
    data: Data,
    embeddings: Path,
    unseen: tuple[str, ...] = (),
    unseen_file: Path | None = None,
    penalty: float | None = None,
    seed: int = 0,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Recognise clips of classes without a training clip by text embeddings of the class names.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set with class names.
        embeddings: .npy with a row for each class, or .npz or .json with a vector for each class name.
        unseen: Classes that are not shown, by name or number.
        unseen_file: The same, one in each line of a text file.
        penalty: Of the ridge regression, in units of the features' variance; by default chosen on classes kept back.
        seed: Key of the classes kept back.
        common: What every evaluation takes.
    """
    from fastskel.data.packed import checksum
    from fastskel.evaluate import evaluate_zeroshot

    hidden = _listed("unseen", unseen, unseen_file)
    if hidden is None:
        raise ValueError("evaluate: unseen or unseen_file must be given, got neither. Name the classes that are not shown.")
    shown = [embeddings.stem, *changed({"unseen": hidden, "penalty": penalty, "seed": seed}, zeroshot)]
    reads = {"embeddings_sha256": checksum(embeddings)} if embeddings.is_file() else {}
    evaluation, folder = prepare("zeroshot", run, data, common, shown, reads=reads)
    result = evaluate_zeroshot(evaluation, folder, embeddings=embeddings, unseen=hidden, penalty=penalty, seed=seed)
    say(result, folder, ("top1", "mean_class"))
    print(f"among the {len(result['unseen'])} unseen classes; by chance {100 / len(result['unseen']):.1f} %")
    told = {name: value for name, value in result["generalised"].items() if value is not None}
    print("among all classes  " + "  ".join(f"{name} {100 * value:.1f} %" for name, value in told.items()))


def cluster(
    run: Run,
    data: Data,
    part: Literal["test", "all"] = "test",
    num_clusters: int | None = None,
    raw: bool = False,
    seeds: int = 5,
    restarts: int = 5,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Cluster features without labels, and compare the clusters with the classes.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        part: Clips of the test part, or of both.
        num_clusters: Clusters; by default as many as classes.
        raw: Leave features at their length; by default they are scaled to unit length.
        seeds: Clusterings, each with first centres of its own.
        restarts: Runs of each, of which the tightest counts.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_cluster

    settings = {"part": part, "num_clusters": num_clusters, "raw": raw, "seeds": seeds, "restarts": restarts}
    evaluation, folder = prepare("cluster", run, data, common, changed(settings, cluster))
    result = evaluate_cluster(
        evaluation, folder, part=part, num_clusters=num_clusters, normalise=not raw, seeds=seeds, restarts=restarts
    )
    warn_if_seen(result)
    row = "  ".join(f"{name} {_spread(result[name])}" for name in ("accuracy", "nmi", "ari"))
    clips = result["num_train"] + result["num_test"]
    print(f"{row}   ({result['num_clusters']} clusters of {clips} clips, {seeds} seeds; {folder})")
