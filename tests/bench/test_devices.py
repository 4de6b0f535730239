"""Where benchmarks run by default, and what they say to --device cuda without a GPU."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fastskel.bench.devices import add_device

WHERE_THERE_IS_ONE = ("job", "machine", "profile_step", "step", "sweep", "training")
ON_THE_CPU = ("backends", "chunked", "encoder", "loss", "retrieval")


def main_of(name: str) -> Any:
    return importlib.import_module(f"fastskel.bench.{name}").main


class Parsed(Exception):
    """Ends a command where it would begin to measure."""


@pytest.mark.parametrize("there_is_a_gpu", [True, False])
@pytest.mark.parametrize("name", [*WHERE_THERE_IS_ONE, *ON_THE_CPU])
def test_default(name: str, there_is_a_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
        raise Parsed(read(parser, arguments).device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_a_gpu)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed) as parsed:
        main_of(name)(["--out", str(tmp_path / "rows.jsonl")])
    assert str(parsed.value) == ("cuda" if there_is_a_gpu and name in WHERE_THERE_IS_ONE else "cpu")


@pytest.mark.parametrize("name", [*WHERE_THERE_IS_ONE, *ON_THE_CPU])
def test_no_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main_of(name)(["--out", str(tmp_path / "rows.jsonl"), "--device", "cuda"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name}: --device must be one that torch {torch.__version__} sees, got 'cuda'. ")


def test_a_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parser = argparse.ArgumentParser()
    add_device(parser, "cpu")
    assert parser.parse_args(["--device", "cuda"]).device == "cuda"
