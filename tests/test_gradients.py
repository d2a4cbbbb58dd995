"""The private step: clipped as written, noisy as promised, and refused where it would give no protection."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn import functional

from fedfin.credit.models import Architecture, build, load_weights, num_parameters
from fedfin.errors import PrivacyParameterError, TrainingError
from fedfin.privacy.bookkeeping import Blocks
from fedfin.privacy.gradients import (
    PerLoanGradients,
    PrivateEngine,
    SlowGradientWarning,
    binary_cross_entropy,
)
from fedfin.privacy.layers import unrecorded_layers
from fedfin.privacy.noise import SecureNoise, SimulatedNoise
from fedfin.privacy.rounding import rounding_share

LOGISTIC = Architecture("logistic", 6)
MLP = Architecture("mlp", 6, (8, 4))
ATTENTION = Architecture("attention", 6, (8,), (2, 3, 1))
ARCHITECTURES = [LOGISTIC, MLP, ATTENTION]
EMPTY = np.empty((0, 6), np.float32), np.empty(0, np.int64)


class NoNoise:
    """Noise of nothing, to see the rest of the step."""

    def normal(self, size, stddev):
        return np.zeros(size)

    def bernoulli(self, num, rate):
        return np.ones(num, dtype=bool)


class LookUp(nn.Module):
    """Each input as the index of a row of its own."""

    def __init__(self, rows, width, **settings):
        super().__init__()
        self.rows = nn.Embedding(rows, width, **settings)

    def forward(self, loans):
        return self.rows((4 * loans.abs()).long() % self.rows.num_embeddings)  # exact in either precision


class Around(nn.Module):
    """Custom code around a layer, which hides it in no way."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, loans):
        return loans + self.layer(loans)


class Twice(nn.Module):
    """One layer used twice in a pass."""

    def __init__(self, layer, after):
        super().__init__()
        self.layer, self.after = layer, after

    def forward(self, loans):
        return self.after(self.layer(torch.relu(self.layer(loans))).flatten(1))


class Subclass(nn.Linear):
    """A Linear layer that may compute something else."""


class OwnParameter(nn.Module):
    """A layer that no closed form knows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, loans):
        return loans * self.scale


def random_module(architecture, seed=0):
    module = build(architecture)
    weights = np.random.default_rng(seed).normal(size=num_parameters(architecture))
    load_weights(module, weights.astype(np.float32))
    return module


def random_batch(num_loans, seed=1, scale=1.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(num_loans, 6))).astype(np.float32), rng.integers(0, 2, num_loans)


def engine(noise, *, module=None, **changed):
    settings = {"noise_multiplier": 3.0, "clipping_bound": 2.0, "expected_batch_size": 4.0} | changed
    return PrivateEngine(random_module(LOGISTIC) if module is None else module, noise=noise, **settings)


def gradients_loan_by_loan(module, loans, labels):
    """The oracle: one backward pass for each loan in float64, shape (n, d)."""
    exact = copy.deepcopy(module).double()
    trained = [parameter for parameter in exact.parameters() if parameter.requires_grad]
    rows = []
    for loan, label in zip(loans.astype(np.float64), labels.astype(np.float64), strict=True):
        logit = exact(torch.from_numpy(loan)[None]).reshape(())
        loss = functional.binary_cross_entropy_with_logits(logit, torch.tensor(label))
        parts = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy())
    return np.array(rows)


def clipped(gradients, clipping_bound):
    """The oracle's clipped sum, and the sum of the clipped norms."""
    norms = np.linalg.norm(gradients, axis=1)
    factors = np.minimum(1.0, clipping_bound / np.maximum(norms, 1e-300))
    return factors @ gradients, float(np.minimum(norms, clipping_bound).sum())


# agreement with a float64 loop


