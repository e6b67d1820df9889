"""
Algorithm 1 on a Llama, with resumed runs and many processes; then the table against uniform.

Source    UniCuCo (arXiv 2505.12216), on the batched loop of PSL-MOBO (arXiv 2210.08495).
Reading   8 of 9. Before: prune.py. Next: compare.py, or stop: this is the end of the core.
Shapes    n strategies measured, d blocks.

Laptop    python train.py                     (45 to 80 s; ends with where StratNet wins)
Full      torchrun --nproc-per-node=8 train.py --model ~/Llama-2-7b-hf --data c4.jsonl \\
              --test wiki.test.raw --tokens 16384
"""

import contextlib
import hashlib
import json
import math
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from curvature import damage_table, fit_curves
from eval import Divergence
from prune import F2, prepare, sources, tests
from ranks import METRICS, Pruner
from script import (
    Journal,
    Parser,
    Refused,
    add_model,
    add_texts,
    at_least,
    choose,
    join_processes,
    locked,
    meet,
    provenance,
    run,
    together,
    write_json,
    write_provenance,
)
from unicuco import (
    KL_FLOOR,
    MOST_MEASURED,
    SERVED,
    Layout,
    SearchSettings,
    Trained,
    hypervolume,
    log_data,
    save_stratnet,
    search,
    strategy_for,
)

SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
# rounds at most, and the nats of log KL that three of them must bring for another to be paid
ROUNDS, FLAT = 12, 0.02


