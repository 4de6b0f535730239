"""Points of a view on the device: frames are sampled, and pass through the stages of the pipeline.

A point is a tuple of C blocks, one for each channel, (frames, places): place m V + v is joint v of body m. STAGES and RECORDS are
those of `Structure` in `fastskel.kernels._augment_program`; a stage's draw is what `plan` keeps of it for each place. Places and
frames beyond the last are the last again: nothing is read outside, and loads need no masks.
"""

from __future__ import annotations

from fastskel.kernels._augment_draws import below, chosen, coin, four_words, linear_matrix, uniform
from fastskel.kernels._augment_program import FRAMES, NOISE, SPATIAL, constant
from fastskel.kernels._backend import jit, tl

__all__ = ["evaluate", "load_resized", "plan", "present"]

USE_SPATIAL, USE_NOISE, USE_FRAMES = map(constant, (SPATIAL, NOISE, FRAMES))
# kinds of stages, as the program numbers them
KIND_LINEAR, KIND_MIRROR, KIND_NOISE, KIND_BLUR, KIND_FRAME_MASK, KIND_BODY_MASK = map(constant, range(6))


@jit()
def plan(
    address, p_values, p_joints, b_place, STAGES: tl.constexpr, RECORDS: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Draw what the stages do, from the last to the first: before a mirror stands another joint.

    Returns:
        The place that each of b_place is at first, and the draws of the stages in their order.
    """
    draws = ()
    for s in tl.static_range(len(STAGES)):
        b_place, draw = _draw(address, p_values, p_joints, b_place, STAGES, RECORDS, len(STAGES) - 1 - s, M, V, C)
        draws = (draw,) + draws  # noqa: RUF005
    return b_place, draws


@jit()
def _draw(
    address, p_values, p_joints, b_place, STAGES: tl.constexpr, RECORDS: tl.constexpr, STAGE: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = STAGES[STAGE][0]
    NUMBER: tl.constexpr = STAGES[STAGE][1]
    p_own = p_values + STAGES[STAGE][4]
    if KIND == KIND_LINEAR:
        draw = linear_matrix(address, p_values, b_place % V, RECORDS, STAGES[STAGE][6], STAGES[STAGE][7], V, C)
    else:
        on = coin(address, NUMBER, p_own)
        if KIND == KIND_MIRROR:
            sign = 1.0
            if STAGES[STAGE][3]:
                sign = tl.where(on, -1.0, 1.0)
            draw = (sign,)
            b_other = tl.load(p_joints + STAGES[STAGE][5] + b_place % V)
            b_place = tl.where(on, b_place // V * V + b_other, b_place)
        elif KIND == KIND_BLUR:
            word, _, _, _ = four_words(address, USE_SPATIAL, 16 * NUMBER + 1)
            low = tl.load(p_own + 1)
            sigma = low + (tl.load(p_own + 2) - low) * uniform(word)
            draw = (on, -0.5 / (sigma * sigma))
        elif KIND == KIND_BODY_MASK:
            m_body = b_place < 0
            if M > 1:
                word, _, _, _ = four_words(address, USE_SPATIAL, 16 * NUMBER + 1)
                m_body = b_place // V == tl.where(on, 1 + below(word, M - 1), M)
            draw = (m_body,)
        elif KIND == KIND_NOISE:
            draw = (on, tl.load(p_own + 1), b_place)
        else:
            draw = (on,)
    return b_place, draw


@jit()
def load_resized(
    p_clip, p_table, length, i_t, b_place, NORMALISE: tl.constexpr, T: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Interpolate frames i_t (frames, 1) of the resized crop at b_place (1, places); p_clip and p_table begin with the crop."""
    b_a = tl.maximum((2 * i_t + 1) * length - T, 0)
    b_lower = b_a // (2 * T)
    b_upper = tl.minimum(b_lower + 1, length - 1)
    b_weight = (b_a - b_lower * (2 * T)).to(tl.float32) * (0.5 / T)
    lower = _load_normalised(p_clip, p_table, b_lower, b_place, NORMALISE, M * V * C, C)
    upper = _load_normalised(p_clip, p_table, b_upper, b_place, NORMALISE, M * V * C, C)
    point = ()
    for c in tl.static_range(C):
        point += ((1.0 - b_weight) * lower[c] + b_weight * upper[c],)
    return point


@jit()
def _load_normalised(p_clip, p_table, b_frame, b_place, NORMALISE: tl.constexpr, ROW: tl.constexpr, C: tl.constexpr):
    # one address for all channels
    p_point = p_clip + (b_frame * ROW + b_place * C)
    point = ()
    for c in tl.static_range(C):
        point += (tl.load(p_point + c),)
    if NORMALISE != "none":
        m_present = present(point, C)
        moved = ()
        for c in tl.static_range(C):
            if NORMALISE == "center":
                b_shift = tl.load(p_table + (b_frame * C + c))
            else:
                b_shift = tl.load(p_table + c)
            moved += (point[c] - b_shift,)
        if NORMALISE == "align":
            turned = ()
            for c in tl.static_range(C):
                b_sum = moved[0] * tl.load(p_table + 3 + 3 * c)
                for k in tl.static_range(1, C):
                    b_sum += moved[k] * tl.load(p_table + 3 + 3 * c + k)
                turned += (b_sum,)
            moved = turned
        # what is absent is multiplied by zero, not replaced, as the definition does
        b_present = m_present.to(tl.float32)
        point = ()
        for c in tl.static_range(C):
            point += (moved[c] * b_present,)
    return point


@jit()
def present(point, C: tl.constexpr):
    m_present = point[0] != 0.0
    for c in tl.static_range(1, C):
        m_present = m_present | (point[c] != 0.0)
    return m_present


@jit()
def evaluate(
    address, p_clip, p_table, length, resized, i_t, b_place, draws, STAGES: tl.constexpr, BLUR: tl.constexpr,
    NORMALISE: tl.constexpr, T: tl.constexpr, M: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Pass frames i_t, `resized`, through the stages; BLUR is the place of the blur among the stages, or their number."""
    if len(STAGES) == BLUR:
        point = _apply(address, resized, i_t, draws, STAGES, 0, BLUR, T, M, V, C)
    else:
        HALF: tl.constexpr = STAGES[BLUR][2] // 2
        on = draws[BLUR][0]
        factor = draws[BLUR][1]
        total = 1.0
        if STAGES[BLUR][3] % 2 == 1:
            b_tap = tl.arange(0, STAGES[BLUR][5]) - HALF
            total = tl.sum(tl.where(b_tap <= HALF, tl.exp(factor * (b_tap * b_tap).to(tl.float32)), 0.0))
        b_zero = (i_t * b_place).to(tl.float32) * 0.0
        point = (b_zero, b_zero)
        if C == 3:
            point += (b_zero,)
        # without the blur one tap of weight 1 is left
        for j in range(tl.where(on, -HALF, 0), tl.where(on, HALF + 1, 1)):
            b_weight = tl.where(on, tl.exp(factor * j * j) / total, 1.0)
            i_tap = i_t + j
            if STAGES[BLUR][3] >= 2:
                b_weight = tl.where((i_tap >= 0) & (i_tap < T), b_weight, 0.0)
            i_tap = tl.minimum(tl.maximum(i_tap, 0), T - 1)
            near = load_resized(p_clip, p_table, length, i_tap, b_place, NORMALISE, T, M, V, C)
            near = _apply(address, near, i_tap, draws, STAGES, 0, BLUR, T, M, V, C)
            summed = ()
            for c in tl.static_range(C):
                summed += (point[c] + b_weight * near[c],)
            point = summed
        point = _apply(address, point, i_t, draws, STAGES, BLUR + 1, len(STAGES), T, M, V, C)
    return point


@jit()
def _apply(
    address, point, i_t, draws, STAGES: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, T: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    for s in tl.static_range(BEGIN, END):
        point = _apply_one(address, point, i_t, draws[s], STAGES, s, T, M, V, C)
    return point


@jit()
def _apply_one(
    address, point, i_t, draw, STAGES: tl.constexpr, STAGE: tl.constexpr, T: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = STAGES[STAGE][0]
    NUMBER: tl.constexpr = STAGES[STAGE][1]
    if KIND == KIND_LINEAR:
        out = ()
        for c in tl.static_range(C):
            b_sum = point[0] * draw[c]
            for k in tl.static_range(1, C):
                b_sum += point[k] * draw[k * C + c]
            out += (b_sum,)
        point = out
    elif KIND == KIND_MIRROR:
        point = (point[0] * draw[0],) + point[1:]  # noqa: RUF005
    elif KIND == KIND_NOISE:
        if draw[0]:
            point = _add_noise(address, point, draw[1], (i_t * (M * V) + draw[2]) * C, NUMBER, C)
    elif KIND == KIND_FRAME_MASK:
        if draw[0]:
            point = _drop(point, chosen(address, USE_FRAMES, 65536 * NUMBER, STAGES[STAGE][2], T, i_t), C)
    else:
        point = _drop(point, draw[0], C)
    return point


@jit()
def _drop(point, m_dropped, C: tl.constexpr):
    out = ()
    for c in tl.static_range(C):
        out += (tl.where(m_dropped, 0.0, point[c]),)
    return out


@jit()
def _add_noise(address, point, std, b_element, NUMBER: tl.constexpr, C: tl.constexpr):
    m_present = present(point, C)
    # pairs begin at even elements: three channels lie in two pairs
    b_even = b_element // 2 * 2
    normal = _normal_pair(address, b_even, NUMBER)
    if C == 3:
        normal = normal + _normal_pair(address, b_even + 2, NUMBER)
    out = ()
    for c in tl.static_range(C):
        b_normal = normal[c]
        if C == 3:
            b_normal = tl.where(b_element == b_even, normal[c], normal[c + 1])
        out += (tl.where(m_present, point[c] + std * b_normal, point[c]),)
    return out


@jit()
def _normal_pair(address, b_even, NUMBER: tl.constexpr):
    word0, word1, word2, word3 = four_words(address, USE_NOISE, (NUMBER << 22) + b_even // 4)
    m_first = b_even % 4 == 0
    b_radius = tl.sqrt(-2.0 * tl.log(1.0 - uniform(tl.where(m_first, word0, word2))))
    b_angle = 6.283185307179586 * uniform(tl.where(m_first, word1, word3))
    return b_radius * tl.cos(b_angle), b_radius * tl.sin(b_angle)
