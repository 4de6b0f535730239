"""The command line: `fastskel pack | unpack | convert | info | show | check | plan | pretrain | evaluate | ...`."""

from __future__ import annotations

import difflib
import os
import select
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial, wraps
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, cast

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from fastskel.cli_bench import bench_commands
from fastskel.cli_evaluate import Command, Data, Run, chosen_split, evaluate_commands
from fastskel.cli_pack import convert, list_formats, pack_commands, unpack_commands
from fastskel.cli_plan import plan_commands
from fastskel.cli_report import report

if TYPE_CHECKING:
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
  evaluate TASK RUN DATA        how good its features are
  report RUN                    all that is known of a run, as one page
  export RUN --to usdrl         a checkpoint for the reference's scripts
  demo                          all of it, on synthetic motion
  bench SUITE                   how fast it is on this machine, against the published code

{PROG} COMMAND --help says more, {PROG} --version which one this is."""

Clip = Annotated[Positional[str], arg(metavar="CLIP")]


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
        parts = chosen_split(dataset, protocol, split_file)
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
    "evaluate": ("TASK", evaluate_commands),
    "report": report,
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


def _run(arguments: Sequence[str]) -> int:
    """Find the command that the first one or two arguments name, and run it with the rest; return its exit status."""
    if arguments[0] in ("-h", "--help"):
        print(ABOUT)
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(PROG, version(PROG))
        return 0
    prog, rest = f"{PROG} {arguments[0]}", list(arguments[1:])
    command = _choose(PROG, "COMMAND", COMMANDS, arguments[0])
    if isinstance(command, tuple):
        kind, choices = command[0], command[1]()
        if arguments[0] == "bench" and not rest:
            rest = ["quick"]
        if rest and rest[0] in ("-h", "--help"):
            print(_overview(prog, kind, choices))
            return 0
        if arguments[0] == "pack" and rest[:1] == ["--list-formats"]:
            print(list_formats())
            return 0
        command = _choose(prog, kind, choices, rest[0] if rest else None)
        prog, rest = f"{prog} {rest[0]}", rest[1:]
    try:
        _parsed(command, prog, rest)()
    except SystemExit as asked:
        # tyro has printed its help, or what is wrong with the options; or a check has found something
        return int(asked.code or 0)
    return 0


def _parsed(command: Command, prog: str, words: Sequence[str]) -> Callable[[], None]:
    """Bind the options of a command.

    Raises:
        SystemExit: After its help, or what is wrong with an option.
        ValueError: On settings that refuse their values.
    """

    @wraps(command)
    def bound(*given: Any, **options: Any) -> Callable[[], None]:
        return partial(command, *given, **options)

    # flags without a --no- twin, options without a spelt None
    parse = partial(tyro.cli, bound, prog=prog, args=words, config=(OmitArgPrefixes, FlagCreatePairsOff, DisallowNone))
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return cast("Callable[[], None]", parse())
    except SystemExit as asked:
        refused = _refused(asked)
        if refused is not None:
            # in one line, as every command says it, not in tyro's box
            raise refused from None
    # once more, aloud
    return cast("Callable[[], None]", parse())


def _refused(asked: BaseException) -> ValueError | None:
    """Find what a dataclass of settings raised, from which an exit came."""
    error: BaseException | None = asked
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError) and frames and frames[-1].name == "__post_init__":
            return error
        error = error.__context__
    return None


def _is_unread(stream: TextIO) -> bool:
    """Whether the other end of a stream has been closed."""
    try:
        ends = select.poll()
        ends.register(stream.fileno(), 0)
    except OSError:
        # it has no file, as in tests
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in ends.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 if a check found something; 2 after an error that a user can mend, in one line on standard error; 3 if a
        training stopped; 75 if a signal asked a training to stop and it was saved; 130 after Ctrl-C; 141 if nobody
        reads the output any more, as after `| head`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(ABOUT, file=sys.stderr)
        return 2
    try:
        status = _run(arguments)
        # here, where a closed pipe can be told from a failure, and not when Python ends
        print(end="", flush=True)
    except (ValueError, OSError) as error:
        # another pipe, such as that of a child, may have broken too
        unread = [stream for stream in (sys.stdout, sys.stderr) if isinstance(error, BrokenPipeError) and _is_unread(stream)]
        if unread:
            with open(os.devnull, "w") as nothing:
                for stream in unread:
                    # where what is still buffered goes
                    os.dup2(nothing.fileno(), stream.fileno())
            # 128 + SIGPIPE, as of a program that the signal ends
            return 141
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
        resumes = arguments[0] == "pretrain" or arguments[:2] == ["evaluate", "finetune"] or "--fine-tune" in arguments
        again = "; it goes on with --resume" if resumes else f"; {stop}" if str(stop) else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    return status
