"""
The comparison that the paper claims: many requests, served by UniCuCo and by searches that start anew for each.

Source    the comparison of UniCuCo (arXiv 2505.12216): 64 requests; methods as in baselines.py.
Reading   after baselines.py.
Laptop    python bench.py                          (3 minutes; ends with the speed at equal quality)
Full      python bench.py --model DIR --data c4.jsonl --test wiki.test.raw --budget 104 --seeds 3 --constant
"""
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from baselines import evopress, gp_search, outlier_shares, owl_best, uniform
from eval import Divergence, sha256
from llama import Parser, add_model, choose_device, run, weight_files
from prune import Pruner, setting, write_text
from train import search
from unicuco import strategy_for

QUICK = (0.3, 0.4, 0.5, 0.6, 0.7)                       # requests that a baseline is measured on, unless --full
PERPLEXITIES = (0.5, 0.6, 0.7)


class Counter:
    """f2 that counts the tokens it was measured on; `share`: how many times fewer tokens than all search tokens."""

    def __init__(self, pruner, divergence, bar, share=1):
        self.pruner, self.divergence, self.bar, self.share, self.tokens = pruner, divergence, bar, share, 0

    def __call__(self, strategy):
        self.pruner.apply(strategy)
        self.tokens += self.divergence.windows.numel()
        self.bar.update(1 / self.share)
        return self.divergence()


