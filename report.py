"""
What the rows of a comparison say: tables, each a group-by of flat rows, and how they are printed.

Reading   beside compare.py, which makes the rows, and tables.py, which puts the same tables on both
          pages. Nothing is measured here.
Rows      one for each seed, method, sparsity and text; "table" says what was measured: requests,
          refitted, long, tasks.
"""

import json
import math
import statistics

import numpy as np

from eval import TASKS, standard_error
from script import Refused, read_json, strict, write_text

QUICK = (0.3, 0.4, 0.5, 0.6, 0.7)  # requests that a baseline is measured on, unless --full
ENDS = (0.2, 0.75)  # what costs no search is measured there too
PERPLEXITIES = (0.5, 0.6, 0.7)
METHODS = {
    "owl": "OWL, best of 12",
    "unicuco": "UniCuCo",
    "constant": "UniCuCo, constant mean",
    "curvature": "UniCuCo, nothing measured",
    "gp": "GP per request",
    "evopress": "EvoPress",
    "matrices": "matrix EvoPress",
    "dlp": "DLP",
    "dynamic": "dynamic programming",
    "magnitude": "magnitude, uniform",
    "global": "global threshold",
}
# what 64 requests cost no more searches than one
SINGLE = ("unicuco", "constant", "curvature", "dlp", "dynamic", "magnitude", "global")
SHARED = ("uniform", *(METHODS[name] for name in SINGLE))


# --------------------------------------------------------------------------------- rows, on disk
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


# ---------------------------------------------------------------------------------------- tables
def family(method):
    """The method without its budget: "EvoPress" of "EvoPress, 104 each"."""
    return method.split(",")[0] if method.endswith(" each") else method


