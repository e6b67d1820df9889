"""
UniCuCo: one network, StratNet, that maps any request to its best pruning strategy.

Source    UniCuCo (arXiv 2505.12216); Pareto set learning with a surrogate as in PSL-MOBO (Lin et
          al., arXiv 2210.08495).
Reading   2 of 9. Before: gp.py. Next: model.py. Knows nothing of language models: f2 is any costly
          function.
Shapes    B requests, D sparsities of a strategy, n strategies measured, c candidates.

  code         symbol                     meaning, unit
  request      lambda = (l1, l2)          weights of size and of fidelity, non-negative, sum 1
  strategy     x in [0, MAX]^D            sparsity of each matrix: fraction of every row that goes
  layout       D = 7 d, or d              what has a sparsity: every matrix of d blocks, or a block
  size         f1(x) = 1 - share . x      fraction of block weights that survive: exact, free
  divergence   f2(x) = KL(dense||pruned)  nats per token: costly, no gradient; the GP learns log f2
  scaled       f1', f2'                   (MAX - share . x) / MAX and (y - lo) / (hi - lo)
  ideal        z*                         (-0.05, -0.05), a little better than what requests ask for
  net          h_phi                      StratNet: request -> strategy

Laptop    python unicuco.py            (20 s; Algorithm 1 on a toy f2: front, StratNet, uniform;
                                         no curvature is known of a toy, so step 0 is left out)
"""

import contextlib
import json
import math
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from gp import MEANS, CurvatureMean, GaussianProcess, PriorOnly
from script import Refused, replacing

RATE = 4e-3  # of Adam, where StratNet starts from a table of curvature
MAX = 0.9  # no matrix loses more
IDEAL = -0.05  # z*, the same for both scaled objectives
AUGMENT = 0.02  # weight of the sum in the augmented Tchebycheff value
CLAMP = 12.0  # logits beyond this are saturated: a shift could not move them
# nats; y = log f2 is clipped: log 0 below, a model pruned to ruin above
KL_FLOOR, KL_CEILING = 1e-6, 1e2
ASKED = (0.15, 0.75)  # mean sparsities that requests come from
MOST_MEASURED = 1000  # strategies in a file: a GP of more would take minutes to fit again
INFORMED = (0.42, 0.78)  # where curvature alone is not enough
TABLE_STEPS = 800  # of training on curvature alone, in seconds
SERVED = (0.3, 0.4, 0.5, 0.6, 0.7)  # mean sparsities at which progress is read
LOOK_BACK = 3  # rounds whose gain says whether another is worth its evaluations


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
    """lo and hi of y = log f2, fixed so that requests and hypervolume keep their meaning: of the
    first design, or where curvature is known of its curves at 0.05 and 0.8. Measured damage may lie
    above hi; hypervolume then counts it as none.
    """

    lo: float
    hi: float

    @classmethod
    def of(cls, y):
        lowest, highest = float(min(y)), float(max(y))
        return cls(lowest, max(highest, lowest + 1e-3))

    def __call__(self, level, y):
        """Scaled objectives (B, 2) of mean sparsities `level` (B,) and y (B,)."""
        return torch.stack([(MAX - level) / MAX, (y - self.lo) / (self.hi - self.lo)], 1)


class Layout:
    """What a strategy's D numbers are: one sparsity for each of d blocks, or for each matrix of
    them.

    blocks    d;  sizes: None, or (m,) weights of the m matrices of a block: then D = m d, block by
              block
    share     (D,) of all block weights, sum 1;  features (D, d) or (D, d + m): x @ features is the
              mean sparsity of every block and of every kind of matrix, what the GP's kernel sees
    """

    def __init__(self, blocks, sizes=None):
        sizes = torch.ones(1) if sizes is None else torch.as_tensor(sizes)
        sizes = sizes.double() / sizes.sum()
        kinds = len(sizes)
        self.blocks, self.kinds = blocks, kinds
        self.share = (sizes / blocks).repeat(blocks)
        eye = torch.eye(blocks, dtype=torch.float64)
        of_block = torch.kron(eye, torch.ones(kinds, 1, dtype=torch.float64))
        of_kind = torch.eye(kinds, dtype=torch.float64).repeat(blocks, 1)
        self.members = torch.cat([of_block, of_kind], 1)  # (D, d + m), 1 where it belongs
        self.features = torch.cat([of_block * self.share[:, None] * blocks, of_kind / blocks], 1)
        if kinds == 1:
            self.members, self.features = of_block, None

    def level(self, strategies):
        """Mean sparsity of strategies (..., D): what f1 sees."""
        return strategies @ self.share

    def noise(self, count, generator, by):
        """Random moves (count, D): each block's matrices together by about `by`, each kind's by
        half.
        """
        size = self.members.shape[1]
        moves = by * torch.randn(count, size, generator=generator, dtype=torch.float64)
        moves[:, self.blocks :] *= 0.5
        return moves @ self.members.T


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


