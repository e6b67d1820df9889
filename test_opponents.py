"""
The comparison itself: on a toy whose best allocation is known, every method reaches what it should.

Reading   beside test_compare.py. `reached` is 0 for uniform pruning and 1 on the toy's front.
Run       pytest test_opponents.py                         (15 s on one core)
          pytest -m "slow or not slow" test_opponents.py   (25 s; UniCuCo's own search too)
"""

import pytest
import torch

import baselines
import unicuco
from baselines import Target, uniform
from unicuco import MAX, SearchSettings, search, strategy_for

TOY = unicuco.Toy()  # f2(x) = sum_i w_i x_i^1.2 exp(4 x_i), separable and convex
BLOCKS = len(TOY.w)
ASKED = (0.45, 0.675)  # 48 and 72 of the 96 steps of 1/8 of MAX that the blocks can take


class Part:
    """The toy's f2, as if it were read from 1 / share of the tokens: without noise."""

    def __init__(self, share=1):
        self.share = share

    def __call__(self, x):
        return float(TOY.f2(x))


def mean(x):
    return float(torch.as_tensor(x).mean())


def target(sparsity):
    return Target(sparsity, BLOCKS, mean)


def best_of(w, sparsity):
    """The strategy of lowest f2 over blocks of weights w, of that mean: the front of the toy."""
    toy = unicuco.Toy()
    toy.w = w
    front = toy.front(torch.logspace(-4, 2, 20000, dtype=torch.float64))
    return front[(front.mean(1) - sparsity).abs().argmin()]


def reached(x, sparsity, best=None):
    """The share of what `best`, by default the front, gains over uniform that x gains, at the same
    mean to 1e-4."""
    assert mean(x) == pytest.approx(sparsity, abs=1e-4) and 0 <= x.min() and x.max() <= MAX
    base = float(TOY.f2(uniform(BLOCKS, sparsity)))
    best = best_of(TOY.w, sparsity) if best is None else best
    return (base - float(TOY.f2(x))) / (base - float(TOY.f2(best)))


@pytest.mark.parametrize("sparsity", ASKED)
def test_uniform_reaches_nothing_and_the_front_all(sparsity):
    assert reached(target(sparsity).uniform(), sparsity) == pytest.approx(0, abs=1e-9)  # float64
    best = best_of(TOY.w, sparsity)
    assert reached(target(sparsity).met_by(best), sparsity) == pytest.approx(1, abs=1e-3)
    # of random strategies of that count none is below the front
    g = torch.Generator().manual_seed(0)
    for noise in torch.randn(50, BLOCKS, generator=g, dtype=torch.float64):
        for by in (0.02, 0.2):
            assert reached(target(sparsity).met_by(best + by * noise), sparsity, best) < 1.001


@pytest.mark.parametrize("sparsity", ASKED)
def test_owl_and_dlp_gain_when_told_the_right_order_and_lose_when_told_the_reverse(sparsity):
    order = TOY.w.log() - TOY.w[0].log()  # many outliers or a low median: the block keeps more
    for formula, told in ((baselines.owl, order), (baselines.dlp, 1 + order.max() - order)):
        assert 0.2 < reached(formula(told, target(sparsity)), sparsity) < 0.9
        assert reached(formula(told.flip(0), target(sparsity)), sparsity) < 0


@pytest.mark.parametrize("sparsity", ASKED)
def test_evopress_reaches_the_front_to_its_step_of_5_hundredths(sparsity):
    for seed in range(2):
        steps = [(Part(4), 4), (Part(2), 2)]
        found = baselines.evopress(Part(), steps, target(sparsity), 416, seed, snapshots=(26, 104))
        few, some, many = (reached(found[budget][0], sparsity) for budget in (26, 104, 416))
        assert 0.2 < few < some < many and some > 0.8 and 0.985 < many < 1.001


@pytest.mark.parametrize("sparsity", ASKED)
def test_dynamic_programming_reaches_the_optimum_of_its_grid(sparsity):
    damages = [baselines.damages_alone(Part(4), block, BLOCKS) for block in range(BLOCKS)]
    damages = torch.tensor(damages, dtype=torch.float64)
    x = baselines.dynamic_program(damages, [1000] * BLOCKS, target(sparsity))
    # f2 is convex in every block: the cheapest steps are the best, whatever their order
    steps = damages.diff(dim=1).flatten().sort().values
    lowest = float(steps[: round(sparsity / MAX * 8 * BLOCKS)].sum())
    assert float(TOY.f2(x)) == pytest.approx(lowest, rel=1e-4)  # MAX itself is out of logits' reach
    assert 0.96 < reached(x, sparsity) < 1.001


@pytest.mark.parametrize("sparsity", ASKED)
def test_a_gp_for_one_request_reaches_two_fifths_at_least_in_48_evaluations(sparsity):
    x = baselines.gp_search(Part(), target(sparsity), 48)
    assert 0.4 < reached(x, sparsity) < 1.001


@pytest.mark.slow
def test_unicuco_comes_near_the_front_at_all_requests_with_one_search():
    settings = SearchSettings(initial=24, rounds=6, steps=150, final_steps=800)
    result = search(lambda batch: list(map(Part(), batch)), BLOCKS, settings)
    assert len(result.log) == 48
    for sparsity in ASKED:
        x = strategy_for(result.net, sparsity, mean)
        assert 0.95 < reached(x, sparsity) < 1.001
