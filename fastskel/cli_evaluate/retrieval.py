"""The command that looks test clips up among training clips."""

from __future__ import annotations

from fastskel.cli_evaluate.options import Data, EvaluateOptions, Run, changed, prepare, warn_if_seen

__all__ = ["retrieval"]


def retrieval(
    run: Run, data: Data, ks: tuple[int, ...] = (), skip_map: bool = False, common: EvaluateOptions = EvaluateOptions()
) -> None:
    """Look test clips up among the training clips, and judge their nearest.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        ks: Numbers of neighbours to judge; by default 1, 5 and 10.
        skip_map: Leave out mean average precision, which needs the whole ranking: several times faster on large data.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_retrieval

    shown = changed({"ks": ks, "skip_map": skip_map}, retrieval)
    evaluation, folder = prepare("retrieval", run, data, common, shown)
    result = evaluate_retrieval(evaluation, folder, ks=ks or None, mean_average_precision=not skip_map)
    warn_if_seen(result)
    row = [f"top1 {100 * result['top1']:.1f} %"]
    row += [] if result["map"] is None else [f"mAP {100 * result['map']:.1f} %"]
    for name in ("recall", "precision"):
        row += [f"{name}@{k} {100 * share:.1f} %" for k, share in result[f"{name}_at"].items() if k != "1"]
    missing = f", {result['num_without_match']} without a match" if result["num_without_match"] else ""
    print(f"{'  '.join(row)}   ({result['num_train']} train, {result['num_test']} test clips{missing}; {folder})")
