"""
The paper's core: worked by hand (these also teach), by property, and end to end on a known front.
Read this one first.

Run       pytest test_unicuco.py        (each tolerance has its dtype beside it)
"""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import unicuco
from checks import fuzz
from conftest import ROOT, random_net, refuses, relative, seeds, steady
from gp import CurvatureMean, GaussianProcess
from ranks import Pruner
from unicuco import (
    MAX,
    Layout,
    Scale,
    SearchSettings,
    StratNet,
    Trained,
    load_stratnet,
    log_divergence,
    save_stratnet,
    search,
    strategy_for,
)


def test_tchebycheff_worked_by_hand():
    value = unicuco.tchebycheff(torch.tensor([[0.15, 0.45]]), torch.tensor([[0.5, 0.5]]))
    assert float(value) == pytest.approx(
        0.25 + 0.02 * (0.10 + 0.25)
    )  # max(0.5 * 0.20, 0.5 * 0.50) + 0.02 * their sum


def test_hypervolume_equals_counting_cells_and_the_gain_is_its_difference():
    g = torch.Generator().manual_seed(0)
    for n in (1, 3, 9):
        points = torch.randint(0, 13, (n, 2), generator=g).double() / 10
        cells = torch.cartesian_prod(torch.arange(10), torch.arange(10)).double() / 10 + 0.05
        dominated = ((cells[:, None] >= points).all(2)).any(1)
        assert unicuco.hypervolume(points) == pytest.approx(
            float(dominated.double().mean()), abs=1e-12
        )  # float64
        more = torch.rand(20, 2, generator=g, dtype=torch.float64) * 1.2
        gains = [
            unicuco.hypervolume(torch.cat([points, c[None]])) - unicuco.hypervolume(points)
            for c in more
        ]
        assert torch.allclose(
            unicuco.hypervolume_gain(points, more),
            torch.tensor(gains, dtype=torch.float64),
            atol=1e-12,
        )
    assert unicuco.hypervolume(torch.empty(0, 2)) == 0


def test_a_scale_turns_size_and_log_kl_into_objectives_worked_by_hand():
    scale = Scale.of(torch.tensor([-3.0, -1.0, 1.0]))
    assert (scale.lo, scale.hi) == (-3, 1)
    objectives = scale(torch.tensor([0.9, 0.0, 0.45]), torch.tensor([1.0, -3.0, -1.0]))
    assert torch.allclose(objectives, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]))  # float32


def test_the_first_design_has_every_level_of_sparsity_and_stays_in_the_box():
    for blocks in (1, 12, 30):
        design = unicuco.first_design(48, blocks, torch.Generator().manual_seed(0))
        assert design.shape == (48, blocks) and design.min() >= 0 and design.max() <= MAX
    levels = design.mean(1)  # 30 blocks: the scatter of 0.12 falls to 0.02 in their mean
    assert (levels - (0.05 + 0.75 * (torch.arange(48) + 0.5) / 48)).abs().max() < 0.1


def pareto(points):
    """Which of points (n, 2) no other one dominates, by comparing all pairs."""
    no_worse, better = (points[:, None] <= points).all(2), (points[:, None] < points).any(2)
    return ~(no_worse & better).any(0)


def check_front(points):
    """Every Pareto-optimal point is the optimum of a request, every optimum of a request is
    Pareto-optimal.
    """
    points = torch.tensor(sorted(set(points)), dtype=torch.float64) / 40
    best = pareto(points)
    for i in best.nonzero()[:, 0].tolist():
        # the request that makes both weighted terms equal. Another point q is worse in one
        # objective, by at least a step 1/40; it
        # wins only if its gain in the sum, at most 0.02 of the value, is more: not before steps
        # fall below 1.05 / 51 < 1/40
        l1, l2 = 1 / (points[i] - unicuco.IDEAL)
        request = torch.stack([l1, l2]) / (l1 + l2)
        assert int(unicuco.tchebycheff(points, request.expand(len(points), 2)).argmin()) == i
    for l1 in torch.linspace(0.01, 0.99, 99, dtype=torch.float64):
        values = unicuco.tchebycheff(
            points, torch.stack([l1, 1 - l1]).expand(len(points), 2)
        )  # both weights are 0.01 at least
        assert best[values <= values.min() + 1e-9].all()  # float64; a step is worth 5e-6 at least


@steady
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=40))
def test_every_pareto_optimal_point_answers_some_request_and_every_answer_is_pareto_optimal(points):
    check_front(points)


