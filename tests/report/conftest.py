"""A finished run with results over tiny data whose names are hostile, and a reader of pages that insists on valid HTML."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastskel.cli import main
from fastskel.data import open_dataset, pack_arrays
from fastskel.data.identity import dataset_identity
from fastskel.data.synthetic import synthetic_motion

HOSTILE = ('<script>alert("1")</script>', "\"><img src=x onerror='alert(2)'>", "a &amp; b </script><!-- Größe 走る")
VOID = {"br", "hr", "img", "link", "meta"}
SMALL = "--width 16 --frames 16 --crop-min-frames 16 --num-views 2 --batch-size 6 --epochs 2 --milestones 1 --device cpu --quiet"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str) -> list[Element]:
        """Elements of a tag inside, in their order."""
        below = [child for child in self.children if isinstance(child, Element)]
        return [found for child in below for found in ([child] if child.tag == tag else []) + child.all(tag)]

    def every(self) -> list[Element]:
        """All elements inside."""
        below = [child for child in self.children if isinstance(child, Element)]
        return below + [found for child in below for found in child.every()]

    def of_class(self, name: str) -> list[Element]:
        below = [child for child in self.children if isinstance(child, Element)]
        own = [child for child in below if name in child.attributes.get("class", "").split()]
        return own + [found for child in below for found in child.of_class(name)]

    def by_id(self, name: str) -> Element:
        (found,) = [e for tag in ("section", "script") for e in self.all(tag) if e.attributes.get("id") == name]
        return found


class Reader(HTMLParser):
    """Reads HTML into elements; an end tag that closes another element, or a missing one, is an error."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} repeats an attribute: {names}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def read_html(text: str) -> Element:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert [element.tag for element in reader.open] == [""], "elements are left open"
    return reader.root


@pytest.fixture(scope="session")
def read() -> Callable[[str], Element]:
    """Read HTML text into elements; invalid HTML fails the test."""
    return read_html


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and the run `run` with results of two tasks; only to be read."""
    folder = tmp_path_factory.mktemp("report")
    motion = synthetic_motion(24, num_classes=3, num_subjects=4)
    splits = {name: {key: part.tolist() for key, part in parts.items()} for name, parts in motion.splits.items()}
    pack_arrays(
        motion.clips, out=folder / "data", labels=motion.labels, topology="ntu-25", class_names=HOSTILE,
        columns=motion.columns, splits=splits,
    )  # fmt: skip
    threads = torch.get_num_threads()
    data, run = str(folder / "data"), str(folder / "run")
    command = ["pretrain", "usdrl-demo", data, "--protocol", "xsub", "--out", run, "--threads", "1", *SMALL.split()]
    assert main(command) == 0
    torch.set_num_threads(threads)
    assert main(["evaluate", "knn", run, data, "--protocol", "xsub", "--device", "cpu", "--quiet"]) == 0
    linear = ["evaluate", "linear", run, data, "--protocol", "xsub", "--epochs", "3", "--learning-rate", "0.1"]
    assert main([*linear, "--device", "cpu", "--quiet"]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """An own copy of the run."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


@pytest.fixture
def write_result(finished: Path, run: Path) -> Callable[..., Path]:
    """Write a result of a task over the data into the run; keywords become its values."""
    dataset = open_dataset(finished / "data")
    test = np.sort(dataset.splits["xsub"]["test"])

    def write(task: str, **values: Any) -> Path:
        told = {
            "task": task, "protocol": "xsub", "run": str(run), "encoder": "DSTE", "num_train": 12, "num_test": len(test),
            "dataset": {"path": str(dataset.path), "source": "custom", "sha256": dataset_identity(dataset)}, **values,
        }  # fmt: skip
        path = run / f"{task.replace('/', '_')}-xsub-data" / "results.json"
        path.parent.mkdir()
        path.write_text(json.dumps(told))
        return path

    return write
