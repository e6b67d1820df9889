"""
What UniCuCo is compared with, and the comparison itself, by behaviour.

Run       pytest test_compare.py                         (10 s on 2 cores)
          pytest -m "slow or not slow" test_compare.py   (a minute)
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest
import torch

import baselines
import compare
import curvature
import eval as evaluation
import prune
import ranks
import refit
import report
import script
import unicuco
from baselines import Target
from compare import HARD
from conftest import CPU, ROOT, call, relative, write_small, write_tasks
from eval import Divergence
from llama import load_llama
from model import LINEARS
from ranks import Pruner
from report import ENDS, METHODS, QUICK
from unicuco import search

BLOCKS = 8
WEIGHTS = torch.logspace(-1.5, 0, BLOCKS, dtype=torch.float64)
STEP = 1 / (1000 * BLOCKS)


class Toy:
    """A cheap f2 = sum_i w_i x_i^2 that counts its calls; `share`: how many times cheaper than the
    whole it would be."""

    def __init__(self, share=1):
        self.share = share
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return float((WEIGHTS * x**2).sum())


def steps():
    """EvoPress's selection before f2: on a quarter and on half of the tokens."""
    return [(Toy(4), 4), (Toy(2), 2)]


def counted(x):
    """Blocks of one matrix with rows of 1000 weights."""
    return float((torch.as_tensor(x) * 1000 + 1e-6).floor().sum()) / (1000 * BLOCKS)


def target(sparsity):
    return Target(sparsity, BLOCKS, counted)


def uniform_f2(sparsity):
    return Toy()(baselines.uniform(BLOCKS, sparsity))


# ------------------------------------------------------------------------------------- baselines
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_evopress_lowers_its_own_f2_with_every_larger_budget_and_keeps_the_count(sparsity):
    found = baselines.evopress(Toy(), steps(), target(sparsity), 90, snapshots=(10, 45))
    values = [uniform_f2(sparsity), *(Toy()(found[b][0]) for b in (10, 45, 90))]
    assert all(later <= earlier for earlier, later in zip(values, values[1:]))
    assert values[-1] < 0.9 * values[0]
    for budget, (x, seconds, spent) in found.items():
        assert abs(counted(x) - sparsity) <= STEP and seconds >= 0
        assert spent == 1 + (budget - 1) // 8 * 8  # uniform, then generations of 8
        assert x.min() >= 0 and x.max() <= unicuco.MAX
    again = baselines.evopress(Toy(), steps(), target(sparsity), 90, snapshots=(10, 45))
    assert all(torch.equal(found[b][0], again[b][0]) for b in found)


def test_evopress_spends_no_more_than_its_budget_in_tokens():
    f2, selection = Toy(), steps()
    (quarter, _), (half, _) = selection
    baselines.evopress(f2, selection, target(0.5), 40)
    # uniform, then 4 generations of 16 children on a quarter, 4 on a half, 2 on all tokens
    assert (quarter.calls, half.calls, f2.calls) == (4 * 16, 4 * 4, 1 + 4 * 2)
    assert f2.calls + half.calls / 2 + quarter.calls / 4 == 33
    assert baselines.generation_cost(16, selection) == 8
    alone = Toy()
    baselines.evopress(alone, [], target(0.5), 40)  # one window: every child is read whole
    assert alone.calls == 1 + 2 * 16


class Recorded(Toy):
    """A toy f2 that keeps what it was asked, and sees damage in some blocks alone."""

    def __init__(self, share, seen=slice(None)):
        super().__init__(share)
        self.seen = seen
        self.asked = []

    def __call__(self, x):
        self.asked.append(x)
        return float((WEIGHTS * x**2)[self.seen].sum())


def test_every_step_of_evopress_chooses_among_the_survivors_of_the_one_before():
    quarter, half, f2 = Recorded(4, slice(4)), Recorded(2, slice(4, None)), Recorded(1)
    found = baselines.evopress(f2, [(quarter, 4), (half, 2)], target(0.5), 9)

    def best(objective, strategies, count):
        damage = lambda x: float((WEIGHTS * x**2)[objective.seen].sum())
        return sorted(strategies, key=damage)[:count]

    parent, *finalists = f2.asked
    assert len(quarter.asked) == 16 and torch.equal(parent, target(0.5).uniform())
    assert all(map(torch.equal, half.asked, best(quarter, quarter.asked, 4)))
    assert all(map(torch.equal, finalists, best(half, half.asked, 2))) and len(finalists) == 2
    assert torch.equal(found[9][0], best(f2, f2.asked, 1)[0])


def test_a_child_of_evopress_differs_from_its_parent_in_the_switched_blocks_only():
    quarter = Recorded(4)
    # one generation: 16 children of uniform pruning
    baselines.evopress(Toy(), [(quarter, 4), (Toy(2), 2)], target(0.5), 9)
    moved = [int(((x - 0.5).abs() > 1e-3).sum()) for x in quarter.asked]
    assert len(moved) == 16 and max(moved) >= 2
    assert set(moved) <= {0, 2, 3, 4, 5, 6}  # 1 to 3 switches of two blocks; two may cancel


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_owl_keeps_the_mean_and_gives_blocks_with_more_outliers_less_at_most_lambda_off(sparsity):
    shares = torch.tensor([0.1, 4.0, 0.5, 0.5, 2.0, 1.0, 3.0, 0.2], dtype=torch.float64)
    for lam in (0.04, 0.08):
        x = baselines.owl(shares, target(sparsity), lam)
        assert abs(counted(x) - sparsity) <= STEP
        assert x.argsort(stable=True).tolist()[:3] == [1, 6, 4]
        assert x.max() - x.min() == pytest.approx(2 * lam, abs=0.01)
    level = baselines.owl(torch.ones(BLOCKS, dtype=torch.float64), target(sparsity))
    assert abs(level - sparsity).max() <= 1e-3  # no outliers to tell blocks apart
    both = {3: shares, 5: shares.flip(0)}
    best = baselines.owl_best(both, target(sparsity), Toy())
    each = [
        Toy()(baselines.owl(s, target(sparsity), lam))
        for s in both.values()
        for lam in (0.04, 0.08, 0.12)
    ]
    assert Toy()(best) == min(each)