def test_tchebycheff_reaches_all_of_a_concave_front_where_a_weighted_sum_reaches_its_two_ends():
    concave = [(i, round((1600 - i * i) ** 0.5)) for i in range(41)]
    check_front([(i, (40 - i) ** 2 // 40) for i in range(41)])  # convex
    check_front(concave)
    points = torch.tensor(concave, dtype=torch.float64)
    l1 = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None]
    sums = (l1 * points[:, 0] + (1 - l1) * points[:, 1]).argmin(1)
    assert set(sums.tolist()) == {0, 40}


def area(points):
    """Hypervolume by brute force: the cells between all coordinates, each dominated or not."""
    xs, ys = (sorted({1.0, *(p[i] for p in points if p[i] < 1)}) for i in (0, 1))
    return sum(
        (b - a) * (d - c)
        for a, b in zip(xs, xs[1:])
        for c, d in zip(ys, ys[1:])
        if any(p[0] <= a and p[1] <= c for p in points)
    )


plane = st.tuples(
    *[st.integers(-6, 30).map(lambda i: i / 20)] * 2
)  # equal coordinates, and beyond 1


@settings(steady, max_examples=200)
@given(st.lists(plane, max_size=9), plane)
def test_hypervolume_equals_brute_force_and_the_gain_of_a_point_is_the_difference(points, one):
    tensor = torch.tensor(points, dtype=torch.float64).view(-1, 2)
    assert unicuco.hypervolume(tensor) == pytest.approx(area(points), abs=1e-12)  # float64
    gain = unicuco.hypervolume_gain(tensor, torch.tensor([one], dtype=torch.float64))
    assert float(gain) == pytest.approx(area([*points, one]) - area(points), abs=1e-12)
    assert unicuco.hypervolume(tensor.flip(0)) == unicuco.hypervolume(tensor)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_hypervolume_is_within_4_standard_errors_of_a_monte_carlo_estimate(n):
    g = torch.Generator().manual_seed(n)
    points = torch.rand(n, 2, generator=g, dtype=torch.float64) * 1.3 - 0.2
    draws = (
        torch.rand(100_000, 2, generator=g, dtype=torch.float64) * 1.2 - 0.2
    )  # of the box from -0.2 to 1
    hit = torch.zeros(len(draws), dtype=torch.bool)
    for p in points:
        hit |= (draws >= p).all(1)
    share = float(hit.double().mean())
    error = 1.44 * math.sqrt(share * (1 - share) / len(draws))
    assert abs(unicuco.hypervolume(points) - 1.44 * share) <= 4 * error


class Surrogate:
    """Stands in for a GP: mean and std are given functions of the strategies."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def posterior(self, x):
        return self.mean(x), self.std(x)


SCALE = Scale(-6.0, 1.0)


def layout_of(net):
    return Layout(len(net.layers[-1].bias))


def test_scattered_strategies_move_by_the_asked_amount_in_their_logits_and_stay_inside():
    x = torch.full((4000, 5), 0.45, dtype=torch.float64)
    moved = (
        unicuco.scattered(x, Layout(x.shape[1]), torch.Generator().manual_seed(0), by=0.2) / MAX
    ).logit()
    assert moved.mean().abs() < 0.2 * 4 / 20000**0.5 and moved.std() == pytest.approx(
        0.2, rel=4 / 40000**0.5
    )  # 4 standard errors
    edges = torch.tensor([[0.0, MAX, 1e-30]], dtype=torch.float64)
    assert (
        (unicuco.scattered(edges, Layout(edges.shape[1]), torch.Generator(), by=5.0) >= 0)
        & (unicuco.scattered(edges, Layout(edges.shape[1]), torch.Generator(), by=5.0) <= MAX)
    ).all()


@pytest.mark.parametrize(
    "bias", [-50.0, 50.0, 0.0], ids=["all picks below", "all picks above", "one point"]
)
def test_picks_stay_between_and_differ_even_when_stratnet_has_collapsed(bias):
    net = random_net(6)
    for p in net.parameters():
        p.data.zero_()
    net.layers[-1].bias.data.fill_(bias)
    surrogate = Surrogate(lambda x: 3 * x.mean(1) - 4, lambda x: 0.1 + x[:, 0])
    picks = unicuco.select_batch(
        net,
        layout_of(net),
        surrogate,
        SCALE,
        torch.empty(0, 2, dtype=torch.float64),
        5,
        0.5,
        torch.Generator().manual_seed(0),
    )
    assert (
        picks.shape == (5, 6)
        and picks.isfinite().all()
        and ((picks.mean(1) >= 0.15) & (picks.mean(1) <= 0.75)).all()
    )
    if bias:
        assert len({tuple(p.tolist()) for p in picks}) == 5


def test_picks_lie_where_requests_come_from_and_of_equal_means_the_uncertain_one_is_picked():
    net, g = random_net(6, 4.0), lambda: torch.Generator().manual_seed(0)
    nothing = torch.empty(0, 2, dtype=torch.float64)
    surrogate = Surrogate(
        lambda x: 3 * x.mean(1) - 4, lambda x: torch.full((len(x),), 0.1, dtype=torch.float64)
    )
    for between in ((0.15, 0.75), (0.4, 0.5)):
        picks = unicuco.select_batch(
            net, layout_of(net), surrogate, SCALE, nothing, 4, 0.5, g(), between=between
        )
        assert ((picks.mean(1) >= between[0]) & (picks.mean(1) <= between[1])).all()
    flat = Surrogate(
        lambda x: 0 * x.mean(1), lambda x: (x.mean(1) < 0.45).double()
    )  # certain above 0.45, not below
    pick = unicuco.select_batch(
        net, layout_of(net), flat, Scale(-6.0, 0.2), nothing, 1, 0.5, g(), between=(0.44, 0.46)
    )
    assert float(pick.mean()) < 0.45  # its bound 0 - 0.5 gains, the mean alone or + 0.5 would not
    full = torch.tensor(
        [[0.0, 0.0]], dtype=torch.float64
    )  # nothing left to gain: the four least certain
    certain = Surrogate(lambda x: 3 * x.mean(1) - 4, lambda x: x[:, 0])
    picks = unicuco.select_batch(net, layout_of(net), certain, SCALE, full, 4, 0.0, g())
    candidates = net(unicuco.sample_requests(1000, g())).detach()
    candidates = candidates[(candidates.mean(1) >= 0.15) & (candidates.mean(1) <= 0.75)]
    assert torch.equal(picks[:, 0], candidates[:, 0].sort(descending=True).values[:4])


def test_a_batch_of_picks_is_the_one_of_a_greedy_search_by_brute_force():
    net, surrogate = (
        random_net(6, 4.0),
        Surrogate(lambda x: 9 * x[:, 0] + x.mean(1) - 8, lambda x: 0.3 * x[:, 1]),
    )
    measured = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
    candidates = net(unicuco.sample_requests(60, torch.Generator().manual_seed(0))).detach()
    candidates = candidates[(candidates.mean(1) >= 0.15) & (candidates.mean(1) <= 0.75)]
    objectives = SCALE(
        candidates.mean(1),
        surrogate.posterior(candidates)[0] - 0.5 * surrogate.posterior(candidates)[1],
    ).tolist()
    front, expected = measured.tolist(), []
    for _ in range(4):
        expected.append(max(range(len(candidates)), key=lambda i: area([*front, objectives[i]])))
        front.append(objectives[expected[-1]])
    picks = unicuco.select_batch(
        net,
        layout_of(net),
        surrogate,
        SCALE,
        measured,
        4,
        0.5,
        torch.Generator().manual_seed(0),
        candidates=60,
    )
    assert (
        torch.equal(picks, candidates[expected])
        and len(set(expected)) == 4
        and area(front) > area(measured.tolist())
    )


def test_stratnet_learns_to_prefer_what_the_lower_confidence_bound_prefers():
    answers = []
    for kappa in (0.0, 1.0):
        torch.manual_seed(0)
        net = StratNet(2)
        surrogate = Surrogate(
            lambda x: 6 * (x**2).mean(1) - 5, lambda x: 2 * x[:, 0] + 0.1
        )  # block 0 is uncertain
        unicuco.train_stratnet(
            net, layout_of(net), surrogate, SCALE, 150, kappa, torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            answers.append(net(torch.tensor([[0.3, 0.7], [0.5, 0.5]], dtype=torch.float64)))
    blind, bold = answers
    assert (blind[:, 0] - blind[:, 1]).abs().max() < 0.1 and (bold[:, 0] - bold[:, 1]).min() > 0.1


def test_a_model_pruned_to_ruin_counts_as_100_nats():
    assert (
        log_divergence(math.nan)
        == log_divergence(math.inf)
        == log_divergence(-math.inf)
        == log_divergence(1e9)
        == math.log(100)
    )
    assert log_divergence(0.0) == log_divergence(-1e-9) == math.log(1e-6) and log_divergence(
        0.25
    ) == math.log(0.25)


def test_a_scale_of_equal_values_divides_by_no_zero():
    for value in (math.log(1e-6), -0.5, math.log(100)):
        scale = Scale.of(torch.full((5,), value, dtype=torch.float64))
        assert scale.lo == value and scale.hi == value + 1e-3
        assert scale(torch.full((2,), 0.45), torch.tensor([value] * 2)).isfinite().all()


@pytest.mark.parametrize("mean", ["blocks", "constant"])
@pytest.mark.parametrize(
    "kl",
    [
        lambda x: math.nan if x.mean() > 0.4 else float(x.mean()) ** 2,
        lambda x: math.inf,
        lambda x: 0.0,
        lambda x: 0.3,
    ],
    ids=["ruined above 0.4", "always infinite", "always zero", "always 0.3"],
)
def test_a_search_over_broken_or_constant_values_ends_with_finite_strategies(mean, kl, monkeypatch):
    fit = GaussianProcess.fit

    def watched(self, X, y):
        assert X.isfinite().all() and y.isfinite().all()
        return fit(self, X, y)

    select, chosen = unicuco.select_batch, []

    def picked(net, layout, *others):
        picks = select(net, layout, *others)
        levels = layout.level(picks)  # before they are scattered
        assert 0.15 <= levels.min() and levels.max() <= 0.75
        chosen.extend(picks)
        return picks

    monkeypatch.setattr(GaussianProcess, "fit", watched)
    monkeypatch.setattr(unicuco, "select_batch", picked)
    settings = SearchSettings(8, 2, 2, mean, steps=10, final_steps=20)
    result = search(lambda batch: [kl(x) for x in batch], 5, settings)
    net, scale, gp, log = result.net, result.scale, result.gp, result.log
    assert scale.hi > scale.lo and all(math.isfinite(e["predicted"]) for e in log if e["round"])
    for x, e in zip(chosen, [e for e in log if e["round"]], strict=True):
        logged = torch.tensor(e["strategy"], dtype=torch.float64)
        moved = unicuco.to_logits(logged) - unicuco.to_logits(x)
        assert 0 < moved.abs().max() < 5 * 0.2  # scattered, by about 0.2
    x = strategy_for(net, 0.5, lambda x: float(x.mean()))
    assert x.isfinite().all() and all(
        v.isfinite().all() for v in (*gp.posterior(x[None]), *gp.posterior_gradient(x[None]))
    )


def tiny_search(seed=0):
    w = torch.linspace(0.2, 2, 6, dtype=torch.float64)
    settings = SearchSettings(initial=10, rounds=3, batch=2, steps=40, final_steps=80)
    return search(lambda batch: [float((w * x**2).sum()) for x in batch], 6, settings, seed)


def test_a_search_gives_bitwise_equal_results_twice_and_its_predictions_are_kls():
    one, two = tiny_search(), tiny_search()
    assert one.log == two.log and one.scale == two.scale and torch.equal(one.gp.theta, two.gp.theta)
    weights = zip(one.net.state_dict().values(), two.net.state_dict().values())
    assert all(torch.equal(a, b) for a, b in weights)
    assert tiny_search(1).log != one.log
    last = [e for e in one.log if e["round"] == 3]
    assert all(0.5 < e["predicted"] / e["measured"] < 2 for e in last)


def separable(blocks=12):
    """A cheap f2 = sum_i w_i x_i^2, and its Pareto set by Lagrange: x_i = min(MAX, t / w_i)."""
    w = 10 ** torch.linspace(-2, 0, blocks, dtype=torch.float64)
    return (lambda x: (w * x**2).sum(-1)), (lambda t: (t[:, None] / w).clamp(max=unicuco.MAX))


@pytest.mark.slow
def test_algorithm_1_reaches_98_percent_of_a_known_pareto_front_and_random_search_does_not():
    f2, pareto = separable()
    front = pareto(torch.logspace(-4, 0.05, 4000, dtype=torch.float64))
    front = front[(front.mean(1) >= 0.05) & (front.mean(1) <= 0.85)]
    scale = unicuco.Scale.of(f2(front).log())
    volume = lambda x: unicuco.hypervolume(scale(x.mean(1), f2(x).clamp(min=1e-6).log()))
    uniform = torch.linspace(0.05, 0.9, 2000, dtype=torch.float64)[:, None].expand(-1, 12)
    assert volume(uniform) < 0.9 * volume(front)
    result = search(lambda strategies: [float(f2(x)) for x in strategies], 12)
    net, log = result.net, result.log
    l1 = torch.linspace(0, 1, 1000, dtype=torch.float64)
    with torch.no_grad():
        reached = volume(net(torch.stack([l1, 1 - l1], 1)))
    anything = unicuco.first_design(len(log), 12, torch.Generator().manual_seed(0))
    print(
        f"hypervolume: front {volume(front):.4f}, StratNet {reached:.4f}, uniform"
        f" {volume(uniform):.4f}, random {volume(anything):.4f}"
    )
    assert (
        len(log) == 104
        and reached >= 0.98 * volume(front)
        and volume(anything) < 0.98 * volume(front)
    )
    last = [abs(e["predicted"] / e["measured"] - 1) for e in log[-4:]]
    assert np.median(last) < 0.2


def counter(blocks, d_out, d_in):
    """A Pruner that only counts."""
    p = object.__new__(Pruner)
    p.live, p.d_out, p.d_in = (
        [None] * blocks,
        torch.tensor(d_out, dtype=torch.float64),
        torch.tensor(d_in, dtype=torch.float64),
    )
    return p


sevens = st.lists(st.integers(1, 600), min_size=7, max_size=7)


@steady
@given(
    st.integers(1, 8),
    sevens,
    sevens,
    st.floats(-3, 9),
    seeds,
    st.floats(0, MAX) | st.sampled_from([0.0, 0.3, 0.5, MAX]),
    st.booleans(),
)
def test_strategy_for_is_within_one_step_of_the_count_for_any_stratnet_and_any_shape(
    blocks, d_out, d_in, size, seed, sparsity, equal
):
    net = random_net(blocks, 10**size, seed)  # 10^9 saturates every output
    if equal:  # all blocks but the first cross a count together
        d_in = d_in[:1] * 7
        net.layers[-1].weight.data[1:], net.layers[-1].bias.data[1:] = (
            net.layers[-1].weight[-1].clone(),
            0.0,
        )
    pruner = counter(blocks, d_out, d_in)
    x = strategy_for(net, sparsity, pruner.sparsity)
    assert x.min() >= 0 and x.max() <= MAX
    assert (
        abs(pruner.sparsity(x) - pruner.sparsity([sparsity] * blocks))
        <= 0.5 / (blocks * min(d_in)) + 1e-12
    )  # float64: the nearest step


def test_strategy_for_stays_close_to_what_stratnet_itself_says_at_that_sparsity():
    net = load_stratnet(ROOT / "tiny" / "stratnet.safetensors", 12).net
    l1 = torch.linspace(0, 1, 4001, dtype=torch.float64)
    with torch.no_grad():
        curve = net(torch.stack([l1, 1 - l1], 1))
    for sparsity in (0.2, 0.3, 0.5, 0.7):
        own = curve[(curve.mean(1) - sparsity).abs().argmin()]
        x = strategy_for(net, sparsity, lambda x: float(x.mean()))
        assert (x - own).abs().max() < 2e-3 and float(x.mean()) == pytest.approx(sparsity, abs=1e-6)


def stratnet_changes():
    net = dict(StratNet(1).state_dict()) | {
        "X": torch.rand(4, 1).double() * 0.9,
        "y": torch.rand(4).double(),
        "sizes": torch.ones(1).double(),
    }
    about = {"lo": -5.0, "hi": 1.0, "mean": "blocks"}
    deep = {
        n: torch.zeros(10**6, *w.shape[1:], dtype=w.dtype) if n == "layers.4.bias" else w
        for n, w in net.items()
    }
    yield from (
        (net | {"y": net["y"] * math.nan}, about),
        (net | {"layers.0.bias": net["layers.0.bias"] / 0}, about),
        (net | {"X": net["X"][:3].clone()}, about),
        (net | {"X": net["X"] - 1}, about),
        (net | {"X": net["X"].float()}, about),
        (net | {"y": net["y"].to(torch.complex64)}, about),
        (net | {"more": net["y"].clone()}, about),
        (net | {"X": net["X"][:0].clone(), "y": net["y"][:0].clone()}, about),
        (net | {"layers.4.bias": torch.tensor(1.0).double()}, about),
        (deep, about),
        (net | {"sizes": net["sizes"] * 0}, about),
        (net | {"sizes": torch.ones(2).double()}, about),
        (net | {"curves": torch.ones(3, 1, 2).double()}, about),
        (net, about | {"mean": "curvature"}),
    )
    for change in (
        {"lo": 10**400},
        {"lo": math.nan},
        {"hi": -6.0},
        {"hi": None},
        {"mean": "none"},
        {"mean": ["blocks"]},
    ):
        yield net, about | change
    yield from ((net, [1]), (net, {"lo": 1.0}), (net, fuzz.DEEP))


def test_a_stratnet_of_an_earlier_version_is_refused_by_name(tmp_path):
    net = dict(StratNet(3).state_dict())
    earlier = {"X": torch.rand(4, 3).double() * 0.9, "y": torch.rand(4).double()}
    about = json.dumps({"lo": -5.0, "hi": 1.0, "mean": "blocks"})
    save_file(net | earlier, tmp_path / "stratnet.safetensors", {"about": about})
    refuses(load_stratnet, tmp_path / "stratnet.safetensors", 3, match="earlier version")


def test_a_stratnet_that_does_not_fit_together_is_refused_and_nothing_is_allocated_for_its_claims(
    tmp_path,
):
    path = tmp_path / "stratnet.safetensors"
    for tensors, about in stratnet_changes():
        save_file(tensors, path, {"about": json.dumps(about)})
        refuses(load_stratnet, path, 1, match="is no StratNet that can be read")
    save_file({"a": torch.zeros(1)}, path)
    refuses(load_stratnet, path, 1)


def test_a_stratnet_that_cannot_be_written_leaves_no_partial_file_and_one_that_can_is_read_back(
    tmp_path,
):
    curves = torch.rand(3, 2, 7).double()
    layout, X = Layout(2, range(1, 8)), torch.rand(4, 14).double() * 0.9
    about = {"mean": "curvature"}
    made = Trained(StratNet(14), layout, Scale(0, 1), X, torch.rand(4).double(), curves, about)
    (tmp_path / "stratnet.safetensors").mkdir()
    with pytest.raises(OSError):
        save_stratnet(tmp_path / "stratnet.safetensors", made)
    assert os.listdir(tmp_path) == ["stratnet.safetensors"]
    save_stratnet(tmp_path / "other.safetensors", made)
    assert (tmp_path / "other.safetensors").stat().st_mode & 0o777 == 0o644
    read = load_stratnet(tmp_path / "other.safetensors", 2)
    request = torch.tensor([[0.4, 0.6]])
    assert torch.equal(read.net(request), made.net(request)) and torch.equal(read.curves, curves)
    assert relative(read.layout.share, layout.share) < 1e-15 and read.layout.kinds == 7  # float64
    assert relative(read.gp().posterior(X)[0], made.gp().posterior(X)[0]) < 1e-12


# ---------------------------------------------------------------------- layouts, what is known
# before
def test_a_layout_weighs_matrices_by_their_size_worked_by_hand():
    layout = Layout(2, [1, 3])  # two blocks of two matrices, the second three times as large
    assert layout.share.tolist() == [1 / 8, 3 / 8, 1 / 8, 3 / 8]
    x = torch.tensor([[0.8, 0.4, 0.0, 0.2]], dtype=torch.float64)
    assert float(layout.level(x)) == pytest.approx(0.1 + 0.15 + 0 + 0.075)
    # the kernel sees the mean of each block, (0.8 + 3 * 0.4) / 4 and 0.15, and of each kind
    assert torch.allclose(x @ layout.features, torch.tensor([[0.5, 0.15, 0.4, 0.3]]).double())
    moves = layout.noise(1000, torch.Generator().manual_seed(0), 0.2).view(-1, 2, 2)
    assert float(moves.std()) == pytest.approx((0.2**2 + 0.1**2) ** 0.5, rel=0.1)
    assert float((moves[:, 0, 0] * moves[:, 0, 1]).mean()) == pytest.approx(0.04, rel=0.2)
    assert Layout(3).level(x[:, :3]) == pytest.approx(0.4) and Layout(3).features is None


def known_curves(blocks=4):
    """log c = t + 1.3 log(x + SHIFT) + 4 x, levels t far apart; f2 = their sum, exactly."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(blocks, 7, generator=g, dtype=torch.float64) - 5
    return t, torch.full_like(t, 1.3), torch.full_like(t, 4.0)


@pytest.mark.slow
def test_trained_on_exact_curves_alone_stratnet_is_within_3_percent_of_direct_optimisation():
    curves, layout = known_curves(), Layout(4, range(1, 8))
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net, _ = unicuco.trained_on_prior(layout, curves, 3000, generator)
    f2 = CurvatureMean(*curves)
    for sparsity in (0.3, 0.5, 0.7):
        ours = strategy_for(net, sparsity, lambda x: float(layout.level(torch.as_tensor(x))))
        z = unicuco.to_logits(torch.full((1, 28), sparsity).double()).requires_grad_()
        optimizer = torch.optim.Adam([z], lr=0.05)
        for _ in range(600):
            x = MAX * torch.sigmoid(z)
            loss = f2(x).sum() + 1e4 * (layout.level(x) - sparsity).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        best = float(f2((MAX * torch.sigmoid(z)).detach()))
        uniform = float(f2(torch.full((1, 28), sparsity).double()))
        assert float(f2(ours[None])) < best + 0.03 and best < uniform - 0.3  # nats of log KL


@pytest.mark.slow
def test_a_search_that_starts_from_curves_measures_where_they_are_not_enough_and_learns_the_rest():
    t, q, r = known_curves()
    layout = Layout(4, range(1, 8))
    truth = CurvatureMean(t + torch.linspace(-1, 1, 4).double()[:, None], q, r)  # blocks differ
    settings = SearchSettings(20, 3, 4, "curvature", steps=100, final_steps=800)
    measured = lambda batch: [float(truth(x[None]).exp()) for x in batch]
    result = search(measured, layout, settings, 0, (t, q, r))
    levels = [float(layout.level(torch.tensor(e["strategy"]).double())) for e in result.log]
    assert len(levels) == 32 and min(levels) > 0.25
    last = [e for e in result.log if e["round"] == 3]
    assert all(0.9 < e["predicted"] / e["measured"] < 1.1 for e in last)
    blind, _ = unicuco.trained_on_prior(layout, (t, q, r), 800, torch.Generator().manual_seed(0))
    level = lambda x: float(layout.level(torch.as_tensor(x)))
    ours, before = (strategy_for(net, 0.6, level) for net in (result.net, blind))
    assert float(truth(ours[None])) < float(truth(before[None])) - 0.03


def test_progress_is_flat_where_the_last_three_rounds_have_gained_too_little():
    class Known:  # log KL of a strategy is its mean
        def posterior(self, x):
            return x.mean(1), None

    def points(*log_kl):
        return [(i, torch.full((5, 4), y, dtype=torch.float64)) for i, y in enumerate(log_kl)]

    falling, slowing = points(0.9, 0.5, 0.49, 0.48, 0.469), points(0.9, 0.5, 0.495, 0.49, 0.481)
    assert not unicuco.is_flat(falling, Known(), 0.03)  # 0.5 to 0.469: 0.031 in three rounds
    assert unicuco.is_flat(slowing, Known(), 0.03)  # 0.5 to 0.481: 0.019
    assert not unicuco.is_flat(slowing, Known(), None)
    assert not unicuco.is_flat(slowing[1:3], Known(), 0.03)  # too few rounds to tell


def test_a_search_stops_paying_where_nothing_is_left_to_learn_and_only_there():
    layout, measured = Layout(4, range(1, 8)), []
    truth = CurvatureMean(*known_curves())  # exactly what the search starts from

    def f2(batch):
        measured.extend(batch)
        return [float(truth(x[None]).exp()) for x in batch]

    few = SearchSettings(6, 6, 2, steps=20, final_steps=100)
    whole = search(f2, layout, few, 0, known_curves())
    assert len(measured) == 6 + 6 * 2 == whole.progress[-1][0]
    measured.clear()
    stopped = search(f2, layout, dataclasses.replace(few, flat=0.02), 0, known_curves())
    rounds = unicuco.LOOK_BACK + 1
    assert len(measured) == len(stopped.log) == 6 + rounds * 2
    assert [n for n, _ in stopped.progress] == [6, 8, 10, 12, 14]
    for (_, ours), (_, theirs) in zip(stopped.progress[:-1], whole.progress):
        assert torch.equal(ours, theirs)  # the same search, but shorter
    levels = layout.level(stopped.progress[-1][1])
    assert levels.tolist() == pytest.approx(unicuco.SERVED, abs=1e-9)


def test_a_softened_strategy_has_the_same_count_and_its_logits_differ_by_that_much_less():
    x, d_in = 0.9 * torch.rand(12, generator=torch.Generator().manual_seed(2)).double(), 4096

    def counted(strategy):
        return float((strategy * d_in + 1e-6).floor().mean() / d_in)

    assert relative(unicuco.softened(x, 1.0, counted), x) < 1 / d_in
    for contrast in (0.0, 0.5, 0.7):
        soft = unicuco.softened(x, contrast, counted)
        assert abs(counted(soft) - counted(x)) <= 1 / (12 * d_in)
        gaps = [unicuco.to_logits(v).diff() for v in (x, soft)]
        # at most one block is a step of 1 / d_in from where one shift would put it
        assert (gaps[1] - contrast * gaps[0]).abs().median() < 1e-6  # float64
    assert unicuco.softened([0.5] * 12, 0.7, counted).tolist() == pytest.approx(
        [0.5] * 12, abs=1 / d_in
    )


def test_requests_of_a_step_are_random_ones_with_one_in_every_part_of_the_front():
    g = torch.Generator().manual_seed(0)
    batches = torch.stack([unicuco.stratified_requests(16, g) for _ in range(2000)])
    size = batches[..., 0]
    assert torch.equal((size * 16).floor(), torch.arange(16.0).double().expand_as(size))
    assert relative(batches.sum(-1), torch.ones_like(size)) < 1e-15  # float64
    places = (
        torch.cat([size.flatten(), torch.tensor([0.0, 1.0])]).sort().values
    )  # uniform on [0, 1]
    assert (places - torch.linspace(0, 1, len(places)).double()).abs().max() < 0.005
    random = torch.stack([unicuco.sample_requests(16, g) for _ in range(2000)])
    # of a mean over a batch: by hand 1 / (12 16) and 1 / (12 16^3)
    assert float(random[..., 0].mean(1).var() * 12 * 16) == pytest.approx(1, rel=0.1)
    assert float(size.mean(1).var() * 12 * 16**3) == pytest.approx(1, rel=0.1)


def test_a_step_of_training_is_clipped_to_a_gradient_of_length_1():
    """Against Adam written out for one parameter after another, over two steps of unequal size."""
    layout, scale = Layout(3), Scale(-5.0, -4.9)  # a narrow scale: large gradients
    gp = gp_of_sum(3)
    ours, other = random_net(3, seed=4), random_net(3, seed=4)
    unicuco.train_stratnet(ours, layout, gp, scale, 3, 0.5, torch.Generator().manual_seed(1))
    g, lengths = torch.Generator().manual_seed(1), []
    first, second = ([torch.zeros_like(p) for p in other.parameters()] for _ in range(2))
    for step in range(1, 4):
        requests = unicuco.stratified_requests(16, g)
        mean, std = gp.posterior(other(requests))
        level = layout.level(other(requests))
        loss = unicuco.tchebycheff(scale(level, mean - 0.5 * std), requests).mean()
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        length = torch.stack([(v**2).sum() for v in gradients]).sum().sqrt()
        lengths.append(float(length))
        rate = 4e-3 * (1 + math.cos(math.pi * (step - 1) / 3)) / 2
        for p, v, m, s in zip(other.parameters(), gradients, first, second):
            v = v / max(1.0, float(length))
            m.mul_(0.9).add_(0.1 * v)
            s.mul_(0.999).add_(0.001 * v**2)
            step_size = rate / (1 - 0.9**step)
            p.data -= step_size * m / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
    assert max(lengths) > 2
    for p, q in zip(ours.parameters(), other.parameters()):
        assert relative(p.data, q.data) < 1e-6  # float64


def gp_of_sum(blocks):
    """A Gaussian process of the sum of a strategy's sparsities."""
    X = unicuco.first_design(12, blocks, torch.Generator().manual_seed(0))
    return GaussianProcess("constant").fit(X, X.sum(1))


@pytest.mark.parametrize("change", ["rows", "weights"])
def test_a_stratnet_file_that_would_take_minutes_or_compute_nan_is_refused_at_once(
    tmp_path, change
):
    path, net = tmp_path / "stratnet.safetensors", random_net(3)
    X = torch.full((1001 if change == "rows" else 3, 3), 0.5, dtype=torch.float64)
    if change == "weights":
        for p in net.parameters():
            p.data *= 1e300
    scale, about = Scale(-5.0, 1.0), {"mean": "blocks"}
    made = Trained(net, Layout(3), scale, X, X[:, 0].log(), None, about)
    save_stratnet(path, made)
    reason = "do not fit together" if change == "rows" else "NaN or infinity"
    refuses(load_stratnet, path, 3, match=reason)


def test_the_curves_of_the_embedded_model_rise_everywhere_also_as_corrected_by_its_measurements():
    made = load_stratnet(ROOT / "tiny" / "stratnet.safetensors", 12)
    generator = torch.Generator().manual_seed(0)
    x = unicuco.MAX * torch.rand(500, 84, generator=generator, dtype=torch.float64)
    gp = unicuco.surrogate(made.layout, tuple(made.curves))
    assert (gp.mean.gradient(x) > 0).all()  # as read from the dense model
    gp.fit(made.X, made.y)
    assert (gp.mean.gradient(x) > 0).all()
