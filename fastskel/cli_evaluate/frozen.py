"""Commands that judge frozen features: nearest neighbours, linear probe."""

from __future__ import annotations

from fastskel.cli_evaluate.options import Data, EvaluateOptions, Run, prepare, say

__all__ = ["knn", "linear"]


def knn(run: Run, data: Data, k: int = 1, common: EvaluateOptions = EvaluateOptions()) -> None:
    """Classify test clips by their nearest training clips.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        k: Neighbours that vote.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_knn

    evaluation, folder = prepare("knn", run, data, common, [f"k{k}"] if k != 1 else [])
    say(evaluate_knn(evaluation, folder, k=k), folder)


def linear(
    run: Run,
    data: Data,
    learning_rate: float | None = None,
    epochs: int = 160,
    seed: int = 0,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Train a linear layer on frozen features and classify the test clips.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        learning_rate: Step size on features as they are; by default it and standardisation are chosen on held-out clips.
        epochs: Passes over the training features.
        seed: Key of the probe's start and of its order.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import LinearConfig, evaluate_linear

    standardise = None if learning_rate is None else False
    config = LinearConfig(learning_rate=learning_rate, standardise=standardise, epochs=epochs, seed=seed)
    evaluation, folder = prepare("linear", run, data, common)
    say(evaluate_linear(evaluation, folder, config=config), folder)
