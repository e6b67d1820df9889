"""
Prune a Llama: rank every weight once, then any strategy is one comparison; from a request to a
smaller checkpoint.

Source    Wanda (Sun et al., arXiv 2306.11695) for the scores; ranking once for all requests is this
          project's own.
Reading   6 of 8. Before: eval.py. Next: train.py. Beside it: curvature.py and refit.py, then
          request.py (a wish -> a strategy) and patterns.py (2:4 masks).
Shapes    d blocks of 7 Linears, W (d_out, d_in), x_norm (d_in,), strategies (d,) or one sparsity
          for each Linear, (d, 7).
Not here  structured pruning; the refit of what survives is refit.py's.

Laptop    python prune.py --sparsity 0.5                  (15 s; ends with the folder that it wrote)
Full      python prune.py --model ~/Llama-2-7b-hf --data c4.jsonl --sparsity 0.3 0.5 0.7
"""

import argparse
import contextlib
import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from curvature import read_curves
from eval import Divergence, batches, draw, load_texts, stdlib_files
from llama import Tokenizer, files_to_copy, load_llama, save_llama, stored_dtypes, weight_files
from model import LINEARS, Llama
from offload import offload_blocks
from patterns import pattern_masks
from refit import follow
from request import (
    KINDS,
    Surrogate,
    Unreachable,
    packed_bytes,
    parse_request,
    read_requests,
    strategy_of,
)
from script import (
    RECORD,
    Parser,
    Refused,
    add_model,
    add_texts,
    at_least,
    choose_device,
    choose_tokens,
    new_folder,
    provenance,
    refuse_to_overwrite,
    refuse_to_replace,
    run,
    say,
    send,
    sha256,
    strict,
    write_json,
    write_provenance,
)
from unicuco import Layout, Trained, cap_divergence, load_stratnet, strategy_for, trained_on_prior

CHUNK = 2**21  # weights ranked at once: their 64-bit keys take 16 MB
CUDA_CHUNK = 2**24  # and on CUDA, where every chunk is a launch: scores and places, 200 MB
PARKED = 4  # one dense copy in four: at 7 billion weights 3.2 GB, of which a refit takes 2.4


# --------------------------------------------------------------------------------- scores and ranks
def wanda(W, x_norm):
    """|W_ij| ||X_j||_2, (d_out, d_in) float32: a small weight under large activations stays."""
    return W.abs().float() * x_norm


def magnitude(W, x_norm):
    """|W_ij|, (d_out, d_in) float32."""
    return W.abs().float()


METRICS = {"wanda": wanda, "magnitude": magnitude}


def weights_to_drop(sparsity, d_in):
    """How many of the d_in weights of a row go: int(0.29 * 100) would be 28, hence the 1e-6."""
    return int(sparsity * d_in + 1e-6)


def stable_order(scores):
    """Columns of each row of scores (rows, d_in) float32 in ascending order, ties in column order:
    (rows, d_in) int64.

    A non-negative float orders like its bits, so on the CPU (bits, column) in one 64-bit key makes
    plain sorting stable; CUDA's radix sort is stable by itself.
    """
    if scores.is_cuda:
        return scores.sort(dim=-1, stable=True).indices
    columns = torch.arange(scores.shape[1], device=scores.device)
    keys = scores.contiguous().view(torch.int32).long()
    keys = keys.bitwise_left_shift_(24).bitwise_or_(columns)
    return torch.from_numpy(np.sort(keys.numpy())).bitwise_and_(2**24 - 1)  # SIMD, in numpy


