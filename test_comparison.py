"""
What UniCuCo is compared with, the comparison itself, and the figures: by behaviour, through public functions and the command line.

Run       pytest test_comparison.py
"""
import json
import math
import re
import statistics
import sys

import numpy as np
import pytest
import torch

import baselines
import bench
import eval as evaluation
import plot
import stages
import train
import unicuco
from llama import load_llama
from prune import LINEARS
from test_commands import call, write_tasks
from test_unicuco import ROOT, write_small

BLOCKS = 8
WEIGHTS = torch.logspace(-1.5, 0, BLOCKS, dtype=torch.float64)


class Toy:
    """A cheap f2 = sum_i w_i x_i^2 that counts its calls; `share`: how many times cheaper than the whole it would be."""

    def __init__(self, share=1):
        self.share, self.calls = share, 0

    def __call__(self, x):
        self.calls += 1
        return float((WEIGHTS * x ** 2).sum())


def counted(x):
    """Blocks of one matrix with rows of 1000 weights."""
    return float((torch.as_tensor(x) * 1000 + 1e-6).floor().sum()) / (1000 * BLOCKS)


STEP = 1 / (1000 * BLOCKS)


def uniform_f2(sparsity):
    return Toy()(baselines.uniform(BLOCKS, sparsity))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("model") / "small", vocab_size=4096)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text((ROOT / "train.py").read_text())
    return path


# --------------------------------------------------------------------------------------------------------------- baselines
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_evopress_lowers_its_own_f2_with_every_larger_budget_and_keeps_the_count(sparsity):
    found = baselines.evopress(Toy(), Toy(4), sparsity, BLOCKS, counted, 60, snapshots=(10, 30))
    values = [uniform_f2(sparsity), *(Toy()(found[b][0]) for b in (10, 30, 60))]
    assert all(later <= earlier for earlier, later in zip(values, values[1:])) and values[-1] < 0.9 * values[0]
    for x, seconds in found.values():
        assert abs(counted(x) - sparsity) <= STEP and 0 <= x.min() and x.max() <= unicuco.MAX and seconds >= 0
    again = baselines.evopress(Toy(), Toy(4), sparsity, BLOCKS, counted, 60, snapshots=(10, 30))
    assert all(torch.equal(found[b][0], again[b][0]) for b in found)


def test_evopress_spends_no_more_than_its_budget_in_tokens():
    f2, quick = Toy(), Toy(4)
    baselines.evopress(f2, quick, 0.5, BLOCKS, counted, 40)
    assert 30 < f2.calls + quick.calls / 4 <= 40


def test_a_child_of_evopress_differs_from_its_parent_in_the_switched_blocks_only():
    asked = []

    class Recorded(Toy):
        def __call__(self, x):
            asked.append(x)
            return super().__call__(x)

    baselines.evopress(Toy(), Recorded(4), 0.5, BLOCKS, counted, 6)                          # one generation: 8 children of uniform pruning
    moved = [int(((x - 0.5).abs() > 1e-3).sum()) for x in asked]
    assert len(asked) == 8 and max(moved) >= 2 and set(moved) <= {0, 2, 3, 4, 5, 6}          # 1 to 3 switches of two blocks; two may cancel


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_owl_keeps_the_mean_and_gives_blocks_with_more_outliers_less_sparsity_at_most_lambda_off(sparsity):
    shares = torch.tensor([0.1, 4.0, 0.5, 0.5, 2.0, 1.0, 3.0, 0.2], dtype=torch.float64)
    for lam in (0.04, 0.08):
        x = baselines.owl(shares, sparsity, counted, lam)
        assert abs(counted(x) - sparsity) <= STEP
        assert x.argsort(stable=True).tolist()[:3] == [1, 6, 4] and x.max() - x.min() == pytest.approx(2 * lam, abs=0.01)
    level = baselines.owl(torch.ones(BLOCKS, dtype=torch.float64), sparsity, counted)
    assert abs(level - sparsity).max() <= 1e-3                                               # no outliers to tell blocks apart
    best = baselines.owl_best({3: shares, 5: shares.flip(0)}, sparsity, counted, Toy())
    assert Toy()(best) == min(Toy()(baselines.owl(s, sparsity, counted, l)) for s in (shares, shares.flip(0)) for l in (0.04, 0.08, 0.12))


