"""
Every table, and every sentence with a measured number, of README.md and RESULTS.md, from results/.

Reading   beside plot.py, after report.py. Nothing is measured here.
Blocks    in both files `<!-- table:NAME -->` begins what is generated and `<!-- end -->` ends it;
          the words around are written by hand. NAME is a function of this file, in BLOCKS.

Laptop    python plot.py --tables      (2 s; rewrites the blocks, test_plot.py compares them)
"""

import contextlib
import io
import json
import math
import re
import statistics
from pathlib import Path

import report
from report import (
    METHODS,
    grouped,
    long_table,
    pair,
    read_comparison,
    requests_table,
    tasks_table,
)
from script import Refused, first_line, read_json, write_text

ROOT = Path(__file__).resolve().parent
PAGES = {"README.md": False, "RESULTS.md": True}  # whether tables name their sources
RESULTS = ROOT / "results"
UNICUCO = METHODS["unicuco"]
TEXTS = {
    "wiki.test.raw": "WikiText-2",
    "c4-unseen.jsonl": "C4",
    "stdlib held-out files": "held-out files",
}


# ------------------------------------------------------------------------------------- writing
def markdown(head, rows):
    """A Markdown table: `head` names the columns, every row has one cell for each."""
    assert all(len(row) == len(head) for row in rows), "a cell for every column"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def read_rows(path):
    """The rows of a results file that is a list of them."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {first_line(error)}") from None


def results(name):
    """The path of results/NAME, noted in `opened`: what a table is made of stands under it."""
    opened.append(name)
    return RESULTS / name


opened = []


def bullets(sentences):
    return "\n".join(f"- {s}" for s in sentences)


def pm(values, digits):
    """Mean ± standard deviation over seeds; of one seed the value alone; "-" of what is NaN."""
    if any(math.isnan(value) for value in values):
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def joined(sparsities):
    return ", ".join(f"{s:g}" for s in sparsities) or "no sparsity"


def named(method):
    """The method of this repository stands out."""
    return f"**{method}**" if method in (UNICUCO, "StratNet") else method


def printed(show, *arguments):
    """The lines that a function of report.py prints, so that both say the same."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        show(*arguments)
    return said.getvalue().strip().splitlines()


# -------------------------------------------------------------------------- what train.py wrote
def runs(stem):
    """{seed: {method: rows by sparsity}} of results/STEM-seed*.json."""
    found = {}
    for path in sorted(RESULTS.glob(f"{stem}-seed[0-9].json")):
        rows = read_rows(results(path.name))
        found[int(path.stem.rpartition("seed")[2])] = grouped(rows, "method")
    return found


def column(seeds, method, key):
    """[[value of each seed] of each sparsity]."""
    return list(zip(*([row[key] for row in of[method]] for of in seeds.values())))


def sparsities_of(seeds):
    return [row["sparsity"] for row in next(iter(seeds.values()))["uniform"]]


def tiny():
    """KL of uniform and StratNet over seeds, and their ratio, paired by seed."""
    seeds = runs("tiny")
    u, s = (column(seeds, method, "kl") for method in ("uniform", "unicuco"))
    ratios = [[b / a for a, b in zip(*pair)] for pair in zip(u, s)]
    return markdown(
        ["KL at sparsity", *(f"{x:g}" for x in sparsities_of(seeds))],
        [
            ["uniform", *(pm(v, 4) for v in u)],
            ["**StratNet**", *(pm(v, 4) for v in s)],
            ["StratNet / uniform", *(pm(v, 3) for v in ratios)],
        ],
    )


def tiny_verdict():
    return verdict("tiny")


def verdict(stem):
    """Where StratNet's KL is below uniform's in every seed, and where it is not."""
    seeds = runs(stem)
    pairs = zip(column(seeds, "uniform", "kl"), column(seeds, "unicuco", "kl"))
    below = [all(b < a for a, b in zip(u, s)) for u, s in pairs]
    wins = [x for x, won in zip(sparsities_of(seeds), below) if won]
    rest = [x for x, won in zip(sparsities_of(seeds), below) if not won]
    several = f"in each of {len(seeds)} seeds" if len(seeds) > 1 else "in its one seed"
    but = f"; not at {joined(rest)}" if rest else ", so at every sparsity of the table"
    return f"StratNet's KL is below uniform's {several} at {joined(wins)}{but}."


def tiny_seeds():
    seeds = runs("tiny")
    rows = []
    for seed, methods in seeds.items():
        for method, name in (("uniform", "uniform"), ("unicuco", "**StratNet**")):
            rows.append([f"{name}, seed {seed}", *(f"{r['kl']:.4f}" for r in methods[method])])
    return markdown(["KL at sparsity", *(f"{x:g}" for x in sparsities_of(seeds))], rows)


def run_table(stem):
    """Seed 0 in full: KL, counted sparsity and perplexity of both methods."""
    seeds = runs(stem)
    rows = []
    for key, label, digits in (
        ("kl", "KL", 4),
        ("counted", "counted sparsity", 4),
        ("ppl", "perplexity", 2),
    ):
        for method, name in (("uniform", "uniform"), ("unicuco", "StratNet")):
            cells = (f"{r[key]:.{digits}f}" for r in seeds[0][method])
            rows.append([f"{label}, {name}", *cells])
    return markdown(["seed 0, sparsity", *(f"{x:g}" for x in sparsities_of(seeds))], rows)


def tiny_run():
    return run_table("tiny")


# ---------------------------------------------------------------------- refit, and a real model
def refit_rows(model):
    """{(method, refit, sparsity): rows of all seeds} of results/refit-MODEL.json."""
    return grouped(read_rows(results(f"refit-{model}.json")), "method", "refit", "sparsity")


def present(model="smollm2"):
    """Rows of both methods in their present form on a real model, as pruned, all seeds, as
    `refit_rows` has them: of results/compare-MODEL-seed*.json.
    """
    return as_refit_rows(r for r in of_seeds(model) if r["table"] == "requests")


