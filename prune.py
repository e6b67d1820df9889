"""
Prune a Llama: rank every weight once, then any strategy is one comparison; from a request to a smaller checkpoint.

Source    Wanda (Sun et al., arXiv 2306.11695) for the scores; ranking once for all requests is this project's own.
Reading   5 of 6. Before: unicuco.py. Next: train.py.
Shapes    d blocks of 7 Linears, W (d_out, d_in), x_norm (d_in,), strategies (d,) or one sparsity for each Linear, (d, 7).
Not here  weight updates (SparseGPT), structured pruning.

Laptop    python prune.py --sparsity 0.5                  (15 s; ends with the folder that it wrote)
Full      python prune.py --model ~/Llama-2-7b-hf --data c4.jsonl --sparsity 0.3 0.5 0.7
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from eval import Divergence, batches, draw, load_texts, sha256
from llama import TINY, Parser, add_model, choose_device, load_llama, new_folder, run, save_llama, write_text
from unicuco import MAX, load_stratnet, strategy_for

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
CHUNK = 2**21                       # weights ranked at once: their 64-bit keys take 16 MB


# ------------------------------------------------------------------------------------------------------- scores and ranks
def wanda(W, x_norm):
    """|W_ij| ||X_j||_2, (d_out, d_in) float32: a small weight that meets large activations stays."""
    return W.abs().float() * x_norm


def magnitude(W, x_norm):
    """|W_ij|, (d_out, d_in) float32."""
    return W.abs().float()


METRICS = {"wanda": wanda, "magnitude": magnitude}


def count(sparsity, d_in):
    """How many of the d_in weights of a row go: int(0.29 * 100) would be 28, hence the 1e-6."""
    return int(sparsity * d_in + 1e-6)


def rank(score):
    """Place of each weight in its row's score order, (d_out, d_in) int16 (int32 from 32768 columns): 0 goes first.

    score     (d_out, d_in) float32, non-negative and not NaN (ValueError); equal scores fall in column order
    A non-negative float orders like its bits, so (bits, column) in one 64-bit key makes plain sorting stable.
    """
    d_out, d_in = score.shape
    if not float(score.sum()) < float("inf"):
        raise ValueError("pruning scores are NaN or infinite: the weights or the activations of the model overflow")
    place = torch.int16 if d_in < 2**15 else torch.int32
    columns = torch.arange(d_in, device=score.device)
    ranks = torch.empty(d_out, d_in, dtype=place, device=score.device)
    for rows, out in zip(score.split(max(1, CHUNK // d_in)), ranks.split(max(1, CHUNK // d_in))):
        keys = rows.contiguous().view(torch.int32).long().bitwise_left_shift_(24).bitwise_or_(columns)
        ordered = keys.sort(-1).values if keys.is_cuda else torch.from_numpy(np.sort(keys.numpy()))   # numpy sorts with SIMD
        out.scatter_(1, ordered.bitwise_and_(2**24 - 1), columns.to(place).expand(len(rows), -1))
    return ranks


def keep_mask(score, sparsity):
    """Which weights of one Linear survive: the lowest scores of every output row go.

    score     (d_out, d_in) float, non-negative;  sparsity: fraction of each row to drop, in [0, 1)
    returns   (d_out, d_in) bool, True = keep; every row has int(sparsity * d_in + 1e-6) False
    raises    ValueError outside [0, 1) or NaN
    Equal scores fall in column order, so a higher sparsity always drops a superset.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside 0 to 1")
    return rank(score.float()) >= count(sparsity, score.shape[1])