# ----------------------------------------------------------------------------- f2 with a memory
def open_journals(folder, inputs, resume):
    """This process's journal, evaluations.<rank>.json, and all that an earlier run knew.

    inputs    what the values depend on: with `resume`, journals of other inputs are refused
    returns   Journal, {strategy as JSON: KL}; the second is empty unless resumed
    A resumed run may have more processes than the one that was stopped, or fewer.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    journal = Journal(folder / f"evaluations.{rank}.json", inputs, resume)
    known = {}
    for path in sorted(folder.glob("evaluations.*.json")) if resume else ():
        values = journal.read(path)
        try:
            # JSON has no NaN: it is stored as null
            known |= {x: math.nan if kl is None else float(kl) for x, kl in values.items()}
        except (TypeError, ValueError, OverflowError):
            raise Refused(f"{path} holds no evaluations to resume from: remove it") from None
    return journal, known


class Measure:
    """f2 with a memory on disk: written the moment it is measured, and never measured twice.

    Resuming replays the search from its seed: whatever is known comes from the journals, so the
    run ends as if undisturbed. Under torchrun, rank r measures every world-th strategy of a batch;
    all ranks get all values, each keeps its own journal.

    f2               strategy (D,) -> KL, costly;  layout: of the strategies
    journal, known   from `open_journals`
    bar              a tqdm to move
    seconds, reused  spent in f2 by this process; how many of its strategies were known
    """

    def __init__(self, f2, layout, journal, known, bar=None):
        started = dist.is_initialized()
        self.rank = dist.get_rank() if started else 0
        self.world = dist.get_world_size() if started else 1
        self.f2 = f2
        self.layout = layout
        self.journal = journal
        self.known = known
        self.bar = tqdm(disable=True) if bar is None else bar
        self.seconds = 0.0
        self.reused = 0

    def __call__(self, strategies):
        """KL of each strategy of one batch: a list of floats."""
        if self.world > 1:  # every rank searches alike; should processors disagree, rank 0 is right
            agreed = torch.stack(list(strategies))
            together(dist.broadcast, agreed, 0)
            strategies = list(agreed)
        values = torch.zeros(len(strategies), dtype=torch.float64)
        for i in range(self.rank, len(strategies), self.world):
            values[i] = self.one(strategies[i])
            self.bar.update(min(self.world, len(strategies) - i))
        return self.of_all_ranks(values).tolist()

    def one(self, strategy):
        key = json.dumps(strategy.tolist())  # every digit: read back bit for bit
        if key in self.known:
            self.reused += 1
        else:
            started = time.perf_counter()
            self.known[key] = self.f2(strategy)
            self.seconds += time.perf_counter() - started
            self.journal.remember(key, self.known[key])
        return self.known[key]

    def of_all_ranks(self, values):
        """Values (B,), of which each rank has measured its own, complete on every rank."""
        if self.world > 1:
            together(dist.all_reduce, values)
        return values

    def hypervolume(self, log, scale):
        X, y = log_data(log)
        return hypervolume(scale(self.layout.level(X), y))

    def show(self, log, scale):
        """Put the newest measurements beside the bar: `search` calls this after each round."""
        last = log[-1]
        if last["predicted"] is not None:
            self.bar.set_postfix(
                hypervolume=f"{self.hypervolume(log, scale):.4f}",
                predicted=f"{last['predicted']:.3f}",
                measured=f"{last['measured']:.3f}",
                refresh=False,
            )


# ------------------------------------------------------------------------------------- the table
def first_tokens(held_out, tokens):
    """{text: windows (n, T)}, each cut to its first `tokens` tokens, a window at least."""
    return {name: w[: max(1, tokens // w.shape[1])] for name, w in held_out.items()}


def table(net, pruner, texts, sparsities=SPARSITIES):
    """Uniform and StratNet at equal counted sparsity on every test text: rows of results.json.

    texts   {name: windows (n, T)}; the model of `pruner` is left dense
    """
    rows = []
    pruner.restore()
    references = {name: Divergence(pruner.model, windows) for name, windows in texts.items()}
    for sparsity in tqdm(sparsities, desc="table", disable=None):
        for method in ("uniform", "unicuco"):
            started = time.perf_counter()
            strategy = torch.full((len(pruner.live),), sparsity, dtype=torch.float64)
            if method == "unicuco":
                strategy = strategy_for(net, sparsity, pruner.sparsity)
            pruner.apply(strategy)
            row = {
                "method": method,
                "sparsity": sparsity,
                "counted": pruner.sparsity(strategy),
                "seconds": round(time.perf_counter() - started, 4),
            }
            rows += [row | measured(name, d) for name, d in references.items()]
        pruner.restore()
    return rows


def measured(text, divergence):
    """The rest of a row: the model as it is now, on one text."""
    kl, ppl = divergence.measure()
    return {"kl": kl, "ppl": ppl, "test": text, "tokens": divergence.windows.numel()}


HEAD = (
    "sparsity   counted: uniform  StratNet   KL: uniform  StratNet  ratio"
    "   perplexity: uniform  StratNet"
)


def show(rows):
    """Print the table of each text, then where StratNet wins and where it does not."""
    for text in dict.fromkeys(r["test"] for r in rows):
        mine = [r for r in rows if r["test"] == text]
        print(
            f"\n{text}, {mine[0]['tokens']} tokens that neither calibration nor search saw\n{HEAD}"
        )
        uniform, learned = ([r for r in mine if r["method"] == m] for m in ("uniform", "unicuco"))
        wins, losses = [], []
        for u, s in zip(uniform, learned):
            ratio = max(s["kl"], 1e-12) / max(u["kl"], 1e-12)  # 0 against 0 is no win
            change = f"{u['sparsity']:g} ({100 * (ratio - 1):+.1f} %)"
            (wins if ratio < 1 else losses).append(change)
            print(
                f"{u['sparsity']:8.2f}   {u['counted']:16.4f} {s['counted']:9.4f}"
                f"   {u['kl']:11.4f} {s['kl']:9.4f}  {ratio:5.3f}"
                f"   {u['ppl']:19.3f} {s['ppl']:9.3f}"
            )
        but = "; not at " + ", ".join(losses) if losses else ""
        print(f"StratNet's KL is below uniform's at {', '.join(wins) or 'no sparsity'}{but}.")


def show_progress(result):
    """Print KL against evaluations: what StratNet answered after each round, as the last surrogate
    sees it, geometric mean over SERVED. Where it is flat the search has stopped paying.
    """
    points = []
    for evaluations, strategies in result.progress:
        log_kl = result.gp.posterior(strategies)[0].mean()
        points.append(f"{evaluations} {float(log_kl.exp()):.4f}")
    asked = f"{SERVED[0]:g} to {SERVED[-1]:g}"
    print(f"evaluations and KL of StratNet's answers, mean of {asked}: {', '.join(points)}")


def show_predictions(log):
    """Print how well the last round's measurements were predicted."""
    last = [e for e in log if e["round"] == log[-1]["round"] and e["predicted"]]
    if last:
        pairs = ", ".join(f"{e['predicted']:.3f} {e['measured']:.3f}" for e in last)
        gaps = (abs(e["predicted"] / max(e["measured"], KL_FLOOR) - 1) for e in last)
        gap = 100 * statistics.median(gaps)
        print(f"last round, predicted and measured KL: {pairs}; median gap {gap:.1f} %")