def grouped(rows, *keys):
    """{value of the keys: rows that have it}, in the order of the rows; several keys: a tuple."""
    groups = {}
    for r in rows:
        values = tuple(r[key] for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(r)
    return groups


def with_ratios(rows, table):
    """The rows of one table, pruned models alone, each with its KL over that of uniform in the
    same seed, on the same text, at the same sparsity; NaN where that has none."""
    rows = [r for r in rows if r["table"] == table and r["method"] != "dense"]
    same = ("seed", "text", "sparsity")
    base = {tuple(r[k] for k in same): r["kl"] for r in rows if r["method"] == "uniform"}
    return [r | {"ratio": r["kl"] / base.get(tuple(r[k] for k in same), math.nan)} for r in rows]


def spread(values):
    """Standard deviation over seeds; None of a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def extrapolates(inputs):
    """Where fewer requests are served than asked, what one of them cost is multiplied."""
    return not {*requests_asked(inputs["requests"])} <= {*inputs["served"]}


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
    extrapolated = extrapolates(inputs)
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
            {s: statistics.mean(r["ppl"] for r in by_sparsity[s]) for s in perplexities(served)},
        )
        for column, value in zip(columns, values):
            result[column][text] = value
    return result


def perplexities(served):
    """The sparsities whose perplexity a table says."""
    return [s for s in PERPLEXITIES if s in served]


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
    """A row for each model, the dense one first: accuracies in percent, {task: acc}, "average";
    "below_dense" and "above_uniform": how far that lies below the dense model's and above that of
    uniform pruning to the same sparsity, (percent, standard error), or None where there is no such
    model; "documents" of each task."""
    models = grouped([r for r in rows if r["table"] == "tasks"], "method", "sparsity")
    right = {
        model: {r["text"]: np.array(list(r["right"]), int) for r in mine}
        for model, mine in models.items()
    }
    table = []
    for (method, s), mine in models.items():
        own, uniform = right[method, s], right.get(("uniform", s))
        others = uniform is not None and method != "uniform"
        table.append(
            {
                "method": method,
                "sparsity": s,
                "documents": {r["text"]: r["documents"] for r in mine},
                **{r["text"]: 100 * r["acc"] for r in mine},
                "average": 100 * statistics.mean(r["acc"] for r in mine),
                "below_dense": None if method == "dense" else paired(right["dense", 0.0], own),
                "above_uniform": paired(own, uniform) if others else None,
            }
        )
    return table


def paired(ours, theirs):
    """How much higher the average accuracy of `ours` is than that of `theirs`, in percent, and its
    standard error, paired by document; both {task: array of right (1) and wrong (0)}."""
    changes = [ours[task] - theirs[task] for task in ours]
    error = math.sqrt(sum(standard_error(change) ** 2 for change in changes)) / len(changes)
    return 100 * statistics.mean(float(change.mean()) for change in changes), 100 * error


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


def opponents(table):
    """[(UniCuCo's row of a table, rows of EvoPress, smallest budget first)], once for each of its
    forms, over blocks and over matrices, that the table has."""
    ours = [r for r in table if r["method"] == METHODS["unicuco"]]
    forms = [
        [r for r in table if r["method"].startswith(METHODS[name])]
        for name in ("evopress", "matrices")
    ]
    return [(ours[0], theirs) for theirs in forms if ours and theirs]


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
    if extrapolates(inputs):
        count = len(inputs["served"])
        said = (
            f"{count} {'sparsity was' if count == 1 else 'sparsities were'} measured per method;"
            " (*) extrapolated:"
            f" seconds and evaluations per request, times {inputs['requests']}."
        )
    several = "s" if seeds > 1 else ""
    print(f"\n{inputs['requests']} requests from 0.2 to 0.75, {seeds} seed{several}. {said}")
    for text, mine in grouped([r for r in rows if r["table"] == "requests"], "text").items():
        show_text(table, text, mine[0]["tokens"], inputs["served"])
    for ours, theirs in opponents(table):
        print("\n" + compared(ours, theirs[-1]))
        show_speed(ours, theirs, inputs["requests"])


def show_text(table, text, tokens, served):
    at = ", ".join(map(str, perplexities(served)))
    print(
        f"\n{text}, {tokens} tokens that neither calibration nor search saw; KL as a ratio to"
        f" uniform's at equal counted sparsity, geometric mean over {served[0]:g} to"
        f" {served[-1]:g}\n"
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


def show_refitted(rows):
    """Print what is left of every method's gain when all survivors are refitted."""
    print(
        "\nSurvivors refitted, all methods alike; KL over that of refitted uniform, and over that"
        f" of uniform as pruned\n{'method':<32} sparsity   refitted    as pruned   perplexity"
    )
    for r in refitted_table(rows):
        means = [statistics.mean(r[key]) for key in ("ratio", "of_bare_uniform", "ppl")]
        ratio = "-" if math.isnan(means[0]) else f"{means[0]:.3f}"
        print(
            f"{r['method']:<32} {r['sparsity']:8.2f} {ratio:>10} {means[1]:12.3f} {means[2]:12.2f}"
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
    budget = best["method"].removesuffix(" each").split(", ")[1]
    print(
        f"At equal quality: no budget of {family(best['method'])} up to {budget} reaches"
        f" UniCuCo's KL ratio of {quality:.3f} (its best: {min(qualities):.3f}), so more than"
        f" {factor:.0f} times faster."
    )


def show_tasks(rows):
    """Print accuracies in percent, their average, how far it lies below the dense model's and above
    that of uniform pruning, with standard errors; KL and perplexity of the same models beside
    them."""
    table = tasks_table(rows)
    long = grouped([r for r in rows if r["table"] == "long"], "method", "sparsity")
    first = long["dense", 0.0][0]
    documents = ", ".join(str(count) for count in table[0]["documents"].values())
    print(
        f"\n{first['text']}, {first['tokens']} tokens;"
        f" zero-shot accuracy in %, {documents} documents\n"
        f"{'method':<24} sparsity       KL  perplexity   "
        + "".join(f"{task:>14}" for task in TASKS)
        + "   average     below dense   above uniform"
    )
    for r in table:
        read = long[r["method"], r["sparsity"]][0]
        print(
            f"{r['method']:<24} {r['sparsity']:8.2f} {read['kl']:8.4f} {read['ppl']:11.3f}   "
            + "".join(f"{r[task]:14.1f}" for task in TASKS)
            + f"{r['average']:10.1f}"
            + "".join(f"   {pair(r[key]):>13}" for key in ("below_dense", "above_uniform"))
        )


def pair(found):
    """(value, its error) as it is printed, None as "-"."""
    return "-" if found is None else f"{found[0]:.1f} ± {found[1]:.1f}"


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
        for ours, theirs in opponents(mine):
            print(f"At {s}: {compared(ours, theirs[-1])}")


def seeds_of(rows):
    return [str(seed) for seed in grouped(rows, "seed")]