FAMILIES = {
    "logistic": lambda width: [nn.Linear(6, 1)],
    "mlp": lambda width: [nn.Linear(6, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 1)],
    "no bias": lambda width: [
        nn.LayerNorm(6, bias=False),
        nn.Linear(6, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, 4, bias=False),
        nn.Linear(4, 1, bias=False),
    ],
    "residual": lambda width: [Around(nn.Linear(6, 6)), nn.GroupNorm(1, 6), nn.ReLU(), nn.Linear(6, 1)],
    "sequence": lambda width: [
        nn.Unflatten(1, (3, 2)),
        nn.Linear(2, width),
        nn.LayerNorm((3, width)),
        nn.ReLU(),
        nn.Linear(width, 2 * width),
        nn.LayerNorm(2 * width),
        nn.Flatten(1),
        nn.Linear(6 * width, 1),
    ],
    "convolution": lambda width: [
        nn.Unflatten(1, (2, 3)),
        nn.Conv1d(2, 2 * width, 3, padding="same", groups=2),
        nn.GroupNorm(2, 2 * width),
        nn.ReLU(),
        nn.Conv1d(2 * width, width, 2, stride=2, padding=1, dilation=2, bias=False),
        nn.Flatten(1),
        nn.Linear(2 * width, 1),
    ],
    "look up": lambda width: [LookUp(4, width, padding_idx=1), nn.Flatten(1), nn.Linear(6 * width, 1)],
    "look up once": lambda width: [LookUp(4, width), nn.Linear(width, 1), nn.Flatten(1), nn.Linear(6, 1)],
    "twice": lambda width: [Twice(nn.Linear(6, 6), nn.Linear(6, 1))],
    "norm twice": lambda width: [nn.Linear(6, 6), Twice(nn.LayerNorm(6), nn.Linear(6, 1))],
    "look up twice": lambda width: [Twice(LookUp(3, 2), nn.Linear(24, 1))],
    "half frozen": lambda width: [frozen(nn.Linear(6, width), "weight"), nn.ReLU(), nn.Linear(width, 1)],
    "frozen": lambda width: [frozen(nn.Linear(6, width), "weight", "bias"), nn.ReLU(), nn.Linear(width, 1)],
    "only rectifiers": lambda width: [nn.ReLU(), nn.ReLU(), nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 1)],
}


def frozen(layer, *names):
    for name in names:
        layer.get_parameter(name).requires_grad_(False)
    return layer


def flat_loss(logits, labels):
    return functional.softplus(logits.reshape(-1)) - labels.reshape(-1) * logits.reshape(-1)


def column_loss(logits, labels):
    return flat_loss(logits, labels)[:, None]


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from([4, 8, 16]),
    st.integers(0, 2**31),
    st.sampled_from([0, 1, 2, 3, 17, 64]),
    st.sampled_from(["least", "middle", "largest", "none"]),
    st.sampled_from([binary_cross_entropy, flat_loss, column_loss]),
    st.sampled_from([1.0, 1e5]),
)
@settings(max_examples=250, deadline=None)
def test_a_clipped_sum_is_that_of_a_float64_loop_over_the_loans(family, width, seed, num, where, loss, huge):
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        module = nn.Sequential(*FAMILIES[family](width))
    loans, labels = random_batch(num, seed)
    loans[1::3] = 0.0
    if num:
        loans[2::5] *= huge
        # on the wrong side: a huge loan on the right side has a gradient below float32's last digit
        logits = module(torch.from_numpy(loans)).detach().reshape(-1).numpy()
        labels[2::5] = logits[2::5] < 0
    gradients = gradients_loan_by_loan(module, loans, labels)
    norms = np.sort(np.linalg.norm(gradients, axis=1)) if num else np.ones(1)
    # the bound is some loan's own norm, so that this one is just at it
    bound = {"least": norms[0], "middle": norms[len(norms) // 2], "largest": norms[-1], "none": 1e6}[where]
    bound = max(float(bound), 1e-3)
    expected, total = clipped(gradients, bound) if num else (0.0, 1.0)
    found = PerLoanGradients(module, loss).clipped_sum(loans, labels, bound)
    assert np.abs(found - expected).max() <= 1e-6 * total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("clipping_bound", [1e-12, 0.1, 1.0, 100.0])
def test_our_own_models_agree_with_the_loop_too(architecture, clipping_bound):
    module, (loans, labels) = random_module(architecture), random_batch(64)
    found = PerLoanGradients(module).clipped_sum(loans, labels, clipping_bound)
    expected, norms = clipped(gradients_loan_by_loan(module, loans, labels), clipping_bound)
    assert np.abs(found - expected).max() <= 1e-6 * norms


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_too_large_for_one_pass_gives_the_sum_of_its_parts(architecture):
    loans, labels = random_batch(5000)
    per_loan = PerLoanGradients(random_module(architecture))
    parts = [
        per_loan.clipped_sum(loans[rows], labels[rows], 1.0) for rows in np.array_split(np.arange(5000), 7)
    ]
    assert np.abs(per_loan.clipped_sum(loans, labels, 1.0) - sum(parts)).max() <= 1e-6 * 5000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e12, 1e25])