def delivered():
    """Rows of SmolLM2 refitted as prune.py does, by what StratNet says before it measured, beside
    uniform as pruned; all seeds, on fewer tokens than `present`.
    """
    return as_delivered(of_seeds("smollm2-refit"))


def as_delivered(rows):
    """Rows of compare.py without the searched StratNet's, the unmeasured one's under its name."""
    ours = {METHODS["curvature"]: UNICUCO}
    rows = [r for r in rows if r["method"] != UNICUCO]
    return [r | {"method": ours.get(r["method"], r["method"])} for r in rows]


def as_refit_rows(rows):
    names = {"uniform": "uniform", UNICUCO: "unicuco"}
    return [
        r | {"method": names[r["method"]], "refit": r["table"] == "refitted"}
        for r in rows
        if r["method"] in names
    ]


def of_seeds(model):
    paths = sorted(RESULTS.glob(f"compare-{model}-seed[0-9].json"))
    return [r for path in paths for r in read_comparison(results(path.name))[1]]


def refit_table(found, key, digits):
    """Rows and head: one number of `refit_rows` at each sparsity; "-" where it was not measured."""
    rows = []
    for s in sorted({s for _, _, s in found}):
        cells = [f"{s:g}"]
        for method in ("uniform", "unicuco"):
            for refitted in (False, True):
                mine = found.get((method, refitted, s))
                cells.append(pm([r[key] for r in mine], digits) if mine else "-")
        rows.append(cells)
    names = ("uniform", "uniform, refitted", "StratNet", "StratNet, refitted")
    return rows, ["sparsity", *names]


def seed_by_seed(ours, theirs):
    """KL of rows over that of others, seed by seed; "-" where one was not measured."""
    if not (ours and theirs):
        return "-"
    return pm([a["kl"] / b["kl"] for a, b in zip(ours, theirs)], 3)


def refit_ratios(found):
    """KL; what the refit leaves of StratNet's; what of StratNet's gain survives it."""
    rows, head = refit_table(found, "kl", 4)
    for cells, s in zip(rows, sorted({s for _, _, s in found})):
        of = {(m, r): found.get((m, r, s)) for m in ("uniform", "unicuco") for r in (False, True)}
        cells.append(seed_by_seed(of["unicuco", True], of["unicuco", False]))
        cells.append(seed_by_seed(of["unicuco", False], of["uniform", False]))
        cells.append(seed_by_seed(of["unicuco", True], of["uniform", True]))
    ratio = "StratNet / uniform"
    return rows, [*head, "StratNet, refitted / not", ratio, f"{ratio}, both refitted"]


def refit_tiny():
    rows, head = refit_ratios(refit_rows("tiny"))
    return markdown(head, rows)


def refit_tiny_perplexity():
    rows, head = refit_table(refit_rows("tiny"), "ppl", 2)
    return markdown(["perplexity at " + head[0], *head[1:]], rows)


def over_bare_uniform(rows):
    """{(method, refit, sparsity): KL over that of uniform as pruned, of each seed}, geometric mean
    over the texts; rows as those of `present`.
    """
    kl = {(r["method"], r["refit"], r["sparsity"], r["seed"], r["text"]): r["kl"] for r in rows}
    found = {}
    for (*key, seed), mine in grouped(rows, "method", "refit", "sparsity", "seed").items():
        ratios = (r["kl"] / kl["uniform", False, r["sparsity"], seed, r["text"]] for r in mine)
        found.setdefault((*key,), []).append(statistics.geometric_mean(ratios))
    return found


def smollm2_ratios():
    """`over_bare_uniform` of SmolLM2, as pruned and as delivered."""
    return over_bare_uniform(as_refit_rows(delivered())) | over_bare_uniform(present())


SHORT = (
    (("unicuco", False), "**StratNet**"),
    (("uniform", True), "uniform, refitted"),
    (("unicuco", True), "**StratNet, refitted**"),
)


def smollm2_short():
    """KL over that of uniform as pruned, as pruned and refitted."""
    found = smollm2_ratios()
    asked = sorted({s for _, _, s in found})
    lines = [[name, *(pm(found[(*how, s)], 3) for s in asked)] for how, name in SHORT]
    return markdown(["KL over uniform's at", *(f"{s:g}" for s in asked)], lines)


def smollm2_left():
    """StratNet's KL over uniform's, both as pruned and both refitted: what of its gain is left."""
    lines, asked = [], report.QUICK
    of_texts = [grouped(rows, "text") for rows in (present(), as_refit_rows(delivered()))]
    for text in of_texts[0]:
        for refit, how in ((False, "as pruned"), (True, "both refitted")):
            found = grouped(of_texts[refit][text], "method", "refit", "sparsity")
            pairs = [[found[name, refit, s] for name in ("unicuco", "uniform")] for s in asked]
            lines.append([f"{TEXTS[text]}, {how}", *(seed_by_seed(*pair) for pair in pairs)])
    return markdown(["StratNet's KL over uniform's at", *(f"{s:g}" for s in asked)], lines)


def refit_smollm2_says():
    """What is left of bare uniform's KL: the geometric mean over sparsities and texts, by seed."""
    found = smollm2_ratios()
    asked = sorted({s for _, _, s in found})
    sentences = []
    for how, name in SHORT:
        by_seed = zip(*(found[(*how, s)] for s in asked))
        mean = pm([statistics.geometric_mean(seed) for seed in by_seed], 3)
        sentences.append(
            f"{name.strip('*')}: {mean} of uniform's KL as pruned, geometric mean over both texts"
            f" at {joined(asked)}."
        )
    return bullets(sentences)


def qwen15():
    """KL and perplexity on Qwen2.5-Coder-1.5B, nothing refitted and nothing measured."""
    _, rows = comparison("qwen15")
    rows = [r for r in rows if r["table"] == "requests"]
    lines = []
    for (text, s), mine in grouped(rows, "text", "sparsity").items():
        kl = {r["method"]: r["kl"] for r in mine}
        for r in mine:
            cells = f"{r['kl']:.4f}", f"{r['kl'] / kl['uniform']:.3f}", f"{r['ppl']:.2f}"
            lines.append([f"{TEXTS[text]}, {s:g}, {r['method']}", *cells])
    return markdown(["text, sparsity, method", "KL", "KL over uniform's", "perplexity"], lines)


