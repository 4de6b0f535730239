"""The command line of evaluation: `fastskel evaluate TASK RUN DATA`."""

from fastskel.cli_evaluate.few_labels import cluster, fewshot, oneshot, semi, zeroshot
from fastskel.cli_evaluate.frozen import knn, linear
from fastskel.cli_evaluate.fusion import fusion
from fastskel.cli_evaluate.options import Command, Data, Run, chosen_split
from fastskel.cli_evaluate.retrieval import retrieval

__all__ = ["Command", "Data", "Run", "chosen_split", "evaluate_commands"]


def evaluate_commands() -> dict[str, Command]:
    """Commands by the name of their task."""
    # the settings of these are declared beside torch
    from fastskel.cli_evaluate.dense import detect, segment
    from fastskel.cli_evaluate.trained import early, finetune, transfer

    return {
        "knn": knn,
        "linear": linear,
        "finetune": finetune,
        "semi": semi,
        "retrieval": retrieval,
        "transfer": transfer,
        "fewshot": fewshot,
        "oneshot": oneshot,
        "zeroshot": zeroshot,
        "detect": detect,
        "segment": segment,
        "early": early,
        "cluster": cluster,
        "fusion": fusion,
    }