def test_one_loan_moves_the_sum_by_the_bound_at_most_however_huge_its_gradient(architecture, scale):
    loans, labels = random_batch(16)
    loans[0] *= scale
    per_loan = PerLoanGradients(random_module(architecture))
    change = per_loan.clipped_sum(loans, labels, 0.5) - per_loan.clipped_sum(loans[1:], labels[1:], 0.5)
    assert np.linalg.norm(change) <= 0.5 * (1 + rounding_share(16))


def test_a_gradient_whose_square_overflows_float32_is_clipped_and_not_lost():
    module = nn.Linear(6, 1)
    loans, labels = np.full((1, 6), 1e25, np.float32), np.array([0])
    nn.init.constant_(module.weight, 1.0)
    found = PerLoanGradients(module).clipped_sum(loans, labels, 2.0)
    assert np.linalg.norm(found) == pytest.approx(2.0, rel=1e-6)


def test_squares_too_small_for_float32_do_not_pass_the_bound():
    """Output gradients of 1e-25 times activations of 1e25: float32 would see a gradient of zero, and clip nothing."""
    module = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 1))
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(module[1].weight, 1e-25)
    loans, labels = np.full((1, 6), 1e27, np.float32), np.array([0])
    assert np.linalg.norm(PerLoanGradients(module).clipped_sum(loans, labels, 0.5)) <= 0.5 * (
        1 + rounding_share(1)
    )


def test_a_loan_whose_activations_are_nan_hides_no_other_loan():
    """The same, where another loan's activations are NaN, which numpy takes for the largest."""
    module = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        module[0].weight[0, :2] = torch.tensor([3e38, -3e38])
    nn.init.constant_(module[2].weight, 1e-25)
    loans = np.zeros((2, 6), np.float32)
    loans[0, 0], loans[1, :2] = 1e-11, 10.0  # 3e27, and infinity less infinity
    per_loan, labels = PerLoanGradients(module), np.array([0, 0])
    alone = per_loan.clipped_sum(loans[:1], labels[:1], 0.5)
    assert np.linalg.norm(alone) == pytest.approx(0.5)
    assert_allclose(per_loan.clipped_sum(loans, labels, 0.5), alone, rtol=1e-6)


class Difference(nn.Module):
    """What a layer makes of the loan's two halves, the first less `share` times the second, times `size`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, loans):
        halves, size, share = loans[:, :-2].unflatten(1, (2, -1)), loans[:, -2:-1], loans[:, -1:]
        if isinstance(self.layer, nn.Embedding):
            halves = halves[:, :, 0].abs().long() % self.layer.num_embeddings
        one, other = self.layer(halves).unbind(1)
        return ((one - share * other) * size).sum(1, keepdim=True)


@pytest.mark.parametrize("layer", [nn.Linear(64, 64, bias=False), nn.Embedding(4, 4)])
@pytest.mark.parametrize("size", [2.0**20, 2.0**40, 2.0**60, 2.0**80])
def test_terms_that_cancel_within_a_loan_swallow_nothing_of_the_others(layer, size):
    """The loan's own gradient is zero: a huge term less itself. Without it the sum must be the same."""
    module = Difference(copy.deepcopy(layer))
    nn.init.zeros_(module.layer.weight)
    loans = np.zeros((401, 130), np.float32)
    loans[:, :64], loans[:, -2] = 1.1, 10.0  # the others: all at the bound and in one direction
    loans[200] = 1.0
    loans[200, -2:] = size, 1.0
    labels, per_loan = np.ones(401, np.int64), PerLoanGradients(module)
    whole = per_loan.clipped_sum(loans, labels, 1.0)
    rest = per_loan.clipped_sum(np.delete(loans, 200, 0), labels[1:], 1.0)
    assert np.linalg.norm(rest) > 300
    assert np.linalg.norm(whole - rest) <= 1e-3