def rank(score):
    """Place of each weight in its row's score order, (d_out, d_in) int16 (int32 from 32768
    columns): 0 goes first.

    score     (d_out, d_in) float32, non-negative and not NaN: see `check_scores`; equal scores fall
              in column order
    """
    d_in = score.shape[1]
    columns = torch.arange(d_in, device=score.device).to(
        torch.int16 if d_in < 2**15 else torch.int32
    )
    ranks = torch.empty(score.shape, dtype=columns.dtype, device=score.device)
    rows = max(1, (CUDA_CHUNK if score.is_cuda else CHUNK) // d_in)
    for scores, out in zip(score.split(rows), ranks.split(rows)):
        out.scatter_(1, stable_order(scores), columns.expand(len(scores), -1))
    return ranks


def check_scores(sums):
    """Refused when one of the scores that were summed is NaN or infinite; sums: 0-dim tensors, read
    at once.
    """
    if not all(total < float("inf") for total in torch.stack(sums).tolist()):
        raise Refused(
            "pruning scores are NaN or infinite: the weights or the activations of the model"
            " overflow"
        )


def keep_mask(score, sparsity):
    """Which weights of one Linear survive: the lowest scores of every output row go.

    score     (d_out, d_in) float, non-negative;  sparsity: fraction of each row to drop, in [0, 1)
    returns   (d_out, d_in) bool, True = keep; every row has int(sparsity * d_in + 1e-6) False
    raises    ValueError outside [0, 1) or NaN
    Equal scores fall in column order, so a higher sparsity always drops a superset.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside 0 to 1")
    check_scores([score.float().sum()])
    return rank(score.float()) >= weights_to_drop(sparsity, score.shape[1])


def write_pruned(W, ranks, threshold, out):
    """out = W where ranks >= threshold, else +0.0, all (d_out, d_in): set, never multiplied (-1 *
    False is -0.0, inf * False is NaN).
    """
    bits = {2: torch.int16, 4: torch.int32}[W.element_size()]
    if W.is_cuda:
        write_on_cuda(W.view(bits), ranks, threshold, out.view(bits))
        return out
    rows = max(1, CHUNK // W.shape[1])  # whose bits are still in the cache for the second pass
    pieces = zip(W.view(bits).split(rows), ranks.split(rows), out.view(bits).split(rows))
    for w, r, o in pieces:
        torch.ge(r, threshold, out=o)  # 1 where the weight stays, 0 elsewhere, as whole numbers:
        o.mul_(w)  # times its bits, so a kept -0.0, inf or NaN is itself and the rest +0.0
    return out


def write_on_cuda(bits, ranks, threshold, out):
    """`write_pruned` of weights as whole numbers, in one kernel: the gradient of ReLU is 0 where
    ranks <= threshold - 1, else `bits`. 6 bytes a weight; a mask and `where` would take 8. PyTorch
    has it for int16 on CUDA, too: ActivationThresholdKernel.cu, AT_DISPATCH_ALL_TYPES_AND2.
    """
    if ranks.element_size() > bits.element_size():  # it would cut the ranks to 16 bits
        torch.where(ranks >= threshold, bits, 0, out=out)
    else:
        torch.ops.aten.threshold_backward(bits, ranks, threshold - 1, grad_input=out)


# ------------------------------------------------------------------------------ activations, Pruner
class InputNorms:
    """Hooks on the seven Linears of one block: the energy of each one's input, over all tokens that
    go through it.
    """

    def __init__(self, block):
        self.squares = {}
        self.hooks = [
            block.get_submodule(name).register_forward_pre_hook(self.hook(name)) for name in LINEARS
        ]

    def hook(self, name):
        def see(module, args):
            x = args[0].flatten(0, 1)
            energy = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32) ** 2
            self.squares[name] = self.squares.get(name, 0) + energy

        return see

    def norms(self):
        """||X_j||_2 of every input, {Linear: (d_in,) float32}; the hooks are gone."""
        for hook in self.hooks:
            hook.remove()
        return {name: self.squares[name].sqrt() for name in LINEARS}


def parameter_name(i, linear):
    return f"model.layers.{i}.{linear}.weight"


@torch.inference_mode()
def activation_norms(model, windows):
    """||X_j||_2 of every input of every Linear over all tokens of windows (n, T): {parameter name:
    (d_in,) float32}.
    """
    windows = windows.to(model.embed.weight.device)
    rotary, result = model.rotary(windows.shape[1]), {}
    states = [model.embed(w) for w in batches(windows)]
    for i, block in enumerate(tqdm(model.blocks, desc="calibration", disable=None, leave=False)):
        seen = InputNorms(block)
        states = [block(h, rotary) for h in states]
        result |= {parameter_name(i, name): norm for name, norm in seen.norms().items()}
    return result


class Masks(Mapping):
    """{parameter name: bool (d_out, d_in), True = kept} of a strategy, each made when it is asked
    for: one exists at a time.

    By rank: a natural zero that is kept counts as kept.
    """

    def __init__(self, names, ranks, thresholds):
        triples = zip(names, ranks, thresholds)
        self.parts = {n: (r, k) for block in triples for n, r, k in zip(*block)}

    def __getitem__(self, name):
        ranks, threshold = self.parts[name]
        return ranks >= threshold

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)

    def counts(self):
        """{parameter name: how many weights of each row go}."""
        return {name: threshold for name, (_, threshold) in self.parts.items()}


class Survivors(Mapping):
    """{parameter name: bool (d_out, d_in), True = kept} of refitted values: what is not 0."""

    def __init__(self, values):
        self.values_of = values

    def __getitem__(self, name):
        return self.values_of[name] != 0

    def __iter__(self):
        return iter(self.values_of)

    def __len__(self):
        return len(self.values_of)


class Pruner:
    """Ranks of all block weights of `model`, by `metric`, on calibration windows (n, T); then any
    strategy is one pass.

    Holds, beside the live weights: a dense copy of the block Linears, and one int16 rank for each
    of their weights.
    """

    @torch.inference_mode()
    def __init__(self, model, windows, metric="wanda"):
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
        self.model, self.score = model, METRICS[metric]
        norms = activation_norms(model, windows)
        blocks = range(len(model.blocks))
        self.names = [[parameter_name(i, name) for name in LINEARS] for i in blocks]
        self.live = [
            [model.blocks[i].get_submodule(name).weight for name in LINEARS] for i in blocks
        ]
        self.dense = [[W.clone() for W in block] for block in self.live]
        self.ranks = [
            self.rank_block(block, [norms[name] for name in names])
            for block, names in tqdm(
                list(zip(self.dense, self.names)), desc="ranking", disable=None, leave=False
            )
        ]
        shapes = torch.tensor([W.shape for W in self.live[0]], dtype=torch.float64)
        self.d_out, self.d_in = shapes.T  # (7,) each, the same in every block

    def rank_block(self, block, norms):
        """The ranks of one block's matrices, where they are; computed where the norms are."""
        ranks, sums = [], []
        for W, x_norm in zip(block, norms):
            score = self.score(W.to(x_norm.device), x_norm)
            sums.append(score.sum())
            ranks.append(rank(score).to(W.device))
        check_scores(sums)
        return ranks

    def full(self, strategy):
        """A strategy as one sparsity in [0, 1) for each Linear, (d, 7) float64; (d,) gives a
        block's to each of its Linears.
        """
        x = torch.as_tensor(strategy, dtype=torch.float64)
        if x.shape == (len(self.live) * len(LINEARS),):
            x = x.view(-1, len(LINEARS))
        elif x.ndim == 1:
            x = x[:, None].expand(-1, len(LINEARS))
        if x.shape != (len(self.live), len(LINEARS)) or not ((x >= 0) & (x < 1)).all():
            raise ValueError(
                f"a strategy has a sparsity in [0, 1) for each of {len(self.live)} blocks, not"
                f" {tuple(x.shape)} values"
            )
        return x

    def dropped_per_row(self, strategy):
        """Weights of each row that go, (d, 7) float64: whole numbers."""
        return (self.full(strategy) * self.d_in + 1e-6).floor()

    def rank_thresholds(self, strategy):
        """The rank from which a weight stays, (d, 7) nested lists of int: as many as go have a rank
        below it.
        """
        return self.dropped_per_row(strategy).int().tolist()

    def sparsity(self, strategy):
        """Counted sparsity: the fraction of all block weights that the strategy drops."""
        dropped = (self.dropped_per_row(strategy) * self.d_out).sum()
        return float(dropped / ((self.d_in * self.d_out).sum() * len(self.live)))

    @torch.inference_mode()
    def apply(self, strategy):
        """Make the model's live weights those of the strategy."""
        for block in zip(self.dense, self.ranks, self.rank_thresholds(strategy), self.live):
            for W, ranks, threshold, out in zip(*block):
                write_pruned(W, ranks, threshold, out)

    @torch.inference_mode()
    def restore(self):
        """Make the model dense again."""
        for dense, live in zip(self.dense, self.live):
            for W, out in zip(dense, live):
                out.copy_(W)

    @contextlib.contextmanager
    def parked(self):
        """Within, every PARKED-th block's dense copies are in host memory if they were on a GPU:
        their room there is what a refit, which starts from the live weights, takes.
        """
        device = self.dense[0][0].device
        blocks = self.dense[::PARKED] if device.type == "cuda" else []
        for block in blocks:
            block[:] = [W.to("cpu", non_blocking=True) for W in block]
        if blocks:
            torch.cuda.current_stream(device).synchronize()
        try:
            yield
        finally:
            for block in blocks:
                block[:] = [send(W, device) for W in block]

    def masks(self, strategy):
        """{parameter name: bool (d_out, d_in), True = kept}, made one by one: see `Masks`."""
        return Masks(self.names, self.ranks, self.rank_thresholds(strategy))

    @torch.inference_mode()
    def apply_masks(self, masks):
        """Make the live weights those of masks {parameter name: bool}, else dense."""
        for names, dense, live in zip(self.names, self.dense, self.live):
            for name, W, out in zip(names, dense, live):
                kept = masks.get(name)
                zero = torch.zeros((), dtype=W.dtype, device=W.device)
                out.copy_(W if kept is None else torch.where(kept, W, zero))

    @torch.inference_mode()
    def zeros(self):
        """The fraction of the live block weights that are 0, whoever made them so."""
        live = [W for block in self.live for W in block]
        kept = int(torch.stack([W.count_nonzero() for W in live]).sum())  # one wait for the device
        return 1 - kept / sum(W.numel() for W in live)

    def mask_sparsity(self, masks):
        """The fraction of all block weights that masks {parameter name: bool} drop."""
        dropped = sum(int((~kept).sum()) for kept in masks.values())
        return dropped / (len(self.live) * float((self.d_in * self.d_out).sum()))


class F2:
    """The objective f2 as an object: strategy -> KL(P_dense || P_pruned) in nats per token on
    windows (n, T).

    tokens_spent   of all evaluations so far
    """

    def __init__(self, pruner, windows):
        pruner.restore()
        self.pruner, self.divergence = pruner, Divergence(pruner.model, windows)
        self.windows, self.tokens_spent = windows, 0

    def __call__(self, strategy):
        """KL, 100 for a model pruned to ruin. The model stays pruned."""
        return cap_divergence(self.measure(strategy)[0])

    def measure(self, strategy):
        """(KL, perplexity) of the strategy; NaN and infinity as they are."""
        self.pruner.apply(strategy)
        self.tokens_spent += self.windows.numel()
        return self.divergence.measure()


# ----------------------------------------------------------------------------------------- requests
def sources(args):
    """What every run depends on: model, text and windows. `args.dtype` is the chosen one."""
    if args.data:
        name, digest = args.data.name, sha256(args.data) if args.data.is_file() else None
    else:
        name = f"stdlib {platform.python_version()}"
        digest = hashlib.sha256("".join(stdlib_files(False)).encode()).hexdigest()
    return {
        "model": args.model.resolve().name,
        "weights": [sha256(path) for path in weight_files(args.model)],
        "config": sha256(args.model / "config.json"),
        "data": name,
        "sha256": digest,
        "tokens": args.tokens,
        "calibration": args.calibration,
        "seqlen": args.seqlen,
        "dtype": args.dtype,
    }


def tests(args):
    """{name: digest} of the texts to test on that are files."""
    return {path.name: sha256(path) for path in args.test or []}


@dataclass
class Setting:
    """What pruning and its measurement share. Windows are (n, T) long, none is in two sets."""

    model: Llama
    tokenizer: Tokenizer
    calibration: torch.Tensor
    search: torch.Tensor
    held_out: dict  # {text: windows}


def prepare(args, device, dtype, search_tokens):
    """Setting of a command line with the options of `add_model` and `add_texts`, and of --offload
    if it has it.
    """
    offload = getattr(args, "offload", False)
    model, tokenizer = load_llama(args.model, "cpu" if offload else device, dtype)
    if offload:
        offload_blocks(model, device)
    positions = model.config.max_position_embeddings
    seqlen = args.seqlen or min(512, positions)
    if not 2 <= seqlen <= positions:
        raise Refused(f"--seqlen {seqlen}: this model has 2 to {positions} positions")
    searched = max(1, search_tokens // seqlen)
    wanted = args.calibration
    enough = ((wanted or 64) + searched + 1) * seqlen
    windows, held_out = load_texts(tokenizer, args.data, args.test, seqlen, args.seed, enough)
    if wanted is None:  # a refit learns from its windows: it gains from every one up to 64
        wanted = max(1, min(64 if args.refit else 32, len(windows) - searched))
    calibration, search = draw(windows, [wanted, searched], args.seed)
    return Setting(model, tokenizer, calibration, search, held_out)


def find_stratnet(path, model_folder, blocks):
    """Trained StratNet from `path`, else out/<model name>/, else the model's folder; None if there
    is none. A `path` that is not there is refused.
    """
    name = "stratnet.safetensors"
    places = [Path("out") / model_folder.resolve().name / name, model_folder / name]
    if path:
        places = [path]
    for place in places:
        if Path(place).is_file():
            return load_stratnet(place, blocks)
    if path:
        raise Refused(f"no StratNet at {path}: python train.py --model {model_folder} makes one")
    return None


def check_made_for(about, args):
    """Refuse a StratNet that was trained on other weights, or for another pruning score: its
    settings `about` say so.
    """
    again = "python train.py makes one for this model, --uniform does without"
    metric = about.get("metric", args.metric)
    if metric != args.metric:
        raise Refused(f"the StratNet was trained for --metric {metric}, not {args.metric}: {again}")
    weights = about.get("weights")
    if weights is not None and weights != [sha256(path) for path in weight_files(args.model)]:
        raise Refused(
            f"the StratNet was trained on other weights than those of {args.model}: {again}"
        )


def chosen_by_refit(args):
    """Whether the refit says which weights of a row go, and not their scores."""
    return args.refit and not (args.keep_masks or args.pattern)


def stamps(folder):
    """Size and time of every weight file: what changes when somebody replaces one."""
    return [(p.stat().st_size, p.stat().st_mtime_ns) for p in weight_files(folder)]


def stratnet_from_curvature(pruner, windows, seed):
    """Trained on the table of curvature alone, in seconds: what serves where train.py never ran."""
    curves = torch.stack(read_curves(pruner, windows, seed))
    layout = Layout(len(pruner.live), pruner.d_in * pruner.d_out)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net, scale = trained_on_prior(layout, curves, 3000, generator)
    nothing = torch.empty(0, len(layout.share), dtype=torch.float64)
    return Trained(net, layout, scale, nothing, nothing[:, 0], curves, {"mean": "curvature"})


class Service:
    """Answers requests: model, ranks, StratNet and the text to measure on, prepared once for all of
    them.
    """

    def __init__(self, args, device, dtype):
        self.args = args
        self.stamps = stamps(args.model)
        setting = prepare(args, device, dtype, search_tokens=1)
        self.model, self.calibration = setting.model, setting.calibration
        blocks = len(self.model.blocks)
        self.trained, self.method = None, "uniform"
        if not args.uniform:
            self.trained = find_stratnet(args.stratnet, args.model, blocks)
            self.method = "unicuco" if self.trained else "curvature"
        if self.method == "unicuco":
            check_made_for(self.trained.about, args)
        self.text, test = next(iter(setting.held_out.items()))
        self.test = test[: max(1, args.tokens // test.shape[1])]
        self.divergence = Divergence(self.model, self.test)
        self.dense_ppl = self.divergence.measure()[1]
        self.pruner = Pruner(self.model, self.calibration, args.metric)
        self.source_zeros = self.pruner.zeros()
        if self.method == "curvature":
            self.trained = stratnet_from_curvature(self.pruner, self.calibration, args.seed)

    def curve(self, sparsity):
        """The strategy for a sparsity: StratNet's (D,), or uniform (d,)."""
        if self.trained is None:
            return torch.full((len(self.model.blocks),), sparsity, dtype=torch.float64)
        return strategy_for(self.trained.net, sparsity, self.pruner.sparsity)

    def surrogate(self, predicts):
        """What `strategy_of` asks; if it predicts, the GP is fitted again, from StratNet's data."""
        trained = self.trained
        gp = trained.gp() if trained is not None and predicts else None
        return Surrogate(self.curve, trained and trained.net, gp, self.measure, self.bytes)

    def measure(self, strategy):
        """KL of the model that would be delivered, refitted if it would be: as measured, or what
        it stays below with probability --confidence.
        """
        self.prune(strategy)
        kl, confidence = self.divergence(), self.args.confidence
        return kl if confidence is None else self.divergence.at_most(confidence)

    def bytes(self, strategy):
        return packed_bytes(self.pruner, self.args.model, strategy)

    def prune(self, strategy):
        """Make the model that of the strategy, by ranks or in a pattern, survivors refitted or not.

        returns   masks, counted sparsity, refitted values or None
        """
        pruner, masks = self.pruner, self.pruner.masks(strategy)
        counted = pruner.sparsity(strategy)
        if self.args.pattern:
            keep, group = map(int, self.args.pattern.split(":"))
            masks = pattern_masks(pruner, strategy, keep, group)
            counted = pruner.mask_sparsity(masks)
        if self.args.refit:
            chosen = chosen_by_refit(self.args)
            wanted, dtypes = masks.counts() if chosen else masks, stored_dtypes(self.args.model)
            values = follow(pruner, wanted, self.calibration, dtypes)
            return Survivors(values) if chosen else masks, counted, values
        pruner.apply_masks(masks) if self.args.pattern else pruner.apply(strategy)
        return masks, counted, None

    def write(self, request, row, masks, values):
        """The folder of one request: weights, tokenizer and strategy.json; row["bytes"] is filled
        in.
        """
        args = self.args
        with new_folder(request["out"], args.force) as folder:
            save_llama(self.model, folder, args.model, masks, args.packed, values)
            if stamps(args.model) != self.stamps:
                raise Refused(f"the weights of {args.model} changed meanwhile: run it again")
            row["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            write_json(folder / RECORD, row | self.record(request, row))

    def record(self, request, row):
        """What strategy.json says beyond the row of the table."""
        args = self.args
        return {
            "counted": row["sparsity"],
            "zeros": self.pruner.zeros(),
            "source_zeros": self.source_zeros,
            "request": {request["kind"]: request["value"]},
            "method": self.method,
            "refitted": args.refit,
            "masks": "chosen by the refit" if chosen_by_refit(args) else "ranked",
            "metric": args.metric,
            "pattern": args.pattern,
            "model": args.model.resolve().name,
            "dense_ppl": self.dense_ppl,
            "measured_on": self.text,
            "tokens": self.test.numel(),
            "calibration": {
                "text": args.data.name if args.data else "stdlib",
                "tokens": self.calibration.numel(),
                "sha256": sha256(args.data) if args.data else None,
            },
        }

    def serve(self, request, surrogate):
        """Prune for one request, measure, write: its row of the table. Unreachable when no strategy
        meets it.
        """
        started = time.perf_counter()
        strategy = strategy_of(request, surrogate)
        masks, counted, values = self.prune(strategy)
        kl, ppl = self.divergence.measure()
        sure = self.args.confidence
        if not math.isfinite(kl):
            raise Refused(f"{request['name']}: the pruned model computes NaN; try --dtype float32")
        row = {"request": request["name"], request["kind"]: request["text"], "sparsity": counted}
        row |= {
            "kl": kl,
            "ppl": ppl,
            "bytes": None,
            "strategy": self.pruner.full(strategy).tolist(),
        }
        if sure is not None:
            row |= {"confidence": sure, "kl_at_most": self.divergence.at_most(sure)}
        if not self.args.dry_run:
            self.write(request, row, masks, values)
        row["seconds"] = round(time.perf_counter() - started, 3)
        return row


# ------------------------------------------------------------------------------------- command line
class Table:
    """The rows as they come, for a person; silent when standard output carries the JSON."""

    def __init__(self, names, silent):
        self.width, self.silent = max(map(len, [*names, "request"])), silent

    def say(self, line):
        if not self.silent:
            say(line)

    def head(self, dense_ppl):
        width = self.width
        self.say(f"{'request':<{width}}  sparsity      KL  perplexity      bytes  seconds")
        self.say(f"{'dense':<{width}}    0.0000  0.0000  {dense_ppl:10.3f}")

    def row(self, row, with_strategy):
        self.say(
            f"{row['request']:<{self.width}}  {row['sparsity']:8.4f}  {row['kl']:6.4f}"
            f"  {row['ppl']:10.3f}  {row['bytes'] or '-':>9}  {row['seconds']:7.2f}"
        )
        if "kl_at_most" in row:
            sure, most = row["confidence"], row["kl_at_most"]
            self.say(f"{'':<{self.width}}  KL below {most:.4f} with probability {sure:g}")
        if with_strategy:
            means = " ".join(f"{sum(x) / len(x):.2f}" for x in row["strategy"])
            self.say(f"{'':<{self.width}}  blocks {means}")


def add_wishes(parser):
    for kind, (unit, meaning) in KINDS.items():
        flag = "--" + kind.replace("_", "-")
        several = {"nargs": "+", "action": "extend", "default": []}
        parser.add_argument(flag, **several, metavar=unit, help=meaning)
    sure = "--max-kl holds on all such text with this probability, not as measured alone"
    parser.add_argument("--confidence", type=float, metavar="P", help=sure)
    parser.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help='jsonl, one request a line: {"name": "phone", "max_size": "9MB"}',
    )


def add_ways(parser):
    """How to prune."""
    where = "default: out/<model>/, then the model's folder; else curvature alone"
    pattern = "semi-structured masks, up to sparsity 0.5"
    flag = {"action": "store_true"}
    parser.add_argument("--stratnet", type=Path, metavar="FILE", help=where)
    parser.add_argument("--uniform", **flag, help="the same sparsity everywhere, no StratNet")
    parser.add_argument("--metric", choices=METRICS, default="wanda", help="pruning score")
    parser.add_argument("--pattern", choices=["2:4", "4:8"], help=pattern)
    parser.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="move survivors to follow the dense model; --no-refit: bit-identical to the source",
    )
    masks = "refit on the masks of --metric, instead of masks that the refit chooses"
    parser.add_argument("--keep-masks", **flag, help=masks)
    parser.add_argument("--offload", **flag, help="keep the blocks in host memory, two on the GPU")


def add_outputs(parser):
    """What to write, and where."""
    packed = "write bit masks and survivors: smaller files, read by load_llama alone"
    out = "default: out/<model>-<request>; the parent folder for several requests"
    table = "the table as JSON, into FILE or alone on standard output"
    flag = {"action": "store_true"}
    parser.add_argument("--packed", **flag, help=packed)
    parser.add_argument(
        "--unpack", type=Path, metavar="DIR", help="packed folder -> plain one, --out"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    parser.add_argument("--force", **flag, help="replace existing folders")
    parser.add_argument("--dry-run", **flag, help="print the strategies, write nothing")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help=table)


def arguments():
    examples = [
        "python prune.py --sparsity 0.5",
        "python prune.py --sparsity 0.3 0.5 0.7 --packed --model DIR --data c4.jsonl",
        "python prune.py --max-kl 0.1 --max-size 9MB --preference 0.4",
        "python prune.py --requests wishes.jsonl --out served --json table.json",
        "python prune.py --unpack served/phone --out plain",
    ]
    parser = Parser(__doc__, examples)
    add_model(parser)
    add_wishes(parser)
    add_texts(parser, "tokens to measure KL and perplexity on", windows=None)
    add_ways(parser)
    add_outputs(parser)
    args = parser.parse_args()
    at_least(args, 1, "tokens", "calibration")
    if args.confidence is not None and not 0.5 <= args.confidence <= 0.999:
        raise Refused("--confidence is a probability from 0.5 to 0.999")
    if args.test and len(args.test) > 1:
        raise Refused("prune.py measures on one --test; eval.py measures what it wrote on others")
    return args


def requests_of(args):
    """All requests of a command line, each with the folder that it will be written to: checked
    before any work.
    """
    requests = [parse_request({kind: v}) for kind in KINDS for v in getattr(args, kind)]
    if args.requests:
        requests += read_requests(args.requests)
    if not requests:
        raise Refused("nothing is asked: give --sparsity or another request")
    names = [r["name"] for r in requests]
    if len(set(names)) < len(names):
        raise Refused(f"two requests are named {max(names, key=names.count)}")
    check_together(args, requests)
    if args.json not in (None, "-"):
        refuse_to_overwrite(Path(args.json), "request")
    for r in requests:
        r["out"] = output_of(args, r, len(requests) > 1)
        if not args.dry_run:
            refuse_to_replace(r["out"], args.force, precious_of(args))
    return requests


def precious_of(args):
    """What no output may replace: the source and every file that is read."""
    given = (args.model, args.data, *(args.test or []), args.stratnet, args.requests, args.unpack)
    return [path for path in given if path is not None]


def check_together(args, requests):
    """Refuse what cannot be done, before anything is: half of a batch helps nobody."""
    kinds = {r["kind"] for r in requests}
    if args.pattern and "max_kl" in kinds:
        raise Refused("--pattern does not go with --max-kl, whose measurements it would change")
    if args.uniform and "preference" in kinds:
        raise Refused("a preference needs StratNet: it cannot be asked with --uniform")
    for r in requests:
        if r["kind"] == "sparsity" and args.pattern and r["value"] > 0.5:
            raise Refused(f"sparsity {r['text']}: a {args.pattern} pattern reaches 0.5 at most")


def output_of(args, request, several):
    if args.out is None:
        return Path("out") / f"{args.model.resolve().name}-{request['name']}"
    return args.out / request["name"] if several else args.out


def unpack_folder(args):
    if not args.out or args.dry_run:
        raise Refused("--unpack needs --out, and writes: it does not go with --dry-run")
    refuse_to_replace(args.out, args.force, precious_of(args))
    model, _ = load_llama(args.unpack)
    with new_folder(args.out, args.force) as folder:
        save_llama(model, folder, args.unpack, {})
        if (args.unpack / RECORD).is_file():
            shutil.copyfile(args.unpack / RECORD, folder / RECORD)
    print(f"wrote {args.out}")


def serve_all(service, requests, table):
    """Serve all requests: their rows, and a line for each that cannot be met."""
    rows, unmet = [], []
    surrogate = service.surrogate(any(r["kind"] == "max_kl" for r in requests))
    for request in requests:
        try:
            row = service.serve(request, surrogate)
            table.row(row, with_strategy=len(requests) == 1 or service.args.dry_run)
        except Unreachable as error:
            row = {
                "request": request["name"],
                request["kind"]: request["text"],
                "unmet": str(error),
            }
            unmet.append(f"{request['name']}: {error}")
        rows.append(row)
    return rows, unmet


def main():
    args = arguments()
    if args.unpack:
        return unpack_folder(args)
    requests = requests_of(args)
    if args.model.is_dir():
        files_to_copy(args.model)  # refused now, not after an hour of work
    device, dtype, reason = choose_device(args.device, args.dtype)
    reason = choose_tokens(args, device, reason)
    service = Service(args, device, dtype)
    table = Table([r["name"] for r in requests], silent=args.json == "-")
    table.say(
        f"{args.model.resolve().name} on {device}, {str(dtype)[6:]} ({reason});"
        f" calibrated on {service.calibration.numel()} tokens, measured on {service.test.numel()}"
        f" of {service.text}"
    )
    if service.method == "curvature":
        table.say("no StratNet of this model: curvature alone chooses; python train.py makes one")
    if service.source_zeros > 0.01:
        table.say(
            f"{service.source_zeros:.2f} of the source's block weights are 0 already: KL is from it"
            " as it is, and sparsity counts what this run drops"
        )
    table.head(service.dense_ppl)
    rows, unmet = serve_all(service, requests, table)
    if args.json == "-":
        say(json.dumps(strict(rows), indent=1))
    elif args.json:
        args.dtype, args.calibration = str(dtype)[6:], len(service.calibration)
        inputs = sources(args) | {"tests": tests(args), "device": str(device)}
        write_provenance(args.json, provenance() | {"inputs": inputs})
        write_json(args.json, rows)
    if not args.dry_run:
        written = [str(r["out"]) for r, row in zip(requests, rows) if "unmet" not in row]
        more = f" and {len(written) - 3} more" if len(written) > 3 else ""
        table.say("wrote " + (", ".join(written[:3]) or "nothing") + more)
    if unmet:
        raise Refused("; ".join(unmet))


if __name__ == "__main__":
    run(main, ": every folder that is there is complete")