SIZED = (0.3, 0.5, 0.6)  # sparsities at which models of several sizes were measured


def gain(pairs):
    """{sparsity: KL over uniform's of every seed} of pairs {sparsity: (rows, rows of uniform)}."""
    return {
        s: [ours["kl"] / theirs["kl"] for ours, theirs in zip(*both)] for s, both in pairs.items()
    }


def gain_of_train(stem):
    """`gain` of what Algorithm 1 made, on its first test text."""
    rows = real(stem)
    text = next(text for text, _ in rows)
    return gain({s: (rows[text, s]["unicuco"], rows[text, s]["uniform"]) for s in SIZED})


def gain_of_compare(stem):
    """`gain` of a comparison of StratNet with nothing measured, on its first test text."""
    rows = [r for r in comparison(stem)[1] if r["table"] == "requests"]
    found = grouped([r for r in rows if r["text"] == rows[0]["text"]], "method", "sparsity")
    ours, theirs = METHODS["curvature"], "uniform"
    return gain({s: (found[ours, s], found[theirs, s]) for s in SIZED if (ours, s) in found})


# name, weights of all kinds, how its gain is read of which results
MODELS = (
    ("the embedded model", 5.5e6, gain_of_train, "tiny"),
    ("SmolLM2-135M", 134.5e6, gain_of_train, "smollm2"),
    ("Qwen2.5-Coder-0.5B", 494e6, gain_of_train, "qwen05"),
    ("Qwen2.5-Coder-1.5B", 1543.7e6, gain_of_compare, "qwen15"),
)
BOTH_REFITTED = "0.5, both refitted"


def gain_refitted(stem):
    """{BOTH_REFITTED: KL over uniform's of every seed}, on the first test text; or {}."""
    if stem not in REFITTED:
        return {}
    rows = REFITTED[stem]()
    first = [r for r in rows if r["text"] == rows[0]["text"]]
    found = grouped(first, "method", "refit", "sparsity")
    pairs = zip(found["unicuco", True, 0.5], found["uniform", True, 0.5])
    return {BOTH_REFITTED: [ours["kl"] / theirs["kl"] for ours, theirs in pairs]}


# {stem of MODELS: its rows as those of `as_refit_rows`}
REFITTED = {
    "tiny": lambda: read_rows(results("refit-tiny.json")),
    "smollm2": lambda: as_refit_rows(delivered()),
    "qwen05": lambda: as_refit_rows(as_delivered(comparison("qwen05-refit")[1])),
}


def gains():
    """[(name, weights, `gain`, nothing refitted, and `gain_refitted`)] of MODELS."""
    return [
        (name, weights, read(stem) | gain_refitted(stem)) for name, weights, read, stem in MODELS
    ]


def sizes():
    """Gain against model size."""
    asked = (*SIZED, BOTH_REFITTED)
    rows = [
        [name, f"{weights / 1e6:g}M", *(pm(of[s], 3) if s in of else "-" for s in asked)]
        for name, weights, of in gains()
    ]
    return markdown(["KL over uniform's", "weights", *(f"at {s}" for s in asked)], rows)


def refitted_block(rows):
    """Every method's answers refitted: KL over refitted uniform's, over uniform's as pruned, and
    perplexity; a column for each sparsity, of several texts a row for each; "-": was not refitted.
    """
    columns = (("over refitted uniform's", "ratio", 3),)
    columns += (("over uniform's as pruned", "of_bare_uniform", 3), ("perplexity", "ppl", 2))
    asked = sorted({r["sparsity"] for r in rows if r["table"] == "refitted"})
    lines = []
    for text, mine in grouped(rows, "text").items():
        for method, table in grouped(report.refitted_table(mine), "method").items():
            at = {r["sparsity"]: r for r in table}
            cells = [
                pm(at[s][key], digits) if s in at else "-"
                for _, key, digits in columns
                for s in asked
            ]
            lines.append([f"{method}, {TEXTS[text]}", *cells])
    head = [f"{name} at {s:g}" for name, _, _ in columns for s in asked]
    return markdown(["KL of the refitted", *head], lines)


def refitted_tiny():
    return refitted_block(comparison("tiny-rivals")[1])


def refitted_smollm2():
    return refitted_block(delivered())


def refitted_means(rows, asked):
    """{method: KL over refitted uniform's, one mean over texts and the sparsities `asked`}."""
    table = [r for r in report.refitted_table(rows) if r["sparsity"] in asked]
    return {
        method: statistics.geometric_mean(sum([r["ratio"] for r in mine], []))
        for method, mine in grouped(table, "method").items()
        if method != "uniform"
    }


def refitted_says(rows):
    """Each method's refitted KL over refitted uniform's, one mean over texts and sparsities."""
    asked = {r["sparsity"] for r in rows if r["table"] == "refitted"}
    several = " of both texts" if len(grouped(rows, "text")) > 1 else ""
    return (
        f"KL over refitted uniform's, geometric mean{several} at {joined(sorted(asked))}:"
        f" {in_order(refitted_means(rows, asked))}."
    )


def in_order(means):
    return ", ".join(f"{method} {means[method]:.3f}" for method in sorted(means, key=means.get))


def refitted_tiny_says():
    return refitted_says(comparison("tiny-rivals")[1])


def refitted_rivals():
    return refitted_block(comparison("smollm2-rivals")[1])


def refitted_rivals_says():
    return refitted_says(comparison("smollm2-rivals")[1])


def qwen05_refitted():
    """Rows of Qwen2.5-Coder-0.5B: the same refit of all at 0.5, SparseGPT at every sparsity."""
    rows, more = (comparison(f"qwen05-{name}")[1] for name in ("refit", "refitted"))
    return rows + [r for r in more if r["method"].startswith("SparseGPT")]