def serve(pruner, divergence, quick, shares, requests, budget, seed, constant, bar):
    """Every method's strategies for `requests` -> {method: {"shared": s, "evaluations", "strategies": {sparsity: (strategy, seconds)}}}.

    shared        seconds spent once for all requests (calibration is the caller's, and the same for all)
    evaluations   of f2, in units of all search tokens: (shared, per request)
    """
    blocks, counted = len(pruner.live), pruner.sparsity
    f2, part = Counter(pruner, divergence, bar), Counter(pruner, quick, bar, divergence.windows.numel() / quick.windows.numel())
    tokens, methods = divergence.windows.numel(), {}

    def spent():
        return (f2.tokens + part.tokens) / tokens

    def each(strategy_of, shared=0.0, shared_evaluations=0.0):
        served, before = {}, spent()
        for s in requests:
            started = time.perf_counter()
            strategy = strategy_of(s)
            pruner.apply(strategy)
            served[s] = strategy, time.perf_counter() - started
        return {"shared": shared, "evaluations": (shared_evaluations, (spent() - before) / len(requests)), "strategies": served}

    methods["uniform"] = each(lambda s: uniform(blocks, s))
    methods["OWL, best of 12"] = each(lambda s: owl_best(shares, s, counted, f2))
    for mean in ("blocks", "constant") if constant else ("blocks",):
        started, before = time.perf_counter(), spent()
        net, *_ = search(lambda batch: [f2(x) for x in batch], blocks, mean=mean, seed=seed)
        name = "UniCuCo" if mean == "blocks" else "UniCuCo, constant mean"
        methods[name] = each(lambda s: strategy_for(net, s, counted), time.perf_counter() - started, spent() - before)
    methods["GP per request"] = each(lambda s: gp_search(f2, s, blocks, counted, budget // 2, seed))
    methods["GP per request"]["evaluations"] = (0.0, float(budget // 2))
    budgets = sorted({budget // 8, budget // 4, budget // 2, budget} - {0})
    found = {s: evopress(f2, part, s, blocks, counted, budget, seed, snapshots=budgets) for s in requests}
    for b in budgets:
        methods[f"EvoPress, {b} each"] = {"shared": 0.0, "evaluations": (0.0, float(b)), "strategies": {s: found[s][b] for s in requests}}
    return methods


def judge(methods, pruner, tests, bar):
    """KL and perplexity of every strategy on every test text: {method: {sparsity: {"counted", test: [kl, ppl]}}}."""
    pruner.restore()
    references = {name: Divergence(pruner.model, windows) for name, windows in tests.items()}
    judged = {}
    for method, m in methods.items():
        judged[method] = {}
        for s, (strategy, _) in m["strategies"].items():
            pruner.apply(strategy)
            judged[method][s] = {"counted": pruner.sparsity(strategy), **{name: d.measure() for name, d in references.items()}}
            bar.update()
    pruner.restore()
    return judged


def one_seed(a, seed, device, dtype, requests):
    """Everything for one seed: windows, ranks, searches and measurements."""
    model, tokenizer, windows, search_windows, held_out = setting(
        a.model, a.data, a.test, device, dtype, a.seqlen, a.calibration, a.tokens, seed)
    tests = {name: w[:max(1, a.test_tokens // w.shape[1])] for name, w in held_out.items()}
    started = time.perf_counter()
    divergence, quick = Divergence(model, search_windows), Divergence(model, search_windows[:max(1, len(search_windows) // 4)])
    pruner = Pruner(model, windows)
    calibration = time.perf_counter() - started
    plain = Pruner(model, windows, "magnitude") if a.magnitude else None
    total = (12 + a.budget // 2 + a.budget) * len(requests) + 104 * (1 + a.constant)
    with tqdm(total=total, desc=f"seed {seed}, evaluations of f2", disable=None, bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]") as bar:
        methods = serve(pruner, divergence, quick, outlier_shares(model, windows), requests, a.budget, seed, a.constant, bar)
    with tqdm(total=len(methods) * len(requests), desc=f"seed {seed}, unseen text", disable=None) as bar:
        judged = judge(methods, pruner, tests, bar)
        if plain:
            methods["magnitude, uniform"] = methods["uniform"]
            judged["magnitude, uniform"] = judge({"magnitude, uniform": methods["uniform"]}, plain, tests, bar)["magnitude, uniform"]
    return {"seed": seed, "calibration": calibration, "tests": {name: w.numel() for name, w in tests.items()}, "judged": judged,
            "methods": {name: {"shared": m["shared"], "evaluations": m["evaluations"],
                               "strategies": {s: x.tolist() for s, (x, _) in m["strategies"].items()},
                               "seconds": {s: t for s, (_, t) in m["strategies"].items()}} for name, m in methods.items()}}


def table(seeds, requests, served, tokens):
    """Rows of the comparison, over all seeds and test texts; `requests` are asked, of which `served` were measured."""
    rows, test_names = [], list(seeds[0]["tests"])
    for method in seeds[0]["judged"]:
        def ratios(seed, test):
            j = seed["judged"]
            return [j[method][s][test][0] / j["uniform"][s][test][0] for s in served]

        mean = [[statistics.geometric_mean(ratios(seed, t)) for seed in seeds] for t in test_names]
        per_request = statistics.mean(t for seed in seeds for t in seed["methods"][method]["seconds"].values())
        shared = statistics.mean(seed["calibration"] + seed["methods"][method]["shared"] for seed in seeds)
        fixed, each = (statistics.mean(seed["methods"][method]["evaluations"][i] for seed in seeds) for i in (0, 1))
        rows.append({
            "method": method, "evaluations": fixed + each * requests, "tokens": round((fixed + each * requests) * tokens),
            "seconds": shared + per_request * requests, "seconds_shared": shared, "seconds_per_request": per_request,
            "extrapolated": len(served) < requests and method not in ("uniform", "UniCuCo", "UniCuCo, constant mean", "magnitude, uniform"),
            "ratio": {t: statistics.mean(m) for t, m in zip(test_names, mean)},
            "spread": {t: statistics.stdev(m) if len(m) > 1 else None for t, m in zip(test_names, mean)},
            "worst": {t: max(r for seed in seeds for r in ratios(seed, t)) for t in test_names},
            "perplexity": {t: {s: statistics.mean(seed["judged"][method][s][t][1] for seed in seeds) for s in PERPLEXITIES} for t in test_names}})
    return rows


def show(rows, seeds, requests, served):
    print(f"\n{requests} requests from 0.2 to 0.75; {len(served)} of them measured per method, {len(seeds)} seed{'s' * (len(seeds) > 1)}. "
          + ("All were served." if len(served) >= requests else f"(*) extrapolated: seconds and evaluations per request, times {requests}."))
    for test, count in seeds[0]["tests"].items():
        print(f"\n{test}, {count} tokens that no choice ever saw; KL as a ratio to uniform's at equal counted sparsity, "
              f"geometric mean over {served[0]:g} to {served[-1]:g}")
        print(f"{'method':<24} {'evaluations':>11} {'seconds':>10} {'shared':>8} {'each':>8}   KL ratio  ± seeds   worst   perplexity at "
              + ", ".join(map(str, PERPLEXITIES)))
        for r in rows:
            spread = "      -" if r["spread"][test] is None else f"{r['spread'][test]:7.3f}"
            print(f"{r['method']:<24} {r['evaluations']:>10.0f}{'*' if r['extrapolated'] else ' '} {r['seconds']:>9.1f}{'*' if r['extrapolated'] else ' '} "
                  f"{r['seconds_shared']:8.1f} {r['seconds_per_request']:8.2f}   {r['ratio'][test]:8.3f}  {spread} {r['worst'][test]:7.3f}   "
                  + "  ".join(f"{p:8.2f}" for p in r["perplexity"][test].values()))
    ours = next(r for r in rows if r["method"] == "UniCuCo")
    theirs = [r for r in rows if r["method"].startswith("EvoPress")]
    print(f"\nUniCuCo serves {requests} requests {theirs[-1]['seconds'] / ours['seconds']:.0f} times faster than {theirs[-1]['method']} (follows from the budgets).")
    mean = lambda r: statistics.geometric_mean(r["ratio"].values())
    equal = next((r for r in theirs if mean(r) <= mean(ours)), None)
    if equal:
        print(f"At equal quality, against {equal['method']} (KL ratio {mean(equal):.3f}, UniCuCo {mean(ours):.3f}): {equal['seconds'] / ours['seconds']:.1f} times faster.")
    else:
        print(f"At equal quality: no EvoPress budget up to {theirs[-1]['method'].split()[1]} reaches UniCuCo's KL ratio of {mean(ours):.3f} (its best: "
              f"{min(map(mean, theirs)):.3f}), so more than {theirs[-1]['seconds'] / ours['seconds']:.0f} times faster.")


def main():
    p = Parser(__doc__, ["python bench.py", "python bench.py --full", "python bench.py --model DIR --data c4.jsonl --test wiki.test.raw --budget 104 --seeds 3"])
    add_model(p)
    p.add_argument("--data", type=Path, metavar="FILE", help="text for calibration and search (default: the embedded default text)")
    p.add_argument("--test", type=Path, nargs="+", metavar="FILE", help="unseen texts (default: held-out part of --data)")
    p.add_argument("--requests", type=int, default=64, metavar="N", help="how many are asked (64)")
    p.add_argument("--budget", type=int, default=20, metavar="N", help="evaluations that EvoPress may spend on each request (20)")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (1)")
    p.add_argument("--full", action="store_true", help="serve and measure every request with every method")
    p.add_argument("--constant", action="store_true", help="also UniCuCo with the plain constant mean")
    p.add_argument("--magnitude", action="store_true", help="also magnitude pruning instead of Wanda")
    p.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens of one evaluation of f2 (2048)")
    p.add_argument("--calibration", type=int, default=32, metavar="N", help="calibration windows (32)")
    p.add_argument("--test-tokens", type=int, default=8192, metavar="N", help="tokens of each unseen text (8192)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window (default: the model's positions, at most 512)")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: out/<model>")
    a = p.parse_args()
    if min(a.requests, a.seeds, a.tokens, a.calibration, a.test_tokens) < 1 or a.budget < 8:
        raise ValueError("counts must be at least 1, --budget at least 8")
    device, dtype, reason = choose_device(a.device, a.dtype)
    name, started = a.model.resolve().name, time.perf_counter()
    out = a.out or Path("out") / name
    served = sorted({*QUICK, *(round(0.2 + 0.55 * i / max(a.requests - 1, 1), 4) for i in range(a.requests))}) if a.full else list(QUICK)
    inputs = {"model": name, "weights": [sha256(f) for f in weight_files(a.model)], "data": a.data.name if a.data else "stdlib",
              "sha256": sha256(a.data) if a.data else None, "tests": {t.name: sha256(t) for t in a.test or []}, "budget": a.budget,
              "tokens": a.tokens, "calibration": a.calibration, "device": str(device), "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
    print(f"{name} on {device}, {str(dtype)[6:]} ({reason}), {torch.get_num_threads()} threads")
    seeds = []
    for seed in range(a.seeds):
        seeds.append(one_seed(a, seed, device, dtype, served))
        rows = table(seeds, a.requests, served, a.tokens)
        write_text(out / "bench.json", json.dumps({"inputs": inputs, "requests": a.requests, "served": served, "table": rows, "seeds": seeds}, indent=1) + "\n")
    show(rows, seeds, a.requests, served)
    print(f"{time.perf_counter() - started:.0f} s; wrote {out / 'bench.json'}")


if __name__ == "__main__":
    run(main)
