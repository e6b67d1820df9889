"""
How far apart are two runs that differ only in threads or in dtype? Measured on the embedded model, not promised.

Run       python checks/determinism.py                  (59 s on 2 cores, other work beside it)
On one machine, with one number of threads and one dtype, everything is the same bit for bit: test_properties.py checks it. Here: KL
of uniform strategies, and the strategies of a short search (20 evaluations of 1024 tokens), with 1 and 2 threads, in float32 and bfloat16.
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


def measured(model, windows, search_windows, threads):
    """KL of uniform strategies (2,), strategies of a short search (3, d) and their KL (3,)."""
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads, "torch did not take the number of threads"
    f2, pruner = Divergence(model, search_windows), Pruner(model, windows)

    def kl(strategies):
        values = []
        for x in strategies:
            pruner.apply(x)
            values.append(f2())
        return values

    net, *_ = search(kl, 12, initial=12, rounds=2, batch=4, steps=50, final_steps=150)
    strategies = [strategy_for(net, s, pruner.sparsity) for s in REQUESTS]
    values = kl([[s] * 12 for s in UNIFORM]), kl(strategies)
    pruner.restore()
    return torch.tensor(values[0]), torch.stack(strategies), torch.tensor(values[1])


def main():
    results = {}
    for dtype in ("float32", "bfloat16"):
        model, _, windows, search_windows, _ = setting(TINY, None, None, torch.device("cpu"), DTYPES[dtype], 256, 16, 1024, 0)
        for threads in (1, 2):
            uniform, _, kl = results[threads, dtype] = measured(model, windows, search_windows, threads)
            print(f"{threads} thread{'s' * (threads > 1)}, {dtype:<8}   KL of uniform " + ", ".join(f"{s}: {v:.8f}" for s, v in zip(UNIFORM, uniform.tolist()))
                  + "   of the searched " + ", ".join(f"{s}: {v:.6f}" for s, v in zip(REQUESTS, kl.tolist())), flush=True)
    for left, right in (((1, "float32"), (2, "float32")), ((1, "bfloat16"), (2, "bfloat16")), ((1, "float32"), (1, "bfloat16"))):
        (uniform, x, kl), (uniform_, x_, kl_) = results[left], results[right]
        apart = ", ".join(f"{v:.1e}" for v in (uniform_ / uniform - 1).abs().tolist())
        print(f"{left[0]} {left[1]} against {right[0]} {right[1]}: uniform's KL differs by {apart} of its value; searched strategies by at most "
              f"{float((x - x_).abs().max()):.4f} in a block, their KL by at most {float((kl_ / kl - 1).abs().max()):.1e} of its value")


if __name__ == "__main__":
    main()
