"""
UniCuCo: one network, StratNet, that maps any request to its best pruning strategy.

Source    UniCuCo (arXiv 2505.12216); Pareto set learning with a surrogate as in PSL-MOBO (Lin et al., arXiv 2210.08495).
Reading   4 of 6. Before: gp.py. Next: prune.py. Imports outputs.py alone; knows nothing of language models.
Shapes    B requests, d blocks, n strategies measured, c candidates.
Not here  the loop that measures strategies: train.py.

  code         symbol                     meaning, unit
  request      lambda = (l1, l2)          weights of size and of fidelity, non-negative, sum 1
  strategy     x in [0, MAX]^d            sparsity of each block: fraction of every row of its Linear weights that goes
  size         f1(x) = 1 - mean(x)        fraction of block weights that survive: exact, free
  divergence   f2(x) = KL(dense||pruned)  nats per token: costly, no gradient; the GP learns y = log f2
  scaled       f1', f2'                   (MAX - mean x) / MAX and (y - lo) / (hi - lo): what requests weigh
  ideal        z*                         (-0.05, -0.05), a little better than anything reachable
  net          h_phi                      StratNet: request -> strategy
"""
import json
import math
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from outputs import replacing

MAX = 0.9                           # no block loses more
IDEAL = -0.05                       # z*, the same for both scaled objectives
AUGMENT = 0.02                      # weight of the sum in the augmented Tchebycheff value
CLAMP = 12.0                        # logits beyond this are saturated: a shift could not move them
DIVERGENCES = (1e-6, 1e2)           # y = log f2 is clipped to these: log 0 below, a model pruned to ruin above


# ---------------------------------------------------------------------------------------------------------- objectives
def finite(kl):
    """KL in nats; one that is NaN or infinite counts as 100, so that nothing non-finite is compared, averaged or learned."""
    return kl if math.isfinite(kl) else DIVERGENCES[1]


def log_divergence(kl):
    """y = log f2 in nats, what the GP learns."""
    return math.log(min(max(finite(kl), DIVERGENCES[0]), DIVERGENCES[1]))


@dataclass
class Scale:
    """lo and hi of y = log f2: fixed after the first design, so that requests and hypervolume keep their meaning."""
    lo: float
    hi: float

    @classmethod
    def of(cls, y):
        return cls(float(min(y)), max(float(max(y)), float(min(y)) + 1e-3))

    def __call__(self, strategies, y):
        """Scaled objectives (B, 2) of strategies (B, d) and y (B,)."""
        return torch.stack([(MAX - strategies.mean(1)) / MAX, (y - self.lo) / (self.hi - self.lo)], 1)


def tchebycheff(objectives, requests):
    """Augmented weighted Tchebycheff values (B,) of scaled objectives (B, 2) for requests (B, 2).

    max_i l_i (f_i' - z*_i) + 0.02 sum_i l_i (f_i' - z*_i): the max reaches convex and concave fronts, the sum breaks its ties.
    """
    weighted = requests * (objectives - IDEAL)
    return weighted.amax(1) + AUGMENT * weighted.sum(1)


def sample_requests(count, generator):
    """lambda ~ Dirichlet(1, 1): (count, 2), l1 uniform on [0, 1]."""
    size = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.stack([size, 1 - size], 1)


