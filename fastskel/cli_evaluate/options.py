"""What every evaluation is asked on the command line, and the evaluation that the answers describe."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from fastskel.data.packed import PackedDataset
    from fastskel.data.protocols import Split
    from fastskel.data.views import ViewSpec
    from fastskel.evaluate import Evaluation
    from fastskel.models.encoder import Encoder
    from fastskel.skeleton import Topology

__all__ = [
    "Command", "Data", "EvaluateOptions", "Run", "changed", "chosen_split", "prepare", "refuse_of_fine_tuning", "say",
    "warn_if_seen",
]  # fmt: skip

Command = Callable[..., None]
Data = Annotated[Positional[Path], arg(metavar="DATA")]
Run = Annotated[Positional[Path], arg(metavar="RUN")]

# settings whose names in a folder's name are not their own
SHORT = {
    "centre": "centred", "classes": "classes-", "exemplars": "exemplars-", "fine_tune": "fine-tuned", "ks": "k",
    "learning_rate": "lr", "novel": "novel-", "num_clusters": "clusters", "skip_map": "nomap", "train_full": "train-full",
    "unseen": "unseen-", "weights": "",
}  # fmt: skip
# those of every evaluation that change results and are not named otherwise
SHOWN_OPTIONS = ("precision", "average", "normalise", "modality", "num_head", "gap", "alpha")
# in bytes, before what is left is told by a digest: file systems take 255
LONGEST_NAME = 200


@dataclass(frozen=True)
class EvaluateOptions:
    """What every evaluation asks for.

    Attributes:
        protocol: Protocol of the data set, such as xsub; this or split_file is needed.
        split_file: JSON file of clip names or numbers under train and test.
        out: Folder for the results; by default one inside the run, or beside a published file.
        device: cpu, cuda, or auto for a GPU where there is one.
        precision: Compute type of the encoder.
        average: Evaluate the running average of the weights that the run kept.
        normalise: Normalise clips otherwise than the run did; published files do not say how, none is assumed.
        modality: Stream of a published file, which does not record it; joint is assumed.
        num_head: Attention heads of a published file; 1 is assumed.
        gap: Gap of a published DSTE; 4 is assumed.
        alpha: Branch weight of a published DSTE; 0.5 is assumed.
        quiet: Show no progress bar.
    """

    protocol: str | None = None
    split_file: Path | None = None
    out: Path | None = None
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    average: bool = False
    normalise: Literal["none", "center", "center-first", "align", "align-yaw"] | None = None
    modality: Literal["joint", "bone", "motion"] | None = None
    num_head: int | None = None
    gap: int | None = None
    alpha: float | None = None
    quiet: bool = False


def chosen_split(dataset: PackedDataset, protocol: str | None, split_file: Path | None) -> tuple[str, Split] | None:
    """Name and clips (N,) of the split that was asked for, if one was.

    Raises:
        ValueError: If both are given.
    """
    from fastskel.data.protocols import split

    if protocol is not None and split_file is not None:
        raise ValueError("fastskel: protocol or split_file must be given, got both. Leave one out.")
    if protocol is not None:
        return protocol, split(dataset, protocol)
    return (split_file.stem, split(dataset, "", split_file)) if split_file is not None else None


def _by_name(settings: Any) -> Mapping[str, Any]:
    if isinstance(settings, Mapping):
        return settings
    if callable(settings):
        return {name: parameter.default for name, parameter in inspect.signature(settings).parameters.items()}
    return asdict(settings)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _spelt(value: Any) -> str:
    """Write a value as a file name can hold it; what would not fit, or could be read as another value, by a digest."""
    several = isinstance(value, (list, tuple))
    parts = [str(part).removesuffix(".0") for part in (value if several else [value])]
    text = "-".join(parts)
    plain = not several or not any("-" in part for part in parts)
    return text if plain and re.fullmatch(r"[\w.+-]{1,60}", text, re.ASCII) else _digest(repr(parts))


def changed(settings: Any, usual: Any) -> list[str]:
    """Name the settings that are not as usual, which tell one folder of results from another.

    Args:
        settings: By name, or a dataclass of them. Only what changes results.
        usual: The same as they usually are, or the command whose defaults they are.
    """
    given, default = _by_name(settings), _by_name(usual)
    shown = []
    for name in (name for name in given if given[name] != default[name]):
        value, short = given[name], SHORT.get(name, name)
        # a choice names itself, as does what is switched on
        shown.append(short if value is True else _spelt(value) if isinstance(value, str) else f"{short}{_spelt(value)}")
    return shown


def refuse_of_fine_tuning(given: Sequence[str], resume: bool) -> None:
    """Refuse what only a fine-tuning reads, where none was asked for.

    Args:
        given: Its settings that are not as usual, by name.
        resume: Whether it was to go on.
    Raises:
        ValueError: If there are any.
    """
    left = [*given, *(["resume"] if resume else [])]
    if left:
        names, whose = ", ".join(left), "they are" if len(left) > 1 else "it is"
        raise ValueError(f"evaluate: {names} must be left out without fine_tune, which {whose} of. Pass --fine-tune.")


def _encoder(run: Path, topology: Topology, options: EvaluateOptions) -> tuple[Encoder, ViewSpec, Mapping[str, Any]]:
    """Encoder of views (N, T, M, V, C), its view, and what its checkpoint says; a published file says nothing."""
    unrecorded = {k: getattr(options, k) for k in ("modality", "num_head", "gap", "alpha")}
    given = {k: v for k, v in unrecorded.items() if v is not None}
    if run.is_file():
        from fastskel.compat.usdrl.checkpoint import load_published_encoder

        if options.average:
            raise ValueError(f"evaluate: average must be left out, {run} is a published file without one. Leave it out.")
        return *load_published_encoder(run, topology=topology, **given), {}
    if given:
        raise ValueError(f"evaluate: {', '.join(given)} must be left out, {run} records them. They are for published files.")
    from fastskel.evaluate.classifier import adapted_again
    from fastskel.train import load_encoder

    encoder, view, checkpoint = load_encoder(run, average=options.average)
    # what a transfer fine-tuned is an encoder of its data's bodies and coordinates
    return adapted_again(encoder, checkpoint.state["encoder"]), view, checkpoint.state


def _folder_name(parts: Sequence[str], options: EvaluateOptions) -> str:
    """Name the folder of results after task, data and settings: other settings, other folder."""
    given = {name: getattr(options, name) for name in SHOWN_OPTIONS}
    name = "-".join([*parts, *changed(given, EvaluateOptions())])
    whole = name.encode()
    return name if len(whole) <= LONGEST_NAME else f"{whole[:LONGEST_NAME].decode(errors='ignore')}-{_digest(name)}"


def _places(value: Any) -> Any:
    """Where paths lead, if it is a list of them."""
    return [Path(part).resolve() for part in value] if isinstance(value, list) else value


def _refuse_others(folder: Path, reads: Mapping[str, Any]) -> None:
    """Refuse a folder with results of something else that goes by the same name.

    Args:
        folder: Where results are to be written.
        reads: What they are of, by the keys under which results record it; what these do not record is not compared.
    Raises:
        ValueError: Naming what differs.
    """
    path = folder / "results.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        # damaged: there is nothing to keep
        return
    found["data"] = found.get("dataset", {}).get("sha256")
    for key, value in reads.items():
        if found.get(key) is not None and _places(found[key]) != _places(value):
            raise ValueError(
                f"evaluate: {path} must be of the same {key.removesuffix('_sha256')}, got results of another one of that name. "
                "Rename yours, or choose a folder (--out)."
            )


def prepare(
    task: str,
    run: Path,
    data: Path,
    options: EvaluateOptions,
    shown: Sequence[str] = (),
    parts: tuple[str, Split] | None = None,
    skeleton: str | None = None,
    reads: Mapping[str, Any] | None = None,
) -> tuple[Evaluation, Path]:
    """Open data and encoder, and choose the folder of the results.

    Args:
        task: Its name.
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        options: What every evaluation asks for.
        shown: Settings of the task that tell its folder from those of others.
        parts: Name and clips (N,) of a split that the task makes itself; None: that of the options.
        skeleton: That of a published file, which does not record it; None is the data set's.
        reads: What else the results are of, by the keys under which they record it: files and runs go by their last name only.
    Returns:
        The evaluation of clips (N, T, M, V, C), and the folder.
    Raises:
        ValueError: On options that do not go together, without a split, or if results of another split, data set or file of
            the same name are where these would go.
    """
    from fastskel.data.identity import dataset_identity, split_identity
    from fastskel.data.packed import open_dataset
    from fastskel.data.protocols import protocols
    from fastskel.evaluate import Evaluation
    from fastskel.evaluate.seen import clips_seen, seen_by
    from fastskel.skeleton import topology
    from fastskel.train import choose_device

    dataset = open_dataset(data)
    parts = parts or chosen_split(dataset, options.protocol, options.split_file)
    if parts is None:
        known = ", ".join(protocols(dataset)) or "none"
        raise ValueError(f"evaluate: protocol or split_file must be given, got neither. Protocols of {data}: {known}.")
    encoder, view, told = _encoder(run, dataset.topology if skeleton is None else topology(skeleton), options)
    if run.is_file() and skeleton is not None:
        view = replace(view, topology=skeleton)
    if options.normalise is not None:
        view = replace(view, normalise=options.normalise)
    # a published file and a checkpoint are left as they are: results go beside the one, into the run of the other
    base = base_run = run
    if run.is_file():
        base = run.with_name(f"{run.name}-results")
    elif run.resolve().parent.name == "checkpoints":
        base_run = run.resolve().parents[1]
        base = base_run / f"{run.resolve().name}-results"
    folder = options.out or base / _folder_name([task, parts[0], data.resolve().name, *shown], options)
    if options.out is None:
        own = {"data": dataset_identity(dataset), **(reads or {})}
        # a protocol is named by what it is
        _refuse_others(folder, own | ({} if options.split_file is None else {"split_sha256": split_identity(parts[1])}))
    seen = seen_by(base_run, told, dataset)
    evaluation = Evaluation(
        encoder, dataset, parts[1], view, protocol=parts[0], run=str(run), cache=base / "features",
        device=choose_device(options.device), precision=options.precision, progress=not options.quiet,
        trained_on=clips_seen(seen, dataset), seen=seen,
    )  # fmt: skip
    return evaluation, folder


def warn_if_seen(result: Mapping[str, Any]) -> None:
    """Say on standard error how many of the (N,) test clips were trained on, and what is not known of their labels."""
    if result["test_clips_trained_on"]:
        print(
            f"warning: {result['test_clips_trained_on']} of {result['num_test']} test clips were trained on, without their "
            "labels; pretrain on other clips (--protocol or --split-file) to keep them apart",
            file=sys.stderr,
        )
    if result["test_labels_not_known"]:
        print(
            f"warning: whether the encoder saw labels of the test clips is not known: {result['test_labels_not_known']}",
            file=sys.stderr,
        )


def say(result: Mapping[str, Any], folder: Path, names: Sequence[str] = ("top1", "top5", "mean_class")) -> None:
    """Print results that are fractions of one, () each, in percent, in one line with what they are of."""
    warn_if_seen(result)
    row = "  ".join(f"{name} {100 * result[name]:.1f} %" for name in names)
    print(f"{row}   ({result['num_train']} train, {result['num_test']} test clips; {folder})")
