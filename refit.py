"""
Survivors that follow the dense model: of every Linear those weights go whose loss the others can
make good, and the others do.

Source    least squares on a fixed mask by preconditioned conjugate gradients is the last step of
          ALPS (arXiv 2406.07831); that the target is the dense model's output, not W times the
          pruned input, is GPTAQ's (arXiv 2504.02692); what losing a weight costs once the others
          have moved is Optimal Brain Surgeon's (Hassibi and Stork, 1992).
Reading   beside prune.py, whose --refit calls `follow`. Next: train.py. Can be skipped at first.
Shapes    x (tokens, d_in) inputs in the pruned model, y (tokens, d_out) wanted outputs,
          H = x^T x (d_in, d_in), C = y^T x (d_out, d_in), all float32; windows (n, T).
Not here  how many weights of each row go, which is the strategy's; gradient descent through the
          whole model.
"""

import itertools
from functools import cached_property

import torch
from tqdm import tqdm

from eval import batches
from model import LINEARS

STEPS = 8  # of conjugate gradients: within 3 % of the exact solution's error
DAMPING = 0.1  # of the mean diagonal of H: how strongly survivors are held to their old values
LEAD = 0.5  # how far the target leads from W x, x the refitted model's, to the dense model's output
CONTRAST = 0.7  # of a strategy's logits before a refit, which makes good most where most was lost
STAGES = 4  # in which a row loses its weights, where the refit chooses them
BETWEEN = 3  # steps of conjugate gradients between two stages
SOLVED = 2**23  # weights of a matrix solved for at once: 13 times their 34 MB live meanwhile
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # Linears that read one input: q k v | o | gate up | down


def damp(H, damping=DAMPING):
    """Add lam = damping * mean diag H to the diagonal of H, in place, for a copy could be too
    large; lam (0-dim) > 0, so that a singular H is no exception.
    """
    lam = (damping * H.diagonal().mean()).clamp(min=1e-12)
    H.diagonal().add_(lam)
    return lam


def conjugate_gradients(V, kept, H, C, steps):
    """`steps` from V * kept towards the V (d_out, d_in) of (V H)[kept] = C[kept], +0.0 elsewhere.

    With H = x^T x + lam I and C = y^T x + lam W that V is argmin ||x V^T - y||^2 + lam ||V - W||^2.
    V, C      (d_out, d_in) float32;  kept: (d_out, d_in) bool;  H: (d_in, d_in) float32, damped
    The equations of two rows differ by their masks alone: so all go together, one product with H a
    step, preconditioned by 1 / diag.
    """
    tiny = torch.finfo(torch.float32).tiny
    inverse = H.diagonal().reciprocal()
    V = V * kept
    residual = (C - V @ H) * kept
    direction = residual * inverse
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        product = direction @ H * kept
        length = energy / (direction * product).sum(1, keepdim=True).clamp(min=tiny)
        V += length * direction
        residual -= length * product
        scaled = residual * inverse
        before = energy
        energy = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + energy / before.clamp(min=tiny) * direction
    return torch.where(kept, V, 0)  # V * kept left -0.0 where a negative weight went


def without_lowest(cost, count):
    """True but for the `count` lowest of each row of cost (d_out, d_in): an int, or one for each
    row, (d_out,).
    """
    most = count if isinstance(count, int) else int(count.max())
    gone = cost.topk(most, largest=False).indices
    each = count if isinstance(count, int) else count[:, None]
    goes = torch.arange(most, device=cost.device) < each
    return torch.ones_like(cost, dtype=torch.bool).scatter_(1, gone, ~goes.expand_as(gone))