def write_pruned(W, ranks, k, out):
    """out = W where ranks >= k, else +0.0, all (d_out, d_in): set, never multiplied (-1 * False is -0.0, inf * False is NaN)."""
    if W.is_cuda:
        return torch.where(ranks >= k, W, torch.zeros((), dtype=W.dtype, device=W.device), out=out)
    bits = {2: torch.int16, 4: torch.int32}[W.element_size()]
    step = max(1, 2**18 // W.shape[1])                      # rows whose bits stay in the cache between the three passes
    keep = torch.empty(min(step, len(W)), W.shape[1], dtype=ranks.dtype)
    shift = 8 * ranks.element_size() - 1
    for w, r, o in zip(W.view(bits).split(step), ranks.split(step), out.view(bits).split(step)):
        m = keep[:len(w)]
        torch.sub(k - 1, r, out=m)                          # negative where the weight stays
        m.bitwise_right_shift_(shift)                       # all ones there, all zeros elsewhere
        torch.bitwise_and(m, w, out=o)
    return out


# ---------------------------------------------------------------------------------------------------- activations, Pruner
def measured_block(block, h, rotary, squares):
    """Block.forward, spelled out; adds sum_t X_tj^2 of the input of each Linear to `squares`, name -> (d_in,) float32."""
    def see(x, *names):
        energy = torch.linalg.vector_norm(x.flatten(0, 1), dim=0, dtype=torch.float32) ** 2
        for name in names:
            squares[name] = squares.get(name, 0) + energy

    attention, mlp = block.self_attn, block.mlp
    x = block.input_layernorm(h)
    see(x, *LINEARS[:3])
    mixed = attention.mix(x, rotary)
    see(mixed, LINEARS[3])
    h = h + attention.o_proj(mixed)
    x = block.post_attention_layernorm(h)
    see(x, *LINEARS[4:6])
    gated = mlp.gate(x)
    see(gated, LINEARS[6])
    return h + mlp.down_proj(gated)


@torch.inference_mode()
def activation_norms(model, windows):
    """||X_j||_2 of every input of every Linear over all tokens of windows (n, T): {parameter name: (d_in,) float32}."""
    windows = windows.to(model.embed.weight.device)
    rotary, norms = model.rotary(windows.shape[1]), {}
    states = [model.embed(w) for w in batches(windows)]
    for i, block in enumerate(model.blocks):
        squares = {}
        states = [measured_block(block, h, rotary, squares) for h in states]
        norms.update({f"model.layers.{i}.{name}.weight": squares[name].sqrt() for name in LINEARS})
    return norms


class Pruner:
    """Ranks of all block weights of `model`, by `metric`, on calibration windows (n, T); then any strategy is one pass.

    Holds, beside the live weights: a dense copy of the block Linears, and one int16 rank for each of their weights.
    """

    @torch.inference_mode()
    def __init__(self, model, windows, metric="wanda"):
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
        self.model = model
        norms = activation_norms(model, windows)
        self.live = [[block.get_submodule(name).weight for name in LINEARS] for block in model.blocks]
        self.names = [[f"model.layers.{i}.{name}.weight" for name in LINEARS] for i in range(len(self.live))]
        self.dense = [[W.clone() for W in block] for block in self.live]
        self.ranks = [[rank(METRICS[metric](W, norms[name])) for W, name in zip(*pair)] for pair in zip(self.dense, self.names)]
        shapes = torch.tensor([W.shape for W in self.live[0]], dtype=torch.float64)
        self.d_out, self.d_in = shapes.T                                       # (7,) each, the same in every block

    def counts(self, strategy):
        """Weights of each row to drop: (d, 7) for a strategy (d,) or (d, 7); ValueError outside [0, 1)."""
        x = torch.as_tensor(strategy, dtype=torch.float64)
        x = x[:, None].expand(-1, len(LINEARS)) if x.ndim == 1 else x
        if x.shape != (len(self.live), len(LINEARS)) or not ((x >= 0) & (x < 1)).all():
            raise ValueError(f"a strategy has a sparsity in [0, 1) for each of {len(self.live)} blocks, not {tuple(x.shape)} values")
        return (x * self.d_in + 1e-6).floor()

    def sparsity(self, strategy):
        """Counted sparsity: the fraction of all block weights that the strategy drops."""
        return float((self.counts(strategy) * self.d_out).sum() / ((self.d_in * self.d_out).sum() * len(self.live)))

    @torch.inference_mode()
    def apply(self, strategy):
        """Make the model's live weights those of the strategy."""
        for dense, ranks, live, counts in zip(self.dense, self.ranks, self.live, self.counts(strategy).int().tolist()):
            for W, r, out, k in zip(dense, ranks, live, counts):
                write_pruned(W, r, k, out)

    @torch.inference_mode()
    def restore(self):
        """Make the model dense again."""
        for dense, live in zip(self.dense, self.live):
            for W, out in zip(dense, live):
                out.copy_(W)

    def masks(self, strategy):
        """{parameter name: bool (d_out, d_in), True = kept}. By rank: a natural zero that is kept counts as kept."""
        return {name: r >= k for names, ranks, counts in zip(self.names, self.ranks, self.counts(strategy).int().tolist())
                for name, r, k in zip(names, ranks, counts)}


# --------------------------------------------------------------------------------------------------------------- requests
def find_stratnet(path, model_folder, blocks):
    """StratNet from `path`, else out/<model name>/, else the model's folder; see `load_stratnet` for what comes back."""
    places = [path] if path else [Path("out") / model_folder.resolve().name / "stratnet.safetensors", model_folder / "stratnet.safetensors"]
    for place in places:
        if Path(place).is_file():
            return load_stratnet(place, blocks)
    raise ValueError(f"no StratNet at {' or '.join(map(str, places))}: python train.py --model {model_folder} makes one, --uniform goes without")


def setting(model_folder, data, tests, device, dtype, seqlen, calibration, search, seed):
    """What pruning and its measurement share: model, tokenizer, disjoint windows for calibration and search, test windows."""
    model, tokenizer = load_llama(model_folder, device, dtype)
    seqlen = seqlen or min(512, model.config.max_position_embeddings)
    if not 2 <= seqlen <= model.config.max_position_embeddings:
        raise ValueError(f"--seqlen {seqlen}: this model has 2 to {model.config.max_position_embeddings} positions")
    windows, held_out = load_texts(tokenizer, data, tests, seqlen)
    return model, tokenizer, *draw(windows, [calibration, max(1, search // seqlen)], seed), held_out


def main():
    p = Parser(__doc__, ["python prune.py --sparsity 0.5", "python prune.py --sparsity 0.3 0.5 0.7 --model DIR --data c4.jsonl",
                         "python prune.py --sparsity 0.5 --uniform --metric magnitude --out out/plain"])
    add_model(p)
    p.add_argument("--sparsity", type=float, nargs="+", required=True, metavar="S", help=f"fraction of block weights that goes, 0 to {MAX}")
    p.add_argument("--data", type=Path, metavar="FILE", help="calibration text (default: the embedded default text)")
    p.add_argument("--test", type=Path, nargs="+", metavar="FILE", help="text to measure on (default: held-out part of --data)")
    p.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens to measure KL and perplexity on (8192)")
    p.add_argument("--calibration", type=int, default=32, metavar="N", help="calibration windows (32)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window (default: the model's positions, at most 512)")
    p.add_argument("--seed", type=int, default=0, help="of the choice of windows (0)")
    p.add_argument("--stratnet", type=Path, metavar="FILE", help="default: out/<model>/stratnet.safetensors, then the model's folder")
    p.add_argument("--uniform", action="store_true", help="the same sparsity in every block, no StratNet")
    p.add_argument("--metric", choices=METRICS, default="wanda", help="pruning score (wanda)")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: out/<model>-<sparsity>")
    p.add_argument("--force", action="store_true", help="replace an existing --out")
    a = p.parse_args()
    name = a.model.resolve().name
    outs = [a.out if a.out and len(a.sparsity) == 1 else (a.out or Path("out")) / f"{name}-{s:g}" for s in a.sparsity]
    for s, out in zip(a.sparsity, outs):
        if not 0 <= s <= MAX:
            raise ValueError(f"--sparsity {s:g} is outside 0 to {MAX}")
        if out.exists() and not a.force:
            raise ValueError(f"{out} exists already; --force replaces it")
    device, dtype, reason = choose_device(a.device, a.dtype)
    model, tokenizer, windows, _, held_out = setting(a.model, a.data, a.test, device, dtype, a.seqlen, a.calibration, 1, a.seed)
    net = None if a.uniform else find_stratnet(a.stratnet, a.model, len(model.blocks))[0]
    text, test = next(iter(held_out.items()))
    test = test[:max(1, a.tokens // test.shape[1])]
    print(f"{name} on {device}, {str(dtype)[6:]} ({reason}); calibrated on {windows.numel()} tokens, measured on {test.numel()} of {text}")
    divergence = Divergence(model, test)
    print(f"dense             KL 0.0000   perplexity {divergence.measure()[1]:.3f}")
    pruner = Pruner(model, windows, a.metric)
    for s, out in zip(a.sparsity, outs):
        started = time.perf_counter()
        strategy = torch.full((len(model.blocks),), s, dtype=torch.float64) if a.uniform else strategy_for(net, s, pruner.sparsity)
        pruner.apply(strategy)
        kl, ppl = divergence.measure()
        counted = pruner.sparsity(strategy)
        print(f"sparsity {counted:.4f}   KL {kl:.4f}   perplexity {ppl:.3f}   {'uniform' if a.uniform else 'StratNet'}, blocks "
              + " ".join(f"{x:.2f}" for x in strategy.tolist()))
        record = {"request": {"sparsity": s}, "strategy": strategy.tolist(), "counted": counted, "metric": a.metric,
                  "calibration": {"text": a.data.name if a.data else "stdlib", "sha256": a.data and sha256(a.data), "tokens": windows.numel()},
                  "measured": {"text": text, "tokens": test.numel(), "kl": kl, "ppl": ppl}, "method": "uniform" if a.uniform else "unicuco"}
        with new_folder(out, a.force) as folder:
            save_llama(model, folder, a.model, pruner.masks(strategy))
            write_text(folder / "strategy.json", json.dumps(record, indent=1) + "\n")
        print(f"wrote {out} ({time.perf_counter() - started:.1f} s)")


if __name__ == "__main__":
    run(main)