def first_design(count, blocks, generator):
    """Strategies (count, blocks) to measure first: a level stratified over [0.05, 0.8], blocks scattered around it by 0.12.

    Departs from the usual Latin hypercube, whose mean sparsity would sit at 0.45 +- 0.05 when there are 12 to 30 blocks.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    noise = torch.randn(count, blocks, generator=generator, dtype=torch.float64)
    return (0.05 + 0.75 * u[:, None] + 0.12 * noise).clamp(0, MAX)


# ------------------------------------------------------------------------------------------------------------- StratNet
class StratNet(nn.Module):
    """h_phi: requests (B, 2) -> strategies (B, d) in (0, MAX): two hidden layers of 256 for all requests together. float64."""

    def __init__(self, blocks, width=256):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, blocks))
        self.double()

    def logits(self, requests):
        return self.layers(requests.double())

    def forward(self, requests):
        return MAX * torch.sigmoid(self.logits(requests))


def train_stratnet(net, gp, scale, steps, kappa, generator, requests_per_step=16, rate=1e-3):
    """Minimise the expected Tchebycheff value over requests, with f2 at its lower confidence bound mean - kappa std.

    The gradient reaches the strategies through the GP's closed form, then the network by backpropagation.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        requests = sample_requests(requests_per_step, generator)
        strategies = net(requests)
        mean, std = gp.posterior(strategies)
        loss = tchebycheff(scale(strategies, mean - kappa * std), requests).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def strategy_for(net, sparsity, counted):
    """StratNet's strategy (d,) whose counted sparsity is that of uniform pruning at `sparsity`, within 1 / (d min d_in).

    l1 -> mean(h(l)) is close to monotone: bisect on l1, then shift all logits by one constant until the count fits. Where blocks
    tie, the last step of the count moves them one by one.
    counted   strategy (d,) -> fraction of weights pruned, as Pruner.sparsity
    raises    ValueError outside [0, MAX]
    """
    if not 0 <= sparsity <= MAX:
        raise ValueError(f"sparsity {sparsity} is outside 0 to {MAX}, the most that a strategy may take from a block")
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if float(net(torch.tensor([[middle, 1 - middle]])).mean()) < sparsity:
            low = middle
        else:
            high = middle
    return shift_to(net.logits(torch.tensor([[middle, 1 - middle]]))[0].clamp(-CLAMP, CLAMP), sparsity, counted)


def shift_to(logits, sparsity, counted):
    """The strategy MAX sigmoid(logits + shift) (d,) with the count of uniform at `sparsity`, to the nearest single step."""
    target = counted(torch.full_like(logits, sparsity))
    low, high = -40.0, 40.0
    for _ in range(70):
        middle = (low + high) / 2
        if counted(MAX * torch.sigmoid(logits + middle)) < target:
            low = middle
        else:
            high = middle
    below, above = MAX * torch.sigmoid(logits + low), MAX * torch.sigmoid(logits + high)
    best, error = below, abs(counted(below) - target)
    for i in range(len(logits)):                           # usually one block crosses a count between below and above, ties more
        below = torch.cat([above[:i + 1], below[i + 1:]])
        if abs(counted(below) - target) < error:
            best, error = below, abs(counted(below) - target)
    return best


# ------------------------------------------------------------------------------------------- hypervolume, batch selection
def staircase(points):
    """Edges (m + 1,) along f1' and heights (m,) in f2' of the region under (1, 1) that `points` (n, 2) leave undominated."""
    edges, heights, height = [-math.inf], [1.0], 1.0
    for size, divergence in sorted(map(tuple, points.tolist())):
        if size < 1 and divergence < height:
            edges.append(size)
            heights.append(divergence)
            height = divergence
    return torch.tensor(edges + [1.0], dtype=torch.float64), torch.tensor(heights, dtype=torch.float64)


def hypervolume(points):
    """Exact area dominated by scaled objectives (n, 2), both minimised, up to the reference point (1, 1)."""
    edges, heights = staircase(points)
    return float(((edges[2:] - edges[1:-1]) * (1 - heights[1:])).sum())


def hypervolume_gain(points, candidates):
    """Area that each candidate (c, 2) would add to that of `points` (n, 2): (c,), strip by strip of the staircase."""
    edges, heights = staircase(points)
    widths = (edges[1:] - torch.maximum(edges[:-1], candidates[:, :1])).clamp(min=0)       # (c, strips)
    return (widths * (heights - candidates[:, 1:]).clamp(min=0)).sum(1)


