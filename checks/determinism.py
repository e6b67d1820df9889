"""
How far apart are two runs that differ only in threads or in dtype? Measured on the embedded model,
not promised.

Run       python checks/determinism.py                  (59 s on 2 cores, other work beside it)
On one machine, with one number of threads and one dtype, everything is the same bit for bit: the
tests check it. Here: KL of uniform strategies, and the strategies of a short search (20 evaluations
of 1024 tokens), with 1 and 2 threads, in float32 and bfloat16.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import draw, load_texts  # noqa: E402 (the path first)
from llama import load_llama  # noqa: E402
from prune import F2  # noqa: E402
from ranks import Pruner  # noqa: E402
from script import DTYPES, TINY  # noqa: E402
from unicuco import SearchSettings, search, strategy_for  # noqa: E402

UNIFORM, REQUESTS = (0.3, 0.6), (0.3, 0.5, 0.7)


def measured(model, windows, search_windows, threads):
    """KL of uniform strategies (2,), strategies of a short search (3, d) and their KL (3,)."""
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads, "torch did not take the number of threads"
    pruner = Pruner(model, windows)
    f2 = F2(pruner, search_windows)
    settings = SearchSettings(initial=12, rounds=2, batch=4, steps=50, final_steps=150)
    net = search(lambda batch: [f2(x) for x in batch], 12, settings).net
    strategies = [strategy_for(net, s, pruner.sparsity) for s in REQUESTS]
    uniform = torch.tensor([f2([s] * 12) for s in UNIFORM])
    searched = torch.tensor([f2(x) for x in strategies])
    pruner.restore()
    return uniform, torch.stack(strategies), searched


def show(threads, dtype, uniform, searched):
    ours = ", ".join(f"{s}: {v:.6f}" for s, v in zip(REQUESTS, searched.tolist()))
    plain = ", ".join(f"{s}: {v:.8f}" for s, v in zip(UNIFORM, uniform.tolist()))
    print(f"{threads} threads, {dtype}: KL of uniform {plain}; of the searched {ours}", flush=True)


def compare(results, left, right):
    (uniform, x, kl), (uniform_, x_, kl_) = results[left], results[right]
    apart = ", ".join(f"{v:.1e}" for v in (uniform_ / uniform - 1).abs().tolist())
    print(
        f"{left} against {right}: uniform's KL differs by {apart} of its value;"
        f" searched strategies by at most {float((x - x_).abs().max()):.4f} in a block,"
        f" their KL by at most {float((kl_ / kl - 1).abs().max()):.1e} of its value"
    )


def main():
    results = {}
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = load_llama(TINY, "cpu", DTYPES[dtype])
        windows, _ = load_texts(tokenizer, None, None, 256)
        calibration, search_windows = draw(windows, [16, 4], 0)
        for threads in (1, 2):
            results[threads, dtype] = measured(model, calibration, search_windows, threads)
            uniform, _, searched = results[threads, dtype]
            show(threads, dtype, uniform, searched)
    compare(results, (1, "float32"), (2, "float32"))
    compare(results, (1, "bfloat16"), (2, "bfloat16"))
    compare(results, (1, "float32"), (1, "bfloat16"))


if __name__ == "__main__":
    main()
