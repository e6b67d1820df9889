"""
What UniCuCo is compared with: uniform, OWL, DLP, one global threshold, EvoPress, dynamic
programming, a Gaussian process for each request; and SparseGPT, what the refit is compared with.

Source    OWL (arXiv 2310.05175), DLP (arXiv 2505.23807), EvoPress and the dynamic programming that
          it is compared with (arXiv 2410.14649), SparseGPT (arXiv 2301.00774); docstrings say what
          was left out.
Reading   after train.py, before compare.py, which needs it. All on the same f2; the same masks, but
          for a global threshold and SparseGPT, which have their own.
Shapes    d blocks of 7 matrices; a strategy (d,) or (7 d,) is the sparsity of each.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from curvature import gradient_norms
from eval import batches
from gp import GaussianProcess
from model import LINEARS
from ranks import MadeOnDemand, activation_norms, kth_lowest, parameter_name, wanda
from refit import GROUPS, gram
from unicuco import MAX, log_divergence, one_thread, shift_to, to_logits


def uniform(blocks, sparsity):
    """The same sparsity in every block, as in Wanda and SparseGPT: (d,)."""
    return torch.full((blocks,), sparsity, dtype=torch.float64)


@dataclass
class Target:
    """What each search below is asked for: a strategy with the count of uniform at `sparsity`.

    places             length of a strategy: d, or 7 d for one over matrices
    counted_sparsity   strategy (d,) -> fraction of weights that it drops, as Pruner.sparsity
    """

    sparsity: float
    places: int
    counted_sparsity: Callable

    def met_by(self, strategy):
        """`strategy` (d,), all its logits shifted by one constant until the count is right."""
        return self.moved(to_logits(strategy))

    def moved(self, logits):
        """The strategy (d,) of `logits` (d,), shifted so."""
        count = self.counted_sparsity(uniform(self.places, self.sparsity))
        return shift_to(logits, count, self.counted_sparsity)

    def uniform(self):
        return self.met_by(uniform(self.places, self.sparsity))


# ---------------------------------------------------------------------------------- OWL and DLP
@torch.inference_mode()
def block_scores(model, windows):
    """The Wanda scores of every block, in one vector for each. The model must be dense."""
    norms = activation_norms(model, windows)
    for i, block in enumerate(model.blocks):
        weights = {name: block.get_submodule(name).weight for name in LINEARS}
        scores = [wanda(W, norms[parameter_name(i, name)]) for name, W in weights.items()]
        yield torch.cat([score.flatten() for score in scores])


def outlier_shares(model, windows, M=(3, 5, 7, 10)):
    """OWL's layer-wise outlier distribution, {M: (d,)}, in percent: the share of a block's Wanda
    scores above M times their mean."""
    shares = {m: [] for m in M}
    for scores in block_scores(model, windows):
        for m in M:
            shares[m].append(100 * float((scores > m * scores.mean()).float().mean()))
    return {m: torch.tensor(s, dtype=torch.float64) for m, s in shares.items()}


def median_scores(model, windows):
    """DLP's unimportance of each block, (d,): the median of its Wanda scores."""
    medians = [float(scores.median()) for scores in block_scores(model, windows)]
    return torch.tensor(medians, dtype=torch.float64)


def owl(shares, target, lam=0.08):
    """OWL: blocks with more outliers keep more, at most `lam` off the mean. shares (d,) of one M.

    Left out: nothing of the method; the count is then made equal, as for all methods here.
    """
    spread = (shares - shares.min()) / (shares.max() - shares.min()).clamp(min=1e-12) * 2 * lam
    return target.met_by(target.sparsity - (spread - spread.mean()))


def owl_best(shares, target, f2, lams=(0.04, 0.08, 0.12)):
    """OWL with the M and lambda of lowest f2 on the search text: an evaluation for each pair."""
    candidates = [owl(s, target, lam) for s in shares.values() for lam in lams]
    return min(candidates, key=f2)