def select_batch(net, gp, scale, measured, count, kappa, generator, candidates=1000, between=(0.15, 0.75)):
    """Strategies (count, d) to measure next: of the strategies of random requests, those that greedily add most hypervolume (PSL).

    A pick counts with its lower confidence bound. Only strategies of mean sparsity within `between` may be picked: without that,
    half of the picks go where nobody asks (departs from PSL).
    measured  scaled objectives (n, 2) so far
    """
    with torch.no_grad():
        strategies = net(sample_requests(candidates, generator))
        wanted = (strategies.mean(1) >= between[0]) & (strategies.mean(1) <= between[1])
        if wanted.sum() < count:                           # StratNet has collapsed: scatter around what is asked for
            strategies = first_design(candidates, strategies.shape[1], generator)
            wanted = (strategies.mean(1) >= between[0]) & (strategies.mean(1) <= between[1])
        strategies = strategies[wanted]
        mean, std = gp.posterior(strategies)
        objectives, picks = scale(strategies, mean - kappa * std), []
        for _ in range(count):
            gain = hypervolume_gain(measured, objectives)
            gain[picks] = -1
            if gain.max() <= 0:                            # nothing left to gain: the least certain strategy teaches most
                gain = std.clone()
                gain[picks] = -1
            picks.append(int(gain.argmax()))
            measured = torch.cat([measured, objectives[picks[-1:]]])
        return strategies[picks]


def logit(strategies):
    """The inverse of MAX sigmoid(.), within +-CLAMP, of strategies of any shape."""
    return (strategies / MAX).clamp(1e-6, 1 - 1e-6).logit().clamp(-CLAMP, CLAMP)


def scattered(strategies, generator, by=0.2):
    """Strategies (c, d), each block moved at random by about `by` in its logit. Picks that all lie on StratNet's own curve would
    never teach the GP what is beside it (departs from PSL)."""
    return MAX * torch.sigmoid(logit(strategies) + by * torch.randn(strategies.shape, generator=generator, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------------------- on disk
def save_stratnet(path, net, scale, X, y, about):
    """StratNet, its scale and the measured strategies X (n, d), y (n,) in one safetensors file; `about`: settings, as JSON."""
    tensors = dict(net.state_dict()) | {"X": X.double(), "y": y.double()}
    with replacing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"about": json.dumps(about | {"lo": scale.lo, "hi": scale.hi})})
        partial.chmod(0o644)


def load_stratnet(path, blocks):
    """-> StratNet, Scale, X (n, d), y (n,), about. ValueError, in one line, when it is broken or made for another depth."""
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            about = json.loads(f.metadata()["about"])
        if not all(t.dtype == torch.float64 and t.isfinite().all() for t in tensors.values()):
            raise ValueError("a tensor is not float64, or not finite")
        X, y = tensors.pop("X"), tensors.pop("y")
        depth, scale = len(tensors["layers.4.bias"]), Scale(float(about["lo"]), float(about["hi"]))
        ordered = -math.inf < scale.lo < scale.hi < math.inf
        if not (ordered and X.shape == (*y.shape, depth) and 0 < len(y) <= 10_000 and X.min() >= 0 and X.max() <= MAX):
            raise ValueError("its strategies, values and scale do not fit together")
        if about["mean"] not in ("blocks", "constant"):
            raise ValueError("the mean of its surrogate is unknown")
        with torch.device("meta"):                         # nothing is allocated for what the file only claims
            net = StratNet(depth)
        net.load_state_dict(tensors, assign=True)
    except Exception as error:                             # a file that anyone may have written can be wrong in any way
        raise ValueError(f"{path} is no StratNet that can be read: {' '.join(str(error).split())[:200]}") from None
    if depth != blocks:
        raise ValueError(f"{path} is a StratNet for {depth} blocks, the model has {blocks}: python train.py --model DIR makes one")
    return net.eval(), scale, X, y, about
