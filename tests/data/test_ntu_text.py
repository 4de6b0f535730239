"""NTU RGB+D skeleton text: the parser against a plain one, damaged text, memory, sanitizers."""

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from fastskel import _native

CSRC = Path(__file__).resolve().parents[2] / "csrc"
GENUINE = {
    "EXCERPT_1frame_noisybody_S001C002P005R002A008": (1, 2),
    "S001C001P001R001A011": (82, 1),
    "S001C003P008R002A058": (70, 2),
    "S002C001P003R001A003": (100, 1),
}


def plain_parse(data):
    """Bodies of each frame, and number, tracker and joints of each body, read word by word."""
    words = iter(data.decode("ascii").split())
    counts, ids, trackers, joints = [], [], [], []
    for _ in range(int(next(words))):
        counts.append(int(next(words)))
        for _ in range(counts[-1]):
            ids.append(int(next(words)))
            trackers.append([float(next(words)) for _ in range(9)])
            joints.append([[float(next(words)) for _ in range(12)] for _ in range(int(next(words)))])
    assert next(words, None) is None
    return (
        np.array(counts, np.int64),
        np.array(ids, np.int64),
        np.array(trackers, np.float64).reshape(-1, 9).astype(np.float32),
        np.array(joints, np.float64).astype(np.float32),
    )


def row(values):
    return " ".join(str(float(value)) for value in values)


def text(frames):
    """File of frames, each a list of (number of a body, its joints (V, 3))."""
    lines = [str(len(frames))]
    for bodies in frames:
        lines.append(str(len(bodies)))
        for number, joints in bodies:
            lines += [f"{number} 0 1 1 1 1 0 -0.25 0.5 2", str(len(joints))]
            lines += [f"{row(joint)} 276.1 190.25 1032.5 514 -0.17 0.04 0.97 -0.15 2" for joint in joints]
    return ("\n".join(lines) + "\n").encode()


def pose(seed, scale=1.0, joints=25):
    return (np.random.default_rng(seed).normal(size=(joints, 3)) * scale).astype(np.float32)


def parse(data, joints=25, all_values=False):
    return _native.parse_ntu(data, "a.skeleton", joints, all_values)


SMALL = text([[(72057594037931648, pose(0, joints=2)), (7, pose(1, joints=2))], [], [(7, pose(2, joints=2))]])


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_files_float_for_float(data_dir, name):
    data = (data_dir / "ntu_raw" / f"{name}.skeleton").read_bytes()
    expected = plain_parse(data)
    for all_values, last in ((True, 12), (False, 3)):
        *found, joints = parse(data, all_values=all_values)
        for one, other in zip(found, expected[:3], strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        assert joints.dtype == np.float32 and joints.flags.c_contiguous
        np.testing.assert_array_equal(joints.view(np.int32), expected[3][..., :last].copy().view(np.int32))
    assert (len(expected[0]), max(expected[0])) == GENUINE[name]


def numbers():
    rng = np.random.default_rng(0)
    for digits in range(1, 24):
        for _ in range(60):
            mantissa = "".join(rng.choice(list("0123456789"), digits))
            point = int(rng.integers(0, digits + 1))
            sign = rng.choice(["", "-", "+"])
            yield f"{sign}{mantissa[:point]}.{mantissa[point:]}"
            yield f"{sign}{mantissa}{rng.choice(['e', 'E'])}{int(rng.integers(-60, 60))}"
            yield f"{mantissa}{rng.choice(['e+', 'e-'])}{int(rng.integers(0, 420)):03}"


# halfway between two doubles, or two floats, or just beside; beyond the largest and the smallest
# fmt: off
HARD = (
    "9007199254740993", "9007199254740992.99999", "1.00000005960464477539", "1.000000059604644775390625000001", "16777217",
    "1.7976931348623157e308", "1.7976931348623159e308", "1e309", "-1e400", "3.4028235e38", "3.4028236e38", "1e39",
    "4.9e-324", "2.4e-324", "1e-400", "1e-45", "7e-46", "1e22", "1e23", "1e-22", "1e-23", "0", "-0", "-0.0", "00", "000.500",
    "0e999999999999999999999", "1e-999999999999999999999", "1e999999999999999999999", ".5", "5.", "-.5e1", "0.1",
    "6.6330907344818110", "8.1621336936950675", "3.6205526590347292", "7.1167623996734623", "18446744073709551617",
    "123456789012345678901234567890", "0.000000000000000000000000001", "8.568168E-05",
    "nan", "-nan", "NaN", "inf", "-inf", "+Infinity", "INFINITY",
)
# fmt: on


def test_numbers_are_read_exactly():
    words = [*HARD, *numbers()]
    words += ["1"] * (-len(words) % 12)
    lines = [" ".join(words[begin : begin + 12]) for begin in range(0, len(words), 12)]
    data = f"1\n1\n1 0 0 0 0 0 0 0 0 0\n{len(lines)}\n" + "\n".join(lines)
    joints = parse(data.encode(), len(lines), all_values=True)[3]
    with np.errstate(over="ignore"):
        expected = np.array([float(word) for word in words]).astype(np.float32)
    difference = np.flatnonzero(joints.ravel().view(np.int32) != expected.view(np.int32))
    # the sign of NaN says nothing
    assert [words[i] for i in difference if not np.isnan(expected[i])] == []
    assert np.isnan(joints.ravel()[np.isnan(expected)]).all() and np.isnan(expected).sum() == 3


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63 - 1), 2**56 + 1, 0], ids=str)
def test_body_numbers_have_64_bits(number):
    assert parse(text([[(number, pose(0))]]))[1].tolist() == [number]


