"""
Survivors that follow the dense model: the masks stay, the kept weights of every Linear move to make
good what pruning cost.

Source    least squares on a fixed mask by preconditioned conjugate gradients is the last step of
          ALPS (arXiv 2406.07831); that the target is the dense model's output, not W times the
          pruned input, is GPTAQ's (arXiv 2504.02692).
Reading   beside prune.py, whose --refit calls `follow`. Next: train.py. Can be skipped at first.
Shapes    x (tokens, d_in) inputs in the pruned model, y (tokens, d_out) wanted outputs,
          H = x^T x (d_in, d_in), C = y^T x (d_out, d_in), all float32; windows (n, T).
Not here  new masks (tried: re-ranking on the pruned prefix gives nothing), gradient descent through
          the whole model.
"""

import itertools

import torch
from tqdm import tqdm

from eval import batches
from model import LINEARS

STEPS = 8  # of conjugate gradients: within 3 % of the exact solution's error
DAMPING = 0.1  # of the mean diagonal of H: how strongly survivors are held to their old values
SOLVED = 2**23  # weights of a matrix solved for at once: about ten times 34 MB live meanwhile
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # Linears that read one input: q k v | o | gate up | down


def least_squares(W, kept, H, C, steps=STEPS, damping=DAMPING):
    """argmin_V ||x V^T - y||^2 + lam ||V - W||^2 over V that is 0 outside `kept`.

    lam       damping * mean diag H: how strongly survivors are held to their old values

    W, C      (d_out, d_in) float32;  kept: (d_out, d_in) bool;  H: (d_in, d_in) float32, positive
              semidefinite; lam is added to its diagonal meanwhile, for a copy could be too large
    returns   (d_out, d_in) float32, +0.0 where nothing is kept
    The normal equations of a row, (V (H + lam I))[kept] = (C + lam W)[kept], differ from row to row
    by their mask alone: so all rows go through conjugate gradients together, one product with H a
    step, preconditioned by 1 / diag. lam > 0, so a singular H is no exception, and inputs that are
    all zero leave W as it was.
    """
    tiny = torch.finfo(torch.float32).tiny
    lam = (damping * H.diagonal().mean()).clamp(min=1e-12)
    diagonal = H.diagonal().clone()
    H.diagonal().add_(lam)
    inverse = H.diagonal().reciprocal()
    V = W * kept
    residual = (C + lam * W - V @ H) * kept
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
    H.diagonal().copy_(diagonal)
    return torch.where(kept, V, 0)  # W * kept left -0.0 where a negative weight went


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


def refit_matrix(W, kept, H, C, group, dtype, **solver):
    """The new values (d_out, d_in) of a dense matrix W, in `dtype`."""
    pieces = []
    wanted = in_rows(C) if group % 2 else itertools.repeat(C)
    for w, k, target in zip(in_rows(W), in_rows(kept.to(H.device)), wanted):
        full = w.float()
        target = target if group % 2 else full @ target
        pieces.append(storable(least_squares(full, k, H, target, **solver), w, dtype))
    return torch.cat(pieces)


@torch.inference_mode()
def follow(pruner, masks, windows, dtypes=None, **solver):
    """Prune the model by `masks` and refit what survives, block by block, on calibration windows
    (n, T).

    masks     {parameter name: bool (d_out, d_in), True = kept}; a matrix without one stays dense
    dtypes    {parameter name: dtype} of the source's files, to which values are rounded before they
              are used; default: as computed
    solver    steps, damping: see `least_squares`
    returns   {parameter name: values (d_out, d_in)} on the CPU, for `save_llama`
    """
    pruner.restore()
    with pruner.parked():
        return refit_blocks(pruner, masks, windows, dtypes or {}, solver)


def refit_blocks(pruner, masks, windows, dtypes, solver):
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
            linears = [block.get_submodule(LINEARS[j]) for j in members]
            H, C = normal_equations(walks, wanted, group, linears[0].bias)
            for j, linear in zip(members, linears):
                name, W = pruner.names[i][j], linear.weight
                kept, dtype = masks.get(name), dtypes.get(name, W.dtype)
                if kept is not None:
                    V = refit_matrix(W, kept, H, C, group, dtype, **solver)
                    pruner.live[i][j].copy_(V)
                    W.copy_(V)  # another, where blocks are offloaded: their room there
                    values[name] = V.cpu()
            del H, C
        pruned = [next(walk)[1] for walk in walks]
        dense = [want.output for want in wanted]
        walks.clear(), wanted.clear()
    return values