def dlp(medians, target):
    """DLP: blocks whose scores have a lower median keep more, at most 2 alpha apart: its authors'
    alphas for Llama, 0.04 at 0.5, 0.1 at 0.6 and 0.15 at 0.7, on a line between them.

    medians   (d,) of `median_scores`: importance is 1 - median / sum, then scaled to [0, 1]
    Left out: nothing of the method; the count is then made equal, as for all methods here.
    """
    alpha = np.interp(target.sparsity, (0.5, 0.6, 0.7), (0.04, 0.1, 0.15))
    importance = 1 - medians / medians.sum()
    lowest, highest = importance.min(), importance.max()
    spread = 2 * alpha * (importance - lowest) / (highest - lowest).clamp(min=1e-12)
    return target.met_by(target.sparsity - (spread - spread.mean()))


# ------------------------------------------------------------------------------ a global threshold
class GlobalThreshold:
    """Masks of one threshold for all weights of the model, where Wanda has one for each row: the
    lowest |W_ij| ||X_j|| ||g_i|| go, wherever they are. Used like the Pruner that it is made of.

    Holds norms alone: a score is made again whenever it is asked for. A strategy says how many go,
    not where.
    """

    def __init__(self, pruner, windows, seed=0):
        self.pruner, self.model = pruner, pruner.model
        self.g_norms = gradient_norms(pruner, windows, seed)
        self.dense = dict(zip(sum(pruner.names, []), sum(pruner.dense, [])))

    def score(self, name):
        """(d_out, d_in) float32 of one matrix."""
        return wanda(self.dense[name], self.pruner.x_norms[name]) * self.g_norms[name][:, None]

    def masks(self, strategy):
        """{parameter name: bool, True = kept}, as many False as the strategy drops; equal scores
        fall together."""
        weights = sum(W.numel() for W in self.dense.values())
        count = round(self.pruner.sparsity(strategy) * weights)
        threshold = kth_lowest(lambda: map(self.score, self.dense), count) if count else -1.0
        return MadeOnDemand(self.dense, lambda name: self.score(name) > threshold)

    def sparsity(self, strategy):
        return self.pruner.mask_sparsity(self.masks(strategy))

    def apply(self, strategy):
        self.pruner.apply_masks(self.masks(strategy))

    def restore(self):
        self.pruner.restore()


# -------------------------------------------------------------------------------------- EvoPress
def child_of(parent, step, g, sizes=None):
    """`parent` (D,) after 1 to 3 level switches, 1 the likeliest: one random place loses weights,
    another gets as many back.

    step      how much sparsity that is for a place of mean size
    sizes     (D,) weights of each place; None: all alike
    """
    child = parent.clone()
    sizes = torch.ones_like(child) if sizes is None else sizes / sizes.mean()
    one, other = (int(torch.randint(1, 4, (1,), generator=g)) for _ in range(2))
    for _ in range(min(one, other)):
        up, down = torch.randperm(len(child), generator=g)[:2].tolist()
        room, held = (MAX - child[up]) * sizes[up], child[down] * sizes[down]
        moved = min(step, float(room), float(held))
        child[up] += moved / sizes[up]
        child[down] -= moved / sizes[down]
    return child


def generation_cost(offspring, steps):
    """Evaluations, in tokens, of one generation of `evopress`: each step reads what the one before
    left, the last ones are read whole."""
    cost = 0.0
    for objective, survivors in steps:
        cost += offspring / objective.share
        offspring = survivors
    return cost + offspring