def refitted_qwen05():
    return refitted_block(qwen05_refitted())


def qwen05_evopress_says():
    """EvoPress and UniCuCo before it measured, as pruned, on each text."""
    rows, more = (comparison(f"qwen05-{name}")[1] for name in ("refit", "evopress"))
    rows = report.with_ratios(rows + [r for r in more if r["method"] != "uniform"], "requests")
    sentences = []
    for text, mine in grouped([r for r in rows if r["sparsity"] == 0.5], "text").items():
        ratios = {r["method"]: r["ratio"] for r in mine if r["method"] != "uniform"}
        sentences.append(f"{TEXTS[text]}: {in_order(ratios)}.")
    return bullets(sentences)


def rivals_tiny_says():
    """KL over uniform's of the methods that serve all requests with one look, nothing refitted."""
    rows = [r for r in requests_of("tiny-refitted") if r["evaluations"] <= 200]
    means = {r["method"]: statistics.geometric_mean(r["ratio"].values()) for r in rows}
    del means["uniform"]
    spent = {r["method"]: f"{r['evaluations']:.0f}" for r in rows}
    said = (f"{m} {means[m]:.3f} ({spent[m]})" for m in sorted(means, key=means.get))
    return (
        f"KL over uniform's, mean of 0.3 to 0.7 (evaluations for all requests): {', '.join(said)}."
    )


def coverage():
    """How often --max-kl K --confidence P was kept on text that no measurement saw."""
    rows = read_rows(results("coverage-tiny.json"))
    lines = [
        [
            r["model"],
            f"{r['confidence']:g}",
            r["windows"],
            f"{r['kept']:.3f} ± {r['error']:.3f}",
            r["requests"],
            f"{r['kl_over_budget']:.2f}",
            f"{r['measurements']:.1f}",
        ]
        for r in rows
    ]
    head = ["model", "confidence", "windows measured", "kept on other text", "requests"]
    return markdown([*head, "KL there, of the budget", "measurements a request"], lines)


def real(stem):
    """{(text, sparsity): {method: rows of all seeds}}, nothing refitted: of a real model the
    present form, else of results/STEM-seed*.json.
    """
    rows = present(stem)
    if not rows:
        paths = sorted(RESULTS.glob(f"{stem}-seed[0-9].json"))
        rows = [r | {"text": r["test"]} for p in paths for r in read_rows(results(p.name))]
    found = {}
    for row in rows:
        key = row["text"], row["sparsity"]
        found.setdefault(key, {}).setdefault(row["method"], []).append(row)
    return found


def ratios_block(rows, methods):
    """KL over uniform's as pruned, of rows of compare.py, on each text, and the geometric mean from
    0.3 to 0.7; methods: {as in the rows: as printed}.
    """
    found = grouped([r for r in rows if r["table"] == "requests"], "text", "sparsity", "method")
    asked = sorted({s for _, s, _ in found})
    lines = []
    for text in dict.fromkeys(text for text, _, _ in found):
        for method, name in methods.items():
            ratios = {s: seeds_over_uniform(found, text, s, method) for s in asked}
            by_seed = zip(*(ratios[s] for s in asked if 0.3 <= s <= 0.7))
            mean = pm([statistics.geometric_mean(seed) for seed in by_seed], 3)
            lines.append([TEXTS[text] + name, *(pm(ratios[s], 3) for s in asked), mean])
    head = ["KL over uniform's at", *(f"{s:g}" for s in asked), "mean of 0.3 to 0.7"]
    return markdown(head, lines)


def seeds_over_uniform(found, text, sparsity, method):
    """KL of a method over uniform's, of each of its seeds."""
    theirs = {r["seed"]: r["kl"] for r in found[text, sparsity, "uniform"]}
    return [r["kl"] / theirs[r["seed"]] for r in found[text, sparsity, method]]


def smollm2_real():
    return ratios_block(of_seeds("smollm2"), {UNICUCO: ""})


def smollm2_unmeasured():
    """The same where nothing was measured: StratNet of the table of curvature."""
    return ratios_block(comparison("smollm2-curvature")[1], {METHODS["curvature"]: ""})


def qwen05_real():
    """Qwen2.5-Coder-0.5B, searched; OWL of the first seed alone."""
    methods = {METHODS["owl"]: f", {METHODS['owl']}", UNICUCO: f", **{UNICUCO}**"}
    return ratios_block(of_seeds("qwen05"), methods)


def perplexity_block(found):
    """Perplexity of uniform and StratNet on each text, nothing refitted; found: as `real`."""
    asked = sorted({s for _, s in found})
    rows = []
    for text in dict.fromkeys(text for text, _ in found):
        for method, name in (("uniform", "uniform"), ("unicuco", "**StratNet**")):
            cells = (pm([r["ppl"] for r in found[text, s][method]], 2) for s in asked)
            rows.append([f"{TEXTS[text]}, {name}", *cells])
    return markdown(["perplexity at", *(f"{s:g}" for s in asked)], rows)


def smollm2_real_perplexity():
    return perplexity_block(real("smollm2"))


def qwen05_perplexity():
    return perplexity_block(real("qwen05"))


def smollm2_predicted():
    """What the surrogate predicted of StratNet's answers, on its search text, beside what was
    measured on others: seeds apart.
    """
    rows = [r for r in present() if r["method"] == "unicuco"]
    lines = []
    for (seed, s), mine in grouped(rows, "seed", "sparsity").items():
        said = mine[0]["predicted"]
        up = mine[0]["predicted_at_most"] / said - 1
        cells = [f"{r['kl']:.4f} ({r['kl'] / said - 1:+.0%})" for r in mine]
        lines.append([f"seed {seed}, {s:g}", f"{said:.4f} ± {up:.1%}", *cells])
    return markdown(["sparsity", "predicted", *(TEXTS[r["text"]] for r in mine)], lines)


