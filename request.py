"""
Requests in the user's own terms: a sparsity, a preference, a largest KL or a largest file, and the
strategy that meets each.

Reading   beside prune.py, whose command line serves these; can be skipped at first.
Shapes    a strategy is (D,), the sparsity of each matrix, D = 7 d, or of each of d blocks.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch

from gp import GaussianProcess
from llama import dense_name, stored_dtypes, weight_files
from script import Refused, first_line
from unicuco import MAX, StratNet, log_divergence

KINDS = {
    "sparsity": ("S", f"fraction of the block weights that goes, 0 to {MAX}"),
    "preference": ("L1", "weight of size, l1, against fidelity"),
    "max_kl": ("KL", "most KL from the dense model, measured, in nats per token"),
    "max_size": ("SIZE", "most bytes of the packed weights, as 9MB"),
}
LARGEST = {"sparsity": MAX, "preference": 1, "max_kl": 1e9, "max_size": 1e15}
PREFIX = {"sparsity": "", "preference": "preference-", "max_kl": "kl-", "max_size": "size-"}
STEP = 0.005  # of sparsity: how near a wish for a KL is met
ENOUGH = 0.9  # of a budget with a confidence: what uses as much is not measured a step further
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


# ------------------------------------------------------------------------------------------ parsing
def parse_value(kind, text):
    """The number of a request, within its range; a size may have a unit, as 9MB."""
    unit = " *([kMG]?)B?" if kind == "max_size" else "()"
    match = re.fullmatch("([0-9.eE+-]+)" + unit, text)
    try:
        value = float(match[1]) * UNITS[match[2]]
    except (TypeError, ValueError):
        hint = ", as 9MB" if kind == "max_size" else ""
        raise Refused(f"{kind} {text[:40]!r} is not a number{hint}") from None
    if value < 0:
        raise Refused(f"{kind} {text[:40]} is negative")
    if not value <= LARGEST[kind]:
        raise Refused(f"{kind} {text[:40]} is outside 0 to {LARGEST[kind]:g}")
    return value


def parse_request(raw):
    """{"name", "kind", "value", "text"} from {one of KINDS: value, "name" optional}; Refused for
    anything else.
    """
    kinds = [k for k in KINDS if k in raw] if isinstance(raw, dict) else []
    if len(kinds) != 1 or set(raw) - {*KINDS, "name"}:
        raise Refused(
            f"a request is one of {', '.join(KINDS)}, with a name if you like, not"
            f" {json.dumps(raw)[:80]}"
        )
    kind = kinds[0]
    text = str(raw[kind])
    value = parse_value(kind, text)
    usual = text if kind == "max_size" else repr(value).removesuffix(".0")
    name = raw.get("name", PREFIX[kind] + usual)
    plain = isinstance(name, str) and re.fullmatch(r"[\w.+ -]{1,80}", name)
    if not plain or name.startswith("."):
        raise Refused(f"a request's name is a plain folder name, not {str(name)[:40]!r}")
    return {"name": name, "kind": kind, "value": value, "text": text}


def read_requests(path):
    """The requests of a jsonl file, one a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        return [parse_request(json.loads(line)) for line in lines if line.strip()]
    except OSError as error:
        raise Refused(f"requests {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"requests {path}: {first_line(error)}") from None


# ------------------------------------------------------------------------------- sizes and searches
def packed_bytes(pruner, source, strategy):
    """Size of the packed weights of a strategy, at most 1 % too high: masks, survivors, the rest of
    the source's files.
    """
    files = [tensor for tensors in weight_files(source).values() for tensor in tensors.items()]
    bytes_of = {name: dtype.itemsize for name, dtype in stored_dtypes(source).items()}
    matrices = [name for name in bytes_of if name.endswith("_proj.weight")]
    others = [(n, s) for n, (s, _) in files if not dense_name(n).endswith("_proj.weight")]
    rest = sum(math.prod(shape) * bytes_of[name] for name, shape in others)
    headers = 300 * len(files) + 4096
    kept = (pruner.d_in - pruner.dropped_per_row(strategy)) * pruner.d_out
    survivors = float(kept.sum()) * max(bytes_of[name] for name in matrices)
    masks = float(((pruner.d_in / 8).ceil() * pruner.d_out).sum()) * len(kept)
    return int(rest + headers + survivors + masks)


def largest(fits, low=0.0, high=MAX, steps=24):
    """The largest sparsity in [low, high] for which `fits` holds; it holds up to some point."""
    for _ in range(steps):
        middle = (low + high) / 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


# --------------------------------------------------------------------- from a request to a strategy
class Unreachable(Refused):
    """No strategy meets the request; the message names the nearest that can be met."""


@dataclass
class Surrogate:
    """What a request is answered from.

    curve       sparsity -> strategy (D,);  net: StratNet, or None for uniform;  gp: its surrogate,
                or None
    measure     strategy -> measured KL, or what KL on all such text stays below with probability
                `confidence`, if that is not None;  size: strategy -> packed bytes
    """

    curve: Callable
    net: StratNet | None
    gp: GaussianProcess | None
    measure: Callable
    size: Callable
    confidence: float | None = None

    def predicted(self, strategy, sure=0.5):
        """log KL of a strategy, by the posterior, or what it stays below with probability `sure`;
        without a GP, the usual slope and no doubt.
        """
        if self.gp is None:
            return 8 * float(strategy.mean())
        mean, std = map(float, self.gp.posterior(strategy[None]))
        return mean + NormalDist().inv_cdf(sure) * std

    def is_enough(self, kl, budget):
        """Whether a measured KL answers a wish for one: with a confidence a step more is not
        measured, where the budget is used well.
        """
        return self.confidence is not None and ENOUGH * budget <= kl <= budget


def strategy_of(request, surrogate):
    """The strategy (D,) that meets a request, or Unreachable."""
    answers = {"preference": by_preference, "max_size": by_size, "max_kl": by_divergence}
    if request["kind"] == "sparsity":
        return surrogate.curve(request["value"])
    return answers[request["kind"]](request, surrogate)


def by_preference(request, surrogate):
    l1 = request["value"]
    with torch.no_grad():
        return surrogate.net(torch.tensor([[l1, 1 - l1]]))[0]


def by_size(request, surrogate):
    """The least sparsity whose packed weights fit."""
    curve, size = surrogate.curve, surrogate.size
    if size(curve(MAX)) > request["value"]:
        raise Unreachable(
            f"{request['text']} is less than pruning reaches: sparsity {MAX} has"
            f" {size(curve(MAX))} bytes"
        )
    return curve(MAX - largest(lambda less: size(curve(MAX - less)) <= request["value"]))


def by_divergence(request, surrogate):
    """The largest sparsity whose measured KL is within the budget: STEP more was measured above it.

    The surrogate proposes and each measurement corrects its offset; where that has not halved what
    is open, the middle is measured. NaN is above every budget. With a confidence the posterior is
    trusted more: it proposes by what it is sure of, then aims at the middle of what is enough; two
    measurements are the rule, three of refitted models, which it has never seen.
    """
    value, low, high, slow = request["value"], 0.0, MAX + STEP, 0
    target = log_divergence(value)
    sure, aim, patience = 0.5, 0.0, 1
    if surrogate.confidence is not None:
        sure, aim, patience = surrogate.confidence, math.log((1 + ENOUGH) / 2), 2
    while high - low > 1.001 * STEP:
        s = min(max((low + high) / 2, STEP), MAX)
        if slow < patience:
            s = proposed(surrogate, target, sure, low, high)
        strategy, before = surrogate.curve(s), high - low
        kl = surrogate.measure(strategy)
        if surrogate.is_enough(kl, value):
            return strategy
        low, high = (s, high) if kl <= value else (low, s)
        wrong = log_divergence(kl) - surrogate.predicted(strategy)
        target, sure = log_divergence(value) + aim - wrong, 0.5
        slow = slow + 1 if slow < patience and high - low > before / 2 else 0
    if low == 0:
        raise Unreachable(
            f"KL {value:g} is below what pruning gives: sparsity {s:.4g} has {kl:.3g}"
        )
    return surrogate.curve(low)


def proposed(surrogate, target, sure, low, high):
    """Where the surrogate, as sure as that, crosses log KL `target`, a STEP inside of what is
    open.
    """
    s = largest(lambda s: surrogate.predicted(surrogate.curve(s), sure) <= target, low, MAX, 14)
    return min(max(s, low + STEP), max(high - STEP, low + STEP), MAX)