def test_dlp_is_its_formula_on_a_case_worked_by_hand():
    medians = torch.tensor([1.0, 2.0, 4.0, 1.0], dtype=torch.float64)
    asked = lambda s: Target(s, 4, lambda x: float(torch.as_tensor(x).mean()))
    # importance 7/8, 6/8, 4/8, 7/8, scaled to 1, 2/3, 0, 1, less its mean: times 2 alpha
    shape = torch.tensor([-1 / 3, 0, 2 / 3, -1 / 3], dtype=torch.float64)
    for sparsity, alpha in ((0.3, 0.04), (0.5, 0.04), (0.55, 0.07), (0.6, 0.1), (0.65, 0.125)):
        expected = pytest.approx((sparsity + 2 * alpha * shape).tolist(), abs=1e-9)
        assert baselines.dlp(medians, asked(sparsity)).tolist() == expected
    level = baselines.dlp(torch.ones(4, dtype=torch.float64), asked(0.5))
    assert level.tolist() == pytest.approx([0.5] * 4, abs=1e-9)


def test_outlier_shares_and_medians_equal_those_of_all_scores_of_a_block(small):
    model, _ = load_llama(small)
    tokens = torch.randint(3, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    inputs = {}

    def record(name):
        def hook(module, arguments, output):
            inputs[name] = arguments[0].flatten(0, 1).double().norm(dim=0)

        return hook

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        model(tokens)
    shares = baselines.outlier_shares(load_llama(small)[0], tokens)
    medians = baselines.median_scores(load_llama(small)[0], tokens)
    for i, block in enumerate(model.blocks):
        scores = []
        for name in LINEARS:
            W = block.get_submodule(name).weight.abs().double()
            scores.append((W * inputs[f"model.layers.{i}.{name}"]).flatten().numpy())
        scores = np.concatenate(scores)
        for m, found in shares.items():
            expected = 100 * np.mean(scores > m * scores.mean())
            # float32: one score in 10,000
            assert float(found[i]) == pytest.approx(expected, abs=0.01)
        middle = np.sort(scores)[(len(scores) - 1) // 2]
        assert float(medians[i]) == pytest.approx(middle, rel=1e-5)  # float32


def brute_force(damages, units, budget):
    """The lowest sum of damages of all levels that take just `budget`, tried one by one."""
    tried = itertools.product(range(damages.shape[1]), repeat=len(units))
    fits = [x for x in tried if sum(u * level for u, level in zip(units, x)) == budget]
    return min((float(sum(damages[m, i] for m, i in enumerate(x))) for x in fits), default=math.inf)


def test_the_knapsack_finds_what_trying_all_levels_finds_at_every_budget():
    g = torch.Generator().manual_seed(0)
    for units in ([1, 1, 2, 3], [2, 5, 2, 4]):  # of the second, no levels take 1 or 3
        damages = torch.rand(4, 4, generator=g, dtype=torch.float64)  # not even monotone
        damages[:, 0] = 0
        sums, choices = baselines.knapsack(damages, units)
        assert len(sums) == 3 * sum(units) + 1 and len(choices) == 4
        expected = [brute_force(damages, units, budget) for budget in range(len(sums))]
        assert sums.tolist() == pytest.approx(expected, rel=1e-12)


def test_dynamic_programming_gives_the_levels_of_lowest_damage_at_the_count_of_uniform():
    sizes = [300, 100, 200, 300]
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    asked = Target(0.45, 4, lambda x: float(torch.as_tensor(x) @ share))
    damages = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)).double().cumsum(1)
    damages[:, 0] = 0  # levels 0, 0.15 to 0.9: half of all that can go is 27 units
    x = baselines.dynamic_program(damages, sizes, asked)
    levels = (x / 0.15).round().long()
    assert torch.allclose(x, levels.double() * 0.15, atol=1e-4)  # logits end at 12
    assert asked.counted_sparsity(x) == pytest.approx(0.45, abs=1e-9)
    found = float(damages.gather(1, levels[:, None]).sum())
    assert found == pytest.approx(brute_force(damages, [3, 1, 2, 3], 27), rel=1e-12)


def test_damages_alone_are_f2_of_one_matrix_with_the_others_dense():
    f2 = Recorded(4)
    damages = baselines.damages_alone(f2, 2, BLOCKS)
    levels = [0.9 * level / 8 for level in range(9)]
    assert damages == pytest.approx([float(WEIGHTS[2]) * level**2 for level in levels])
    assert all(x.count_nonzero() == 1 and x[2] > 0 for x in f2.asked) and len(f2.asked) == 8


