"""The native stream in processes of their own: forks, exits, signals and limits. A process that hangs is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed data set of 13 clips, as many as those of test_stream.py, whose functions the processes import."""
    frames = np.random.default_rng(0).standard_normal((13 * 20, 2, 5, 3)).astype(np.float32)
    np.save(tmp_path / "frames.npy", frames)
    np.save(tmp_path / "offsets.npy", np.arange(0, 13 * 20 + 1, 20))
    return tmp_path


SETUP = """
    import os, signal, sys, threading, time
    import numpy as np
    from test_stream import NUM, PROGRAMS, opened, rest, slow, stream_of
    from pathlib import Path
"""


def run(source: str, *arguments: object, limit: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    setup = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
    command = [sys.executable, "-c", setup + textwrap.dedent(source), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit)


@LINUX
def test_affinity_counts() -> None:
    source = """
        import os
        from fastskel import _native
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        assert _native.available_cpus() == 1
    """
    done = run(source)
    assert done.returncode == 0, done.stderr


@LINUX
def test_threads_that_cannot_be_had_are_an_error(folder: Path) -> None:
    source = SETUP + """
    import resource
    from fastskel import _native
    stream = stream_of(opened(Path(sys.argv[1])), num_threads=1024)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    # their stacks do not fit
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)
    try:
        stream.start(0, np.arange(NUM), 0)
    except _native.NativeError as error:
        print(error)
    assert stream.next() is None
    stream.close()
    """
    done = run(source, folder)
    assert done.returncode == 0, done.stderr
    assert "num_threads must be at most what the system allows, got 1024 (" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_refused(folder: Path) -> None:
    source = SETUP + """
    from fastskel import _native
    stream = stream_of(opened(Path(sys.argv[1])), num_threads=3)
    stream.start(0, np.tile(np.arange(NUM), 50), 0)
    batch = stream.next()
    for _ in range(8):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            for call in (stream.next, stream.stop, stream.close, lambda: stream.start(0, np.arange(4), 0)):
                try:
                    call()
                    os._exit(1)
                except _native.NativeError as error:
                    assert "made before the process forked" in str(error) and "new loader in the child" in str(error)
            fine = all(np.isfinite(clips).all() for clips, _ in batch[0])
            # nothing hangs where the child ends as a program does, and a stream of its own works
            del batch, stream
            mine = stream_of(opened(Path(sys.argv[1])))
            mine.start(0, np.arange(NUM), 0)
            sys.exit(0 if fine and len(list(rest(mine))) == 4 else 2)
        assert os.waitpid(child, 0)[1] == 0
        assert stream.next() is not None
    print("done")
    """
    done = run(source, folder)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "batches = rest(stream); next(batches)", "kept = stream.next()"])
@pytest.mark.parametrize("holder", ["stream", "threading.stream", "cycle"])
def test_the_interpreter_ends_with_a_running_stream(folder: Path, end: str, holder: str) -> None:
    source = SETUP + f"""
    stream = stream_of(opened(Path(sys.argv[1])), num_threads=4, depth=4)
    stream.start(0, np.tile(np.arange(NUM), 500), 0)
    stream.next()
    cycle = [stream]
    cycle.append(cycle)
    threading.stream = stream
    if {holder!r} != "threading.stream":
        del threading.stream
    {end}
    """
    done = run(source, folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_interpreter_ends_while_a_thread_waits(folder: Path) -> None:
    source = SETUP + """
    stream = stream_of(opened(Path(sys.argv[1])), [slow(1_000_001)], num_threads=1)
    stream.start(0, np.arange(4), 0)
    threading.Thread(target=stream.next, daemon=True).start()
    time.sleep(0.2)
    """
    done = run(source, folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name != "posix", reason="sends a signal")
def test_ctrl_c_ends_a_wait(folder: Path) -> None:
    source = SETUP + """
    # what a shell starts in the background begins with the signal ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stream = stream_of(opened(Path(sys.argv[1])), [slow(1_000_001)], num_threads=1, batch_size=8)
    stream.start(0, np.arange(NUM), 0)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    try:
        stream.next()
    except KeyboardInterrupt:
        print(time.monotonic() - begin)
    # nothing is lost: the batch that was waited for is still the next one
    print(stream.next()[1].tolist())
    """
    done = run(source, folder, limit=120)
    assert done.returncode == 0, done.stderr
    seconds, index = done.stdout.splitlines()
    assert 0.2 < float(seconds) < 3
    assert index == str(list(range(8)))
