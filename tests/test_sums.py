"""What the lenders add up: layouts that hold every honest value, sums that mean what plain ones mean, blurred sizes."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from fedfin.errors import TrainingError
from fedfin.plan import JobPlan, TrainingPlan
from fedfin.privacy.shared_accounting import calibrate_shared, shared_sums
from fedfin.privacy.shares import RING_LIMIT
from fedfin.strategies.strategy import lender_weight
from fedfin.strategies.sums import (
    bins_layout,
    bins_scheme,
    blurred_weight,
    capped_histogram,
    check_round,
    cohort_sum,
    counts_layout,
    largest_move,
    largest_weight,
    round_layout,
    round_parts,
    round_scheme,
    shares_layout,
)

SALT = b"a secret of one lender, long kept"
PLAN = JobPlan()


def plan_with(**training):
    return JobPlan.model_validate({"training": training})


def summed(layout, vectors):
    """Encode each lender's parts, add them in the ring, and decode."""
    with np.errstate(over="ignore"):
        total = np.sum([layout.encode(parts) for parts in vectors], axis=0, dtype=np.uint32)
    return layout.decode(total)


@given(
    st.sampled_from(["size", "sqrt", "equal"]),
    st.lists(st.integers(1, 5000), min_size=3, max_size=30),
    st.integers(0, 2**32 - 1),
)
def test_a_rounds_decoded_sum_is_the_weighted_sum_of_the_updates(weighting, sizes, seed):
    plan = plan_with(weighting=weighting)
    rng = np.random.default_rng(seed)
    reach = largest_move(plan.training)
    updates = [rng.uniform(-reach, reach, 5).astype(np.float32) for _ in sizes]
    weights = [lender_weight(size, plan.training) for size in sizes]
    layout = round_layout(plan, 5, len(sizes))
    vectors = [round_parts(u, w, plan.training) for u, w in zip(updates, weights, strict=True)]
    parts = summed(layout, vectors)
    check_round(parts, len(sizes), plan.training, layout)
    total = cohort_sum(parts, len(sizes))
    half_a_step = layout.segments[0].step / 2 * len(sizes)
    wanted = np.sum([w * u.astype(np.float64) for u, w in zip(updates, weights, strict=True)], axis=0)
    assert np.abs(total.values - wanted).max() <= half_a_step
    assert total.weight == pytest.approx(sum(weights), rel=1e-4 if weighting == "sqrt" else 0.0)
    assert total.num_lenders == len(sizes)


