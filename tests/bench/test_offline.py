"""Offline compilation: what is read from machine code, what counts as worse, and that one failure stops nothing else."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from fastskel.bench import compile_records, compile_usage, offline
from fastskel.bench.compile_usage import TARGETS, Job
from fastskel.kernels._backend import CompileCase, Cost

TARGET = {target.name: target for target in TARGETS}
USAGE = {"registers": 100, "spilled": 0, "shared": 1024, "matrix": "wgmma", "copies": "cp.async"}
CASE = "offline_scratch._first_kernel [a]"

KERNELS = """
from fastskel.kernels._backend import CompileCase, Cost, jit, tl

@jit()
def _first_kernel(p_x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(p_x + i, tl.load(p_x + i) + 1)

@jit()
def _second_kernel(p_x):
    tl.store(p_x, 1.0)

def case(label, **options):
    return CompileCase(label, _first_kernel, {"p_x": "*fp32"}, **{"constexprs": {"BLOCK": 64}, **options})

COMPILE_CASES = [
    case("a", cost=Cost(0, 4_300_000)),
    case("b", hot=True),
    case("wrong", constexprs={"BLOCK": 63}),
    CompileCase("second", _second_kernel, {"p_x": "*fp32"}),
]
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Import a module of kernels from source; processes that compile can import it too."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(source: str = KERNELS, name: str = "offline_scratch") -> ModuleType:
        (tmp_path / f"{name}.py").write_text(source)
        names.append(name)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scratch: Callable[..., ModuleType],
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., SimpleNamespace]:
    """Run the command on a scratch module and a compiler whose figures are given by job."""

    def run(
        *arguments: str, figures: Callable[[Job], Any] = lambda job: USAGE, broken: dict[str, str] | None = None
    ) -> SimpleNamespace:
        module = sys.modules.get("offline_scratch") or scratch()
        jobs: list[Job] = []

        def compiled(given: Iterable[Job], num_processes: int) -> Iterator[tuple[Job, Any]]:
            for job in reversed(list(given)):
                jobs.append(job)
                yield job, figures(job)

        monkeypatch.setattr(offline, "import_kernels", lambda: ({"offline_scratch": module}, broken or {}))
        monkeypatch.setattr(offline, "compile_jobs", compiled)
        records = tmp_path / "records.json"
        failures = offline.main(["--records", str(records), *arguments])
        return SimpleNamespace(failures=failures, out=capsys.readouterr().out, jobs=jobs, records=records)

    return run


