"""The list of providers: who takes part where, why one cannot, and how one that fails leaves the others their turn."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastskel.bench import contest, encoder, providers
from fastskel.bench.contest import Contest
from fastskel.bench.providers import BASELINE, KINDS, select, unavailable

CPU, GPU = torch.device("cpu"), torch.device("cuda")
COMPILED = ["reference-compiled", "reference-compiled-max", "reference-sdpa-compiled-max"]
QUICK = providers.Setting(**encoder.QUICK)


def kind(name: str) -> providers.Kind:
    return next(k for k in KINDS if k.name == name)


def names(*arguments: object, **options: object) -> list[str]:
    return [k.name for k in select(*arguments, **options)]


def test_names_are_unique_and_the_baseline_leads() -> None:
    known = [k.name for k in KINDS]
    assert known[0] == BASELINE and len(set(known)) == len(known) and all(k.about for k in KINDS)
    assert [k.name for k in KINDS if k.mode] == COMPILED


def test_what_takes_part_follows_from_precision_and_names() -> None:
    everything = [k.name for k in KINDS if k.name not in COMPILED]
    assert names("bf16") == [name for name in everything if name != "reference-bf16"]
    assert names("fp16") == [name for name in everything if name != "reference-fp16"]
    assert not {"reference-bf16", "reference-fp16"} & set(names("fp32"))
    assert set(names("bf16", compiled=True)) - set(names("bf16")) == set(COMPILED)
    # the baseline is always there, and what is named is compiled without being asked twice
    assert names("bf16", ["fastskel", "reference-compiled"]) == [BASELINE, "reference-compiled", "fastskel"]
    assert names("bf16", ()) == [BASELINE]
    with pytest.raises(ValueError, match="select: names must be of .*, got 'referense'. Choose among them."):
        select("bf16", ["referense"])


def test_what_a_cpu_cannot_run_says_why() -> None:
    for name in (BASELINE, "reference-bf16", "reference-sdpa", "fastskel", *COMPILED):
        assert unavailable(kind(name), CPU) is None
    assert unavailable(kind("reference-graph"), CPU) == "CUDA graphs run on a GPU only"
    assert unavailable(kind("fastskel-triton"), CPU) == "fused kernels run on a GPU only"
    assert "float16" in unavailable(kind("reference-fp16"), CPU)
    # slow is no reason where somebody asks for it
    assert unavailable(kind("reference-fp16"), CPU, named=True) is None
    assert [k.name for k in KINDS if k.attention != "xformers" and unavailable(k, GPU)] == []


def give_xformers(monkeypatch: pytest.MonkeyPatch, failure: object) -> None:
    package, ops, library = (types.ModuleType(f"xformers{end}") for end in ("", ".ops", "._cpp_lib"))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # (N, S, H, C), as the library has it
        scores = torch.einsum("nshc,nthc->nhst", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("nhst,nthc->nshc", scores.softmax(-1), v)

    ops.memory_efficient_attention, library._cpp_library_load_exception = attend, failure
    for module in (package, ops, library):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_xformers_is_there_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    own = kind("reference-xformers")
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "xformers does not import: ModuleNotFoundError" in unavailable(own, GPU)
    give_xformers(monkeypatch, OSError("built for\n  another torch"))
    assert unavailable(own, GPU) == "xformers imports, but its operators do not load: built for another torch"
    give_xformers(monkeypatch, None)
    assert unavailable(own, GPU) is None
    assert unavailable(own, CPU) == "the operators of xformers run on a GPU only"


@pytest.mark.parametrize("kind_of", ["dste", "sttr"])
@pytest.mark.parametrize("heads", [1, 2])
def test_attention_of_xformers_is_the_reference_s(monkeypatch: pytest.MonkeyPatch, kind_of: str, heads: int) -> None:
    give_xformers(monkeypatch, None)
    make = {"dste": providers.DSTE, "sttr": providers.STTR}[kind_of]
    plain, other = (make(30, 24, 16, heads, attention=attention) for attention in ("eager", "xformers"))
    other.load_state_dict(plain.state_dict(), strict=True)
    # biases of the projections begin at zero, where a lost one would not show
    for model in (plain, other):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("in_proj_bias"):
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    tokens = QUICK.tokens(3)
    for actual, expected in zip(other.eval()(*tokens), plain.eval()(*tokens)):
        torch.testing.assert_close(actual, expected)


def test_providers_that_differ_in_precision_share_their_weights() -> None:
    built = providers.build(replace(QUICK, providers=("reference-fp16", "fastskel")), 0.0, precision="bf16")
    assert [p.name for p in built] == [BASELINE, "reference-fp16", "fastskel"]
    assert built[0].module is built[1].module and built[1].kind.precision == "fp16"


def test_modes_of_torch_compile_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    built = providers.build(replace(QUICK, compiled=True, providers=tuple(COMPILED)), 0.0)
    assert [p.name for p in built] == [BASELINE, *COMPILED]
    assert asked == [{"dynamic": False, "mode": mode} for mode in ("default", "max-autotune", "max-autotune")]
    # none computes with another's module, whose gradients it would share
    assert len({id(p.module) for p in built}) == len(built)


def test_a_graph_is_replayed_and_not_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []
    monkeypatch.setattr(encoder, "capture", lambda call, device: recorded.append(call) or call)
    captured, calls = replace(kind("reference-graph")), []
    for checked in (None, lambda: calls.append("checked")):
        recorded.clear()
        _, about = encoder._ready(captured, lambda: calls.append("call"), checked, lambda _: {"distance": 0.0}, CPU)
        assert len(recorded) == (1 if checked is None else 2) and about["distance"] == 0.0
        assert calls.pop() == ("call" if checked is None else "checked") and not calls


def test_what_fails_is_a_row_and_the_others_go_on() -> None:
    made = Contest(CPU)
    count = iter(range(100))

    def dies() -> None:
        if next(count) == 2:
            raise RuntimeError("died in its third call")

    def gated() -> tuple[contest.Call, contest.Row]:
        raise ValueError("red")

    made.enter(BASELINE, lambda: (lambda: None, {"about": "first"}))
    made.enter("red", gated)
    made.enter("dies", lambda: (dies, {}))
    made.enter("other", lambda: (lambda: None, {"distance": 0.5}))
    rows = list(made.rows(rounds=3, warmup=1, limit_s=5.0))
    assert [(row["provider"], row["status"]) for row in rows] == [
        ("red", "failed"), ("dies", "failed"), (BASELINE, "ok"), ("other", "ok"),
    ]  # fmt: skip
    assert rows[0]["error"] == "ValueError: red" and rows[1]["error"] == "RuntimeError: died in its third call"
    assert not any("median_ms" in row for row in rows[:2])
    assert rows[2]["rounds"] >= 3 and rows[2]["about"] == "first" and rows[3]["distance"] == 0.5


def test_nobody_is_compared_with_a_baseline_that_fails() -> None:
    def wrong() -> tuple[contest.Call, contest.Row]:
        raise ValueError("no baseline")

    with pytest.raises(ValueError, match="no baseline"):
        Contest(CPU).enter(BASELINE, wrong)
    made = Contest(CPU)
    made.enter(BASELINE, lambda: (lambda: 1 / 0, {}))
    with pytest.raises(ZeroDivisionError):
        list(made.rows(rounds=1, warmup=0))


def _chosen() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_tf32_is_allowed_to_products_and_convolutions_alike_and_left_as_it_was() -> None:
    before = _chosen()
    with providers.tf32(True):
        assert _chosen() == ("high", True)
        with providers.tf32(False):
            assert _chosen() == ("highest", False)
        assert _chosen() == ("high", True)
    assert _chosen() == before


@pytest.mark.parametrize("name", ["training", "sweep", "encoder"])
def test_float32_is_compared_without_tf32(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch takes TF32 for convolutions by itself, which is a hundred times further off than the limits of float32."""
    module, seen = importlib.import_module(f"fastskel.bench.{name}"), []

    def part(*_: object, **__: object) -> Iterator[dict[str, object]]:
        seen.append(_chosen())
        yield from ()

    monkeypatch.setattr(module, "sweep", part, raising=name == "sweep")
    if name != "sweep":
        monkeypatch.setattr(module, "PARTS", dict.fromkeys(module.PARTS, part))
    chosen = {"training": "step", "sweep": "step", "encoder": "forward"}[name]
    module.main(["--device", "cpu", "--quick", "--parts", chosen, "--out", str(tmp_path / "rows.jsonl")])
    assert seen == [("highest", False)]
