"""
UniCuCo: one network, StratNet, that maps any request to its best pruning strategy.

Source    UniCuCo (arXiv 2505.12216); Pareto set learning with a surrogate as in PSL-MOBO (Lin et
          al., arXiv 2210.08495).
Reading   2 of 8. Before: gp.py. Next: model.py. Knows nothing of language models: f2 is any costly
          function.
Shapes    B requests, d blocks, n strategies measured, c candidates.

  code         symbol                     meaning, unit
  request      lambda = (l1, l2)          weights of size and of fidelity, non-negative, sum 1
  strategy     x in [0, MAX]^d            sparsity of each block: fraction of every row of its
               Linear weights that goes
  size         f1(x) = 1 - mean(x)        fraction of block weights that survive: exact, free
  divergence   f2(x) = KL(dense||pruned)  nats per token: costly, no gradient; the GP learns y = log
               f2
  scaled       f1', f2'                   (MAX - mean x) / MAX and (y - lo) / (hi - lo): what
               requests weigh
  ideal        z*                         (-0.05, -0.05), a little better than anything reachable
  net          h_phi                      StratNet: request -> strategy

Laptop    python unicuco.py                  (5 s; Algorithm 1 on a toy f2: a table of its front,
          StratNet and uniform)
"""

import contextlib
import json
import math
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from gp import MEANS, GaussianProcess
from script import Refused, replacing

MAX = 0.9  # no block loses more
IDEAL = -0.05  # z*, the same for both scaled objectives
AUGMENT = 0.02  # weight of the sum in the augmented Tchebycheff value
CLAMP = 12.0  # logits beyond this are saturated: a shift could not move them
KL_FLOOR, KL_CEILING = (
    1e-6,
    1e2,
)  # nats; y = log f2 is clipped: log 0 below, a model pruned to ruin above
ASKED = (0.15, 0.75)  # mean sparsities that requests come from


# --------------------------------------------------------------------------------- objectives
def cap_divergence(kl):
    """KL in nats; one that is NaN or infinite counts as 100, so that nothing non-finite is
    compared, averaged or learned.
    """
    return kl if math.isfinite(kl) else KL_CEILING


def log_divergence(kl):
    """y = log f2 in nats, what the GP learns."""
    return math.log(min(max(cap_divergence(kl), KL_FLOOR), KL_CEILING))


@dataclass
class Scale:
    """lo and hi of y = log f2: fixed after the first design, so that requests and hypervolume keep
    their meaning.
    """

    lo: float
    hi: float

    @classmethod
    def of(cls, y):
        lowest, highest = float(min(y)), float(max(y))
        return cls(lowest, max(highest, lowest + 1e-3))

    def __call__(self, strategies, y):
        """Scaled objectives (B, 2) of strategies (B, d) and y (B,)."""
        size = (MAX - strategies.mean(1)) / MAX
        return torch.stack([size, (y - self.lo) / (self.hi - self.lo)], 1)


def tchebycheff(objectives, requests):
    """Augmented weighted Tchebycheff values (B,) of scaled objectives (B, 2) for requests (B, 2).

    max_i l_i (f_i' - z*_i) + 0.02 sum_i l_i (f_i' - z*_i): the max reaches convex and concave
    fronts, the sum breaks its ties.
    """
    weighted = requests * (objectives - IDEAL)
    return weighted.amax(1) + AUGMENT * weighted.sum(1)


def sample_requests(count, generator):
    """lambda ~ Dirichlet(1, 1): (count, 2), l1 uniform on [0, 1]."""
    size = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.stack([size, 1 - size], 1)


def first_design(count, blocks, generator):
    """Strategies (count, blocks) to measure first: a level stratified over [0.05, 0.8], blocks
    scattered around it by 0.12.

    Departs from the usual Latin hypercube, whose mean sparsity would sit at 0.45 +- 0.05 when there
    are 12 to 30 blocks.
    """
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    level = (torch.arange(count) + jitter) / count
    noise = torch.randn(count, blocks, generator=generator, dtype=torch.float64)
    return (0.05 + 0.75 * level[:, None] + 0.12 * noise).clamp(0, MAX)


# ----------------------------------------------------------------------------------- StratNet
class StratNet(nn.Module):
    """h_phi: requests (B, 2) -> strategies (B, d) in (0, MAX): two hidden layers of 256 for all
    requests together. float64.
    """

    def __init__(self, blocks, width=256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, blocks),
        )
        self.double()

    def logits(self, requests):
        return self.layers(requests.double())

    def forward(self, requests):
        return MAX * torch.sigmoid(self.logits(requests))


