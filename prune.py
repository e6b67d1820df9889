"""
Prune a Llama: rank every weight once, then any strategy is one comparison; from a request to a smaller checkpoint.

Source    Wanda (Sun et al., arXiv 2306.11695) for the scores; ranking once for all requests is this project's own.
Reading   5 of 6. Before: unicuco.py. Next: train.py.
Shapes    d blocks of 7 Linears, W (d_out, d_in), x_norm (d_in,), strategies (d,) or one sparsity for each Linear, (d, 7).
Not here  weight updates (SparseGPT), structured pruning.

Laptop    python prune.py --sparsity 0.5                  (15 s; ends with the folder that it wrote)
Full      python prune.py --model ~/Llama-2-7b-hf --data c4.jsonl --sparsity 0.3 0.5 0.7
"""
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval import Divergence, batches, draw, load_texts, sha256
from gp import GaussianProcess
from llama import Parser, add_model, choose_device, load_llama, run, save_llama
from offload import offload_blocks
from outputs import new_folder, strict, write_json
from unicuco import load_stratnet, strategy_for
from wishes import KINDS, Unreachable, packed_bytes, parse_request, read_requests, strategy_of

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
    step = max(1, CHUNK // W.shape[1])                      # rows whose bits are still in the cache for the second pass
    for w, r, o in zip(W.view(bits).split(step), ranks.split(step), out.view(bits).split(step)):
        torch.ge(r, k, out=o)                               # 1 where the weight stays, 0 elsewhere, as whole numbers:
        o.mul_(w)                                           # times its bits, so a kept -0.0, inf or NaN is itself and the rest +0.0
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
def activation_norms(model, windows, between=lambda i, norms: False):
    """||X_j||_2 of every input of every Linear over all tokens of windows (n, T): {parameter name: (d_in,) float32}.

    between(i, norms of block i)   called before the outputs of block i are final; True when it changed the block's weights
    """
    windows = windows.to(model.embed.weight.device)
    rotary, norms = model.rotary(windows.shape[1]), {}
    states = [model.embed(w) for w in batches(windows)]
    for i, block in enumerate(tqdm(model.blocks, desc="calibration", disable=None, leave=False)):
        squares = {}
        after = [measured_block(block, h, rotary, squares) for h in states]
        here = {f"model.layers.{i}.{name}.weight": squares[name].sqrt() for name in LINEARS}
        states = [block(h, rotary) for h in states] if between(i, here) else after
        norms.update(here)
    return norms


class Pruner:
    """Ranks of all block weights of `model`, by `metric`, on calibration windows (n, T); then any strategy is one pass.

    Holds, beside the live weights: a dense copy of the block Linears, and one int16 rank for each of their weights. With
    rank_bits=8, one byte: the rank's level of 256, so that sparsities fall to a multiple of 1/256; counts stay exact.
    """

    @torch.inference_mode()
    def __init__(self, model, windows, metric="wanda", rank_bits=16):
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
        if rank_bits not in (8, 16):
            raise ValueError(f"rank_bits is {rank_bits}, not 8 or 16")
        self.model, self.coarse = model, rank_bits == 8
        self.score, norms = METRICS[metric], activation_norms(model, windows)
        self.live = [[model.blocks[i].get_submodule(name).weight for name in LINEARS] for i in range(len(model.blocks))]
        self.names = [[f"model.layers.{i}.{name}.weight" for name in LINEARS] for i in range(len(self.live))]
        self.dense = [[W.clone() for W in block] for block in self.live]
        self.ranks = [[self.rank(W, norms[name]) for W, name in zip(*pair)]
                      for pair in tqdm(list(zip(self.dense, self.names)), desc="ranking", disable=None, leave=False)]
        shapes = torch.tensor([W.shape for W in self.live[0]], dtype=torch.float64)
        self.d_out, self.d_in = shapes.T                                       # (7,) each, the same in every block

    def rank(self, W, x_norm):
        ranks = rank(self.score(W.to(x_norm.device), x_norm)).to(W.device)
        return ranks.int().mul_(256).div_(W.shape[1], rounding_mode="floor").to(torch.uint8) if self.coarse else ranks

    def cuts(self, strategy):
        """The rank from which a weight stays: (d, 7) for a strategy (d,) or (d, 7); ValueError outside [0, 1)."""
        x = torch.as_tensor(strategy, dtype=torch.float64)
        x = x[:, None].expand(-1, len(LINEARS)) if x.ndim == 1 else x
        if x.shape != (len(self.live), len(LINEARS)) or not ((x >= 0) & (x < 1)).all():
            raise ValueError(f"a strategy has a sparsity in [0, 1) for each of {len(self.live)} blocks, not {tuple(x.shape)} values")
        return (x * (256 if self.coarse else self.d_in) + 1e-6).floor()

    def counts(self, strategy):
        """Weights of each row that go, (d, 7): as many as have a rank below the cut."""
        return (self.cuts(strategy) * self.d_in / 256).ceil() if self.coarse else self.cuts(strategy)

    def sparsity(self, strategy):
        """Counted sparsity: the fraction of all block weights that the strategy drops."""
        return float((self.counts(strategy) * self.d_out).sum() / ((self.d_in * self.d_out).sum() * len(self.live)))

    @torch.inference_mode()
    def apply(self, strategy):
        """Make the model's live weights those of the strategy."""
        for dense, ranks, live, cuts in zip(self.dense, self.ranks, self.live, self.cuts(strategy).int().tolist()):
            for W, r, out, k in zip(dense, ranks, live, cuts):
                write_pruned(W, r, k, out)

    def apply_sequential(self, strategy, windows):
        """`apply`, as the Wanda paper does it: each block is ranked anew on what the pruned blocks before it put out.

        The ranks are then those of this one strategy.
        """
        cuts = self.cuts(strategy).int().tolist()
        self.restore()

        def between(i, norms):
            for j, name in enumerate(self.names[i]):
                self.ranks[i][j] = self.rank(self.dense[i][j], norms[name])
                write_pruned(self.dense[i][j], self.ranks[i][j], cuts[i][j], self.live[i][j])
            return True

        activation_norms(self.model, windows, between)

    @torch.inference_mode()
    def restore(self):
        """Make the model dense again."""
        for dense, live in zip(self.dense, self.live):
            for W, out in zip(dense, live):
                out.copy_(W)

    def masks(self, strategy):
        """{parameter name: bool (d_out, d_in), True = kept}. By rank: a natural zero that is kept counts as kept."""
        return {name: r >= k for names, ranks, cuts in zip(self.names, self.ranks, self.cuts(strategy).int().tolist())
                for name, r, k in zip(names, ranks, cuts)}

    def pattern_masks(self, strategy, keep, group):
        """Semi-structured masks: `keep` of every `group` neighbours in a row survive, by the same scores, in whole blocks.

        ceil(2 d s) blocks get the pattern, s the counted sparsity: those where the strategy prunes most; the others stay dense.
        raises ValueError above half of the weights, where d_in is no multiple of the group, and with 8-bit ranks.
        """
        x = torch.as_tensor(strategy, dtype=torch.float64)
        chosen = math.ceil(2 * len(x) * self.sparsity(x) - 1e-9)
        if self.coarse or chosen > len(x) or (self.d_in % group).any():
            raise ValueError(f"the pattern {keep}:{group} prunes half of a block at most, needs 16-bit ranks and rows of a multiple of {group} weights")
        masks = {}
        for i in x.argsort(descending=True, stable=True)[:chosen].tolist():
            for name, r in zip(self.names[i], self.ranks[i]):
                r = r.view(len(r), -1, group)
                masks[name] = ((r[..., None] > r[..., None, :]).sum(-1) >= group - keep).flatten(1)
        return masks

    @torch.inference_mode()
    def apply_masks(self, masks):
        """Make the live weights those of masks {parameter name: bool}, dense where there is none."""
        for names, dense, live in zip(self.names, self.dense, self.live):
            for name, W, out in zip(names, dense, live):
                out.copy_(torch.where(masks[name], W, torch.zeros((), dtype=W.dtype, device=W.device)) if name in masks else W)

    def counted(self, masks):
        """The fraction of all block weights that masks {parameter name: bool} drop."""
        return sum(int((~m).sum()) for m in masks.values()) / (len(self.live) * float((self.d_in * self.d_out).sum()))


# --------------------------------------------------------------------------------------------------------------- requests
def find_stratnet(path, model_folder, blocks):
    """StratNet from `path`, else out/<model name>/, else the model's folder; see `load_stratnet` for what comes back."""
    places = [path] if path else [Path("out") / model_folder.resolve().name / "stratnet.safetensors", model_folder / "stratnet.safetensors"]
    for place in places:
        if Path(place).is_file():
            return load_stratnet(place, blocks)
    raise ValueError(f"no StratNet at {' or '.join(map(str, places))}: python train.py --model {model_folder} makes one, --uniform goes without")


def setting(model_folder, data, tests, device, dtype, seqlen, calibration, search, seed, offload=False):
    """What pruning and its measurement share: model, tokenizer, disjoint windows for calibration and search, test windows."""
    model, tokenizer = load_llama(model_folder, "cpu" if offload else device, dtype)
    if offload:
        offload_blocks(model, device)
    seqlen = seqlen or min(512, model.config.max_position_embeddings)
    if not 2 <= seqlen <= model.config.max_position_embeddings:
        raise ValueError(f"--seqlen {seqlen}: this model has 2 to {model.config.max_position_embeddings} positions")
    windows, held_out = load_texts(tokenizer, data, tests, seqlen)
    return model, tokenizer, *draw(windows, [calibration, max(1, search // seqlen)], seed), held_out


def main():
    p = Parser(__doc__, ["python prune.py --sparsity 0.5", "python prune.py --sparsity 0.3 0.5 0.7 --packed --model DIR --data c4.jsonl",
                         "python prune.py --max-kl 0.1 --max-size 9MB --preference 0.4", "python prune.py --requests wishes.jsonl --out served --json table.json",
                         "python prune.py --unpack served/phone --out plain"])
    add_model(p)
    for kind, (unit, help) in KINDS.items():
        p.add_argument("--" + kind.replace("_", "-"), nargs="+", default=[], metavar=unit, help=help)
    p.add_argument("--requests", type=Path, metavar="FILE", help='jsonl, one request a line: {"name": "phone", "max_size": "9MB"}')
    p.add_argument("--data", type=Path, metavar="FILE", help="calibration text (default: the embedded default text)")
    p.add_argument("--test", type=Path, nargs="+", metavar="FILE", help="text to measure on (default: held-out part of --data)")
    p.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens to measure KL and perplexity on (2048)")
    p.add_argument("--calibration", type=int, default=32, metavar="N", help="calibration windows (32)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window (default: the model's positions, at most 512)")
    p.add_argument("--seed", type=int, default=0, help="of the choice of windows (0)")
    p.add_argument("--stratnet", type=Path, metavar="FILE", help="default: out/<model>/stratnet.safetensors, then the model's folder")
    p.add_argument("--uniform", action="store_true", help="the same sparsity in every block, no StratNet")
    p.add_argument("--metric", choices=METRICS, default="wanda", help="pruning score (wanda)")
    p.add_argument("--pattern", choices=["2:4", "4:8"], help="semi-structured masks, up to sparsity 0.5")
    p.add_argument("--sequential", action="store_true", help="one request: rank each block on the output of the pruned ones before it")
    p.add_argument("--offload", action="store_true", help="keep the blocks in host memory, two at a time on the GPU")
    p.add_argument("--rank-bits", type=int, choices=[8, 16], default=16, help="8: half the memory of ranks, sparsities in steps of 1/256 (16)")
    p.add_argument("--packed", action="store_true", help="write bit masks and survivors: smaller files, read by load_llama alone")
    p.add_argument("--unpack", type=Path, metavar="DIR", help="turn a packed folder into a plain one, at --out")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: out/<model>-<request>; the parent folder for several requests")
    p.add_argument("--force", action="store_true", help="replace existing folders")
    p.add_argument("--dry-run", action="store_true", help="print the strategies, write nothing")
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the table as JSON, into FILE or alone on standard output")
    a = p.parse_args()
    if a.unpack:
        if not a.out:
            raise ValueError("--unpack needs --out")
        model, _ = load_llama(a.unpack)
        with new_folder(a.out, a.force) as folder:
            save_llama(model, folder, a.unpack, {})
        return print(f"wrote {a.out}")
    requests = [parse_request({kind: v}) for kind in KINDS for v in getattr(a, kind)] + (read_requests(a.requests) if a.requests else [])
    names = [r["name"] for r in requests]
    if not requests or len(set(names)) < len(names):
        raise ValueError("nothing is asked: give --sparsity or another request" if not requests else f"two requests are named {max(names, key=names.count)}")
    name, several = a.model.resolve().name, len(requests) > 1
    if a.sequential and (several or a.pattern) or (a.sequential or a.pattern) and any(r["kind"] == "max_kl" for r in requests):
        raise ValueError("--sequential serves one request, without --pattern; neither goes with --max-kl, whose measurements they would change")
    for r in requests:
        r["out"] = (a.out / r["name"] if several else a.out) if a.out else Path("out") / f"{name}-{r['name']}"
        if r["out"].exists() and not (a.force and r["out"].is_dir()) and not a.dry_run:
            raise ValueError(f"{r['out']} exists already; --force replaces a folder")
    device, dtype, reason = choose_device(a.device, a.dtype)
    model, tokenizer, windows, _, held_out = setting(a.model, a.data, a.test, device, dtype, a.seqlen, a.calibration, 1, a.seed, a.offload)
    net, _, X, y, about = (None,) * 5 if a.uniform else find_stratnet(a.stratnet, a.model, len(model.blocks))
    gp = GaussianProcess(about["mean"]).fit(X, y) if net and any(r["kind"] == "max_kl" for r in requests) else None
    text, test = next(iter(held_out.items()))
    test = test[:max(1, a.tokens // test.shape[1])]
    say = (lambda *words: None) if a.json == "-" else print
    say(f"{name} on {device}, {str(dtype)[6:]} ({reason}); calibrated on {windows.numel()} tokens, measured on {test.numel()} of {text}")
    divergence = Divergence(model, test)
    dense_ppl, pruner = divergence.measure()[1], Pruner(model, windows, a.metric, a.rank_bits)
    width = max(map(len, names + ["request"]))
    say(f"{'request':<{width}}  sparsity      KL  perplexity      bytes  seconds\n{'dense':<{width}}    0.0000  0.0000  {dense_ppl:10.3f}")

    def curve(sparsity):
        uniform = torch.full((len(model.blocks),), sparsity, dtype=torch.float64)
        return uniform if net is None else strategy_for(net, sparsity, pruner.sparsity)

    def predicted(x):
        return float(gp.posterior(x[None])[0]) if gp else 8 * float(x.mean())      # without a surrogate: the usual slope

    def measure(x):
        pruner.apply(x)
        return divergence()

    table, unmet = [], []
    for r in requests:
        started = time.perf_counter()
        try:
            strategy = strategy_of(r, curve, net, predicted, measure, lambda x: packed_bytes(pruner, a.model, x))
        except Unreachable as error:
            unmet.append(f"{r['name']}: {error}")
            table.append({"request": r["name"], r["kind"]: r["text"], "unmet": str(error)})
            continue
        pruner.apply_sequential(strategy, windows) if a.sequential else pruner.apply(strategy)
        masks = pruner.pattern_masks(strategy, *map(int, a.pattern.split(":"))) if a.pattern else pruner.masks(strategy)
        if a.pattern:
            pruner.apply_masks(masks)
        counted = pruner.counted(masks) if a.pattern else pruner.sparsity(strategy)
        kl, ppl = divergence.measure()
        row = {"request": r["name"], r["kind"]: r["text"], "sparsity": counted, "kl": kl, "ppl": ppl, "bytes": None,
               "strategy": strategy.tolist()}
        if not a.dry_run:
            with new_folder(r["out"], a.force) as folder:
                save_llama(model, folder, a.model, masks, a.packed)
                row["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
                record = {**row, "counted": counted, "request": {r["kind"]: r["value"]}, "method": "uniform" if a.uniform else "unicuco",
                          "metric": a.metric, "pattern": a.pattern, "model": name, "dense_ppl": dense_ppl, "measured_on": text,
                          "tokens": test.numel(), "calibration": {"text": a.data.name if a.data else "stdlib", "tokens": windows.numel(),
                                                                  "sha256": sha256(a.data) if a.data else None}}
                write_json(folder / "strategy.json", record)
        row["seconds"] = round(time.perf_counter() - started, 3)
        table.append(row)
        say(f"{r['name']:<{width}}  {counted:8.4f}  {kl:6.4f}  {ppl:10.3f}  {row['bytes'] or '-':>9}  {row['seconds']:7.2f}")
        if not several or a.dry_run:
            say(f"{'':<{width}}  blocks " + " ".join(f"{x:.2f}" for x in strategy.tolist()))
    if a.json:
        print(json.dumps(strict(table), indent=1)) if a.json == "-" else write_json(a.json, table)
    if not a.dry_run:
        written = [str(r["out"]) for r, row in zip(requests, table) if "unmet" not in row]
        say("wrote " + (", ".join(written[:3]) or "nothing") + (f" and {len(written) - 3} more" if len(written) > 3 else ""))
    if unmet:
        raise ValueError("; ".join(unmet))


if __name__ == "__main__":
    run(main, ": every folder that is there is complete")