# ---------------------------------------------------------------------------------- command line
def fingerprint(args):
    """What a search depends on: resuming with anything else is refused."""
    own = ("seed", "initial", "rounds", "batch", "mean", "granularity", "metric")
    return sources(args) | {name: getattr(args, name) for name in own}


def from_the_first(first, make):
    """What `make` returns in the first process, in all processes: none of the others calls it."""
    if not dist.is_initialized():
        return make()
    made = [make() if first else None]
    together(dist.broadcast_object_list, made, 0)
    return made[0]


RESULTS = ("results.json", "results.provenance.json")
MADE = ("evaluations.*.json", "stratnet.safetensors", "measured.json", *RESULTS)


def clear(out, first, resume):
    """Remove what an earlier run made, unless it is resumed, before anybody measures; and what a
    killed run left half written.
    """
    if first:
        for pattern in (".*.partial*", *(() if resume else MADE)):
            for path in filter(Path.is_file, out.glob(pattern)):
                path.unlink()
    meet()


def save_search(out, result, curves, about):
    """measured.json, the log of the search; stratnet.safetensors, StratNet with its data."""
    write_json(out / "measured.json", result.log, rows=True)
    X, y = log_data(result.log)
    trained = Trained(result.net, result.layout, result.scale, X, y, curves, about)
    save_stratnet(out / "stratnet.safetensors", trained)


def prior_of(pruner, windows, mean, granularity, seed):
    """Layout of strategies by --granularity; the table of curvature, (3, d, m), if --mean asks for
    it.

    For whole blocks, a block's curve is fitted to the sum of its matrices' damages.
    """
    sizes = pruner.d_in * pruner.d_out if granularity == "matrix" else None
    layout = Layout(len(pruner.live), sizes)
    if mean != "curvature":
        return layout, None
    table = damage_table(pruner, windows, seed=seed)
    if granularity == "block":
        table = table.sum(1, keepdim=True)
    return layout, torch.stack(fit_curves(table))


def add_search(parser):
    number, flag = {"type": int, "metavar": "N"}, {"action": "store_true"}
    means = {"choices": ["curvature", "blocks", "constant"], "default": "curvature"}
    grain = {"choices": ["matrix", "block"], "default": "matrix"}
    parser.add_argument("--initial", **number, default=40, help="strategies measured first")
    rounds = "rounds of picking and measuring, at most: fewer where KL no longer falls"
    parser.add_argument("--rounds", **number, default=ROUNDS, help=rounds)
    parser.add_argument("--batch", **number, default=4, help="strategies measured in each round")
    parser.add_argument("--mean", **means, help="the GP's prior mean")
    parser.add_argument("--granularity", **grain, help="what has a sparsity of its own")
    parser.add_argument("--metric", choices=METRICS, default="wanda", help="pruning score")
    parser.add_argument("--test-tokens", **number, default=16384, help="tokens of each test text")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/<model>")
    parser.add_argument("--offload", **flag, help="keep the blocks in host memory, two on the GPU")
    parser.add_argument("--resume", **flag, help="go on where a run of the same settings stopped")
    parser.add_argument("--force", **flag, help="begin anew: what --out has measured is lost")


def arguments():
    examples = [
        "python train.py",
        "python train.py --model DIR --data c4.jsonl --test wiki.test.raw --seed 1",
        "python train.py --resume",
        "torchrun --nproc-per-node=2 train.py --device cpu",
    ]
    parser = Parser(__doc__, examples)
    add_model(parser)
    add_texts(parser)
    add_search(parser)
    args = parser.parse_args()
    at_least(args, 1, "initial", "batch", "tokens", "calibration", "test_tokens")
    at_least(args, 0, "rounds")
    if args.initial + args.rounds * args.batch > MOST_MEASURED:
        raise Refused(f"--initial and --rounds of --batch: {MOST_MEASURED} strategies at most")
    args.out = args.out or Path("out") / args.model.resolve().name
    earlier = [*args.out.glob("evaluations.*.json"), *args.out.glob("stratnet.safetensors")]
    if earlier and not (args.resume or args.force):
        raise Refused(f"{args.out} holds a run: --resume goes on with it, --force begins anew")
    return args