LAYOUTS = {
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "blanks at the ends": lambda data: data.replace(b"\n", b" \t\n  "),
    "tabs": lambda data: data.replace(b" ", b"\t \t"),
    "blank lines": lambda data: b"\n \r\n" + data.replace(b"\n", b"\n\n\r\n"),
    "no last newline": lambda data: data.rstrip(),
    "many last newlines": lambda data: data + b"\r\n\n \n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_matter(layout):
    for one, other in zip(parse(LAYOUTS[layout](SMALL), 2, True), parse(SMALL, 2, True), strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_truncation_is_one_error():
    whole = len(SMALL.rstrip())
    for size in range(len(SMALL) + 1):
        if size >= whole:
            assert len(parse(SMALL[:size], 2)[0]) == 3
        else:
            with pytest.raises(ValueError, match=r"^pack_source: line \d+ must be .*, got .*, in a.skeleton\. "):
                parse(SMALL[:size], 2)


def test_every_missing_or_doubled_word_is_an_error():
    lines = SMALL.decode().splitlines()
    for number, line in enumerate(lines):
        words = line.split()
        for place in range(len(words)):
            for other in (words[:place] + words[place + 1 :], words[:place] + [words[place]] * 2 + words[place + 1 :]):
                changed = [*lines[:number], " ".join(other), *lines[number + 1 :]]
                with pytest.raises(ValueError, match=r"^pack_source: line \d+ must be .*, got "):
                    parse("\n".join(changed).encode(), 2)


def changed(line, new, data=SMALL):
    lines = data.decode().splitlines()
    lines[line - 1] = new
    return "\n".join(lines).encode("utf-8")


JOINT = "0.5 1 2 3 4 5 6 7 8 9 10 2"
DAMAGED = {
    "empty": (b"", "line 1 must be the number of frames, got the end of the file"),
    "blank": (b" \n\r\n", "line 3 must be the number of frames, got the end of the file"),
    "10^9 frames": (changed(1, "1000000000"), r"line 1 must be the number of frames \(0 to \d+ fit .*, got '1000000000'"),
    "10^30 frames": (changed(1, "1" + "0" * 30), r"line 1 must be the number of frames, got '1000000000.*0\.\.\.', no whole"),
    "negative frames": (changed(1, "-3"), r"line 1 must be the number of frames \(0 to .*, got '-3'"),
    "a fraction of frames": (changed(1, "3.0"), "line 1 must be the number of frames, got '3.0', no whole number of 64 bits"),
    "two counts": (changed(1, "3 3"), "line 1 must be the number of frames, got '3' after it"),
    "too many frames": (changed(1, "4"), "line 16 must be the number of bodies, got the end of the file"),
    "too few frames": (changed(1, "2"), "line 12 must be the end after 2 frames, got '1'"),
    "10^9 bodies": (changed(2, "1000000000"), r"line 2 must be the number of bodies \(0 to \d+ fit .*, got '1000000000'"),
    "negative bodies": (changed(2, "-1"), r"line 2 must be the number of bodies \(0 to .*, got '-1'"),
    "body number a fraction": (changed(3, "1.5 0 1 1 1 1 0 -0.25 0.5 2"), "line 3 must be a body id and .*, got '1.5', no whole"),
    "body number of 65 bits": (changed(3, f"{2**63} 0 1 1 1 1 0 0 0 2"), "line 3 must be .*, got '9223372036854775808', no "),
    "tracker short": (changed(3, "7 0 1 1 1 1 0 -0.25 0.5"), "line 3 must be a body id and 9 numbers, got only 9"),
    "tracker long": (changed(3, "7 0 1 1 1 1 0 -0.25 0.5 2 0"), "line 3 must be a body id and 9 numbers, got '0' after it"),
    "tracker a word": (changed(3, "7 0 1 1 one 1 0 -0.25 0.5 2"), "line 3 must be .*, got 'one' as number 5"),
    "three joints": (changed(4, "3"), r"line 4 must be the number of joints \(2\), got '3'"),
    "10^9 joints": (changed(4, "1000000000"), r"line 4 must be the number of joints \(2\), got '1000000000'"),
    "joint short": (changed(5, "0.5 1 2"), "line 5 must be 12 numbers of a joint, got only 3"),
    "joint long": (changed(5, JOINT + " 1"), "line 5 must be 12 numbers of a joint, got '1' after it"),
    "a word": (changed(5, JOINT.replace("1 2", "one 2")), "line 5 must be 12 numbers of a joint, got 'one' as number 2"),
    "a word behind the coordinates": (changed(5, JOINT.replace("6", "?")), "line 5 must be .*, got '\\?' as number 7"),
    "comma": (changed(5, JOINT.replace("0.5", "0,5")), "line 5 must be .*, got '0,5' as number 1"),
    "hexadecimal": (changed(5, JOINT.replace("0.5", "0x1p3")), "line 5 must be .*, got '0x1p3' as number 1"),
    "underscore": (changed(5, JOINT.replace("0.5", "1_0")), "line 5 must be .*, got '1_0' as number 1"),
    "no digits": (changed(5, JOINT.replace("0.5", "-.")), r"line 5 must be .*, got '-\.' as number 1"),
    "no exponent": (changed(5, JOINT.replace("0.5", "1e+")), r"line 5 must be .*, got '1e\+' as number 1"),
    "two signs": (changed(5, JOINT.replace("0.5", "--1")), "line 5 must be .*, got '--1' as number 1"),
    "nearly infinity": (changed(5, JOINT.replace("0.5", "infinit")), "line 5 must be .*, got 'infinit' as number 1"),
    "not ASCII": (changed(5, JOINT.replace("0.5", "\u0661")), r"line 5 must be .*, got '\\xd9\\xa1' as number 1"),
    "zero byte": (SMALL.replace(b"0.5 2", b"0.5\x002", 1), r"line 3 must be .*, got '0\.5\\x002' as number 9"),
    "a byte order mark": (b"\xef\xbb\xbf" + SMALL, r"line 1 must be the number of frames, got '\\xef\\xbb\\xbf3'"),
    "old line ends": (SMALL.replace(b"\n", b"\r"), "line 1 must be the number of frames, got '2' after it"),
    "binary": (bytes(range(256)), r"line 1 must be the number of frames, got '\\x00"),
    "more": (SMALL + b"0\n", "line 17 must be the end after 3 frames, got '0'"),
}  # fmt: skip


@pytest.mark.parametrize("all_values", [False, True], ids=["coordinates", "all values"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_text(case, all_values):
    data, message = DAMAGED[case]
    with pytest.raises(ValueError, match=rf"^pack_source: {message}.*, in a\.skeleton\. Fetch the file again"):
        parse(data, 2, all_values)


@pytest.mark.parametrize("joints", [0, -1, 1025])
def test_number_of_joints(joints):
    with pytest.raises(ValueError, match=f"parse_ntu: num_joints must be from 1 to 1024, got {joints}"):
        parse(SMALL, joints)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory through the system")
@pytest.mark.parametrize("line", [1, 2])
def test_a_count_allocates_nothing(line):
    lines = ["1", "0"]
    lines[line - 1] = "1000000000"
    program = f"""
        import resource
        from fastskel import _native
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        try:
            _native.parse_ntu({chr(10).join(lines).encode()!r}, "a.skeleton", 25)
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pack_source: line ") and "'1000000000'" in done.stdout


def test_other_threads_run_while_text_is_parsed():
    data = text([[(1, pose(0))]]).replace(b"1\n", b"12000\n", 1) + b"".join(
        text([[(1, pose(0))]]).split(b"\n", 1)[1] for _ in range(11_999)
    )
    interval = sys.getswitchinterval()
    # nobody is asked to let others run: they do only while the parser has let go of the interpreter
    sys.setswitchinterval(100)
    try:
        for _ in range(5):
            events, begun = [], threading.Event()

            def work(events=events, begun=begun):
                begun.set()
                parse(data)
                events.append("parsed")

            thread = threading.Thread(target=work)
            thread.start()
            begun.wait()
            events.append("meanwhile")
            thread.join()
            if events == ["meanwhile", "parsed"]:
                return
    finally:
        sys.setswitchinterval(interval)
    pytest.fail("the parser holds the interpreter's lock")
