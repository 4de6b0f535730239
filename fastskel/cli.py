"""The command line: `fastskel pack | unpack | convert | info | show | check | plan | pretrain | evaluate | ...`."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from fastskel.cli_bench import bench_commands
from fastskel.cli_pack import convert, list_formats, pack_commands, unpack_commands
from fastskel.cli_plan import plan_commands

if TYPE_CHECKING:
    from fastskel.data.packed import PackedDataset
    from fastskel.data.protocols import Split
    from fastskel.data.views import ViewSpec
    from fastskel.models.encoder import Encoder
    from fastskel.recipes import USDRLRecipe

__all__ = ["main"]

PROG = "fastskel"
ABOUT = f"""usage: {PROG} COMMAND ...

  pack SOURCE SRC DST           raw or prepared files into a packed data set
  unpack FORMAT DATA DST        a packed data set into the files of another tool
  convert DATA DST --to NAME    a packed data set with another skeleton
  info DATA                     what a packed data set holds
  show DATA CLIP                pictures of one clip
  check DATA                    what is wrong with a packed data set
  plan RECIPE                   memory, time and traffic of a training before it starts
  pretrain RECIPE DATA          train an encoder
  evaluate knn|linear RUN DATA  how good its features are
  export RUN --to usdrl         a checkpoint for the reference's scripts
  demo                          all of it, on synthetic motion
  bench SUITE                   how fast it is on this machine, against the published code

