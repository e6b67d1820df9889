"""
What pruning will cost, read from the dense model alone: one curve of damage for every matrix; and
what an error of each of its outputs costs, by which a refit spares rows.

Source    the Fisher information as the curvature of KL (Martens, arXiv 1412.1193); summing it row
          by row, and tabulating it in the order in which weights fall, is this project's own.
Reading   beside prune.py, whose ranks it follows; gp.py's `CurvatureMean` is made of the result.
Shapes    d blocks of 7 Linears, W (d_out, d_in), G = d sum_t log p(y_t) / d W for T tokens y_t
          drawn from the dense model p; level l drops the lowest l / LEVELS of every row.

From KL to the table; delta = -W where a weight goes, 0 elsewhere:

    KL(p || p_pruned) = 1/2 E <d log p(y) / d W, delta>^2 + O(delta^3)                           (1)
                      = 1/2 E (sum_m sum_i s_mi)^2,  s_mi = -(sum over dropped j of G_ij W_ij)   (2)
                      ~ sum_m sum_i 1/2 E s_mi^2                                                 (3)
    c_m(l / LEVELS)   = sum_i s_mi(l)^2 / (2 T), averaged over windows: nats per token           (4)
    log c_m(x)        ~ t_m + q_m log(x + SHIFT) + r_m x                                         (5)

(1) KL and its gradient vanish at delta = 0. (2) m counts matrices, i their rows. (3) The cross
terms drown in the noise of drawing y. (4) One backward pass a window. (5) Least squares, inner
levels.

An error e = delta x of what a matrix puts out has <G, delta> = sum_t g_t e_t over its tokens: by
(1) that of output i costs about 1/2 E (g_i e_i)^2. `gradient_norms` adds up g_i^2.
"""

import torch
from tqdm import tqdm

from gp import SHIFT
from model import LINEARS
from script import Refused

LEVELS = 16
ROWS = 1024  # of a matrix, summed at a time
PASSES, PASS_TOKENS = 16, 256  # backward passes, and the tokens of each
# what a pass costs, in forward passes of its tokens: one, one more block by block, backward two
FORWARDS = 4


def dropped_sums(G, W, ranks):
    """s_mi: for each row of G and W (d_out, d_in), the sum of G_ij W_ij over the lowest l / LEVELS
    ranks -> (d_out, LEVELS), float64. By ROWS rows, whose order takes 8 bytes a weight.
    """
    pieces = zip(G.split(ROWS), W.split(ROWS), ranks.split(ROWS))
    return torch.cat([some_sums(*piece) for piece in pieces])


def some_sums(G, W, ranks):
    bins = ranks.long() * LEVELS // ranks.shape[1]
    sums = torch.zeros(len(G), LEVELS, device=G.device)
    sums.scatter_add_(1, bins, G.float() * W.float())
    return sums.double().cumsum(1)


def damages(sums, tokens):
    """c_m of one window at every level, (LEVELS,) nats per token, of s_mi (d_out, LEVELS) and its
    tokens: (4).
    """
    return (sums**2).sum(0) / (2 * tokens)


def head_gradient(model, h, generator):
    """d sum_t log p(y_t) / d h of final states h (1, T, D), y_t drawn from the model's own
    distribution at each position.
    """
    h = h.detach().requires_grad_()
    log_p = model.head(model.norm(h))[0].float().log_softmax(-1)
    y = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(h.device)
    (gradient,) = torch.autograd.grad(log_p.gather(1, y).sum(), h)
    return gradient


def weight_gradients(block, h, rotary, gradient):
    """Backward through one block from the gradient of its output: (gradient of its input h, [G of
    its seven matrices]).
    """
    h = h.detach().requires_grad_()
    weights = [block.get_submodule(name).weight for name in LINEARS]
    for W in weights:
        W.requires_grad_(True)
    try:
        gradient, *G = torch.autograd.grad(block(h, rotary), [h, *weights], gradient)
    finally:
        for W in weights:
            W.requires_grad_(False)
    return gradient, G


def output_gradients(block, h, rotary, gradient):
    """The same with [g (1, T, d_out) of what its seven matrices put out] for [G]."""
    h, outputs = h.detach().requires_grad_(), {}
    hooks = [
        block.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output})
        )
        for name in LINEARS
    ]
    try:
        end = block(h, rotary)
    finally:
        for hook in hooks:
            hook.remove()
    gradient, *g = torch.autograd.grad(end, [h, *(outputs[name] for name in LINEARS)], gradient)
    return gradient, g


