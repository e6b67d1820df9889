"""
The paper's comparison: many requests, served by UniCuCo or by searches that start anew for each.

Source    the comparison of UniCuCo (arXiv 2505.12216): 64 requests; methods as in baselines.py.
Reading   9 of 9. Before: baselines.py. Beside it: report.py (its tables), bench.py (speed), plot.py
          (figures).
Rows      one flat row for each seed, method, sparsity and text; every table of report.py is a
          group-by of them.

Laptop    python compare.py                 (3 minutes; ends with the speed at equal quality)
Full      python compare.py --model DIR --data c4.jsonl --test wiki.test.raw --budget 104 \\
              --seeds 3 --resume
"""

import argparse
import contextlib
import hashlib
import math
import statistics
import time
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from tqdm import tqdm

from baselines import (
    LEVELS,
    GlobalThreshold,
    Target,
    damages_alone,
    dlp,
    dynamic_program,
    evopress,
    gp_search,
    median_scores,
    outlier_shares,
    owl_best,
    sparsegpt,
    uniform,
)
from curvature import cost_in_tokens, gradient_norms
from eval import TASKS, all_prompts, cut, read_rows, zero_shot
from model import LINEARS
from prune import F2, Setting, prepare, sources, stratnet_from_curvature, tests
from ranks import Masks, Pruner
from refit import CONTRAST, TEMPER, follow, row_counts
from report import (
    ENDS,
    METHODS,
    QUICK,
    family,
    perplexities,
    read_comparison,
    requests_asked,
    show_long,
    show_refitted,
    show_requests,
    show_tasks,
    write_rows,
)
from script import (
    Journal,
    Parser,
    Refused,
    add_model,
    add_texts,
    at_least,
    choose,
    locked,
    peak_memory,
    provenance,
    run,
)
from train import FLAT, ROUNDS, digest_of, first_tokens, prior_of
from unicuco import (
    KL_CEILING,
    KL_FLOOR,
    MAX,
    SearchSettings,
    cap_divergence,
    search,
    softened,
    strategy_for,
    trained_on_table,
)

SURVIVORS = (4, 2)  # of EvoPress's children, after a quarter and after a half of the tokens
MATRIX_STEP = 0.2  # of EvoPress over matrices, best of 0.05, 0.1 and 0.2 (RESULTS.md)
LEAST = 9  # evaluations of EvoPress: uniform pruning and one generation
JOURNAL = "compare.journal.json"  # in --out
HARD = (0.5, 0.6)  # requests whose strategies are read a longer text and asked zero-shot tasks
COSTS = ("evaluations", "seconds", "shared_evaluations", "shared_seconds")
# how a row came to be; unmeasured: of UniCuCo, the strategy before it measured, for a refit
ANSWER = ("seed", "method", "sparsity", *COSTS, "strategy", "unmeasured")
SURE = 0.95  # probability of what is said of text that no search saw
LONG = 65536  # tokens of that text, at most


# ------------------------------------------------------------------------------------- searching
class Counter(F2):
    """F2 that moves a progress bar.

    share           how many times fewer tokens than all search tokens
    factors         of each strategy measured, how many times its KL it has at most on all such
                    text, with probability SURE; fewer than three windows do not say
    """

    def __init__(self, pruner, windows, bar, share=1):
        super().__init__(pruner, windows)
        self.bar = bar
        self.share = share
        self.factors = []

    def __call__(self, strategy):
        self.bar.update(1 / self.share)
        kl = super().__call__(strategy)
        if len(self.windows) >= 3:
            self.factors.append(self.divergence.at_most(SURE) / max(kl, KL_FLOOR))
        return kl


