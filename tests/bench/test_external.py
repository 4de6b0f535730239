"""The published code in a folder as a provider: it agrees, takes its turn, leaves the folder alone, and fails by a sentence."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastskel.bench import encoder, training
from fastskel.bench.external import EXTERNAL, Checkout, CheckoutError, Source
from fastskel.bench.providers import published_arguments
from fastskel.bench.train_steps import ReferenceStep, Setting, plain_model

PUBLISHED = Path(__file__).with_name("checkout")
CPU = torch.device("cpu")
SETTING = Setting(device=CPU, **{**training.QUICK, "rounds": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout of one's own, which a test may spoil."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "checkout", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def opened() -> Iterator[Callable[..., Checkout]]:
    """Open checkouts at tiny sizes, and close them."""
    found: list[Checkout] = []

    def open_one(folder: Path, **options: object) -> Checkout:
        arguments = published_arguments(*SETTING.inputs, SETTING.width)
        source = Source(folder, **{"limit_s": 60.0, **options})
        found.append(Checkout(source, arguments, plain_model(SETTING).state_dict(), CPU))
        return found[-1]

    yield open_one
    for checkout in found:
        checkout.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Checkout]:
    """One checkout as it should be."""
    arguments = published_arguments(*SETTING.inputs, SETTING.width)
    with Checkout(Source(PUBLISHED, limit_s=60.0), arguments, plain_model(SETTING).state_dict(), CPU) as checkout:
        yield checkout


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def spoil(folder: Path, name: str, old: str, new: str) -> None:
    path = folder / "model" / name
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_loss_and_gradients_are_the_reference_s(shared) -> None:
    checkout = shared
    assert checkout.file == str(PUBLISHED / "model" / "DSTE.py") and 0 < checkout.pipe_ms < 1e3
    checkout.prepare("loss", SETTING.published_views(), precision="fp32")
    loss, *gradients = checkout.results()
    plain = ReferenceStep(SETTING, torch.float32)
    expected, exact = training.loss_and_gradients(plain, plain.loss, 1.0)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert checkout.names == list(exact)
    # another order of sums, through a maximum over tokens
    assert training.relative_l2(gradients, exact.values()) < 1e-3
    checkout.prepare("step", SETTING.published_views(), precision="bf16", drop_path=0.1)
    assert checkout.run()["ms"] > 0
    losses = []
    for rate in (0.0, 0.0, 0.5, 0.5):
        checkout.prepare("loss", SETTING.published_views(), precision="fp32", drop_path=rate)
        losses.append(float(checkout.results()[0]))
    # the step moved its weights, and what is dropped is drawn anew
    assert losses[0] == losses[1] < float(loss) and len(set(losses)) == 3


def test_commands_compare_a_checkout(folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python is to leave no compiled files because it is told to, not because the surroundings tell it already
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    before, out = contents(folder), tmp_path / "rows.jsonl"
    shared = ["--quick", "--rounds", "3", "--providers", "reference", "--reference", str(folder), "--out", str(out)]
    assert training.main(["--device", "cpu", "--parts", "step", *shared]) == 0
    assert encoder.main(["--parts", "forward", "--precision", "fp32", *shared]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    own = [row for row in rows if row["provider"] == EXTERNAL]
    assert [row["part"] for row in own] == ["step", "forward"]
    assert all(row["status"] == "ok" and row["median_ms"] > 0 and row["pipe_ms"] > 0 for row in own)
    assert own[0]["distance_fp32"] < 1e-5 and own[1]["distance"] < 1e-5
    # where the user keeps the folder is nobody's business
    assert all(str(tmp_path) not in line for line in out.read_text().splitlines())
    assert contents(folder) == before


def test_wrong_numbers_are_not_timed(folder) -> None:
    spoil(folder, "loss.py", "0.005 *", "0.05 *")
    rows = list(training.step_part(replace(SETTING, providers=(), source=Source(folder))))
    assert [(row["provider"], row["status"]) for row in rows] == [(EXTERNAL, "failed"), ("reference", "ok")]
    assert "median_ms" not in rows[0]
    assert f"of {EXTERNAL} in fp32 must be within" in rows[0]["error"]


def test_wrong_gradients_of_its_encoder_are_not_timed(folder, monkeypatch) -> None:
    monkeypatch.setattr(encoder, "DROP_PATHS", (0.0,))
    spoil(folder, "DSTE.py", "self.alpha * self.CA(x)", "1.01 * self.alpha * self.CA(x)")
    quick = encoder.Setting(**encoder.QUICK, providers=(), source=Source(folder))
    rows = [row for row in encoder.train_part(quick, ["fp32"]) if row["provider"] == EXTERNAL]
    assert [row["status"] for row in rows] == ["failed"]
    assert f"fp32 gradient of {EXTERNAL} must be within" in rows[0]["error"]


def test_a_child_that_dies_while_it_is_timed_costs_nobody_else(folder) -> None:
    spoil(folder, "loss.py", "def cal_xc(z_list):\n", "calls = []\n\n\ndef cal_xc(z_list):\n    calls.append(1)\n"
          "    if len(calls) > 12:\n        import os\n\n        os._exit(7)\n")  # fmt: skip
    rows = list(training.step_part(replace(SETTING, providers=(), source=Source(folder), rounds=3)))
    assert [(row["provider"], row["status"]) for row in rows] == [(EXTERNAL, "failed"), ("reference", "ok")]
    assert "ended at 'run' with status 7" in rows[0]["error"]


def test_a_folder_that_is_none_is_refused(tmp_path: Path, opened) -> None:
    with pytest.raises(ValueError, match="Checkout: folder must be one with the published code, got .*missing"):
        opened(tmp_path / "missing")


def test_what_cannot_be_built_says_why(shared) -> None:
    given = dict(
        folder=str(PUBLISHED), module="model.DSTE", name="USDRL", losses="model.loss", state=str(shared._files / "state"),
        arguments=published_arguments(*SETTING.inputs, SETTING.width), device="cpu", threads=1,
    )  # fmt: skip
    for change, message in (
        ({"module": "model.Absent"}, "ModuleNotFoundError: No module named 'model.Absent'"),
        ({"name": "Absent"}, "model.DSTE has no class Absent"),
        # what the child itself has is not what the folder has
        ({"module": "json"}, "json was imported from .*, outside of the folder"),
        ({"name": "MLP"}, "TypeError: .*unexpected keyword argument"),
        ({"name": "DSTE"}, "in loading state_dict for DSTE"),
    ):
        with pytest.raises(CheckoutError, match=f"the published code failed at 'build': .*{message}"):
            shared._ask("build", **{**given, **change})


def test_what_it_prints_is_shown_and_what_hangs_is_ended(folder, opened) -> None:
    lines = ("def v_ac(x):", "    print('so it was printed', flush=True)", "    raise SystemExit('no')", "")
    spoil(folder, "loss.py", "def v_ac(x):\n", "\n".join(lines))
    spoil(folder, "loss.py", "def similarity(z_list, criterion):\n", "def similarity(z_list, criterion):\n    hang(z_list[0])\n")
    hang = ("import time", "", "import torch", "", "", "def hang(z):", "    time.sleep(600 * (len(z) == 2))", "")
    spoil(folder, "loss.py", "import torch\n", "\n".join(hang))
    checkout = opened(folder)
    views = SETTING.published_views()
    checkout.prepare("loss", views, precision="fp32")
    with pytest.raises(CheckoutError, match=r"failed at 'results': SystemExit: no It printed: so it was printed"):
        checkout.results()
    # that was an error and no end
    checkout.prepare("loss", [view[:2] for view in views], precision="fp32")
    checkout.limit_s = 1.0
    begin = time.monotonic()
    with pytest.raises(CheckoutError, match="must answer 'results' within 1 s, got nothing"):
        checkout.results()
    checkout.close()
    assert time.monotonic() - begin < 10
    with pytest.raises(ProcessLookupError):
        os.kill(checkout._child.pid, 0)
    assert not checkout._files.exists()
