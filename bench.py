"""
The comparison that the paper claims: many requests, served by UniCuCo and by searches that start anew for each.

Source    the comparison of UniCuCo (arXiv 2505.12216): 64 requests; methods as in baselines.py.
Reading   after stages.py.
Laptop    python bench.py                          (3 minutes; ends with the speed at equal quality)
          python bench.py --stages                 (1 minute; every stage against its floor, one ratio each)
Full      python bench.py --model DIR --data c4.jsonl --test wiki.test.raw --budget 104 --seeds 3 --resume
"""
import hashlib
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from baselines import evopress, gp_search, outlier_shares, owl_best, uniform
from eval import TASKS, Divergence, cut, read_rows, sha256, standard_error, zero_shot
from llama import Parser, add_model, choose_device, read_json, run, weight_files
from outputs import write_json
from prune import Pruner, setting
from stages import sequential, slopes, stages
from train import search
from unicuco import DIVERGENCES, finite, strategy_for

QUICK = (0.3, 0.4, 0.5, 0.6, 0.7)                       # requests that a baseline is measured on, unless --full
HARD = (0.5, 0.6)                                       # requests whose strategies are read a whole text and asked zero-shot tasks
LONG = 65536                                            # tokens of that text that they are read for seeds after the first
ENDS = (0.2, 0.75)                                      # what costs no search is measured there too
PERPLEXITIES = (0.5, 0.6, 0.7)
METHODS = {"owl": "OWL, best of 12", "unicuco": "UniCuCo", "constant": "UniCuCo, constant mean", "gp": "GP per request", "evopress": "EvoPress",
           "magnitude": "magnitude, uniform"}
SHARED = ("uniform", "UniCuCo", "UniCuCo, constant mean", "magnitude, uniform")     # what 64 requests cost no more searches than one


class Counter:
    """f2 that counts the tokens it was measured on; `share`: how many times fewer tokens than all search tokens."""

    def __init__(self, pruner, divergence, bar, share=1):
        self.pruner, self.divergence, self.bar, self.share, self.tokens = pruner, divergence, bar, share, 0

    def __call__(self, strategy):
        self.pruner.apply(strategy)
        self.tokens += self.divergence.windows.numel()
        self.bar.update(1 / self.share)
        return finite(self.divergence())


class Memory:
    """Every search and every measurement of a comparison, on disk the moment it is done: a killed run goes on with --resume."""

    def __init__(self, path, inputs, resume):
        self.path, self.content = path, {"inputs": inputs, "found": {}}
        if resume and path.exists():
            self.content = {"found": {}, **read_json(path)}
            earlier = self.content.get("inputs") or {}
            changed = [key for key in inputs if earlier.get(key) != inputs[key]]
            if changed:
                raise ValueError(f"{path} holds a comparison with another {changed[0]}: {earlier.get(changed[0])!r}, now {inputs[changed[0]]!r}")

    def __call__(self, key, make):
        """The value of `key`, JSON, from the file or by calling `make` once."""
        if key not in self.content["found"]:
            self.content["found"][key] = make()
            self.write()
        return self.content["found"][key]

    def write(self, **more):
        self.content.update(more)
        write_json(self.path, self.content)


