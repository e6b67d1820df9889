"""
Survivors that follow the dense model: of every Linear those weights go whose loss matters least and
the others can make good, and the others do.

Source    least squares on a fixed mask by preconditioned conjugate gradients is the last step of
          ALPS (arXiv 2406.07831); that the target is the dense model's output, not W times the
          pruned input, is GPTAQ's (arXiv 2504.02692); what losing a weight costs once the others
          have moved is Optimal Brain Surgeon's (Hassibi and Stork, 1992).
          That an output's error costs KL by the square of its gradient is the half of K-FAC
          (Martens and Grosse, arXiv 1503.05671) whose other half is H.
Reading   beside prune.py, whose --refit calls `follow`. Next: train.py. Can be skipped at first.
Shapes    x (tokens, d_in) inputs in the pruned model, y (tokens, d_out) wanted outputs,
          H = x^T x (d_in, d_in), C = y^T x (d_out, d_in), all float32; windows (n, T); V the
          values that are solved for, R = C - V H what they still lack.
Not here  how many weights of each matrix go, which is the strategy's; gradient descent through
          the whole model.
"""

import itertools
from functools import cached_property

import torch
from tqdm import tqdm

from eval import batches
from model import LINEARS
from ranks import MadeOnDemand, kth_lowest
from script import send

STEPS = 8  # of conjugate gradients: within 3 % of the exact solution's error
DAMPING = 0.1  # of each column's diagonal of H: how strongly survivors are held to their old values
LEAD = 0.5  # how far the target leads from W x, x the refitted model's, to the dense model's output
CONTRAST = 0.7  # of a strategy's logits before a refit, which makes good most where most was lost
TEMPER = 0.75  # power of a row's gradient by which its scores are weighed: 1 strips rows bare
STAGES = 4  # in which a row loses its weights, where the refit chooses them
BETWEEN = 3  # steps of conjugate gradients between two stages
SOLVED = 2**23  # weights of a matrix solved for at once: 13 times their 34 MB live meanwhile
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # Linears that read one input: q k v | o | gate up | down


def damp(H, damping=DAMPING):
    """Add lam = damping * diag H to the diagonal of H, in place, for a copy could be too large; lam
    (d_in,) > 0, a column that the windows hardly use counting as a thousandth of the mean, so that
    a singular H is no exception.

    Of each column's own diagonal, not of the mean: so an input's units do not matter, and a weight
    that only rare tokens need is not free to go. Damped by the mean, one window of WikiText-2 in
    twenty lost its attention sink in a refitted Qwen2.5 (RESULTS.md).
    """
    diagonal = H.diagonal()
    least = (diagonal.mean() / 1000).clamp(min=1e-12)
    lam = damping * diagonal.clamp(min=least)
    diagonal.add_(lam)
    return lam


def times(V, H):
    """V @ H in float32 of V (d_out, d_in) float32, multiplied in the dtype of H."""
    return V @ H if H.dtype == V.dtype else (V.to(H.dtype) @ H).float()


