"""
The comparison that the paper claims: many requests, served by UniCuCo and by searches that start anew for each.

Source    the comparison of UniCuCo (arXiv 2505.12216): 64 requests; methods as in baselines.py.
Reading   after baselines.py.
Laptop    python bench.py                          (3 minutes; ends with the speed at equal quality)
          python bench.py --stages                 (1 minute; every stage against its floor, one ratio each)
Full      python bench.py --model DIR --data c4.jsonl --test wiki.test.raw --budget 104 --seeds 3 --resume
"""
import ctypes
import math
import re
import statistics
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from baselines import evopress, gp_search, outlier_shares, owl_best, uniform
from eval import CHUNK, Divergence, sha256
from gp import GaussianProcess
from llama import Config, Llama, Parser, add_model, choose_device, pack, read_json, run, unpack, weight_files
from outputs import write_json
from prune import LINEARS, Pruner, activation_norms, rank, setting, wanda
from train import one_thread, search
from unicuco import StratNet, finite, first_design, strategy_for

QUICK = (0.3, 0.4, 0.5, 0.6, 0.7)                       # requests that a baseline is measured on, unless --full
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
    f2, part = Counter(pruner, divergence, bar), Counter(pruner, quick, bar, tokens / quick.windows.numel())

    def timed(strategy_of, s):
        started, before = time.perf_counter(), f2.tokens + part.tokens
        strategy = strategy_of(s)
        pruner.apply(strategy)
        return [strategy.tolist(), time.perf_counter() - started, (f2.tokens + part.tokens - before) / tokens]

    def each(name, strategy_of):
        found = {s: memory(f"{seed} {name} {s}", lambda: timed(strategy_of, s)) for s in requests}
        return {"shared": 0.0, "evaluations": (0.0, statistics.mean(e for *_, e in found.values())), "strategies": {s: f[:2] for s, f in found.items()}}

    def learned(mean):
        started, before = time.perf_counter(), f2.tokens
        net, *_ = search(lambda batch: [f2(x) for x in batch], blocks, initial=initial, rounds=rounds, mean=mean, seed=seed)
        shared, evaluations = time.perf_counter() - started, (f2.tokens - before) / tokens
        return {"shared": shared, "evaluations": (evaluations, 0.0), "strategies": {str(s): timed(lambda s: strategy_for(net, s, counted), s)[:2] for s in requests}}

    methods = {"uniform": each("uniform", lambda s: uniform(blocks, s))}
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
            methods[name] = {**made, "strategies": {s: made["strategies"][str(s)] for s in requests}}
    return methods


