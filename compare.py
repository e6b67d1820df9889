"""
The paper's comparison: many requests, served by UniCuCo or by searches that start anew for each.

Source    the comparison of UniCuCo (arXiv 2505.12216): 64 requests; methods as in baselines.py.
Reading   8 of 8. Before: baselines.py. Beside it: bench.py (speed), plot.py (figures).
Rows      one flat row for each seed, method, sparsity and text; every table is a group-by of them.

Laptop    python compare.py                 (3 minutes; ends with the speed at equal quality)
Full      python compare.py --model DIR --data c4.jsonl --test wiki.test.raw --budget 104 \\
              --seeds 3 --resume
"""

import argparse
import hashlib
import json
import math
import statistics
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from baselines import (
    Target,
    evopress,
    gp_search,
    groups_of,
    outlier_shares,
    owl_best,
    sparsegpt,
    uniform,
)
from curvature import cost_in_tokens
from eval import TASKS, all_prompts, cut, read_rows, standard_error, zero_shot
from prune import F2, Pruner, Setting, prepare, sources, tests
from refit import follow
from script import (
    Journal,
    Parser,
    Refused,
    add_model,
    add_texts,
    at_least,
    choose_device,
    choose_tokens,
    provenance,
    read_json,
    run,
    strict,
    write_text,
)
from train import first_tokens, prior_of
from unicuco import KL_CEILING, SearchSettings, cap_divergence, search, strategy_for

QUICK = (0.3, 0.4, 0.5, 0.6, 0.7)  # requests that a baseline is measured on, unless --full
ENDS = (0.2, 0.75)  # what costs no search is measured there too
HARD = (0.5, 0.6)  # requests whose strategies are read a whole text and asked zero-shot tasks
LONG = 65536  # tokens of that text that they are read for seeds after the first
PERPLEXITIES = (0.5, 0.6, 0.7)
METHODS = {
    "owl": "OWL, best of 12",
    "unicuco": "UniCuCo",
    "constant": "UniCuCo, constant mean",
    "gp": "GP per request",
    "evopress": "EvoPress",
    "matrices": "matrix EvoPress",
    "magnitude": "magnitude, uniform",
}
# what 64 requests cost no more searches than one
SHARED = ("uniform", METHODS["unicuco"], METHODS["constant"], METHODS["magnitude"])


# ------------------------------------------------------------------------------------- searching
class Counter(F2):
    """F2 that moves a progress bar. share: how many times fewer tokens than all search tokens."""

    def __init__(self, pruner, windows, bar, share=1):
        super().__init__(pruner, windows)
        self.bar = bar
        self.share = share

    def __call__(self, strategy):
        self.bar.update(1 / self.share)
        return super().__call__(strategy)


@dataclass
class Run:
    """One seed of a comparison: its model, ranks and texts, and where what it finds is kept.

    args          of the command line, with this seed
    f2, quick     the objective on all search tokens, and on about a quarter of them
    calibration   seconds of ranking and of the dense passes, which every method needs
    """

    args: argparse.Namespace
    journal: Journal
    setting: Setting
    pruner: Pruner
    f2: Counter
    quick: Counter
    calibration: float

    def target(self, sparsity):
        return Target(sparsity, len(self.pruner.live), self.pruner.sparsity)

    def matrix_target(self, sparsity):
        """The same, of strategies with a sparsity for every matrix, (7 d,)."""
        outputs = len(self.pruner.live) * len(self.pruner.d_in)
        return Target(sparsity, outputs, self.pruner.sparsity)

    def evaluations(self):
        """Of f2 so far, in units of all search tokens."""
        return (self.f2.tokens_spent + self.quick.tokens_spent) / self.f2.windows.numel()