def from_the_last(model, window, generator, gradients):
    """(i, gradients) of every block of one window (T,), from the last block on: forward once, then
    backward block by block, as `gradients` does, `weight_gradients` or `output_gradients`.

    Only the input of each block is kept, and each block is computed again for its gradient: so
    blocks may live in host memory.
    """
    rotary = model.rotary(len(window))
    with torch.no_grad():
        inputs = [model.embed(window[None])]
        for block in model.blocks:
            inputs.append(block(inputs[-1], rotary))
    gradient = head_gradient(model, inputs.pop(), generator)
    for i, block in zip(reversed(range(len(inputs))), reversed(model.blocks)):
        gradient, found = gradients(block, inputs[i], rotary, gradient)
        yield i, found


def add_pass(pruner, window, generator, table):
    """Add c_m(l) of one window (T,) to `table` (d, 7, LEVELS)."""
    for i, G in from_the_last(pruner.model, window, generator, weight_gradients):
        damage = []
        for W, g, ranks in zip(pruner.dense[i], G, pruner.ranks[i]):
            sums = dropped_sums(g, W.to(g.device), ranks.to(g.device))
            damage.append(damages(sums, len(window)))
        table[i] += torch.stack(damage).cpu()


def gradient_norms(pruner, windows, seed=0):
    """||g_i||_2 of every output i of every Linear of the dense model, over the passes of
    `damage_table`, {parameter name: (d_out,) float32}; g is the gradient of log p(y).

    Refused where gradients overflow, as float16's may.
    """
    pruner.restore()
    model, squares = pruner.model, {}
    generator = torch.Generator().manual_seed(seed)
    chosen = pieces_of(windows, generator).to(model.embed.weight.device)
    for window in tqdm(chosen, desc="curvature", disable=None, leave=False):
        for i, gradients in from_the_last(model, window, generator, output_gradients):
            for name, g in zip(pruner.names[i], gradients):
                squares[name] = squares.get(name, 0) + (g.float() ** 2).sum((0, 1))
    check_finite(torch.cat([*squares.values()]), model)
    return {name: square.sqrt() for name, square in squares.items()}


def check_finite(found, model):
    """Refused where what the gradients of a model gave is not all finite."""
    if not found.isfinite().all():
        dtype = str(model.embed.weight.dtype)[6:]
        raise Refused(f"the dense model's gradients overflow in {dtype}: try --dtype float32")


def pieces_of(windows, generator, passes=PASSES, tokens=PASS_TOKENS):
    """(passes, tokens) of windows (n, T), each of one window alone, drawn without replacement;
    fewer of a short text, shorter ones of short windows.
    """
    tokens = min(tokens, windows.shape[1])
    whole = windows.shape[1] // tokens * tokens
    pieces = windows[:, :whole].reshape(-1, tokens)
    return pieces[torch.randperm(len(pieces), generator=generator)[:passes]]


def damage_table(pruner, windows, passes=PASSES, tokens=PASS_TOKENS, seed=0):
    """c_m at the levels 1 / LEVELS to 1, (d, 7, LEVELS) float64 in nats per token, of the dense
    model on some of windows (n, T). Refused where its gradients overflow, as float16 may.
    """
    pruner.restore()
    generator = torch.Generator().manual_seed(seed)
    chosen = pieces_of(windows, generator, passes, tokens)
    table = torch.zeros(len(pruner.live), len(LINEARS), LEVELS, dtype=torch.float64)
    device = pruner.model.embed.weight.device
    for window in tqdm(chosen.to(device), desc="curvature", disable=None, leave=False):
        add_pass(pruner, window, generator, table)
    check_finite(table, pruner.model)
    return table / len(chosen)


def fit_curves(table):
    """t, q, r (d, 7) of log c = t + q log(x + SHIFT) + r x, least squares over the inner levels of
    table (d, 7, LEVELS).
    """
    x = torch.arange(1, LEVELS, dtype=torch.float64) / LEVELS
    features = torch.stack([torch.ones_like(x), (x + SHIFT).log(), x], 1)
    log_c = table[..., :-1].clamp(min=1e-12).log()
    # by QR: with pivoting, the default, the last bit depends on where in memory the arrays lie
    t, q, r = torch.linalg.lstsq(features, log_c.flatten(0, 1).T, driver="gels").solution
    return tuple(v.view(table.shape[:2]) for v in (t, q, r))


def read_curves(pruner, windows, seed=0):
    """t, q, r (d, 7) of the dense model, from some of windows (n, T): what `search` starts from."""
    return fit_curves(damage_table(pruner, windows, seed=seed))


def cost_in_tokens(windows):
    """Tokens of forward passes that `read_curves` costs: what a table of budgets counts."""
    tokens = min(PASS_TOKENS, windows.shape[1])
    pieces = len(windows) * (windows.shape[1] // tokens)
    return FORWARDS * tokens * min(PASSES, pieces)