def smollm2_predicted_says():
    """How far the last round's predictions were from what was measured on the search text."""
    rows = [r for r in present() if r["method"] == "unicuco"]
    gaps = {r["seed"]: r["last_round_gap"] for r in rows}
    said = " and ".join(f"{gap:.1%} (seed {seed})" for seed, gap in gaps.items())
    return f"Median gap of the last round's four predictions, on the search text: {said}."


def damages():
    """c_m of the table against the measured KL of one matrix alone, by how much of it went."""
    rows = read_rows(results("damages-smollm2.json"))
    lines = []
    for s, mine in grouped(rows, "sparsity").items():
        gaps = [abs(r["gap"]) for r in mine]
        lines.append(
            [
                f"{s:g}",
                f"{min(r['measured'] for r in mine):.5f} to {max(r['measured'] for r in mine):.5f}",
                f"{statistics.median(gaps):.1%}",
                f"{sum(gap <= 0.25 for gap in gaps)} of {len(gaps)}",
                f"{max(gaps):.1%}",
            ]
        )
    head = ["sparsity of the matrix", "measured KL", "median gap", "within 25 %", "largest gap"]
    return markdown(head, lines)


def sinks():
    """How many first tokens are attention sinks in the dense model alone."""
    rows = read_rows(results("sinks-qwen05.json"))
    lines = [
        [model, *(f"{r['lost']} of {r['sinks']}" for r in mine)]
        for model, mine in grouped(rows, "model").items()
    ]
    return markdown(["sinks lost on", *(TEXTS[text] for text in grouped(rows, "text"))], lines)


def beside_evopress():
    """KL of the present form over that of EvoPress at 104 evaluations a request, seed by seed: both
    as ratios to uniform's with the same masks, calibration and search tokens.
    """
    _, rows = comparison("smollm2")
    theirs = report.with_ratios(rows, "requests")
    theirs = [r for r in theirs if r["method"] == "EvoPress, 104 each"]
    theirs = {(r["text"], r["sparsity"], r["seed"]): r["ratio"] for r in theirs}
    lines = []
    for text in ("wiki.test.raw", "c4-unseen.jsonl"):
        ratios = {s: [] for s in report.QUICK}
        for (found, s), mine in real("smollm2").items():
            if found == text and s in ratios:
                pairs = zip(mine["unicuco"], mine["uniform"])
                for seed, (ours, base) in enumerate(pairs):
                    ratios[s].append(ours["kl"] / base["kl"] / theirs[text, s, seed])
        means = [statistics.geometric_mean(of_seed) for of_seed in zip(*ratios.values())]
        lines.append([TEXTS[text], *(pm(v, 3) for v in ratios.values()), pm(means, 3)])
    head = ["StratNet's KL over EvoPress's at", *(f"{s:g}" for s in report.QUICK), "mean"]
    return markdown(head, lines)


# ------------------------------------------------------------------------ what compare.py wrote
def comparison(name):
    """(inputs, rows) of results/compare-NAME.json."""
    return read_comparison(results(f"compare-{name}.json"))


def requests_of(name):
    inputs, rows = comparison(name)
    return requests_table(rows, inputs)


def cells_of(r, mark="", perplexities=True):
    """One method of `requests_table` as a row: costs, KL ratios, worst, perplexities."""
    star = "\\*" if r["extrapolated"] else ""
    ratios = [
        f"{x:.3f}" if r["spread"][text] is None else f"{x:.3f} ± {r['spread'][text]:.3f}"
        for text, x in r["ratio"].items()
    ]
    shown = next(iter(r["perplexity"].values()))
    return [
        named(r["method"]) + mark,
        f"{r['evaluations']:.0f}{star}",
        f"{r['seconds']:.1f}{star}",
        *ratios,
        *(f"{x:.3f}" for x in r["worst"].values()),
        *(f"{x:.2f}" if perplexities else "-" for x in shown.values()),
    ]


def requests_block(name, beside=None):
    """What 64 requests cost, and how good the answers are. beside: a comparison whose methods
    are shown too, marked †, because it was tested on fewer tokens."""
    table = requests_of(name)
    texts = [TEXTS[text] for text in table[0]["ratio"]]
    rows = [cells_of(r) for r in table]
    if beside:
        extra = [r for r in requests_of(beside) if r["method"] != "uniform"]
        at = 1 + [r["method"] for r in table].index(UNICUCO)
        rows[at:at] = [cells_of(r, " †", perplexities=False) for r in extra]
    head = [
        "method",
        "evaluations",
        "seconds",
        *(f"KL ratio, {t}" for t in texts),
        *(f"worst, {t}" for t in texts),
        *(f"perplexity, {texts[0]}, at {s:g}" for s in next(iter(table[0]["perplexity"].values()))),
    ]
    return markdown(head, rows)


def compare_present():
    return requests_block("tiny-refitted")


def compare_present_says():
    return bullets(says("tiny-refitted"))


def compare_present_at():
    return at_block("tiny-refitted")


def compare_matrices():
    return requests_block("tiny-matrices")


def compare_matrices_says():
    return bullets(says("tiny-matrices"))


def compare_large():
    return requests_block("tiny-large")


def compare_large_says():
    return bullets(says("tiny-large"))


# of one seed and the same tokens
BUDGETS = ("smollm2-opponents", "smollm2-blocks", "smollm2-matrices", "smollm2-any-two")
BUDGETS += ("smollm2-dynamic",)


def budgets():
    """Rows of `requests_table` of all BUDGETS, uniform left out: each is the unit of its own."""
    return [r for name in BUDGETS for r in requests_of(name) if r["method"] != "uniform"]


def smollm2_budgets():
    """KL over uniform's at every budget of EvoPress, and what 64 requests cost."""
    table = budgets()
    columns = sorted({(t, s) for r in table for t, at in r["at"].items() for s in at})
    lines = []
    for r in table:
        cells = (f"{r['at'][t][s]:.3f}" if s in r["at"][t] else "-" for t, s in columns)
        lines.append([named(r["method"]), f"{r['evaluations']:.0f}", *cells])
    head = [f"{TEXTS[t]} at {s:g}" for t, s in columns]
    return markdown(["KL over uniform's", "evaluations for 64 requests", *head], lines)