def stratified(count, generator):
    """Random numbers (count,), ascending: one in each of `count` equal parts of [0, 1)."""
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    return (torch.arange(count) + jitter) / count


def stratified_requests(count, generator):
    """The same distribution, (count, 2), with l1 stratified: a batch covers the whole front, and
    its mean gradient varies far less.
    """
    size = stratified(count, generator)
    return torch.stack([size, 1 - size], 1)


def first_design(count, blocks, generator):
    """Strategies (count, blocks) to measure first: a level stratified over [0.05, 0.8], blocks
    scattered around it by 0.12.

    Departs from the usual Latin hypercube, whose mean sparsity would sit at 0.45 +- 0.05 when there
    are 12 to 30 blocks.
    """
    level = stratified(count, generator)
    noise = torch.randn(count, blocks, generator=generator, dtype=torch.float64)
    return (0.05 + 0.75 * level[:, None] + 0.12 * noise).clamp(0, MAX)


# ----------------------------------------------------------------------------------- StratNet
class StratNet(nn.Module):
    """h_phi: requests (B, 2) -> strategies (B, D) in (0, MAX): two hidden layers of 256 for all
    requests together. float64.
    """

    def __init__(self, outputs, width=256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, outputs),
        )
        self.double()

    def logits(self, requests):
        return self.layers(requests.double())

    def forward(self, requests):
        return MAX * torch.sigmoid(self.logits(requests))


