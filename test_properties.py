"""
Properties: what must hold for any mask, any front, any StratNet; numbers that break; the same answer twice.

Run       pytest test_properties.py
Random structure comes from Hypothesis, derandomised: every run tries the same examples. Each tolerance has its dtype beside it.
"""
import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

import eval as evaluation
import gp as gaussian
import llama
import prune
import train
import unicuco
import wishes
from gp import GaussianProcess
from llama import Config, Llama, pack, unpack
from prune import LINEARS, Pruner, keep_mask
from test_commands import call
from test_unicuco import ROOT, write_small
from unicuco import MAX, Scale, StratNet, log_divergence, strategy_for

steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)
seeds = st.integers(0, 10**6)


def random_model(seed=0, dtype=torch.float32):
    """A small Llama with weights of every size, in memory."""
    model = Llama(Config(512, 64, 96, 3, 4, 2, 16, 128, 1e-5, tie_word_embeddings=True))
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 2 else 0.1) + (p.ndim == 1)).to(dtype)
    return model.eval().requires_grad_(False)


def random_net(blocks, size=1.0, seed=0):
    net, g = StratNet(blocks), torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * size / p.shape[-1] ** 0.5
    return net


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 512, (12, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pruner(tokens):
    return Pruner(random_model(), tokens)


class Surrogate:
    """Stands in for a GP: mean and std are given functions of the strategies."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def posterior(self, x):
        return self.mean(x), self.std(x)


class Bar:
    def update(self, n=1):
        pass


# -------------------------------------------------------------------------------------------------------- masks and counts
@steady
@given(seeds, st.integers(1, 6), st.integers(1, 130), st.floats(0, 0.9999), st.floats(0, 0.9999))
def test_a_higher_sparsity_drops_a_superset_whatever_the_scores_ties_included(seed, rows, columns, low, high):
    score = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).abs() * 3).round() * 0.1
    score[:, columns // 2:] = torch.nextafter(score[:, :columns - columns // 2], torch.tensor(0.0))  # neighbours in float32, out of order
    assert torch.equal(prune.rank(score).long().gather(1, score.argsort(dim=1, stable=True)), torch.arange(columns).expand(rows, -1))
    low, high = sorted((low, high))
    fewer, more = keep_mask(score, low), keep_mask(score, high)
    assert not (more & ~fewer).any()
    for mask, sparsity in ((fewer, low), (more, high)):
        k = math.floor(Fraction(sparsity) * columns + Fraction(1, 10**6))                    # the count, in exact arithmetic
        assert abs(int((~mask).sum()) / rows - k) <= (abs(Fraction(sparsity) * columns + Fraction(1, 10**6) - round(sparsity * columns)) < 1e-9)
        assert (~mask).sum(1).unique().numel() == 1
        worst_kept, best_dropped = score.masked_fill(~mask, math.inf).amin(1), score.masked_fill(mask, -1).amax(1)
        assert (best_dropped <= worst_kept).all()


@steady
@given(st.lists(st.floats(0, 0.99), min_size=3, max_size=3), st.lists(st.floats(0, 0.99), min_size=3, max_size=3))
def test_counted_sparsity_equals_counted_mask_entries_and_counted_zeros_and_masks_are_nested(pruner, a, b):
    low, high = [min(p) for p in zip(a, b)], [max(p) for p in zip(a, b)]
    for strategy in (low, high):
        masks = pruner.masks(strategy)
        assert pruner.counts(strategy).tolist() == [[prune.count(x, int(d_in)) for d_in in pruner.d_in] for x in strategy]
        dropped, total = sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        pruner.apply(strategy)
        zeros = sum(int((W == 0).sum()) for block in pruner.live for W in block)
        assert pruner.sparsity(strategy) == dropped / total == zeros / total and pruner.counted(masks) == dropped / total
    fewer = pruner.masks(low)
    assert not any((masks[n] & ~fewer[n]).any() for n in masks)
    pruner.restore()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_is_0_for_the_dense_model_and_positive_for_any_pruned_one(tokens, dtype):
    model, g = random_model(dtype=dtype), torch.Generator().manual_seed(0)
    divergence, pruner = evaluation.Divergence(model, tokens), Pruner(model, tokens)
    assert divergence() == 0
    for _ in range(10):
        strategy = torch.rand(3, generator=g) * 0.9 + 0.02
        pruner.apply(strategy)
        kl, ppl = divergence.measure()
        assert 0 < kl < 100 and 1 < ppl < math.inf
    pruner.apply([0.0] * 3)
    assert divergence() == 0


def test_activation_norms_do_not_depend_on_how_the_calibration_tokens_are_batched(tokens, monkeypatch):
    model = random_model()
    whole = prune.activation_norms(model, tokens)
    monkeypatch.setattr(evaluation, "BATCH", 128)                                            # two windows at a time
    parts = prune.activation_norms(model, tokens)
    assert whole.keys() == parts.keys()
    assert all(torch.allclose(whole[n], parts[n], rtol=1e-5, atol=0) for n in whole)         # float32


# -------------------------------------------------------------------------------------------------------------- the fronts
def pareto(points):
    """Which of points (n, 2) no other one dominates, by comparing all pairs."""
    no_worse, better = (points[:, None] <= points).all(2), (points[:, None] < points).any(2)
    return ~(no_worse & better).any(0)


def check_front(points):
    """Every Pareto-optimal point is the optimum of a request, every optimum of a request is Pareto-optimal."""
    points = torch.tensor(sorted(set(points)), dtype=torch.float64) / 40
    best = pareto(points)
    for i in best.nonzero()[:, 0].tolist():
        # the request that makes both weighted terms equal. Another point q is worse in one objective, by at least a step 1/40; it
        # wins only if its gain in the sum, at most 0.02 of the value, is more: not before steps fall below 1.05 / 51 < 1/40
        l1, l2 = 1 / (points[i] - unicuco.IDEAL)
        request = torch.stack([l1, l2]) / (l1 + l2)
        assert int(unicuco.tchebycheff(points, request.expand(len(points), 2)).argmin()) == i
    for l1 in torch.linspace(0.01, 0.99, 99, dtype=torch.float64):
        values = unicuco.tchebycheff(points, torch.stack([l1, 1 - l1]).expand(len(points), 2))   # both weights are 0.01 at least
        assert best[values <= values.min() + 1e-9].all()                                     # float64; a step is worth 5e-6 at least


@steady
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=40))
def test_every_pareto_optimal_point_answers_some_request_and_every_answer_is_pareto_optimal(points):
    check_front(points)


def test_tchebycheff_reaches_all_of_a_concave_front_where_a_weighted_sum_reaches_its_two_ends():
    concave = [(i, round((1600 - i * i) ** 0.5)) for i in range(41)]
    check_front([(i, (40 - i) ** 2 // 40) for i in range(41)])                               # convex
    check_front(concave)
    points = torch.tensor(concave, dtype=torch.float64)
    l1 = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None]
    sums = (l1 * points[:, 0] + (1 - l1) * points[:, 1]).argmin(1)
    assert set(sums.tolist()) == {0, 40}


def area(points):
    """Hypervolume by brute force: the cells between all coordinates, each dominated or not."""
    xs, ys = (sorted({1.0, *(p[i] for p in points if p[i] < 1)}) for i in (0, 1))
    return sum((b - a) * (d - c) for a, b in zip(xs, xs[1:]) for c, d in zip(ys, ys[1:]) if any(p[0] <= a and p[1] <= c for p in points))


plane = st.tuples(*[st.integers(-6, 30).map(lambda i: i / 20)] * 2)                            # equal coordinates, and beyond 1


@settings(steady, max_examples=200)
@given(st.lists(plane, max_size=9), plane)
def test_hypervolume_equals_brute_force_and_the_gain_of_a_point_is_the_difference(points, one):
    tensor = torch.tensor(points, dtype=torch.float64).view(-1, 2)
    assert unicuco.hypervolume(tensor) == pytest.approx(area(points), abs=1e-12)             # float64
    gain = unicuco.hypervolume_gain(tensor, torch.tensor([one], dtype=torch.float64))
    assert float(gain) == pytest.approx(area([*points, one]) - area(points), abs=1e-12)
    assert unicuco.hypervolume(tensor.flip(0)) == unicuco.hypervolume(tensor)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_hypervolume_is_within_4_standard_errors_of_a_monte_carlo_estimate(n):
    g = torch.Generator().manual_seed(n)
    points = torch.rand(n, 2, generator=g, dtype=torch.float64) * 1.3 - 0.2
    draws = torch.rand(100_000, 2, generator=g, dtype=torch.float64) * 1.2 - 0.2             # of the box from -0.2 to 1
    hit = torch.zeros(len(draws), dtype=torch.bool)
    for p in points:
        hit |= (draws >= p).all(1)
    share = float(hit.double().mean())
    error = 1.44 * math.sqrt(share * (1 - share) / len(draws))
    assert abs(unicuco.hypervolume(points) - 1.44 * share) <= 4 * error


# ----------------------------------------------------------------------------------------------------------------- packing
@steady
@given(st.integers(1, 7), st.integers(1, 41) | st.sampled_from([8, 64, 72]), st.floats(0, 1), seeds,
       st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_packing_keeps_every_bit_pattern_under_any_mask_in_the_documented_bit_order(rows, columns, share, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    whole = torch.int16 if dtype != torch.float32 else torch.int32
    bits = torch.randint(torch.iinfo(whole).min, torch.iinfo(whole).max + 1, (rows, columns), generator=g, dtype=torch.int64).to(whole)
    kept = torch.rand(rows, columns, generator=g) < share
    kept[seed % rows] = share == 1                                                           # an empty row
    mask, values = pack(bits.view(dtype), kept)                                              # NaN, infinity, -0.0 and all
    assert np.array_equal(mask.numpy(), np.packbits(kept.numpy(), axis=1, bitorder="little"))
    assert values.dtype == dtype and torch.equal(values.view(whole), bits[kept])
    assert torch.equal(unpack(mask, values, columns).view(whole), torch.where(kept, bits, 0))
    if columns % 8:
        mask[0, -1] |= 128                                                                   # an unused bit is set
        with pytest.raises(ValueError, match="values are there"):
            unpack(mask, torch.cat([values, values.new_zeros(1)]), columns)


# ---------------------------------------------------------------------------------------------- from a wish to a strategy
def counter(blocks, d_out, d_in):
    """A Pruner that only counts."""
    p = object.__new__(Pruner)
    p.coarse = False
    p.live, p.d_out, p.d_in = [None] * blocks, torch.tensor(d_out, dtype=torch.float64), torch.tensor(d_in, dtype=torch.float64)
    return p


sevens = st.lists(st.integers(1, 600), min_size=7, max_size=7)


@steady
@given(st.integers(1, 8), sevens, sevens, st.floats(-3, 9), seeds, st.floats(0, MAX) | st.sampled_from([0.0, 0.3, 0.5, MAX]), st.booleans())
def test_strategy_for_is_within_one_step_of_the_count_for_any_stratnet_and_any_shape(blocks, d_out, d_in, size, seed, sparsity, equal):
    net = random_net(blocks, 10 ** size, seed)                               # 10^9 saturates every output
    if equal:                                                                # all blocks but the first cross a count together
        d_in = d_in[:1] * 7
        net.layers[-1].weight.data[1:], net.layers[-1].bias.data[1:] = net.layers[-1].weight[-1].clone(), 0.0
    pruner = counter(blocks, d_out, d_in)
    x = strategy_for(net, sparsity, pruner.sparsity)
    assert x.min() >= 0 and x.max() <= MAX
    assert abs(pruner.sparsity(x) - pruner.sparsity([sparsity] * blocks)) <= 0.5 / (blocks * min(d_in)) + 1e-12      # float64: the nearest step


def test_strategy_for_stays_close_to_what_stratnet_itself_says_at_that_sparsity():
    net = unicuco.load_stratnet(ROOT / "tiny" / "stratnet.safetensors", 12)[0]
    l1 = torch.linspace(0, 1, 4001, dtype=torch.float64)
    with torch.no_grad():
        curve = net(torch.stack([l1, 1 - l1], 1))
    for sparsity in (0.2, 0.3, 0.5, 0.7):
        own = curve[(curve.mean(1) - sparsity).abs().argmin()]
        x = strategy_for(net, sparsity, lambda x: float(x.mean()))
        assert (x - own).abs().max() < 2e-3 and float(x.mean()) == pytest.approx(sparsity, abs=1e-6)


def test_a_scale_turns_size_and_log_kl_into_objectives_worked_by_hand():
    scale = Scale.of(torch.tensor([-3.0, -1.0, 1.0]))
    assert (scale.lo, scale.hi) == (-3, 1)
    objectives = scale(torch.tensor([[0.9, 0.9], [0.0, 0.0], [0.3, 0.6]]), torch.tensor([1.0, -3.0, -1.0]))
    assert torch.allclose(objectives, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]))    # float32


def test_the_first_design_has_every_level_of_sparsity_and_stays_in_the_box():
    for blocks in (1, 12, 30):
        design = unicuco.first_design(48, blocks, torch.Generator().manual_seed(0))
        assert design.shape == (48, blocks) and design.min() >= 0 and design.max() <= MAX
    levels = design.mean(1)                                        # 30 blocks: the scatter of 0.12 falls to 0.02 in their mean
    assert (levels - (0.05 + 0.75 * (torch.arange(48) + 0.5) / 48)).abs().max() < 0.1


def test_a_wish_for_a_kl_is_met_though_the_surrogate_is_wrong_and_more_sparsity_ruins_the_model():
    curve = lambda s: torch.full((4,), s, dtype=torch.float64)
    truth = lambda x: 2 * float(x.mean()) ** 2 if x.mean() < 0.6 else math.nan               # the largest with KL 0.5 is at 0.5
    for guess in (lambda x: math.log(truth(x) / 3 if x.mean() < 0.6 else 0.3), lambda x: 8 * float(x.mean()) - 9):
        x = wishes.strategy_of(wishes.parse_request({"max_kl": 0.5}), curve, None, guess, truth, None)
        assert truth(x) <= 0.5 and float(x.mean()) > 0.4
    for measured in (math.nan, math.inf, 0.51):
        with pytest.raises(wishes.Unreachable):
            wishes.strategy_of(wishes.parse_request({"max_kl": 0.5}), curve, None, guess, lambda x: measured, None)
    assert wishes.largest(lambda s: s <= 0.37) == pytest.approx(0.37, abs=1e-6)


# -------------------------------------------------------------------------------------------------- strangers' checkpoints
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_checkpoint_that_transformers_made_itself_biases_included_gives_its_logits(family, tokens, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.AutoConfig.for_model(family, **sizes, **(dict(attention_bias=True, mlp_bias=True) if family == "llama" else {}))
    theirs, g = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.Generator().manual_seed(0)
    for p in theirs.parameters():                                            # biases are 0 when they are made
        p.data = torch.randn(p.shape, generator=g) * 0.3
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((ROOT / "tiny" / "tokenizer.model").read_bytes())
    with torch.no_grad():
        ours, theirs = llama.load_llama(tmp_path)[0](tokens), theirs(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()                           # float32


# ------------------------------------------------------------------------------------------------------ batches of any size
def test_kl_perplexity_bits_and_choices_do_not_depend_on_how_tokens_are_batched(tokens, monkeypatch):
    model, g = random_model(), torch.Generator().manual_seed(0)
    pairs = [(torch.randint(3, 512, (n,), generator=g).tolist(), n // 3 + 1) for n in (4, 9, 9, 30, 127, 140, 200)]
    pruner, results = Pruner(model, tokens), []
    for batch, chunk in ((2048, 2**23), (64, 512), (200, 2**14), (1, 1)):
        monkeypatch.setattr(evaluation, "BATCH", batch)
        monkeypatch.setattr(evaluation, "CHUNK", chunk)
        pruner.restore()
        divergence = evaluation.Divergence(model, tokens)
        pruner.apply([0.3, 0.5, 0.4])
        results.append([*divergence.measure(), evaluation.perplexity(model, tokens.flatten(), 64),
                        evaluation.bits_per_byte(model, tokens.flatten()[:700], 2000, 1, 64), *evaluation.log_likelihoods(model, pairs).tolist()])
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)                                  # float32


def test_log_likelihoods_and_bits_per_byte_equal_plain_loops(tokens):
    model, g = random_model(), torch.Generator().manual_seed(0)

    def logp(ids):                                                 # of every token but the first, given those before it
        with torch.no_grad():
            return model(torch.tensor([ids]))[0, :-1].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    pairs = [(torch.randint(3, 512, (n,), generator=g).tolist(), c) for n, c in ((5, 1), (5, 4), (64, 20), (128, 3), (129, 7), (160, 12))]
    expected = [float(logp(ids[-129:])[-count:].sum()) for ids, count in pairs]              # 128 positions, and the last target
    assert evaluation.log_likelihoods(model, pairs).tolist() == pytest.approx(expected, rel=1e-5)          # float32
    ids = tokens.flatten()[:150].tolist()
    total = sum(float(logp([1, *ids[i:i + 64]]).sum()) for i in (0, 64, 128))                # the last window is shorter
    assert evaluation.bits_per_byte(model, torch.tensor(ids), 400, 1, 64) == pytest.approx(-total / math.log(2) / 400, rel=1e-5)


def test_a_text_and_a_question_open_with_exactly_one_begin_token():
    tokenizer = llama.Tokenizer(ROOT / "tiny", 4096)
    ids = evaluation.tokenise(tokenizer, ["import os\n", "x = 1\n"])
    assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("import os\n"), *tokenizer.encode("x = 1\n")]
    whole, count = evaluation.encode_pair(tokenizer, "import ", "os, sys")                   # the space goes with the continuation
    assert whole == [tokenizer.bos_id, *tokenizer.encode("import os, sys")]
    assert whole[:-count] == [tokenizer.bos_id, *tokenizer.encode("import")]


def test_normalised_accuracy_divides_by_characters_not_by_tokens(monkeypatch):
    tokenizer, row = llama.Tokenizer(ROOT / "tiny", 4096), dict(goal="x", sol1="import os, import sys", sol2="\x00\x01\x02", label=0)
    monkeypatch.setattr(evaluation, "log_likelihoods", lambda model, pairs, label: torch.tensor([-14.0, -3.0], dtype=torch.float64))
    result = evaluation.zero_shot(None, tokenizer, "piqa", [row])
    # per character -14 / 21 and -3 / 3; per token the second would win, for each of its characters is one
    assert result["predictions"] == [1] and result["predictions_norm"] == [0] and (result["acc"], result["acc_norm"]) == (0, 1)


def test_standard_errors_equal_scipys_and_no_token_is_both_chosen_on_and_tested_on(tmp_path):
    right = np.array([1.0, 0, 0, 1, 1, 1])
    assert evaluation.standard_error(right) == pytest.approx(scipy.stats.sem(right), rel=1e-12) and math.isnan(evaluation.standard_error([1.0]))
    tokenizer = llama.Tokenizer(ROOT / "tiny", 4096)
    (tmp_path / "one.txt").write_text(" ".join(map(str, range(2000))))
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"text": f"document {i} of ten " * 20}) for i in range(10)))
    for name in ("one.txt", "many.jsonl"):
        windows, held_out = evaluation.load_texts(tokenizer, tmp_path / name, None, 16)
        unseen = next(iter(held_out.values()))
        assert not {tuple(w) for w in windows.tolist()} & {tuple(w) for w in unseen.tolist()}
        assert 3 < len(windows) / len(unseen) < 5
        parts = evaluation.draw(windows, [5, 7, 3], seed=0)
        assert [len(p) for p in parts] == [5, 7, 3] and len({tuple(w) for p in parts for w in p.tolist()}) == 15
    with pytest.raises(ValueError, match="are needed"):
        evaluation.draw(windows, [len(windows), 1], seed=0)


# ------------------------------------------------------------------------------------------------------ numbers that break
def test_a_model_pruned_to_ruin_counts_as_100_nats():
    assert log_divergence(math.nan) == log_divergence(math.inf) == log_divergence(-math.inf) == log_divergence(1e9) == math.log(100)
    assert log_divergence(0.0) == log_divergence(-1e-9) == math.log(1e-6) and log_divergence(0.25) == math.log(0.25)


@pytest.mark.parametrize("dtype,ruin", [(torch.float32, math.nan), (torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 6e4)])
def test_nan_weights_and_overflowing_activations_give_a_kl_that_is_not_finite_never_a_small_one(tokens, dtype, ruin):
    model = random_model(dtype=dtype)
    divergence = evaluation.Divergence(model, tokens)
    model.blocks[1].mlp.down_proj.weight.data.fill_(ruin)
    kl, ppl = divergence.measure()
    assert not math.isfinite(kl) and math.isnan(ppl) and log_divergence(kl) == math.log(100)
    with pytest.raises(ValueError, match="overflow"):
        Pruner(model, tokens)


@pytest.mark.parametrize("mean", ["blocks", "constant"])
@pytest.mark.parametrize("kl", [lambda x: math.nan if x.mean() > 0.4 else float(x.mean()) ** 2, lambda x: math.inf, lambda x: 0.0, lambda x: 0.3],
                         ids=["ruined above 0.4", "always infinite", "always zero", "always 0.3"])
def test_a_search_over_broken_or_constant_values_ends_with_finite_strategies(mean, kl, monkeypatch):
    fit = GaussianProcess.fit

    def watched(self, X, y):
        assert X.isfinite().all() and y.isfinite().all()
        return fit(self, X, y)

    monkeypatch.setattr(GaussianProcess, "fit", watched)
    net, scale, gp, log = train.search(lambda batch: [kl(x) for x in batch], 5, initial=8, rounds=2, batch=2, mean=mean, steps=10, final_steps=20)
    assert scale.hi > scale.lo and all(math.isfinite(e["predicted"]) for e in log if e["round"])
    assert all(0.15 <= np.mean(e["strategy"]) <= 0.75 for e in log if e["round"])
    x = strategy_for(net, 0.5, lambda x: float(x.mean()))
    assert x.isfinite().all() and all(v.isfinite().all() for v in (*gp.posterior(x[None]), *gp.posterior_gradient(x[None])))


def test_a_scale_of_equal_values_divides_by_no_zero():
    for value in (math.log(1e-6), -0.5, math.log(100)):
        scale = Scale.of(torch.full((5,), value, dtype=torch.float64))
        assert scale.lo == value and scale.hi == value + 1e-3
        assert scale(torch.full((2, 3), 0.45), torch.tensor([value] * 2)).isfinite().all()


def test_a_block_without_activations_is_pruned_in_column_order_with_exact_counts(tokens):
    model = random_model()
    model.blocks[1].input_layernorm.weight.data.zero_()                # q, k and v see zeros only, and so does o
    pruner = Pruner(model, tokens)
    pruner.apply([0.5, 0.3, 0.5])
    for name in LINEARS[:4]:
        W = model.blocks[1].get_submodule(name).weight
        assert (W[:, :19] == 0).all() and (W[:, 19:] != 0).all()       # int(0.3 * 64) = 19
    assert pruner.sparsity([0.5, 0.3, 0.5]) == sum(int((W == 0).sum()) for b in pruner.live for W in b) / sum(W.numel() for b in pruner.live for W in b)


def known(n=20, d=4):
    g = torch.Generator().manual_seed(0)
    X = torch.rand(n, d, generator=g, dtype=torch.float64) * 0.9
    return X, (X ** 2).sum(1).log() + 0.1 * torch.randn(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["matern52", "rbf"])
def test_a_covariance_that_has_no_cholesky_factor_gets_the_least_jitter_or_no_likelihood_at_all(kernel):
    gp, K = GaussianProcess("constant", kernel), torch.ones(6, 6, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(K)[1] > 0                                                # singular: six times one strategy
    chol = gp.factor(K)
    added = (chol @ chol.T - K).diagonal()
    assert (added > 0).all() and added.max() < 1e-8                                          # float64: one of the first rungs
    regular = K + torch.eye(6)
    assert torch.equal(gp.factor(regular), torch.linalg.cholesky(regular))                   # no jitter where none is needed
    for broken in (-torch.eye(3, dtype=torch.float64), K * math.nan, K * math.inf):
        assert gp.factor(broken) is None
    X, y = known()
    gp.fit(X[:1].repeat(6, 1), y[:6])
    theta = gp.theta.clone()
    theta[-1] = -200                                                                         # no noise to speak of
    value, gradient = gp.log_marginal_likelihood(theta)
    assert math.isfinite(value) and gradient.isfinite().all()
    theta[-2] = 800                                                                          # exp overflows
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
    start = undisturbed.log_marginal_likelihood(torch.tensor([0.5 * math.log(4)] * 4 + [math.log(0.02), math.log(1e-3)]))[0]
    assert gp.log_marginal_likelihood(gp.theta)[0] > start


@pytest.mark.parametrize("slope,wall", [(0.1, 50), (1, 50), (100, 4)])
def test_minimising_turns_back_where_the_function_is_infinite_and_still_finds_the_minimum(slope, wall):
    beyond = []

    def f(x):                                                                # -slope x - log(wall - x): its minimum is wall - 1 / slope
        if (x >= wall).any():
            beyond.append(x)
            return math.inf, torch.zeros_like(x)
        return float((-slope * x - (wall - x).log()).sum()), 1 / (wall - x) - slope

    x = gaussian.minimise(f, torch.zeros(3, dtype=torch.float64))
    assert beyond and (x - (wall - 1 / slope)).abs().max() < 1e-4            # float64


@pytest.mark.parametrize("mean,kernel", [("blocks", "matern52"), ("constant", "rbf")])
def test_fitted_hyperparameters_and_prior_mean_are_stationary_points_of_their_posteriors(mean, kernel):
    X, y = known(40)
    gp = GaussianProcess(mean, kernel).fit(X, y)
    signal, noise = (0.02, 1e-3) if mean == "blocks" else (1.0, 1e-2)
    centre, width = torch.tensor([math.log(2)] * 4 + [math.log(signal), math.log(noise)]), torch.tensor([1.0] * 5 + [1.5])

    def value(theta):
        return gp.log_marginal_likelihood(theta)[0] - float((((theta - centre) / width) ** 2).sum()) / 2

    for e in torch.eye(6, dtype=torch.float64) * 1e-4:
        assert abs(value(gp.theta + e) - value(gp.theta - e)) / 2e-4 < 1e-3                  # float64, central differences
    if mean == "blocks":
        m = gp.mean
        p = torch.cat([m.c, m.b, torch.stack([m.a, m.c0])]).requires_grad_()
        c, b, a, c0 = p[:4], p[4:8], p[8], p[9]
        common = (b.sum() / 0.25 + 5 / 4) / (4 / 0.25 + 1 / 4)                    # its own optimum, given the b_i
        error = (c + a * (X + gaussian.SHIFT).log() + b * X).logsumexp(1) + c0 - y
        loss = ((error ** 2).sum() / 0.02 + (c ** 2).sum() + (a - 1) ** 2 / 0.25 + ((b - common) ** 2).sum() / 0.25 + (common - 5) ** 2 / 4) / 2
        gradient, = torch.autograd.grad(loss, p)
        assert gradient.abs().max() < 1e-3                                                   # float64


def test_where_the_data_leave_no_variance_std_is_its_floor_and_has_no_gradient():
    X, y = known(1)
    gp = GaussianProcess("constant").fit(X, y)
    gp.precision = torch.ones(1, 1, dtype=torch.float64)                          # of phi alone: the noise taken out, the strategy is certain
    for distance in (0.0, 1e-9):
        mean, std, _, dstd = gp.solve(X + distance)
        assert float(std) == pytest.approx(gp.deviation * 1e-6, rel=1e-9) and (dstd == 0).all() and mean.isfinite().all()
    assert (gp.solve(X + 0.1)[3] > 0).all()


def test_scattered_strategies_move_by_the_asked_amount_in_their_logits_and_stay_inside():
    x = torch.full((4000, 5), 0.45, dtype=torch.float64)
    moved = (unicuco.scattered(x, torch.Generator().manual_seed(0), by=0.2) / MAX).logit()
    assert moved.mean().abs() < 0.2 * 4 / 20000 ** 0.5 and moved.std() == pytest.approx(0.2, rel=4 / 40000 ** 0.5)      # 4 standard errors
    edges = torch.tensor([[0.0, MAX, 1e-30]], dtype=torch.float64)
    assert ((unicuco.scattered(edges, torch.Generator(), by=5.0) >= 0) & (unicuco.scattered(edges, torch.Generator(), by=5.0) <= MAX)).all()


# -------------------------------------------------------------------------------------- picking what to measure, and learning
SCALE = Scale(-6.0, 1.0)


@pytest.mark.parametrize("bias", [-50.0, 50.0, 0.0], ids=["all picks below", "all picks above", "one point"])
def test_picks_stay_between_and_differ_even_when_stratnet_has_collapsed(bias):
    net = random_net(6)
    for p in net.parameters():
        p.data.zero_()
    net.layers[-1].bias.data.fill_(bias)
    surrogate = Surrogate(lambda x: 3 * x.mean(1) - 4, lambda x: 0.1 + x[:, 0])
    picks = unicuco.select_batch(net, surrogate, SCALE, torch.empty(0, 2, dtype=torch.float64), 5, 0.5, torch.Generator().manual_seed(0))
    assert picks.shape == (5, 6) and picks.isfinite().all() and ((picks.mean(1) >= 0.15) & (picks.mean(1) <= 0.75)).all()
    if bias:
        assert len({tuple(p.tolist()) for p in picks}) == 5


def test_picks_are_taken_only_where_requests_come_from_and_of_equal_means_the_uncertain_one_is_picked():
    net, g = random_net(6, 4.0), lambda: torch.Generator().manual_seed(0)
    nothing = torch.empty(0, 2, dtype=torch.float64)
    surrogate = Surrogate(lambda x: 3 * x.mean(1) - 4, lambda x: torch.full((len(x),), 0.1, dtype=torch.float64))
    for between in ((0.15, 0.75), (0.4, 0.5)):
        picks = unicuco.select_batch(net, surrogate, SCALE, nothing, 4, 0.5, g(), between=between)
        assert ((picks.mean(1) >= between[0]) & (picks.mean(1) <= between[1])).all()
    flat = Surrogate(lambda x: 0 * x.mean(1), lambda x: (x.mean(1) < 0.45).double())         # certain above 0.45, not below
    pick = unicuco.select_batch(net, flat, Scale(-6.0, 0.2), nothing, 1, 0.5, g(), between=(0.44, 0.46))
    assert float(pick.mean()) < 0.45                               # its bound 0 - 0.5 gains, the mean alone or + 0.5 would not
    full = torch.tensor([[0.0, 0.0]], dtype=torch.float64)         # nothing left to gain: the four least certain
    certain = Surrogate(lambda x: 3 * x.mean(1) - 4, lambda x: x[:, 0])
    picks = unicuco.select_batch(net, certain, SCALE, full, 4, 0.0, g())
    candidates = net(unicuco.sample_requests(1000, g())).detach()
    candidates = candidates[(candidates.mean(1) >= 0.15) & (candidates.mean(1) <= 0.75)]
    assert torch.equal(picks[:, 0], candidates[:, 0].sort(descending=True).values[:4])


def test_a_batch_of_picks_is_the_one_of_a_greedy_search_by_brute_force():
    net, surrogate = random_net(6, 4.0), Surrogate(lambda x: 9 * x[:, 0] + x.mean(1) - 8, lambda x: 0.3 * x[:, 1])
    measured = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
    candidates = net(unicuco.sample_requests(60, torch.Generator().manual_seed(0))).detach()
    candidates = candidates[(candidates.mean(1) >= 0.15) & (candidates.mean(1) <= 0.75)]
    objectives = SCALE(candidates, surrogate.posterior(candidates)[0] - 0.5 * surrogate.posterior(candidates)[1]).tolist()
    front, expected = measured.tolist(), []
    for _ in range(4):
        expected.append(max(range(len(candidates)), key=lambda i: area([*front, objectives[i]])))
        front.append(objectives[expected[-1]])
    picks = unicuco.select_batch(net, surrogate, SCALE, measured, 4, 0.5, torch.Generator().manual_seed(0), candidates=60)
    assert torch.equal(picks, candidates[expected]) and len(set(expected)) == 4 and area(front) > area(measured.tolist())


def test_stratnet_learns_to_prefer_what_the_lower_confidence_bound_prefers():
    answers = []
    for kappa in (0.0, 1.0):
        torch.manual_seed(0)
        net = StratNet(2)
        surrogate = Surrogate(lambda x: 6 * (x ** 2).mean(1) - 5, lambda x: 2 * x[:, 0] + 0.1)         # block 0 is uncertain
        unicuco.train_stratnet(net, surrogate, SCALE, 150, kappa, torch.Generator().manual_seed(0))
        with torch.no_grad():
            answers.append(net(torch.tensor([[0.3, 0.7], [0.5, 0.5]], dtype=torch.float64)))
    blind, bold = answers
    assert (blind[:, 0] - blind[:, 1]).abs().max() < 0.1 and (bold[:, 0] - bold[:, 1]).min() > 0.1


# ------------------------------------------------------------------------------------------------------ the same answer twice
def tiny_search(seed=0):
    w = torch.linspace(0.2, 2, 6, dtype=torch.float64)
    return train.search(lambda batch: [float((w * x ** 2).sum()) for x in batch], 6, initial=10, rounds=3, batch=2, steps=40, final_steps=80, seed=seed)


def test_a_search_gives_bitwise_equal_results_twice_and_its_predictions_are_kls():
    (net, scale, gp, log), (net_, scale_, gp_, log_) = tiny_search(), tiny_search()
    assert log == log_ and scale == scale_ and torch.equal(gp.theta, gp_.theta)
    assert all(map(torch.equal, net.state_dict().values(), net_.state_dict().values()))
    assert tiny_search(1)[-1] != log
    last = [e for e in log if e["round"] == 3]
    assert all(0.5 < e["predicted"] / e["measured"] < 2 for e in last)


def answer():
    """Texts, windows, ranks, a short search and its StratNet on the embedded model, with one thread: one hash of all of it."""
    texts = evaluation.stdlib_files(True), evaluation.stdlib_files(False)
    with train.one_thread():
        model, tokenizer = llama.load_llama(llama.TINY)
        windows = evaluation.cut(evaluation.tokenise(tokenizer, texts[0][:6]), 64)
        calibration, searched = evaluation.draw(windows, [4, 2], 0)
        pruner, f2 = Pruner(model, calibration), evaluation.Divergence(model, searched)

        def measure(batch):
            values = []
            for x in batch:
                pruner.apply(x)
                values.append(f2())
            return values

        net, scale, gp, log = train.search(measure, 12, initial=6, rounds=1, batch=2, steps=10, final_steps=10)
    digest = hashlib.sha256(repr((texts, log, scale, list(llama.weight_files(llama.TINY)))).encode())
    for part in (windows, *(r for block in pruner.ranks for r in block), gp.theta, *net.state_dict().values()):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


SHUFFLED = """
import functools, os, random
listdir, scandir = os.listdir, os.scandir
class Entries(list):
    def __enter__(self): return self
    def __exit__(self, *why): pass
def shuffled(entries):
    entries = list(entries)
    random.Random(0).shuffle(entries)
    return Entries(entries)
os.listdir, os.scandir = functools.partial(lambda *a: shuffled(listdir(*a))), functools.partial(lambda *a: shuffled(scandir(*a)))      # not methods
from test_properties import answer
print(answer())
"""


def test_hash_seed_locale_and_the_order_of_files_on_disk_change_nothing():
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    other = subprocess.run([sys.executable, "-c", SHUFFLED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert other.stdout.strip() == answer(), other.stderr


# ------------------------------------------------------------------------------------------------ measuring once, comparing
def test_what_was_measured_is_never_measured_again_and_survives_the_run(tmp_path):
    asked = []

    def f2(x):
        asked.append(x.tolist())
        return math.nan if x[0] > 0.5 else float(x.sum())

    strategies = [torch.tensor([v, 0.25], dtype=torch.float64) for v in (0.125, 0.25, 0.625)]
    measure = train.Measure(f2, tmp_path, False, Bar())
    first = measure(strategies[:2]) + measure(strategies)
    assert first[:4] == [0.375, 0.5, 0.375, 0.5] and math.isnan(first[4]) and len(asked) == 3
    again = train.Measure(f2, tmp_path, True, Bar())(strategies)
    assert again[:2] == [0.375, 0.5] and math.isnan(again[2]) and len(asked) == 3            # NaN is remembered too, in JSON that has none:
    assert [kl for _, kl in json.loads((tmp_path / "evaluations.0.json").read_text(), parse_constant=pytest.fail)["evaluations"]] == [0.375, 0.5, None]
    train.Measure(f2, tmp_path, False, Bar())(strategies[:1])
    assert len(asked) == 4                                                                   # without --resume it starts anew


def test_evaluations_are_read_back_bit_for_bit_and_what_is_none_is_refused_in_one_line(tmp_path):
    path = tmp_path / "evaluations.0.json"
    whole = [[[0.1, 1 / 3], 0.123456789012345678], [[0.0, 0.9], float("inf")]]
    path.write_text(json.dumps({"evaluations": whole}))
    measure = train.Measure(None, tmp_path, True, None)
    assert measure.own == whole and measure.known == {(0.1, 1 / 3): 0.123456789012345678, (0.0, 0.9): float("inf")}
    for broken in ("", "[]", "{}", '{"evaluations": 3}', '{"evaluations": [[1, 2]]}', '{"evaluations": [[[0.1], "x"]]}',
                   '{"evaluations": [[[0.1]]]}', '{"evaluations": [[["a"], 1]]}', json.dumps({"evaluations": whole})[:-9]):
        path.write_text(broken)
        with pytest.raises(ValueError) as error:
            train.Measure(None, tmp_path, True, None)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_every_setting_that_a_run_depends_on_changes_its_fingerprint(tmp_path):
    base = dict(model=ROOT / "tiny", data=tmp_path / "a.txt", seed=0, initial=5, rounds=2, batch=2, mean="blocks", metric="wanda", tokens=128,
                calibration=4, seqlen=64, dtype="float32", rank_bits=16)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    mark = lambda **changes: train.fingerprint(argparse.Namespace(**base | changes))
    others = dict(data=tmp_path / "b.txt", seed=1, initial=6, rounds=3, batch=3, mean="constant", metric="magnitude", tokens=64, calibration=5,
                  seqlen=32, dtype="bfloat16", rank_bits=8)
    assert mark() == mark() and all(mark(**{key: value}) != mark() for key, value in others.items())


def test_the_table_holds_the_kl_of_both_methods_at_equal_counts_and_names_where_stratnet_wins(pruner, tokens, capsys):
    net = random_net(3, 2.0)
    rows = train.compare(net, pruner, {"text": tokens[:4]}, (0.3, 0.6))
    divergence = evaluation.Divergence(pruner.model, tokens[:4])
    assert divergence() == 0                                                                 # compare leaves the model dense
    for u, s in zip(rows[::2], rows[1::2]):
        assert abs(u["counted"] - s["counted"]) <= 1 / (3 * 64)
        for row, strategy in ((u, [u["sparsity"]] * 3), (s, strategy_for(net, u["sparsity"], pruner.sparsity))):
            pruner.apply(strategy)
            assert (row["kl"], row["ppl"]) == divergence.measure() and row["counted"] == pruner.sparsity(strategy)
    pruner.restore()
    for row, kl in zip(rows, (0.2, 0.1, 0.2, 0.3)):
        row["kl"] = kl
    train.show(rows)
    assert capsys.readouterr().out.splitlines()[-1] == "StratNet's KL is below uniform's at 0.3 (-50.0 %); not at 0.6 (+50.0 %)."
    rows[3]["kl"] = 0.1
    train.show(rows)
    assert capsys.readouterr().out.splitlines()[-1] == "StratNet's KL is below uniform's at 0.3 (-50.0 %), 0.6 (-50.0 %)."


def test_a_model_that_pruning_cannot_change_ends_with_a_table_of_zeros(tmp_path, capsys, monkeypatch):
    folder = write_small(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights = {n: w * (not n.endswith(("o_proj.weight", "down_proj.weight"))) for n, w in weights.items()}     # no block writes anything
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text((ROOT / "train.py").read_text())
    monkeypatch.setattr(train, "search", lambda *a, search=train.search, **k: search(*a, **{**k, "steps": 5, "final_steps": 5}))
    assert call(train, "--model", folder, "--data", tmp_path / "text.txt", "--device", "cpu", "--dtype", "float32", "--initial", 4, "--rounds", 1,
                "--batch", 2, "--tokens", 64, "--calibration", 2, "--seqlen", 64, "--test-tokens", 64, "--out", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(rows) == 12 and all(r["kl"] == 0 for r in rows)
    assert "below uniform's at no sparsity; not at 0.2 (+0.0 %)" in capsys.readouterr().out.splitlines()[-1]


# --------------------------------------------------------------------------------------------------------------- the checks
def test_every_break_of_the_mutation_list_finds_its_place_exactly_once():
    breaks = __import__("checks.mutations", fromlist=["BREAKS"]).BREAKS
    assert len(breaks) > 90 and [(file, old) for file, old, *_ in breaks if (ROOT / file).read_text().count(old) != 1] == []