@dataclass
class Run:
    """One seed of a comparison: its model, ranks and texts, and where what it finds is kept.

    args          of the command line, with this seed
    f2, quick     the objective on all search tokens; [on about a quarter, on half of them]
    calibration   seconds of ranking and of the dense passes, which every method needs
    """

    args: argparse.Namespace
    journal: Journal
    setting: Setting
    pruner: Pruner
    f2: Counter
    quick: list[Counter]
    calibration: float

    def target(self, sparsity):
        return Target(sparsity, len(self.pruner.live), self.pruner.sparsity)

    def matrix_target(self, sparsity):
        """The same, of strategies with a sparsity for every matrix, (7 d,)."""
        outputs = len(self.pruner.live) * len(self.pruner.d_in)
        return Target(sparsity, outputs, self.pruner.sparsity)

    def steps(self):
        """EvoPress's selection before f2: none, if there is but one window."""
        return list(zip(self.quick, SURVIVORS[-len(self.quick) :]))

    @cached_property
    def g_norms(self):
        """Of the gradients at the dense model's outputs: which rows a refit spares."""
        return gradient_norms(self.pruner, self.setting.calibration, self.args.seed)

    def evaluations(self):
        """Of f2 so far, in units of all search tokens."""
        tokens = sum(objective.tokens_spent for objective in (self.f2, *self.quick))
        return tokens / self.f2.windows.numel()