@pytest.mark.parametrize(
    ("weighting", "at"), [("size", 1), ("size", -1), ("sqrt", 1), ("sqrt", -1), ("equal", 1)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_lenders_ring_elements_bring_no_sum_beyond_what_the_cohort_could_reach(weighting, at, sign):
    plan = plan_with(weighting=weighting)
    layout = round_layout(plan, 3, 6)
    weight = lender_weight(400, plan.training)
    vector = layout.encode(round_parts(np.full(3, 0.01, np.float32), weight, plan.training))
    check_round(layout.decode(6 * vector), 6, plan.training, layout)
    # the update beyond what all six reach; the weight, over which the mean is, beyond the largest or below zero
    forged = vector.copy()
    reach = 7 * weight * largest_move(plan.training) if at == 1 else 7 * largest_weight(plan.training)
    forged[at] = np.uint32(sign * round(reach / layout.segments[0 if at == 1 else 1].step) % 2**32)
    with pytest.raises(TrainingError, match="no lenders' answers add up to it, the round is void"):
        check_round(layout.decode(5 * vector + forged), 6, plan.training, layout)


def test_rounding_moves_the_mean_by_less_than_a_five_hundredth_of_a_local_step():
    for weighting in ("size", "sqrt", "equal"):
        for num_lenders in (3, 10, 1000):
            plan = plan_with(weighting=weighting)
            step = round_layout(plan, 5, num_lenders).segments[0].step
            smallest = lender_weight(1, plan.training)
            assert step / 2 / smallest <= plan.training.learning_rate / 500


def test_where_all_count_alike_no_weight_travels():
    names = {weighting: [part.name for part in round_layout(plan_with(weighting=weighting), 4, 5).segments]
             for weighting in ("size", "equal")}  # fmt: skip
    assert names == {"size": ["update", "weight"], "equal": ["update"]}


def test_words_of_three_bytes_are_taken_where_they_are_fine_enough():
    assert [round_layout(PLAN, 4, n).ring_bits for n in (3, 10, 100)] == [24, 24, 32]
    assert [bins_layout(PLAN, 4, n, 60.0).ring_bits for n in (3, 10, 100, 1000)] == [24, 24, 24, 32]


@given(st.integers(3, 1000), st.integers(1, 10_000), st.floats(1e-6, 10.0), st.integers(1, 10_000_000))
def test_every_plan_has_a_layout(num_lenders, local_steps, learning_rate, weight_cap):
    plan = plan_with(local_steps=local_steps, learning_rate=learning_rate, weight_cap=weight_cap)
    for layout in (round_layout(plan, 3, num_lenders), bins_layout(plan, 3, num_lenders, 1e4)):
        assert all(math.frexp(part.step)[0] == 0.5 for part in layout.segments)


def test_a_layout_says_nothing_that_both_sides_do_not_know_before_the_round():
    assert round_layout(PLAN, 7, 5) == round_layout(JobPlan.model_validate_json(PLAN.model_dump_json()), 7, 5)


def test_whole_counts_stay_exact():
    layout = counts_layout(3, 5)
    counts = np.array([0.0, 17.0, 4e8])
    assert_array_equal(summed(layout, [{"counts": counts}] * 5)["counts"], 5 * counts)


def test_a_histogram_below_the_cap_stays_exact_and_one_above_is_scaled_down_to_it():
    counts = np.array([10.0, 20.0, 5.0, 25.0])
    assert_array_equal(capped_histogram(counts, (2, 2), 100), counts)
    assert_allclose(capped_histogram(counts, (2, 2), 15), counts / 2)
    layout = bins_layout(PLAN, 4, 3)
    assert_array_equal(summed(layout, [{"counts": counts}] * 3)["counts"], 3 * counts)


# Mode shared


def shared_plan(**privacy):
    return JobPlan.model_validate(
        {"privacy": {"mode": "shared", **privacy}, "training": {"local_steps": 1, "rounds": 5}}
    )


def schemes(plan, num_members, num_lenders):
    sums = shared_sums(plan, num_lenders=num_members, num_cells=40, num_features=4, num_parameters=30)
    noise = calibrate_shared(plan.privacy, sums, sample_rate=1.0, num_rounds=5)
    return noise, (bins_scheme(noise, sums, num_lenders), round_scheme(noise, sums, 25, num_lenders))


def test_a_smaller_cohort_adds_larger_shares_so_that_the_sum_has_the_same_noise():
    noise, all_of_them = schemes(shared_plan(), 8, 8)
    _, fewer = schemes(shared_plan(), 8, 5)
    for wanted, scheme, smaller in zip(
        (noise.bins_noise_multiplier, noise.training_noise_multiplier), all_of_them, fewer, strict=True
    ):
        assert scheme.noise_multiplier == pytest.approx(wanted, rel=1e-5)
        assert smaller.noise_multiplier == pytest.approx(wanted, rel=1e-5)
        assert (scheme.cohort.num_lenders, smaller.cohort.num_lenders) == (8, 5)


def test_noised_integers_travel_as_they_are_and_cannot_wrap():
    _, (_, scheme) = schemes(shared_plan(planned_dropouts=1), 6, 6)
    layout = shares_layout(scheme)
    assert (layout.size, layout.ring_bits, layout.num_lenders) == (25, 32, 6)
    assert 6 * layout.segments[0].largest <= RING_LIMIT
    vectors = np.full((6, 25), scheme.largest_answer, dtype=np.int64)
    total = np.sum([layout.encode_integers({"noised": one}) for one in vectors], axis=0, dtype=np.uint32)
    assert_array_equal(layout.decode_integers(total)["noised"], vectors.sum(axis=0))


# Blurred weights


def test_a_blurred_weight_is_the_same_for_the_same_lender_and_bucket():
    training = TrainingPlan()
    seen = {blurred_weight(size, training, SALT, 50) for size in range(500, 550)}
    assert len(seen) == 1
    assert seen == {blurred_weight(500, training, SALT, 50) for _ in range(5)}


def test_plans_with_other_buckets_show_other_roundings_of_one_blurred_size():
    for k in range(50):
        salt = SALT + bytes([k])
        one = blurred_weight(1234, TrainingPlan(weight_bucket=10), salt, 10)
        for bucket in (50, 60, 70, 90):
            assert (
                blurred_weight(1234, TrainingPlan(weight_bucket=bucket), salt, 10) == one // bucket * bucket
            )


def test_two_lenders_of_one_size_are_blurred_apart():
    training = TrainingPlan()
    assert len({blurred_weight(1000, training, SALT + bytes([k]), 50) for k in range(50)}) >= 3


def test_the_blur_is_two_sided_geometric_in_buckets():
    training = TrainingPlan(weight_cap=100_000)
    count = 4000
    off = Counter(
        round(blurred_weight(50_000, training, SALT + k.to_bytes(4, "big"), 50) - 50_000) // 50
        for k in range(count)
    )
    ratio = math.exp(-1.0)
    for k in range(-3, 4):
        chance = (1 - ratio) / (1 + ratio) * ratio ** abs(k)
        # five standard deviations: a wrong law is further off, a right one not once in a million runs
        assert abs(off[k] - count * chance) < 5 * math.sqrt(count * chance)


@given(
    st.integers(1, 20_000),
    st.binary(min_size=16, max_size=32),
    st.sampled_from(["size", "sqrt", "equal"]),
    st.integers(1, 50),
)
def test_a_blurred_weight_stays_between_one_bucket_and_the_cap(num_loans, salt, weighting, bucket):
    training = TrainingPlan(weighting=weighting)
    weight = blurred_weight(num_loans, training, salt, bucket)
    assert lender_weight(1, training) <= weight <= largest_weight(training)


@pytest.mark.parametrize(("num_loans", "salt"), [(0, SALT), (10, b"short")])
def test_without_loans_or_a_secret_there_is_no_blurred_weight(num_loans, salt):
    with pytest.raises(TrainingError, match="leave it out of the round, or mend its folder"):
        blurred_weight(num_loans, TrainingPlan(), salt, 50)
