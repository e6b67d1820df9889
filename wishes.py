"""
Requests in the user's own terms: a sparsity, a preference, a largest KL or a largest file, and the strategy that meets each.

Reading   beside unicuco.py. Before: unicuco.py. Next: prune.py, whose command line serves these.
Shapes    a strategy is (d,), the sparsity of each block.
"""
import json
import math
import re
from pathlib import Path

import torch

from llama import first_line, weight_files
from unicuco import MAX, log_divergence

KINDS = {"sparsity": ("S", f"fraction of the block weights that goes, 0 to {MAX}"), "preference": ("L1", "weight of size, l1, against fidelity"),
         "max_kl": ("KL", "most KL from the dense model, measured, in nats per token"), "max_size": ("SIZE", "most bytes of the packed weights, as 9MB")}


def parse_request(raw, name=None):
    """{"name", "kind", "value", "text"} from {one of KINDS: value, "name" optional}; ValueError for anything else."""
    kinds = [k for k in KINDS if k in raw] if isinstance(raw, dict) else []
    if len(kinds) != 1 or set(raw) - {*KINDS, "name"}:
        raise ValueError(f"a request is one of {', '.join(KINDS)}, with a name if you like, not {json.dumps(raw)[:80]}")
    kind, text = kinds[0], str(raw[kinds[0]])
    match = re.fullmatch(r"([0-9.eE+-]+) *([kMG]?)B?", text) if kind == "max_size" else re.fullmatch(r"([0-9.eE+-]+)()", text)
    try:
        value = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]]
    except (TypeError, ValueError):
        raise ValueError(f"{kind} {text[:40]!r} is not a number{', as 9MB' if kind == 'max_size' else ''}") from None
    if not 0 <= value <= {"sparsity": MAX, "preference": 1, "max_kl": 1e9, "max_size": 1e15}[kind]:
        raise ValueError(f"{kind} {text[:40]} is outside 0 to {MAX if kind == 'sparsity' else 1}" if value >= 0 else f"{kind} {text[:40]} is negative")
    prefix = {"sparsity": "", "preference": "preference-", "max_kl": "kl-", "max_size": "size-"}[kind]
    name = raw.get("name", prefix + (f"{value:g}" if kind != "max_size" else text))
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+ -]{1,80}", name) or name.startswith("."):
        raise ValueError(f"a request's name is a plain folder name, not {str(name)[:40]!r}")
    return {"name": name, "kind": kind, "value": value, "text": text}


def read_requests(path):
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [parse_request(json.loads(line)) for line in lines if line.strip()]
    except OSError as error:
        raise ValueError(f"requests {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"requests {path}: {first_line(error)}") from None


class Unreachable(ValueError):
    """No strategy meets the request; the message names the nearest that can be met."""


def packed_bytes(pruner, source, strategy):
    """Size of the packed weights of a strategy, at most 1 % too high: masks, survivors, the rest of the source's files."""
    files = [tensor for tensors in weight_files(source).values() for tensor in tensors.items()]
    bytes_of = {name: {"F32": 4}.get(dtype, 2) for name, (_, dtype) in files}
    rest = sum(math.prod(shape) * bytes_of[name] for name, (shape, _) in files if not name.endswith("_proj.weight")) + 300 * len(files) + 4096
    kept = (pruner.d_in - pruner.counts(strategy)) * pruner.d_out
    itemsize = max(b for name, b in bytes_of.items() if name.endswith("_proj.weight"))
    return int(rest + float(kept.sum()) * itemsize + float(((pruner.d_in / 8).ceil() * pruner.d_out).sum()) * len(kept))


def largest(fits, low=0.0, high=MAX, steps=24):
    """The largest sparsity in [low, high] for which `fits` holds, when it holds up to some point."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def strategy_of(request, curve, net, predicted, measure, size):
    """The strategy (d,) that meets a request, or Unreachable.

    curve      sparsity -> strategy;  net: StratNet, or None for uniform;  size: strategy -> packed bytes
    predicted  strategy -> the surrogate's log KL;  measure: strategy -> measured KL
    """
    value = request["value"]
    if request["kind"] == "sparsity":
        return curve(value)
    if request["kind"] == "preference":
        if net is None:
            raise ValueError("a preference needs StratNet: it cannot be asked with --uniform")
        with torch.no_grad():
            return net(torch.tensor([[value, 1 - value]]))[0]
    if request["kind"] == "max_size":
        if size(curve(MAX)) > value:
            raise Unreachable(f"{request['text']} is less than pruning reaches: sparsity {MAX} has {size(curve(MAX))} bytes")
        return curve(MAX - largest(lambda less: size(curve(MAX - less)) <= value))
    # the surrogate proposes; each measurement corrects its offset, and the largest sparsity that measured below is kept
    best, offset = None, 0.0
    if not measure(curve(0.01)) <= value:                  # NaN included
        raise Unreachable(f"KL {value:g} is below what pruning gives: sparsity 0.01 has {measure(curve(0.01)):.3g}")
    for margin in (0.0, 0.01, 0.02, 0.04, 0.08, 0.16):
        x = curve(largest(lambda s: predicted(curve(s)) + offset <= math.log(max(value, 1e-9)) - margin, 0.01, MAX, 14))
        kl = measure(x)
        if kl <= value and (best is None or float(x.mean()) > float(best.mean())):
            best = x
            if kl >= 0.97 * value or float(x.mean()) > MAX - 1e-3:
                break
        offset = log_divergence(kl) - predicted(x)
    return best if best is not None else curve(0.01)