def start(args, journal, device, dtype):
    """Load the model, rank it and record what it says while dense: a Run."""
    setting = prepare(args, device, dtype, args.tokens)
    few = setting.search[: max(1, len(setting.search) // 4)]
    bar = tqdm(
        total=total_evaluations(args),
        desc=f"seed {args.seed}, evaluations of f2",
        bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]",
        disable=None,
    )
    started = time.perf_counter()
    pruner = Pruner(setting.model, setting.calibration)
    f2 = Counter(pruner, setting.search, bar)
    quick = Counter(pruner, few, bar, setting.search.numel() / few.numel())
    seconds = journal(f"{args.seed} calibration", lambda: time.perf_counter() - started)
    return Run(args, journal, setting, pruner, f2, quick, seconds)


def total_evaluations(args):
    """Of f2, that the methods of a run will ask for."""
    costs = {"owl": 12, "gp": args.budget // 2, "evopress": args.budget}
    costs["matrices"] = args.budget
    each = sum(costs.get(name, 0) for name in args.methods)
    searches = len({"unicuco", "constant"} & set(args.methods))
    return each * len(args.served) + (args.initial + 4 * args.rounds) * searches


def timed(run, find, sparsity):
    """find(sparsity) -> strategy (d,): the strategy, its seconds with pruning, its evaluations."""
    started = time.perf_counter()
    before = run.evaluations()
    strategy = find(sparsity)
    run.pruner.apply(strategy)
    return {
        "strategy": strategy.tolist(),
        "seconds": time.perf_counter() - started,
        "evaluations": run.evaluations() - before,
    }


def answer(run, method, sparsity, found, shared=None):
    """What a method found for one request: the half of its rows that says how.

    found    as `timed` returns it;  shared: seconds and evaluations of a search for all requests
    """
    shared = shared or {"seconds": 0.0, "evaluations": 0.0}
    return {
        "seed": run.args.seed,
        "method": method,
        "sparsity": sparsity,
        "evaluations": found["evaluations"],
        "seconds": found["seconds"],
        "shared_evaluations": shared["evaluations"],
        "shared_seconds": run.calibration + shared["seconds"],
        "strategy": found["strategy"],
    }


def each(run, method, find, requests):
    """Answers of a method that starts anew for each request: find(sparsity) -> strategy."""
    answers = []
    for s in requests:
        found = run.journal(f"{run.args.seed} {method} {s}", partial(timed, run, find, s))
        answers.append(answer(run, method, s, found))
    return answers


def by_uniform(run, method):
    find = partial(uniform, len(run.pruner.live))
    return each(run, method, find, sorted({*run.args.served, *ENDS}))


def by_owl(run, method):
    run.pruner.restore()
    shares = outlier_shares(run.setting.model, run.setting.calibration)
    return each(run, method, lambda s: owl_best(shares, run.target(s), run.f2), run.args.served)


def by_gp(run, method):
    def find(s):
        return gp_search(run.f2, run.target(s), run.args.budget // 2, run.args.seed)

    return each(run, method, find, run.args.served)


def by_evopress(run, method, matrices=False):
    """One evolution for each request; its smaller budgets are snapshots, methods of their own."""
    whole = run.args.budget
    budgets = sorted({whole // 8, whole // 4, whole // 2, whole} - {0})
    found = {}
    for s in run.args.served:
        key = f"{run.args.seed} {method} {s}"
        found[s] = run.journal(key, partial(evolved, run, s, budgets, matrices))
    return [
        answer(run, f"{method}, {b} each", s, found[s][str(b)])
        for b in budgets
        for s in run.args.served
    ]


def evolved(run, sparsity, budgets, matrices):
    """{budget: as `timed`} of one evolution, over blocks or over matrices."""
    target, groups = run.target(sparsity), None
    if matrices:
        target = run.matrix_target(sparsity)
        groups = groups_of(run.pruner.d_in * run.pruner.d_out, len(run.pruner.live))
    found = evopress(
        run.f2,
        run.quick,
        target,
        budgets[-1],
        run.args.seed,
        snapshots=budgets,
        groups=groups,
    )
    return {
        str(b): {"strategy": x.tolist(), "seconds": seconds, "evaluations": float(b)}
        for b, (x, seconds) in found.items()
    }


def by_unicuco(run, method, mean):
    """Algorithm 1 once, then StratNet for every request."""
    args = run.args
    key = f"{args.seed} {method}, {args.initial} and {args.rounds} rounds"
    made = run.journal(key, partial(learned, run, mean))
    strategies = made["strategies"]
    return [answer(run, method, float(s), strategies[s], made) for s in strategies]


def learned(run, mean):
    """Seconds and evaluations of Algorithm 1, and {sparsity: as `timed`} of its StratNet."""
    started = time.perf_counter()
    before = run.evaluations()
    args, windows = run.args, run.setting.calibration
    settings = SearchSettings(initial=args.initial, rounds=args.rounds, mean=mean)
    granularity = "matrix" if mean == "curvature" else "block"
    layout, curves = prior_of(run.pruner, windows, mean, granularity, args.seed)
    read = 0 if curves is None else cost_in_tokens(windows) / run.f2.windows.numel()
    net = search(lambda batch: list(map(run.f2, batch)), layout, settings, args.seed, curves).net
    made = {
        "seconds": time.perf_counter() - started,
        "evaluations": run.evaluations() - before + read,
        "strategies": {},
    }
    for s in sorted({*run.args.served, *ENDS}):
        find = partial(strategy_for, net, counted_sparsity=run.pruner.sparsity)
        made["strategies"][str(s)] = timed(run, find, s)
    return made


SEARCHES = {
    "owl": by_owl,
    "unicuco": partial(by_unicuco, mean="curvature"),
    "constant": partial(by_unicuco, mean="constant"),
    "gp": by_gp,
    "evopress": by_evopress,
    "matrices": partial(by_evopress, matrices=True),
}


def find_all(run):
    """Answers of uniform and of the methods asked for, but magnitude: it searches nothing."""
    answers = by_uniform(run, "uniform")
    for name in run.args.methods:
        if name in SEARCHES:
            answers += SEARCHES[name](run, METHODS[name])
    run.f2.bar.close()
    return answers


# ------------------------------------------------------------------------------------- measuring
def strategy_id(strategy):
    """Eight letters for a strategy: what was measured is remembered for it alone."""
    return hashlib.sha256(repr(strategy).encode()).hexdigest()[:8]


def outcome(kl, ppl):
    """KL and perplexity as they are kept: those of a ruined model are 100 nats and exp(100)."""
    finite = math.isfinite(ppl)
    return {"kl": cap_divergence(kl), "ppl": ppl if finite else math.exp(KL_CEILING)}


@dataclass
class Reader:
    """KL and perplexity on windows (n, T); the dense model reads them only when it is needed."""

    pruner: Pruner
    windows: torch.Tensor

    @cached_property
    def f2(self):
        return F2(self.pruner, self.windows)

    def __call__(self, strategy):
        return {"counted": self.pruner.sparsity(strategy), **outcome(*self.f2.measure(strategy))}


def row(table, answer, text, more):
    """One flat row: what was found, on which text, and what was measured there."""
    head = {name: answer[name] for name in ("seed", "method", "sparsity")}
    return {"table": table, **head, "text": text, **more}


def read_all(run, answers, pruner, texts, table):
    """Rows of every answer on every one of `texts`, {name: windows (n, T)}."""
    rows = []
    readers = {text: Reader(pruner, windows) for text, windows in texts.items()}
    for a in tqdm(answers, desc=f"seed {run.args.seed}, unseen text, {table}", disable=None):
        for text, reader in readers.items():
            tokens = reader.windows.numel()
            key = f"{name_of(a)}, {table}: {tokens} tokens of {text}"
            found = run.journal(key, partial(reader, a["strategy"]))
            rows.append(row(table, a, text, {"tokens": tokens, **found, **a}))
    pruner.restore()
    return rows


def name_of(answer):
    """What a measurement of an answer is remembered under."""
    seed, method, sparsity = answer["seed"], answer["method"], answer["sparsity"]
    return f"{seed} {method} {sparsity} {strategy_id(answer['strategy'])}"


# ---------------------------------------------------------------------------------------- refitted
def refitted_all(run, answers, texts):
    """Rows of the last answers of every method at PERPLEXITIES, survivors refitted; and SparseGPT
    with Wanda's masks and with its own. All on the same calibration windows and texts.
    """
    run.pruner.restore()
    readers = {text: Reader(run.pruner, windows) for text, windows in texts.items()}
    for reader in readers.values():
        reader.f2  # the dense model reads now
    evolutions = {a["method"] for a in answers if a["method"].endswith(" each")}
    skipped = {m for m in evolutions if not m.endswith(f" {run.args.budget} each")}
    asked = [a for s in PERPLEXITIES for a in answers if a["sparsity"] == s]
    asked = [a for a in asked if a["method"] not in skipped]
    asked += [a | {"method": m} for a in asked if a["method"] == "uniform" for m in SPARSEGPT]
    rows = []
    for a in tqdm(asked, desc=f"seed {run.args.seed}, refitted", disable=None):
        found = run.journal(f"{name_of(a)}, refitted", partial(refitted, run, a, readers))
        rows += [row("refitted", a, text, more) for text, more in found.items()]
    run.pruner.restore()
    return rows


SPARSEGPT = ("SparseGPT, Wanda's masks", "SparseGPT, its masks")


def refitted(run, answer, readers):
    """{text: tokens, counted sparsity, KL and perplexity} of one answer after its refit."""
    pruner, windows = run.pruner, run.setting.calibration
    masks, started = pruner.masks(answer["strategy"]), time.perf_counter()
    if answer["method"] in SPARSEGPT:
        own = answer["method"] == SPARSEGPT[1]
        sparsegpt(pruner, windows, answer["sparsity"], None if own else masks)
    else:
        follow(pruner, masks, windows)
    seconds, counted = time.perf_counter() - started, pruner.zeros()
    return {
        text: {
            "tokens": reader.windows.numel(),
            "counted": counted,
            "refit_seconds": seconds,
            **outcome(*reader.f2.divergence.measure()),
        }
        for text, reader in readers.items()
    }


def hard(answers):
    """What is read long texts and asked tasks: the dense model, then the answers at HARD, but not
    those of EvoPress's smaller budgets and of the constant mean."""
    largest = {}
    for a in answers:
        if a["method"].endswith(" each"):  # smaller budgets come first
            largest[a["method"].split(",")[0]] = a["method"]
    evolutions = {a["method"] for a in answers if a["method"].endswith(" each")}
    skipped = {METHODS["constant"], *evolutions} - {*largest.values()}
    zeros = [0.0] * len(answers[0]["strategy"])
    costs = dict.fromkeys(("evaluations", "seconds", "shared_evaluations", "shared_seconds"), 0.0)
    dense = {"method": "dense", "sparsity": 0.0, **costs, "strategy": zeros}
    chosen = [a for s in HARD for a in answers if a["sparsity"] == s]
    return [answers[0] | dense] + [a for a in chosen if a["method"] not in skipped]


def long_text(run, tokens=None):
    """The first test text, its first `tokens` if given, in windows as long as the model takes, at
    most 2048: {name: windows}."""
    text, windows = next(iter(run.setting.held_out.items()))
    length = min(2048, run.setting.model.config.max_position_embeddings)
    return {text: cut(windows.flatten()[:tokens], length)}


def ask_all(run, answers):
    """Rows of every answer on every zero-shot task."""
    rows = []
    documents = {t: read_rows(run.args.tasks, t, run.args.limit) for t in TASKS}
    for a in tqdm(answers, desc="zero-shot tasks", disable=None):
        for task in TASKS:
            count = len(documents[task])
            key = f"{name_of(a)} on {count} documents of {task}"
            found = run.journal(key, partial(ask, run, a["strategy"], task, documents[task]))
            rows.append(row("tasks", a, task, {"documents": count, **found}))
    run.pruner.restore()
    return rows


def ask(run, strategy, task, documents):
    """Accuracies, and for each document whether the model was right: "0110..."."""
    run.pruner.apply(strategy)
    r = zero_shot(run.setting.model, run.setting.tokenizer, task, documents)
    right = "".join("01"[p == g] for p, g in zip(r["predictions"], r["gold"]))
    return {"acc": r["acc"], "acc_norm": r["acc_norm"], "right": right}


def one_seed(args, seed, journal, device, dtype):
    """All rows of one seed: search, then measure what was found."""
    first = seed == args.seed
    run = start(argparse.Namespace(**vars(args) | {"seed": seed}), journal, device, dtype)
    answers = find_all(run)
    rows = []
    if args.tasks:
        text = long_text(run, None if first else LONG)
        rows += read_all(run, hard(answers), run.pruner, text, "long")
        rows += ask_all(run, hard(answers)) if first else []
    texts = first_tokens(run.setting.held_out, args.test_tokens)
    rows += read_all(run, answers, run.pruner, texts, "requests")
    if args.refit:
        rows += refitted_all(run, answers, texts)
    if "magnitude" in args.methods:
        by_magnitude = Pruner(run.setting.model, run.setting.calibration, "magnitude")
        method = {"method": METHODS["magnitude"]}
        answers = [a | method for a in answers if a["method"] == "uniform"]
        rows += read_all(run, answers, by_magnitude, texts, "requests")
    return rows


# ---------------------------------------------------------------------------------------- tables
def grouped(rows, *keys):
    """{value of the keys: rows that have it}, in the order of the rows; several keys: a tuple."""
    groups = {}
    for r in rows:
        values = tuple(r[key] for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(r)
    return groups


def with_ratios(rows, table):
    """The rows of one table, pruned models alone, each with its KL over that of uniform in the
    same seed, on the same text, at the same sparsity."""
    rows = [r for r in rows if r["table"] == table and r["method"] != "dense"]
    same = ("seed", "text", "sparsity")
    base = {tuple(r[k] for k in same): r["kl"] for r in rows if r["method"] == "uniform"}
    return [r | {"ratio": r["kl"] / base[tuple(r[k] for k in same)]} for r in rows]


def spread(values):
    """Standard deviation over seeds; None of a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def extrapolates(served):
    """Without --full only QUICK is served, and what one request cost is multiplied."""
    return list(served) == list(QUICK)


def requests_table(rows, inputs):
    """A row for each method, over all seeds and texts: what `inputs["requests"]` requests cost,
    of which `inputs["served"]` were measured, and how good the answers are."""
    methods = grouped(with_ratios(rows, "requests"), "method")
    return [
        {"method": method, **costs(mine, inputs), **quality(mine, inputs["served"])}
        for method, mine in methods.items()
    ]


def costs(rows, inputs):
    """Evaluations, search tokens and seconds of one method for all requests."""
    rows = [r for r in rows if r["text"] == rows[0]["text"]]  # the same search for every text
    seeds = [of_seed[0] for of_seed in grouped(rows, "seed").values()]
    requests = inputs["requests"]
    evaluations = (
        statistics.mean(r["shared_evaluations"] for r in seeds)
        + statistics.mean(r["evaluations"] for r in rows) * requests
    )
    # when seconds are extrapolated, a search that other work disturbed must not be multiplied
    extrapolated = extrapolates(inputs["served"])
    typical = statistics.median if extrapolated else statistics.mean
    shared = typical(r["shared_seconds"] for r in seeds)
    each = typical(r["seconds"] for r in rows)
    return {
        "evaluations": evaluations,
        "tokens": round(evaluations * inputs["tokens"]),
        "seconds": shared + each * requests,
        "seconds_shared": shared,
        "seconds_per_request": each,
        "extrapolated": extrapolated and rows[0]["method"] not in SHARED,
    }


def quality(rows, served):
    """KL ratios to uniform and perplexities of one method, {text: ...} each.

    ratio, spread   mean and deviation over `each_seed`, the geometric means over `served`
    at, worst       {sparsity: geometric mean over seeds}; the largest single ratio
    perplexity      {sparsity: mean over seeds}
    """
    columns = ("ratio", "spread", "each_seed", "at", "worst", "perplexity")
    result = {column: {} for column in columns}
    for text, mine in grouped(rows, "text").items():
        asked = [r for r in mine if r["sparsity"] in served]
        each_seed = [geometric_mean(of_seed) for of_seed in grouped(asked, "seed").values()]
        by_sparsity = grouped(mine, "sparsity")
        values = (
            statistics.mean(each_seed),
            spread(each_seed),
            each_seed,
            {s: geometric_mean(group) for s, group in by_sparsity.items()},
            max(r["ratio"] for r in mine),
            {s: statistics.mean(r["ppl"] for r in by_sparsity[s]) for s in PERPLEXITIES},
        )
        for column, value in zip(columns, values):
            result[column][text] = value
    return result


def geometric_mean(rows):
    return statistics.geometric_mean(r["ratio"] for r in rows)


def long_table(rows):
    """A row for each method and sparsity: lists over seeds of "tokens", "kl", "ppl"; "ratio", KL
    over uniform's, its mean over seeds; "spread" and "each_seed" as in `requests_table`."""
    table = []
    for (method, s), mine in grouped(with_ratios(rows, "long"), "method", "sparsity").items():
        ratios = [r["ratio"] for r in mine]
        text = mine[0]["text"]
        lists = {key: [r[key] for r in mine] for key in ("tokens", "kl", "ppl")}
        table.append(
            {
                "method": method,
                "sparsity": s,
                "text": text,
                **lists,
                "ratio": statistics.mean(ratios),
                "spread": spread(ratios),
                "each_seed": {text: ratios},
            }
        )
    return table


def tasks_table(rows):
    """A row for each model, the dense one first: accuracies in percent, {task: acc}, "average",
    "lost": the dense model's average minus this one, "error": its standard error, paired by
    document; "documents" of each task."""
    models = grouped([r for r in rows if r["table"] == "tasks"], "method", "sparsity")
    right = {
        model: {r["text"]: np.array(list(r["right"]), int) for r in mine}
        for model, mine in models.items()
    }
    table = []
    for (method, s), mine in models.items():
        # by the same documents, of the dense model's
        lost = [right["dense", 0.0][t] - own for t, own in right[method, s].items()]
        errors = sum(standard_error(x) ** 2 for x in lost)
        table.append(
            {
                "method": method,
                "sparsity": s,
                "documents": {r["text"]: r["documents"] for r in mine},
                **{r["text"]: 100 * r["acc"] for r in mine},
                "average": 100 * statistics.mean(r["acc"] for r in mine),
                "lost": 100 * statistics.mean(float(x.mean()) for x in lost),
                "error": 100 * math.sqrt(errors) / len(lost),
            }
        )
    return table


def compared(ours, theirs):
    """One sentence: `ours` over `theirs`, rows of a table, paired by seed, geometric mean over the
    texts; within the spread of the seeds it is a tie."""
    texts = ours["each_seed"]
    by_seed = zip(*(np.divide(texts[t], theirs["each_seed"][t]) for t in texts))
    ratios = [statistics.geometric_mean(per_text) for per_text in by_seed]
    mean = statistics.mean(ratios)
    verdict = "one seed says nothing about its spread"
    if len(ratios) > 1:
        wide = statistics.stdev(ratios)
        word = "a tie" if abs(mean - 1) <= wide else "ahead" if mean < 1 else "behind"
        verdict = f"± {wide:.3f} over {len(ratios)} seeds: {word}"
    return f"{ours['method']}'s KL over that of {theirs['method']}: {mean:.3f}, {verdict}."


# -------------------------------------------------------------------------------------- printing
def show_requests(rows, inputs):
    """Print what the requests cost and how good the answers are, then what follows from it."""
    table = requests_table(rows, inputs)
    seeds = len(grouped(rows, "seed"))
    said = "All were served and measured, and 0.3 to 0.7 beside them."
    if extrapolates(inputs["served"]):
        said = (
            f"{len(inputs['served'])} sparsities were measured per method; (*) extrapolated:"
            f" seconds and evaluations per request, times {inputs['requests']}."
        )
    several = "s" if seeds > 1 else ""
    print(f"\n{inputs['requests']} requests from 0.2 to 0.75, {seeds} seed{several}. {said}")
    for text, mine in grouped([r for r in rows if r["table"] == "requests"], "text").items():
        show_text(table, text, mine[0]["tokens"], inputs["served"])
    ours = [r for r in table if r["method"] == METHODS["unicuco"]]
    theirs = [r for r in table if r["method"].startswith("EvoPress")]
    if ours and theirs:
        print("\n" + compared(ours[0], theirs[-1]))
        show_speed(ours[0], theirs, inputs["requests"])


def show_text(table, text, tokens, served):
    at = ", ".join(map(str, PERPLEXITIES))
    print(
        f"\n{text}, {tokens} tokens that no choice ever saw; KL as a ratio to uniform's at equal"
        f" counted sparsity, geometric mean over {served[0]:g} to {served[-1]:g}\n"
        f"{'method':<24} {'evaluations':>11} {'seconds':>10} {'shared':>8} {'each':>8}"
        f"   KL ratio  ± seeds   worst   perplexity at {at}"
    )
    for r in table:
        star = "*" if r["extrapolated"] else " "
        wide = "-" if r["spread"][text] is None else f"{r['spread'][text]:.3f}"
        print(
            f"{r['method']:<24} {r['evaluations']:>10.0f}{star} {r['seconds']:>9.1f}{star}"
            f" {r['seconds_shared']:8.1f} {r['seconds_per_request']:8.2f}"
            f"   {r['ratio'][text]:8.3f}  {wide:>7} {r['worst'][text]:7.3f}   "
            + "  ".join(f"{p:8.2f}" for p in r["perplexity"][text].values())
        )
    asked = sorted({s for r in table for s in r["at"][text]})
    if len(asked) <= len(QUICK) + len(ENDS):
        print("\nKL ratio to uniform at " + "".join(f"{s:8g}" for s in asked))
        for r in table[1:]:
            at = r["at"][text]
            cells = (f"{at[s]:8.3f}" if s in at else "       -" for s in asked)
            print(f"{r['method']:<23}" + "".join(cells))


def refitted_table(rows):
    """A row for each method and sparsity of the refitted models: KL over refitted uniform's and
    over uniform's without refit, lists over seeds and texts; perplexities.
    """
    same = ("seed", "text", "sparsity")
    bare = [r for r in rows if r["table"] == "requests" and r["method"] == "uniform"]
    bare = {tuple(r[k] for k in same): r["kl"] for r in bare}
    table = []
    for key, mine in grouped(with_ratios(rows, "refitted"), "method", "sparsity").items():
        below = [r["kl"] / bare[tuple(r[k] for k in same)] for r in mine]
        table.append(
            {
                "method": key[0],
                "sparsity": key[1],
                "ratio": [r["ratio"] for r in mine],
                "of_bare_uniform": below,
                "kl": [r["kl"] for r in mine],
                "ppl": [r["ppl"] for r in mine],
            }
        )
    return table


def show_refitted(rows):
    """Print what is left of every method's gain when all survivors are refitted."""
    print(
        "\nSurvivors refitted, all methods alike; KL over that of refitted uniform, and over that"
        f" of uniform as pruned\n{'method':<32} sparsity   refitted    as pruned   perplexity"
    )
    for r in refitted_table(rows):
        means = [statistics.mean(r[key]) for key in ("ratio", "of_bare_uniform", "ppl")]
        print(
            f"{r['method']:<32} {r['sparsity']:8.2f} {means[0]:10.3f} {means[1]:12.3f}"
            f" {means[2]:12.2f}"
        )


def show_speed(ours, theirs, requests):
    """Print how many times faster UniCuCo is than EvoPress at its budget, and at equal quality.

    theirs   rows of EvoPress, smallest budget first
    """
    best = theirs[-1]
    factor = best["seconds"] / ours["seconds"]
    print(
        f"UniCuCo serves {requests} requests {factor:.0f} times faster than {best['method']}"
        " (follows from the budgets)."
    )
    quality = statistics.geometric_mean(ours["ratio"].values())
    qualities = [statistics.geometric_mean(r["ratio"].values()) for r in theirs]
    for r, reached in zip(theirs, qualities):
        if reached <= quality:
            print(
                f"At equal quality, against {r['method']} (KL ratio {reached:.3f}, UniCuCo"
                f" {quality:.3f}): {r['seconds'] / ours['seconds']:.1f} times faster."
            )
            return
    print(
        f"At equal quality: no EvoPress budget up to {best['method'].split()[1]} reaches UniCuCo's"
        f" KL ratio of {quality:.3f} (its best: {min(qualities):.3f}), so more than {factor:.0f}"
        " times faster."
    )


def show_tasks(rows):
    """Print accuracies in percent, their average, and how far it lies below the dense model's,
    with a standard error; KL and perplexity of the same models beside them."""
    table = tasks_table(rows)
    long = grouped([r for r in rows if r["table"] == "long"], "method", "sparsity")
    first = long["dense", 0.0][0]
    documents = ", ".join(str(count) for count in table[0]["documents"].values())
    print(
        f"\n{first['text']}, {first['tokens']} tokens;"
        f" zero-shot accuracy in %, {documents} documents\n"
        f"{'method':<24} sparsity       KL  perplexity   "
        + "".join(f"{task:>14}" for task in TASKS)
        + "   average   below dense"
    )
    for r in table:
        read = long[r["method"], r["sparsity"]][0]
        print(
            f"{r['method']:<24} {r['sparsity']:8.2f} {read['kl']:8.4f} {read['ppl']:11.3f}   "
            + "".join(f"{r[task]:14.1f}" for task in TASKS)
            + f"{r['average']:10.1f}   {r['lost']:.1f} ± {r['error']:.1f}"
        )


def show_long(rows):
    """Print KL ratios to uniform over seeds, every seed's perplexity, and UniCuCo beside EvoPress
    at each sparsity."""
    table = long_table(rows)
    tokens = ", ".join(map(str, table[0]["tokens"]))
    print(
        f"\n{table[0]['text']}, {tokens} tokens of seeds {', '.join(seeds_of(rows))};"
        " KL as a ratio to uniform's\n"
        f"{'method':<24} sparsity  KL ratio  ± seeds   perplexity of each seed"
    )
    for r in table:
        wide = "-" if r["spread"] is None else f"{r['spread']:.3f}"
        perplexities = "  ".join(f"{x:8.2f}" for x in r["ppl"])
        print(
            f"{r['method']:<24} {r['sparsity']:8.2f}  {r['ratio']:8.3f}  {wide:>7}   {perplexities}"
        )
    for s, mine in grouped(table, "sparsity").items():
        ours = [r for r in mine if r["method"] == METHODS["unicuco"]]
        theirs = [r for r in mine if r["method"].startswith("EvoPress")]
        if ours and theirs:
            print(f"At {s}: {compared(ours[0], theirs[-1])}")


def seeds_of(rows):
    return [str(seed) for seed in grouped(rows, "seed")]


# --------------------------------------------------------------------------------- command line
def write_rows(path, inputs, rows):
    """{"inputs": {...}, "rows": [...]}, one row a line."""
    lines = ",\n".join(json.dumps(strict(r)) for r in rows)
    write_text(path, f'{{"inputs": {json.dumps(strict(inputs))},\n"rows": [\n{lines}\n]}}\n')


def read_comparison(path):
    """(inputs, rows) of a file of `write_rows`."""
    content = read_json(path)
    if not {"inputs", "rows"} <= content.keys():
        raise Refused(f"{path} holds no comparison: python compare.py writes one")
    return content["inputs"], content["rows"]


def requests_asked(count):
    """`count` sparsities from 0.2 to 0.75, and QUICK beside them."""
    steps = (round(0.2 + 0.55 * i / max(count - 1, 1), 4) for i in range(count))
    return sorted({*QUICK, *steps})


def arguments():
    parser = Parser(
        __doc__,
        [
            "python compare.py",
            "python compare.py --full",
            "python compare.py --model DIR --data c4.jsonl --test wiki.test.raw --budget 104",
        ],
    )
    add_model(parser)
    add_texts(parser)
    add_searches(parser)
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--requests", **number, default=64, help="how many are asked")
    parser.add_argument("--seeds", **number, default=1, help="how many seeds, from --seed on")
    full = "serve and measure every request, by every method"
    parser.add_argument("--full", action="store_true", help=full)
    refit = "also refit the survivors of every method's answers, and SparseGPT's update"
    parser.add_argument("--refit", action="store_true", help=refit)
    resume = "go on where the same comparison was stopped"
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--test-tokens", **number, default=8192, help="tokens of each unseen text")
    tasks = (
        "also, at 0.5 and 0.6: zero-shot tasks (see eval.py) and all of the first test text, for"
        " the first seed; 65536 tokens of it for the others"
    )
    parser.add_argument("--tasks", type=Path, metavar="DIR", help=tasks)
    parser.add_argument("--limit", **number, default=500, help="documents of each task")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/<model>")
    args = parser.parse_args()
    at_least(args, 1, "requests", "seeds", "tokens", "calibration", "test_tokens")
    at_least(args, 1, "initial", "rounds", "limit")
    at_least(args, 8, "budget")
    for task in TASKS if args.tasks else ():  # before hours of searching, not after
        all_prompts(task, read_rows(args.tasks, task, args.limit))
    args.served = requests_asked(args.requests) if args.full else list(QUICK)
    args.out = args.out or Path("out") / args.model.resolve().name
    return args


def add_searches(parser):
    number = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["owl", "unicuco", "gp", "evopress"],
        metavar="NAME",
        help="beside uniform: " + " ".join(METHODS),
    )
    budget = "evaluations that EvoPress may spend on each request"
    parser.add_argument("--budget", **number, default=20, help=budget)
    initial = "strategies that UniCuCo measures first"
    parser.add_argument("--initial", **number, default=40, help=initial)
    parser.add_argument("--rounds", **number, default=4, help="its rounds of 4 more")


def describe(args, device):
    """What a comparison depends on: resuming with anything else is refused."""
    return sources(args) | {
        "tests": tests(args),
        "served": args.served,
        "budget": args.budget,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def main():
    args = arguments()
    started = time.perf_counter()
    device, dtype, reason = choose_device(args.device, args.dtype)
    reason = choose_tokens(args, device, reason)
    args.dtype = str(dtype)[6:]
    inputs = describe(args, device)
    threads = inputs["threads"]
    print(f"{inputs['model']} on {device}, {args.dtype} ({reason}), {threads} threads")
    journal = Journal(args.out / "compare.journal.json", inputs, args.resume)
    asked = inputs | {"requests": args.requests, "provenance": provenance()}
    path = args.out / "compare.json"
    rows = []
    for seed in range(args.seed, args.seed + args.seeds):
        rows += one_seed(args, seed, journal, device, dtype)
        write_rows(path, asked, rows)
    show_requests(rows, asked)
    if args.refit:
        show_refitted(rows)
    if args.tasks:
        show_tasks(rows)
        show_long(rows)
    print(f"{time.perf_counter() - started:.0f} s; wrote {path}")


if __name__ == "__main__":
    run(main, ": what was found is kept, the same command with --resume goes on")
