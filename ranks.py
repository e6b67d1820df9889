"""
Rank every weight of a Llama once, by magnitude and activation: then any strategy is one comparison.

Source    Wanda (Sun et al., arXiv 2306.11695) for the scores; ranking once for all requests is this
          project's own.
Reading   6 of 9. Before: eval.py. Next: prune.py.
Shapes    d blocks of 7 Linears, W (d_out, d_in), x_norm (d_in,), strategies (d,) or one sparsity
          for each Linear, (d, 7).
Not here  structured pruning; the refit of what survives is refit.py's.
"""

import contextlib
from collections.abc import Mapping

import numpy as np
import torch
from tqdm import tqdm

from eval import batches
from model import LINEARS
from script import Refused, send

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


def kth_lowest(pieces, k):
    """The k-th lowest, from 1 on, of all values of float32 tensors, none negative.

    By radix, the upper half of a value's bits first, for it orders like them: no copy of all values
    is made. pieces() returns the tensors anew, one by one.
    """
    bits = lambda: (piece.view(torch.int32) for piece in pieces())
    upper, k = in_which_bin((b >> 16 for b in bits()), k)
    lower, _ = in_which_bin((b[b >> 16 == upper] & 0xFFFF for b in bits()), k)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32)


def in_which_bin(pieces, k):
    """Of integer tensors below 2^16, the k-th lowest value, and its place among those equal to
    it."""
    counts = sum(piece.flatten().bincount(minlength=2**16) for piece in pieces)
    reached = counts.cumsum(0)
    value = int((reached < k).sum())
    return value, k - int(reached[value] - counts[value])


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


class MadeOnDemand(Mapping):
    """{parameter name: bool (d_out, d_in), True = kept}, each by make(name) when it is asked for:
    one exists at a time.
    """

    def __init__(self, names, make):
        self.names, self.make = dict.fromkeys(names), make

    def __getitem__(self, name):
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __contains__(self, name):
        return name in self.names

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


class Masks(MadeOnDemand):
    """Masks of a strategy, by rank: a natural zero that is kept counts as kept."""

    def __init__(self, names, ranks, thresholds):
        triples = zip(names, ranks, thresholds)
        self.parts = {n: (r, k) for block in triples for n, r, k in zip(*block)}
        super().__init__(self.parts, self.by_rank)

    def by_rank(self, name):
        ranks, threshold = self.parts[name]
        return ranks >= threshold

    def counts(self):
        """{parameter name: how many weights of each row go, (d_out,) int64 on the CPU}."""
        return {name: torch.full((len(r),), k) for name, (r, k) in self.parts.items()}


class Survivors(MadeOnDemand):
    """Masks of refitted values {parameter name: (d_out, d_in)}: what is not 0 is kept."""

    def __init__(self, values):
        super().__init__(values, lambda name: values[name] != 0)


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
        norms = self.x_norms = activation_norms(model, windows)
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