{PROG} COMMAND --help says more, {PROG} --version which one this is."""

Command = Callable[..., None]
Data = Annotated[Positional[Path], arg(metavar="DATA")]
Clip = Annotated[Positional[str], arg(metavar="CLIP")]
Run = Annotated[Positional[Path], arg(metavar="RUN")]


def info(data: Data, verify: bool = False) -> None:
    """Describe a packed data set.

    Args:
        data: Packed data set.
        verify: Compare every file with its checksum.
    """
    from fastskel.data.inspect import info as describe

    print(describe(data, verify=verify))


def show(data: Data, clip: Clip, out: Path = Path()) -> None:
    """Draw one clip: a strip of poses as PNG and the moving skeleton as GIF.

    Args:
        data: Packed data set.
        clip: Name or number of the clip.
        out: Folder for the pictures.
    """
    from fastskel.data.inspect import show as draw
    from fastskel.data.packed import open_dataset

    dataset = open_dataset(data)
    number = int(clip) if clip.isdecimal() and clip not in set(dataset.names.tolist()) else clip
    for path in draw(dataset, number, out):
        print(path)


def check(
    data: Data,
    protocol: str | None = None,
    split_file: Path | None = None,
    json: Path | None = None,
    picture: Path | None = None,
    crop: int = 64,
    fail_on: Literal["error", "warning", "never"] = "error",
    quiet: bool = False,
) -> None:
    """Find what is wrong with a packed data set: damage, repeats and leaks, wrong units, labels, segments.

    Ends with code 0 if nothing of the chosen severity was found, with 1 if something was, with 2 if the data or an
    option is unusable.

    Args:
        data: Packed data set.
        protocol: Compare the parts of this protocol; by default those of every protocol of the data set.
        split_file: Compare the parts of this JSON file of clip names or numbers under train and test.
        json: Write all findings to this file.
        picture: Draw an overview to this PNG file.
        crop: Frames of a training crop; shorter clips are noted.
        fail_on: Least severity that ends with code 1.
        quiet: Show no progress bar.
    """
    from fastskel.data.check import check_dataset
    from fastskel.data.packed import open_dataset

    dataset = open_dataset(data)
    report = check_dataset(dataset, protocol=protocol, split_file=split_file, crop=crop, progress=not quiet)
    print(report.table())
    if json is not None:
        report.write_json(json)
    if picture is not None:
        from fastskel.data.check_picture import draw_check

        draw_check(report, dataset, picture)
    if fail_on != "never" and report.at_least(fail_on):
        raise SystemExit(1)


def _parts(dataset: PackedDataset, protocol: str | None, split_file: Path | None) -> tuple[str, Split] | None:
    """Name and clips of the split that was asked for, if one was."""
    from fastskel.data.protocols import split

    if protocol is not None and split_file is not None:
        raise ValueError(f"{PROG}: protocol or split_file must be given, got both. Leave one out.")
    if protocol is not None:
        return protocol, split(dataset, protocol)
    return (split_file.stem, split(dataset, "", split_file)) if split_file is not None else None


def _pretrain_command(name: str, make_recipe: Callable[[], USDRLRecipe]) -> Command:
    defaults = make_recipe()

    def pretrain(
        data: Data,
        out: Path | None = None,
        protocol: str | None = None,
        split_file: Path | None = None,
        resume: bool = False,
        resume_if_started: bool = False,
        device: str = "auto",
        threads: int | None = None,
        tensorboard: bool = False,
        quiet: bool = False,
        recipe: USDRLRecipe = defaults,
    ) -> None:
        import torch

        from fastskel.data.packed import open_dataset
        from fastskel.train import pretrain as train

        if threads is not None:
            if threads < 1:
                raise ValueError(f"pretrain: threads must be at least 1, got {threads}. Leave it out for all cores.")
            torch.set_num_threads(threads)
        dataset = open_dataset(data)
        parts = _parts(dataset, protocol, split_file)
        stages = recipe.stages(dataset)
        if len(stages) != 1:
            raise ValueError(f"pretrain: recipe {name} must have one stage, got {len(stages)}. Several come later.")
        folder = out or Path("runs") / f"{name}-{data.resolve().name}-{recipe.seed}"
        checkpoint = train(
            stages[0], dataset, folder, indices=None if parts is None else parts[1].train,
            recipe={"name": name, "protocol": None if parts is None else parts[0], **asdict(recipe)},
            resume="if-started" if resume_if_started else resume, device=device, tensorboard=tensorboard, progress=not quiet,
        )  # fmt: skip
        # once for all processes that torchrun started
        if os.environ.get("RANK", "0") == "0":
            print(f"trained {stages[0].epochs} epochs; the run is {folder}, its last checkpoint {checkpoint}")

    # tyro reads the recipe's own settings off this annotation
    pretrain.__annotations__["recipe"] = type(defaults)
    pretrain.__doc__ = f"""{(make_recipe.__doc__ or name).splitlines()[0]}

    Args:
        data: Packed data set.
        out: Run folder to create, or to resume; by default runs/{name}-DATA-SEED.
        protocol: Train on the training part of this protocol; by default on all clips.
        split_file: Train on the training part of this JSON file of clip names or numbers under train and test.
        resume: Go on from the newest checkpoint of the run, bit for bit; all other settings must be the run's.
        resume_if_started: Resume, or begin where there is no run yet: for a job that a cluster may start again.
        device: cpu, cuda, or auto for a GPU where there is one; of several processes each takes one.
        threads: Threads that compute on the CPU; by default as many as it has cores.
        tensorboard: Log to TensorBoard too; the JSON log is always written.
        quiet: Show no progress bar.
        recipe: Settings of the recipe {name}.
    """
    return pretrain


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


def _encoder(run: Path, dataset: PackedDataset, options: EvaluateOptions) -> tuple[Encoder, ViewSpec]:
    unrecorded = {k: getattr(options, k) for k in ("modality", "num_head", "gap", "alpha")}
    given = {k: v for k, v in unrecorded.items() if v is not None}
    if run.is_file():
        from fastskel.compat.usdrl.checkpoint import load_published_encoder

        if options.average:
            raise ValueError(f"evaluate: average must be left out, {run} is a published file without one. Leave it out.")
        return load_published_encoder(run, topology=dataset.topology, **given)
    if given:
        raise ValueError(f"evaluate: {', '.join(given)} must be left out, {run} records them. They are for published files.")
    from fastskel.train import load_encoder

    encoder, view, _ = load_encoder(run, average=options.average)
    return encoder, view


def _evaluate(task: str, run: Path, data: Path, options: EvaluateOptions, **settings: Any) -> None:
    from fastskel.data.packed import open_dataset
    from fastskel.data.protocols import protocols
    from fastskel.evaluate import evaluate_knn, evaluate_linear
    from fastskel.train import choose_device, trained_clips

    dataset = open_dataset(data)
    parts = _parts(dataset, options.protocol, options.split_file)
    if parts is None:
        known = ", ".join(protocols(dataset)) or "none"
        raise ValueError(f"evaluate: protocol or split_file must be given, got neither. Protocols of {data}: {known}.")
    encoder, view = _encoder(run, dataset, options)
    if options.normalise is not None:
        view = replace(view, normalise=options.normalise)
    # a published file and a checkpoint are left as they are: results go beside the one, into the run of the other
    base = base_run = run
    if run.is_file():
        base = run.with_name(f"{run.name}-results")
    elif run.resolve().parent.name == "checkpoints":
        base_run = run.resolve().parents[1]
        base = base_run / f"{run.resolve().name}-results"
    # other settings, other folder
    shown = [f"k{settings['k']}"] if settings.get("k", 1) != 1 else []
    shown += [options.precision] if options.precision != "fp32" else []
    shown += ["average"] if options.average else []
    shown += [value for value in (options.normalise, options.modality) if value is not None]
    folder = options.out or base / "-".join([task, parts[0], data.resolve().name, *shown])
    result = (evaluate_knn if task == "knn" else evaluate_linear)(
        encoder, dataset, parts[1], view, folder, protocol=parts[0], run=str(run), cache=base / "features",
        device=choose_device(options.device), precision=options.precision, progress=not options.quiet,
        trained_on=None if run.is_file() else trained_clips(base_run, dataset), **settings,
    )  # fmt: skip
    if result["test_clips_trained_on"]:
        print(
            f"warning: {result['test_clips_trained_on']} of {result['num_test']} test clips were trained on, without their "
            f"labels; pretrain with --protocol {parts[0]} to keep them apart",
            file=sys.stderr,
        )
    row = "  ".join(f"{name} {100 * result[name]:.1f} %" for name in ("top1", "top5", "mean_class"))
    print(f"{row}   ({result['num_train']} train, {result['num_test']} test clips; {folder})")


def knn(run: Run, data: Data, k: int = 1, common: EvaluateOptions = EvaluateOptions()) -> None:
    """Classify test clips by their nearest training clips.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        k: Neighbours that vote.
        common: What every evaluation takes.
    """
    _evaluate("knn", run, data, common, k=k)


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
    from fastskel.evaluate import LinearConfig

    standardise = None if learning_rate is None else False
    config = LinearConfig(learning_rate=learning_rate, standardise=standardise, epochs=epochs, seed=seed)
    _evaluate("linear", run, data, common, config=config)


def export(run: Run, to: Literal["usdrl"] = "usdrl", out: Path | None = None) -> None:
    """Write a run's weights and optimiser as a checkpoint of another system.

    Args:
        run: Run or checkpoint folder.
        to: System whose format to write.
        out: File to create; by default RUN/usdrl.pth.tar.
    """
    from fastskel.compat.usdrl.checkpoint import export as write

    print(write(run, out or run / f"{to}.pth.tar"))


def demo(out: Path = Path("demo-run"), seed: int = 0, quick: bool = False) -> None:
    """Synthetic motion to a pretrained, evaluated encoder and pictures of it, in about five minutes on two cores.

    Args:
        out: Folder to create.
        seed: Seed of data and training.
        quick: A few steps only, to see that everything works.
    """
    from fastskel.demo import run_demo

    run_demo(out, seed=seed, quick=quick)


def _pretrain_commands() -> dict[str, Command]:
    from fastskel.recipes import RECIPES

    return {name: _pretrain_command(name, RECIPES[name]) for name in RECIPES}


# a command, or what its first argument chooses from: name of that argument, and the choices, imported when asked for
COMMANDS: Mapping[str, Command | tuple[str, Callable[[], dict[str, Command]]]] = {
    "pack": ("SOURCE", pack_commands),
    "unpack": ("FORMAT", unpack_commands),
    "convert": convert,
    "info": info,
    "show": show,
    "check": check,
    "plan": ("RECIPE", plan_commands),
    "pretrain": ("RECIPE", _pretrain_commands),
    "evaluate": ("TASK", lambda: {"knn": knn, "linear": linear}),
    "export": export,
    "demo": demo,
    "bench": ("SUITE", bench_commands),
}


def _choose(prog: str, kind: str, choices: Mapping[str, Any], given: str | None) -> Any:
    if given is not None and given in choices:
        return choices[given]
    near = difflib.get_close_matches(given or "", choices, n=3)
    advice = f"Did you mean {' or '.join(near)}?" if near else f"See {prog} --help."
    raise ValueError(
        f"{prog}: {kind} must be one of {', '.join(choices)}, got {'none' if given is None else repr(given)}. {advice}"
    )


def _overview(prog: str, kind: str, choices: Mapping[str, Command]) -> str:
    width = max(map(len, choices))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in choices.items()]
    more = "" if kind != "SOURCE" else f", {prog} --list-formats what the files are and where they come from"
    return "\n".join([f"usage: {prog} {kind} ...", "", *lines, "", f"{prog} {kind} --help says more{more}."])


def _run(arguments: Sequence[str]) -> None:
    """Find the command that the first one or two arguments name, and run it with the rest."""
    prog, rest = f"{PROG} {arguments[0]}", list(arguments[1:])
    command = _choose(PROG, "COMMAND", COMMANDS, arguments[0])
    if isinstance(command, tuple):
        kind, choices = command[0], command[1]()
        if arguments[0] == "bench" and not rest:
            rest = ["quick"]
        if rest and rest[0] in ("-h", "--help"):
            print(_overview(prog, kind, choices))
            return
        if arguments[0] == "pack" and rest[:1] == ["--list-formats"]:
            print(list_formats())
            return
        command = _choose(prog, kind, choices, rest[0] if rest else None)
        prog, rest = f"{prog} {rest[0]}", rest[1:]
    # flags without a --no- twin, options without a spelt None
    config = (OmitArgPrefixes, FlagCreatePairsOff, DisallowNone)
    tyro.cli(command, prog=prog, args=rest, config=config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 if a check found something; 2 after an error that a user can mend, in one line on standard error; 3 if a
        training stopped; 75 if a signal asked a training to stop and it was saved; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(ABOUT, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(PROG, version(PROG))
        return 0
    try:
        _run(arguments)
    except SystemExit as asked:
        # tyro has printed its help, or what is wrong with the options; or a check has found something
        return int(asked.code or 0)
    except (ValueError, OSError) as error:
        # one line, whatever a library's message holds
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from fastskel.train import Preempted, TrainingStopped

        if not isinstance(error, (Preempted, TrainingStopped)):
            raise
        print(f"stopped: {error}", file=sys.stderr)
        # sysexits.h calls 75 a temporary failure: try again
        return 75 if isinstance(error, Preempted) else 3
    except KeyboardInterrupt as stop:
        again = "; it goes on with --resume" if arguments[0] == "pretrain" else f"; {stop}" if str(stop) else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    return 0