def evopress(
    f2, steps, target, budget, seed=0, *, snapshots=(), offspring=16, step=0.05, sizes=None
):
    """EvoPress: (1 + lambda) evolution of one request, by KL.

    Selection in several steps on growing token counts, then the finalists and the parent on f2: of
    16 children 4, then 2 with steps of a quarter and a half, 8 evaluations a generation. (The
    authors': of 64 children 8, then 2, on 1/32, a quarter and all of 65,536 tokens.)
    f2          strategy -> KL on all search tokens
    steps       [(objective, survivors)], fewest tokens first; an objective is f2 on 1 /
                objective.share of the tokens, of its survivors the next step chooses
    budget      evaluations of f2, counted in tokens
    step, sizes of a level switch: see `child_of`
    snapshots   smaller budgets whose best strategy is wanted too
    returns     {budget: (strategy (d,), seconds until then, evaluations really spent)}
    Left out: a database of pruned layers (any level costs nothing here); that no two children are
    equal; other tokens for every generation (here a parent's KL is known, not measured again).
    """
    g = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    parent = target.uniform()
    best = f2(parent)
    spent = 1.0
    cost = generation_cost(offspring, steps)
    found = {}
    wanted = sorted({*snapshots, budget})
    while wanted:
        if spent + cost > wanted[0]:  # not even one more generation
            found[wanted.pop(0)] = parent, time.perf_counter() - started, spent
            continue
        children = [target.met_by(child_of(parent, step, g, sizes)) for _ in range(offspring)]
        for objective, survivors in steps:
            children = sorted(children, key=objective)[:survivors]
        parent, best = fittest(f2, children, parent, best)
        spent += cost
    return found


def fittest(f2, children, parent, best):
    """The best of the parent, of KL `best`, and its children: (strategy, KL)."""
    for child in children:
        kl = f2(child)
        if kl < best:
            parent, best = child, kl
    return parent, best


# ---------------------------------------------------------------------------- dynamic programming
LEVELS = 8  # of sparsity at which every matrix is pruned alone


def damages_alone(f2, matrix, matrices):
    """f2 of one matrix at 1 / LEVELS to all of MAX, the others dense: a list, 0 of none first."""
    damages = [0.0]
    for level in range(1, LEVELS + 1):
        strategy = torch.zeros(matrices, dtype=torch.float64)
        strategy[matrix] = MAX * level / LEVELS
        damages.append(f2(strategy))
    return damages


def knapsack(damages, units):
    """The lowest sum of damages for every budget, by dynamic programming, exact.

    damages   (D, L + 1) of matrix m at level l, which takes units[m] * l of the budget
    returns   sums (budget + 1,), infinite where no levels take just that much; and for each matrix
              its level (budget + 1,) when it and those before it take so much
    """
    budget = (damages.shape[1] - 1) * sum(units)
    sums = torch.full((budget + 1,), math.inf, dtype=torch.float64)
    sums[0] = 0
    choices = []
    for damage, unit in zip(damages, units):
        options = torch.full((len(damage), budget + 1), math.inf, dtype=torch.float64)
        for level, nats in enumerate(damage):
            options[level, unit * level :] = sums[: budget + 1 - unit * level] + nats
        sums, choice = options.min(0)
        choices.append(choice)
    return sums, choices


