"""
What each stage costs, measured against its floor or against the tool one would take otherwise; how costs grow; Wanda block by block.

Reading   after baselines.py. Next: bench.py, whose --stages and --sequential it serves.
Units     ratios of medians in one run; seconds stand beside them.
Laptop    python bench.py --stages                         (1 minute; ends with the file that it wrote)
"""
import ctypes
import math
import re
import statistics
import time
import warnings
from pathlib import Path

import torch

from baselines import uniform
from eval import CHUNK, Divergence
from gp import GaussianProcess
from llama import Config, Llama
from packed import pack, unpack
from prune import LINEARS, Pruner, activation_norms, rank, wanda
from train import one_thread
from unicuco import StratNet, first_design, strategy_for


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


def sequential(model, windows, tests, sparsities):
    """Uniform strategies by ranks on dense activations (one calibration for all) and by Wanda's block by block: KL and perplexity."""
    references, rows, pruner = {name: Divergence(model, w) for name, w in tests.items()}, [], Pruner(model, windows)
    print(f"{'text':<24} sparsity   KL: default  sequential   perplexity: default  sequential")
    default = {}
    for s in sparsities:
        pruner.apply(uniform(len(pruner.live), s))
        default[s] = {name: d.measure() for name, d in references.items()}
    for s in sparsities:
        pruner.apply_sequential(uniform(len(pruner.live), s), windows)
        for name, d in references.items():
            (kl, ppl), (kl_, ppl_) = default[s][name], d.measure()
            rows.append({"text": name, "tokens": d.windows.numel(), "sparsity": s, "kl": kl, "ppl": ppl, "sequential_kl": kl_, "sequential_ppl": ppl_})
            print(f"{name:<24} {s:8.2f}   {kl:11.4f}  {kl_:10.4f}   {ppl:19.3f}  {ppl_:10.3f}", flush=True)
    pruner.restore()
    return rows