def train_stratnet(
    net, layout, gp, scale, steps, kappa, generator, requests_per_step=16, rate=RATE
):
    """Minimise the expected Tchebycheff value over requests, with f2 at its lower confidence bound
    mean - kappa std.

    The gradient reaches the strategies through the GP's closed form, then the network by
    backpropagation.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        requests = stratified_requests(requests_per_step, generator)
        strategies = net(requests)
        mean, std = gp.posterior(strategies)
        objectives = scale(layout.level(strategies), mean - kappa * std)
        loss = tchebycheff(objectives, requests).mean()
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


def candidate_strategies(net, layout, count, wanted, between, generator):
    """What StratNet answers to `count` random requests, of mean sparsity within `between`; if too
    few are, strategies scattered over all levels.
    """

    def within(strategies):
        level = layout.level(strategies)
        return strategies[(level >= between[0]) & (level <= between[1])]

    chosen = within(net(sample_requests(count, generator)))
    if len(chosen) < wanted:  # StratNet has collapsed: scatter around what is asked for
        levels = first_design(count, 1, generator).expand(-1, len(layout.share))
        chosen = within(scattered(levels, layout, generator))
    return chosen


@torch.no_grad()
def select_batch(
    net, layout, gp, scale, measured, count, kappa, generator, between=ASKED, candidates=1000
):
    """Strategies (count, D) to measure next: of those of random requests, the ones that greedily
    add most hypervolume (PSL).

    A pick counts with its lower confidence bound. Only strategies of mean sparsity within `between`
    may be picked: without that, half of the picks go where nobody asks (departs from PSL).
    measured  scaled objectives (n, 2) so far
    """
    strategies = candidate_strategies(net, layout, candidates, count, between, generator)
    mean, std = gp.posterior(strategies)
    objectives, picks = scale(layout.level(strategies), mean - kappa * std), []
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


def scattered(strategies, layout, generator, by=0.2):
    """Strategies (c, D), each block (and kind of matrix) moved at random by about `by` in its
    logits.

    Picks that all lie on StratNet's own curve would never teach the GP what is beside it (departs
    from PSL).
    """
    moved = to_logits(strategies) + layout.noise(len(strategies), generator, by)
    return MAX * torch.sigmoid(moved)


# -------------------------------------------------------------------------------- Algorithm 1
@dataclass
class SearchSettings:
    """How much Algorithm 1 measures and trains. Without a table of curvature, three times the steps
    are trained.

    rounds   at most;  flat: None, or fewer where three rounds have gained less, in nats of log KL
    kappa    of the lower confidence bound while searching
    """

    initial: int = 48
    rounds: int = 14
    batch: int = 4
    mean: str = "blocks"
    kappa: float = 0.5
    steps: int = 100
    final_steps: int = 500
    flat: float | None = None


@dataclass
class SearchResult:
    """log: [{"round", "strategy", "predicted", "measured"}], where predicted is exp of the GP's
    mean before measuring; progress: [(evaluations, `served` after training on them)].
    """

    net: StratNet
    layout: Layout
    scale: Scale
    gp: GaussianProcess
    log: list
    progress: list


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


def surrogate(layout, mean):
    """An unfitted GP for a layout's strategies; mean: the name of one, or a table's (t, q, r)."""
    mean = mean if isinstance(mean, str) else CurvatureMean(*mean)
    return GaussianProcess(mean, features=layout.features)


def trained_on_prior(layout, curves, steps, generator):
    """StratNet and Scale from the table of curvature alone, (t, q, r) (d, m) each: nothing is
    measured.
    """
    prior = PriorOnly(CurvatureMean(*curves))
    ends = torch.tensor([[0.05], [0.8]], dtype=torch.float64).expand(-1, len(layout.share))
    net, scale = StratNet(len(layout.share)), Scale.of(prior.posterior(ends)[0])
    with one_thread():
        train_stratnet(net, layout, prior, scale, steps, 0.0, generator)
    return net, scale


@torch.no_grad()
def informed_design(net, layout, count, generator):
    """Strategies (count, D) to measure first where curvature is known: StratNet's own, at levels
    stratified over INFORMED, scattered. Below, the table is right already; above 0.5 damage
    compounds.
    """
    answers = net(sample_requests(1000, generator))
    levels = INFORMED[0] + (INFORMED[1] - INFORMED[0]) * stratified(count, generator)
    nearest = (layout.level(answers) - levels[:, None]).abs().argmin(1)
    return scattered(answers[nearest], layout, generator, by=0.35)


def begin(layout, curves, s, generator):
    """StratNet, Scale (None where nothing is known yet) and the first design (initial, D)."""
    if curves is None:
        design = first_design(s.initial, len(layout.share), generator)
        return StratNet(len(layout.share)), None, design
    net, scale = trained_on_prior(layout, curves, s.final_steps, generator)
    return net, scale, informed_design(net, layout, s.initial, generator)


def served(net, layout):
    """StratNet's answers (5, D) at the mean sparsities SERVED."""

    def level(strategy):
        return float(layout.level(strategy))

    return torch.stack([strategy_for(net, sparsity, level) for sparsity in SERVED])


def is_flat(progress, gp, flat):
    """Whether the last rounds have gained less than `flat`: by how much log KL of StratNet's
    answers fell, the mean over SERVED, as the newest surrogate sees the old ones too.
    """
    if flat is None or len(progress) <= LOOK_BACK:
        return False
    before, now = (gp.posterior(progress[i][1])[0] for i in (-1 - LOOK_BACK, -1))
    return float((before - now).mean()) < flat


class Learner:
    """StratNet and its surrogate while they learn from a log of measurements.

    net, scale     StratNet; Scale, None until something is known
    design         strategies (initial, D) to measure first
    progress       [(evaluations, `served` after training on them)]
    """

    def __init__(self, layout, curves, settings, seed):
        self.layout, self.settings, self.progress = layout, settings, []
        self.mean, self.between = (settings.mean, ASKED) if curves is None else (curves, INFORMED)
        # a StratNet that starts from nothing saturates at low sparsities unless it learns slowly
        self.times, self.rate = (3, RATE / 4) if curves is None else (1, RATE)
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.net, self.scale, self.design = begin(layout, curves, settings, self.generator)

    def fit(self, log):
        """The Gaussian process of everything measured so far."""
        X, y = log_data(log)
        self.scale = self.scale or Scale.of(y)
        return surrogate(self.layout, self.mean).fit(X, y)

    def train(self, gp, steps, kappa):
        """More of StratNet's training, on mean - kappa std."""
        known = self.net, self.layout, gp, self.scale
        train_stratnet(*known, self.times * steps, kappa, self.generator, rate=self.rate)
        self.progress.append((len(gp.X), served(self.net, self.layout)))

    def pick(self, gp, log):
        """Strategies (batch, D) to measure next, and the KL that the surrogate predicts."""
        s, (X, y) = self.settings, log_data(log)
        known = self.net, self.layout, gp, self.scale, self.scale(self.layout.level(X), y)
        picks = select_batch(*known, s.batch, s.kappa, self.generator, self.between)
        picks = scattered(picks, self.layout, self.generator)
        return picks, gp.posterior(picks)[0].exp().tolist()