def train_stratnet(net, gp, scale, steps, kappa, generator, requests_per_step=16, rate=1e-3):
    """Minimise the expected Tchebycheff value over requests, with f2 at its lower confidence bound
    mean - kappa std.

    The gradient reaches the strategies through the GP's closed form, then the network by
    backpropagation.
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


# -------------------------------------------------------------------- hypervolume, batch selection
def staircase(points):
    """Edges (m + 1,) along f1' and heights (m,) in f2' of the region under (1, 1) that `points` (n,
    2) leave undominated.
    """
    edges, heights = [-math.inf], [1.0]
    for size, divergence in sorted(map(tuple, points.tolist())):
        if size < 1 and divergence < heights[-1]:
            edges.append(size)
            heights.append(divergence)
    edges.append(1.0)
    return torch.tensor(edges, dtype=torch.float64), torch.tensor(heights, dtype=torch.float64)


def hypervolume(points):
    """Exact area dominated by scaled objectives (n, 2), both minimised, up to the reference point
    (1, 1).
    """
    edges, heights = staircase(points)
    return float(((edges[2:] - edges[1:-1]) * (1 - heights[1:])).sum())


def hypervolume_gain(points, candidates):
    """Area that each candidate (c, 2) would add to that of `points` (n, 2): (c,), strip by strip of
    the staircase.
    """
    edges, heights = staircase(points)
    widths = (edges[1:] - torch.maximum(edges[:-1], candidates[:, :1])).clamp(min=0)  # (c, strips)
    return (widths * (heights - candidates[:, 1:]).clamp(min=0)).sum(1)


def candidate_strategies(net, count, wanted, between, generator):
    """What StratNet answers to `count` random requests, of mean sparsity within ASKED; strategies
    around it if too few are.
    """

    def within(strategies):
        level = strategies.mean(1)
        return strategies[(level >= between[0]) & (level <= between[1])]

    strategies = net(sample_requests(count, generator))
    chosen = within(strategies)
    if len(chosen) < wanted:  # StratNet has collapsed: scatter around what is asked for
        chosen = within(first_design(count, strategies.shape[1], generator))
    return chosen


@torch.no_grad()
def select_batch(net, gp, scale, measured, count, kappa, generator, candidates=1000, between=ASKED):
    """Strategies (count, d) to measure next: of those of random requests, the ones that greedily
    add most hypervolume (PSL).

    A pick counts with its lower confidence bound. Only strategies of mean sparsity within `between`
    may
    be picked: without that,
    half of the picks go where nobody asks (departs from PSL).
    measured  scaled objectives (n, 2) so far
    """
    strategies = candidate_strategies(net, candidates, count, between, generator)
    mean, std = gp.posterior(strategies)
    objectives, picks = scale(strategies, mean - kappa * std), []
    for _ in range(count):
        gain = hypervolume_gain(measured, objectives)
        gain[picks] = -1
        if gain.max() <= 0:  # nothing left to gain: the least certain strategy teaches most
            gain = std.clone()
            gain[picks] = -1
        picks.append(int(gain.argmax()))
        measured = torch.cat([measured, objectives[picks[-1:]]])
    return strategies[picks]


def to_logits(strategies):
    """The inverse of MAX sigmoid(.), within +-CLAMP, of strategies of any shape."""
    return (strategies / MAX).clamp(1e-6, 1 - 1e-6).logit().clamp(-CLAMP, CLAMP)


def scattered(strategies, generator, by=0.2):
    """Strategies (c, d), each block moved at random by about `by` in its logit.

    Picks that all lie on StratNet's own curve would never teach the GP what is beside it (departs
    from PSL).
    """
    noise = torch.randn(strategies.shape, generator=generator, dtype=torch.float64)
    return MAX * torch.sigmoid(to_logits(strategies) + by * noise)


# -------------------------------------------------------------------------------- Algorithm 1
@dataclass
class SearchSettings:
    """How much Algorithm 1 measures and trains; kappa: of the lower confidence bound while
    searching.
    """

    initial: int = 48
    rounds: int = 14
    batch: int = 4
    mean: str = "blocks"
    kappa: float = 0.5
    steps: int = 300
    final_steps: int = 1500


@dataclass
class SearchResult:
    """log: [{"round", "strategy", "predicted", "measured"}], predicted = exp of the GP's mean
    before measuring.
    """

    net: StratNet
    scale: Scale
    gp: GaussianProcess
    log: list


@contextlib.contextmanager
def one_thread():
    """The GP and StratNet are so small that a second thread costs more than it brings; and one
    thread always adds in one order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def log_data(log):
    """Strategies X (n, d) and y = log f2 (n,) of the log of a search."""
    strategies = [entry["strategy"] for entry in log]
    y = [log_divergence(entry["measured"]) for entry in log]
    return torch.tensor(strategies, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)


