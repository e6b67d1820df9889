"""
How far apart are two runs that differ only in threads or in dtype? Measured on the embedded model, not promised.

Run       python checks/determinism.py                  (DURATION)
On one machine, with one number of threads and one dtype, everything is the same bit for bit: test_properties.py checks it. Here: KL
of uniform strategies, and the strategies of a short search (28 evaluations), with 1 and 2 threads, in float32 and bfloat16.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import Divergence                                                    # noqa: E402 (the path first)
from llama import DTYPES, TINY                                                 # noqa: E402
from prune import Pruner, setting                                              # noqa: E402
from train import search                                                       # noqa: E402
from unicuco import strategy_for                                               # noqa: E402

UNIFORM, REQUESTS = (0.3, 0.6), (0.3, 0.5, 0.7)


def measured(threads, dtype):
    """KL of uniform strategies (2,), strategies of a short search (3, d) and their KL (3,)."""
    torch.set_num_threads(threads)
    model, _, windows, search_windows, _ = setting(TINY, None, None, torch.device("cpu"), DTYPES[dtype], 512, 32, 2048, 0)
    f2, pruner = Divergence(model, search_windows), Pruner(model, windows)

    def kl(strategies):
        values = []
        for x in strategies:
            pruner.apply(x)
            values.append(f2())
        return values

    net, *_ = search(kl, 12, initial=16, rounds=3, batch=4, steps=100, final_steps=300)
    strategies = [strategy_for(net, s, pruner.sparsity) for s in REQUESTS]
    return torch.tensor(kl([[s] * 12 for s in UNIFORM])), torch.stack(strategies), torch.tensor(kl(strategies))


def main():
    settings = [(1, "float32"), (2, "float32"), (1, "bfloat16"), (2, "bfloat16")]
    results = {s: measured(*s) for s in settings}
    for (threads, dtype), (uniform, _, kl) in results.items():
        print(f"{threads} thread{'s' * (threads > 1)}, {dtype:<8}  KL uniform " + ", ".join(f"{s}: {v:.8f}" for s, v in zip(UNIFORM, uniform.tolist()))
              + "   KL StratNet " + ", ".join(f"{s}: {v:.6f}" for s, v in zip(REQUESTS, kl.tolist())))
    for left, right in ((settings[0], settings[1]), (settings[2], settings[3]), (settings[0], settings[2])):
        (uniform, x, kl), (uniform_, x_, kl_) = results[left], results[right]
        print(f"{left[0]} {left[1]} against {right[0]} {right[1]}: KL uniform differs by " + ", ".join(f"{v:.1e}" for v in ((uniform_ / uniform) - 1).abs().tolist())
              + f" of its value; strategies by at most {float((x - x_).abs().max()):.3f} in a block, their KL by at most {float((kl_ / kl - 1).abs().max()):.1%}")


if __name__ == "__main__":
    main()
