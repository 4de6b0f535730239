"""The command line: `fastskel pack | info | show | pretrain | evaluate | export | demo`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional

from fastskel.recipes import RECIPES, USDRLRecipe

__all__ = ["main"]

PROG = "fastskel"


def _pack_command(source: str) -> Callable[..., None]:
    def pack(src: Positional[Path], dst: Positional[Path], quiet: bool = False) -> None:
        from fastskel.data.pack import pack_source

        print(pack_source(source, src, dst, progress=not quiet))

    pack.__doc__ = f"""Pack the files of {source} into a folder that fastskel maps into memory.

    Args:
        src: Folder with the files, or the archive they come in.
        dst: Folder to create.
        quiet: Show no progress bar.
    """
    return pack


def info(data: Positional[Path], verify: bool = False) -> None:
    """Describe a packed data set.

    Args:
        data: Packed data set.
        verify: Compare every file with its checksum.
    """
    from fastskel.data.inspect import info as describe

    print(describe(data, verify=verify))


def show(data: Positional[Path], clip: Positional[str], out: Path = Path()) -> None:
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


def _pretrain_command(name: str) -> Callable[..., None]:
    defaults = RECIPES[name]()

    def pretrain(
        data: Positional[Path],
        recipe: USDRLRecipe = defaults,
        out: Path | None = None,
        protocol: str | None = None,
        split_file: Path | None = None,
        resume: bool = False,
        device: str = "auto",
        threads: int | None = None,
        tensorboard: bool = False,
        quiet: bool = False,
    ) -> None:
        import torch

        from fastskel.data.packed import open_dataset
        from fastskel.data.protocols import split
        from fastskel.train import pretrain as train

        if threads is not None:
            torch.set_num_threads(threads)
        dataset = open_dataset(data)
        indices = None
        if protocol is not None or split_file is not None:
            indices = split(dataset, protocol or "user", split_file).train
        stages = recipe.stages(dataset)
        if len(stages) != 1:
            raise ValueError(f"pretrain: recipe {name} must have one stage, got {len(stages)}. Several come later.")
        folder = out or Path("runs") / f"{name}-{data.name}-{recipe.seed}"
        checkpoint = train(
            stages[0], dataset, folder, indices=indices, recipe={"name": name, **asdict(recipe)}, resume=resume,
            device=device, tensorboard=tensorboard, progress=not quiet,
        )  # fmt: skip
        print(f"trained {stages[0].epochs} epochs; the run is {folder}, its last checkpoint {checkpoint}")

    summary = (RECIPES[name].__doc__ or "").splitlines()[0]
    pretrain.__doc__ = f"""{summary}

    Args:
        data: Packed data set.
        recipe: Settings of the recipe.
        out: Run folder to create, or to resume; runs/RECIPE-DATA-SEED by default.
        protocol: Train on the training part of this protocol only.
        split_file: Train on the training part of this file only.
        resume: Go on from the newest checkpoint of the run, bit for bit.
        device: cpu, cuda, or auto for a GPU where there is one.
        threads: Compute threads of the CPU.
        tensorboard: Log to TensorBoard too; the JSON log is always written.
        quiet: Show no progress bar.
    """
    return pretrain


def _encoder(run: Path) -> tuple[Any, Any]:
    if run.is_file():
        from fastskel.compat.usdrl.checkpoint import load_published_encoder

        return load_published_encoder(run)
    from fastskel.train import load_encoder

    encoder, view, _ = load_encoder(run)
    return encoder, view


def _evaluate_command(task: Literal["knn", "linear"]) -> Callable[..., None]:
    def evaluate(
        run: Positional[Path],
        data: Positional[Path],
        protocol: str | None = None,
        split_file: Path | None = None,
        out: Path | None = None,
        device: str = "auto",
        precision: Literal["fp32", "bf16"] = "fp32",
        normalise: str | None = None,
        k: int = 1,
        learning_rate: float | None = None,
        epochs: int = 160,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        import torch

        from fastskel.data.packed import open_dataset
        from fastskel.data.protocols import protocols, split
        from fastskel.evaluate import LinearConfig, evaluate_knn, evaluate_linear

        dataset = open_dataset(data)
        if protocol is None and split_file is None:
            raise ValueError(
                f"evaluate: protocol or split_file must be given, got neither. {data} has {protocols(dataset)}."
            )
        parts = split(dataset, protocol or "user", split_file)
        encoder, view = _encoder(run)
        view = view if normalise is None else replace(view, normalise=normalise)
        base = run.parent if run.is_file() else run
        folder = out or base / f"{task}-{protocol or 'user'}-{data.name}"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        shared: dict[str, Any] = dict(
            protocol=protocol or str(split_file), run=str(run), device=device, cache=base / "features",
            precision=precision, progress=not quiet,
        )  # fmt: skip
        if task == "knn":
            result = evaluate_knn(encoder, dataset, parts, view, folder, k=k, **shared)
        else:
            config = LinearConfig(
                learning_rate=learning_rate, standardise=None if learning_rate is None else False, epochs=epochs, seed=seed
            )
            result = evaluate_linear(encoder, dataset, parts, view, folder, config=config, **shared)
        row = "  ".join(f"{name} {100 * result[name]:.1f} %" for name in ("top1", "top5", "mean_class"))
        print(f"{row}   ({result['num_train']} train, {result['num_test']} test clips; {folder})")

    about = {"knn": "Classify test clips by their nearest training clips.",
             "linear": "Train a linear layer on frozen features and classify the test clips."}[task]  # fmt: skip
    evaluate.__doc__ = f"""{about}

    Args:
        run: Run folder, native checkpoint folder, or published `.pth.tar`.
        data: Packed data set.
        protocol: Protocol of the data set, such as xsub.
        split_file: The user's own split instead.
        out: Folder for the results; a folder inside the run by default.
        device: cpu, cuda, or auto for a GPU where there is one.
        precision: Compute type of the encoder.
        normalise: Normalise clips otherwise than the run did; for published checkpoints.
        k: Neighbours that vote (knn).
        learning_rate: Of the probe (linear), on features as they are, the reference's way; by default it and
            standardisation are chosen on held-out training clips.
        epochs: Of the probe (linear).
        seed: Of the probe (linear).
        quiet: Show no progress bar.
    """
    return evaluate


def export(run: Positional[Path], out: Positional[Path], to: Literal["usdrl"] = "usdrl") -> None:
    """Write a run's weights and optimiser as a checkpoint of another system.

    Args:
        run: Run or checkpoint folder.
        out: File to create.
        to: System whose format to write.
    """
    from fastskel.compat.usdrl.checkpoint import export as write

    print(write(run, out))


def demo(out: Path = Path("demo-run"), seed: int = 0, quick: bool = False) -> None:
    """Synthetic motion to a pretrained, evaluated encoder and pictures of it, in about five minutes on two cores.

    Args:
        out: Folder to create.
        seed: Seed of data and training.
        quick: A few steps only, to see that everything works.
    """
    from fastskel.demo import run_demo

    run_demo(out, seed=seed, quick=quick)


def _commands() -> dict[str, Callable[..., None] | dict[str, Callable[..., None]]]:
    from fastskel.data.formats import FORMATS

    return {
        "pack": {name: _pack_command(name) for name in FORMATS},
        "info": info,
        "show": show,
        "pretrain": {name: _pretrain_command(name) for name in RECIPES},
        "evaluate": {"knn": _evaluate_command("knn"), "linear": _evaluate_command("linear")},
        "export": export,
        "demo": demo,
    }


ABOUT = {
    "pack": "pack SOURCE SRC DST           raw files into a packed data set",
    "info": "info DATA                     what a packed data set holds",
    "show": "show DATA CLIP                pictures of one clip",
    "pretrain": "pretrain RECIPE DATA          train an encoder",
    "evaluate": "evaluate knn|linear RUN DATA  how good its features are",
    "export": "export RUN OUT --to usdrl     a checkpoint for the reference's scripts",
    "demo": "demo                          all of it, on synthetic motion",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one line on standard error and exit code 2."""
    from fastskel.train import TrainingStopped

    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = _commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n".join(["usage: fastskel COMMAND ...", "", *(f"  {line}" for line in ABOUT.values())]))
        print("\nfastskel COMMAND --help says more.")
        return 0 if arguments else 2
    try:
        name, rest = arguments[0], arguments[1:]
        if name not in commands:
            raise ValueError(
                f"{PROG}: command must be one of {', '.join(commands)}, got {name!r}. See fastskel --help."
            )
        command = commands[name]
        config = (OmitArgPrefixes, OmitSubcommandPrefixes)
        if isinstance(command, dict):
            tyro.extras.subcommand_cli_from_dict(command, prog=f"{PROG} {name}", args=rest, config=config)
        else:
            tyro.cli(command, prog=f"{PROG} {name}", args=rest, config=config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