def test_outlier_shares_equal_counting_scores_above_m_times_their_mean(small):
    model, _ = load_llama(small)
    tokens = torch.randint(3, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    inputs = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda m, args, out, name=name: inputs.__setitem__(name, args[0].flatten(0, 1).double().norm(dim=0)))
    with torch.no_grad():
        model(tokens)
    shares = baselines.outlier_shares(load_llama(small)[0], tokens)
    for i, block in enumerate(model.blocks):
        scores = np.concatenate([(block.get_submodule(n).weight.abs().double() * inputs[f"model.layers.{i}.{n}"]).flatten().numpy() for n in LINEARS])
        for m, found in shares.items():
            assert float(found[i]) == pytest.approx(100 * np.mean(scores > m * scores.mean()), abs=0.01)     # float32: one score in 10,000


def test_a_gp_for_one_request_spends_its_budget_keeps_the_count_and_beats_uniform():
    f2 = Toy()
    x = baselines.gp_search(f2, 0.5, BLOCKS, counted, 18, steps=60)
    assert f2.calls == 18 and abs(counted(x) - 0.5) <= STEP and Toy()(x) < 0.9 * uniform_f2(0.5)


# ------------------------------------------------------------------------------------------------------------- the comparison
def options(small, text, out):
    return ("--model", small, "--data", text, "--device", "cpu", "--dtype", "float32", "--seqlen", 64, "--calibration", 4, "--tokens", 256,
            "--test-tokens", 256, "--out", out)


@pytest.fixture
def short(monkeypatch):
    """Algorithm 1 with a first design of 6 and one round of 2, a few steps of training."""
    monkeypatch.setattr(bench, "search", lambda measure, blocks, **k: train.search(measure, blocks, **{
        **k, "initial": 6, "rounds": 1, "batch": 2, "steps": 10, "final_steps": 20}))


def test_the_comparison_writes_and_prints_a_table_of_finite_numbers_with_uniform_as_its_unit(small, text, tmp_path, short, capsys):
    assert call(bench, *options(small, text, tmp_path), "--budget", 8, "--requests", 16, "--seeds", 2, "--methods", *bench.METHODS) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    rows = {r["method"]: r for r in result["table"]}
    assert {"uniform", "UniCuCo", "UniCuCo, constant mean", "GP per request", "magnitude, uniform", "EvoPress, 8 each"} <= rows.keys()
    for r in rows.values():
        numbers = [r["evaluations"], r["seconds"], r["seconds_shared"], r["seconds_per_request"],
                   *(v for key in ("ratio", "spread", "worst") for v in r[key].values()), *(p for t in r["perplexity"].values() for p in t.values())]
        assert all(math.isfinite(n) and n >= 0 for n in numbers), r
    name, = rows["uniform"]["ratio"]
    assert rows["uniform"]["ratio"][name] == 1 and rows["uniform"]["evaluations"] == 0
    assert rows["UniCuCo"]["evaluations"] == 8                             # of the short search, whatever the number of requests
    assert rows["EvoPress, 8 each"]["evaluations"] == 8 * 16 and rows["GP per request"]["evaluations"] == 4 * 16
    found = result["found"]

    def judged(seed, method, s):
        value, = (v for k, v in found.items() if k.startswith(f"{seed} {method} {s} ") and k.endswith(" on 256 tokens"))
        return value

    for seed in range(2):                                                  # all methods at the same count, to one step; the ratios are theirs
        for method in rows:
            for s in bench.QUICK:
                assert abs(judged(seed, method, s)["counted"] - judged(seed, "uniform", s)["counted"]) <= 1 / (3 * 64)
    ratios = [{s: judged(seed, "UniCuCo", s)[name][0] / judged(seed, "uniform", s)[name][0] for s in (*bench.QUICK, *bench.ENDS)} for seed in range(2)]
    mean = statistics.mean(statistics.geometric_mean(r[s] for s in bench.QUICK) for r in ratios)
    assert rows["UniCuCo"]["ratio"][name] == pytest.approx(mean, rel=1e-12) and rows["UniCuCo"]["worst"][name] == max(max(r.values()) for r in ratios)
    printed = capsys.readouterr().out
    assert all(f"\n{method} " in printed for method in rows) and str(tmp_path / "bench.json") in printed
    equal = next((m for m in rows if m.startswith("EvoPress") and rows[m]["ratio"][name] <= mean), None)
    assert (f"At equal quality, against {equal} " if equal else "At equal quality: no EvoPress budget up to 8 reaches") in printed