def smollm2_budgets_says():
    """Which budget of each form of EvoPress reaches UniCuCo, at each sparsity, over both texts."""
    sentences = []
    for ours, theirs in report.opponents(budgets()):
        form = report.family(theirs[0]["method"])
        for s in sorted(next(iter(theirs[-1]["at"].values()))):
            sentences.append(f"{form} at {s:g}: {reached(ours, theirs, s)}")
    return bullets(sentences)


def reached(ours, theirs, sparsity):
    """The least budget of `theirs`, rows from the smallest on, whose KL is not above `ours`."""
    mean = lambda r: statistics.geometric_mean(at[sparsity] for at in r["at"].values())
    enough = [r for r in theirs if mean(r) <= mean(ours)]
    r = enough[0] if enough else theirs[-1]
    times = r["evaluations"] / ours["evaluations"]
    requests = comparison(BUDGETS[0])[0]["requests"]
    spent = f"{r['evaluations'] / requests:.0f} evaluations a request have {mean(r):.3f}"
    verdict = "the least to reach" if enough else "not yet"
    return f"{spent}, {verdict} UniCuCo's {mean(ours):.3f}, at {times:.0f} times its evaluations."


# {model: the comparisons that stand side by side; a method is read of the first that has it}
RIVALS = {
    "embedded, 5.5M": ("tiny-refitted", "tiny-curvature", "tiny-matrices", "tiny-large"),
    "SmolLM2-135M": ("smollm2-opponents", "smollm2-curvature", "smollm2-dynamic")
    + ("smollm2-blocks", "smollm2-matrices", "smollm2-any-two", "smollm2"),
    "Qwen2.5-Coder-0.5B": ("qwen05-seed0", "qwen05-refit", "qwen05-evopress"),
    "Qwen2.5-Coder-1.5B": ("qwen15",),
}
SCORED = {
    "unicuco": "**StratNet**",
    "curvature": "**StratNet, nothing measured**",
    "dynamic": "dynamic programming",
    "global": "one threshold for all weights",
    "owl": "OWL, best of 12",
    "dlp": "DLP",
    **{b: f"EvoPress, {b} for each, best form" for b in (104, 416, 1664)},
}


def scored(method):
    """What a method of compare.py stands under in SCORED and REFITTED_AS."""
    budget = re.search(r"EvoPress, (\d+) each", method)
    keys = {name: key for key, name in METHODS.items()}
    return int(budget[1]) if budget else keys.get(method, method)


def scores(names):
    """{key of SCORED: (KL over uniform's at 0.5, evaluations for all requests)} of one model, with
    nothing refitted, geometric mean over texts; of EvoPress's forms the best of each budget."""
    found = {}
    for r in (r for name in names for r in requests_of(name)):
        key = scored(r["method"])
        ratios = [at[0.5] for at in r["at"].values() if 0.5 in at]
        if key not in SCORED or not ratios:
            continue
        score = statistics.geometric_mean(ratios), r["evaluations"]
        if isinstance(key, int) or key not in found:
            found[key] = min(score, found.get(key, score))
    return found


def scoreboard():
    """Every method beside uniform pruning at 0.5, on every model."""
    found = {model: scores(names) for model, names in RIVALS.items()}
    lines = []
    for key, name in SCORED.items():
        spent = sorted({round(of[key][1]) for of in found.values() if key in of})
        cells = [f"{of[key][0]:.2f}" if key in of else "-" for of in found.values()]
        lines.append([name, " to ".join(map(str, (spent[0], spent[-1])[: len(spent)])), *cells])
    head = ["KL over uniform's at 0.5, as pruned", "evaluations for 64 requests", *found]
    return markdown(head, lines)


# {model: rows of what was refitted there}
REFITTED_ON = {
    "embedded, 5.5M": lambda: comparison("tiny-rivals")[1],
    "SmolLM2-135M": lambda: comparison("smollm2-rivals")[1],
    "Qwen2.5-Coder-0.5B": qwen05_refitted,
}
REFITTED_AS = {
    "uniform": "uniform, over its KL as pruned",
    "curvature": "**StratNet**",
    **{key: name for key, name in SCORED.items() if key != "curvature"},
    "unicuco": "StratNet as searched",
    "SparseGPT, its masks": "SparseGPT, its masks and update",
}


def refitted_scores(rows):
    """{key of REFITTED_AS: KL over refitted uniform's at 0.5}, geometric mean over texts and seeds;
    and under "uniform" refitted uniform's over uniform's as pruned."""
    found = {}
    for r in report.refitted_table(rows):
        key = scored(r["method"])
        if r["sparsity"] == 0.5:
            ratios = r["of_bare_uniform" if key == "uniform" else "ratio"]
            score = statistics.geometric_mean(ratios)
            found[key] = min(score, found.get(key, score))
    return found


def scoreboard_refitted():
    """The same where all are refitted alike, but SparseGPT, which does so itself."""
    found = {model: refitted_scores(read()) for model, read in REFITTED_ON.items()}
    lines = [
        [name, *(f"{of[key]:.2f}" if key in of else "-" for of in found.values())]
        for key, name in REFITTED_AS.items()
        if any(key in of for of in found.values())
    ]
    return markdown(["KL over refitted uniform's at 0.5", *found], lines)


def compare_tiny():
    return requests_block("tiny")


def compare_tiny_full():
    return requests_block("tiny-full")


def compare_smollm2():
    return requests_block("smollm2", beside="smollm2-constant")


def says(name):
    """What compare.py prints about quality and speed."""
    inputs, rows = comparison(name)
    sentences = []
    for ours, theirs in report.opponents(requests_table(rows, inputs)):
        sentences.append(report.compared(ours, theirs[-1]))
        sentences += printed(report.show_speed, ours, theirs, inputs["requests"])
    return sentences


def compare_tiny_says():
    return bullets(says("tiny"))


def compare_tiny_full_says():
    return bullets(says("tiny-full"))


def compare_smollm2_says():
    return bullets(says("smollm2"))


