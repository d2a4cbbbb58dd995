"""The coordinate-wise median: few lenders that send nonsense move no coordinate past their honest neighbours."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from fedfin.errors import TrainingError
from fedfin.strategies.median import median
from fedfin.strategies.strategy import ModelState

STATE = ModelState(np.array([1.0, -1.0, 0.0], np.float32), 4)


def updates(*rows):
    return [np.array(row, dtype=np.float32) for row in rows]


def test_each_coordinate_moves_by_the_median_of_the_updates():
    after = median(STATE, updates((1, 0, 3), (2, -1, 2), (9, 5, -7)))
    assert_array_equal(after.weights, [3.0, -1.0, 2.0])
    assert after.round == 5


@given(
    st.lists(st.integers(-100, 100), min_size=3, max_size=9), st.sampled_from([-1e30, -1e3, 1e30]), st.data()
)
def test_fewer_than_half_cannot_move_a_coordinate_past_the_honest(honest, nonsense, data):
    liars = data.draw(st.integers(0, len(honest) - 1))
    sent = updates(*[(value,) * 3 for value in [*honest, *[nonsense] * liars]])
    moved = median(ModelState(np.zeros(3, np.float32), 0), sent).weights
    assert min(honest) <= moved[0] <= max(honest)


def test_neither_argument_is_changed():
    sent = updates((1, 2, 3))
    median(STATE, sent)
    assert_array_equal(STATE.weights, [1.0, -1.0, 0.0])
    assert_array_equal(sent[0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("sent", [updates((1, 2)), updates((1, np.nan, 2)), updates((1, 2, np.inf))])
def test_an_update_of_another_model_or_not_finite_is_refused(sent):
    with pytest.raises(TrainingError, match="compare the fingerprints"):
        median(STATE, sent)


def test_no_update_is_refused():
    with pytest.raises(TrainingError, match="run it again with a quorum"):
        median(STATE, [])
