"""Commands that judge frozen features: nearest neighbours, linear probe."""

from __future__ import annotations

from typing import Literal

from fastskel.cli_evaluate.options import Data, EvaluateOptions, Run, changed, prepare, say

__all__ = ["Setting", "knn", "linear"]

# whose step size is published: the names in fastskel.recipes.LINEAR_RATES
Setting = Literal["ntu60-xsub", "ntu60-xview", "ntu120-xsub", "ntu120-xset", "pku2-xsub"]


def knn(run: Run, data: Data, k: int = 1, common: EvaluateOptions = EvaluateOptions()) -> None:
    """Classify test clips by their nearest training clips.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        k: Neighbours that vote.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_knn

    evaluation, folder = prepare("knn", run, data, common, changed({"k": k}, knn))
    say(evaluate_knn(evaluation, folder, k=k), folder)


def linear(
    run: Run,
    data: Data,
    learning_rate: float | None = None,
    published: Setting | None = None,
    epochs: int = 160,
    seed: int = 0,
    solver: Literal["sgd", "exact"] = "sgd",
    penalty: float | None = None,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Train a linear layer on frozen features and classify the test clips.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        learning_rate: Step size on features as they are; by default it and standardisation are chosen on held-out clips.
        published: Take the step size that was published for this setting.
        epochs: Passes over the training features.
        seed: Key of the probe's start and of its order, and of the clips that are held out.
        solver: sgd with the reference's schedule, or exact: a logistic regression with a penalty, to convergence.
        penalty: Of the exact solver, in units of the features' variance; by default it and standardisation are chosen on
            held-out clips.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import LinearConfig, LogisticConfig, evaluate_linear, evaluate_logistic

    if solver == "exact" and (learning_rate is not None or published is not None or epochs != 160):
        raise ValueError(
            "evaluate: learning_rate, published and epochs must be left out, the exact solver has none. Leave them out."
        )
    if solver == "sgd" and penalty is not None:
        raise ValueError("evaluate: penalty must be left out, only the exact solver has one. Pass --solver exact.")
    if published is not None:
        from fastskel.recipes import LINEAR_RATES

        if learning_rate is not None:
            raise ValueError("evaluate: learning_rate or published must be given, got both. Leave one out.")
        learning_rate = LINEAR_RATES[published]
    settings = {"solver": solver, "learning_rate": learning_rate, "epochs": epochs, "penalty": penalty, "seed": seed}
    evaluation, folder = prepare("linear", run, data, common, changed(settings, linear))
    if solver == "exact":
        result = evaluate_logistic(evaluation, folder, config=LogisticConfig(penalty=penalty, seed=seed))
    else:
        standardise = None if learning_rate is None else False
        config = LinearConfig(learning_rate=learning_rate, standardise=standardise, epochs=epochs, seed=seed)
        result = evaluate_linear(evaluation, folder, config=config)
    say(result, folder)
