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

import torch
from tqdm import tqdm

from eval import batches
from model import LINEARS

STEPS = 8  # of conjugate gradients: within 3 % of the exact solution's error
DAMPING = 0.1  # of the mean diagonal of H: how strongly survivors are held to their old values
STAGES = 4  # in which a row loses its weights, where the refit chooses them
BETWEEN = 3  # steps of conjugate gradients between two stages
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # Linears that read one input: q k v | o | gate up | down


def damped(W, H, C, damping):
    """H + lam I and C + lam W, lam = damping * mean diag H: survivors are held to their old values.

    lam > 0, so a singular H is no exception, and inputs that are all zero leave W as it was.
    """
    lam = (damping * H.diagonal().mean()).clamp(min=1e-12)
    return H + lam * torch.eye(len(H), device=H.device), C + lam * W


def conjugate_gradients(V, kept, H, C, steps):
    """`steps` from V * kept towards (V H)[kept] = C[kept]: (d_out, d_in) float32, 0 outside `kept`.

    The equations differ from row to row by their mask alone: so all rows go together, one product
    with H a step, preconditioned by 1 / diag.
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


def least_squares(W, kept, H, C, steps=STEPS, damping=DAMPING):
    """argmin_V ||x V^T - y||^2 + lam ||V - W||^2 over V that is 0 outside `kept`.

    W, C      (d_out, d_in) float32;  kept: (d_out, d_in) bool;  H: (d_in, d_in) float32, positive
              semidefinite;  lam: see `damped`
    returns   (d_out, d_in) float32, +0.0 where nothing is kept
    """
    H, C = damped(W, H, C, damping)
    return conjugate_gradients(W, kept, H, C, steps)


def choose(W, H, C, drop, stages=STAGES, damping=DAMPING):
    """The mask (d_out, d_in), True = kept, whose refit will lose little: `drop` weights of each row
    go, in `stages`.

    From the solution without a mask, weights go that cost least to lose while the others make it
    good, v_j^2 / [H^-1]_jj (Optimal Brain Surgeon); after each stage but the last the rest is
    solved again. W, H and C as in `least_squares`.
    """
    H, C = damped(W, H, C, damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    V, kept = C @ inverse, torch.ones_like(W, dtype=torch.bool)
    for stage in range(1, stages + 1):
        cost = torch.where(kept, V**2 / inverse.diagonal(), -1)  # what is gone stays gone
        gone = cost.topk(drop * stage // stages, largest=False, sorted=False).indices
        kept = torch.ones_like(kept).scatter_(1, gone, False)
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


def gram(x, panels=4):
    """x^T x (d_in, d_in) of x (tokens, d_in): only what lies on or above the diagonal is computed,
    panel by panel; then mirrored.

    BLAS's own symmetric product, called through numpy, is as fast on one thread; on two, its
    threads and torch's fight for the cores (a refit of tiny: 25.3 s, with this 10.1 s).
    """
    d_in = x.shape[1]
    H = x.new_empty(d_in, d_in)
    for start in range(0, d_in, -(-d_in // panels)):
        rows = slice(start, start + -(-d_in // panels))
        H[rows, start:] = x[:, rows].T @ x[:, start:]
    return H.triu() + H.triu(1).T


class Wanted:
    """What the refitted block shall reach on one batch, recorded while the block is dense: a target
    for each of GROUPS.
    """

    def __init__(self, block, h, rotary):
        (attention_in, _), _, (mlp_in, after_attention), _, (_, self.output) = block.walk(h, rotary)
        self.targets = attention_in, after_attention, mlp_in, self.output

    def residual_target(self, group, stream, bias):
        """o and down write into the stream: what it still lacks of the dense one's, less their bias
        (B T, d_out).
        """
        lacking = self.targets[group].float() - stream.float()
        return (lacking if bias is None else lacking - bias.float()).flatten(0, 1)


def normal_equations(walks, wanted, group, bias):
    """Advance every batch to the inputs of `group` -> H and C, summed over the batches.

    For q, k, v, gate and up, y is the dense model's input: W C is then what W needs, whatever its
    rows.
    """
    H = C = 0
    for walk, want in zip(walks, wanted):
        x, stream = next(walk)
        x = x.flatten(0, 1).float()
        if group % 2:
            y = want.residual_target(group, stream, bias)
        else:
            y = want.targets[group].flatten(0, 1).float()
        H = H + gram(x)
        C = C + y.T @ x
    return H, C


def refit_matrix(pruner, i, j, wish, H, target, linear, dtype, **solver):
    """Solve for matrix j of block i, write it into the live weights and into `linear`, the module
    that computes; the new values.

    wish      its mask, or how many weights of each row go: then the mask is chosen here
    Both are one unless blocks are offloaded: then `linear` is the block's room on the device.
    """
    W = pruner.dense[i][j].to(H.device)
    kept = choose(W.float(), H, target, wish) if isinstance(wish, int) else wish.to(H.device)
    V = least_squares(W.float(), kept, H, target, **solver)
    V = storable(V, W, dtype)
    pruner.live[i][j].copy_(V)
    linear.weight.copy_(V)
    return V


@torch.inference_mode()
def follow(pruner, masks, windows, dtypes=None, **solver):
    """Prune the model by `masks` and refit what survives, block by block, on calibration windows
    (n, T).

    masks     {parameter name: bool (d_out, d_in), True = kept}; or how many weights of each row
              go, int, of which `choose` then says which; a matrix that is not named stays dense
    dtypes    {parameter name: dtype} of the source's files, to which values are rounded before they
              are used; default: as computed
    solver    steps, damping: see `least_squares`
    returns   {parameter name: values (d_out, d_in)} on the CPU, for `save_llama`
    """
    model, values = pruner.model, {}
    pruner.restore()
    rotary = model.rotary(windows.shape[1])
    pruned = [model.embed(w) for w in batches(windows.to(model.embed.weight.device))]
    dense = list(pruned)
    for i, block in enumerate(tqdm(model.blocks, desc="refitting", disable=None, leave=False)):
        wanted = [Wanted(block, h, rotary) for h in dense]
        walks = [block.walk(h, rotary) for h in pruned]
        for group, members in enumerate(GROUPS):
            linears = [block.get_submodule(LINEARS[j]) for j in members]
            H, C = normal_equations(walks, wanted, group, linears[0].bias)
            for j, linear in zip(members, linears):
                name = pruner.names[i][j]
                wish = masks.get(name)
                if wish is None:
                    continue
                target = C if group % 2 else linear.weight.float() @ C
                dtype = (dtypes or {}).get(name, linear.weight.dtype)
                V = refit_matrix(pruner, i, j, wish, H, target, linear, dtype, **solver)
                values[name] = V.cpu()
        pruned = [next(walk)[1] for walk in walks]
        dense = [want.output for want in wanted]
    return values
