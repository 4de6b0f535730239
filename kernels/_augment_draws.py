"""Draws of a view on the device: the words of a sample, what is chosen by them, and its matrices.

An address is the tuple (seed, clip, epoch, view) of scalars, seed in 64 bits. RECORDS are those of `Structure` in
`fastskel.kernels._augment_program`. A matrix is a tuple of its C C elements, row by row.
"""

from __future__ import annotations

from fastskel.kernels._augment_program import CROP, JOINTS, SPATIAL, constant
from fastskel.kernels._backend import jit, tl

__all__ = ["below", "chosen", "coin", "crop", "four_words", "linear_matrix", "uniform"]

# uses of words, part of their addresses
USE_CROP, USE_SPATIAL, USE_JOINTS = map(constant, (CROP, SPATIAL, JOINTS))
# kinds of linear transforms, as the program numbers them
SHEAR, ROTATION, SCALING, JOINT_MASK, CORRUPTION = map(constant, range(1, 6))


@jit()
def four_words(address, USE: tl.constexpr, number):
    """Words 4 `number` .. 4 `number` + 3 of a use; `number` is an int or a block of them."""
    seed, clip, epoch, view = address
    return tl.philox(seed, clip, epoch, view | (USE << 16), number)


@jit()
def uniform(word):
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@jit()
def symmetric(word):
    return 2.0 * uniform(word) - 1.0


@jit()
def below(word, bound):
    # a block whether the bound is one or a number
    b_bound = (word * 0).to(tl.int32) + bound
    return tl.umulhi(word, b_bound.to(tl.uint32)).to(tl.int32)


@jit()
def coin(address, NUMBER: tl.constexpr, p_probability):
    """Whether transform NUMBER is applied, by its word 1."""
    _, word, _, _ = four_words(address, USE_SPATIAL, 16 * NUMBER)
    return uniform(word) < tl.load(p_probability)


@jit()
def crop(address, num_frames, RANDOM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, LEAST: tl.constexpr):
    """First frame and length of the crop; shares are in units of 2^-24."""
    if RANDOM:
        word0, word1, _, _ = four_words(address, USE_CROP, 0)
        scale = LOW + ((HIGH - LOW) * (word0 >> 8).to(tl.int64) >> 24)
        length = tl.minimum(tl.maximum((num_frames.to(tl.int64) * scale >> 24).to(tl.int32), LEAST), num_frames)
        start = below(word1, num_frames - length + 1)
    else:
        # (1 - ratio) n / 2
        start = (num_frames.to(tl.int64) * (16777216 - HIGH) >> 25).to(tl.int32)
        length = num_frames - 2 * start
    return start, length


