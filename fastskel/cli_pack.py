"""The commands that bring data in and out: one of `pack` for each source, one of `unpack` for each tool, and `convert`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, Positional, Suppress, arg

__all__ = ["convert", "list_formats", "pack_commands", "unpack_commands"]

Command = Callable[..., None]
Src = Annotated[Positional[Path], arg(metavar="SRC")]
Dst = Annotated[Positional[Path], arg(metavar="DST")]
Data = Annotated[Positional[Path], arg(metavar="DATA")]


def pack_commands() -> dict[str, Command]:
    """Return the command of each format that can be read: raw files of (T, M, V, C) clips, and prepared ones."""
    from fastskel.data.formats import FORMATS, PREPARED

    commands = {name: _pack_command(name, FORMATS[name].options) for name in FORMATS}
    return commands | {name: _pack_prepared_command(name, PREPARED[name].options) for name in PREPARED}


def unpack_commands() -> dict[str, Command]:
    """Return the command of each format that clips (T, M, V, C) can be written in."""
    from fastskel.data.unpack import UNPACKERS

    return {name: _unpack_command(name) for name in UNPACKERS}


def list_formats() -> str:
    """Return what `fastskel pack` can read, clips (T, M, V, C) each: name, files, where they come from, and options."""
    from fastskel.data.formats import FORMATS, PREPARED

    known: list[tuple[str, Any]] = [(name, FORMATS[name]) for name in FORMATS]
    prepared: list[tuple[str, Any]] = [(name, PREPARED[name]) for name in PREPARED]
    width = max(len(name) for name, _ in known + prepared)
    lines = []
    for title, entries in (("Files of public data sets:", known), ("Files that other tools prepared:", prepared)):
        lines += [title, ""]
        for name, entry in entries:
            options = ", ".join(f"--{option.replace('_', '-')}" for option in _option_names(entry.options))
            text = f"{entry.about}. Options: {options}." if options else f"{entry.about}."
            first, others = f"  {name:<{width}}  ", " " * (width + 4)
            lines += textwrap.wrap(
                text, 100, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
            )
        lines.append("")
    return "\n".join([*lines, "fastskel pack NAME --help explains the options."])


def _option_names(options: Any) -> list[str]:
    return [] if options is None else [option.name for option in fields(options)]


def _pack_command(source: str, defaults: Any) -> Command:
    def pack(
        src: Src,
        dst: Dst,
        normalisation: Any = "none",
        threads: int | None = None,
        skip_bad: bool = False,
        quiet: bool = False,
        reader: Any = defaults,
    ) -> None:
        from fastskel.data.pack import pack_source

        options = {name: getattr(reader, name) for name in _option_names(reader)}
        summary = pack_source(
            source, src, dst, options=options, threads=threads, skip_bad=skip_bad, normalisation=normalisation, progress=not quiet
        )
        print(summary)

    return _described(pack, source, defaults)


def _pack_prepared_command(source: str, defaults: Any) -> Command:
    def pack(src: Src, dst: Dst, normalisation: Any = "none", quiet: bool = False, reader: Any = defaults) -> None:
        from fastskel.data.pack import pack_source

        options = {name: getattr(reader, name) for name in _option_names(reader)}
        print(pack_source(source, src, dst, options=options, normalisation=normalisation, progress=not quiet))

    return _described(pack, source, defaults)


def _described(pack: Command, source: str, defaults: Any) -> Command:
    from fastskel.data.normalise import NORMALISATIONS

    # tyro reads the reader's own options and the choices off these annotations
    pack.__annotations__["reader"] = Annotated[None, Suppress, Fixed] if defaults is None else type(defaults)
    pack.__annotations__["normalisation"] = Literal[NORMALISATIONS]
    about = {
        "src": "Folder with the files, or the archive or file they come in.",
        "dst": "Folder to create.",
        "normalisation": "Normalisation of every clip; by default coordinates are stored as they are.",
        "threads": "Threads that read and parse; by default one for each CPU that the process may use.",
        "skip_bad": "Leave out files that are damaged or cannot be read, and list them, instead of stopping at the first.",
        "quiet": "Show no progress bar.",
        "reader": f"What the reader of {source} lets one choose.",
    }
    arguments = "\n".join(f"        {name}: {text}" for name, text in about.items() if name in pack.__annotations__)
    pack.__doc__ = f"""Pack the files of {source} into a folder that fastskel maps into memory.

    Args:
{arguments}
    """
    return pack


def _unpack_command(name: str) -> Command:
    from fastskel.data.unpack import UNPACKERS

    unpacker = UNPACKERS[name]

    def unpack(data: Data, dst: Dst, writer: Any = unpacker.options) -> None:
        from fastskel.data.packed import open_dataset

        unpacker.write(open_dataset(data), dst, writer)
        print(dst)

    unpack.__annotations__["writer"] = type(unpacker.options)
    unpack.__doc__ = f"""Write {unpacker.about}.

    Args:
        data: Packed data set.
        dst: File or folder to create.
        writer: What the writer of {name} lets one choose.
    """
    return unpack


def convert(data: Data, dst: Dst, to: str, quiet: bool = False) -> None:
    """Pack a data set again with another skeleton, where joints correspond.

    A joint of the new skeleton takes the joint of its name, the one that other sensors put in its place, or the mean of
    left and right; what is left is zero, absent. Labels, columns, segments and splits stay as they are. Data that were
    normalised when packed are refused.

    Args:
        data: Packed data set of clips (T, M, V, C).
        dst: Folder to create.
        to: Name of the skeleton, such as coco-17, or a JSON file that holds one.
        quiet: Show no progress bar.
    """
    from fastskel.data.convert import convert_dataset, correspondence
    from fastskel.data.packed import open_dataset

    source = open_dataset(data)
    done = convert_dataset(source, to, dst, progress=not quiet)
    counts = f"{len(done):,} clips, {len(done.frames):,} frames"
    print(f"converted {counts}, from {source.topology.name} to {done.topology.name}, into {dst}")
    print(correspondence(source.topology, done.topology))