def test_a_comparison_that_was_stopped_goes_on_with_what_it_found_and_refuses_other_inputs(small, text, tmp_path, short, capsys):
    words = (*options(small, text, tmp_path), "--budget", 8, "--requests", 16)
    assert call(bench, *words, "--methods", "owl", "evopress") == 0
    whole = json.loads((tmp_path / "bench.json").read_text())
    half = {**whole, "found": dict(list(whole["found"].items())[:9])}      # calibration, 5 of uniform, 3 of OWL
    (tmp_path / "bench.json").write_text(json.dumps(half))
    assert call(bench, *words, "--methods", "owl", "evopress", "--resume") == 0
    again = json.loads((tmp_path / "bench.json").read_text())
    assert again["found"].keys() == whole["found"].keys()
    same = {key for key, value in whole["found"].items() if again["found"][key] == value}           # what is found anew took other seconds
    assert same >= set(half["found"]) and all(key in same for key in whole["found"] if " on " in key)
    assert call(bench, *words, "--methods", "owl", "unicuco", "evopress", "--resume") == 0          # one more method later
    assert [r["method"] for r in json.loads((tmp_path / "bench.json").read_text())["table"]][2] == "UniCuCo"
    capsys.readouterr()
    assert call(bench, *words, "--full", "--resume") == 2 and "another served" in capsys.readouterr().err       # these were not searched for
    assert call(bench, *words, "--tokens", 128, "--resume") == 2 and "another tokens: 256, now 128" in capsys.readouterr().err