@jit()
def chosen(address, USE: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, b_number):
    """Which of the numbers are among the COUNT of SIZE that a partial Fisher-Yates shuffle with words FIRST on chooses."""
    # every lane follows its own number through the swaps: no lane needs another's
    b_place = b_number
    for q in range((COUNT + 3) // 4):
        word0, word1, word2, word3 = four_words(address, USE, FIRST // 4 + q)
        b_place = _swap(b_place, 4 * q, word0, COUNT, SIZE)
        b_place = _swap(b_place, 4 * q + 1, word1, COUNT, SIZE)
        b_place = _swap(b_place, 4 * q + 2, word2, COUNT, SIZE)
        b_place = _swap(b_place, 4 * q + 3, word3, COUNT, SIZE)
    return b_place < COUNT


@jit()
def _swap(b_place, j, word, COUNT: tl.constexpr, SIZE: tl.constexpr):
    # words behind the last swap a place with itself
    other = tl.where(j < COUNT, j + below(word, SIZE - j), j)
    return tl.where(b_place == other, j, tl.where(b_place == j, other, b_place))


@jit()
def linear_matrix(
    address, p_values, b_joint, RECORDS: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, V: tl.constexpr, C: tl.constexpr
):
    """The product of some linear transforms for each joint: C C blocks like b_joint."""
    b_zero = b_joint.to(tl.float32) * 0.0
    b_one = b_zero + 1.0
    if C == 2:
        total = (b_one, b_zero, b_zero, b_one)
    else:
        total = (b_one, b_zero, b_zero, b_zero, b_one, b_zero, b_zero, b_zero, b_one)
    for i in tl.static_range(BEGIN, END):
        total = _follow(address, p_values, b_joint, total, RECORDS, i, V, C)
    return total


@jit()
def _follow(
    address, p_values, b_joint, total, RECORDS: tl.constexpr, PLACE: tl.constexpr, V: tl.constexpr, C: tl.constexpr
):
    KIND: tl.constexpr = RECORDS[PLACE][0]
    NUMBER: tl.constexpr = RECORDS[PLACE][1]
    OPTION: tl.constexpr = RECORDS[PLACE][2]
    OPTIONS: tl.constexpr = RECORDS[PLACE][3]
    COUNT: tl.constexpr = RECORDS[PLACE][4]
    FLAG: tl.constexpr = RECORDS[PLACE][5]
    b_zero = b_joint.to(tl.float32) * 0.0
    choice, flip, _, _ = four_words(address, USE_SPATIAL, 16 * NUMBER)
    p_own = p_values + RECORDS[PLACE][6]
    drawn = uniform(flip) < tl.load(p_own)
    wanted = below(choice, OPTIONS) == OPTION
    if KIND != CORRUPTION and KIND != SHEAR:
        wanted = wanted & drawn
    if wanted:
        b0, b1, b2, b3 = four_words(address, USE_SPATIAL, 16 * NUMBER + 1)
        if KIND == JOINT_MASK:
            b_keep = tl.where(chosen(address, USE_JOINTS, 64 * NUMBER, COUNT, V, b_joint), 0.0, 1.0)
            matrix = _diagonal(b_keep, b_keep, b_keep, b_zero, C)
        elif KIND == SCALING:
            low = tl.load(p_own + 1)
            span = tl.load(p_own + 2) - low
            f0 = low + span * uniform(b0)
            f1 = f0
            f2 = f0
            if FLAG:
                f1 = low + span * uniform(b1)
                f2 = low + span * uniform(b2)
            matrix = _diagonal(b_zero + f0, b_zero + f1, b_zero + f2, b_zero, C)
        elif KIND == ROTATION:
            matrix = _rotation(b0, b1, b2, p_own, b_zero, C)
        elif KIND == SHEAR:
            b4, b5, _, _ = four_words(address, USE_SPATIAL, 16 * NUMBER + 2)
            matrix = _shear((b0, b1, b2, b3, b4, b5), tl.load(p_own), b_zero, C)
        else:
            b4, b5, b6, b7 = four_words(address, USE_SPATIAL, 16 * NUMBER + 2)
            b8, _, _, _ = four_words(address, USE_SPATIAL, 16 * NUMBER + 3)
            # chosen joints become zero, or are mixed
            mix = tl.where(drawn, 0.0, 1.0)
            m_joint = chosen(address, USE_JOINTS, 64 * NUMBER, COUNT, V, b_joint)
            if C == 2:
                matrix = (
                    tl.where(m_joint, mix * symmetric(b0), 1.0), tl.where(m_joint, mix * symmetric(b1), 0.0),
                    tl.where(m_joint, mix * symmetric(b3), 0.0), tl.where(m_joint, mix * symmetric(b4), 1.0),
                )  # fmt: skip
            else:
                matrix = (
                    tl.where(m_joint, mix * symmetric(b0), 1.0), tl.where(m_joint, mix * symmetric(b1), 0.0),
                    tl.where(m_joint, mix * symmetric(b2), 0.0), tl.where(m_joint, mix * symmetric(b3), 0.0),
                    tl.where(m_joint, mix * symmetric(b4), 1.0), tl.where(m_joint, mix * symmetric(b5), 0.0),
                    tl.where(m_joint, mix * symmetric(b6), 0.0), tl.where(m_joint, mix * symmetric(b7), 0.0),
                    tl.where(m_joint, mix * symmetric(b8), 1.0),
                )  # fmt: skip
        total = _compose(total, matrix, C)
    return total


@jit()
def _diagonal(b0, b1, b2, b_zero, C: tl.constexpr):
    if C == 2:
        matrix = (b0, b_zero, b_zero, b1)
    else:
        matrix = (b0, b_zero, b_zero, b_zero, b1, b_zero, b_zero, b_zero, b2)
    return matrix


@jit()
def _shear(drawn, amplitude, b_zero, C: tl.constexpr):
    # the transpose of [[1, a, b], [c, 1, d], [e, f, 1]]
    a, b, c, d, e, f = drawn
    b_one = b_zero + 1.0
    b_a = b_zero + amplitude * symmetric(a)
    b_c = b_zero + amplitude * symmetric(c)
    if C == 2:
        matrix = (b_one, b_c, b_a, b_one)
    else:
        b_b = b_zero + amplitude * symmetric(b)
        b_d = b_zero + amplitude * symmetric(d)
        b_e = b_zero + amplitude * symmetric(e)
        b_f = b_zero + amplitude * symmetric(f)
        matrix = (b_one, b_c, b_e, b_a, b_one, b_f, b_b, b_d, b_one)
    return matrix


@jit()
def _rotation(word0, word1, word2, p_own, b_zero, C: tl.constexpr):
    z = tl.load(p_own + 3) * symmetric(word2)
    sz = tl.sin(z)
    cz = tl.cos(z)
    if C == 2:
        matrix = (b_zero + cz, b_zero - sz, b_zero + sz, b_zero + cz)
    else:
        x = tl.load(p_own + 1) * symmetric(word0)
        y = tl.load(p_own + 2) * symmetric(word1)
        sx = tl.sin(x)
        cx = tl.cos(x)
        sy = tl.sin(y)
        cy = tl.cos(y)
        # about x, then y, then z
        a = sx * sy
        b = cx * sy
        matrix = (
            b_zero + cy * cz, b_zero - cy * sz, b_zero + sy,
            b_zero + (a * cz + cx * sz), b_zero + (cx * cz - a * sz), b_zero - sx * cy,
            b_zero + (sx * sz - b * cz), b_zero + (b * sz + sx * cz), b_zero + cx * cy,
        )  # fmt: skip
    return matrix


@jit()
def _compose(first, second, C: tl.constexpr):
    out = ()
    for i in tl.static_range(C):
        for j in tl.static_range(C):
            b_sum = first[i * C] * second[j]
            for k in tl.static_range(1, C):
                b_sum += first[i * C + k] * second[k * C + j]
            out += (b_sum,)
    return out