def digest_of(*windows):
    """Digest of token ids (n, T): what a run is chosen on, whatever its text is called."""
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(repr(tuple(ids.shape)).encode())
        digest.update(ids.cpu().long().numpy().tobytes())
    return digest.hexdigest()


class Run:
    """One run of train.py: this process's device, whether it prints and writes, and its clock."""

    def __init__(self, args):
        self.args, self.started, self.made = args, time.perf_counter(), provenance()
        self.device, self.dtype, self.reason = choose(args)
        self.first = join_processes()
        self.setting = prepare(args, self.device, self.dtype, args.tokens)
        chosen_on = self.setting.calibration, self.setting.search
        own = from_the_first(self.first, lambda: fingerprint(args))
        self.inputs = own | {"device": self.device.type, "windows": digest_of(*chosen_on)}

    def seconds(self):
        return time.perf_counter() - self.started

    def alone(self):
        """While this runs, no other train.py writes into the same folder."""
        if not self.first:
            return contextlib.nullcontext()
        out = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        return locked(out, f"another train.py is running in {out}: choose another --out")

    def greet(self):
        setting = self.setting
        print(
            f"{self.inputs['model']} on {self.device}, {self.args.dtype} ({self.reason});"
            f" Python {platform.python_version()}, torch {torch.__version__},"
            f" {torch.get_num_threads()} threads; calibration {setting.calibration.numel()} tokens,"
            f" f2 {setting.search.numel()} tokens"
        )

    def search(self, journals):
        """Ranks, curvature, Algorithm 1: the Pruner, its result, the table, seconds inside f2."""
        args, setting = self.args, self.setting
        pruner = Pruner(setting.model, setting.calibration, args.metric)
        how = args.mean, args.granularity, args.seed
        layout, curves = prior_of(pruner, setting.calibration, *how)
        settings = SearchSettings(args.initial, args.rounds, args.batch, args.mean, flat=FLAT)
        total = args.initial + args.rounds * args.batch
        hidden = None if self.first else True
        with tqdm(total=total, desc="evaluations of f2", disable=hidden) as bar:
            measure = Measure(F2(pruner, setting.search), layout, *journals, bar)
            result = search(measure, layout, settings, args.seed, curves, measure.show)
            bar.total = bar.n  # of those at most
        if args.resume and self.first:
            print(f"{measure.reused} of this process's strategies had been measured before")
        return pruner, result, curves, measure.seconds

    def report(self, result, rows, searched, inside):
        evaluations = len(result.log)
        print(
            f"\n{evaluations} evaluations of f2 in {inside:.1f} s,"
            f" {100 * inside / searched:.0f} % of the {searched:.1f} s before the table;"
            f" {self.seconds():.1f} s in all; wrote {self.args.out}"
        )
        show_progress(result)
        show_predictions(result.log)
        if self.args.mean == "curvature":
            print(
                "prune.py --no-refit asks this StratNet; where it refits, which is its default, the"
                " one of the prior alone"
            )
        show(rows)


def main():
    this = Run(arguments())
    args = this.args
    with this.alone():
        search_and_report(this, args)


def search_and_report(this, args):
    clear(args.out, this.first, args.resume)
    journals = open_journals(args.out, this.inputs, args.resume)
    if this.first:
        this.greet()
    pruner, result, curves, inside = this.search(journals)
    if dist.is_initialized():
        dist.destroy_process_group()
    if not this.first:
        return  # one process measures the table and writes the files
    searched = this.seconds()
    about = this.inputs | {"evaluations": len(result.log)}
    save_search(args.out, result, curves, about)
    texts = first_tokens(this.setting.held_out, args.test_tokens)
    rows = table(result.net, pruner, texts)
    inputs = this.inputs | {"tests": tests(args), "device": str(this.device)}
    write_provenance(args.out / "results.json", this.made | {"inputs": inputs})
    write_json(args.out / "results.json", rows, rows=True)
    this.report(result, rows, searched, inside)


if __name__ == "__main__":
    run(main, ": what was measured is kept, the same command with --resume goes on")