LISTING = """
Resource usage:
 Common:
  GLOBAL:0
 Function _first_kernel:
  REG:96 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CALLED = " Function called:\n  REG:120 STACK:0 SHARED:0 LOCAL:16 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0\n"


def test_reads_resources_of_a_cubin() -> None:
    assert compile_usage.resource_usage(LISTING) == {"registers": 96, "spilled": 8}
    # stack frames add up along a call, and registers are those of the function that takes most
    assert compile_usage.resource_usage(LISTING + CALLED) == {"registers": 120, "spilled": 24}


def test_refuses_a_listing_that_it_cannot_read() -> None:
    with pytest.raises(RuntimeError, match="resource_usage: the list must give REG, STACK and LOCAL, got 'REG:96'"):
        compile_usage.resource_usage("REG:96")


def test_reads_metadata_of_amd_assembly() -> None:
    metadata = "    .private_segment_fixed_size: 4060\n    .sgpr_count:  106\n    .vgpr_count:     512\n"
    assert compile_usage.amdgcn_usage(metadata) == {"registers": 512, "spilled": 4060}
    with pytest.raises(RuntimeError, match="amdgcn_usage: the assembly must give .vgpr_count, got none"):
        compile_usage.amdgcn_usage("    .private_segment_fixed_size: 0\n")


@pytest.mark.parametrize(
    "line, matrix",
    [
        ("\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2;", "wgmma"),
        ("\twgmma.fence.sync.aligned;", "none"),
        ("\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 };", "mma"),
        ("\t@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1;", "tcgen05"),
        ("\ttcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64;", "none"),
        ("\tv_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]", "mfma"),
        ("\tfma.rn.f32 %r1, %r2, %r3, %r4;", "none"),
    ],
)
def test_finds_the_matrix_instruction(line: str, matrix: str) -> None:
    assert compile_usage.strongest(compile_usage.MATRIX, f"// begin\n{line}\n\tret;\n") == matrix


def test_the_strongest_instruction_counts() -> None:
    both = "\tmma.sync.aligned.m16n8k16;\n\twgmma.mma_async.sync.aligned;\n"
    assert compile_usage.strongest(compile_usage.MATRIX, both) == "wgmma"


@pytest.mark.parametrize(
    "line, copies",
    [
        ("\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", "cp.async"),
        ("\t@%p1 cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd1], [%r2];", "cp.async.bulk"),
        # waiting for copies is no copy
        ("\tcp.async.wait_group 0x0;", "none"),
        ("\tcp.async.bulk.wait_group.read 0;", "none"),
        ("\tglobal_load_lds_dword v[0:1], off", "lds"),
        ("\tbuffer_load_dword v0, s[4:7], 0 offen lds", "lds"),
        ("\tbuffer_load_dwordx4 v[0:3], v1, s[4:7], 0 offen", "none"),
        ("\tld.global.b32 { %r1 }, [ %rd1 + 0 ];", "none"),
    ],
)
def test_finds_asynchronous_copies(line: str, copies: str) -> None:
    assert compile_usage.strongest(compile_usage.COPIES, f"{line}\n") == copies


@pytest.mark.parametrize(
    "change, target, hot, recorded, complaint",
    [
        ({}, "sm_90", True, True, None),
        ({}, "sm_90", True, False, None),
        ({"spilled": 8}, "sm_90", True, False, "spills 8 bytes, and a hot case may not spill on sm_90"),
        ({"spilled": 8}, "sm_80", True, False, None),
        ({"spilled": 8}, "sm_90", False, False, None),
        ({"spilled": 8}, "sm_80", False, True, "spills 8 bytes, recorded 0"),
        (
            {"shared": 163 * 1024 + 1},
            "sm_80",
            False,
            False,
            "shared memory of 166913 bytes is above the limit of 166912",
        ),
        ({"shared": 163 * 1024}, "sm_80", False, False, None),
        (
            {"shared": 99 * 1024 + 1},
            "sm_86",
            False,
            False,
            "shared memory of 101377 bytes is above the limit of 101376",
        ),
        (
            {"shared": 227 * 1024 + 1},
            "sm_90",
            False,
            False,
            "shared memory of 232449 bytes is above the limit of 232448",
        ),
        (
            {"shared": 227 * 1024 + 1},
            "sm_100",
            False,
            True,
            "shared memory of 232449 bytes is above the limit of 232448",
        ),
        ({"shared": 64 * 1024 + 1}, "gfx942", False, False, "shared memory of 65537 bytes is above the limit of 65536"),
        ({"matrix": "mma"}, "sm_90", False, True, "matrix instruction is mma, recorded wgmma"),
        ({"matrix": "none"}, "sm_90", False, True, "matrix instruction is none, recorded wgmma"),
        ({"matrix": "tcgen05"}, "sm_100", False, True, None),
        ({"registers": 125}, "sm_90", False, True, None),
        ({"registers": 126}, "sm_90", False, True, "registers grew to 126, recorded 100"),
        ({"registers": 126}, "sm_90", False, False, None),
    ],
)
def test_rules(change: dict[str, Any], target: str, hot: bool, recorded: bool, complaint: str | None) -> None:
    found = compile_records.complaints({**USAGE, **change}, TARGET[target], hot=hot, record=USAGE if recorded else None)
    assert found == ([] if complaint is None else [complaint])


def test_every_rule_speaks() -> None:
    worse = {"registers": 255, "spilled": 4, "shared": 300_000, "matrix": "none", "copies": "none"}
    assert len(compile_records.complaints(worse, TARGET["sm_90"], hot=True, record=USAGE)) == 5


def test_a_change_of_one_figure_changes_one_line(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    figures = {key: USAGE[key] for key in compile_records.RECORDED}
    targets = dict.fromkeys(("sm_90", "sm_80"), figures)
    records = {"3.9": {"y._kernel": {"b": targets, "a": targets}, "x._kernel": {"a": targets}}, "3.6": {}}
    compile_records.write_records(path, records)
    first = path.read_text().splitlines()
    assert compile_records.read_records(path) == records
    records["3.9"]["y._kernel"]["a"] = {**targets, "sm_80": {**figures, "registers": 101}}
    compile_records.write_records(path, records)
    second = path.read_text().splitlines()
    changed = [(old, new) for old, new in zip(first, second, strict=True) if old != new]
    assert len(changed) == 1 and "101" in changed[0][1]
    assert [line for line in first if line.startswith((' "', '  "'))] == [
        ' "3.6": {},', ' "3.9": {', '  "x._kernel": {', '  "y._kernel": {'
    ]  # fmt: skip


ABORTS = """
import os

class Cases:
    def __getitem__(self, index):
        os._exit(7)

