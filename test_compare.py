"""
What UniCuCo is compared with, and the comparison itself, by behaviour.

Run       pytest test_compare.py                         (10 s on 2 cores)
          pytest -m "slow or not slow" test_compare.py   (a minute)
"""

import argparse
import dataclasses
import json
import math
import re
import statistics

import numpy as np
import pytest
import torch

import baselines
import compare
import eval as evaluation
import refit
import unicuco
from baselines import Target
from compare import ENDS, HARD, METHODS, QUICK
from conftest import CPU, ROOT, call, relative, write_tasks
from eval import Divergence
from llama import load_llama
from model import LINEARS
from prune import Pruner
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
    found = baselines.evopress(Toy(), Toy(4), target(sparsity), 60, snapshots=(10, 30))
    values = [uniform_f2(sparsity), *(Toy()(found[b][0]) for b in (10, 30, 60))]
    assert all(later <= earlier for earlier, later in zip(values, values[1:]))
    assert values[-1] < 0.9 * values[0]
    for x, seconds in found.values():
        assert abs(counted(x) - sparsity) <= STEP and seconds >= 0
        assert x.min() >= 0 and x.max() <= unicuco.MAX
    again = baselines.evopress(Toy(), Toy(4), target(sparsity), 60, snapshots=(10, 30))
    assert all(torch.equal(found[b][0], again[b][0]) for b in found)


def test_evopress_spends_no_more_than_its_budget_in_tokens():
    f2, quick = Toy(), Toy(4)
    baselines.evopress(f2, quick, target(0.5), 40)
    assert 30 < f2.calls + quick.calls / 4 <= 40


def test_a_child_of_evopress_differs_from_its_parent_in_the_switched_blocks_only():
    asked = []

    class Recorded(Toy):
        def __call__(self, x):
            asked.append(x)
            return super().__call__(x)

    # one generation: 8 children of uniform pruning
    baselines.evopress(Toy(), Recorded(4), target(0.5), 6)
    moved = [int(((x - 0.5).abs() > 1e-3).sum()) for x in asked]
    assert len(asked) == 8 and max(moved) >= 2
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


def test_outlier_shares_equal_counting_scores_above_m_times_their_mean(small):
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
        *("--budget", 8, "--out", out),
    )


def read(folder):
    """(inputs, rows) of a comparison."""
    return compare.read_comparison(folder / "compare.json")


@pytest.mark.slow
def test_the_comparison_prints_a_table_of_finite_numbers_with_uniform_as_its_unit(
    small, text, tmp_path, short, capsys
):
    words = ("--requests", 16, "--seeds", 2, "--methods", *METHODS)
    assert call(compare, *options(small, text, tmp_path), *words) == 0
    inputs, rows = read(tmp_path)
    assert inputs["provenance"]["command"].startswith("python compare.py --model ")
    table = {r["method"]: r for r in compare.requests_table(rows, inputs)}
    assert {"uniform", "EvoPress, 8 each", *METHODS.values()} - {
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
    assert table["EvoPress, 8 each"]["evaluations"] == 8 * 16
    assert table["GP per request"]["evaluations"] == 4 * 16
    check_ratios(table, rows)
    ours = table["UniCuCo"]
    printed = capsys.readouterr().out
    assert f"   {ours['ratio'][name]:8.3f}  {ours['spread'][name]:7.3f} " in printed
    equal = [
        method
        for method, r in table.items()
        if method.startswith("EvoPress") and r["ratio"][name] <= ours["ratio"][name]
    ]
    none = "At equal quality: no EvoPress budget up to 8 reaches"
    assert (f"At equal quality, against {equal[0]} " if equal else none) in printed


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
    assert [r["method"] for r in compare.requests_table(rows, inputs)][2] == "UniCuCo"
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
    models = {(m, s) for m in ("uniform", "UniCuCo", "EvoPress, 8 each") for s in HARD}
    long = {(r["seed"], r["method"], r["sparsity"]): r for r in rows if r["table"] == "long"}
    asked = {(seed, *model) for seed in range(2) for model in {("dense", 0.0), *models}}
    assert long.keys() == asked
    for seed in range(2):
        setting = prepared(small, text, seed)
        (unseen,) = setting.held_out.values()
        tokens = unseen.flatten()[: 256 if seed else None]
        windows = evaluation.cut(tokens, 128)  # 128: the model's positions
        divergence = evaluation.Divergence(setting.model, windows)
        dense = long[seed, "dense", 0.0]
        perplexity = evaluation.perplexity(setting.model, windows.flatten(), 128)
        assert dense["kl"] == 0 and dense["ppl"] == pytest.approx(perplexity, rel=1e-6)
        pruner = Pruner(setting.model, setting.calibration)
        made = journal[f"{seed} UniCuCo, 40 and 4 rounds"][0]["strategies"]["0.6"]
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
    table = {(r["method"], r["sparsity"]): r for r in compare.long_table(rows)}
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
        r for r in compare.tasks_table(rows) if (r["method"], r["sparsity"]) == ("uniform", 0.5)
    )
    line = next(line for line in lines if re.match(r"uniform +0.50 .* ± ", line))
    assert line.endswith(f" {uniform['lost']:.1f} ± {uniform['error']:.1f}")
    start = "At 0.6: UniCuCo's KL over that of EvoPress, 8 each: "
    line = next(line for line in lines if line.startswith(start))
    to_evopress = ratios("EvoPress, 8 each")
    mean, wide = statistics.mean(to_evopress), statistics.stdev(to_evopress)
    assert f" {mean:.3f}, ± {wide:.3f} over 2 seeds" in line