def product_dtype(dtype):
    """That of most products with H, for a model that computes in `dtype`: bfloat16 where it does,
    for then the machine has units for it."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def dots(a, b):
    return (a * b).sum(1, keepdim=True)


def ratio(a, b):
    """a / b of each row; 0 where a row has nothing left (sums of squares near the least normal
    number have lost their bits), or rounding left it no curvature.
    """
    limits = torch.finfo(b.dtype)
    return torch.where(b > limits.tiny / limits.eps, a / b, 0)


def conjugate_gradients(V, R, kept, H, steps):
    """`steps` from V * kept towards the V (d_out, d_in) that is +0.0 but where `kept`, and there
    has an R = C - V H of 0. V and R, (d_out, d_in) float32, are overwritten.

    With H = x^T x + diag(lam) and C = y^T x + W diag(lam) that V is
    argmin ||x V^T - y||^2 + ||(V - W) diag(lam)^1/2||^2.
    R         of every column, as V is before what goes is gone
    H         (d_in, d_in) damped, its diagonal near 1, which replaces a preconditioner
    Only what V changes by is multiplied with H: so its rounding, to bfloat16 say, is small beside
    V, which C - V H would not be. The equations of two rows differ by their masks alone: so all go
    together.
    """
    gone = torch.where(kept, 0, V)
    V -= gone
    R += times(gone, H)
    direction = residual = R * kept
    energy = dots(residual, residual)
    for _ in range(steps):
        product = times(direction, H)
        length = ratio(energy, dots(direction, product))
        V.addcmul_(length, direction)
        R.addcmul_(length, product, value=-1)
        residual = R * kept
        before, energy = energy, dots(residual, residual)
        direction = residual.addcmul(ratio(energy, before), direction)
    return V.masked_fill_(~kept, 0), R  # also in a row that overflowed


def without_lowest(cost, counts):
    """True but for the lowest of each row of cost (d_out, d_in); counts (d_out,), on the CPU, says
    how many."""
    most, device = int(counts.max()), cost.device
    gone = cost.topk(most, largest=False).indices
    goes = torch.arange(most, device=device) < send(counts, device)[:, None]
    return torch.ones_like(cost, dtype=torch.bool).scatter_(1, gone, ~goes)


def choose(V, drop, H, inverse, steps):
    """The values V of rows that lose `drop` weights each, (d_out,) on the CPU, those whose loss the
    others make good; of V (d_out, d_in), the solution without a mask, which is overwritten.

    In STAGES those weights go that cost least once the others have made it good, v_j^2 / [H^-1]_jj,
    and the rest is solved again: by BETWEEN steps, at last by `steps`.
    inverse   the diagonal of H^-1, (d_in,);  H: as in `conjugate_gradients`
    """
    R, kept = torch.zeros_like(V), torch.ones_like(V, dtype=torch.bool)
    for stage in range(1, STAGES + 1):
        cost = torch.where(kept, V**2 / inverse, -1)  # what is gone stays gone
        kept = without_lowest(cost, drop * stage // STAGES)
        V, R = conjugate_gradients(V, R, kept, H, BETWEEN if stage < STAGES else steps)
    return V


def storable(V, W, dtype):
    """V rounded to `dtype`, the source's; a row that it cannot hold (float16 ends at 65504) stays
    as in W, on its mask.
    """
    rounded = V.to(dtype)
    fits = rounded.isfinite().all(1, keepdim=True)
    return torch.where(fits, rounded, torch.where(V != 0, W, 0).to(dtype))


def lost_by_row(score, count):
    """How many of the `count` lowest of score (d_out, d_in) lie in each row, (d_out,) int64; of
    those that are equal the first rows' are lower."""
    if count == 0:
        return torch.zeros(len(score), dtype=torch.int64)
    lowest = kth_lowest(lambda: [score], count)
    lower, level = (score < lowest).sum(1), (score == lowest).sum(1)
    left = count - lower.sum() - (level.cumsum(0) - level)
    return (lower + left.clamp(min=0).minimum(level)).cpu()


def row_counts(pruner, strategy, g_norms):
    """{parameter name: how many weights of each row go, (d_out,) int64}, made on demand. A matrix
    loses as many as by `strategy`, those that score lowest once a row's scores are weighed by what
    an error of its output costs: so a row loses more, the less depends on it.

    g_norms   {parameter name: (d_out,)} of gradients at the outputs, see `gradient_norms`
    """
    places = {n: (i, j) for i, names in enumerate(pruner.names) for j, n in enumerate(names)}
    dropped = pruner.dropped_per_row(strategy) * pruner.d_out

    def counts(name):
        i, j = places[name]
        x_norm, weights = pruner.x_norms[name], g_norms[name] ** TEMPER
        score = pruner.score(pruner.dense[i][j].to(x_norm.device), x_norm)
        return lost_by_row(score.mul_(weights[:, None]), int(dropped[i, j]))

    return MadeOnDemand(places, counts)


