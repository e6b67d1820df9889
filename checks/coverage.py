"""
Does `--max-kl K --confidence P` keep its promise? Hundreds of requests on tiny, each judged on text
that its measurements never saw.

Run       python -m checks.coverage --out results/coverage-tiny.json     (10 minutes on one core)
KL of every window at every step of sparsity is measured once; then a request draws some windows,
is answered by the product's own search on them alone, and judged by the mean over all others.
"""

import argparse
import math
from pathlib import Path

import torch
from tqdm import tqdm

from eval import Divergence
from prune import find_stratnet, prepare
from ranks import Pruner
from request import STEP, Surrogate, by_divergence
from script import TINY, provenance, write_json, write_provenance
from unicuco import MAX, strategy_for

WINDOWS = 64
BUDGETS = 0.005, 1.0  # KL, nats per token, log-uniform


def kl_of_windows(calibration=64):
    """KL (steps, windows) of StratNet's strategy at every STEP of sparsity, and the GP's guess."""
    args = argparse.Namespace(
        model=TINY, data=None, test=None, seqlen=None, calibration=calibration, seed=0, refit=False
    )
    setting = prepare(args, torch.device("cpu"), torch.bfloat16, 1)
    windows = next(iter(setting.held_out.values()))[:WINDOWS]
    pruner = Pruner(setting.model, setting.calibration)
    pruner.restore()
    divergence = Divergence(setting.model, windows)
    trained = find_stratnet(None, TINY, len(setting.model.blocks))
    gp, rows, guesses = trained.gp(), [], []
    for k in tqdm(range(1, round(MAX / STEP) + 1), desc="steps of sparsity"):
        strategy = strategy_for(trained.net, k * STEP, pruner.sparsity)
        pruner.apply(strategy)
        divergence()
        rows.append(divergence.of_windows)
        guesses.append(float(gp.posterior(strategy[None])[0]))
    return divergence, torch.stack(rows), guesses


class Guess:
    """The GP at a step of sparsity, from what was tabulated."""

    def __init__(self, guesses):
        self.guesses = guesses

    def posterior(self, x):
        return torch.tensor([self.guesses[int(x[0, 0])]]), None


def answered(budget, drawn, confidence, divergence, kls, guesses):
    """The step that the product chooses for a budget, from the windows `drawn` alone."""

    def measure(x):
        divergence.of_windows = kls[int(x[0])][drawn]
        return divergence.at_most(confidence)

    def curve(s):
        return torch.tensor([float(max(0, min(round(s / STEP) - 1, len(kls) - 1)))])

    request = {"kind": "max_kl", "value": budget}
    return int(by_divergence(request, Surrogate(curve, None, Guess(guesses), measure, None))[0])


def promise(confidence, count, requests, table):
    """How often a promise of `confidence`, from `count` windows, is kept on all other text."""
    g, kept, shares = torch.Generator().manual_seed(count), 0, []
    for _ in range(requests):
        u = float(torch.rand(1, generator=g))
        budget = BUDGETS[0] * (BUDGETS[1] / BUDGETS[0]) ** u
        order = torch.randperm(WINDOWS, generator=g)
        step = answered(budget, order[:count], confidence, *table)
        fresh = float(table[1][step][order[count:]].mean())
        kept += fresh <= budget
        shares.append(fresh / budget)
    share = kept / requests
    return {
        "confidence": confidence,
        "windows": count,
        "requests": requests,
        "kept": share,
        "error": math.sqrt(share * (1 - share) / requests),
        "kl_over_budget": sum(shares) / requests,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table = kl_of_windows()
    rows = [promise(p, n, args.requests, table) for p in (0.5, 0.9, 0.95) for n in (4, 8, 16)]
    for row in rows:
        print(
            f"{row['confidence']:g} from {row['windows']:2d} windows: kept {row['kept']:.3f}"
            f" ± {row['error']:.3f}, KL {row['kl_over_budget']:.2f} of the budget"
        )
    if args.out:
        write_provenance(args.out, provenance())
        write_json(args.out, rows, rows=True)


if __name__ == "__main__":
    main()