def test_the_table_of_benchmarks_is_that_of_the_models_that_were_searched_for(small, text, tmp_path, short, capsys, monkeypatch):
    words = (*options(small, text, tmp_path), "--budget", 8, "--methods", "unicuco", "evopress", "magnitude", "--tasks", write_tasks(tmp_path), "--limit", 3,
             "--seeds", 2)
    monkeypatch.setattr(bench, "LONG", 256)
    assert call(bench, *words) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    rows = {(r["method"], r["sparsity"]): r for r in content["benchmarks"]}
    assert rows.keys() == {("dense", 0), *((m, s) for m in ("uniform", "UniCuCo", "EvoPress, 8 each") for s in (0.5, 0.6))}
    model, tokenizer, windows, _, held_out = bench.setting(small, text, None, torch.device("cpu"), torch.float32, 64, 4, 256, 0)
    (_, unseen), = held_out.items()
    unseen = unseen.flatten()[:unseen.numel() // 128 * 128].view(-1, 128)                    # 128: the model's positions
    divergence, pruner = evaluation.Divergence(model, unseen), bench.Pruner(model, windows)
    assert rows["dense", 0]["kl"] == 0 and rows["dense", 0]["ppl"] == pytest.approx(evaluation.perplexity(model, unseen.flatten(), 128), rel=1e-6)
    pruner.apply(content["found"]["0 UniCuCo, 48 and 14 rounds"]["strategies"]["0.6"][0])
    assert [rows["UniCuCo", 0.6]["kl"], rows["UniCuCo", 0.6]["ppl"]] == list(divergence.measure())
    for task in evaluation.TASKS:
        expected = evaluation.zero_shot(model, tokenizer, task, evaluation.read_rows(tmp_path, task, 3))
        assert rows["UniCuCo", 0.6][task]["acc"] == expected["acc"] == rows["UniCuCo", 0.6][task]["right"].count("1") / 3
    long = {(r["method"], r["sparsity"]): r for r in content["long"]}                        # seed 1: the first two windows of 128
    assert long.keys() == rows.keys() - {("dense", 0)} and all(r["tokens"] == [unseen.numel(), 256] for r in long.values())
    second, _, calibration, _, _ = bench.setting(small, text, None, torch.device("cpu"), torch.float32, 64, 4, 256, 1)
    first, other = evaluation.Divergence(second, unseen[:2]), bench.Pruner(second, calibration)
    other.apply(content["found"]["1 UniCuCo, 48 and 14 rounds"]["strategies"]["0.6"][0])
    row, base = long["UniCuCo", 0.6], long["uniform", 0.6]
    assert [row["kl"][1], row["ppl"][1]] == list(first.measure()) and row["kl"][0] == rows["UniCuCo", 0.6]["kl"]
    ratios = [a / b for a, b in zip(row["kl"], base["kl"])]
    assert row["each_seed"] == {row["text"]: ratios} and (row["ratio"], row["spread"]) == (statistics.mean(ratios), statistics.stdev(ratios))
    assert base["ratio"] == 1 and base["spread"] == 0
    printed = capsys.readouterr().out
    assert "zero-shot accuracy in %, 3, 3, 3, 3, 3 documents" in printed
    percent = rows["uniform", 0.5]["percent"]
    assert f" {percent['lost']:.1f} ± {percent['error']:.1f}" in next(l for l in printed.splitlines() if re.match(r"uniform +0.50 ", l))
    line = next(l for l in printed.splitlines() if l.startswith("At 0.6: UniCuCo's KL over that of EvoPress, 8 each: "))
    ratios = [a / b for a, b in zip(row["kl"], long["EvoPress, 8 each", 0.6]["kl"])]
    assert f" {statistics.mean(ratios):.3f}, ± {statistics.stdev(ratios):.3f} over 2 seeds" in line
    assert call(bench, *words, "--resume") == 0
    again = json.loads((tmp_path / "bench.json").read_text())
    assert again["benchmarks"] == content["benchmarks"] and again["long"] == content["long"] and again["found"] == content["found"]


def test_long_texts_and_tasks_are_for_uniform_and_the_best_of_each_method():
    methods = ("uniform", "UniCuCo", "UniCuCo, constant mean", "EvoPress, 4 each", "EvoPress, 8 each")
    rows = bench.hard_rows({m: {"strategies": {s: [[s], 0.1] for s in bench.QUICK}} for m in methods})
    assert rows == [("dense", 0.0, None)] + [(m, s, [s]) for s in (0.5, 0.6) for m in ("uniform", "UniCuCo", "EvoPress, 8 each")]


def test_how_far_accuracy_lies_below_the_dense_models_is_paired_by_document_worked_by_hand(monkeypatch):
    class State:
        apply, restore = lambda self, x: setattr(self, "right", [1, 0, 0, 1]), lambda self: setattr(self, "right", [1, 1, 0, 1])

    state, gold = State(), [1, 1, 1, 1]
    monkeypatch.setattr(bench, "long_text", lambda *a: [{"method": "dense"}, {"method": "M"}])
    monkeypatch.setattr(bench, "hard_rows", lambda methods: [("dense", 0.0, None), ("M", 0.5, [0.5])])
    monkeypatch.setattr(bench, "read_rows", lambda folder, task, limit: gold)
    monkeypatch.setattr(bench, "zero_shot", lambda *a: {"acc": sum(state.right) / 4, "acc_norm": None, "predictions": state.right, "gold": gold})
    dense, pruned = bench.benchmarks(lambda key, make: make(), None, None, state, {}, None, None, 4, 0)
    assert dense["percent"]["average"] == 75 and dense["percent"]["lost"] == dense["percent"]["error"] == 0
    assert pruned["piqa"]["right"] == "1001" and pruned["percent"]["average"] == 50 and pruned["percent"]["lost"] == 25
    # the differences 0, 1, 0, 0 have variance 1/4, so 1/16 for their mean; five tasks alike: sqrt(5 / 16) / 5
    assert pruned["percent"]["error"] == pytest.approx(100 * math.sqrt(5 / 16) / 5, rel=1e-12)


def test_a_difference_within_the_spread_of_seeds_is_called_a_tie():
    def row(*ratios):
        return {"method": "M", "each_seed": {"a": [2 * r for r in ratios], "b": [r / 2 for r in ratios]}}     # geometric mean over texts: r

    one = row(1, 1, 1)
    assert bench.compared(row(0.9, 0.9, 1.1), one) == "M's KL over that of M: 0.967, ± 0.115 over 3 seeds: a tie."
    assert bench.compared(row(0.8, 0.9, 0.85), one).endswith("0.850, ± 0.050 over 3 seeds: ahead.")
    assert bench.compared(row(1.1, 1.2, 1.15), one).endswith("± 0.050 over 3 seeds: behind.")
    assert bench.compared(row(0.9), row(1)).endswith("0.900, one seed says nothing about its spread.")


def test_seconds_are_medians_so_one_search_beside_other_work_changes_nothing():
    def seed(calibration, *seconds):
        method = {"shared": 2.0, "evaluations": (0.0, 10.0), "seconds": dict(zip(bench.QUICK, seconds))}
        return {"tests": {"t": 8}, "calibration": calibration, "methods": {"uniform": method},
                "judged": {"uniform": {s: {"t": [1.0, 2.0]} for s in (*bench.QUICK, *bench.ENDS)}}}

    row, = bench.table([seed(1, 5, 5, 900, 5, 4), seed(3, 5, 6, 4, 5, 5), seed(2, 4, 5, 7, 5, 6)], 64, bench.QUICK, 100)
    assert (row["seconds_shared"], row["seconds_per_request"], row["seconds"]) == (4, 5, 324)      # by hand
    assert (row["evaluations"], row["tokens"], row["ratio"], row["spread"]) == (640, 64000, {"t": 1}, {"t": 0})
    row, = bench.table([seed(1, 5, 6, 10, 2, 12)], 3, (0.2, *bench.QUICK, 0.75), 100)              # all served: their mean, times 3
    assert (row["seconds_shared"], row["seconds_per_request"], row["seconds"]) == (3, 7, 24)


def test_a_ruined_model_counts_as_100_nats_in_kl_and_perplexity_alike():
    class Measured:
        def __init__(self, *values):
            self.measure = lambda: values

    assert bench.outcome(Measured(0.5, 20.0)) == [0.5, 20.0]
    for broken in (math.nan, math.inf):
        assert bench.outcome(Measured(broken, broken)) == [100, math.exp(100)]


def test_slopes_are_those_of_log_seconds_over_log_size(monkeypatch):
    calls = []
    monkeypatch.setattr(stages, "race", lambda work, repeats: calls.append(work) or [float(2 ** (len(calls) % 4 * 2))])      # 4 times for each doubling
    monkeypatch.setattr(stages, "Divergence", lambda model, windows: None)
    rows = stages.slopes()
    assert len(calls) == 4 * len(rows) and all(r["sizes"][1] == 2 * r["sizes"][0] for r in rows)
    assert all(len(r["seconds"]) == 4 and r["slope"] == pytest.approx(statistics.linear_regression(
        [math.log(n) for n in r["sizes"]], [math.log(t) for t in r["seconds"]]).slope, rel=1e-9) for r in rows)


def test_sequential_calibration_is_compared_with_the_default_on_the_same_masks_counts(small, text, tmp_path, capsys):
    assert call(bench, *options(small, text, tmp_path), "--sequential") == 0
    rows = json.loads((tmp_path / "sequential.json").read_text())["rows"]
    assert [r["sparsity"] for r in rows] == list(bench.QUICK) and len(capsys.readouterr().out.splitlines()) == 2 + 5 + 1
    assert all(0 < r["kl"] < 20 and 0 < r["sequential_kl"] < 20 and r["kl"] != r["sequential_kl"] for r in rows)


def test_full_serves_every_request_and_extrapolates_nothing(small, text, tmp_path, short, capsys):
    assert call(bench, *options(small, text, tmp_path), "--budget", 8, "--requests", 2, "--full") == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert {0.2, 0.75} <= set(result["inputs"]["served"]) and not any(r["extrapolated"] for r in result["table"])
    assert all(v is None for r in result["table"] for v in r["spread"].values())             # one seed has no spread
    assert "All were served and measured" in capsys.readouterr().out


def test_stages_are_timed_against_their_floors_and_leave_the_model_as_it_was(small, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "botorch", None)                      # as where it is not installed
    monkeypatch.setattr(bench, "slopes", lambda: [])
    threads = torch.get_num_threads()
    assert call(bench, *options(small, text, tmp_path), "--stages") == 0
    rows = json.loads((tmp_path / "stages.json").read_text())["rows"]
    assert {"rank one block", "64 masks from one ranking", "one evaluation of f2", "unpack one matrix, 1 thread"} <= {r["stage"] for r in rows}
    assert all(r["ratio"] > 0 and r["seconds"] > 0 and math.isfinite(r["ratio"]) for r in rows if "memory" not in r["stage"])
    assert all(0 <= r["ratio"] < 1000 for r in rows if "memory" in r["stage"])              # MB
    assert torch.get_num_threads() == threads and "not measured, pip install botorch" in capsys.readouterr().out


def test_the_gp_fits_as_well_as_botorchs(monkeypatch):
    pytest.importorskip("botorch")
    rows = []
    monkeypatch.setattr(stages, "race", lambda *functions, repeats=5: [f() and 1.0 or 1.0 for f in functions])        # once each, not timed
    stages.gp_stages(lambda *row: rows.append(row))
    theirs, ours = map(float, re.search(r"likelihood ([\d.-]+) / ([\d.-]+)", rows[0][1]).groups())
    assert len(rows) == 2 and ours > theirs - 0.5                          # nats, of 200 values; no priors on either side


@pytest.mark.parametrize("module,words", [
    (bench, ("--budget", 4)), (bench, ("--requests", 0)), (bench, ("--seeds", "x")), (bench, ("--model", "nowhere")), (bench, ("--nonsense",)),
    (bench, ("--data", "nowhere.txt")), (plot, ("--run", "nowhere"))])
def test_bad_arguments_give_one_line_and_exit_code_2(module, words, capsys):
    assert call(module, *words) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1 and captured.err.startswith(module.__name__ + ".py: ")


# ----------------------------------------------------------------------------------------------------------------- figures
def test_figures_are_drawn_of_what_a_run_wrote_and_are_the_same_bytes_twice(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    x = unicuco.first_design(12, 4, torch.Generator().manual_seed(0))
    measured = [{"round": i // 6, "strategy": s.tolist(), "predicted": (float((s ** 2).sum()) * 1.1) if i >= 6 else None, "measured": float((s ** 2).sum())}
                for i, s in enumerate(x)]
    y = torch.tensor([math.log(e["measured"]) for e in measured], dtype=torch.float64)
    unicuco.save_stratnet(tmp_path / "stratnet.safetensors", unicuco.StratNet(4), unicuco.Scale.of(y), x, y, {"mean": "blocks"})
    rows = [{"method": m, "sparsity": s, "counted": s, "kl": s ** 2, "ppl": 9.0, "test": "text"} for s in (0.3, 0.5, 0.7) for m in ("uniform", "unicuco")]
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert call(plot, "--run", tmp_path, "--out", tmp_path / "first") == 0
    assert "wrote blocks, front, prediction (png, svg)" in capsys.readouterr().out           # no bench.json, no bars
    table = [{"method": m, "seconds": 9.0 * i, "seconds_shared": 1.0, "extrapolated": i > 1} for i, m in enumerate(("uniform", "UniCuCo", "EvoPress"))]
    (tmp_path / "bench.json").write_text(json.dumps({"requests": 64, "table": table}))
    assert call(plot, "--run", tmp_path) == 0
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("first", "figures"))
    assert set(second) == {f"{n}.{kind}" for n in ("blocks", "front", "prediction", "bars") for kind in ("png", "svg")}
    assert all(second[name] == data for name, data in first.items()) and all(len(data) > 5000 for data in second.values())
    (tmp_path / "measured.json").write_text(json.dumps(measured[:6]))                        # --rounds 0: nothing was ever predicted
    assert call(plot, "--run", tmp_path, "--out", tmp_path / "early") == 0
    assert {p.stem for p in (tmp_path / "early").iterdir()} == {"blocks", "front", "bars"}