def record(log, round, strategies, measured, predicted):
    for x, kl, guess in zip(strategies, measured, predicted):
        log.append({"round": round, "strategy": x.tolist(), "predicted": guess, "measured": kl})


def search(measure, blocks, settings=None, seed=0, progress=None):
    """Algorithm 1.

    measure   list of strategies (d,) -> list of f2, KL in nats per token; every call is one batch,
              costly
    progress  called with log and scale after every round
    returns   SearchResult; predictions of round 0 are None
    """
    s = settings or SearchSettings()
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net, log = StratNet(blocks), []
    # 1. measure a first design
    design = first_design(s.initial, blocks, g)
    record(log, 0, design, measure(list(design)), [None] * s.initial)
    scale = Scale.of(log_data(log)[1])
    for round in range(1, s.rounds + 1):
        X, y = log_data(log)
        with one_thread():
            # 2. fit the Gaussian process to everything measured so far
            gp = GaussianProcess(s.mean).fit(X, y)
            # 3. update StratNet on its lower confidence bound
            train_stratnet(net, gp, scale, s.steps, s.kappa, g)
            # 4. of random requests' strategies, pick the batch that adds most hypervolume; scatter
            # it
            picks = select_batch(net, gp, scale, scale(X, y), s.batch, s.kappa, g)
            picks = scattered(picks, g)
            predicted = gp.posterior(picks)[0].exp().tolist()
        # 5. prune, measure, remember
        record(log, round, picks, measure(list(picks)), predicted)
        if progress is not None:
            progress(log, scale)
    # 6. refit, and train StratNet to the end on the mean alone
    with one_thread():
        gp = GaussianProcess(s.mean).fit(*log_data(log))
        train_stratnet(net, gp, scale, s.final_steps, 0.0, g)
    return SearchResult(net, scale, gp, log)


# ------------------------------------------------------------------ from a sparsity to a strategy
@torch.no_grad()
def strategy_for(net, sparsity, counted_sparsity):
    """StratNet's strategy (d,) whose counted sparsity is that of uniform pruning at `sparsity`,
    within 1 / (d min d_in).

    l1 -> mean(h(l)) is close to monotone: bisect on l1, then shift all logits by one constant until
    the count fits. Where blocks
    tie, the last step of the count moves them one by one.
    counted_sparsity   strategy (d,) -> fraction of weights pruned, as Pruner.sparsity
    Refused outside [0, MAX].
    """
    if not 0 <= sparsity <= MAX:
        raise Refused(
            f"sparsity {sparsity} is outside 0 to {MAX}, the most that a strategy may take from a"
            " block"
        )
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        request = torch.tensor([[middle, 1 - middle]])
        if float(net(request).mean()) < sparsity:
            low = middle
        else:
            high = middle
    return shift_to(net.logits(request)[0].clamp(-CLAMP, CLAMP), sparsity, counted_sparsity)


def shift_to(logits, sparsity, counted_sparsity):
    """The strategy MAX sigmoid(logits + shift) (d,) with the count of uniform at `sparsity`, to the
    nearest single step.
    """
    target = counted_sparsity(torch.full_like(logits, sparsity))
    low, high = -40.0, 40.0
    for _ in range(70):
        middle = (low + high) / 2
        if counted_sparsity(MAX * torch.sigmoid(logits + middle)) < target:
            low = middle
        else:
            high = middle
    below, above = MAX * torch.sigmoid(logits + low), MAX * torch.sigmoid(logits + high)
    best, error = below, abs(counted_sparsity(below) - target)
    # usually one block crosses a count between below and above, ties more
    for i in range(len(logits)):
        below = torch.cat([above[: i + 1], below[i + 1 :]])
        if abs(counted_sparsity(below) - target) < error:
            best, error = below, abs(counted_sparsity(below) - target)
    return best