def start(args, journal, device, dtype):
    """Load the model, rank it and record what it says while dense: a Run."""
    setting = prepare(args, device, dtype, args.tokens)
    chosen_on = digest_of(setting.calibration, setting.search)
    if journal(f"{args.seed} windows", lambda: chosen_on) != chosen_on:
        raise Refused(f"{args.out} has values of other windows of the text: --force begins anew")
    windows = len(setting.search)
    parts = sorted({max(1, windows // 4), max(1, windows // 2)} - {windows})
    bar = tqdm(
        total=total_evaluations(args, len(setting.model.blocks) * len(LINEARS)),
        desc=f"seed {args.seed}, evaluations of f2",
        bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]",
        disable=None,
    )
    started = time.perf_counter()
    pruner = Pruner(setting.model, setting.calibration)
    f2 = Counter(pruner, setting.search, bar)
    quick = [Counter(pruner, setting.search[:n], bar, windows / n) for n in parts]
    seconds = journal(f"{args.seed} calibration", lambda: time.perf_counter() - started)
    return Run(args, journal, setting, pruner, f2, quick, seconds)


def total_evaluations(args, matrices):
    """Of f2, that the methods of a run will ask for."""
    costs = {"owl": 12, "gp": args.budget // 2, "evopress": args.budget}
    costs["matrices"] = args.budget
    each = sum(costs.get(name, 0) for name in args.methods)
    searches = len({"unicuco", "constant"} & set(args.methods))
    alone = matrices * LEVELS / 4 if "dynamic" in args.methods else 0
    return each * len(args.served) + (args.initial + 4 * args.rounds) * searches + alone


@contextlib.contextmanager
def spending(run):
    """A dict that has the seconds and evaluations of what was done inside, at its end."""
    cost = {}
    started, before = time.perf_counter(), run.evaluations()
    yield cost
    cost["seconds"] = time.perf_counter() - started
    cost["evaluations"] = run.evaluations() - before


def timed(run, find, sparsity):
    """find(sparsity) -> strategy (D,): the strategy, its seconds with pruning, its evaluations."""
    with spending(run) as cost:
        strategy = find(sparsity)
        run.pruner.apply(strategy)
    return {"strategy": strategy.tolist(), **cost}


def seconds_of(work):
    """What `work()` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


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


def each(run, method, find, requests, shared=None):
    """Answers of a method that starts anew for each request: find(sparsity) -> strategy; shared: as
    of `answer`."""
    answers = []
    for s in requests:
        found = run.journal(f"{run.args.seed} {method} {s}", partial(timed, run, find, s))
        answers.append(answer(run, method, s, found, shared))
    return answers


def and_ends(run):
    return sorted({*run.args.served, *run.args.ends})


def by_uniform(run, method):
    return each(run, method, partial(uniform, len(run.pruner.live)), and_ends(run))


def by_owl(run, method):
    run.pruner.restore()
    shares = outlier_shares(run.setting.model, run.setting.calibration)
    return each(run, method, lambda s: owl_best(shares, run.target(s), run.f2), run.args.served)


def by_dlp(run, method):
    run.pruner.restore()
    medians = median_scores(run.setting.model, run.setting.calibration)
    return each(run, method, lambda s: dlp(medians, run.target(s)), and_ends(run))


def by_dynamic(run, method):
    """The damages of single matrices once, on the fewest tokens; a knapsack for each request."""
    sizes = (run.pruner.d_in * run.pruner.d_out).int().tolist() * len(run.pruner.live)
    measured = [
        run.journal(
            f"{run.args.seed} {method}, matrix {m} alone", partial(alone, run, m, len(sizes))
        )
        for m in range(len(sizes))
    ]
    shared = {key: sum(found[key] for found in measured) for key in ("seconds", "evaluations")}
    damages = torch.tensor([found["damages"] for found in measured], dtype=torch.float64)

    def find(s):
        return dynamic_program(damages, sizes, run.matrix_target(s))

    return each(run, method, find, and_ends(run), shared)


def alone(run, matrix, matrices):
    """Damages of one matrix, and what measuring them cost."""
    with spending(run) as cost:
        damages = damages_alone([*run.quick, run.f2][0], matrix, matrices)
    return {"damages": damages, **cost}


def by_gp(run, method):
    def find(s):
        return gp_search(run.f2, run.target(s), run.args.budget // 2, run.args.seed)

    return each(run, method, find, run.args.served)


def by_evopress(run, method, matrices=False):
    """One evolution for each request; its smaller budgets are snapshots, methods of their own."""
    whole = run.args.budget
    budgets = halved(whole)
    found = {}
    for s in run.args.served:
        # of earlier journals: two steps; over matrices, those of equal size alone
        key = f"{run.args.seed} {method} {s}, three steps, as spent" + ", any two" * matrices
        found[s] = run.journal(key, partial(evolved, run, s, budgets, matrices))
    return [
        answer(run, f"{method}, {b} each", s, found[s][str(b)])
        for b in budgets
        for s in run.args.served
    ]


def halved(budget):
    """`budget`, its half, its quarter and so on down to LEAST, smallest first."""
    budgets = [budget]
    while budgets[0] // 2 >= LEAST:
        budgets.insert(0, budgets[0] // 2)
    return budgets


def evolved(run, sparsity, budgets, matrices):
    """{budget: as `timed`} of one evolution, over blocks or over matrices."""
    target, switch = run.target(sparsity), {}
    if matrices:
        sizes = (run.pruner.d_in * run.pruner.d_out).repeat(len(run.pruner.live))
        target, switch = run.matrix_target(sparsity), {"sizes": sizes, "step": MATRIX_STEP}
    found = evopress(
        run.f2,
        run.steps(),
        target,
        budgets[-1],
        run.args.seed,
        snapshots=budgets,
        **switch,
    )
    return {
        str(b): {"strategy": x.tolist(), "seconds": seconds, "evaluations": spent}
        for b, (x, seconds, spent) in found.items()
    }


def by_unicuco(run, method, mean):
    """Algorithm 1 once, then StratNet for every request."""
    args = run.args
    # with the steps and what is kept, so that an earlier version's answers are not taken for these
    key = f"{args.seed} {method}, {args.initial} and up to {args.rounds} rounds of"
    key += f" {SearchSettings.steps} steps, with a factor, and unmeasured"
    made = run.journal(key, partial(learned, run, mean))
    return [
        answer(run, method, float(s), found, made)
        | foreseen(found, made)
        | {"unmeasured": found["unmeasured"]}
        for s, found in made["strategies"].items()
    ]


def last_round(log):
    """[(predicted, measured)] of the strategies that a search measured last."""
    last = [e for e in log if e["round"] == log[-1]["round"]]
    return [(e["predicted"], e["measured"]) for e in last if e["predicted"] is not None]


def foreseen(found, made):
    """What the surrogate said of an answer before it was judged: KL on the search text, the same
    and one standard deviation, what KL on all such text stays below with probability SURE, and the
    median gap of the last round's predictions.

    found    of `learned`'s strategies;  made: what `learned` returns
    """
    log_kl, std = found["predicted"]["log_kl"], found["predicted"]["std"]
    gaps = [abs(predicted / max(measured, KL_FLOOR) - 1) for predicted, measured in made["last"]]
    return {
        "predicted": math.exp(log_kl),
        "predicted_at_most": math.exp(log_kl + std),
        "other_text_at_most": made["factor"] and made["factor"] * math.exp(log_kl),
        "last_round_gap": statistics.median(gaps) if gaps else None,
    }


def learned(run, mean):
    """Seconds and evaluations of Algorithm 1, and {sparsity: as `timed`} of its StratNet."""
    args, windows = run.args, run.setting.calibration
    settings = SearchSettings(initial=args.initial, rounds=args.rounds, mean=mean, flat=FLAT)
    granularity = "matrix" if mean == "curvature" else "block"
    with spending(run) as cost:
        layout, curves = prior_of(run.pruner, windows, mean, granularity, args.seed)
        found = search(lambda batch: list(map(run.f2, batch)), layout, settings, args.seed, curves)
    if curves is not None:
        cost["evaluations"] += cost_in_tokens(windows) / run.f2.windows.numel()
    factors = run.f2.factors[-len(found.log) :]
    made = {
        **cost,
        "last": last_round(found.log),
        "factor": statistics.median(factors) if factors else None,
        "strategies": {},
    }
    before = None if curves is None else trained_on_table(layout, curves, args.seed).net
    for s in and_ends(run):
        made["strategies"][str(s)] = answered(run, found, before, s)
    return made


def answered(run, found, before, sparsity):
    """Of what a search found, as `timed` for one request; what the surrogate predicts of it; and
    what StratNet said before it measured, None without a table of curvature.
    """
    counted = run.pruner.sparsity
    made = timed(run, partial(strategy_for, found.net, counted_sparsity=counted), sparsity)
    log_kl, std = found.gp.posterior(torch.tensor([made["strategy"]], dtype=torch.float64))
    made["predicted"] = {"log_kl": log_kl.item(), "std": std.item()}
    made["unmeasured"] = before and strategy_for(before, sparsity, counted).tolist()
    return made


def by_curvature(run, method):
    """StratNet trained on the table of curvature alone, as prune.py does where it finds none; not
    again where the journal has all its answers."""
    windows = run.setting.calibration
    train = cache(partial(stratnet_from_curvature, run.pruner, windows, run.args.seed))
    seconds = run.journal(f"{run.args.seed} {method}", partial(seconds_of, train))
    read = cost_in_tokens(windows) / run.f2.windows.numel()

    def find(s):
        return strategy_for(train().net, s, run.pruner.sparsity)

    return each(run, method, find, and_ends(run), {"seconds": seconds, "evaluations": read})


SEARCHES = {
    "owl": by_owl,
    "unicuco": partial(by_unicuco, mean="curvature"),
    "constant": partial(by_unicuco, mean="constant"),
    "curvature": by_curvature,
    "gp": by_gp,
    "evopress": by_evopress,
    "matrices": partial(by_evopress, matrices=True),
    "dlp": by_dlp,
    "dynamic": by_dynamic,
}


def by_magnitude(run):
    """The Pruner of magnitude's masks: its ranking takes what that of Wanda's took."""
    return Pruner(run.setting.model, run.setting.calibration, "magnitude"), 0.0, 0.0


def by_threshold(run):
    """The masks of a global threshold; the seconds and evaluations of its backward passes."""
    started = time.perf_counter()
    windows = run.setting.calibration
    masks = GlobalThreshold(run.pruner, windows, run.args.seed)
    evaluations = cost_in_tokens(windows) / run.f2.windows.numel()
    key = f"{run.args.seed} {METHODS['global']}, scores"
    return masks, run.journal(key, lambda: time.perf_counter() - started), evaluations


OWN_MASKS = {"magnitude": by_magnitude, "global": by_threshold}


def own_masks(run, name, answers):
    """A method that has masks of its own, where uniform pruning has a count: what applies them, and
    its answers, from those of uniform."""
    run.pruner.restore()
    masks, seconds, evaluations = OWN_MASKS[name](run)
    shared = {"seconds": seconds, "evaluations": evaluations}
    mine = [a for a in answers if a["method"] == "uniform"]
    return masks, [answer(run, METHODS[name], a["sparsity"], a, shared) for a in mine]


def find_all(run):
    """Answers of uniform and of the methods asked for, but of OWN_MASKS: they search nothing."""
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
def refitted_all(run, answers, texts, owned):
    """Rows of the last answers of every method at --refit, survivors refitted; SparseGPT, if asked,
    at all that is served, with Wanda's masks and with its own. All on the same windows and texts.

    owned     {method: what has its masks}, for those that have their own
    """
    run.pruner.restore()
    readers = {text: Reader(run.pruner, windows) for text, windows in texts.items()}
    candidates = without_smaller(answers) + found_before(run.args)
    asked = [a for s in run.args.refit for a in candidates if a["sparsity"] == s]
    if "sparsegpt" in run.args.methods:
        uniforms = [a for a in answers if a["method"] == "uniform"]
        served = [a for a in uniforms if a["sparsity"] in run.args.served]
        asked += [a | {"method": m} for a in served for m in SPARSEGPT]
    rows = []
    for a in tqdm(asked, desc=f"seed {run.args.seed}, refitted", disable=None):
        a = softer(run, a)
        # of earlier journals: every row of a matrix loses as many, or another TEMPER
        how = f"refitted, rows by {TEMPER:g}: {run.args.test_tokens} tokens of each text"
        found = run.journal(f"{name_of(a)}, {how}", partial(refitted, run, a, readers, owned))
        rows += [row("refitted", a, text, more) for text, more in found.items()]
    run.pruner.restore()
    return rows


def softer(run, answer):
    """The answer with the strategy that prune.py would refit: UniCuCo's from before it measured,
    and all nearer to uniform.
    """
    strategy = answer.get("unmeasured") or answer["strategy"]
    if len({*strategy}) == 1:  # uniform already
        return answer
    return answer | {"strategy": softened(strategy, CONTRAST, run.pruner.sparsity).tolist()}


SPARSEGPT = ("SparseGPT, Wanda's masks", "SparseGPT, its masks")


def without_smaller(answers):
    """The answers but those of EvoPress's smaller budgets, which come before its largest."""
    last = {family(a["method"]): a["method"] for a in answers}
    return [a for a in answers if a["method"] == last[family(a["method"])]]


def found_before(args):
    """Answers of this seed in the comparisons --refit-also, of methods that --methods leaves out;
    of one that several searched for, those of the last."""
    without = (*args.methods, *OWN_MASKS)  # of masks of its own, a strategy says nothing
    here = {METHODS.get(name) for name in without} | {"uniform"}
    answers = []
    for path in args.refit_also:
        rows = read_comparison(path)[1]
        rows = [r for r in rows if r["table"] == "requests" and r["seed"] == args.seed]
        rows = [r for r in rows if r["text"] == rows[0]["text"] and family(r["method"]) not in here]
        again = {family(r["method"]) for r in rows}
        answers = [a for a in answers if family(a["method"]) not in again]
        answers += [{key: r.get(key) for key in ANSWER} for r in rows]
    return without_smaller(answers)


def counts_of(run, answer, masks):
    """How many weights of each row go, {parameter name: (d_out,)}: the refit says which. Those of
    masks that are a method's own, else of all methods alike."""
    if isinstance(masks, Masks):
        return row_counts(run.pruner, answer["strategy"], run.g_norms)
    return {name: (~kept).sum(1).cpu() for name, kept in masks.items()}


def refitted(run, answer, readers, owned):
    """{text: tokens, counted sparsity, KL and perplexity} of one answer after its refit."""
    pruner, windows = run.pruner, run.setting.calibration
    for reader in readers.values():
        reader.f2  # the dense model reads before it is pruned
    masks = owned.get(answer["method"], pruner).masks(answer["strategy"])
    started = time.perf_counter()
    if answer["method"] in SPARSEGPT:
        own = answer["method"] == SPARSEGPT[1]
        sparsegpt(pruner, windows, answer["sparsity"], None if own else masks)
    else:
        follow(pruner, counts_of(run, answer, masks), windows)
    seconds, counted = time.perf_counter() - started, pruner.zeros()
    return {
        text: {
            "tokens": reader.windows.numel(),
            "counted": counted,
            "refit_seconds": seconds,
            "strategy": answer["strategy"],
            **outcome(*reader.f2.divergence.measure()),
        }
        for text, reader in readers.items()
    }


def hard(answers):
    """What is read long texts and asked tasks: the dense model, then the answers at HARD, but not
    those of EvoPress's smaller budgets and of the constant mean."""
    zeros = [0.0] * len(answers[0]["strategy"])
    dense = {"method": "dense", "sparsity": 0.0, **dict.fromkeys(COSTS, 0.0), "strategy": zeros}
    chosen = [a for s in HARD for a in without_smaller(answers) if a["sparsity"] == s]
    return [answers[0] | dense] + [a for a in chosen if a["method"] != METHODS["constant"]]


def long_text(run):
    """The first LONG tokens of the first test text, in windows as long as the model takes, at most
    2048: {name: windows}."""
    text, windows = next(iter(run.setting.held_out.items()))
    length = min(2048, run.setting.model.config.max_position_embeddings)
    return {text: cut(windows.flatten()[:LONG], length)}


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
    long = long_text(run) if args.tasks else {}
    answers = find_all(run)
    rows = []
    if args.tasks:
        rows += read_all(run, hard(answers), run.pruner, long, "long")
        rows += ask_all(run, hard(answers)) if first else []
    texts = first_tokens(run.setting.held_out, args.test_tokens)
    rows += read_all(run, answers, run.pruner, texts, "requests")
    owned = {}
    for name in [name for name in args.methods if name in OWN_MASKS]:
        masks, mine = own_masks(run, name, answers)
        rows += read_all(run, mine, masks, texts, "requests")
        owned[METHODS[name]] = masks
        answers += mine
    if args.refit or "sparsegpt" in args.methods:
        rows += refitted_all(run, answers, texts, owned)
    return rows


# --------------------------------------------------------------------------------- command line
def served(args):
    """The sparsities that a command line asks to serve and to measure, ascending."""
    if args.full and args.served:
        raise Refused("--full serves every request: it does not go with --served")
    if not all(0.05 <= s <= MAX for s in args.served or ()):  # below, uniform's KL may be 0
        raise Refused(f"--served takes sparsities from 0.05 to {MAX}")
    if args.tasks and args.served and not {*HARD} & {*args.served}:
        raise Refused("--tasks asks what is served at 0.5 and 0.6: --served has neither")
    return requests_asked(args.requests) if args.full else sorted({*(args.served or QUICK)})


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
    add_requests(parser)
    add_judging(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/<model>")
    args = parser.parse_args()
    at_least(args, 1, "requests", "seeds", "tokens", "calibration", "test_tokens")
    at_least(args, 1, "initial", "rounds", "limit")
    at_least(args, LEAST, "budget")
    read_once(args)
    args.ends = () if args.served else ENDS
    args.served = served(args)
    args.refit = to_refit(args)
    args.out = args.out or Path("out") / args.model.resolve().name
    if (args.out / JOURNAL).exists() and not (args.resume or args.force):
        raise Refused(
            f"{args.out} holds a comparison: --resume goes on with it, --force begins anew"
        )
    return args


def to_refit(args):
    """The sparsities whose answers are refitted: of those served; none without --refit."""
    if args.refit is None:
        if args.refit_also:
            raise Refused("--refit-also says what else to refit: it goes with --refit")
        return []
    if not {*args.refit} <= {*args.served}:
        raise Refused("--refit refits what is served: --served lacks one of its sparsities")
    chosen = sorted({*args.refit}) or perplexities(args.served)
    if not chosen:
        raise Refused("--refit alone refits what is served of 0.5 0.6 0.7: name the sparsities")
    return chosen


def read_once(args):
    """What cannot be read is refused now, not after hours of searching."""
    for task in TASKS if args.tasks else ():
        all_prompts(task, read_rows(args.tasks, task, args.limit))
    for path in args.refit_also:
        read_comparison(path)


def check_also(args, inputs):
    """Refused where --refit-also holds another model's or text's answers, or lacks a seed."""
    for path in args.refit_also:
        theirs, rows = read_comparison(path)
        for name in ("weights", "sha256"):
            if theirs.get(name) != inputs[name]:
                raise Refused(f"{path} is of another {'model' if name == 'weights' else '--data'}")
        if not {*seeds_asked(args)} <= {r["seed"] for r in rows}:
            raise Refused(f"{path} lacks a seed of --seed and --seeds")


def seeds_asked(args):
    return range(args.seed, args.seed + args.seeds)


def add_requests(parser):
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--requests", **number, default=64, help="how many are asked")
    parser.add_argument("--seeds", **number, default=1, help="how many seeds, from --seed on")
    some = "serve and measure these sparsities alone; default: 0.3 to 0.7"
    parser.add_argument("--served", type=float, nargs="+", metavar="S", help=some)
    full = "serve and measure every request, by every method"
    parser.add_argument("--full", action="store_true", help=full)
    resume = "go on where the same comparison was stopped"
    parser.add_argument("--resume", action="store_true", help=resume)
    force = "begin anew: what --out has found is lost"
    parser.add_argument("--force", action="store_true", help=force)


def add_judging(parser):
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--test-tokens", **number, default=8192, help="tokens of each unseen text")
    refit = "also refit every method's answers at these sparsities (default: 0.5 0.6 0.7)"
    parser.add_argument("--refit", type=float, nargs="*", metavar="S", help=refit)
    before = "with --refit: also what others found in these comparisons, files of compare.py"
    some = {"nargs": "+", "default": (), "metavar": "FILE"}
    parser.add_argument("--refit-also", type=Path, **some, help=before)
    tasks = (
        "also, at 0.5 and 0.6: 65536 tokens of the first test text, and for the first seed the"
        " zero-shot tasks (see eval.py)"
    )
    parser.add_argument("--tasks", type=Path, metavar="DIR", help=tasks)
    parser.add_argument("--limit", **number, default=500, help="documents of each task")


def add_searches(parser):
    number = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=[*METHODS, "sparsegpt"],
        default=["owl", "unicuco", "gp", "evopress"],
        metavar="NAME",
        help="beside uniform: " + " ".join(METHODS) + "; sparsegpt",
    )
    budget = "evaluations that EvoPress may spend on each request"
    parser.add_argument("--budget", **number, default=20, help=budget)
    initial = "strategies that UniCuCo measures first"
    parser.add_argument("--initial", **number, default=40, help=initial)
    rounds = "its rounds of 4 more, at most: fewer where KL no longer falls"
    parser.add_argument("--rounds", **number, default=ROUNDS, help=rounds)


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
    device, dtype, reason = choose(args)
    inputs = describe(args, device)
    check_also(args, inputs)
    threads = inputs["threads"]
    print(f"{inputs['model']} on {device}, {args.dtype} ({reason}), {threads} threads")
    args.out.mkdir(parents=True, exist_ok=True)
    busy = f"another compare.py is running in {args.out}: choose another --out"
    with locked(args.out, busy):
        compare(args, inputs, device, dtype)
    seconds = f"{time.perf_counter() - started:.0f} s"
    print(f"{seconds}, {peak_memory()}; wrote {args.out / 'compare.json'}")


def compare(args, inputs, device, dtype):
    """Find, measure, write and print: every seed's rows as soon as it has them."""
    journal = Journal(args.out / JOURNAL, inputs, args.resume)
    asked = inputs | {"requests": args.requests, "provenance": provenance()}
    rows = []
    for seed in seeds_asked(args):
        rows += one_seed(args, seed, journal, device, dtype)
        write_rows(args.out / "compare.json", asked, rows)
    show_requests(rows, asked)
    if any(r["table"] == "refitted" for r in rows):
        show_refitted(rows)
    if args.tasks:
        show_tasks(rows)
        show_long(rows)


if __name__ == "__main__":
    run(main, ": what was found is kept, the same command with --resume goes on")
