"""Encoding: no sum wraps, nothing infinite leaves, and what the ring holds is decoded to the last bit."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from cohorts import finest_step, turned_away
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfin.errors import PrivacyParameterError, TrainingError
from fedfin.privacy.encoding import Layout, Segment, pack, unpack
from fedfin.privacy.noise import SecureNoise, SimulatedNoise

COUNT = Segment("one", 1, 1.0, 1.0)
BITS = pytest.mark.parametrize("ring_bits", [24, 32])


def layout_of(bound=1.0, *, num_lenders=10, ring_bits=32, size=5, step=None):
    step = finest_step(bound, num_lenders, ring_bits) if step is None else step
    return Layout((Segment("update", size, bound, step),), num_lenders, ring_bits)


def quanta(vector, ring_bits=32):
    """The signed integers that ring elements stand for, worked out from the definition."""
    elements = vector.astype(np.int64) % 2**ring_bits
    return np.where(elements >= 2 ** (ring_bits - 1), elements - 2**ring_bits, elements)


# The ring


@BITS
@settings(max_examples=60, deadline=None)
@given(
    num_lenders=st.integers(1, 1000),
    bound=st.floats(1e-9, 1e9),
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
)
def test_no_sum_wraps_whatever_the_lenders_hold(ring_bits, num_lenders, bound, values):
    layout = layout_of(bound, num_lenders=num_lenders, ring_bits=ring_bits, size=len(values))
    vector = layout.encode({"update": np.array(values)})
    total = vector * np.uint32(num_lenders)  # everybody holds the same, modulo 2**32
    expected = num_lenders * quanta(vector)
    assert np.abs(expected).max() <= 2 ** (ring_bits - 1) - 1
    np.testing.assert_array_equal(layout.decode_integers(total)["update"], expected)


@BITS
@pytest.mark.parametrize("num_lenders", [3, 7, 40, 1000])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_everybody_at_the_bound_gives_the_bound_times_everybody(ring_bits, num_lenders, sign):
    layout = layout_of(2.5, num_lenders=num_lenders, ring_bits=ring_bits)
    vector = layout.encode({"update": np.full(5, sign * 1e300)})
    total = layout.decode(vector * np.uint32(num_lenders))["update"]
    np.testing.assert_allclose(total, sign * 2.5 * num_lenders, rtol=1e-12)


def test_a_layout_that_could_wrap_is_refused():
    most = (2**31 - 1) // 10
    Layout((Segment("counts", 3, float(most), 1.0),), 10)
    with pytest.raises(
        PrivacyParameterError, match=r"'counts'.*does not fit 10 lenders in a ring of 32 bits"
    ):
        Layout((Segment("counts", 3, float(most + 1), 1.0),), 10)
    with pytest.raises(PrivacyParameterError, match="ring of 24 bits"):
        Layout((Segment("counts", 3, float((2**23 - 1) // 10 + 1), 1.0),), 10, 24)


@pytest.mark.parametrize(
    "segment",
    [
        Segment("one", 0, 1.0, 0.5),
        Segment("one", 1, 0.0, 0.5),
        Segment("one", 1, 1.0, 0.0),
        Segment("one", 1, 1.0, 2.0),
        Segment("one", 1, 1.0, -0.5),
        Segment("one", 1, float("inf"), 1.0),
        Segment("one", 1, float("nan"), 1.0),
        Segment("one", 1, 1.0, float("nan")),
        Segment("one", 1, 1e300, 1e-300),
    ],
    ids=repr,
)
def test_a_segment_without_meaning_is_refused(segment):
    with pytest.raises(PrivacyParameterError, match="'one'"):
        Layout((segment,), 5)


@pytest.mark.parametrize(
    ("segments", "num_lenders", "ring_bits"),
    [((), 5, 32), ((COUNT, COUNT), 5, 32), ((COUNT,), 0, 32), ((COUNT,), 5, 16)],
)
def test_a_layout_without_meaning_is_refused(segments, num_lenders, ring_bits):
    with pytest.raises(PrivacyParameterError, match="give at least one segment"):
        Layout(segments, num_lenders, ring_bits)


# Rounding


@BITS
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=8), st.sampled_from([np.float32, np.float64]))
def test_each_value_goes_to_the_nearest_quantum(ring_bits, values, width):
    layout = layout_of(1.5, ring_bits=ring_bits, size=len(values))
    array = np.array(values, dtype=width)
    found = quanta(layout.encode({"update": array}))
    step = Fraction(layout.segments[0].step)
    for value, quantum in zip(array.tolist(), found.tolist(), strict=True):
        clipped = min(max(Fraction(value), Fraction(-1.5)), Fraction(1.5))
        # float64's own error in the product is below 2**-20 of a quantum
        assert abs(clipped / step - quantum) <= Fraction(1, 2) + Fraction(1, 2**20)


def test_float32_is_rounded_from_its_own_value_and_not_from_a_product_in_float32():
    """np.multiply(float32, number, out=float64) computes in float32, which is wrong by up to 2**7 quanta here."""
    values = np.linspace(-1.0, 1.0, 1001, dtype=np.float32)
    layout = layout_of(1.0, num_lenders=3, size=1001)
    np.testing.assert_array_equal(
        layout.encode({"update": values}), layout.encode({"update": values.astype(np.float64)})
    )


def test_counts_are_exact():
    layout = Layout((Segment("good", 3, 1000.0, 1.0), Segment("bad", 2, 50.0, 1.0)), 5)
    vector = layout.encode({"good": np.array([0.0, 999.0, 1000.0]), "bad": np.array([50.0, 51.0])})
    total = layout.decode(vector + vector)
    np.testing.assert_array_equal(total["good"], [0.0, 1998.0, 2000.0])
    np.testing.assert_array_equal(total["bad"], [100.0, 100.0])


@pytest.mark.parametrize("source", [SecureNoise(), SimulatedNoise(3)], ids=["secure", "simulated"])
def test_stochastic_rounding_is_unbiased_and_moves_by_less_than_a_quantum(source):
    num = 200_000
    layout = layout_of(10.0, size=num, step=1.0)
    for value, chance in ((0.25, 0.25), (-3.7, 0.3), (4.0, 0.0)):
        found = quanta(layout.encode({"update": np.full(num, value)}, stochastic=source))
        ups = found - np.floor(value)
        assert set(np.unique(ups)) <= {0.0, 1.0}
        assert abs(ups.mean() - chance) <= 5.4 * np.sqrt(max(chance * (1 - chance), 0.0) / num)


def test_whole_quanta_are_not_moved_whatever_the_chance():
    class Zeros:
        def words(self, num):
            return np.zeros(num, np.uint64)

    layout = layout_of(10.0, step=1.0)
    values = np.array([-10.0, -1.0, 0.0, 4.0, 10.0])
    np.testing.assert_array_equal(quanta(layout.encode({"update": values}, stochastic=Zeros())), values)


def test_stochastic_rounding_never_passes_the_bound():
    layout = layout_of(1.0, size=1000)
    vector = layout.encode({"update": np.full(1000, 5.0)}, stochastic=SecureNoise())
    assert set(quanta(vector)) == {layout.segments[0].largest}


@pytest.mark.parametrize("width", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_never_leaves(value, width):
    values = np.zeros(40_000, dtype=width)
    values[39_999] = value
    with pytest.raises(TrainingError, match="'update' holds a value that is not finite"):
        layout_of(size=40_000).encode({"update": values})


# Whole quanta, as mode shared makes them


def test_integers_are_taken_as_they_are():
    layout = Layout((Segment("sum", 4, float(2**20), 1.0),), 100)
    values = np.array([-(2**20), -1, 0, 2**20])
    vector = layout.encode_integers({"sum": values})
    np.testing.assert_array_equal(layout.decode_integers(vector * np.uint32(100))["sum"], 100 * values)


@pytest.mark.parametrize("value", [2**20 + 1, -(2**20) - 1, 2**62, -(2**63)])
def test_an_integer_that_could_make_the_sum_wrap_never_leaves(value):
    layout = Layout((Segment("sum", 2, float(2**20), 1.0),), 100)
    with pytest.raises(TrainingError, match="'sum' holds an integer beyond 1048576"):
        layout.encode_integers({"sum": np.array([0, value])})


# Segments


def test_segments_lie_one_after_the_other():
    layout = Layout((Segment("update", 4, 1.0, 0.5), Segment("weight", 1, 100.0, 1.0)), 5)
    assert layout.size == 5
    vector = layout.encode({"weight": np.array([7.0]), "update": np.array([[0.5, 1.0], [-0.5, 0.0]])})
    np.testing.assert_array_equal(quanta(vector), [1, 2, -1, 0, 7])
    decoded = layout.decode(vector)
    np.testing.assert_array_equal(decoded["update"], [0.5, 1.0, -0.5, 0.0])
    np.testing.assert_array_equal(decoded["weight"], [7.0])


@pytest.mark.parametrize("parts", [{}, {"update": np.zeros(4)}, {"update": np.zeros(5), "more": np.zeros(1)}])
@pytest.mark.parametrize("encode", [Layout.encode, Layout.encode_integers])
def test_parts_that_are_not_the_layouts_are_refused(encode, parts):
    with pytest.raises(PrivacyParameterError, match="do not fit into the layout"):
        encode(layout_of(size=5), parts)


@pytest.mark.parametrize(
    "total", [np.zeros(4, np.uint32), np.zeros((5, 1), np.uint32), np.zeros(5, np.int64)]
)
def test_a_total_that_is_not_the_layouts_is_refused(total):
    with pytest.raises(PrivacyParameterError, match="not one of 5 ring elements"):
        layout_of(size=5).decode(total)


def test_every_change_of_a_layout_changes_its_digest():
    layouts = [
        layout_of(),
        layout_of(1.0 + 2**-52, step=finest_step(1.0, 10, 32)),
        layout_of(step=0.5),
        layout_of(num_lenders=11, step=finest_step(1.0, 11, 32)),
        layout_of(size=6),
        layout_of(ring_bits=24),
        Layout((Segment("gradient", 5, 1.0, finest_step(1.0, 10, 32)),), 10),
    ]
    assert len({layout.digest() for layout in layouts}) == len(layouts)
    assert layout_of().digest() == layout_of().digest()


# Words on the wire


@BITS
@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_what_is_packed_is_unpacked(ring_bits, values):
    vector = np.array(values, dtype=np.uint32)
    data = pack(vector, ring_bits)
    assert len(data) == len(vector) * ring_bits // 8
    np.testing.assert_array_equal(
        unpack(data, len(vector), ring_bits), np.array(values, np.uint64) % 2**ring_bits
    )


def test_packed_words_are_little_endian():
    vector = np.array([0x01020304, 0xFFFFFFFE], dtype=np.uint32)
    assert pack(vector, 32).hex() == "04030201feffffff"
    assert pack(vector, 24).hex() == "040302feffff"


@BITS
def test_bytes_that_are_not_so_many_words_are_refused(ring_bits):
    for data in (
        b"",
        bytes(ring_bits // 8 * 3 - 1),
        bytes(ring_bits // 8 * 3 + 1),
        bytes(ring_bits // 8 * 4),
    ):
        turned_away("malformed", unpack, data, 3, ring_bits)


@pytest.mark.parametrize("stochastic", [None, SecureNoise()], ids=["nearest", "stochastic"])
def test_encoding_takes_no_memory_beyond_its_result(stochastic):
    layout, values = layout_of(size=2_000_000), np.linspace(-1, 1, 2_000_000)
    tracemalloc.start()
    layout.encode({"update": values}, stochastic)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000 + 4_000_000  # blocks of 65,536 values; the whole in float64 would be 16 MB more
