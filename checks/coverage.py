"""
Does `--max-kl K --confidence P` keep its promise? Hundreds of requests on tiny, each judged on text
that its measurements never saw.

Run       python -m checks.coverage --out results/coverage-tiny.json     (20 minutes on one core)
KL of every window is measured once, at every third step of sparsity as pruned, at every sixth
refitted; then a request draws some windows, is answered by the product's own search on them alone,
and judged by the mean over all others.
"""

import argparse
import math
from pathlib import Path

import torch
from tqdm import tqdm

from curvature import gradient_norms
from eval import Divergence
from prune import find_stratnet, prepare
from ranks import Pruner
from refit import CONTRAST, follow, row_counts
from request import STEP, Surrogate, by_divergence
from script import TINY, provenance, write_json, write_provenance
from unicuco import KL_FLOOR, MAX, softened, strategy_for

WINDOWS = 64
BUDGETS = 0.005, 1.0  # KL, nats per token, log-uniform
CALIBRATION = 64
COUNTS = 4, 8, 16  # windows that a request measures


class Tabulated:
    """KL of 64 held-out windows, and what the GP says, at steps of sparsity, of tiny and the
    StratNet that answers for it, refitted or not.

    curve     the strategy of every step;  guesses: (mean, std) of its log KL
    """

    def __init__(self, refitted):
        args = argparse.Namespace(model=TINY, data=None, test=None, seqlen=None, seed=0)
        args.calibration, args.refit = CALIBRATION, False
        self.setting = prepare(args, torch.device("cpu"), torch.bfloat16, 1)
        windows = next(iter(self.setting.held_out.values()))[:WINDOWS]
        self.pruner = Pruner(self.setting.model, self.setting.calibration)
        self.pruner.restore()
        self.g_norms = gradient_norms(self.pruner, self.setting.calibration)
        self.divergence = Divergence(self.setting.model, windows)
        trained = find_stratnet(None, TINY, len(self.setting.model.blocks))
        sparsities = [k * STEP for k in range(1, round(MAX / STEP) + 1)]
        net = (trained.unmeasured() if refitted else trained).net
        self.curve = [strategy_for(net, s, self.pruner.sparsity) for s in sparsities]
        self.guesses = trained.gp().posterior(torch.stack(self.curve))
        self.guesses = [(float(mean), float(std)) for mean, std in zip(*self.guesses)]

    def refit(self, strategy):
        """As prune.py delivers it."""
        strategy = softened(strategy, CONTRAST, self.pruner.sparsity)
        counts = row_counts(self.pruner, strategy, self.g_norms)
        follow(self.pruner, counts, self.setting.calibration)

    def kls(self, make, every):
        """KL (steps, windows) of what `make` makes of a strategy: measured at every so many steps
        and the last, between them on a line in log KL.
        """
        steps = sorted({*range(0, len(self.curve), every), len(self.curve) - 1})
        rows = {}
        for k in tqdm(steps, desc=make.__name__):
            make(self.curve[k])
            self.divergence()
            rows[k] = self.divergence.of_windows.double().clamp(min=KL_FLOOR).log()
        found = []
        for k in range(len(self.curve)):
            low = max(step for step in steps if step <= k)
            high = min(step for step in steps if step >= k)
            part = (k - low) / max(high - low, 1)
            found.append(((1 - part) * rows[low] + part * rows[high]).exp())
        return torch.stack(found)


class Guess:
    """The GP at a step of sparsity, from what was tabulated."""

    def __init__(self, guesses):
        self.guesses = guesses

    def posterior(self, x):
        mean, std = self.guesses[int(x[0, 0])]
        return torch.tensor([mean]), torch.tensor([std])


def answered(budget, drawn, confidence, table, kls):
    """The step that the product chooses for a budget from the windows `drawn` alone, and how often
    it measured."""
    asked = []

    def measure(x):
        asked.append(int(x[0]))
        table.divergence.of_windows = kls[asked[-1]][drawn]
        return table.divergence.at_most(confidence)

    def curve(s):
        return torch.tensor([float(max(0, min(round(s / STEP) - 1, len(kls) - 1)))])

    request = {"kind": "max_kl", "value": budget}
    surrogate = Surrogate(curve, None, Guess(table.guesses), measure, None, confidence)
    return int(by_divergence(request, surrogate)[0]), len(asked)


def promise(confidence, count, requests, table, kls):
    """How often a promise of `confidence`, from `count` windows, is kept on all other text."""
    g, kept, shares, asked = torch.Generator().manual_seed(count), 0, [], 0
    for _ in range(requests):
        u = float(torch.rand(1, generator=g))
        budget = BUDGETS[0] * (BUDGETS[1] / BUDGETS[0]) ** u
        order = torch.randperm(WINDOWS, generator=g)
        step, measured = answered(budget, order[:count], confidence, table, kls)
        fresh = float(kls[step][order[count:]].mean())
        kept += fresh <= budget
        shares.append(fresh / budget)
        asked += measured
    share = kept / requests
    return {
        "confidence": confidence,
        "windows": count,
        "requests": requests,
        "kept": share,
        "error": math.sqrt(share * (1 - share) / requests),
        "kl_over_budget": sum(shares) / requests,
        "measurements": asked / requests,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for model, refitted, every in (("as pruned", False, 3), ("refitted", True, 6)):
        table = Tabulated(refitted)
        kls = table.kls(table.refit if refitted else table.pruner.apply, every)
        for p in (0.5, 0.9, 0.95):
            rows += [{"model": model} | promise(p, n, args.requests, table, kls) for n in COUNTS]
    for row in rows:
        print(
            f"{row['model']}, {row['confidence']:g} from {row['windows']:2d} windows:"
            f" kept {row['kept']:.3f} ± {row['error']:.3f}, KL {row['kl_over_budget']:.2f} of the"
            f" budget, {row['measurements']:.1f} measurements"
        )
    if args.out:
        write_provenance(args.out, provenance())
        write_json(args.out, rows, rows=True)


if __name__ == "__main__":
    main()