def test_the_norm_of_a_million_values_does_not_drift():
    block = torch.full((1, 10**6), 0.1)
    exact = 10**6 * float(np.float32(0.1)) ** 2
    assert_allclose(Blocks(((slice(0, 10**6), block),)).squared_norms(), exact, rtol=2e-6)


@pytest.mark.parametrize("num", [64, 256, 2048])
@pytest.mark.parametrize("same", [True, False])
def test_the_larger_noise_covers_what_rounding_adds_to_a_loans_change(num, same):
    """All loans at the bound and in one direction, where a float32 sum is largest and coarsest."""
    rng = np.random.default_rng(0)
    loans, labels = rng.random((num, 6), dtype=np.float32), np.ones(num, np.int64)
    if same:
        loans[:] = loans[0]
    module = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 1))
    per_loan = PerLoanGradients(module)
    whole = per_loan.clipped_sum(loans, labels, 1e-3)
    for left_out in range(0, num, num // 16):
        rest = np.delete(loans, left_out, 0), np.delete(labels, left_out)
        change = np.linalg.norm(whole - per_loan.clipped_sum(*rest, 1e-3))
        assert change <= 1e-3 * (1 + rounding_share(num))


class Reshaped(nn.Module):
    """A convolution over a sequence of one: its gradients are kept for each loan, as LayerNorm's are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(1, 64, 1, bias=False)

    def forward(self, loans):
        return self.layer(loans[:, None]).flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("module", "num"),
    [
        (nn.Sequential(nn.Linear(1, 1, bias=False)), 4096),
        (nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(8, 1, bias=False)), 4096),
        (Reshaped(), 512),
    ],
    ids=["narrow", "two layers", "blocks"],
)
def test_a_batch_built_to_be_rounded_one_way_is_covered_too(module, num):
    """Half of the loans at the bound, then as many of just above half a unit in the last place of their sum.

    With one loan less at the beginning every later addition is rounded in another place: a quarter of a bound in all,
    for 4096 loans, where a float32 sum is made loan after loan.
    """
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    nn.init.zeros_(list(module.parameters())[-1])  # so that the others have no gradient
    loans = np.full((num, 1), 2.0, np.float32)
    loans[num // 2 :] = 1.02 * np.spacing(np.float32(num // 2))
    labels, per_loan = np.zeros(num, np.int64), PerLoanGradients(module)
    bound = float(np.linalg.norm(per_loan.clipped_sum(loans[:1], labels[:1], 1e9)))
    change = per_loan.clipped_sum(loans, labels, bound) - per_loan.clipped_sum(loans[1:], labels[1:], bound)
    assert np.linalg.norm(change) <= bound * (1 + rounding_share())


def test_the_larger_noise_covers_a_whole_pass_where_few_loans_are_expected():
    """A lender of any size may count for as few loans as training.weight_cap says."""
    assert rounding_share(1.0) == rounding_share(4096.0) == pytest.approx(4104 / 2**23)
    assert rounding_share(50_000.0) > rounding_share(4096.0)


def test_a_gradient_within_the_bound_is_not_changed():
    loans, labels = random_batch(8, scale=0.01)
    per_loan = PerLoanGradients(random_module(LOGISTIC))
    assert_array_equal(per_loan.clipped_sum(loans, labels, 10.0), per_loan.clipped_sum(loans, labels, 1e5))


# the module stays the caller's


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_of_a_batch_stays_for_the_next(architecture):
    (loans, labels), per_loan = random_batch(8), PerLoanGradients(random_module(architecture))
    first = per_loan.clipped_sum(loans, labels, 1.0)
    per_loan.clipped_sum(*random_batch(5, seed=9), 1.0)
    assert_array_equal(per_loan.clipped_sum(loans, labels, 1.0), first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loans_weights_gradients_and_layers_are_left_as_they_were(architecture):
    module, (loans, labels) = random_module(architecture), random_batch(8)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    PerLoanGradients(module).clipped_sum(loans, labels, 1.0)
    assert_array_equal(loans, random_batch(8)[0])
    assert all(torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=True))
    assert all((parameter.grad == 7.0).all() for parameter in module.parameters())
    assert not any("forward" in layer.__dict__ for layer in module.modules())


def test_a_sequence_that_begins_with_a_rectifier_does_not_rectify_the_lenders_table():
    loans, labels = random_batch(8)
    PerLoanGradients(nn.Sequential(nn.ReLU(), nn.Linear(6, 1))).clipped_sum(loans, labels, 1.0)
    assert_array_equal(loans, random_batch(8)[0])


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.PReLU()], ids=["recorded", "hooked"])
@pytest.mark.filterwarnings("ignore::fedfin.privacy.gradients.SlowGradientWarning")
def test_a_module_that_overwrites_its_input_does_not_overwrite_the_lenders_table(layer):
    loans = -np.ones((4, 6), np.float32)
    module = nn.Sequential(nn.ReLU(inplace=True), layer, nn.Linear(6, 1))
    PerLoanGradients(module).clipped_sum(loans, np.ones(4, np.int64), 1.0)
    assert_array_equal(loans, -np.ones((4, 6)))


def test_the_sum_follows_the_modules_weights():
    module = random_module(LOGISTIC)
    (loans, labels), per_loan = random_batch(8), PerLoanGradients(module)
    before = per_loan.clipped_sum(loans, labels, 1.0)
    load_weights(module, np.zeros(7, np.float32))
    assert (per_loan.clipped_sum(loans, labels, 1.0) != before).all()


def test_frozen_parameters_are_no_part_of_the_gradient():
    module = nn.Sequential(frozen(nn.Linear(6, 3), "weight"), nn.Linear(3, 1))
    assert PerLoanGradients(module).clipped_sum(*random_batch(4), 1.0).shape == (3 + 4,)


def test_forward_hooks_are_heard():
    module, seen = random_module(MLP), []
    module[0].register_forward_hook(lambda layer, given, output: seen.append(output.shape))
    PerLoanGradients(module).clipped_sum(*random_batch(4), 1.0)
    assert (4, 8) in seen


# the step


def test_an_empty_draw_gives_noise_alone():
    assert_array_equal(PerLoanGradients(random_module(LOGISTIC)).clipped_sum(*EMPTY, 1.0), np.zeros(7))
    gradient = engine(SimulatedNoise(0)).gradient(*EMPTY)
    assert_allclose(gradient, SimulatedNoise(0).normal(7, 6.0 * (1 + rounding_share(4.0))) / 4.0, rtol=1e-14)


@pytest.mark.parametrize("noise", [SimulatedNoise(0), SecureNoise()])
def test_the_noise_of_the_sum_is_the_noise_multiplier_times_the_bound(noise):
    loans, labels = random_batch(20)
    plain = PerLoanGradients(random_module(LOGISTIC)).clipped_sum(loans, labels, 2.0)
    step = engine(noise)
    sums = 4.0 * np.array([step.gradient(loans, labels) for _ in range(300)]) - plain
    assert sums.std() == pytest.approx(6.0, rel=0.1)
    assert np.abs(sums.mean()) < 1.0


def test_the_divisor_is_the_expected_batch_and_not_the_true_one():
    loans, labels = random_batch(20)
    total = PerLoanGradients(random_module(LOGISTIC)).clipped_sum(loans, labels, 2.0)
    assert_allclose(engine(NoNoise(), expected_batch_size=7.5).gradient(loans, labels), total / 7.5)


def test_an_opacus_accountant_hears_every_step_an_empty_draws_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' own imports
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis import rdp
    accountant, step = RDPAccountant(), engine(NoNoise(), noise_multiplier=1.5)
    step.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.25))
    for batch in (random_batch(4), EMPTY, random_batch(9)):
        step.gradient(*batch)
    assert accountant.history == [(1.5, 0.25, 3)]
    assert (step.max_grad_norm, step.expected_batch_size, step.accumulated_iterations) == (2.0, 4.0, 1)
    orders = accountant.DEFAULT_ALPHAS
    curve = rdp.compute_rdp(q=0.25, noise_multiplier=1.5, steps=3, orders=orders)
    expected, _ = rdp.get_privacy_spent(orders=orders, rdp=curve, delta=1e-5)
    assert accountant.get_epsilon(1e-5) == pytest.approx(expected)


# what may not be seen, and what is refused


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loan_that_is_not_finite_is_refused_before_it_spoils_every_parameter(value):
    loans, labels = random_batch(4)
    loans[2, 3] = value
    with pytest.raises(TrainingError, match="check the table"):
        PerLoanGradients(random_module(LOGISTIC)).clipped_sum(loans, labels, 1.0)


def test_a_loan_whose_gradient_overflows_contributes_nothing_and_is_not_told_of():
    """Weights crafted to overflow for chosen loans must not turn their presence into an error."""
    module = random_module(LOGISTIC)
    weights = np.zeros(num_parameters(LOGISTIC), np.float32)
    weights[:2] = 3e38
    load_weights(module, weights)
    loans, labels = random_batch(4)
    loans[:, :2] = 0.0
    per_loan = PerLoanGradients(module)
    quiet = per_loan.clipped_sum(loans, labels, 1.0)
    loans[2, :2] = [1e4, -1e4]  # inf - inf
    loud = per_loan.clipped_sum(loans, labels, 1.0)
    without = per_loan.clipped_sum(np.delete(loans, 2, 0), np.delete(labels, 2), 1.0)
    assert np.isfinite(quiet).all()
    assert_allclose(loud, without, atol=1e-6)


@pytest.mark.parametrize("architecture", [MLP, ATTENTION])
def test_weights_that_overflow_for_all_loans_give_zero(architecture):
    module = build(architecture)
    load_weights(module, np.full(num_parameters(architecture), 3e38, np.float32))
    found = PerLoanGradients(module).clipped_sum(*random_batch(4, scale=1e6), 1.0)
    assert np.linalg.norm(found) <= 4.0


def test_labels_of_another_shape_are_refused():
    loans, labels = random_batch(4)
    with pytest.raises(TrainingError, match=r"give \(n, p\) and \(n,\)"):
        PerLoanGradients(random_module(LOGISTIC)).clipped_sum(loans, labels[:, None], 1.0)


def test_more_than_one_logit_a_loan_is_refused():
    with pytest.raises(TrainingError, match="one each is needed"):
        PerLoanGradients(nn.Linear(6, 2)).clipped_sum(*random_batch(4), 1.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, labels: (logits - labels.reshape(-1)) ** 2,  # (n, 1) against (n,): n times n losses
        functional.mse_loss,  # reduced
    ],
    ids=["broadcast", "reduced"],
)
def test_losses_that_are_not_one_for_each_loan_are_refused(loss):
    with pytest.raises(TrainingError, match=r"shape \(n,\) or \(n, 1\)"):
        PerLoanGradients(random_module(LOGISTIC), loss).clipped_sum(*random_batch(4), 1.0)


def test_opacus_ghost_mode_stops_clipping_at_losses_of_n_by_1_and_the_oracle_sees_it():
    """Why the shape is checked: Opacus 1.6 multiplies (n, 1) losses with (n,) factors, so factors cross loans."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample.utils import get_gsm_class
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    loans, labels = random_batch(32)
    expected, norms = clipped(gradients_loan_by_loan(random_module(LOGISTIC), loans, labels), 0.5)
    errors = {}
    for shape in ((32,), (32, 1)):
        module = random_module(LOGISTIC)
        ghost = get_gsm_class("ghost")(module, loss_reduction="sum", max_grad_norm=0.5)
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(module.parameters(), 0.1),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            expected_batch_size=32,
            loss_reduction="sum",
        )
        criterion = DPLossFastGradientClipping(ghost, optimizer, nn.BCEWithLogitsLoss(reduction="sum"), "sum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits, targets = ghost(torch.from_numpy(loans)), torch.from_numpy(labels).float()
            criterion(logits.reshape(shape), targets.reshape(shape)).backward()
        found = torch.cat([parameter.grad.reshape(-1) for parameter in module.parameters()]).numpy()
        errors[shape] = np.abs(found - expected).max() / norms
    assert errors[32,] <= 1e-6
    assert errors[32, 1] > 1.0


def test_a_loss_that_holds_a_proximal_term_is_refused_by_the_parameters_name():
    module = random_module(LOGISTIC)

    def loss(logits, labels):
        return binary_cross_entropy(logits, labels) + 0.5 * (module[0].weight.double() ** 2).sum()

    with pytest.raises(TrainingError, match=r"parameter 0\.weight acts outside .* training\.proximal"):
        PerLoanGradients(module, loss).clipped_sum(*random_batch(4), 1.0)


def test_a_loss_without_the_logits_is_refused():
    with pytest.raises(TrainingError, match="does not depend on the logits"):
        PerLoanGradients(random_module(LOGISTIC), lambda logits, labels: 2.0 * labels).clipped_sum(
            *random_batch(4), 1.0
        )


def past_its_layer(first):
    class PastItsLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = first, nn.Linear(6, 1)

        def forward(self, loans):
            return self.last(self.first(loans)) + loans @ self.last.weight.t()

    return PastItsLayer()


def test_a_parameter_used_past_its_layer_is_refused_by_name():
    with pytest.raises(TrainingError, match=r"parameter last\.weight acts outside"):
        PerLoanGradients(past_its_layer(nn.Linear(6, 6))).clipped_sum(*random_batch(4), 1.0)


def test_parameters_tied_between_layers_are_refused():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    with pytest.raises(TrainingError, match=r"parameter 1\.weight is also 0\.weight"):
        PerLoanGradients(nn.Sequential(first, second, nn.Linear(6, 1)))


@pytest.mark.parametrize("affine", [True, False])
def test_a_module_that_normalises_over_the_batch_is_refused(affine):
    with pytest.raises(TrainingError, match=r"layer 1 normalises over the batch"):
        PerLoanGradients(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 1)))