def judge(memory, methods, pruner, tests, seed, bar):
    """KL and perplexity of every strategy on every test text: {method: {request: {"counted", test: [kl, ppl]}}}."""
    pruner.restore()
    references = {name: Divergence(pruner.model, windows) for name, windows in tests.items()}
    count = sum(w.numel() for w in tests.values())

    def measured(strategy):
        pruner.apply(strategy)
        return {"counted": pruner.sparsity(strategy), **{name: list(map(finite, d.measure())) for name, d in references.items()}}

    judged = {}
    for method, m in methods.items():
        for s, (strategy, _) in m["strategies"].items():
            judged.setdefault(method, {})[s] = memory(f"{seed} {method} {s} on {count} tokens", lambda: measured(strategy))
            bar.update()
    pruner.restore()
    return judged


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
    with tqdm(total=len(methods) * len(requests), desc=f"seed {seed}, unseen text", disable=None) as bar:
        judged = judge(memory, methods, pruner, tests, seed, bar)
        if "magnitude" in a.methods:
            name = METHODS["magnitude"]
            methods[name] = methods["uniform"]
            judged |= judge(memory, {name: methods["uniform"]}, Pruner(model, windows, "magnitude"), tests, seed, bar)
    return {"seed": seed, "calibration": calibration, "tests": {name: w.numel() for name, w in tests.items()}, "judged": judged,
            "methods": {name: {"shared": m["shared"], "evaluations": m["evaluations"], "strategies": {s: x for s, (x, _) in m["strategies"].items()},
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
            "extrapolated": len(served) < requests and method not in SHARED,
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
    ours = next((r for r in rows if r["method"] == "UniCuCo"), None)
    theirs = [r for r in rows if r["method"].startswith("EvoPress")]
    if not (ours and theirs):
        return
    print(f"\nUniCuCo serves {requests} requests {theirs[-1]['seconds'] / ours['seconds']:.0f} times faster than {theirs[-1]['method']} (follows from the budgets).")
    mean = lambda r: statistics.geometric_mean(r["ratio"].values())
    equal = next((r for r in theirs if mean(r) <= mean(ours)), None)
    if equal:
        print(f"At equal quality, against {equal['method']} (KL ratio {mean(equal):.3f}, UniCuCo {mean(ours):.3f}): {equal['seconds'] / ours['seconds']:.1f} times faster.")
    else:
        print(f"At equal quality: no EvoPress budget up to {theirs[-1]['method'].split()[1]} reaches UniCuCo's KL ratio of {mean(ours):.3f} (its best: "
              f"{min(map(mean, theirs)):.3f}), so more than {theirs[-1]['seconds'] / ours['seconds']:.0f} times faster.")


# --------------------------------------------------------------------------------------------------------------- stages
def race(*functions, repeats=5):
    """Median seconds of each function, run in turn after a warm-up, so that a drifting machine hits all alike."""
    times, wait = [[] for _ in functions], torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for i in range(repeats + 1):
        for f, t in zip(functions, times):
            started = time.perf_counter()
            f()
            wait()
            t.append(time.perf_counter() - started)
    return [statistics.median(t[1:]) for t in times]


def sort_anew(dense, live, norms, names, k):
    """What the Wanda paper describes for each request: score, sort and zero each matrix again."""
    for W, out, name in zip(dense, live, names):
        out.copy_(W)
        lowest = wanda(W, norms[name]).sort(dim=-1, stable=True).indices[:, :int(k * W.shape[1])]
        out.scatter_(1, lowest, 0)


def peak(work):
    """Bytes that `work` adds to this process at most, by Linux's own record of the most resident memory; None elsewhere."""
    try:
        work()
        ctypes.CDLL(None).malloc_trim(0)                    # what was freed goes back
        Path("/proc/self/clear_refs").write_text("5")       # the record starts anew
        before = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        work()
        return 1024 * (int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) - before)
    except (OSError, AttributeError):
        return None


@torch.inference_mode()
def stages(model, windows, search_windows):
    """Rows (stage, what it is measured against, ratio, seconds, bar) of one run; 2 threads unless said."""
    rows, threads = [], torch.get_num_threads()

    def row(stage, against, ratio, seconds, bar):
        rows.append({"stage": stage, "against": against, "ratio": ratio, "seconds": seconds, "bar": bar})
        print(f"{stage:<44} {ratio:9.2f} {seconds:10.4f}   {against} ({bar})", flush=True)

    norms, pruner = activation_norms(model, windows), Pruner(model, windows)
    strategy, block = [0.5] * len(pruner.live), len(pruner.live) // 2
    weights = sum(W.numel() for b in pruner.dense for W in b)
    size = model.embed.weight.element_size()
    print(f"memory: live block weights {weights * size / 1e6:.1f} MB, dense copy the same, ranks {weights * 2 / 1e6:.1f} MB\n")
    print(f"{'stage':<44} {'ratio':>9} {'seconds':>10}   against (bar)")
    for count in (1, threads) if threads > 1 else (1,):
        torch.set_num_threads(count)
        applied, copied = race(lambda: pruner.apply(strategy), pruner.restore)
        row(f"apply a strategy, {count} thread{'s' * (count > 1)}", "plain copies of the same weights", applied / copied, applied, "at most 2.2 on one, 2.0 on two")
    dense, live, names = pruner.dense[block], pruner.live[block], pruner.names[block]
    scores = [wanda(W, norms[n]) for W, n in zip(dense, names)]
    ranked, twice = race(lambda: [rank(s) for s in scores], lambda: [s.argsort(dim=-1, stable=True).argsort(dim=-1) for s in scores], repeats=3)
    row("rank one block", "two argsorts / ours", twice / ranked, ranked, "at least 1.5")
    anew, applied = race(lambda: sort_anew(dense, live, norms, names, 0.5), lambda: pruner.apply(strategy), repeats=3)
    anew, scoring = anew * len(pruner.live), ranked * len(pruner.live)
    row("64 masks from one ranking", "64 times score, sort, zero / ours", 64 * anew / (scoring + 64 * applied), scoring + 64 * applied, "at least 10")

    divergence, linears = Divergence(model, search_windows), [b.get_submodule(n) for b in model.blocks for n in LINEARS]
    inputs = {l.in_features: torch.randn(search_windows.numel(), l.in_features).to(l.weight) for l in [*linears, model.head]}
    whole, products = race(divergence, lambda: [l(inputs[l.in_features]) for l in [*linears, model.head, model.head]])
    wide = Llama(Config(2**17, 512, 1024, 8, 8, 8, 64, 512)).eval()
    for name, m, evaluation in (("", model, divergence), (", 128k vocabulary", wide, Divergence(wide, search_windows[:4]))):
        used, held = peak(evaluation), sum(p.numel() * p.element_size() for p in m.parameters())
        if used is not None:
            row(f"memory of one evaluation of f2{name}", f"MB above what Pruner holds; the weights have {held / 1e6:.0f} MB, a chunk of logits "
                f"{4 * CHUNK / 1e6:.0f}", used / 1e6, 0.0, "at most 0.3 of the weights and a chunk")
    del wide
    row("one evaluation of f2", "its bare matrix products / ours", products / whole, whole, "at least 0.65 in float32, 0.55 in bfloat16")

    torch.set_num_threads(1)
    W, kept = dense[-1].half(), pruner.ranks[block][-1] >= dense[-1].shape[1] // 2
    mask, values = pack(W, kept)
    decoded, = race(lambda: unpack(mask, values, W.shape[1]))
    row("unpack one matrix, 1 thread", "MB of dense output a second", W.nbytes / 1e6 / decoded, decoded, "at least 500")
    torch.set_num_threads(threads)
    x = torch.randn(dense[-1].shape[1], 256)
    for s in (0.5, 0.6, 0.7, 0.8, 0.9):
        pruned = torch.where(pruner.ranks[block][-1] >= s * dense[-1].shape[1], dense[-1].float(), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # torch calls its CSR support a beta
            csr = pruned.to_sparse_csr()
        sparse, plain = race(lambda: csr @ x, lambda: pruned @ x)
        row(f"torch's CSR product at sparsity {s}, 256 tokens", "dense product / CSR, float32", plain / sparse, sparse, "above 1 is faster")
    pruner.restore()
    gp_stages(row)
    return rows


def gp_stages(row):
    """The GP against BoTorch's SingleTaskGP: constant mean, RBF or Matern with a length scale each, standardised y, no priors."""
    try:
        import botorch
        import gpytorch
    except ImportError:
        return print("GP against BoTorch: not measured, pip install botorch")
    g = torch.Generator().manual_seed(0)
    X = first_design(216, 30, g)
    y = (X ** 1.2 * (5 * X).exp()).sum(1).log() + 0.1 * torch.randn(216, generator=g, dtype=torch.float64)
    X, x, y = X[:200], X[200:], y[:200]
    z = ((y - y.mean()) / y.std())[:, None]
    with one_thread(), torch.inference_mode(False), torch.enable_grad():
        kernel = lambda: gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(2.5, ard_num_dims=30))
        fitted = []

        def fit_theirs():
            model = botorch.models.SingleTaskGP(X, z, covar_module=kernel(), likelihood=gpytorch.likelihoods.GaussianLikelihood(), outcome_transform=None)
            mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
            botorch.fit.fit_gpytorch_mll(mll)
            fitted[:] = [model, mll]

        gp = GaussianProcess("constant")
        ours, others = race(lambda: gp.fit(X, y, use_priors=False), fit_theirs, repeats=1)
        model, mll = fitted
        model.train()
        likelihood = float(mll(model(X), z[:, 0]).detach()) * len(y)
        row("fit 200 strategies in 30 dimensions, 1 thread", f"BoTorch / ours; log likelihood {likelihood:.2f} / {gp.log_marginal_likelihood(gp.theta)[0]:.2f}",
            others / ours, ours, "at least 5")
        model.eval()

        def ask(posterior):
            q = x.clone().requires_grad_()
            mean, std = posterior(q)
            (mean.sum() + std.sum()).backward()

        def botorch_posterior(q):
            p = model.posterior(q)
            return p.mean[:, 0], p.variance[:, 0].sqrt()

        ours, others = race(lambda: ask(gp.posterior), lambda: ask(botorch_posterior), repeats=200)
    row("posterior of 16 strategies with gradients", "BoTorch / ours", others / ours, ours, "at least 4")


@torch.inference_mode()
def slopes():
    """How each cost grows: seconds at four sizes and the slope of log seconds over log size, on Llamas with random weights."""
    rows = []

    def grow(cost, over, sizes, work):
        seconds = [race(work(size), repeats=3)[0] for size in sizes]
        slope = statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, seconds))).slope
        rows.append({"cost": cost, "over": over, "sizes": sizes, "seconds": seconds, "slope": slope})
        print(f"{cost:<44} {over:<14} {slope:6.2f}   " + ", ".join(f"{n}: {t:.4f}" for n, t in zip(sizes, seconds)), flush=True)

    def random_llama(width=256, blocks=4):
        torch.manual_seed(0)
        return Llama(Config(4096, width, 3 * width, blocks, width // 64, width // 64, 64, 512)).eval()

    def evaluation(model, tokens=2048):
        return Divergence(model, torch.randint(4096, (tokens // 512, 512), generator=torch.Generator().manual_seed(0)))

    def serving(requests):
        windows = torch.randint(4096, (4, 512), generator=torch.Generator().manual_seed(0))
        pruner, net = Pruner(random_llama(), windows), StratNet(4)
        return lambda: [pruner.apply(strategy_for(net, 0.2 + 0.5 * i / requests, pruner.sparsity)) for i in range(requests)]

    def fitting(n):
        X = first_design(n, 30, torch.Generator().manual_seed(0))
        y = (X ** 1.2 * (5 * X).exp()).sum(1).log() + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return X, y

    def asking(n):
        gp, x = GaussianProcess().fit(*fitting(n)), fitting(16)[0]
        return lambda: gp.solve(x)

    print(f"\n{'cost':<44} {'over':<14} {'slope':>6}   seconds at each size")
    grow("one evaluation of f2, 4 blocks of width 256", "tokens", [1024, 2048, 4096, 8192], lambda n: evaluation(random_llama(), n))
    grow("one evaluation of f2, width 256", "blocks", [4, 8, 16, 32], lambda n: evaluation(random_llama(blocks=n)))
    grow("one evaluation of f2, 4 blocks", "width", [128, 256, 512, 1024], lambda n: evaluation(random_llama(n)))
    grow("ranking a square matrix", "width", [512, 1024, 2048, 4096], lambda n: lambda score=torch.rand(n, n): rank(score))
    with one_thread():
        grow("serving requests, 4 blocks of width 256", "requests", [4, 8, 16, 32], serving)
        with torch.enable_grad():
            grow("fitting the GP, 30 blocks", "evaluations", [50, 100, 200, 400], lambda n: lambda data=fitting(n): GaussianProcess().fit(*data))
            grow("posterior of 16 strategies with gradients", "evaluations", [50, 100, 200, 400], asking)
    return rows


def sequential(model, windows, tests):
    """Uniform strategies by ranks on dense activations (one calibration for all) and by Wanda's block by block: KL and perplexity."""
    references, rows, pruner = {name: Divergence(model, w) for name, w in tests.items()}, [], Pruner(model, windows)
    print(f"{'text':<24} sparsity   KL: default  sequential   perplexity: default  sequential")
    default = {}
    for s in QUICK:
        pruner.apply(uniform(len(pruner.live), s))
        default[s] = {name: d.measure() for name, d in references.items()}
    for s in QUICK:
        pruner.apply_sequential(uniform(len(pruner.live), s), windows)
        for name, d in references.items():
            (kl, ppl), (kl_, ppl_) = default[s][name], d.measure()
            rows.append({"text": name, "tokens": d.windows.numel(), "sparsity": s, "kl": kl, "ppl": ppl, "sequential_kl": kl_, "sequential_ppl": ppl_})
            print(f"{name:<24} {s:8.2f}   {kl:11.4f}  {kl_:10.4f}   {ppl:19.3f}  {ppl_:10.3f}", flush=True)
    pruner.restore()
    return rows


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
        rows = sequential(model, windows, {name: w[:max(1, a.test_tokens // w.shape[1])] for name, w in held_out.items()})
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
    print(f"{time.perf_counter() - started:.0f} s; wrote {out / 'bench.json'}")


if __name__ == "__main__":
    run(main, ": what was found is kept, the same command with --resume goes on")