def panels(d_in, count=4):
    width = -(-d_in // count)
    return [slice(start, start + width) for start in range(0, d_in, width)]


def add_gram(H, x):
    """H += x^T x for x (tokens, d_in), panel by panel, on and above the diagonal alone: `mirror`
    does the rest.

    BLAS's own symmetric product, called through numpy, is as fast on one thread; on two, its
    threads and torch's fight for the cores (a refit of tiny: 25.3 s, with this 10.1 s).
    """
    for rows in panels(len(H)):
        H[rows, rows.start :].add_(x[:, rows].T @ x[:, rows.start :])


def mirror(H):
    """H with what is above the diagonal below it, too: in place."""
    for rows in panels(len(H)):
        corner = H[rows, rows]
        corner.copy_(corner.triu() + corner.triu(1).T)
        H[rows.stop :, rows].copy_(H[rows, rows.stop :].T)
    return H


def gram(x):
    """x^T x (d_in, d_in) of x (tokens, d_in)."""
    H = x.new_zeros(x.shape[1], x.shape[1])
    add_gram(H, x)
    return mirror(H)


class Wanted:
    """What the refitted block shall reach on one batch, recorded while the block is dense: a target
    for each of GROUPS, to be taken once.
    """

    def __init__(self, block, h, rotary):
        (attention_in, _), _, (mlp_in, after_attention), _, (_, self.output) = block.walk(h, rotary)
        self.targets = [attention_in, after_attention, mlp_in, self.output]

    def take(self, group, stream, bias):
        """y (B T, d_out), and by what each token's equation is multiplied, (B T, 1) or (1, 1), both
        float32.

        o and down write into the stream: y is what it still lacks of the dense one's, less their
        bias; and as what reads the stream divides it by its size, each error counts by the share
        that it is of it, or a few tokens of massive activations would outweigh all others. For the
        other Linears y is the dense model's input, which has been divided already.
        """
        target, self.targets[group] = self.targets[group].float(), None
        if group % 2 == 0:
            return target.flatten(0, 1), target.new_ones(1, 1)
        size = target.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
        lacks = target - stream.float()
        if bias is not None:
            lacks -= bias.float()
        return lacks.div_(size).flatten(0, 1), 1 / size.flatten(0, 1)


def normal_equations(walks, wanted, group, bias):
    """Advance every batch to the inputs of `group` -> H and C, summed over the batches.

    For q, k, v, gate and up, y is the dense model's input: W C is then what W needs, whatever its
    rows.
    """
    H = C = None
    for walk, want in zip(walks, wanted):
        x, stream = next(walk)
        y, weight = want.take(group, stream, bias)
        x = x.flatten(0, 1) * weight  # float32, whatever x is
        if H is None:
            H, C = (x.new_zeros(n, x.shape[1]) for n in (x.shape[1], y.shape[1]))
        add_gram(H, x)
        for out, part in zip(in_rows(C), y.split(len(in_rows(C)[0]), 1)):
            out.add_(part.T @ x)
    return mirror(H), C


def in_rows(W):
    """W (d_out, d_in) in pieces of whole rows, SOLVED weights at most."""
    return W.split(max(1, SOLVED // W.shape[1]))


class Normal:
    """The normal equations of one group of Linears, damped: what solves for each of its matrices.

    All is in units that bring the diagonal of H near 1, U = W * scale: powers of two, so that no
    bit is lost by it.
    H, C      as `normal_equations` made them, overwritten;  group: 1 and 3 have C for their one
              matrix, the others for W: then W C is what it needs
    products  dtype of most products with H: see `product_dtype`
    lead      0: aim at W x, which makes good this matrix's own loss alone; 1: at the dense model's
              output, which makes good what all before it lost too, and learns the windows by heart
    """

    def __init__(
        self, H, C, group, products=torch.float32, steps=STEPS, damping=DAMPING, lead=LEAD
    ):
        self.steps, self.lead, self.shared = steps, lead, group % 2 == 0
        self.lam = damp(H, damping)
        self.scale = H.diagonal().log2().mul_(0.5).round_().exp2_()
        self.H, self.C = H.div_(self.scale).div_(self.scale[:, None]), C.div_(self.scale)
        self.rounded = H.to(products)

    def lacking(self, W, U, C):
        """R (d_out, d_in) of some rows of a dense matrix, W float32 and U: what is wanted beyond
        U H. Of `lead` 0 nothing is, for then they aim at what they do while dense."""
        C = W @ C if self.shared else C
        return (C + self.lam * (W / self.scale)).sub_(U @ self.H).mul_(self.lead)

    @cached_property
    def inverse(self):
        # damped, H is positive definite: cholesky_ex does not wait on CUDA to see whether it was
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(self.H).L)

    def fitted(self, U, R, wish):
        """U of some rows of a dense matrix, overwritten, once they are pruned as wished."""
        if wish.ndim == 2:
            kept = wish.to(U.device)
            return conjugate_gradients(U, R, kept, self.rounded, self.steps)[0]
        U += R @ self.inverse  # the solution without a mask
        return choose(U, wish, self.rounded, self.inverse.diagonal().clone(), self.steps)

    def solve(self, W, wish, dtype):
        """The new values (d_out, d_in) of a dense matrix W, in `dtype`; wish: its mask, or how many
        weights of each row go, (d_out,) on the CPU.
        """
        wishes = wish.split(len(in_rows(W)[0]))
        targets = itertools.repeat(self.C) if self.shared else in_rows(self.C)
        pieces = []
        for w, wish, C in zip(in_rows(W), wishes, targets):
            U = w.float() * self.scale
            U = self.fitted(U, self.lacking(w.float(), U, C), wish)
            pieces.append(storable(U / self.scale, w, dtype))
        return torch.cat(pieces)


def refit_group(pruner, i, linears, normal, wishes, dtypes):
    """Solve for the Linears {j: module} of block i and write them: {parameter name: values}."""
    values = {}
    for j, linear in linears.items():
        name, W = pruner.names[i][j], linear.weight
        wish = wishes.get(name)
        if wish is None:
            continue
        V = normal.solve(W, wish, dtypes.get(name, W.dtype))
        pruner.live[i][j].copy_(V)
        W.copy_(V)  # another, where blocks are offloaded: their room on the device
        values[name] = V.cpu()
    return values


@torch.inference_mode()
def follow(pruner, wishes, windows, dtypes=None, **how):
    """Prune the model as wished and refit what survives, block by block, on calibration windows
    (n, T).

    wishes    {parameter name: bool (d_out, d_in), True = kept}; or how many weights of each row
              go, (d_out,) on the CPU, as `row_counts` says, and `choose` says which; a matrix that
              is not named stays dense
    dtypes    {parameter name: dtype} of the source's files, to which values are rounded before they
              are used; default: as computed
    how       steps, damping, lead: see `Normal`
    returns   {parameter name: values (d_out, d_in)} on the CPU, for `save_llama`
    """
    pruner.restore()
    with pruner.parked():
        return refit_blocks(pruner, wishes, windows, dtypes or {}, how)


def refit_blocks(pruner, wishes, windows, dtypes, how):
    """`follow` from a dense model; a function, so that all its states are gone when it ends."""
    model, values = pruner.model, {}
    rotary = model.rotary(windows.shape[1])
    products = product_dtype(model.embed.weight.dtype)
    pruned = [model.embed(w) for w in batches(windows.to(model.embed.weight.device))]
    dense = list(pruned)
    for i, block in enumerate(tqdm(model.blocks, desc="refitting", disable=None, leave=False)):
        wanted = [Wanted(block, h, rotary) for h in dense]
        walks = [block.walk(h, rotary) for h in pruned]
        dense.clear(), pruned.clear()  # let go: at 7 billion weights every list takes 0.3 GB
        for group, members in enumerate(GROUPS):
            linears = {j: block.get_submodule(LINEARS[j]) for j in members}
            bias = linears[members[0]].bias
            H, C = normal_equations(walks, wanted, group, bias)
            normal = Normal(H, C, group, products, **how)
            values |= refit_group(pruner, i, linears, normal, wishes, dtypes)
            del H, C, normal
        pruned = [next(walk)[1] for walk in walks]
        dense = [want.output for want in wanted]
        walks.clear(), wanted.clear()
    return values