# ------------------------------------------------------------------------- a global threshold
def test_a_global_threshold_drops_the_lowest_scores_of_the_whole_model_as_many_as_uniform(small):
    model, _ = load_llama(small)
    windows = torch.randint(3, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    pruner = Pruner(model, windows)
    x_norms = ranks.activation_norms(model, windows)
    made = baselines.GlobalThreshold(pruner, windows)
    g_norms = curvature.gradient_norms(pruner, windows)
    masks = made.masks([0.6] * 3)
    kept, gone = [], []
    for names, dense in zip(pruner.names, pruner.dense):
        for name, W in zip(names, dense):
            score = W.abs() * torch.outer(g_norms[name], x_norms[name])
            kept.append(score[masks[name]])
            gone.append(score[~masks[name]])
    assert float(torch.cat(gone).max()) <= float(torch.cat(kept).min()) * (1 + 1e-6)  # float32
    counts = [len(there) / (len(there) + len(left)) for left, there in zip(kept, gone)]
    assert max(counts) - min(counts) > 0.1  # matrices lose what they lose
    assert made.sparsity([0.6] * 3) == pytest.approx(pruner.sparsity([0.6] * 3), abs=1e-5)
    made.apply([0.6] * 3)
    for name, W in model.named_parameters():
        if name in masks:
            assert torch.equal(W != 0, masks[name])
    made.restore()
    assert pruner.zeros() == 0 and all(mask.all() for mask in made.masks([0.0] * 3).values())


def test_a_gp_for_one_request_spends_its_budget_keeps_the_count_and_beats_uniform():
    f2 = Toy()
    x = baselines.gp_search(f2, target(0.5), 18, steps=60)
    assert f2.calls == 18 and abs(counted(x) - 0.5) <= STEP
    assert Toy()(x) < 0.9 * uniform_f2(0.5)


# ------------------------------------------------------------------------------- the comparison
@pytest.fixture
def short(monkeypatch):
    """Algorithm 1 with a first design of 6 and one round of 2, a few steps of training."""
    small = {"initial": 6, "rounds": 1, "batch": 2, "steps": 10, "final_steps": 20}

    def quick(measure, blocks, settings, *more):
        return search(measure, blocks, dataclasses.replace(settings, **small), *more)

    monkeypatch.setattr(compare, "search", quick)


def options(model, text, out):
    return (
        *("--model", model, "--data", text, *CPU),
        *("--seqlen", 64, "--calibration", 4, "--tokens", 256, "--test-tokens", 256),
        *("--budget", 9, "--out", out),
    )


def read(folder):
    """(inputs, rows) of a comparison."""
    return report.read_comparison(folder / "compare.json")


@pytest.mark.slow
def test_the_comparison_prints_a_table_of_finite_numbers_with_uniform_as_its_unit(
    small, text, tmp_path, short, capsys
):
    words = ("--requests", 16, "--seeds", 2, "--methods", *METHODS)
    assert call(compare, *options(small, text, tmp_path), *words) == 0
    inputs, rows = read(tmp_path)
    assert inputs["provenance"]["command"].startswith("python compare.py --model ")
    table = {r["method"]: r for r in report.requests_table(rows, inputs)}
    assert {"uniform", "EvoPress, 9 each", *METHODS.values()} - {
        "EvoPress",
        "matrix EvoPress",
    } <= table.keys()
    for r in table.values():
        numbers = [r["evaluations"], r["seconds"], r["seconds_shared"], r["seconds_per_request"]]
        numbers += [v for key in ("ratio", "spread", "worst") for v in r[key].values()]
        numbers += [p for by_sparsity in r["perplexity"].values() for p in by_sparsity.values()]
        assert all(math.isfinite(n) and n >= 0 for n in numbers), r
    (name,) = table["uniform"]["ratio"]
    assert table["uniform"]["ratio"][name] == 1 and table["uniform"]["evaluations"] == 0
    # of the short search, whatever the number of requests
    # and the one backward pass of the 256 search tokens' size, at four forward passes
    assert table["UniCuCo"]["evaluations"] == 8 + 4
    assert table["EvoPress, 9 each"]["evaluations"] == 9 * 16
    assert table["GP per request"]["evaluations"] == 4 * 16
    # 8 levels of 21 matrices, on a quarter of the tokens; the same backward pass; nothing
    assert table["dynamic programming"]["evaluations"] == 8 * 21 / 4
    assert table["global threshold"]["evaluations"] == 4
    assert table["DLP"]["evaluations"] == table["magnitude, uniform"]["evaluations"] == 0
    check_ratios(table, rows)
    ours = table["UniCuCo"]
    printed = capsys.readouterr().out
    assert f"   {ours['ratio'][name]:8.3f}  {ours['spread'][name]:7.3f} " in printed
    equal = [
        method
        for method, r in table.items()
        if method.startswith("EvoPress") and r["ratio"][name] <= ours["ratio"][name]
    ]
    none = "At equal quality: no budget of EvoPress up to 9 reaches"
    assert (f"At equal quality, against {equal[0]} " if equal else none) in printed
    said = re.search(r"^\d+ s, at most (\d+\.\d) GB of memory; wrote ", printed, re.MULTILINE)
    assert 0.1 < float(said[1]) < 8  # torch alone takes 0.2


def check_ratios(table, rows):
    """The table's ratios, counts and perplexities are those of the rows, of seeds 0 and 1."""
    (name,) = table["uniform"]["ratio"]
    judged = {(r["seed"], r["method"], r["sparsity"]): r for r in rows}
    assert len(judged) == len(rows) and all(r["tokens"] == 256 for r in rows)
    for seed in range(2):  # all methods at the same count, to one step
        for method in table:
            for s in QUICK:
                counts = (judged[seed, m, s]["counted"] for m in (method, "uniform"))
                assert abs(next(counts) - next(counts)) <= 1 / (3 * 64)

    def ratio(seed, s):
        return judged[seed, "UniCuCo", s]["kl"] / judged[seed, "uniform", s]["kl"]

    means = [statistics.geometric_mean(ratio(seed, s) for s in QUICK) for seed in range(2)]
    ours = table["UniCuCo"]
    assert ours["ratio"][name] == pytest.approx(statistics.mean(means), rel=1e-12)
    assert ours["spread"][name] == pytest.approx(statistics.stdev(means), rel=1e-9)
    everywhere = (*QUICK, *ENDS)
    worst = max(ratio(seed, s) for seed in range(2) for s in everywhere)
    assert ours["worst"][name] == pytest.approx(worst, rel=1e-12)
    perplexity = statistics.mean(judged[seed, "UniCuCo", 0.5]["ppl"] for seed in range(2))
    assert ours["perplexity"][name][0.5] == pytest.approx(perplexity, rel=1e-12)


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on_with_what_it_found_and_refuses_other_inputs(
    small, text, tmp_path, short, capsys
):
    words = (*options(small, text, tmp_path), "--requests", 16)
    path = tmp_path / "compare.journal.json"
    assert call(compare, *words, "--methods", "owl", "evopress") == 0
    whole = json.loads(path.read_text())
    values = whole["values"]
    half = dict(list(values.items())[:9])  # calibration, 5 + 2 of uniform, 1 of OWL
    path.write_text(json.dumps({**whole, "values": half}))
    assert call(compare, *words, "--methods", "owl", "evopress", "--resume") == 0
    again = json.loads(path.read_text())["values"]
    assert again.keys() == values.keys()
    same = {key for key in values if again[key] == values[key]}
    assert same >= half.keys()  # what is found anew took other seconds
    assert all(key in same for key in values if " tokens of " in key)
    # one more method later
    assert call(compare, *words, "--methods", "owl", "unicuco", "evopress", "--resume") == 0
    inputs, rows = read(tmp_path)
    assert [r["method"] for r in report.requests_table(rows, inputs)][2] == "UniCuCo"
    capsys.readouterr()
    assert call(compare, *words, "--full", "--resume") == 2
    assert "another served" in capsys.readouterr().err  # these were not searched for
    assert call(compare, *words, "--tokens", 128, "--resume") == 2
    assert "another tokens: 256, now 128" in capsys.readouterr().err


def prepared(model, text, seed):
    """What compare.py prepares with `options`."""
    args = argparse.Namespace(
        model=model, data=text, test=None, seqlen=64, calibration=4, seed=seed, offload=False
    )
    return compare.prepare(args, torch.device("cpu"), torch.float32, 256)


@pytest.fixture(scope="module")
def with_tasks(small, text, tmp_path_factory):
    """A comparison of two seeds with tasks and long texts: its words, folder and printed text."""
    out = tmp_path_factory.mktemp("tasks")
    words = (
        *options(small, text, out),
        *("--methods", "unicuco", "evopress", "magnitude"),
        *("--tasks", write_tasks(out), "--limit", 3, "--seeds", 2),
    )
    return words, out


@pytest.mark.slow
def test_long_texts_and_tasks_are_measured_on_the_models_that_were_searched_for(
    small, text, with_tasks, short, capsys, monkeypatch
):
    words, out = with_tasks
    monkeypatch.setattr(compare, "LONG", 256)
    assert call(compare, *words) == 0
    printed = capsys.readouterr().out
    inputs, rows = read(out)
    journal = json.loads((out / "compare.journal.json").read_text())["values"]
    models = {(m, s) for m in ("uniform", "UniCuCo", "EvoPress, 9 each") for s in HARD}
    long = {(r["seed"], r["method"], r["sparsity"]): r for r in rows if r["table"] == "long"}
    asked = {(seed, *model) for seed in range(2) for model in {("dense", 0.0), *models}}
    assert long.keys() == asked
    for seed in range(2):
        setting = prepared(small, text, seed)
        (unseen,) = setting.held_out.values()
        tokens = unseen.flatten()[:256]
        windows = evaluation.cut(tokens, 128)  # 128: the model's positions
        divergence = evaluation.Divergence(setting.model, windows)
        dense = long[seed, "dense", 0.0]
        perplexity = evaluation.perplexity(setting.model, windows.flatten(), 128)
        assert dense["kl"] == 0 and dense["ppl"] == pytest.approx(perplexity, rel=1e-6)
        pruner = Pruner(setting.model, setting.calibration)
        (key,) = [
            key for key in journal if key.startswith(f"{seed} UniCuCo, 40 and up to 12 rounds")
        ]
        made = journal[key][0]["strategies"]["0.6"]
        pruner.apply(made["strategy"])
        row = long[seed, "UniCuCo", 0.6]
        assert (row["kl"], row["ppl"]) == divergence.measure()
        assert row["tokens"] == windows.numel() and row["strategy"] == made["strategy"]
        if seed == 0:
            check_tasks(setting, out, rows)
    check_tables(rows, printed)
    before = rows
    assert call(compare, *words, "--resume") == 0
    assert read(out)[1] == before


def check_tasks(setting, out, rows):
    """`setting.model` is UniCuCo's at 0.6: its rows hold what it answers."""
    tasks = {
        r["text"]: r
        for r in rows
        if r["table"] == "tasks" and (r["method"], r["sparsity"]) == ("UniCuCo", 0.6)
    }
    assert tasks.keys() == evaluation.TASKS.keys()
    for task, row in tasks.items():
        documents = evaluation.read_rows(out, task, 3)
        expected = evaluation.zero_shot(setting.model, setting.tokenizer, task, documents)
        assert row["acc"] == expected["acc"] == row["right"].count("1") / 3
        assert row["documents"] == 3 and row["seed"] == 0


def check_tables(rows, printed):
    """Ratios, spreads and their words are those of the rows."""
    long = {(r["seed"], r["method"], r["sparsity"]): r for r in rows if r["table"] == "long"}
    table = {(r["method"], r["sparsity"]): r for r in report.long_table(rows)}
    assert len(table) == 6 and table["uniform", 0.6]["ratio"] == 1
    assert table["uniform", 0.6]["spread"] == 0

    def ratios(other):
        return [long[i, "UniCuCo", 0.6]["kl"] / long[i, other, 0.6]["kl"] for i in range(2)]

    row = table["UniCuCo", 0.6]
    to_uniform = ratios("uniform")
    assert row["each_seed"] == {row["text"]: to_uniform}
    assert row["ratio"] == statistics.mean(to_uniform)
    assert row["spread"] == statistics.stdev(to_uniform)
    assert "zero-shot accuracy in %, 3, 3, 3, 3, 3 documents" in printed
    lines = printed.splitlines()
    uniform = next(
        r for r in report.tasks_table(rows) if (r["method"], r["sparsity"]) == ("uniform", 0.5)
    )
    line = next(line for line in lines if re.match(r"uniform +0.50 .* ± ", line))
    lost, error = uniform["below_dense"]
    assert line.split()[-4:] == [f"{lost:.1f}", "±", f"{error:.1f}", "-"]
    start = "At 0.6: UniCuCo's KL over that of EvoPress, 9 each: "
    line = next(line for line in lines if line.startswith(start))
    to_evopress = ratios("EvoPress, 9 each")
    mean, wide = statistics.mean(to_evopress), statistics.stdev(to_evopress)
    assert f" {mean:.3f}, ± {wide:.3f} over 2 seeds" in line


def test_long_texts_and_tasks_are_for_uniform_and_the_best_of_each_method():
    methods = (
        *("uniform", "UniCuCo", "UniCuCo, constant mean"),
        *("EvoPress, 8 each", "EvoPress, 9 each"),
    )
    answers = [
        {"seed": 0, "method": m, "sparsity": s, "strategy": [s]} for m in methods for s in QUICK
    ]
    rows = [(a["method"], a["sparsity"], a["strategy"]) for a in compare.hard(answers)]
    best = ("uniform", "UniCuCo", "EvoPress, 9 each")
    assert rows == [("dense", 0.0, [0.0])] + [(m, s, [s]) for s in (0.5, 0.6) for m in best]


def test_accuracy_below_the_dense_models_and_above_uniforms_is_paired_worked_by_hand():
    def rows(method, sparsity, right):
        head = {"table": "tasks", "seed": 0, "method": method, "sparsity": sparsity}
        acc = right.count("1") / 4
        more = {"documents": 4, "acc": acc, "acc_norm": None, "right": right}
        return [{**head, "text": task, **more} for task in evaluation.TASKS]

    uniform, ours = rows("uniform", 0.5, "0101"), rows("M", 0.5, "1001")
    dense, uniform, ours = report.tasks_table(rows("dense", 0.0, "1101") + uniform + ours)
    assert dense["average"] == 75 and uniform["average"] == ours["average"] == 50
    assert ours["piqa"] == 50 and dense["below_dense"] is None
    assert dense["above_uniform"] is None and uniform["above_uniform"] is None
    # below the dense model 0, 1, 0, 0: variance 1/4, so 1/16 for the mean; five tasks alike
    below = 25, 100 * math.sqrt(5 / 16) / 5
    assert ours["below_dense"] == pytest.approx(below, rel=1e-12)  # float64
    # above uniform 1, -1, 0, 0: variance 2/3, so 1/6 for the mean
    above = 0, 100 * math.sqrt(5 / 6) / 5
    assert ours["above_uniform"] == pytest.approx(above, rel=1e-12)  # float64


def test_answers_are_strings_of_what_was_right(monkeypatch):
    class State:
        model = tokenizer = None

        def apply(self, strategy):
            self.right = strategy

    state = State()
    run = argparse.Namespace(pruner=state, setting=state)

    def zero_shot(*_):
        gold = [1, 1, 1, 1]
        acc = sum(state.right) / 4
        return {"acc": acc, "acc_norm": None, "predictions": state.right, "gold": gold}

    monkeypatch.setattr(compare, "zero_shot", zero_shot)
    found = compare.ask(run, [1, 0, 0, 1], "piqa", [])
    assert found == {"acc": 0.5, "acc_norm": None, "right": "1001"}


def test_a_difference_within_the_spread_of_seeds_is_called_a_tie():
    def row(*ratios):  # geometric mean over the two texts: the ratio
        each_seed = {"a": [2 * r for r in ratios], "b": [r / 2 for r in ratios]}
        return {"method": "M", "each_seed": each_seed}

    one = row(1, 1, 1)
    said = report.compared(row(0.9, 0.9, 1.1), one)
    assert said == "M's KL over that of M: 0.967, ± 0.115 over 3 seeds: a tie."
    said = report.compared(row(0.8, 0.9, 0.85), one)
    assert said.endswith("0.850, ± 0.050 over 3 seeds: ahead.")
    said = report.compared(row(1.1, 1.2, 1.15), one)
    assert said.endswith("± 0.050 over 3 seeds: behind.")
    said = report.compared(row(0.9), row(1))
    assert said.endswith("0.900, one seed says nothing about its spread.")


def costs_of(served, *seeds):
    """The one row of the table of uniform, for seeds (shared seconds, *seconds at `served`)."""
    rows = [
        {
            **{"table": "requests", "seed": i, "method": "uniform", "sparsity": s},
            **{"text": text, "tokens": 8, "counted": s, "kl": 1.0, "ppl": 2.0},
            **{"evaluations": 10.0, "shared_evaluations": 0.0},
            **{"seconds": t, "shared_seconds": shared},
        }
        for i, (shared, *seconds) in enumerate(seeds)
        for s, t in zip(served, seconds)
        for text in ("a", "b")
    ]
    requests = 64 if len(served) == len(QUICK) else 2
    inputs = {"requests": requests, "served": list(served), "tokens": 100}
    (row,) = report.requests_table(rows, inputs)
    return row


def test_seconds_are_medians_so_one_search_beside_other_work_changes_nothing():
    row = costs_of(QUICK, (3, 5, 5, 900, 5, 4), (5, 5, 6, 4, 5, 5), (4, 4, 5, 7, 5, 6))
    # by hand
    costs = (row["seconds_shared"], row["seconds_per_request"], row["seconds"])
    assert costs == (4, 5, 324)
    assert (row["evaluations"], row["tokens"]) == (640, 64000)
    assert row["ratio"] == {"a": 1, "b": 1} and row["spread"] == {"a": 0, "b": 0}
    # all served: their mean, times 2
    row = costs_of((0.2, *QUICK, 0.75), (3, 5, 6, 10, 2, 12, 5, 9))
    costs = (row["seconds_shared"], row["seconds_per_request"], row["seconds"])
    assert costs == (3, 7, 17) and row["spread"] == {"a": None, "b": None}


def test_a_ruined_model_counts_as_100_nats_in_kl_and_perplexity_alike():
    assert compare.outcome(0.5, 20.0) == {"kl": 0.5, "ppl": 20.0}
    for broken in (math.nan, math.inf):
        assert compare.outcome(broken, broken) == {"kl": 100, "ppl": math.exp(100)}


def test_full_serves_every_request_and_extrapolates_nothing(small, text, tmp_path, short, capsys):
    words = ("--requests", 2, "--full", "--methods", "owl", "unicuco", "evopress")
    assert call(compare, *options(small, text, tmp_path), *words) == 0
    inputs, rows = read(tmp_path)
    table = report.requests_table(rows, inputs)
    assert {0.2, 0.75} <= set(inputs["served"]) and not any(r["extrapolated"] for r in table)
    assert all(v is None for r in table for v in r["spread"].values())  # one seed has no spread
    assert "All were served and measured" in capsys.readouterr().out


def test_smaller_budgets_are_halves_down_to_one_generation_so_6656_holds_every_fourth_of_it():
    assert compare.halved(104) == [13, 26, 52, 104]
    assert {104, 416, 1664, 6656} <= set(compare.halved(6656))
    for least in (compare.LEAST, 17):
        assert compare.halved(least) == [least]


def test_some_sparsities_alone_are_served_and_those_beside_them_are_extrapolated_from(
    small, text, tmp_path, short, capsys
):
    words = ("--served", 0.6, 0.4, "--methods", "evopress", "--refit")
    assert call(compare, *options(small, text, tmp_path), *words) == 0
    inputs, rows = read(tmp_path)
    assert inputs["served"] == [0.4, 0.6]
    asked = {r["sparsity"] for r in rows if r["method"] == "EvoPress, 9 each"}
    assert asked == {0.4, 0.6}
    table = {r["method"]: r for r in report.requests_table(rows, inputs)}
    ours = table["EvoPress, 9 each"]
    assert ours["extrapolated"] and ours["evaluations"] == 64 * 9
    (by_sparsity,) = ours["perplexity"].values()
    assert list(by_sparsity) == [0.6]
    printed = capsys.readouterr().out
    assert "2 sparsities were measured per method" in printed and "perplexity at 0.6\n" in printed


def test_a_row_of_unicuco_says_what_its_surrogate_predicted(small, text, tmp_path, short):
    words = ("--served", 0.5, "--methods", "unicuco")
    assert call(compare, *options(small, text, tmp_path), *words) == 0
    (ours,) = [r for r in read(tmp_path)[1] if r["method"] == "UniCuCo"]
    assert 0 < ours["predicted"] < ours["predicted_at_most"] and ours["last_round_gap"] >= 0
    found = {"predicted": {"log_kl": math.log(0.5), "std": math.log(1.1)}}
    gaps = [(0.9, 1.0), (1.3, 1.0), (1.0, 0.8)]  # .1 .3 .25
    said = compare.foreseen(found, {"last": gaps, "factor": 1.2})
    wanted = {"predicted": 0.5, "predicted_at_most": 0.55, "last_round_gap": 0.25}
    wanted["other_text_at_most"] = 0.6
    assert said == pytest.approx(wanted, rel=1e-12)  # float64
    # four windows: 1 + t_3 std / (mean sqrt 4), and of positive numbers std / mean is at most 2
    assert 1 < ours["other_text_at_most"] / ours["predicted"] < 1 + 2.4
    log = [{"round": i // 2, "predicted": i or None, "measured": 2.0 * i} for i in range(4)]
    assert compare.last_round(log) == [(2, 4.0), (3, 6.0)] and compare.last_round(log[:1]) == []


def test_with_nothing_measured_stratnet_costs_the_passes_of_its_table_and_is_prune_pys(
    small, text, tmp_path
):
    words = ("--served", 0.5, "--methods", "curvature")
    assert call(compare, *options(small, text, tmp_path), *words) == 0
    (ours,) = [r for r in read(tmp_path)[1] if r["method"] == "UniCuCo, nothing measured"]
    # 4 windows of 64 tokens: one pass of 256, counted as 4 forward passes; f2 has 256 tokens
    assert (ours["evaluations"], ours["shared_evaluations"]) == (0, 4)
    answer = tmp_path / "answer.json"
    asked = ("--sparsity", 0.5, "--no-refit", "--dry-run", "--json", answer)
    given = ("--seqlen", 64, "--calibration", 4, "--tokens", 256)
    assert call(prune, "--model", small, "--data", text, *CPU, *given, *asked) == 0
    (row,) = json.loads(answer.read_text())
    assert sum(row["strategy"], []) == ours["strategy"]


def test_what_other_comparisons_found_is_refitted_by_the_largest_budget_and_not_searched_again(
    small, text, tmp_path, short, monkeypatch
):
    words = (*options(small, text, tmp_path), "--served", 0.5)
    earlier = []
    for budget in (9, 18):
        more = ("--methods", "evopress", "global", "--budget", budget)
        assert call(compare, *words, *more) == 0
        first = read(tmp_path)[1]
        earlier.append((tmp_path / "compare.json").rename(tmp_path / f"of_{budget}.json"))
        (tmp_path / "compare.journal.json").unlink()
    monkeypatch.setattr(compare, "evopress", None)
    more = ("--methods", "dlp", "--refit", 0.5, 0.5, "--refit-also", *reversed(earlier), earlier[1])
    assert call(compare, *words, *more) == 0
    rows = [r for r in read(tmp_path)[1] if r["table"] == "refitted"]
    assert len(rows) == 3
    assert {r["method"] for r in rows} == {"uniform", "DLP", "EvoPress, 18 each"}
    found = {r["method"]: r for r in first if r["table"] == "requests"}
    for r in (r for r in rows if r["method"] in found):
        assert r["counted"] == pytest.approx(found[r["method"]]["counted"], abs=0.01)
        assert r["kl"] != found[r["method"]]["kl"]


def test_behind_a_refit_unicuco_answers_as_before_it_measured_found_here_or_in_another_comparison(
    small, text, tmp_path, short
):
    words = (*options(small, text, tmp_path), "--served", 0.5, "--refit", 0.5)
    assert call(compare, *words, "--methods", "unicuco", "curvature") == 0
    found = {(r["table"], r["method"]): r for r in read(tmp_path)[1]}
    ours, before = (
        {table: found[table, name] for table in ("requests", "refitted")}
        for name in ("UniCuCo", "UniCuCo, nothing measured")
    )
    assert ours["requests"]["strategy"] != before["requests"]["strategy"]
    assert ours["refitted"]["strategy"] == before["refitted"]["strategy"]
    assert ours["refitted"]["kl"] == before["refitted"]["kl"] != ours["requests"]["kl"]
    earlier = (tmp_path / "compare.json").rename(tmp_path / "earlier.json")
    assert call(compare, *words, "--methods", "--refit-also", earlier, "--force") == 0
    again = {(r["table"], r["method"]): r for r in read(tmp_path)[1]}
    assert again["refitted", "UniCuCo"]["strategy"] == ours["refitted"]["strategy"]


def test_answers_of_another_model_or_without_a_seed_asked_are_refused(
    small, text, tmp_path, short, capsys
):
    words = (*options(small, text, tmp_path), "--served", 0.5, "--methods", "--refit")
    assert call(compare, *words) == 0
    (tmp_path / "compare.journal.json").unlink()
    earlier = (tmp_path / "compare.json").rename(tmp_path / "earlier.json")
    also = ("--refit-also", earlier)
    capsys.readouterr()
    for more, reason in (
        (("--seed", 1), "lacks a seed"),
        (("--seeds", 2), "lacks a seed"),
        (("--data", __file__), "is of another --data"),
        (("--model", write_small(tmp_path / "other", seed=1)), "is of another model"),
    ):
        assert call(compare, *words, *also, *more) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "compare.json").exists()
    assert call(compare, *words, *also) == 0


def test_a_comparison_is_kept_unless_it_is_resumed_or_given_up_and_two_do_not_share_a_folder(
    small, text, tmp_path, short, capsys
):
    words = (*options(small, text, tmp_path), "--served", 0.5, "--methods", "--refit")
    assert call(compare, *words) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert call(compare, *words) == 2
    assert "--resume goes on with it, --force begins anew" in capsys.readouterr().err
    with script.locked(tmp_path, "held by the test"):
        assert call(compare, *words, "--resume") == 2
    assert "another compare.py is running" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    # what is read on more tokens is measured anew, refitted or not
    assert call(compare, *words, "--resume", "--test-tokens", 128) == 0
    rows = [r for r in read(tmp_path)[1] if r["method"] == "uniform"]
    assert {r["table"] for r in rows} == {"requests", "refitted"}
    assert {r["tokens"] for r in rows} == {128}
    assert call(compare, *words, "--force") == 0


def test_a_resumed_comparison_reads_no_table_of_curvature_whose_answers_it_has(
    small, text, tmp_path, short, monkeypatch
):
    words = (*options(small, text, tmp_path), "--served", 0.5, "--methods", "curvature")
    assert call(compare, *words) == 0
    before = read(tmp_path)[1]
    never = lambda *_: pytest.fail("trained again")
    monkeypatch.setattr(compare, "stratnet_from_curvature", never)
    assert call(compare, *words, "--resume") == 0
    assert read(tmp_path)[1] == before


def test_a_comparison_is_not_resumed_on_other_windows_of_the_same_text(
    text, tmp_path, short, capsys
):
    model, out = write_small(tmp_path / "model"), tmp_path / "out"
    words = (*options(model, text, out), "--served", 0.5, "--methods")
    assert call(compare, *words) == 0
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["add_bos_token"] = not settings.get("add_bos_token", True)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert call(compare, *words, "--resume") == 2
    assert "other windows of the text" in capsys.readouterr().err


def test_one_window_leaves_evopress_no_step_before_f2_and_two_leave_it_one():
    def kept(*shares):
        quick = [Toy(share) for share in shares]
        run = argparse.Namespace(quick=quick)
        return [(objective.share, count) for objective, count in compare.Run.steps(run)]

    assert (kept(), kept(2), kept(4, 2)) == ([], [(2, 2)], [(4, 4), (2, 2)])


@pytest.mark.parametrize("name", ["tiny", "tiny-full", "smollm2", "smollm2-constant"])
def test_the_tables_of_the_results_in_the_repository_can_be_printed(name, capsys):
    inputs, rows = report.read_comparison(ROOT / "results" / f"compare-{name}.json")
    report.show_requests(rows, inputs)
    if any(r["table"] == "tasks" for r in rows):
        report.show_tasks(rows)
        report.show_long(rows)
    assert f"{inputs['requests']} requests from 0.2 to 0.75" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("--budget", 8),
        ("--requests", 0),
        ("--seeds", "x"),
        ("--model", "nowhere"),
        ("--nonsense",),
        ("--served", 0.0),
        ("--served", 0.95),
        ("--served", 0.5, "--full"),
        ("--served", 0.4, "--tasks", "."),
        ("--tasks", "nowhere"),
        ("--calibration", 0),
        ("--calibration", -1),
        ("--served", 0.3, "--refit"),
        ("--served", 0.3, "--refit", 0.5),
        ("--data", "nowhere.txt"),
        ("--refit-also", "results/compare-tiny.json"),
        ("--refit", "--refit-also", "results/tiny-seed0.json"),
        ("--refit", "--refit-also", "results/compare-smollm2.json"),  # of another model
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2(words, capsys):
    assert call(compare, *words) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and error.startswith("compare.py: ")


# ------------------------------------------------------------------------------------- SparseGPT
def sweep_by_hand(w, H, gone):
    """SparseGPT of one row: at each column the inverse of what is left of H, no Cholesky factor."""
    w = w.clone().double()
    for j in range(len(w)):
        inverse = torch.linalg.inv(H[j:, j:].double())
        if gone[j]:
            w[j:] -= w[j] / inverse[0, 0] * inverse[0]
            w[j] = 0
    return w


def test_sparsegpts_sweep_equals_the_one_that_inverts_what_is_left_at_every_column():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 20, generator=g) @ torch.randn(20, 20, generator=g)
    W, kept = torch.randn(3, 20, generator=g), torch.rand(3, 20, generator=g) > 0.4
    H = x.T @ x
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(20)
    for width in (1, 7, 128):
        ours = baselines.sparsegpt_matrix(W, H, None, kept, width=width)
        for row in range(3):
            right = sweep_by_hand(W[row], damped, ~kept[row])
            assert relative(ours[row].double(), right) < 1e-4  # float32
        assert (ours[~kept] == 0).all()


def test_sparsegpts_own_mask_drops_what_costs_least_and_a_dead_input_goes_first():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(300, 16, generator=g)
    x[:, 5] = 0
    W = torch.randn(8, 16, generator=g)
    for sparsity in (0.0, 0.25, 0.5):
        ours = baselines.sparsegpt_matrix(W, x.T @ x, sparsity)
        assert int((ours == 0).sum()) == max(8, round(sparsity * W.numel()))
        assert (ours[:, 5] == 0).all()
    # inputs that are independent and of one size: the mask is magnitude's, nothing moves
    ours = baselines.sparsegpt_matrix(W, 300 * torch.eye(16), 0.5)
    lowest = W.abs().flatten().sort().values[63]
    assert torch.equal(ours, torch.where(W.abs() > lowest, W, 0))


def test_sparsegpt_is_below_wanda_and_the_refit_below_sparsegpt_on_its_own_windows(small):
    model, _ = load_llama(small)
    windows = torch.randint(3, 4096, (16, 64), generator=torch.Generator().manual_seed(0))
    pruner = Pruner(model, windows)
    pruner.restore()
    divergence = Divergence(model, windows)
    masks = pruner.masks([0.5] * 3)
    pruner.apply([0.5] * 3)
    kl = [divergence()]
    baselines.sparsegpt(pruner, windows, 0.5, masks)
    kl.append(divergence())
    assert pruner.zeros() == pruner.mask_sparsity(masks)
    refit.follow(pruner, masks, windows)
    kl.append(divergence())
    assert kl[2] < kl[1] < kl[0]


def test_over_matrices_equal_numbers_of_weights_switch_and_evopress_finds_the_best_of_that_count():
    sizes = torch.tensor([4, 1, 1, 4, 6, 6, 6], dtype=torch.float64).repeat(3)
    counted = lambda x: float((sizes * torch.as_tensor(x)).sum() / sizes.sum())
    g = torch.Generator().manual_seed(0)
    parent = torch.full((21,), 0.5, dtype=torch.float64)
    for _ in range(200):
        moved = sizes * (baselines.child_of(parent, 0.05, g, sizes) - parent)
        assert float(moved.sum()) == pytest.approx(0, abs=1e-12)  # float64
        assert float(moved.abs().max()) <= 3 * 0.05 * 4 + 1e-9  # of places of 4 weights on average
        assert 2 <= int((moved.abs() > 1e-9).sum()) <= 6
    ends = torch.where(torch.arange(21) % 2 == 0, 0.9, 0.0).double()  # nothing beyond 0 and MAX
    children = torch.stack([baselines.child_of(ends, 0.5, g, sizes) for _ in range(200)])
    assert 0 <= children.min() and children.max() <= 0.9
    # f2 = sum_i s_i w_i x_i^2 at a weighted mean of 0.5: the best is x_i = c / w_i
    w = torch.linspace(0.8, 2, 21, dtype=torch.float64)
    c = 0.5 * float(sizes.sum() / (sizes / w).sum())
    f2 = lambda x: float((sizes * w * x**2).sum())
    best = f2(c / w)
    assert float((c / w).max()) <= 0.9 and counted(c / w) == pytest.approx(0.5)
    cheaper = lambda share: type("Part", (), {"share": share, "__call__": lambda _, x: f2(x)})()
    selection = [(cheaper(4), 4), (cheaper(2), 2)]
    found = baselines.evopress(f2, selection, Target(0.5, 21, counted), 1200, sizes=sizes)
    assert counted(found[1200][0]) == pytest.approx(0.5, abs=1e-4)
    assert best < f2(found[1200][0]) < best + 0.05 * (f2(parent) - best)


@pytest.mark.slow
def test_every_method_is_refitted_and_sparsegpt_stands_beside_them(small, text, tmp_path, short):
    words = (*options(small, text, tmp_path), "--requests", 16, "--refit")
    methods = ["unicuco", "evopress", "matrices", "dlp", "dynamic", "magnitude", "global"]
    methods.append("sparsegpt")
    assert call(compare, *words, "--methods", *methods) == 0
    _, rows = read(tmp_path)
    mine = [r for r in rows if r["table"] == "refitted"]
    budgeted = {"EvoPress, 9 each", "matrix EvoPress, 9 each"}
    searched = {"uniform", "UniCuCo", "DLP", "dynamic programming", *budgeted}
    owned = {"magnitude, uniform", "global threshold"}
    assert {r["method"] for r in mine} == {*searched, *owned, *compare.SPARSEGPT}
    plain = {(r["method"], r["sparsity"], r["text"]): r for r in rows if r["table"] == "requests"}
    for r in mine:
        if (r["method"], r["sparsity"], r["text"]) in plain:
            before = plain[r["method"], r["sparsity"], r["text"]]
            assert abs(r["counted"] - before["counted"]) < 0.01 and r["kl"] != before["kl"]
    at_half = [r["kl"] for r in mine if r["sparsity"] == 0.5]
    # each with its own counts, and magnitude has those of uniform: the refit chooses the same masks
    assert len(at_half) == 10 and len({*at_half}) == 9
    table = report.refitted_table(rows)
    # at three sparsities, SparseGPT at all five that are served
    assert len(table) == 3 * 8 + 5 * 2 and all(x == 1 for x in table[0]["ratio"])
