"""
Is c_m(x), the table of curvature, what pruning one matrix alone measures?

Run       python -m checks.damages                                         (tiny, half a minute)
          python -m checks.damages --model DIR --data c4.jsonl --out FILE   (SmolLM2: 8 minutes)
What      some matrices, drawn at random, each pruned alone to a quarter, a half and three quarters;
          KL on windows that neither ranks nor table saw.
Reading   gap: c_m over the measured KL, less 1. The promise is 25 % up to a KL of 0.1.
"""

import random
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from curvature import LEVELS, damage_table
from eval import Divergence
from model import LINEARS
from prune import prepare, sources
from ranks import Pruner
from script import (
    Parser,
    add_model,
    add_texts,
    choose,
    provenance,
    run,
    write_json,
    write_provenance,
)

PRUNED = (LEVELS // 4, LEVELS // 2, 3 * LEVELS // 4)
UP_TO = 0.1  # nats per token: the table is promised below


def rows_of(pruner, table, divergence, matrices):
    """Predicted and measured KL of each of `matrices` [(block, kind)] alone, at each of PRUNED."""
    rows = []
    cases = [(i, j, level) for i, j in matrices for level in PRUNED]
    for i, j, level in tqdm(cases, desc="single matrices", disable=None, leave=False):
        strategy = torch.zeros(len(pruner.live), len(LINEARS), dtype=torch.float64)
        strategy[i, j] = level / LEVELS
        pruner.apply(strategy)
        predicted, measured = float(table[i, j, level - 1]), divergence()
        rows.append(
            {
                "block": i + 1,
                "matrix": LINEARS[j],
                "sparsity": level / LEVELS,
                "predicted": predicted,
                "measured": measured,
                "gap": predicted / measured - 1,
            }
        )
    pruner.restore()
    return rows


def arguments():
    parser = Parser(__doc__, ["python -m checks.damages"])
    add_model(parser)
    add_texts(parser)
    parser.add_argument("--matrices", type=int, default=20, metavar="N", help="how many")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the rows as JSON")
    return parser.parse_args()


def main():
    args, started = arguments(), time.perf_counter()
    device, dtype, _ = choose(args)
    setting = prepare(args, device, dtype, args.tokens)
    pruner = Pruner(setting.model, setting.calibration)
    table = damage_table(pruner, setting.calibration, seed=args.seed)
    every = [(i, j) for i in range(len(pruner.live)) for j in range(len(LINEARS))]
    matrices = random.Random(args.seed).sample(every, min(args.matrices, len(every)))
    rows = rows_of(pruner, table, Divergence(setting.model, setting.search), matrices)
    for r in rows:
        print(
            f"block {r['block']:<3} {r['matrix']:<20} {r['sparsity']:.2f}  predicted"
            f" {r['predicted']:.5f}  measured {r['measured']:.5f}  {100 * r['gap']:+6.1f} %"
        )
    gaps = [abs(r["gap"]) for r in rows if r["measured"] <= UP_TO]
    print(
        f"{len(gaps)} of {len(rows)} up to KL {UP_TO:g}: median gap {statistics.median(gaps):.1%},"
        f" within 25 % {sum(gap <= 0.25 for gap in gaps)}, largest {max(gaps):.1%};"
        f" {time.perf_counter() - started:.0f} s"
    )
    if args.out:
        write_provenance(args.out, provenance() | {"inputs": sources(args)})
        write_json(args.out, rows, rows=True)


if __name__ == "__main__":
    run(main)
