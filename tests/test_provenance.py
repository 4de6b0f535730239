"""A result names the commit of the sources that made it, and no other project's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastskel.provenance import commit, provenance

IDENTITY = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *IDENTITY, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("a = 1\n")
    (tmp_path / "other.py").write_text("b = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package", "other.py")
    git(tmp_path, "commit", "-q", "-m", "begin")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is no commit")
    return tmp_path


def test_a_tracked_file_has_the_commit(checkout) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert commit(checkout / "package" / "module.py") == head
    # new files of the user's are no change of the sources
    (checkout / "notes.txt").write_text("mine")
    assert commit(checkout / "package" / "module.py") == head


def test_uncommitted_changes_are_marked(checkout) -> None:
    (checkout / "other.py").write_text("b = 2\n")
    assert commit(checkout / "package" / "module.py") == git(checkout, "rev-parse", "HEAD") + "-dirty"


def test_another_projects_commit_is_not_taken(checkout) -> None:
    installed = checkout / ".venv" / "site-packages" / "module.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("a = 1\n")
    assert commit(installed) is None


def test_no_repository_and_no_git(tmp_path, checkout, monkeypatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "module.py").write_text("")
    assert commit(outside / "module.py") is None
    monkeypatch.setenv("PATH", "")
    assert commit(checkout / "package" / "module.py") is None


def test_provenance_is_plain() -> None:
    found = provenance()
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == sys.argv
    assert found["versions"]["python"].split(".")[0] == "3"
    assert {"fastskel", "torch", "numpy", "triton"} <= found["versions"].keys()
