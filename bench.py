"""
What each stage costs, against its floor or the usual tool; how costs grow; Wanda block by block.

Reading   beside compare.py; can be skipped. Nothing else needs it.
Units     ratios of medians in one run; seconds stand beside them.

Laptop    python bench.py                     (1 minute; ends with the file that it wrote)
Full      python bench.py --slopes --model DIR --data c4.jsonl
"""

import ctypes
import math
import re
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import torch

from eval import CHUNK, Divergence
from gp import GaussianProcess
from llama import pack, unpack
from model import LINEARS, Config, Llama
from prune import prepare, sources, tests
from ranks import Pruner, activation_norms, rank, wanda
from refit import BETWEEN, GROUPS, STAGES, STEPS, follow, gram, product_dtype, row_counts
from script import (
    Parser,
    add_model,
    add_texts,
    at_least,
    choose,
    provenance,
    run,
    write_json,
)
from unicuco import StratNet, first_design, one_thread, strategy_for


def race(*functions, repeats=5):
    """Median seconds of each function, run in turn after a warm-up, so that a drifting machine
    hits all alike."""
    times = [[] for _ in functions]
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(repeats + 1):
        for function, seconds in zip(functions, times):
            started = time.perf_counter()
            function()
            wait()
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds[1:]) for seconds in times]


def peak(work):
    """Bytes that `work` adds to this process at most, by Linux's own record of the most resident
    memory; None elsewhere."""
    status = Path("/proc/self/status")
    try:
        work()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back
        Path("/proc/self/clear_refs").write_text("5")  # the record starts anew
        before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
        work()
        return 1024 * (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before)
    except (OSError, AttributeError):
        return None


class Table:
    """Rows of stages.json, printed as they come."""

    def __init__(self):
        self.rows = []
        print(f"{'stage':<44} {'ratio':>9} {'seconds':>10}   against (bar)")

    def add(self, stage, against, ratio, seconds, bar):
        """bar   what the ratio should be, in words"""
        row = {"stage": stage, "against": against, "ratio": ratio, "seconds": seconds, "bar": bar}
        self.rows.append(row)
        print(f"{stage:<44} {ratio:9.2f} {seconds:10.4f}   {against} ({bar})", flush=True)


# ---------------------------------------------------------------------------------------- stages
@torch.inference_mode()
def stages(setting):
    """Rows (stage, what it is measured against, ratio, seconds, bar) of one run, with the threads
    that torch has unless the stage says another number. The model is left dense."""
    norms = activation_norms(setting.model, setting.calibration)
    pruner = Pruner(setting.model, setting.calibration)
    weights = sum(W.numel() for block in pruner.dense for W in block)
    size = setting.model.embed.weight.element_size()
    print(
        f"memory: live block weights {weights * size / 1e6:.1f} MB, dense copy the same,"
        f" ranks {weights * 2 / 1e6:.1f} MB\n"
    )
    table = Table()
    time_apply(table, pruner)
    time_ranking(table, pruner, norms)
    time_evaluation(table, setting.model, setting.search)
    time_packing(table, pruner)
    time_sparse_products(table, pruner)
    time_refit(table, pruner, setting.calibration)
    pruner.restore()
    time_gp(table)
    return table.rows


def time_apply(table, pruner):
    threads = torch.get_num_threads()
    strategy = [0.5] * len(pruner.live)
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        applied, copied = race(partial(pruner.apply, strategy), pruner.restore)
        table.add(
            f"apply a strategy, {count} thread{'s' * (count > 1)}",
            "plain copies of the same weights",
            applied / copied,
            applied,
            "at most 2.2 on one, 2.0 on two",
        )


def sort_anew(dense, live, norms, names, k):
    """What the Wanda paper describes for each request: score, sort and zero each matrix again."""
    for W, out, name in zip(dense, live, names):
        out.copy_(W)
        lowest = wanda(W, norms[name]).sort(dim=-1, stable=True).indices[:, : int(k * W.shape[1])]
        out.scatter_(1, lowest, 0)


def sort_twice(score):
    """Ranks (d_out, d_in), as one would write them first."""
    return score.argsort(dim=-1, stable=True).argsort(dim=-1)