# ------------------------------------------------------------------------------------- on disk
@dataclass
class Trained:
    """What stratnet.safetensors holds: StratNet, its scale, the measured strategies X (n, d), y
    (n,), and settings.
    """

    net: StratNet
    scale: Scale
    X: torch.Tensor
    y: torch.Tensor
    about: dict


def save_stratnet(path, net, scale, X, y, about):
    """StratNet, its scale and the measured strategies X (n, d), y (n,) in one safetensors file;
    `about`: settings, as JSON.
    """
    tensors = dict(net.state_dict()) | {"X": X.double(), "y": y.double()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"about": json.dumps(about | {"lo": scale.lo, "hi": scale.hi})}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata)
        partial.chmod(0o644)


def read_stratnet(path):
    """Trained, of a file that anyone may have written; ValueError or whatever else when it does not
    fit together.
    """
    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
        about = json.loads(f.metadata()["about"])
    if not all(t.dtype == torch.float64 and t.isfinite().all() for t in tensors.values()):
        raise ValueError("a tensor is not float64, or not finite")
    X, y = tensors.pop("X"), tensors.pop("y")
    depth = len(tensors["layers.4.bias"])
    scale = Scale(float(about["lo"]), float(about["hi"]))
    ordered = -math.inf < scale.lo < scale.hi < math.inf
    shaped = X.shape == (*y.shape, depth) and 0 < len(y) <= 10_000
    if not (ordered and shaped and X.min() >= 0 and X.max() <= MAX):
        raise ValueError("its strategies, values and scale do not fit together")
    if about["mean"] not in MEANS:
        raise ValueError("the mean of its surrogate is unknown")
    with torch.device("meta"):  # nothing is allocated for what the file only claims
        net = StratNet(depth)
    net.load_state_dict(tensors, assign=True)
    return Trained(net.eval(), scale, X, y, about)


def load_stratnet(path, blocks):
    """-> Trained. Refused, in one line, when the file is broken or made for another depth."""
    try:
        trained = read_stratnet(path)
    except Exception as error:  # a file that anyone may have written can be wrong in any way
        why = " ".join(str(error).split())[:200]
        raise Refused(f"{path} is no StratNet that can be read: {why}") from None
    depth = trained.X.shape[1]
    if depth != blocks:
        raise Refused(
            f"{path} is a StratNet for {depth} blocks, the model has {blocks}: python train.py"
            " --model DIR makes one"
        )
    return trained


# ------------------------------------------------------------------------------- a toy, end to end
class Toy:
    """f2(x) = sum_i w_i x_i^1.2 exp(4 x_i): separable, so its Pareto front is known.

    At an optimum every block that is not at a bound has the same marginal damage d f2 / d x_i.
    """

    def __init__(self, blocks=12):
        self.w = torch.logspace(-1.5, 0, blocks, dtype=torch.float64) * 0.02
        self.grid = torch.linspace(0, MAX, 9001, dtype=torch.float64)

    def f2(self, x):
        return (self.w * x**1.2 * (4 * x).exp()).sum(-1)

    def front(self, marginals):
        """Pareto-optimal strategies (m, blocks), one for each marginal damage (m,)."""
        slope = (self.grid.clamp(min=1e-9) ** 0.2 * (1.2 + 4 * self.grid)) * (4 * self.grid).exp()
        below = torch.searchsorted(slope, marginals[:, None] / self.w)
        return self.grid[below.clamp(max=len(self.grid) - 1)]


def main():
    """Algorithm 1 on a toy whose front is known: the KL of front, StratNet and uniform at five
    sizes.
    """
    toy = Toy()
    result = search(lambda batch: [float(toy.f2(x)) for x in batch], len(toy.w))
    front = toy.front(torch.logspace(-4, 2, 20000, dtype=torch.float64))
    print(f"{len(result.log)} evaluations of f2, {len(toy.w)} blocks\n")
    print("sparsity   front  StratNet  uniform   (f2, less is better)")
    for sparsity in (0.3, 0.4, 0.5, 0.6, 0.7):
        best = front[(front.mean(1) - sparsity).abs().argmin()]
        ours = strategy_for(result.net, sparsity, lambda x: float(torch.as_tensor(x).mean()))
        uniform = torch.full_like(best, sparsity)
        values = [float(toy.f2(x)) for x in (best, ours, uniform)]
        print(f"{sparsity:8.1f}  {values[0]:6.3f}  {values[1]:8.3f}  {values[2]:7.3f}")


if __name__ == "__main__":
    main()
