"""
Exact GP: likelihood, posterior and their gradients against independent implementations.

Run       pytest test_gp.py        (each tolerance has its dtype beside it)
"""

import itertools
import math

import pytest
import torch

import gp as gaussian
from conftest import relative
from gp import CurvatureMean, GaussianProcess, PriorOnly


def known_strategies(n=40, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.rand(n, d, generator=g, dtype=torch.float64) * 0.9
    y = (X**1.3 * (4 * X).exp() * torch.linspace(0.5, 2, d, dtype=torch.float64)).sum(
        1
    ).log() + 0.2 * torch.sin(7 * X[:, 0])
    return X, y


GPS = list(itertools.product(("blocks", "constant"), ("matern52", "rbf")))


@pytest.mark.parametrize("mean,kernel", GPS)
def test_log_likelihood_equals_the_multivariate_normals_and_its_gradient_equals_autograds(
    mean, kernel
):
    gp = GaussianProcess(mean, kernel).fit(*known_strategies())
    theta = (gp.theta + 0.1).requires_grad_()
    scaled = gp.X / theta[:-2].exp()
    r2 = ((scaled[:, None] - scaled) ** 2).sum(-1) + 1e-30 * (1 - torch.eye(len(scaled)))
    r = torch.where(
        r2 > 0, torch.where(r2 > 0, r2, 1).sqrt(), 0
    )  # an autograd reference needs r = 0 guarded twice
    phi = (
        (-r2 / 2).exp()
        if kernel == "rbf"
        else (1 + 5**0.5 * r + 5 / 3 * r2) * (-(5**0.5) * r).exp()
    )
    K = theta[-2].exp() * phi + theta[-1].exp() * torch.eye(len(phi), dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(
        torch.zeros(len(K), dtype=torch.float64), K
    ).log_prob(gp.residual)
    expected.backward()
    expected = expected.detach()
    value, gradient = gp.log_marginal_likelihood(theta.detach())
    assert value == pytest.approx(float(expected), rel=1e-10)  # float64
    assert relative(gradient, theta.grad) < 1e-6  # float64


@pytest.mark.parametrize("mean,kernel", GPS)
def test_posterior_equals_textbook_algebra_and_its_gradients_equal_finite_differences(mean, kernel):
    X, y = known_strategies()
    gp = GaussianProcess(mean, kernel).fit(X[:30], y[:30])
    K, _ = gp.covariance(gp.theta)
    k = (
        gp.theta[-2].exp()
        * gp.correlation(X[30:] / gp.theta[:-2].exp(), gp.X / gp.theta[:-2].exp())[0]
    )
    mu = gp.mean(X[30:]) + gp.mean.scale * k @ torch.linalg.inv(K) @ gp.residual
    var = gp.theta[-2].exp() - (k @ torch.linalg.inv(K) * k).sum(1)
    mean_, std = gp.posterior(X[30:])
    assert (
        relative(mean_, mu) < 1e-8 and relative(std, gp.mean.scale * var.sqrt()) < 1e-6
    )  # float64
    dmean, dstd = gp.posterior_gradient(X[30:])
    x = X[30:].clone().requires_grad_()
    torch.stack(gp.posterior(x)).sum().backward()
    assert torch.equal(x.grad, dmean + dstd)
    h = 1e-5
    for i in range(X.shape[1]):
        e = torch.zeros(X.shape[1], dtype=torch.float64)
        e[i] = h
        plus, minus = gp.posterior(X[30:] + e), gp.posterior(X[30:] - e)
        assert (
            relative(dmean[:, i], (plus[0] - minus[0]) / (2 * h)) < 1e-6
        )  # float64, central differences
        assert relative(dstd[:, i], (plus[1] - minus[1]) / (2 * h)) < 1e-6


@pytest.mark.parametrize("mean,kernel", GPS)
def test_gp_survives_one_strategy_duplicates_constant_values_and_queries_at_training_points(
    mean, kernel
):
    X, y = known_strategies()
    for X, y in (
        (X[:1], y[:1]),
        (X[:1].repeat(8, 1), y[:8]),
        (X, torch.ones(40)),
        (X.repeat(2, 1), y.repeat(2)),
        (X * 0, y),
    ):
        gp = GaussianProcess(mean, kernel).fit(X, y)
        values = [*gp.posterior(X), *gp.posterior_gradient(X)]
        assert all(v.isfinite().all() for v in values)
    for X, y in ((X[:0], y[:0]), (X, y * math.nan), (X, y[:3])):
        with pytest.raises(ValueError):
            GaussianProcess(mean, kernel).fit(X, y)
    with pytest.raises(ValueError):
        GaussianProcess("none")


def known(n=20, d=4):
    g = torch.Generator().manual_seed(0)
    X = torch.rand(n, d, generator=g, dtype=torch.float64) * 0.9
    return X, (X**2).sum(1).log() + 0.1 * torch.randn(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["matern52", "rbf"])
def test_a_covariance_that_has_no_cholesky_factor_gets_the_least_jitter_or_no_likelihood_at_all(
    kernel,
):
    gp, K = GaussianProcess("constant", kernel), torch.ones(6, 6, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(K)[1] > 0  # singular: six times one strategy
    chol = gp.factor(K)
    added = (chol @ chol.T - K).diagonal()
    assert (added > 0).all() and added.max() < 1e-8  # float64: one of the first rungs
    regular = K + torch.eye(6)
    assert torch.equal(
        gp.factor(regular), torch.linalg.cholesky(regular)
    )  # no jitter where none is needed
    for broken in (-torch.eye(3, dtype=torch.float64), K * math.nan, K * math.inf):
        assert gp.factor(broken) is None
    X, y = known()
    gp.fit(X[:1].repeat(6, 1), y[:6])
    theta = gp.theta.clone()
    theta[-1] = -200  # no noise to speak of
    value, gradient = gp.log_marginal_likelihood(theta)
    assert math.isfinite(value) and gradient.isfinite().all()
    theta[-2] = 800  # exp overflows
    value, gradient = gp.log_marginal_likelihood(theta)
    assert value == -math.inf and torch.equal(gradient, torch.zeros(6))


def test_a_fit_goes_on_when_a_step_of_the_line_search_has_no_cholesky_factor(monkeypatch):
    X, y = known()
    undisturbed, factor, calls = GaussianProcess().fit(X, y), GaussianProcess.factor, []

    def sometimes(self, K):
        calls.append(1)
        return None if len(calls) == 4 else factor(self, K)

    monkeypatch.setattr(GaussianProcess, "factor", sometimes)
    gp = GaussianProcess().fit(X, y)
    assert len(calls) > 4 and gp.theta.isfinite().all()
    start = undisturbed.log_marginal_likelihood(
        torch.tensor([0.5 * math.log(4)] * 4 + [math.log(0.02), math.log(1e-3)])
    )[0]
    assert gp.log_marginal_likelihood(gp.theta)[0] > start


@pytest.mark.parametrize("slope,wall", [(0.1, 50), (1, 50), (100, 4)])
def test_minimising_turns_back_where_the_function_is_infinite_and_still_finds_the_minimum(
    slope, wall
):
    beyond = []

    def f(x):  # -slope x - log(wall - x): its minimum is wall - 1 / slope
        if (x >= wall).any():
            beyond.append(x)
            return math.inf, torch.zeros_like(x)
        return float((-slope * x - (wall - x).log()).sum()), 1 / (wall - x) - slope

    x = gaussian.minimise(f, torch.zeros(3, dtype=torch.float64))
    assert beyond and (x - (wall - 1 / slope)).abs().max() < 1e-4  # float64


@pytest.mark.parametrize("mean,kernel", [("blocks", "matern52"), ("constant", "rbf")])
def test_fitted_hyperparameters_and_prior_mean_are_stationary_points_of_their_posteriors(
    mean, kernel
):
    X, y = known(40)
    gp = GaussianProcess(mean, kernel).fit(X, y)
    signal, noise = (0.02, 1e-3) if mean == "blocks" else (1.0, 1e-2)
    centre, width = (
        torch.tensor([math.log(2)] * 4 + [math.log(signal), math.log(noise)]),
        torch.tensor([1.0] * 5 + [1.5]),
    )

    def value(theta):
        return (
            gp.log_marginal_likelihood(theta)[0]
            - float((((theta - centre) / width) ** 2).sum()) / 2
        )

    for e in torch.eye(6, dtype=torch.float64) * 1e-4:
        assert (
            abs(value(gp.theta + e) - value(gp.theta - e)) / 2e-4 < 1e-3
        )  # float64, central differences
    if mean == "blocks":
        m = gp.mean
        p = torch.cat([m.c, m.b, torch.stack([m.a, m.c0])]).requires_grad_()
        c, b, a, c0 = p[:4], p[4:8], p[8], p[9]
        common = (b.sum() / 0.25 + 5 / 4) / (4 / 0.25 + 1 / 4)  # its own optimum, given the b_i
        error = (c + a * (X + gaussian.SHIFT).log() + b * X).logsumexp(1) + c0 - y
        loss = (
            (error**2).sum() / 0.02
            + (c**2).sum()
            + (a - 1) ** 2 / 0.25
            + ((b - common) ** 2).sum() / 0.25
            + (common - 5) ** 2 / 4
        ) / 2
        (gradient,) = torch.autograd.grad(loss, p)
        assert gradient.abs().max() < 1e-3  # float64


def test_where_the_data_leave_no_variance_std_is_its_floor_and_has_no_gradient():
    X, y = known(1)
    gp = GaussianProcess("constant").fit(X, y)
    # the noise taken out of K: the strategy is certain
    gp.K_inv = torch.full((1, 1), 1 / gp.signal, dtype=torch.float64)
    for distance in (0.0, 1e-9):
        mean, std, _, dstd = gp.solve(X + distance)
        assert (
            float(std) == pytest.approx(gp.mean.scale * gp.signal**0.5 * 1e-6, rel=1e-9)
            and (dstd == 0).all()
            and mean.isfinite().all()
        )
    assert (gp.solve(X + 0.1)[3] > 0).all()


def curvature_gp(blocks=3):
    """A GP with a table's mean and features of blocks; strategies X (36, 21) and their y (36,)."""
    g = torch.Generator().manual_seed(0)
    t, q, r = (torch.randn(blocks, 7, generator=g, dtype=torch.float64) for _ in range(3))
    X = torch.rand(36, 7 * blocks, generator=g, dtype=torch.float64) * 0.8
    curves = t - 3, 1.5 + 0.2 * q, 3 + r
    y = CurvatureMean(*curves)(X) + 0.3 * X[:, :7].mean(1) + 0.1 * torch.sin(9 * X[:, 3])
    features = torch.kron(torch.eye(blocks).double(), torch.full((7, 1), 1 / 7).double())
    return GaussianProcess(CurvatureMean(*curves), features=features), X, y


def test_with_a_table_of_curvature_all_gradients_equal_finite_differences():
    gp, X, y = curvature_gp()
    gp.fit(X[:30], y[:30])
    dmean, dstd = gp.posterior_gradient(X[30:])
    h = 1e-5
    for i in range(X.shape[1]):
        e = torch.zeros(X.shape[1], dtype=torch.float64)
        e[i] = h
        plus, minus = gp.posterior(X[30:] + e), gp.posterior(X[30:] - e)
        assert relative(dmean[:, i], (plus[0] - minus[0]) / (2 * h)) < 1e-6  # float64
        # std hardly depends on a matrix alone: absolute, in nats per unit of sparsity
        assert float((dstd[:, i] - (plus[1] - minus[1]) / (2 * h)).abs().max()) < 1e-6
    p = torch.randn(gp.mean.p.shape, generator=torch.Generator().manual_seed(1)).double() * 0.3
    value, gradient = gp.mean.loss(p, X, y)
    slopes = [
        (gp.mean.loss(p + e, X, y)[0] - gp.mean.loss(p - e, X, y)[0]) / (2 * h)
        for e in h * torch.eye(len(p), dtype=torch.float64)
    ]
    assert relative(gradient, torch.tensor(slopes)) < 1e-6  # float64
    assert gp.mean.loss(gp.mean.p, X[:30], y[:30])[0] < value


def test_before_any_measurement_a_table_is_the_logarithm_of_its_sum_and_has_its_gradient():
    gp, X, _ = curvature_gp()
    t, q, r = gp.mean.t, gp.mean.q, gp.mean.r
    damages = (t + q * (X + 1e-3).log() + r * X).exp()
    assert relative(gp.mean(X), damages.sum(1).log()) < 1e-12  # float64
    mean, std, dmean, dstd = PriorOnly(gp.mean).solve(X)
    expected = damages * (q / (X + 1e-3) + r) / damages.sum(1, keepdim=True)
    assert relative(dmean, expected) < 1e-12 and (std == 0).all() and (dstd == 0).all()
