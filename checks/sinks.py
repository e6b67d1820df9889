"""
Does the first token of a window still become an attention sink once its model is pruned, refitted?

Run       python -m checks.sinks --model DIR --data c4.jsonl --test wiki.test.raw --out FILE
          (Qwen2.5-Coder-0.5B: 3 minutes)
What      the first blocks alone, pruned uniformly and then refitted; the first four tokens of many
          windows of each test text go through them.
Reading   the stream of a first token grows to tens of times that of others, and later tokens attend
          to it; it is lost where it has less than half of the dense model's size, and its window
          with it.
"""

import time
from pathlib import Path

import torch

from curvature import gradient_norms
from eval import cut
from prune import prepare, sources
from ranks import Pruner
from refit import follow, row_counts
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

LENGTH = 4  # tokens of a beginning: the first attends to itself alone
APART = 64  # tokens from one beginning to the next
LARGE = 10  # times the median size of the stream makes a sink


@torch.inference_mode()
def sizes(model, windows):
    """Root mean square of the stream behind the last block, (n, T), of windows (n, T)."""
    h, rotary = model.embed(windows.to(model.embed.weight.device)), model.rotary(windows.shape[1])
    for block in model.blocks:
        h = block(h, rotary)
    return h.float().square().mean(-1).sqrt().cpu()


def beginnings(windows, count):
    """(n, LENGTH): the first tokens of what windows are cut into."""
    return cut(windows.flatten(), APART)[:count, :LENGTH]


def rows_of(model, texts, dense, name):
    """How many of the dense model's sinks are lost in `model`, for each text."""
    rows = []
    for text, windows in texts.items():
        large = dense[text][:, 0] > LARGE * dense[text].median()
        lost = large & (sizes(model, windows)[:, 0] < dense[text][:, 0] / 2)
        found = {"beginnings": len(windows), "sinks": int(large.sum()), "lost": int(lost.sum())}
        rows.append({"model": name, "text": text, **found})
    return rows


def arguments():
    parser = Parser(__doc__, ["python -m checks.sinks --model DIR --data c4.jsonl"])
    add_model(parser)
    add_texts(parser)
    parser.set_defaults(refit=True)
    parser.add_argument("--sparsity", type=float, default=0.4, metavar="S", help="uniform")
    parser.add_argument("--blocks", type=int, default=6, metavar="N", help="how many, the first")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="beginnings a text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the rows as JSON")
    return parser.parse_args()


def main():
    args, started = arguments(), time.perf_counter()
    device, dtype, _ = choose(args)
    setting = prepare(args, device, dtype, args.tokens)
    model = setting.model
    pruner = Pruner(model, setting.calibration)
    g_norms = gradient_norms(pruner, setting.calibration, args.seed)
    strategy = [args.sparsity] * len(model.blocks)
    model.model.layers = model.model.layers[: args.blocks]
    texts = {text: beginnings(w, args.count) for text, w in setting.held_out.items()}
    dense = {text: sizes(model, windows) for text, windows in texts.items()}
    pruner.apply(strategy)
    rows = rows_of(model, texts, dense, "as pruned")
    follow(pruner, row_counts(pruner, strategy, g_norms), setting.calibration)
    rows += rows_of(model, texts, dense, "refitted")
    for r in rows:
        print(f"{r['model']:<10} {r['text']:<24} {r['lost']} of {r['sinks']} sinks lost")
    print(f"{args.blocks} blocks at {args.sparsity:g}; {time.perf_counter() - started:.0f} s")
    if args.out:
        write_provenance(args.out, provenance() | {"inputs": sources(args)})
        write_json(args.out, rows, rows=True)


if __name__ == "__main__":
    run(main)
