"""Noise is Gaussian, fresh and secret in production; repeatable and refused there in simulation."""

import copy
import math
import os
import pickle

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import stats

from fedfin.errors import PrivacyParameterError
from fedfin.privacy.noise import SecureNoise, SimulatedNoise, require_production

SOURCES = [SecureNoise, lambda: SimulatedNoise(7)]
NUM = 200_000


@pytest.fixture(params=SOURCES, ids=["secure", "simulated"])
def source(request):
    return request.param()


def test_noise_is_gaussian_with_the_stated_stddev(source):
    noise = source.normal(NUM, 3.0)
    assert stats.kstest(noise, "norm", args=(0.0, 3.0)).pvalue > 1e-6
    # six standard errors of the sample variance
    assert noise.var() == pytest.approx(9.0, rel=6 * math.sqrt(2 / NUM))
    assert stats.kurtosis(noise) == pytest.approx(0.0, abs=6 * math.sqrt(24 / NUM))


def test_neighbouring_samples_are_uncorrelated(source):
    noise = source.normal(NUM, 1.0)
    # samples 2048 apart share their angles, and 4096 is the block: nothing repeats from one to the next
    for lag in (1, 2, 3, 4, 2048, 4096):
        assert abs(np.mean(noise[:-lag] * noise[lag:])) < 6 / math.sqrt(NUM)
        assert abs(np.mean((noise[:-lag] ** 2 - 1) * (noise[lag:] ** 2 - 1))) < 6 * 2 / math.sqrt(NUM)


def test_two_samples_of_the_same_angles_are_independent_gaussians():
    """Cosines make one, sines the other: their angle is uniform, whatever their size."""
    noise = SecureNoise().normal(2 * 2048 * 50, 1.0).reshape(50, 2, 2048)
    of_cosines, of_sines = noise[:, 0].ravel(), noise[:, 1].ravel()
    angles = np.arctan2(of_sines, of_cosines) / (2 * np.pi) + 0.5
    squares = of_cosines**2 + of_sines**2
    assert stats.kstest(angles, "uniform").pvalue > 1e-6
    assert stats.kstest(squares / 2, "expon").pvalue > 1e-6
    large = squares > np.median(squares)
    assert stats.ks_2samp(angles[large], angles[~large]).pvalue > 1e-6


@pytest.mark.parametrize("num", [1, 2, 3, 4095, 4096, 4097, 8193])
def test_every_length_is_filled_and_nothing_in_it_repeats(num):
    noise = SecureNoise().normal(num, 1.0)
    assert noise.shape == (num,)
    assert len(np.unique(noise)) == num


@pytest.mark.parametrize(
    ("size", "shape"), [(5, (5,)), ((2, 3), (2, 3)), (0, (0,)), ((4, 0), (4, 0)), ((), ())]
)
def test_noise_has_the_asked_shape(source, size, shape):
    noise = source.normal(size, 1.0)
    assert noise.shape == shape
    assert noise.dtype == np.float64


def test_no_stddev_means_no_noise(source):
    assert_array_equal(source.normal(3, 0.0), np.zeros(3))


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.99])
def test_each_record_is_in_a_batch_at_the_rate(source, rate):
    batch = source.bernoulli(NUM, rate)
    assert batch.shape == (NUM,)
    assert batch.dtype == np.bool_
    assert stats.binomtest(int(batch.sum()), NUM, rate).pvalue > 1e-6


def test_rate_one_takes_every_record(source):
    assert source.bernoulli(1000, 1.0).all()
    assert source.bernoulli(0, 1.0).shape == (0,)


@pytest.mark.parametrize("stddev", [-1.0, math.nan, math.inf])
def test_a_stddev_without_meaning_is_refused(source, stddev):
    with pytest.raises(PrivacyParameterError, match="finite and at least 0"):
        source.normal(3, stddev)


def test_noise_that_overflows_is_refused(source):
    with np.errstate(over="ignore"), pytest.raises(PrivacyParameterError, match="clipping_bound"):
        source.normal(1000, 1.7e308)


@pytest.mark.parametrize("size", [-1, (2, -1)])
def test_a_negative_size_is_refused(source, size):
    with pytest.raises(PrivacyParameterError, match="at least 0"):
        source.normal(size, 1.0)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_a_rate_without_meaning_is_refused(source, rate):
    with pytest.raises(PrivacyParameterError, match="sample_rate"):
        source.bernoulli(3, rate)


def test_two_secure_sources_and_two_calls_never_agree():
    first, second = SecureNoise(), SecureNoise()
    draws = [first.normal(8, 1.0), first.normal(8, 1.0), second.normal(8, 1.0)]
    assert len({draw.tobytes() for draw in draws}) == 3
    batches = [first.bernoulli(256, 0.5), first.bernoulli(256, 0.5), second.bernoulli(256, 0.5)]
    assert len({batch.tobytes() for batch in batches}) == 3


def test_numpy_seeds_do_not_reach_secure_noise():
    draws = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002, TID251  the global seed is what must not matter
        draws.append(SecureNoise().normal(4, 1.0).tobytes())
    assert draws[0] != draws[1]


def test_a_seed_cannot_be_passed():
    with pytest.raises(TypeError):
        SecureNoise(7)


@pytest.mark.parametrize("same_number", [False, True])
def test_a_forked_child_draws_other_noise_than_its_parent(monkeypatch, same_number):
    """Also one that has the parent's process number, as in a namespace of its own."""
    if same_number:
        monkeypatch.setattr(os, "getpid", lambda: 1)
    noise = SecureNoise()
    noise.normal(1, 1.0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, noise.normal(16, 1.0).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 128) != noise.normal(16, 1.0).tobytes()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_secure_noise_cannot_be_copied(duplicate):
    with pytest.raises(TypeError, match="repeat its noise"):
        duplicate(SecureNoise())


def test_repr_shows_nothing():
    assert repr(SecureNoise()) == "SecureNoise()"
    assert repr(SimulatedNoise(7)) == "SimulatedNoise()"
    assert not hasattr(SecureNoise(), "__dict__")


def test_simulated_noise_repeats_with_its_seed():
    first, same, other = SimulatedNoise(7), SimulatedNoise(7), SimulatedNoise(8)
    expected = first.normal((3, 2), 2.0)
    assert_array_equal(same.normal((3, 2), 2.0), expected)
    assert_array_equal(same.bernoulli(64, 0.5), first.bernoulli(64, 0.5))
    assert not np.array_equal(other.normal((3, 2), 2.0), expected)


def test_production_takes_secure_noise_only():
    secure = SecureNoise()
    assert require_production(secure) is secure
    with pytest.raises(PrivacyParameterError, match=r"SimulatedNoise.*pass SecureNoise\(\)"):
        require_production(SimulatedNoise(7))