COMPILE_CASES = Cases()
"""


def test_compiles_and_reports_failures_by_job(scratch: Callable[..., ModuleType]) -> None:
    scratch()
    scratch(ABORTS, "offline_aborts")
    modules = [("offline_aborts", 0), ("offline_scratch", 0), ("offline_scratch", 2), ("offline_absent", 0)]
    jobs = [Job(*module, TARGET["sm_90"]) for module in modules]
    outcomes = dict(compile_usage.compile_jobs(jobs, 2))
    assert set(outcomes) == set(jobs)
    aborts, good, wrong, absent = (outcomes[job] for job in jobs)
    assert aborts == "the compiler ended its process, status 7"
    assert set(good) == set(USAGE)
    assert good["registers"] > 0 and good["spilled"] == 0 and good["matrix"] == "none"
    assert wrong.startswith("CompilationError") and "power of 2" in wrong
    assert absent.startswith("ModuleNotFoundError")


def test_table_has_figures_and_the_roofline(command: Callable[..., SimpleNamespace]) -> None:
    done = command()
    assert done.failures == 0 and len(done.jobs) == 4 * len(TARGETS)
    lines = done.out.splitlines()
    first = next(line for line in lines if line.startswith("  a "))
    # 4.3 MB at 4.3 TB/s
    assert first.split() == [
        "a",
        "100",
        "0",
        "1024",
        "wgmma",
        "cp.async",
        "4.3",
        "0.0",
        "1.0",
        "memory",
        "sm_90",
        "new",
    ]
    assert lines[lines.index(first) + 1].strip().startswith("sm_80: 100 0 1024 wgmma cp.async | sm_86: 100")
    assert "nothing is recorded for Triton" in done.out
    assert next(line for line in lines if line.startswith("  b ")).endswith("hot  new")


@pytest.mark.parametrize(
    "pointer, cost, microseconds, bound",
    [
        ("*bf16", Cost(790 * 10**6, 0), 1.0, "matrix"),
        ("*fp32", Cost(67 * 10**6, 0), 1.0, "fp32"),
        ("*bf16", Cost(790 * 10**6, 8_600_000), 2.0, "memory"),
        ("*bf16", Cost(0, 0), None, None),
    ],
)
def test_roofline(pointer: str, cost: Cost, microseconds: float | None, bound: str | None) -> None:
    case = CompileCase("x", None, {"size": "i32", "p_x": pointer, "p_y": "*fp32"}, cost=cost)
    found = offline.roofline(case)
    assert found["microseconds"] == (microseconds and pytest.approx(microseconds)) and found["bound"] == bound


@pytest.mark.parametrize(
    "arguments, count",
    [
        (["--kernel", "_second"], len(TARGETS)),
        (["--kernel", "scratch._first"], 3 * len(TARGETS)),
        (["--target", "sm_90"], 4),
        (["--target", "sm_90", "--target", "gfx942"], 8),
        (["--sample"], len(TARGETS)),
        (["--sample", "--target", "sm_80"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_filters(command: Callable[..., SimpleNamespace], arguments: list[str], count: int) -> None:
    done = command(*arguments)
    assert done.failures == 0 and len(done.jobs) == count
    if "--sample" in arguments:
        # the hot one, though it is not the first
        assert {job.position for job in done.jobs} == {1}


def test_a_filter_that_matches_nothing_fails(command: Callable[..., SimpleNamespace]) -> None:
    done = command("--kernel", "absent")
    assert done.failures == 1
    assert "FAILED --kernel must be part of the name of a kernel with cases, got 'absent'" in done.out


def test_one_failure_stops_nothing_else(command: Callable[..., SimpleNamespace]) -> None:
    failing = Job("offline_scratch", 0, TARGET["sm_90"])
    done = command(figures=lambda job: "CompilationError: why" if job == failing else USAGE)
    assert done.failures == 1
    assert f"FAILED {CASE} sm_90: CompilationError: why" in done.out
    assert f"{4 * len(TARGETS) - 1} compiled, 1 failures" in done.out


def test_a_module_that_does_not_import_fails_unless_it_is_not_asked_for(
    command: Callable[..., SimpleNamespace],
) -> None:
    broken = {"fastskel.kernels.broken": "does not import: SyntaxError: why"}
    done = command(broken=broken)
    assert done.failures == 1 and "FAILED broken.*: does not import: SyntaxError: why" in done.out
    assert command("--kernel", "scratch", broken=broken).failures == 0
    # it may be where the kernel that is asked for should be
    assert "FAILED broken.*" in command("--kernel", "_absent", broken=broken).out


def test_a_kernel_without_a_case_fails(
    scratch: Callable[..., ModuleType], command: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scratch()
    monkeypatch.setattr(module, "COMPILE_CASES", module.COMPILE_CASES[:3])
    done = command()
    assert done.failures == 1 and "FAILED offline_scratch._second_kernel: no entry in COMPILE_CASES" in done.out
    # an import is no second kernel, and cases may stand beside it
    imports = "from offline_scratch import _second_kernel\n"
    other = scratch(imports, "offline_other")
    modules = {"offline_scratch": module, "offline_other": other}
    assert offline.uncovered(modules) == ["offline_scratch._second_kernel"]
    covers = scratch(
        f"from fastskel.kernels._backend import CompileCase\n{imports}"
        "COMPILE_CASES = [CompileCase('x', _second_kernel, {'p_x': '*fp32'})]",
        "offline_covers",
    )
    assert offline.uncovered({**modules, "offline_covers": covers}) == []


def test_two_cases_of_one_label_fail(
    scratch: Callable[..., ModuleType], command: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scratch()
    monkeypatch.setattr(module, "COMPILE_CASES", [*module.COMPILE_CASES, module.COMPILE_CASES[0]])
    done = command()
    assert done.failures == 1 and f"FAILED {CASE}: two cases have this label" in done.out


def test_record_then_compare(command: Callable[..., SimpleNamespace]) -> None:
    recorded = command("--record")
    assert recorded.failures == 0
    figures = json.loads(recorded.records.read_text())
    (version,) = figures
    assert figures[version]["offline_scratch._first_kernel"]["a"]["sm_90"] == {
        key: USAGE[key] for key in compile_records.RECORDED
    }
    same = command("--strict")
    assert same.failures == 0 and "  new" not in same.out and "gone" not in same.out
    worse = command(figures=lambda job: {**USAGE, "matrix": "mma"} if job.position == 3 else USAGE)
    # what is true of every target is said once
    assert worse.failures == 1
    assert "second] sm_80, sm_86, sm_90, sm_100, gfx942: matrix instruction is mma, recorded wgmma" in worse.out
    # recording accepts what is worse, but no limit
    bad = {**USAGE, "registers": 255, "spilled": 4}
    done = command("--record", figures=lambda job: bad)
    assert done.failures == 1 and "[b] sm_90: spills 4 bytes, and a hot case may not spill on sm_90" in done.out


def test_record_keeps_what_it_did_not_compile(command: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    figures = {"sm_90": {key: USAGE[key] for key in compile_records.RECORDED}}
    version = compile_records.minor_version(offline.triton.__version__)
    old = {"2.0": {"x._kernel": {"a": figures}}, version: {"x._kernel": {"a": figures}}}
    compile_records.write_records(tmp_path / "records.json", old)
    done = command("--record", "--kernel", "_second", "--target", "sm_90")
    found = json.loads(done.records.read_text())
    assert found == {**old, version: {**old[version], "offline_scratch._second_kernel": {"second": figures}}}
    assert "gone x._kernel [a] sm_90: recorded, but not compiled" in command().out
    command("--record")
    found = json.loads(done.records.read_text())
    assert set(found) == {"2.0", version} and "x._kernel" not in found[version]


def test_strict_fails_on_what_is_new(command: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    # without any records there is nothing to be strict about but their absence
    assert command("--strict", "--target", "sm_90").failures == 4
    command("--record", "--kernel", "_first")
    done = command("--strict")
    assert done.failures == 1
    names = ", ".join(TARGET)
    assert f"FAILED offline_scratch._second_kernel [second] {names}: no record; run with --record" in done.out
    assert command().failures == 0
    # a version of Triton of which nothing is recorded
    text = done.records.read_text().replace(compile_records.minor_version(offline.triton.__version__), "2.0")
    done.records.write_text(text)
    other = command("--strict")
    assert other.failures == 0 and "nothing is recorded for Triton" in other.out


def test_writes_json(command: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command("--target", "sm_90", "--json", str(path), figures=lambda job: "why" if job.position == 3 else USAGE)
    found = json.loads(path.read_text())
    assert found["triton"] == offline.triton.__version__ and {"date", "commit"} < set(found)
    assert found["failures"] == ["offline_scratch._second_kernel [second] sm_90: why"]
    assert len(found["cases"]) == 3
    expected = {"kernel": "offline_scratch._first_kernel", "case": "a", "target": "sm_90", "hot": False, "new": True}
    assert found["cases"][0] == {
        **expected, **USAGE, "bytes": 4_300_000, "flops": 0, "microseconds": pytest.approx(1.0), "bound": "memory"
    }  # fmt: skip


def test_refuses_to_interpret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert offline.main([]) == 1
    assert "TRITON_INTERPRET must be unset, got 1" in capsys.readouterr().err


def test_refuses_no_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        offline.main(["--jobs", "0"])
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err
