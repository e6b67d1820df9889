"""
What UniCuCo is compared with: uniform, OWL, EvoPress and a per-request Gaussian process, on the same masks and the same f2.

Source    OWL (arXiv 2310.05175), EvoPress (arXiv 2410.14649); each docstring says what was left out.
Reading   after train.py. Next: stages.py.
Shapes    d blocks; a strategy (d,) is the sparsity of each block; every baseline returns one for the same counted sparsity.
"""
import time

import torch

from gp import GaussianProcess
from prune import LINEARS, METRICS, activation_norms
from train import one_thread
from unicuco import MAX, log_divergence, logit, shift_to


def uniform(blocks, sparsity):
    """The same sparsity in every block, as in Wanda and SparseGPT: (d,)."""
    return torch.full((blocks,), sparsity, dtype=torch.float64)


@torch.inference_mode()
def outlier_shares(model, windows, M=(3, 5, 7, 10)):
    """OWL's layer-wise outlier distribution: share of a block's Wanda scores above M times their mean, {M: (d,)}, in percent."""
    norms, shares = activation_norms(model, windows), {m: [] for m in M}
    for i, block in enumerate(model.blocks):
        scores = torch.cat([METRICS["wanda"](block.get_submodule(name).weight, norms[f"model.layers.{i}.{name}.weight"]).flatten()
                            for name in LINEARS])
        for m in M:
            shares[m].append(100 * float((scores > m * scores.mean()).float().mean()))
    return {m: torch.tensor(s, dtype=torch.float64) for m, s in shares.items()}


def owl(shares, sparsity, counted, lam=0.08):
    """OWL (arXiv 2310.05175): blocks with more outliers keep more, at most `lam` off the mean. shares (d,) for one M.

    Left out: nothing of the method; the counted sparsity is then made equal by `shift_to`, as for all methods here.
    """
    spread = (shares - shares.min()) / (shares.max() - shares.min()).clamp(min=1e-12) * 2 * lam
    return shift_to(logit(sparsity - (spread - spread.mean())), sparsity, counted)


def owl_best(shares, sparsity, counted, f2, lams=(0.04, 0.08, 0.12)):
    """OWL with the M and lambda of lowest f2 on the search text: as many evaluations as there are settings."""
    candidates = [owl(s, sparsity, counted, lam) for s in shares.values() for lam in lams]
    return min(candidates, key=f2)


def evopress(f2, quick, sparsity, blocks, counted, budget, seed=0, offspring=8, survivors=2, step=0.05, snapshots=()):
    """EvoPress (arXiv 2410.14649): (1 + lambda) evolution of one request, by KL.

    Each child is the parent after 1 to 3 level switches: one random block gains `step` of sparsity, another loses it, so the sum
    stays. Selection in two steps on growing token counts: all children on `quick`, the best few and the parent on f2.
    f2, quick     strategy -> KL on all search tokens, and on 1 / quick.share of them
    budget        evaluations of f2, counted in tokens
    snapshots     smaller budgets whose best strategy is wanted too
    returns       {budget: (strategy (d,), seconds until then)}
    Left out: levels from a database of pruned layers (any level costs nothing here), and a third selection step.
    """
    g, started = torch.Generator().manual_seed(seed), time.perf_counter()
    parent = shift_to(logit(uniform(blocks, sparsity)), sparsity, counted)
    best, spent, found = f2(parent), 1.0, {}
    wanted = sorted({*snapshots, budget})
    while wanted:
        cost = offspring / quick.share + survivors
        while wanted and spent + cost > wanted[0]:
            found[wanted.pop(0)] = parent, time.perf_counter() - started
        if not wanted:
            break
        children = []
        for _ in range(offspring):
            child = parent.clone()
            switches = min(int(torch.randint(1, 4, (1,), generator=g)), int(torch.randint(1, 4, (1,), generator=g)))
            for _ in range(switches):
                up, down = torch.randperm(blocks, generator=g)[:2].tolist()
                size = min(step, float(MAX - child[up]), float(child[down]))
                child[up], child[down] = child[up] + size, child[down] - size
            children.append(shift_to(logit(child), sparsity, counted))
        children.sort(key=quick)
        for child in children[:survivors]:
            kl = f2(child)
            if kl < best:
                parent, best = child, kl
        spent += cost
    return found


def gp_search(f2, sparsity, blocks, counted, budget, seed=0, initial=12, batch=4, steps=200):
    """A Gaussian process for one request alone: the same surrogate and confidence bound, but no StratNet and no sharing.

    Strategies of the wanted count, scattered first; then the minimum of mean - 0.5 std over all blocks at that sparsity, by Adam.
    """
    g = torch.Generator().manual_seed(seed)

    def scattered(count, centre, width):
        noise = torch.randn(count, blocks, generator=g, dtype=torch.float64)
        return [shift_to(logit(centre + width * n), sparsity, counted) for n in noise]

    X = [shift_to(logit(uniform(blocks, sparsity)), sparsity, counted)] + scattered(min(initial, budget) - 1, uniform(blocks, sparsity), 0.12)
    y = [log_divergence(f2(x)) for x in X]
    while len(X) < budget:
        with one_thread():
            gp = GaussianProcess("blocks").fit(torch.stack(X), torch.tensor(y, dtype=torch.float64))
            start = torch.stack([X[min(range(len(X)), key=y.__getitem__)]] * batch)
            z = (logit(start) + 0.3 * torch.randn(start.shape, generator=g, dtype=torch.float64)).requires_grad_()
            optimizer = torch.optim.Adam([z], lr=0.05)
            for _ in range(steps):
                x = MAX * torch.sigmoid(z)
                mean, std = gp.posterior(x)
                loss = (mean - 0.5 * std + 100 * (x.mean(1) - sparsity) ** 2).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            picks = [shift_to(p, sparsity, counted) for p in z.detach()[:budget - len(X)]]
        X += picks
        y += [log_divergence(f2(x)) for x in picks]
    return X[min(range(len(X)), key=y.__getitem__)]