class LessTheMean(nn.Module):
    def forward(self, loans):
        return loans - loans.mean(dim=0)


class Drops(nn.Module):
    def forward(self, loans):
        return functional.dropout(loans, 0.5)


class LessTheMeanOfMany(nn.Module):
    """Mixes the loans of larger batches only."""

    def forward(self, loans):
        return loans - loans.mean(dim=0) if len(loans) > 2 else loans


class Reverses(nn.Module):
    """Puts the loans into another order for its layer: each one's parts of the gradient lie in two rows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, loans):
        return self.layer(loans.flip(0)).flip(0)


class Reshapes(nn.Module):
    def forward(self, loans):
        return loans.reshape(-1, 3)


@pytest.mark.parametrize(
    ("layer", "refusal"),
    [
        (LessTheMean(), "depends on the other loans"),
        (LessTheMeanOfMany(), "depends on the other loans"),
        (Reverses(), "depends on the other loans"),
        (Drops(), "draws from torch's generator"),
        (Reshapes(), "first dimension must be the loans"),
    ],
)
def test_code_between_the_layers_that_mixes_loans_or_draws_is_refused_before_it_sees_a_loan(layer, refusal):
    module = nn.Sequential(layer, nn.Linear(3 if isinstance(layer, Reshapes) else 6, 1))
    with pytest.raises(TrainingError, match=refusal):
        PerLoanGradients(module).clipped_sum(*EMPTY, 1.0)


def test_a_model_that_showed_nothing_where_it_overflowed_is_looked_at_again():
    module = nn.Sequential(nn.Linear(6, 4), LessTheMean(), nn.Linear(4, 1))
    for parameter in module.parameters():
        nn.init.constant_(parameter, 3e38)
    per_loan = PerLoanGradients(module)
    assert not per_loan.clipped_sum(*random_batch(4), 1.0).any()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    with pytest.raises(TrainingError, match="depends on the other loans"):
        per_loan.clipped_sum(*random_batch(4), 1.0)


def test_a_loss_that_weighs_loans_by_the_batch_is_refused_for_a_plain_sequence_too():
    def balanced(logits, labels):
        return binary_cross_entropy(logits, labels) * len(labels) / (labels.sum() + 1.0)

    with pytest.raises(TrainingError, match="depends on the other loans"):
        PerLoanGradients(nn.Sequential(nn.Linear(6, 1)), balanced).clipped_sum(*random_batch(4), 1.0)


def test_an_embedding_that_shrinks_the_rows_it_looks_up_is_refused():
    with pytest.raises(TrainingError, match="leave max_norm out"):
        PerLoanGradients(nn.Sequential(LookUp(4, 2, max_norm=0.1), nn.Linear(2, 1)))


def test_dropout_is_refused_and_without_a_chance_it_is_not():
    with pytest.raises(TrainingError, match="set p to 0"):
        PerLoanGradients(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 1)))
    PerLoanGradients(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.0), nn.Linear(4, 1)))


@pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, np.nan])
def test_a_bound_that_clips_nothing_is_refused(bound):
    with pytest.raises(PrivacyParameterError, match=r"privacy\.clipping_bound"):
        PerLoanGradients(random_module(LOGISTIC)).clipped_sum(*random_batch(4), bound)


@pytest.mark.parametrize("name", ["noise_multiplier", "clipping_bound", "expected_batch_size"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_step_without_noise_bound_or_divisor_is_refused(name, value):
    with pytest.raises(PrivacyParameterError, match=name.replace("_", ".")):
        engine(NoNoise(), **{name: value})


# other layers, by Opacus' hooks


def slow(module):
    with pytest.warns(SlowGradientWarning):
        return PerLoanGradients(module)


@pytest.mark.parametrize("clipping_bound", [0.1, 1.0, 100.0])
def test_any_other_layer_gives_the_same_sums_by_opacus_hooks_and_says_so(clipping_bound):
    module = nn.Sequential(nn.Linear(6, 6), OwnParameter(), nn.Linear(6, 1))
    with pytest.warns(SlowGradientWarning, match="OwnParameter come from Opacus' hooks"):
        per_loan = PerLoanGradients(module)
    loans, labels = random_batch(32)
    plain = nn.Sequential(nn.Linear(6, 6), OwnParameter(), nn.Linear(6, 1))
    plain.load_state_dict(module.state_dict())
    expected, norms = clipped(gradients_loan_by_loan(plain, loans, labels), clipping_bound)
    for _ in range(2):  # nothing of a batch stays for the next
        found = per_loan.clipped_sum(loans, labels, clipping_bound)
        assert np.abs(found - expected).max() <= 1e-6 * norms
    assert all(parameter.grad is None for parameter in module.parameters())


def test_hooks_that_do_not_see_the_whole_gradient_are_refused_before_they_see_a_loan():
    per_loan = slow(past_its_layer(OwnParameter()))
    with pytest.raises(TrainingError, match="do not see the whole gradient"):
        per_loan.clipped_sum(*EMPTY, 1.0)


def test_a_proximal_term_in_the_loss_is_refused_with_hooks_too():
    module = nn.Sequential(OwnParameter(), nn.Linear(6, 1))

    def loss(logits, labels):
        return binary_cross_entropy(logits, labels) + 0.5 * (module[1].weight.double() ** 2).sum()

    with pytest.warns(SlowGradientWarning):
        per_loan = PerLoanGradients(module, loss)
    with pytest.raises(TrainingError, match=r"parameter 1\.weight acts outside"):
        per_loan.clipped_sum(*random_batch(4), 1.0)


def test_a_module_is_hooked_once_only():
    module = nn.Sequential(OwnParameter(), nn.Linear(6, 1))
    slow(module)
    with pytest.raises(TrainingError, match="freshly built module"):
        PerLoanGradients(module)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(4, 2, max_norm=1.0),
        nn.Embedding(4, 2, scale_grad_by_freq=True),
        nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        Subclass(6, 6),
    ],
)
def test_a_layer_with_a_twist_is_not_taken_for_the_plain_one(layer):
    assert type(layer).__name__ in unrecorded_layers(nn.Sequential(layer))