def time_ranking(table, pruner, norms):
    blocks = len(pruner.live)
    dense, live, names = (part[blocks // 2] for part in (pruner.dense, pruner.live, pruner.names))
    scores = [wanda(W, norms[name]) for W, name in zip(dense, names)]
    ranked, twice = race(
        lambda: [rank(s) for s in scores], lambda: [sort_twice(s) for s in scores], repeats=3
    )
    table.add("rank one block", "two argsorts / ours", twice / ranked, ranked, "at least 1.5")
    anew, applied = race(
        lambda: sort_anew(dense, live, norms, names, 0.5),
        lambda: pruner.apply([0.5] * blocks),
        repeats=3,
    )
    ours = ranked * blocks + 64 * applied
    table.add(
        "64 masks from one ranking",
        "64 times score, sort, zero / ours",
        64 * anew * blocks / ours,
        ours,
        "at least 10",
    )


def time_evaluation(table, model, windows):
    """One evaluation of f2, the seconds against its matrix products, and the memory."""
    divergence = Divergence(model, windows)
    linears = [block.get_submodule(name) for block in model.blocks for name in LINEARS]
    widths = {linear.in_features for linear in [*linears, model.head]}
    inputs = {n: torch.randn(windows.numel(), n).to(model.head.weight) for n in widths}
    linears += [model.head, model.head]
    whole, products = race(divergence, lambda: [m(inputs[m.in_features]) for m in linears])
    weigh(table, "memory of one evaluation of f2", model, divergence)
    wide = Llama(Config(2**17, 512, 1024, 8, 8, 8, 64, 512)).eval()
    name = "memory of one evaluation of f2, 128k vocabulary"
    weigh(table, name, wide, Divergence(wide, windows[:4]))
    table.add(
        "one evaluation of f2",
        "its bare matrix products / ours",
        products / whole,
        whole,
        "at least 0.65 in float32, 0.55 in bfloat16",
    )


def refit_products(pruner, tokens):
    """The matrix products of one refit, on random numbers, and nothing else: for each group H, C
    and the inverse of H; for each matrix both forward passes, what it lacks, the solution without a
    mask, and one product with H a step and a start, of every solve.
    """
    random = {W.shape[1]: torch.randn(tokens, W.shape[1]) for W in pruner.dense[0]}
    random |= {W.shape[0]: torch.randn(tokens, W.shape[0]) for W in pruner.dense[0]}
    device = pruner.dense[0][0].device
    random = {width: x.to(device) for width, x in random.items()}

    def products():
        for block in pruner.dense:
            for group, members in enumerate(GROUPS):
                x = random[block[members[0]].shape[1]]
                H = gram(x)
                H.diagonal().add_(1.0)
                torch.cholesky_inverse(torch.linalg.cholesky_ex(H).L)
                y = random[block[members[0]].shape[0]] if group % 2 else x
                y.T @ x
                for W in (block[j] for j in members):
                    multiply(W, x.to(W.dtype), H, 2 + (group % 2 == 0))

    return products


def multiply(W, x, H, exact):
    """Of one matrix: both forward passes, `exact` products with H in float32, those of every
    solve."""
    for _ in range(2):
        x @ W.T
    full = W.float()
    for _ in range(exact):
        full @ H
    rounded = full.to(product_dtype(W.dtype))
    H = H.to(rounded.dtype)
    for _ in range(STEPS + 1 + (STAGES - 1) * (BETWEEN + 1)):
        rounded @ H


def time_refit(table, pruner, windows):
    """One refit of the whole model against its matrix products."""
    matrices = zip(sum(pruner.names, []), sum(pruner.live, []))
    g_norms = {name: torch.ones(len(W), device=W.device) for name, W in matrices}  # any do
    strategy = [0.5] * len(pruner.live)
    refit = lambda: follow(pruner, row_counts(pruner, strategy, g_norms), windows)
    products = refit_products(pruner, windows.numel())
    whole, floor = race(refit, products, repeats=1)
    table.add(
        f"refit survivors, {windows.numel()} tokens",
        "its bare matrix products / ours",
        floor / whole,
        whole,
        "at least 0.5",
    )
    weigh(
        table,
        f"memory of a refit, {windows.numel()} tokens",
        pruner.model,
        refit,
        bar="none: states of all windows, sums and the new values",
    )


def weigh(table, stage, model, work, bar="at most 0.3 of the weights and a chunk"):
    """Add the memory of `work`, where Linux tells it."""
    used = peak(work)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    if used is not None:
        table.add(
            stage,
            f"MB above what Pruner holds; the weights have {held / 1e6:.0f} MB,"
            f" a chunk of logits {4 * CHUNK / 1e6:.0f}",
            used / 1e6,
            0.0,
            bar,
        )


def middle_matrix(pruner):
    """The last Linear of the middle block, (d_out, d_in), and its ranks."""
    i = len(pruner.live) // 2
    return pruner.dense[i][-1], pruner.ranks[i][-1]


def time_packing(table, pruner):
    W, ranks = middle_matrix(pruner)
    mask, values = pack(W.half(), ranks >= W.shape[1] // 2)
    with one_thread():
        (decoded,) = race(lambda: unpack(mask, values, W.shape[1]))
    table.add(
        "unpack one matrix, 1 thread",
        "MB of dense output a second",
        W.half().nbytes / 1e6 / decoded,
        decoded,
        "at least 500",
    )


def time_sparse_products(table, pruner):
    W, ranks = middle_matrix(pruner)
    x = torch.randn(W.shape[1], 256, device=W.device)
    for s in (0.5, 0.6, 0.7, 0.8, 0.9):
        pruned = torch.where(ranks >= s * W.shape[1], W.float(), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR support a beta
            csr = pruned.to_sparse_csr()
        sparse, plain = race(partial(torch.matmul, csr, x), partial(torch.matmul, pruned, x))
        table.add(
            f"torch's CSR product at sparsity {s}, 256 tokens",
            "dense product / CSR, float32",
            plain / sparse,
            sparse,
            "above 1 is faster",
        )


# ------------------------------------------------------------------------- the GP against BoTorch
def known(n, generator, noise):
    """Strategies (n, 30) and a y (n,) of the usual shape, with noise from another generator."""
    X = first_design(n, 30, generator)
    y = (X**1.2 * (5 * X).exp()).sum(1).log()
    return X, y + 0.1 * torch.randn(n, generator=noise, dtype=torch.float64)


@torch.inference_mode(False)
@torch.enable_grad()
def time_gp(table):
    """The GP against BoTorch's SingleTaskGP: constant mean, RBF or Matern with a length scale
    each, standardised y, no priors."""
    try:
        import botorch  # noqa: F401
    except ImportError:
        print("GP against BoTorch: not measured, pip install botorch")
        return
    g = torch.Generator().manual_seed(0)
    X, y = known(216, g, g)
    X, x, y = X[:200], X[200:], y[:200]
    gp = GaussianProcess("constant")
    theirs = BoTorch(X, (y - y.mean()) / y.std())
    with one_thread():
        time_fit(table, gp, theirs, X, y)
        theirs.model.eval()
        time_posterior(table, gp, theirs, x)


def time_fit(table, gp, theirs, X, y):
    ours, others = race(lambda: gp.fit(X, y, use_priors=False), theirs.fit, repeats=1)
    likelihood = gp.log_marginal_likelihood(gp.theta)[0]
    against = f"BoTorch / ours; log likelihood {theirs.log_likelihood():.2f} / {likelihood:.2f}"
    stage = "fit 200 strategies in 30 dimensions, 1 thread"
    table.add(stage, against, others / ours, ours, "at least 5")


def time_posterior(table, gp, theirs, x):
    ours, others = race(lambda: ask(gp.posterior, x), lambda: ask(theirs.posterior, x), repeats=200)
    stage = "posterior of 16 strategies with gradients"
    table.add(stage, "BoTorch / ours", others / ours, ours, "at least 4")


class BoTorch:
    """SingleTaskGP on X (n, d) and standardised y (n,): the tool one would take otherwise."""

    def __init__(self, X, y):
        self.X = X
        self.y = y

    def fit(self):
        import botorch
        import gpytorch

        kernel = gpytorch.kernels.MaternKernel(2.5, ard_num_dims=self.X.shape[1])
        self.model = botorch.models.SingleTaskGP(
            self.X,
            self.y[:, None],
            covar_module=gpytorch.kernels.ScaleKernel(kernel),
            likelihood=gpytorch.likelihoods.GaussianLikelihood(),
            outcome_transform=None,
        )
        self.mll = gpytorch.mlls.ExactMarginalLogLikelihood(self.model.likelihood, self.model)
        botorch.fit.fit_gpytorch_mll(self.mll)

    def log_likelihood(self):
        self.model.train()
        return float(self.mll(self.model(self.X), self.y).detach()) * len(self.y)

    def posterior(self, x):
        p = self.model.posterior(x)
        return p.mean[:, 0], p.variance[:, 0].sqrt()


def ask(posterior, x):
    """The gradients of all means and standard deviations at x (m, d)."""
    x = x.clone().requires_grad_()
    mean, std = posterior(x)
    (mean.sum() + std.sum()).backward()


# ---------------------------------------------------------------------------------------- slopes
def random_llama(width=256, blocks=4):
    torch.manual_seed(0)
    heads = width // 64
    return Llama(Config(4096, width, 3 * width, blocks, heads, heads, 64, 512)).eval()


def random_windows(count):
    return torch.randint(4096, (count, 512), generator=torch.Generator().manual_seed(0))


def evaluating(model, tokens=2048):
    return Divergence(model, random_windows(tokens // 512))


def ranking(width):
    score = torch.rand(width, width)
    return lambda: rank(score)


def serving(requests):
    pruner = Pruner(random_llama(), random_windows(4))
    net = StratNet(4)

    def serve():
        for i in range(requests):
            pruner.apply(strategy_for(net, 0.2 + 0.5 * i / requests, pruner.sparsity))

    return serve


def strategies_and_values(n):
    return known(n, *(torch.Generator().manual_seed(seed) for seed in (0, 1)))


def fitting(n):
    data = strategies_and_values(n)
    return lambda: GaussianProcess().fit(*data)


def asking(n):
    gp = GaussianProcess().fit(*strategies_and_values(n))
    x = strategies_and_values(16)[0]
    return lambda: gp.solve(x)


def grow(cost, over, sizes, work):
    """Time work(size)() at every size: a row with the slope of log seconds over log size."""
    seconds = [race(work(size), repeats=3)[0] for size in sizes]
    logs = (list(map(math.log, values)) for values in (sizes, seconds))
    slope = statistics.linear_regression(*logs).slope
    times = ", ".join(f"{n}: {t:.4f}" for n, t in zip(sizes, seconds))
    print(f"{cost:<44} {over:<14} {slope:6.2f}   {times}", flush=True)
    return {"cost": cost, "over": over, "sizes": sizes, "seconds": seconds, "slope": slope}


@torch.inference_mode()
def slopes():
    """How each cost grows: rows of seconds at four sizes, on Llamas with random weights."""
    print(f"\n{'cost':<44} {'over':<14} {'slope':>6}   seconds at each size")
    rows = [
        *slopes_of_f2(),
        grow("ranking a square matrix", "width", [512, 1024, 2048, 4096], ranking),
    ]
    with one_thread():
        requests = "serving requests, 4 blocks of width 256"
        rows.append(grow(requests, "requests", [4, 8, 16, 32], serving))
        with torch.enable_grad():
            rows += slopes_of_gp()
    return rows


def slopes_of_f2():
    f2, sizes = "one evaluation of f2, ", [1024, 2048, 4096, 8192]
    return [
        grow(
            f2 + "4 blocks of width 256", "tokens", sizes, lambda n: evaluating(random_llama(), n)
        ),
        grow(
            f2 + "width 256", "blocks", [4, 8, 16, 32], lambda n: evaluating(random_llama(blocks=n))
        ),
        grow(
            f2 + "4 blocks", "width", [128, 256, 512, 1024], lambda n: evaluating(random_llama(n))
        ),
    ]


def slopes_of_gp():
    sizes = [50, 100, 200, 400]
    return [
        grow("fitting the GP, 30 blocks", "evaluations", sizes, fitting),
        grow("posterior of 16 strategies with gradients", "evaluations", sizes, asking),
    ]


# ---------------------------------------------------------------------------------- command line
def arguments():
    parser = Parser(__doc__, ["python bench.py", "python bench.py --slopes --model DIR"])
    add_model(parser)
    add_texts(parser)
    parser.add_argument("--slopes", action="store_true", help="measure how each cost grows, too")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/<model>")
    args = parser.parse_args()
    at_least(args, 1, "tokens", "calibration")
    args.out = args.out or Path("out") / args.model.resolve().name
    return args


def main():
    args = arguments()
    started = time.perf_counter()
    device, dtype, reason = choose(args)
    inputs = sources(args) | {
        "tests": tests(args),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    threads = inputs["threads"]
    print(f"{inputs['model']} on {device}, {args.dtype} ({reason}), {threads} threads")
    setting = prepare(args, device, dtype, args.tokens)
    path = args.out / "stages.json"
    results = {"rows": stages(setting), "slopes": slopes() if args.slopes else []}
    write_json(path, {"inputs": inputs, **results})
    print(f"{time.perf_counter() - started:.0f} s; wrote {path}")


if __name__ == "__main__":
    run(main)