def search(measure, layout, settings=None, seed=0, curves=None, progress=None):
    """Algorithm 1 -> SearchResult; predictions of round 0 are None.

    measure   list of strategies (D,) -> list of f2, KL in nats per token; each call is a costly
              batch
    layout    Layout, or the number of blocks;  curves: None, or (t, q, r) of a table of curvature
    progress  called with log and scale after every round
    """
    s, log = settings or SearchSettings(), []
    layout = Layout(layout) if isinstance(layout, int) else layout
    # 0. what the dense model already knows trains StratNet before anything is measured (ours)
    learner = Learner(layout, curves, s, seed)
    # 1. measure a first design
    record(log, 0, learner.design, measure(list(learner.design)), [None] * s.initial)
    for round in range(1, s.rounds + 1):
        with one_thread():
            # 2. fit the Gaussian process to everything measured so far
            gp = learner.fit(log)
            # 3. update StratNet on its lower confidence bound
            learner.train(gp, s.steps, s.kappa)
            # 4. of random requests' strategies, pick those that add most hypervolume; scatter them
            picks, predicted = learner.pick(gp, log)
        # 5. prune, measure, remember
        record(log, round, picks, measure(list(picks)), predicted)
        if progress is not None:
            progress(log, learner.scale)
        # 6. stop paying where it is flat (ours)
        if is_flat(learner.progress, gp, s.flat):
            break
    # 7. fit once more, and train StratNet to the end on the mean alone
    with one_thread():
        gp = learner.fit(log)
        learner.train(gp, s.final_steps, 0.0)
    return SearchResult(learner.net, layout, learner.scale, gp, log, learner.progress)


# ------------------------------------------------------------------ from a sparsity to a strategy
@torch.no_grad()
def strategy_for(net, sparsity, counted_sparsity):
    """StratNet's strategy (D,) whose counted sparsity is that of uniform pruning at `sparsity`,
    within 1 / (d min d_in).

    l1 -> count of h(l) is close to monotone: bisect on l1, then shift all logits by one constant
    until the count fits. Where matrices tie, the last step of the count moves them one by one.
    counted_sparsity   strategy (D,) -> fraction of weights pruned, as Pruner.sparsity
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
        if counted_sparsity(net(request)[0]) < sparsity:
            low = middle
        else:
            high = middle
    logits = net.logits(request)[0].clamp(-CLAMP, CLAMP)
    return shift_to(logits, counted_sparsity(torch.full_like(logits, sparsity)), counted_sparsity)


def shift_to(logits, target, counted_sparsity):
    """The strategy MAX sigmoid(logits + shift) (D,) whose counted sparsity is `target`, to the
    nearest single step.
    """
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


def softened(strategy, contrast, counted_sparsity):
    """The strategy (D,) with the differences between its logits times `contrast`, at the same
    count to the nearest single step: 1 leaves it, 0 makes it uniform.
    """
    strategy = torch.as_tensor(strategy, dtype=torch.float64)
    return shift_to(contrast * to_logits(strategy), counted_sparsity(strategy), counted_sparsity)


# ------------------------------------------------------------------------------------- on disk
@dataclass
class Trained:
    """A StratNet and what it was trained on: measured strategies X (n, D), y (n,) = log f2, the
    table of curvature (3, d, m) = (t, q, r) or None, and settings.
    """

    net: StratNet
    layout: Layout
    scale: Scale
    X: torch.Tensor
    y: torch.Tensor
    curves: torch.Tensor | None
    about: dict

    def unmeasured(self, seed=0):
        """Trained on its table of curvature alone, as before anything was measured.

        This serves where survivors are refitted: what measuring teaches is how damage compounds
        from block to block, and a refit undoes just that (RESULTS.md).
        """
        return trained_on_table(self.layout, self.curves, seed)

    def gp(self):
        """The surrogate, fitted again; nothing measured: the table alone."""
        mean = self.about["mean"] if self.curves is None else self.curves
        if len(self.y) == 0:
            return PriorOnly(CurvatureMean(*mean))
        return surrogate(self.layout, mean).fit(self.X, self.y)


def trained_on_table(layout, curves, seed=0):
    """Trained on the table of curvature (3, d, m) alone, in seconds: nothing is measured. Its
    answers are within 0.2 to 1.1 % of direct optimisation of the same curves (RESULTS.md).
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net, scale = trained_on_prior(layout, curves, TABLE_STEPS, generator)
    nothing = torch.empty(0, len(layout.share), dtype=torch.float64)
    return Trained(net, layout, scale, nothing, nothing[:, 0], curves, {"mean": "curvature"})