def at_block(name):
    """KL ratio to uniform at every sparsity, by method and text."""
    table = requests_of(name)
    asked = sorted({s for r in table for s in next(iter(r["at"].values()))})
    rows = []
    for r in table:
        for text, at in r["at"].items() if r["method"] != "uniform" else ():
            cells = (f"{at[s]:.3f}" if s in at else "-" for s in asked)
            rows.append([f"{named(r['method'])}, {TEXTS[text]}", *cells])
    return markdown(["KL ratio to uniform at", *(f"{s:g}" for s in asked)], rows)


def compare_smollm2_at():
    return at_block("smollm2")


def paired(rows, method, other):
    """{sparsity: KL of `method` over that of `other`, one for each seed, geometric mean over the
    texts}, where both were measured."""
    rows = [r for r in rows if r["table"] == "requests"]
    kl = {(r["method"], r["sparsity"], r["seed"], r["text"]): r["kl"] for r in rows}
    texts = list(grouped(rows, "text"))
    found = {}
    for s, seed in sorted(grouped(rows, "sparsity", "seed")):
        if (method, s, seed, texts[0]) in kl and (other, s, seed, texts[0]) in kl:
            ratios = (kl[method, s, seed, t] / kl[other, s, seed, t] for t in texts)
            found.setdefault(s, []).append(statistics.geometric_mean(ratios))
    return found


def paired_block(name):
    """UniCuCo's KL over that of each other method: below 1 it wins."""
    _, rows = comparison(name)
    methods = [m for m in grouped(rows, "method") if m not in (UNICUCO, "dense")]
    against = {m: paired(rows, UNICUCO, m) for m in methods}
    asked = sorted({s for of in against.values() for s in of})
    lines = [
        [m, *(pm(of[s], 3) if s in of else "-" for s in asked)] for m, of in against.items() if of
    ]
    return markdown(["UniCuCo's KL over that of", *(f"{s:g}" for s in asked)], lines)


def compare_tiny_paired():
    return paired_block("tiny")


def compare_smollm2_paired():
    return paired_block("smollm2")


# ------------------------------------------------------------------------- long texts and tasks
def tasks_smollm2():
    return tasks_block("smollm2")


def tasks_qwen05():
    return tasks_block("qwen05-tasks")


def tasks_block(name):
    """KL, perplexity and zero-shot accuracy of the first seed's models."""
    _, rows = comparison(name)
    long = grouped([r for r in rows if r["table"] == "long"], "method", "sparsity")
    lines = []
    for r in tasks_table(rows):
        read = long[r["method"], r["sparsity"]][0]
        lines.append(
            [
                named(r["method"]),
                f"{r['sparsity']:g}",
                f"{read['kl']:.4f}",
                f"{read['ppl']:.2f}",
                *(f"{r[task]:.1f}" for task in r["documents"]),
                f"{r['average']:.1f}",
                pair(r["below_dense"]),
                pair(r["above_uniform"]),
            ]
        )
    names = ["PIQA", "ARC-Easy", "ARC-Challenge", "HellaSwag", "WinoGrande"]
    judged = ["average", "below dense", "above uniform"]
    return markdown(["model", "sparsity", "KL", "perplexity", *names, *judged], lines)


def long_smollm2():
    """KL ratio and perplexities over seeds, on long texts."""
    _, rows = comparison("smollm2")
    table = long_table(rows)
    lines = []
    for r in table:
        ratio = pm(r["each_seed"][r["text"]], 3)
        lines.append([named(r["method"]), f"{r['sparsity']:g}", ratio])
        lines[-1] += [f"{x:.2f}" for x in r["ppl"]]
    seeds = (f"perplexity, seed {seed}" for seed in grouped(rows, "seed"))
    return markdown(["method", "sparsity", "KL ratio to uniform", *seeds], lines)


def long_smollm2_says():
    _, rows = comparison("smollm2")
    sentences = []
    for s, mine in grouped(long_table(rows), "sparsity").items():
        for ours, theirs in report.opponents(mine):
            sentences.append(f"At {s:g}: {report.compared(ours, theirs[-1])}")
    return bullets(sentences)


# --------------------------------------------------------------------------- what bench.py wrote
def sequential():
    rows = read_json(results("sequential-smollm2.json"))["rows"]
    keys = ("kl", "sequential_kl", "ppl", "sequential_ppl")
    digits = (4, 4, 2, 2)
    lines = [[f"{r['sparsity']:g}", *(f"{r[k]:.{n}f}" for k, n in zip(keys, digits))] for r in rows]
    head = ["uniform sparsity", "KL, default", "KL, `--sequential`"]
    return markdown([*head, "perplexity, default", "perplexity, `--sequential`"], lines)


def stages():
    return stages_block("smollm2")


def stages_tiny():
    return stages_block("tiny")


def stages_block(name):
    rows = read_json(results(f"stages-{name}.json"))["rows"]
    lines = [[r["stage"], f"{r['ratio']:.2f}", r["against"], r["bar"]] for r in rows]
    return markdown(["stage", "ratio", "against", "bar"], lines)


def slopes():
    rows = read_json(results("stages-smollm2.json"))["slopes"]
    lines = []
    for r in rows:
        times = ", ".join(f"{n}: {t:.4f}" for n, t in zip(r["sizes"], r["seconds"]))
        lines.append([r["cost"], r["over"], f"{r['slope']:.2f}", times])
    return markdown(["cost", "grows with", "slope", "seconds at each size"], lines)


def counted():
    """Llama 2 on shapes alone: what each stage of prune.py touches, computes and holds."""
    models = read_json(results("counted-llama2.json"))["models"]
    lines = [
        [
            f"{model}, {r['stage']}",
            f"{r['peak'] / 1e9:.1f}",
            f"{r['bytes'] / 1e9:.0f}",
            f"{r['bytes_per_weight']:.1f}",
            f"{r['flops'] / 1e12:.1f}",
            f"{r['kernels']}",
            f"{r['waits']}",
        ]
        for model, found in models.items()
        for r in found["rows"]
    ]
    head = ["*counted, not run*", "peak GB", "GB touched", "bytes a block weight", "TFLOP"]
    return markdown([*head, "kernels", "waits"], lines)


