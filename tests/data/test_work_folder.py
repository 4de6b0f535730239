"""The folder of a packing under many hands."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from fastskel.data.work_folder import work_folder

SECONDS = 1.0


def test_many_at_once_hear_nothing_false(tmp_path: Path) -> None:
    # the folder is made and removed all the time; a process finds it free, or taken, and nothing else
    said, inside = Counter[str](), []
    end = time.monotonic() + SECONDS

    def work() -> None:
        while time.monotonic() < end:
            try:
                with work_folder(tmp_path / "out") as folder:
                    inside.append(folder)
                    alone = len(inside) == 1
                    (folder / "frames-1.npy").touch()
                    inside.pop()
                    raise ValueError("bad file" if alone else "two at once")
            except ValueError as error:
                said["taken" if "one process at a time" in str(error) else str(error)] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(said) == {"bad file", "taken"} and not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "link", "folder on the way"])
def test_what_is_in_the_way_is_an_error(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        (tmp_path / "out.packing").touch()
    elif kind == "link":
        (tmp_path / "out.packing").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        out = tmp_path / "link" / "out"
    message = r"^pack_source: destination must be writable, got (File exists|Not a directory), in "
    with pytest.raises(ValueError, match=message), work_folder(out):
        pass