def choose(drop, H, inverse, C, stages=STAGES):
    """The mask (d_out, d_in), True = kept, whose refit will lose little: `drop` weights of each row
    go, int or (d_out,), in `stages`.

    From the solution without a mask, weights go that cost least once the others make it good,
    v_j^2 / [H^-1]_jj; after each stage but the last the rest is solved again.
    inverse   of H;  H and C: as in `conjugate_gradients`
    """
    V, kept = C @ inverse, torch.ones_like(C, dtype=torch.bool)
    for stage in range(1, stages + 1):
        cost = torch.where(kept, V**2 / inverse.diagonal(), -1)  # what is gone stays gone
        kept = without_lowest(cost, drop * stage // stages)
        if stage < stages:
            V = conjugate_gradients(V, kept, H, C, BETWEEN)
    return kept


def storable(V, W, dtype):
    """V rounded to `dtype`, the source's; a row that it cannot hold (float16 ends at 65504) stays
    as in W, on its mask.
    """
    rounded = V.to(dtype)
    fits = rounded.isfinite().all(1, keepdim=True)
    return torch.where(fits, rounded, torch.where(V != 0, W, 0).to(dtype))


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
        """y (B T, d_out) float32. o and down write into the stream: what it still lacks of the
        dense one's, less their bias. For the others, the dense model's input.
        """
        target, self.targets[group] = self.targets[group].float(), None
        if group % 2:
            target = target - stream.float()
            target = target if bias is None else target - bias.float()
        return target.flatten(0, 1)


def normal_equations(walks, wanted, group, bias):
    """Advance every batch to the inputs of `group` -> H and C, summed over the batches.

    For q, k, v, gate and up, y is the dense model's input: W C is then what W needs, whatever its
    rows.
    """
    H = C = None
    for walk, want in zip(walks, wanted):
        x, stream = next(walk)
        x, y = x.flatten(0, 1).float(), want.take(group, stream, bias)
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

    H, C      as `normal_equations` made them;  group: 1 and 3 have C for their one matrix, the
              others for W: then W C is what it needs
    lead      0: aim at W x, which makes good this matrix's own loss alone; 1: at the dense model's
              output, which makes good what all before it lost too, and learns the windows by heart
    """

    def __init__(self, H, C, group, steps=STEPS, damping=DAMPING, lead=LEAD):
        self.H, self.C, self.shared = H, C, group % 2 == 0
        self.steps, self.lead = steps, lead
        self.lam = damp(H, damping)

    def target(self, W, C):
        """y^T x + lam W (d_out, d_in) of some rows of a dense matrix, W float32, and their C."""
        C = W @ C if self.shared else C
        return self.lead * (C + self.lam * W) + (1 - self.lead) * (W @ self.H)

    @cached_property
    def inverse(self):
        # damped, H is positive definite: cholesky_ex does not wait on CUDA to see whether it was
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(self.H).L)

    def solve(self, W, wish, dtype):
        """The new values (d_out, d_in) of a dense matrix W, in `dtype`; wish: its mask, or how many
        weights of each row go, int or (d_out,).
        """
        counted = isinstance(wish, int) or wish.ndim == 1
        if isinstance(wish, int):
            kept = itertools.repeat(wish)
        else:
            kept = wish.to(self.H.device).split(len(in_rows(W)[0]))
        targets = itertools.repeat(self.C) if self.shared else in_rows(self.C)
        pieces = []
        for w, k, target in zip(in_rows(W), kept, targets):
            target = self.target(w.float(), target)
            if counted:
                k = choose(k, self.H, self.inverse, target)
            V = conjugate_gradients(w.float(), k, self.H, target, self.steps)
            pieces.append(storable(V, w, dtype))
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
              go, int or (d_out,), and `choose` says which; a matrix that is not named stays dense
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
    pruned = [model.embed(w) for w in batches(windows.to(model.embed.weight.device))]
    dense = list(pruned)
    for i, block in enumerate(tqdm(model.blocks, desc="refitting", disable=None, leave=False)):
        wanted = [Wanted(block, h, rotary) for h in dense]
        walks = [block.walk(h, rotary) for h in pruned]
        dense.clear(), pruned.clear()  # let go: at 7 billion weights every list takes 0.3 GB
        for group, members in enumerate(GROUPS):
            linears = {j: block.get_submodule(LINEARS[j]) for j in members}
            bias = linears[members[0]].bias
            normal = Normal(*normal_equations(walks, wanted, group, bias), group, **how)
            values |= refit_group(pruner, i, linears, normal, wishes, dtypes)
            del normal
        pruned = [next(walk)[1] for walk in walks]
        dense = [want.output for want in wanted]
        walks.clear(), wanted.clear()
    return values