BLOCKS = {
    block.__name__.replace("_", "-"): block
    for block in (
        tiny,
        tiny_verdict,
        tiny_seeds,
        tiny_run,
        refit_tiny,
        refit_tiny_perplexity,
        refit_smollm2_says,
        smollm2_short,
        smollm2_left,
        qwen05_real,
        qwen05_perplexity,
        qwen15,
        sizes,
        scoreboard,
        refitted_tiny,
        refitted_smollm2,
        refitted_tiny_says,
        rivals_tiny_says,
        refitted_rivals,
        refitted_rivals_says,
        refitted_qwen05,
        scoreboard_refitted,
        qwen05_evopress_says,
        smollm2_budgets,
        smollm2_budgets_says,
        compare_present,
        compare_present_says,
        compare_present_at,
        compare_matrices,
        compare_matrices_says,
        compare_large,
        compare_large_says,
        coverage,
        beside_evopress,
        smollm2_real,
        smollm2_unmeasured,
        smollm2_real_perplexity,
        smollm2_predicted,
        smollm2_predicted_says,
        damages,
        sinks,
        compare_tiny,
        compare_tiny_says,
        compare_tiny_paired,
        compare_tiny_full,
        compare_tiny_full_says,
        compare_smollm2,
        compare_smollm2_says,
        compare_smollm2_paired,
        compare_smollm2_at,
        tasks_smollm2,
        tasks_qwen05,
        long_smollm2,
        long_smollm2_says,
        sequential,
        stages,
        stages_tiny,
        slopes,
        counted,
    )
}


# -------------------------------------------------------------------------- where it comes from
def source(name):
    """How results/NAME was made: what its run recorded, over what results/sources.json says.

    returns   "command", "commit", "inputs" (model, texts, digests, device, dtype, threads) and,
              where they are known, "torch", "note", and "rerun" for checks/drift.py
    """
    known = read_json(RESULTS / "sources.json").get(name, {})
    beside = (RESULTS / name).with_suffix(".provenance.json")
    content = json.loads((beside if beside.exists() else RESULTS / name).read_text("utf-8"))
    content = content if isinstance(content, dict) else {}
    inputs = content.get("inputs", {})
    recorded = inputs.get("provenance") or content.get("provenance") or content
    made = {key: recorded[key] for key in ("command", "commit", "torch") if key in recorded}
    threads = {"threads": recorded["threads"]} if "threads" in recorded else {}
    return known | made | {"inputs": threads | inputs | known.get("inputs", {})}


def digests(inputs):
    """[(model or text, its digest or None where nobody noted it)] that a result depends on."""
    pairs = [(inputs.get("data"), inputs.get("sha256")), *inputs.get("tests", {}).items()]
    weights = [(inputs.get("model"), digest) for digest in inputs.get("weights", [])]
    return [(name, digest) for name, digest in weights + pairs if name]


def sentence(name):
    """(the line of one results file under its tables, its commit)."""
    made, seed = source(name), re.search(r"-seed(\d)\.json$", name)
    command, inputs = made["command"], made["inputs"]
    if seed:
        command = command.replace(f"--seed {seed[1]}", "--seed N")
    of = [f"{n} {d[:8] if d else '(hash unknown)'}" for n, d in digests(inputs)] or [
        inputs["model"]
    ]
    how = ", ".join(f"{key} {inputs.get(key, 'unknown')}" for key in ("device", "dtype", "threads"))
    torch = f", torch {made['torch']}" if "torch" in made else ""
    note = f" ({made['note']})" if "note" in made else ""
    said = f"made by `{command}` at COMMIT; {', '.join(of)}; {how}{torch}{note}"
    return said, made["commit"] or "an unknown commit"


def made_by(names):
    """What made the results files `names`: a line for those of one command."""
    groups = {}
    for name in names:
        said, commit = sentence(name)
        groups.setdefault(said, {})[name] = commit
    lines = []
    for said, of in groups.items():
        commits = " and ".join(dict.fromkeys(of.values()))
        lines.append(f"{', '.join(of)}: {said.replace('COMMIT', commits)}.")
    return "  \n".join(lines)


# ------------------------------------------------------------------------------------ the pages
def block(name):
    """A block's text, and the results files that it was made of."""
    opened.clear()
    return BLOCKS[name](), list(dict.fromkeys(opened))


def files():
    """The names of all results files."""
    beside = ("sources.json", ".provenance.json")
    return sorted(p.name for p in RESULTS.glob("*.json") if not p.name.endswith(beside))


def used():
    """{results file: the tables that it is in, as words}."""
    found = {}
    for name in BLOCKS:
        text, made_of = block(name)
        for file in made_of if text.startswith("| ") else ():
            found.setdefault(file, []).append(name)
    return {file: " ".join(names) for file, names in found.items()}


def fill(page, sources=False):
    """The text of a page with every block made anew; sources: what made a table stands under it,
    whole where the page names its file first.
    """
    told = set()

    def under(files):
        lines = [made_by(new)] if (new := [f for f in files if f not in told]) else []
        again = [f for f in files if f in told]
        told.update(files)
        return "  \n".join(lines + ([f"{', '.join(again)}: see above."] if again else []))

    def made(match):
        if match[1] not in BLOCKS:
            raise Refused(f"no table is called {match[1]}: tables.py has {', '.join(BLOCKS)}")
        text, files = block(match[1])
        source = f"\n\n{under(files)}" if sources and text.startswith("| ") else ""
        return f"<!-- table:{match[1]} -->\n{text}{source}\n<!-- end -->"

    return re.sub(r"<!-- table:([\w-]+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def write():
    """Rewrite the blocks of both pages; returns the names of those that changed."""
    changed = []
    for name, sources in PAGES.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        filled = fill(page, sources)
        if filled != page:
            write_text(ROOT / name, filled)
            changed.append(name)
    return changed