def test_long_texts_and_tasks_are_for_uniform_and_the_best_of_each_method():
    methods = (
        *("uniform", "UniCuCo", "UniCuCo, constant mean"),
        *("EvoPress, 4 each", "EvoPress, 8 each"),
    )
    answers = [
        {"seed": 0, "method": m, "sparsity": s, "strategy": [s]} for m in methods for s in QUICK
    ]
    rows = [(a["method"], a["sparsity"], a["strategy"]) for a in compare.hard(answers)]
    best = ("uniform", "UniCuCo", "EvoPress, 8 each")
    assert rows == [("dense", 0.0, [0.0])] + [(m, s, [s]) for s in (0.5, 0.6) for m in best]


def test_how_far_accuracy_lies_below_the_dense_models_is_paired_by_document_worked_by_hand():
    def rows(method, sparsity, right):
        head = {"table": "tasks", "seed": 0, "method": method, "sparsity": sparsity}
        acc = right.count("1") / 4
        more = {"documents": 4, "acc": acc, "acc_norm": None, "right": right}
        return [{**head, "text": task, **more} for task in evaluation.TASKS]

    dense, pruned = compare.tasks_table(rows("dense", 0.0, "1101") + rows("M", 0.5, "1001"))
    assert dense["average"] == 75 and dense["lost"] == dense["error"] == 0
    assert pruned["piqa"] == pruned["average"] == 50 and pruned["lost"] == 25
    # the differences 0, 1, 0, 0 have variance 1/4, so 1/16 for their mean; five tasks alike:
    # sqrt(5 / 16) / 5
    assert pruned["error"] == pytest.approx(100 * math.sqrt(5 / 16) / 5, rel=1e-12)


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
    said = compare.compared(row(0.9, 0.9, 1.1), one)
    assert said == "M's KL over that of M: 0.967, ± 0.115 over 3 seeds: a tie."
    said = compare.compared(row(0.8, 0.9, 0.85), one)
    assert said.endswith("0.850, ± 0.050 over 3 seeds: ahead.")
    said = compare.compared(row(1.1, 1.2, 1.15), one)
    assert said.endswith("± 0.050 over 3 seeds: behind.")
    said = compare.compared(row(0.9), row(1))
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
    requests = 64 if len(served) == len(QUICK) else 3
    inputs = {"requests": requests, "served": list(served), "tokens": 100}
    (row,) = compare.requests_table(rows, inputs)
    return row


def test_seconds_are_medians_so_one_search_beside_other_work_changes_nothing():
    row = costs_of(QUICK, (3, 5, 5, 900, 5, 4), (5, 5, 6, 4, 5, 5), (4, 4, 5, 7, 5, 6))
    # by hand
    costs = (row["seconds_shared"], row["seconds_per_request"], row["seconds"])
    assert costs == (4, 5, 324)
    assert (row["evaluations"], row["tokens"]) == (640, 64000)
    assert row["ratio"] == {"a": 1, "b": 1} and row["spread"] == {"a": 0, "b": 0}
    # all served: their mean, times 3
    row = costs_of((0.2, *QUICK, 0.75), (3, 5, 6, 10, 2, 12, 5, 9))
    costs = (row["seconds_shared"], row["seconds_per_request"], row["seconds"])
    assert costs == (3, 7, 24) and row["spread"] == {"a": None, "b": None}