def save_stratnet(path, trained):
    """`trained` in one safetensors file; its settings as JSON in the metadata."""
    layout = trained.layout
    tensors = dict(trained.net.state_dict()) | {"X": trained.X.double(), "y": trained.y.double()}
    tensors["sizes"] = layout.share[: layout.kinds]
    if trained.curves is not None:
        tensors["curves"] = torch.as_tensor(trained.curves)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    scale = {"lo": trained.scale.lo, "hi": trained.scale.hi}
    with replacing(path) as partial:
        save_file(tensors, partial, {"about": json.dumps(trained.about | scale)})


def read_stratnet(path):
    """Trained, of a file that anyone may have written; ValueError or whatever else when it does not
    fit together.
    """
    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
        about = json.loads(f.metadata()["about"])
    if not all(t.dtype == torch.float64 and t.isfinite().all() for t in tensors.values()):
        raise ValueError("a tensor is not float64, or not finite")
    if "sizes" not in tensors:
        raise ValueError("it was made by an earlier version: train it again")
    X, y, sizes = (tensors.pop(name) for name in ("X", "y", "sizes"))
    curves = tensors.pop("curves", None)
    outputs = len(tensors["layers.4.bias"])
    check_fit(X, y, sizes, curves, outputs)
    if about["mean"] not in (MEANS if curves is None else (*MEANS, "curvature")):
        raise ValueError("the mean of its surrogate is unknown")
    scale = Scale(float(about["lo"]), float(about["hi"]))
    if not -math.inf < scale.lo < scale.hi < math.inf:
        raise ValueError("its scale is none")
    with torch.device("meta"):  # nothing is allocated for what the file only claims
        net = StratNet(outputs)
    net.load_state_dict(tensors, assign=True)
    with torch.no_grad():
        if not net.logits(torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])).isfinite().all():
            raise ValueError("its network computes NaN or infinity")
    layout = Layout(outputs // len(sizes), sizes)
    return Trained(net.eval(), layout, scale, X, y, curves, about)


def check_fit(X, y, sizes, curves, outputs):
    """ValueError unless measured strategies, sizes and table belong to a StratNet of `outputs`."""
    kinds = len(sizes)
    shaped = X.shape == (*y.shape, outputs) and 0 < len(y) <= MOST_MEASURED
    if not (shaped and X.min() >= 0 and X.max() <= MAX):
        raise ValueError("its strategies and values do not fit together")
    if sizes.ndim != 1 or outputs > 10_000 or outputs % kinds or not sizes.min() > 0:
        raise ValueError("its sizes are not those of the matrices of a block")
    if curves is not None and curves.shape != (3, outputs // kinds, kinds):
        raise ValueError("its table of curvature has another shape")


def load_stratnet(path, blocks):
    """-> Trained. Refused, in one line, when the file is broken or made for another depth."""
    try:
        trained = read_stratnet(path)
    except Exception as error:  # a file that anyone may have written can be wrong in any way
        why = " ".join(str(error).split())[:200]
        raise Refused(f"{path} is no StratNet that can be read: {why}") from None
    depth = trained.layout.blocks
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