def serve(memory, pruner, divergence, quick, shares, requests, names, budget, initial, rounds, seed, bar):
    """The strategies of uniform and of the methods `names` for `requests`: {method: {"shared", "evaluations", "strategies": {request:
    [strategy, seconds]}}}.

    shared        seconds spent once for all requests (calibration is the caller's, and the same for all)
    evaluations   of f2, in units of all search tokens: (shared, per request)
    """
    blocks, counted, tokens = len(pruner.live), pruner.sparsity, divergence.windows.numel()
    everywhere = sorted({*requests, *ENDS})
    f2, part = Counter(pruner, divergence, bar), Counter(pruner, quick, bar, tokens / quick.windows.numel())

    def timed(strategy_of, s):
        started, before = time.perf_counter(), f2.tokens + part.tokens
        strategy = strategy_of(s)
        pruner.apply(strategy)
        return [strategy.tolist(), time.perf_counter() - started, (f2.tokens + part.tokens - before) / tokens]

    def each(name, strategy_of, requests=requests):
        found = {s: memory(f"{seed} {name} {s}", lambda: timed(strategy_of, s)) for s in requests}
        return {"shared": 0.0, "evaluations": (0.0, statistics.mean(e for *_, e in found.values())), "strategies": {s: f[:2] for s, f in found.items()}}

    def learned(mean):
        started, before = time.perf_counter(), f2.tokens
        net, *_ = search(lambda batch: [f2(x) for x in batch], blocks, initial=initial, rounds=rounds, mean=mean, seed=seed)
        shared, evaluations = time.perf_counter() - started, (f2.tokens - before) / tokens
        return {"shared": shared, "evaluations": (evaluations, 0.0), "strategies": {str(s): timed(lambda s: strategy_for(net, s, counted), s)[:2] for s in everywhere}}

    methods = {"uniform": each("uniform", lambda s: uniform(blocks, s), everywhere)}
    for key in names:
        name = METHODS[key]
        if key == "owl":
            methods[name] = each(name, lambda s: owl_best(shares, s, counted, f2))
        elif key == "gp":
            methods[name] = each(name, lambda s: gp_search(f2, s, blocks, counted, budget // 2, seed))
        elif key == "evopress":
            budgets = sorted({budget // 8, budget // 4, budget // 2, budget} - {0})
            found = {s: memory(f"{seed} {name} {s}", lambda: {str(b): [x.tolist(), t] for b, (x, t) in evopress(
                f2, part, s, blocks, counted, budget, seed, snapshots=budgets).items()}) for s in requests}
            for b in budgets:
                methods[f"{name}, {b} each"] = {"shared": 0.0, "evaluations": (0.0, float(b)), "strategies": {s: found[s][str(b)] for s in requests}}
        elif key != "magnitude":
            made = memory(f"{seed} {name}, {initial} and {rounds} rounds", lambda: learned({"unicuco": "blocks"}.get(key, key)))
            methods[name] = {**made, "strategies": {s: made["strategies"][str(s)] for s in everywhere}}
    return methods


def mark(strategy):
    """Eight letters for a strategy: what was measured is remembered for it alone."""
    return hashlib.sha256(repr(strategy).encode()).hexdigest()[:8]


def outcome(divergence):
    """[KL, perplexity] of the model as it is now; of a ruined one 100 nats and exp(100)."""
    kl, ppl = divergence.measure()
    return [finite(kl), ppl if math.isfinite(ppl) else math.exp(DIVERGENCES[1])]


def judge(memory, methods, pruner, tests, seed, bar):
    """KL and perplexity of every strategy on every test text: {method: {request: {"counted", test: [kl, ppl]}}}."""
    pruner.restore()
    references = {name: Divergence(pruner.model, windows) for name, windows in tests.items()}
    count = sum(w.numel() for w in tests.values())

    def measured(strategy):
        pruner.apply(strategy)
        return {"counted": pruner.sparsity(strategy), **{name: outcome(d) for name, d in references.items()}}

    judged = {}
    for method, m in methods.items():
        for s, (strategy, _) in m["strategies"].items():
            judged.setdefault(method, {})[s] = memory(f"{seed} {method} {s} {mark(strategy)} on {count} tokens", lambda: measured(strategy))
            bar.update()
    pruner.restore()
    return judged


def hard_rows(methods):
    """What is read long texts and asked tasks, (method, sparsity, strategy): the dense model (None), then the methods at sparsities HARD, but
    for EvoPress's smaller budgets and the constant mean."""
    left_out = [m for m in methods if m.startswith("EvoPress")][:-1] + [METHODS["constant"]]
    return [("dense", 0.0, None)] + [(m, s, methods[m]["strategies"][s][0]) for s in HARD for m in methods if m not in left_out]


def long_text(memory, pruner, methods, held_out, seed, tokens=None):
    """KL and perplexity of `hard_rows` on the first test text (its first `tokens` if given), in windows as long as the model takes, at most
    2048: rows {"method", "sparsity", "text", "tokens", "kl", "ppl"}."""
    text, windows = next(iter(held_out.items()))
    windows, references = cut(windows.flatten()[:tokens], min(2048, pruner.model.config.max_position_embeddings)), []

    def read(strategy):
        if not references:                                  # the dense model is run first; a resumed comparison may not need it
            pruner.restore()
            references.append(Divergence(pruner.model, windows))
        pruner.restore() if strategy is None else pruner.apply(strategy)
        return outcome(references[0])

    rows = []
    for method, s, strategy in tqdm(hard_rows(methods), desc=f"seed {seed}, {windows.numel()} tokens", disable=None):
        kl, ppl = memory(f"{seed} {method} {s} {mark(strategy)} on {windows.numel()} tokens of {text}", lambda: read(strategy))
        rows.append({"method": method, "sparsity": s, "text": text, "tokens": windows.numel(), "kl": kl, "ppl": ppl})
    pruner.restore()
    return rows


def benchmarks(memory, model, tokenizer, pruner, methods, held_out, folder, limit, seed):
    """`long_text` of all of the first test text, each row with zero-shot accuracies too: {..., task: {"acc", "acc_norm", "right": "0110..."},
    "percent": {task: acc, "average", "lost": average of the dense model minus this one, "error": its standard error, paired by document}}."""
    rows = {task: read_rows(folder, task, limit) for task in TASKS}

    def answer(strategy, task):
        pruner.restore() if strategy is None else pruner.apply(strategy)
        r = zero_shot(model, tokenizer, task, rows[task])
        return {"acc": r["acc"], "acc_norm": r["acc_norm"], "right": "".join("01"[p == g] for p, g in zip(r["predictions"], r["gold"]))}

    table = long_text(memory, pruner, methods, held_out, seed)
    for r, (method, s, strategy) in zip(table, tqdm(hard_rows(methods), desc="zero-shot tasks", disable=None)):
        for task in TASKS:
            r[task] = memory(f"{seed} {method} {s} {mark(strategy)} on {len(rows[task])} documents of {task}", lambda: answer(strategy, task))
    pruner.restore()
    right = [{task: np.array(list(r[task]["right"]), int) for task in TASKS} for r in table]
    for r, own in zip(table, right):
        lost = [right[0][task] - own[task] for task in TASKS]                                   # by the same documents, of the dense model's
        r["percent"] = {task: 100 * r[task]["acc"] for task in TASKS} | {
            "average": 100 * statistics.mean(r[task]["acc"] for task in TASKS), "lost": 100 * statistics.mean(float(x.mean()) for x in lost),
            "error": 100 * math.sqrt(sum(standard_error(x) ** 2 for x in lost)) / len(TASKS)}
    return table


def show_benchmarks(table):
    """Print accuracies in percent, their average, and how far it lies below the dense model's, with a standard error."""
    print(f"\n{table[0]['text']}, {table[0]['tokens']} tokens; zero-shot accuracy in %, {', '.join(str(len(table[0][task]['right'])) for task in TASKS)} documents\n"
          f"{'method':<24} sparsity       KL  perplexity   " + "".join(f"{task:>14}" for task in TASKS) + "   average   below dense")
    for r in table:
        *shares, lost, error = r["percent"].values()
        print(f"{r['method']:<24} {r['sparsity']:8.2f} {r['kl']:8.4f} {r['ppl']:11.3f}   " + "".join(f"{x:14.1f}" for x in shares[:-1])
              + f"{shares[-1]:10.1f}   {lost:.1f} ± {error:.1f}")


def over_seeds(seeds):
    """Rows of `long_text`, a list for each seed, joined, without the dense model: {"method", "sparsity", "text", "tokens", "kl", "ppl": each
    seed's, "ratio": mean over seeds of KL over uniform's in the same seed, "spread", "each_seed": {text: ratios}, as in `table`}."""
    joined = []
    for group in zip(*seeds):
        method, s, text = (group[0][key] for key in ("method", "sparsity", "text"))
        if method == "dense":
            continue
        base = [next(r["kl"] for r in rows if (r["method"], r["sparsity"]) == ("uniform", s)) for rows in seeds]
        ratios = [r["kl"] / kl for r, kl in zip(group, base)]
        joined.append({"method": method, "sparsity": s, "text": text, **{key: [r[key] for r in group] for key in ("tokens", "kl", "ppl")},
                       "ratio": statistics.mean(ratios), "spread": statistics.stdev(ratios) if len(ratios) > 1 else None, "each_seed": {text: ratios}})
    return joined


def show_long(rows):
    """Print KL ratios to uniform over seeds, every seed's perplexity, and UniCuCo beside EvoPress at each sparsity."""
    print(f"\n{rows[0]['text']}, {', '.join(map(str, rows[0]['tokens']))} tokens for seeds 0 to {len(rows[0]['tokens']) - 1}; KL as a ratio to uniform's\n"
          f"{'method':<24} sparsity  KL ratio  ± seeds   perplexity of each seed")
    for r in rows:
        spread = "-" if r["spread"] is None else f"{r['spread']:.3f}"
        print(f"{r['method']:<24} {r['sparsity']:8.2f}  {r['ratio']:8.3f}  {spread:>7}   " + "  ".join(f"{x:8.2f}" for x in r["ppl"]))
    for s in HARD:
        ours, theirs = ([r for r in rows if r["sparsity"] == s and r["method"].startswith(m)] for m in ("UniCuCo", "EvoPress"))
        if ours and theirs:
            print(f"At {s}: {compared(ours[0], theirs[-1])}")


def one_seed(memory, a, seed, device, dtype, requests):
    """Everything for one seed: windows, ranks, searches and measurements."""
    model, tokenizer, windows, search_windows, held_out = setting(
        a.model, a.data, a.test, device, dtype, a.seqlen, a.calibration, a.tokens, seed)
    tests = {name: w[:max(1, a.test_tokens // w.shape[1])] for name, w in held_out.items()}
    started = time.perf_counter()
    divergence, quick = Divergence(model, search_windows), Divergence(model, search_windows[:max(1, len(search_windows) // 4)])
    pruner = Pruner(model, windows)
    calibration = memory(f"{seed} calibration", lambda: time.perf_counter() - started)
    costs = {"owl": 12, "gp": a.budget // 2, "evopress": a.budget}
    learned = (a.initial + 4 * a.rounds) * len({"unicuco", "constant"} & set(a.methods))
    total = sum(costs.get(m, 0) for m in a.methods) * len(requests) + learned
    with tqdm(total=total, desc=f"seed {seed}, evaluations of f2", disable=None, bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]") as bar:
        methods = serve(memory, pruner, divergence, quick, outlier_shares(model, windows) if "owl" in a.methods else None, requests,
                        a.methods, a.budget, a.initial, a.rounds, seed, bar)
    if a.tasks and seed == 0:
        memory.write(benchmarks=benchmarks(memory, model, tokenizer, pruner, methods, held_out, a.tasks, a.limit, seed))
        long = memory.content["benchmarks"]                 # all of the text
    else:
        long = long_text(memory, pruner, methods, held_out, seed, LONG) if a.tasks else []
    with tqdm(total=sum(len(m["strategies"]) for m in methods.values()), desc=f"seed {seed}, unseen text", disable=None) as bar:
        judged = judge(memory, methods, pruner, tests, seed, bar)
        if "magnitude" in a.methods:
            name = METHODS["magnitude"]
            methods[name] = methods["uniform"]
            judged |= judge(memory, {name: methods["uniform"]}, Pruner(model, windows, "magnitude"), tests, seed, bar)
    return {"seed": seed, "calibration": calibration, "tests": {name: w.numel() for name, w in tests.items()}, "judged": judged, "long": long,
            "methods": {name: {"shared": m["shared"], "evaluations": m["evaluations"], "strategies": {s: x for s, (x, _) in m["strategies"].items()},
                               "seconds": {s: t for s, (_, t) in m["strategies"].items()}} for name, m in methods.items()}}


def extrapolates(served):
    """Without --full only QUICK is served, and what one request cost is multiplied."""
    return list(served) == list(QUICK)


def table(seeds, requests, served, tokens):
    """Rows of the comparison, over all seeds and test texts; `requests` are asked, of which `served` were measured."""
    rows, test_names = [], list(seeds[0]["tests"])
    # when seconds are extrapolated, a search that was disturbed by other work must not be multiplied
    typical = statistics.median if extrapolates(served) else statistics.mean
    for method in seeds[0]["judged"]:
        def each_seed(test):                                # [{request: KL ratio to uniform}]
            return [{s: j[method][s][test][0] / j["uniform"][s][test][0] for s in j[method]} for j in (seed["judged"] for seed in seeds)]

        def each_request(test):
            return {s: statistics.geometric_mean(per[s] for per in each_seed(test)) for s in each_seed(test)[0]}

        mean = [[statistics.geometric_mean(per[s] for s in served) for per in each_seed(t)] for t in test_names]
        per_request = typical(t for seed in seeds for t in seed["methods"][method]["seconds"].values())
        shared = typical(seed["calibration"] + seed["methods"][method]["shared"] for seed in seeds)
        fixed, each = (statistics.mean(seed["methods"][method]["evaluations"][i] for seed in seeds) for i in (0, 1))
        rows.append({
            "method": method, "evaluations": fixed + each * requests, "tokens": round((fixed + each * requests) * tokens),
            "seconds": shared + per_request * requests, "seconds_shared": shared, "seconds_per_request": per_request,
            "extrapolated": extrapolates(served) and method not in SHARED,
            "ratio": {t: statistics.mean(m) for t, m in zip(test_names, mean)},
            "spread": {t: statistics.stdev(m) if len(m) > 1 else None for t, m in zip(test_names, mean)}, "each_seed": dict(zip(test_names, mean)),
            "at": {t: each_request(t) for t in test_names}, "worst": {t: max(r for per in each_seed(t) for r in per.values()) for t in test_names},
            "perplexity": {t: {s: statistics.mean(seed["judged"][method][s][t][1] for seed in seeds) for s in PERPLEXITIES} for t in test_names}})
    return rows


def compared(ours, theirs):
    """One sentence: `ours` over `theirs`, rows of the table, paired by seed, geometric mean over the texts; within the seeds' spread a tie."""
    by_seed = zip(*(np.divide(ours["each_seed"][t], theirs["each_seed"][t]) for t in ours["each_seed"]))
    ratios = [statistics.geometric_mean(per_text) for per_text in by_seed]
    mean, verdict = statistics.mean(ratios), "one seed says nothing about its spread"
    if len(ratios) > 1:
        spread = statistics.stdev(ratios)
        verdict = f"± {spread:.3f} over {len(ratios)} seeds: " + ("a tie" if abs(mean - 1) <= spread else "ahead" if mean < 1 else "behind")
    return f"{ours['method']}'s KL over that of {theirs['method']}: {mean:.3f}, {verdict}."


def show(rows, seeds, requests, served):
    print(f"\n{requests} requests from 0.2 to 0.75, {len(seeds)} seed{'s' * (len(seeds) > 1)}. "
          + (f"{len(served)} sparsities were measured per method; (*) extrapolated: seconds and evaluations per request, times {requests}."
             if extrapolates(served) else "All were served and measured, and 0.3 to 0.7 beside them."))
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
        asked = sorted({s for r in rows for s in r["at"][test]})
        if len(asked) <= len(QUICK) + len(ENDS):
            print("\nKL ratio to uniform at " + "".join(f"{s:8g}" for s in asked))
            for r in rows[1:]:
                print(f"{r['method']:<23}" + "".join(f"{r['at'][test][s]:8.3f}" if s in r["at"][test] else "       -" for s in asked))
    ours = next((r for r in rows if r["method"] == "UniCuCo"), None)
    theirs = [r for r in rows if r["method"].startswith("EvoPress")]
    if not (ours and theirs):
        return
    print("\n" + compared(ours, theirs[-1]))
    print(f"UniCuCo serves {requests} requests {theirs[-1]['seconds'] / ours['seconds']:.0f} times faster than {theirs[-1]['method']} (follows from the budgets).")
    mean = lambda r: statistics.geometric_mean(r["ratio"].values())
    equal = next((r for r in theirs if mean(r) <= mean(ours)), None)
    if equal:
        print(f"At equal quality, against {equal['method']} (KL ratio {mean(equal):.3f}, UniCuCo {mean(ours):.3f}): {equal['seconds'] / ours['seconds']:.1f} times faster.")
    else:
        print(f"At equal quality: no EvoPress budget up to {theirs[-1]['method'].split()[1]} reaches UniCuCo's KL ratio of {mean(ours):.3f} (its best: "
              f"{min(map(mean, theirs)):.3f}), so more than {theirs[-1]['seconds'] / ours['seconds']:.0f} times faster.")


# ------------------------------------------------------------------------------------------------------- command line
def main():
    p = Parser(__doc__, ["python bench.py", "python bench.py --full", "python bench.py --stages", "python bench.py --model DIR --data c4.jsonl --test wiki.test.raw --budget 104 --seeds 3"])
    add_model(p)
    p.add_argument("--data", type=Path, metavar="FILE", help="text for calibration and search (default: the embedded default text)")
    p.add_argument("--test", type=Path, nargs="+", metavar="FILE", help="unseen texts (default: held-out part of --data)")
    p.add_argument("--requests", type=int, default=64, metavar="N", help="how many are asked (64)")
    p.add_argument("--budget", type=int, default=20, metavar="N", help="evaluations that EvoPress may spend on each request (20)")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (1)")
    p.add_argument("--full", action="store_true", help="serve and measure every request with every method")
    p.add_argument("--stages", action="store_true", help="time every stage against its floor instead")
    p.add_argument("--sequential", action="store_true", help="compare Wanda's block-by-block calibration with the default instead")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=["owl", "unicuco", "gp", "evopress"], metavar="NAME",
                   help=f"beside uniform: {' '.join(METHODS)} (owl unicuco gp evopress)")
    p.add_argument("--initial", type=int, default=48, metavar="N", help="strategies that UniCuCo measures first (48)")
    p.add_argument("--rounds", type=int, default=14, metavar="N", help="its rounds of 4 more (14)")
    p.add_argument("--resume", action="store_true", help="go on where a comparison with the same inputs was stopped")
    p.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens of one evaluation of f2 (2048)")
    p.add_argument("--calibration", type=int, default=32, metavar="N", help="calibration windows (32)")
    p.add_argument("--test-tokens", type=int, default=8192, metavar="N", help="tokens of each unseen text (8192)")
    p.add_argument("--tasks", type=Path, metavar="DIR",
                   help="also, at 0.5 and 0.6: zero-shot tasks (see eval.py) and all of the first test text, seed 0; 65536 tokens of it, other seeds")
    p.add_argument("--limit", type=int, default=500, metavar="N", help="documents of each task (500)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window (default: the model's positions, at most 512)")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: out/<model>")
    a = p.parse_args()
    if min(a.requests, a.seeds, a.tokens, a.calibration, a.test_tokens, a.initial, a.rounds) < 1 or a.budget < 8:
        raise ValueError("counts must be at least 1, --budget at least 8")
    device, dtype, reason = choose_device(a.device, a.dtype)
    name, started = a.model.resolve().name, time.perf_counter()
    out = a.out or Path("out") / name
    served = sorted({*QUICK, *(round(0.2 + 0.55 * i / max(a.requests - 1, 1), 4) for i in range(a.requests))}) if a.full else list(QUICK)
    inputs = {"model": name, "weights": [sha256(f) for f in weight_files(a.model)], "data": a.data.name if a.data else "stdlib",
              "sha256": sha256(a.data) if a.data else None, "tests": {t.name: sha256(t) for t in a.test or []},
              "served": served, "budget": a.budget, "seqlen": a.seqlen, "tokens": a.tokens,
              "calibration": a.calibration, "device": str(device), "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
    print(f"{name} on {device}, {str(dtype)[6:]} ({reason}), {torch.get_num_threads()} threads")
    if a.stages or a.sequential:
        model, _, windows, search_windows, held_out = setting(a.model, a.data, a.test, device, dtype, a.seqlen, a.calibration, a.tokens, 0)
    if a.sequential:
        rows = sequential(model, windows, {name: w[:max(1, a.test_tokens // w.shape[1])] for name, w in held_out.items()}, QUICK)
        write_json(out / "sequential.json", {"inputs": inputs, "rows": rows})
        return print(f"{time.perf_counter() - started:.0f} s; wrote {out / 'sequential.json'}")
    if a.stages:
        rows = stages(model, windows, search_windows)
        write_json(out / "stages.json", {"inputs": inputs, "rows": rows, "slopes": slopes()})
        return print(f"{time.perf_counter() - started:.0f} s; wrote {out / 'stages.json'}")
    seeds, memory = [], Memory(out / "bench.json", inputs, a.resume)
    for seed in range(a.seeds):
        seeds.append(one_seed(memory, a, seed, device, dtype, served))
        rows = table(seeds, a.requests, served, a.tokens)
        memory.write(requests=a.requests, table=rows, tests=seeds[0]["tests"])
    show(rows, seeds, a.requests, served)
    if a.tasks:
        memory.write(long=over_seeds([seed["long"] for seed in seeds]))
        show_benchmarks(memory.content["benchmarks"])
        show_long(memory.content["long"])
    print(f"{time.perf_counter() - started:.0f} s; wrote {out / 'bench.json'}")


if __name__ == "__main__":
    run(main, ": what was found is kept, the same command with --resume goes on")