def test_a_ruined_model_counts_as_100_nats_in_kl_and_perplexity_alike():
    assert compare.outcome(0.5, 20.0) == {"kl": 0.5, "ppl": 20.0}
    for broken in (math.nan, math.inf):
        assert compare.outcome(broken, broken) == {"kl": 100, "ppl": math.exp(100)}


def test_full_serves_every_request_and_extrapolates_nothing(small, text, tmp_path, short, capsys):
    words = ("--requests", 2, "--full", "--methods", "owl", "unicuco", "evopress")
    assert call(compare, *options(small, text, tmp_path), *words) == 0
    inputs, rows = read(tmp_path)
    table = compare.requests_table(rows, inputs)
    assert {0.2, 0.75} <= set(inputs["served"]) and not any(r["extrapolated"] for r in table)
    assert all(v is None for r in table for v in r["spread"].values())  # one seed has no spread
    assert "All were served and measured" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny", "tiny-full", "smollm2", "smollm2-constant"])
def test_the_tables_of_the_results_in_the_repository_can_be_printed(name, capsys):
    inputs, rows = compare.read_comparison(ROOT / "results" / f"compare-{name}.json")
    compare.show_requests(rows, inputs)
    if any(r["table"] == "tasks" for r in rows):
        compare.show_tasks(rows)
        compare.show_long(rows)
    assert f"{inputs['requests']} requests from 0.2 to 0.75" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("--budget", 4),
        ("--requests", 0),
        ("--seeds", "x"),
        ("--model", "nowhere"),
        ("--nonsense",),
        ("--data", "nowhere.txt"),
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


def test_over_matrices_equal_sizes_alone_switch_levels_and_evopress_finds_the_toys_best():
    sizes = torch.tensor([4.0, 1.0, 1.0, 4.0, 6.0, 6.0, 6.0])
    groups = baselines.groups_of(sizes, 3)
    assert sorted(map(len, groups)) == [6, 6, 9]
    assert torch.cat(groups).sort().values.tolist() == list(range(21))
    g = torch.Generator().manual_seed(0)
    parent = torch.full((21,), 0.5, dtype=torch.float64)
    for _ in range(200):
        child = baselines.child_of(parent, 0.05, g, groups)
        moved = child - parent
        for group in groups:
            assert float(moved[group].sum()) == pytest.approx(0, abs=1e-12)  # float64
        assert 2 <= int((moved.abs() > 1e-9).sum()) <= 6
    # f2 = sum_i w_i x_i^2 at mean 0.5: the best is x_i = min(0.9, c / w_i)
    w = torch.linspace(0.8, 2, 21, dtype=torch.float64)
    c = 10.5 / float((1 / w).sum())
    best = float((w * (c / w) ** 2).sum())
    assert float((c / w).max()) <= 0.9
    f2 = lambda x: float((w * x**2).sum())
    f2_quick = type("Quick", (), {"share": 4, "__call__": lambda self, x: f2(x)})()
    target = Target(0.5, 21, lambda x: float(torch.as_tensor(x).mean()))
    found = baselines.evopress(f2, f2_quick, target, 600, groups=[torch.arange(21)])
    strategy, _ = found[600]
    assert f2(strategy) < best + 0.05 * (f2(parent) - best)


@pytest.mark.slow
def test_every_method_is_refitted_and_sparsegpt_stands_beside_them(small, text, tmp_path, short):
    words = (*options(small, text, tmp_path), "--requests", 16, "--refit")
    assert call(compare, *words, "--methods", "unicuco", "evopress", "matrices") == 0
    _, rows = read(tmp_path)
    mine = [r for r in rows if r["table"] == "refitted"]
    budgeted = {"EvoPress, 8 each", "matrix EvoPress, 8 each"}
    assert {r["method"] for r in mine} == {"uniform", "UniCuCo", *budgeted, *compare.SPARSEGPT}
    plain = {(r["method"], r["sparsity"], r["text"]): r for r in rows if r["table"] == "requests"}
    for r in mine:
        if (r["method"], r["sparsity"], r["text"]) in plain:
            before = plain[r["method"], r["sparsity"], r["text"]]
            assert abs(r["counted"] - before["counted"]) < 0.01 and r["kl"] != before["kl"]
    table = compare.refitted_table(rows)
    assert len(table) == 3 * 6 and all(x == 1 for x in table[0]["ratio"])