def dynamic_program(damages, sizes, target):
    """The levels of lowest summed damage, as if damages only added up. EvoPress's own baseline is
    this on squared errors of outputs; measured KL is a stronger form of it.

    damages   (D, L + 1) of `damages_alone`, each matrix one row;  sizes: D weights, whole numbers
    Budgets are in units of the sizes' common divisor, so nothing is rounded but the wanted count:
    to the nearest that levels reach, then met as by all methods here.
    """
    divisor = math.gcd(*sizes)
    units = [size // divisor for size in sizes]
    sums, choices = knapsack(damages, units)
    wanted = target.sparsity / MAX * (len(sums) - 1)
    distance = (torch.arange(len(sums)) - wanted).abs()
    left = int(torch.where(sums.isinf(), math.inf, distance).argmin())
    levels = []
    for choice, unit in zip(reversed(choices), reversed(units)):
        levels.insert(0, int(choice[left]))
        left -= unit * levels[0]
    return target.met_by(MAX / (damages.shape[1] - 1) * torch.tensor(levels, dtype=torch.float64))


# -------------------------------------------------------------------- a GP for one request alone
def gp_search(f2, target, budget, seed=0, *, initial=12, batch=4, steps=200):
    """A Gaussian process for one request alone: the surrogate and confidence bound of UniCuCo, but
    no StratNet and nothing shared with other requests.

    Strategies of the wanted count, scattered first; then minima of mean - 0.5 std.
    budget    evaluations of f2;   returns the strategy (d,) of lowest f2
    """
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(min(initial, budget) - 1, target.places, generator=g, dtype=torch.float64)
    centre = uniform(target.places, target.sparsity)
    X = [target.uniform()] + [target.met_by(centre + 0.12 * n) for n in noise]
    y = [log_divergence(f2(x)) for x in X]
    while len(X) < budget:
        with one_thread():
            gp = GaussianProcess("blocks").fit(torch.stack(X), torch.tensor(y, dtype=torch.float64))
            z = lowest_bounds(gp, best_of(X, y), target.sparsity, batch, steps=steps, generator=g)
            z = z[: budget - len(X)]
            picks = [target.moved(p) for p in z]
        X += picks
        y += [log_divergence(f2(x)) for x in picks]
    return best_of(X, y)


def best_of(X, y):
    """The first of the strategies X with the lowest y."""
    return X[min(range(len(X)), key=y.__getitem__)]


def lowest_bounds(gp, start, sparsity, batch, *, steps, generator):
    """Logits (batch, d) of minima of the GP's mean - 0.5 std at that sparsity: Adam, from around
    `start` (d,), over all blocks."""
    z = to_logits(torch.stack([start] * batch))
    z += 0.3 * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(steps):
        x = MAX * torch.sigmoid(z)
        mean, std = gp.posterior(x)
        loss = (mean - 0.5 * std + 100 * (x.mean(1) - sparsity) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return z.detach()


# ------------------------------------------------------------------------------------- SparseGPT
def sparsegpt_matrix(W, H, sparsity, kept=None, *, damping=0.01, width=128):
    """SparseGPT's sweep over the columns of W (d_out, d_in): each pruned weight's error goes into
    the columns to its right, as the inverse of H = x^T x (d_in, d_in) says.

    kept      mask (d_out, d_in), True = stays; None: chosen in each `width` columns by
              w^2 / [H^-1]_jj, H of the columns from j on, the lowest `sparsity` of them going
    returns   the new W, float32, 0 where pruned
    """
    W, H = W.float().clone(), H.clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    H.diagonal().add_(damping * H.diagonal().mean())
    H_inv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, W.shape[1], width):
        part = slice(start, min(start + width, W.shape[1]))
        w, U = W[:, part], H_inv[part, part]
        stays = lowest_go(w**2 / U.diagonal() ** 2, sparsity) if kept is None else kept[:, part]
        errors = torch.zeros_like(w)
        for j in range(w.shape[1]):
            errors[:, j] = torch.where(stays[:, j], 0, w[:, j]) / U[j, j]
            w[:, j] = torch.where(stays[:, j], w[:, j], 0)
            w[:, j + 1 :] -= errors[:, j, None] * U[j, j + 1 :]
        W[:, part.stop :] -= errors @ H_inv[part, part.stop :]
    return W


def lowest_go(scores, sparsity):
    """True but for the lowest `sparsity` of all scores (d_out, width)."""
    threshold = scores.flatten().kthvalue(max(1, int(sparsity * scores.numel() + 1e-6))).values
    return (scores > threshold) if sparsity > 0 else torch.ones_like(scores, dtype=torch.bool)


@torch.inference_mode()
def sparsegpt(pruner, windows, sparsity, masks=None):
    """Make the model that of SparseGPT at a uniform sparsity, block by block, on inputs from the
    blocks that are pruned already; with its own masks, or with masks {parameter name: bool}.
    """
    model = pruner.model
    pruner.restore()
    rotary = model.rotary(windows.shape[1])
    states = [model.embed(w) for w in batches(windows.to(model.embed.weight.device))]
    for i, block in enumerate(model.blocks):
        walks = [block.walk(h, rotary) for h in states]
        for members in GROUPS:
            H = sum(gram(next(walk)[0].flatten(0, 1).float()) for walk in walks)
            for j in members:
                kept = None if masks is None else masks[pruner.names[i][j]].to(H.device)
                W = sparsegpt_matrix(pruner.dense[i][j].to(H.device), H, sparsity, kept)
                pruner.live[i][j].copy_(W)
        states = [next(walk)[1] for walk in walks]
