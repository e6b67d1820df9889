"""
Do the stored numbers still come out? One cheap row of every results file, measured again.

Run       python plot.py --check                                 (the embedded model, 2 minutes)
          python plot.py --check --model DIR --data FILE --test FILE FILE    (SmolLM2-135M too)
Rows      those that "rerun" in results/sources.json names. A strategy that stands in its row is
          measured as it is: nothing is searched.
Exit      1 if a number drifted. A row whose model or text is not here is said, and is no drift.
"""

import argparse
import json
import sys
from functools import cache, partial

import torch

import tables
from checks import counted
from curvature import gradient_norms
from eval import Divergence
from prune import prepare, sources, tests
from ranks import Pruner
from refit import follow, row_counts
from script import DTYPES, TINY
from simcuda import simulated
from train import first_tokens

# Kernels of other machines add in another order. With units for bfloat16 and without, KL differed
# by up to 0.05 %; between float32 and bfloat16 by 0.6 %, so rows are rerun in their own dtype.
TOLERANCE = 0.005
# A refit amplifies rounding: with H = x^T x off by 1e-7 of its elements, KL of one refit of the
# embedded model came out at 0.1194 to 0.1197, on other processors at 0.1192 and 0.1198.
TOLERANCE_REFITTED = 0.01


# ------------------------------------------------------------------------------- what can be rerun
def picked(name, wanted):
    """The first row of results/NAME with the fields `wanted`; its text is called "text"."""
    content = json.loads((tables.RESULTS / name).read_text("utf-8"))
    rows = content["rows"] if isinstance(content, dict) else content
    row = next(row for row in rows if wanted.items() <= row.items())
    return {"text": row.get("test"), **row}


@cache
def here(model, data, test):
    """Digests of what there is to measure with: those of the weights, and {text: digest}."""
    args = argparse.Namespace(model=model, data=data, test=test, dtype=None)
    args.tokens = args.calibration = args.seqlen = None
    inputs = sources(args)
    texts = {inputs["data"]: inputs["sha256"], **tests(args)}
    return inputs["weights"], {name: digest or "" for name, digest in texts.items()}


def missing(inputs, files):
    """What a result was made with that `files`, (model, data, tests) or None, are not: words."""
    weights, texts = here(*files) if files else ([], {})
    needs = []
    for name, digest in tables.digests(inputs):
        found = weights if name == inputs["model"] else [texts[name]] if name in texts else []
        if not any(f.startswith(digest or "") for f in found):
            needs.append(f"{name} {digest[:8]}" if digest else name)
    return ", ".join(needs)


# --------------------------------------------------------------------------------------- measuring
def measured(rows, files, calibration, seed, dtype):
    """KL now of `rows`, which share their calibration windows, in their order.

    Every text is read once, as far as the longest row asks: the others are its first windows.
    """
    names = dict(zip(("model", "data", "test"), files))
    args = argparse.Namespace(**names, seqlen=None, calibration=calibration, seed=seed)
    setting = prepare(args, torch.device("cpu"), DTYPES[dtype], 2048)
    pruner = Pruner(setting.model, setting.calibration)
    longest = {r["text"]: max(q["tokens"] for q in rows if q["text"] == r["text"]) for r in rows}
    texts = {
        text: Divergence(setting.model, first_tokens(setting.held_out, tokens)[text])
        for text, tokens in longest.items()
    }
    g_norms = cache(partial(gradient_norms, pruner, setting.calibration, seed))
    known, now = {}, []
    for row in rows:
        refit = is_refitted(row)
        strategy = row.get("strategy", [row["sparsity"]] * len(setting.model.blocks))
        divergence, key = texts[row["text"]], (tuple(strategy), refit, row["text"])
        if key not in known:
            if refit:
                follow(pruner, row_counts(pruner, strategy, g_norms()), setting.calibration)
            else:
                pruner.apply(torch.tensor(strategy, dtype=torch.float64))
            divergence.measure()
            known[key] = divergence.of_windows.double()
        now.append(float(known[key][: row["tokens"] // divergence.windows.shape[1]].mean()))
    return now


def is_refitted(row):
    return bool(row.get("refit")) or row.get("table") == "refitted"


def gigabytes(name, stage):
    """What Llama-2-7B touches in its first stage: as stored, and as counted now."""
    models = json.loads((tables.RESULTS / name).read_text("utf-8"))["models"]
    stored = next(r for r in models["Llama-2-7B"]["rows"] if r["stage"] == stage)
    windows = torch.zeros(counted.TOKENS["cuda"] // counted.SEQLEN, counted.SEQLEN).long()
    with simulated(values=False, answer=1.0) as log:
        model = counted.empty_model(counted.SHAPES["Llama-2-7B"], counted.CUDA)
        with log.at(stage):
            Divergence(model, windows)
    return stored["bytes"] / 1e9, log.counts[stage]["bytes"] / 1e9


# -------------------------------------------------------------------------------------- the report
def say(name, what, stored, now, used, tolerance=TOLERANCE):
    """Print one comparison; whether the number drifted."""
    gap = abs(now - stored) / max(stored, 1e-12)
    drifted = not gap <= tolerance  # NaN too
    print(
        f"{name:<29} {what:<28} {stored:9.4f} {now:9.4f} {100 * gap:6.2f} %"
        f"  {'DRIFTED' if drifted else 'ok':<7}  {used}",
        flush=True,
    )
    return drifted


def plan(given):
    """{what rows share: [(results file, row)]} to measure; prints what is not rerun, and why.

    given    (model, data, tests) of the command line, or None
    """
    groups = {}
    for name in tables.files():
        made = tables.source(name)
        inputs, how = made["inputs"], made.get("rerun", "results/sources.json names no row")
        files = (TINY, None, None) if inputs.get("model") == "tiny" else given
        if isinstance(how, str):
            print(f"{name:<29} not rerun: {how}")
        elif "stage" in how:
            groups[name] = [(name, how)]
        elif needs := missing(inputs, files):
            flags = (
                f": --model DIR --data {inputs['data']} --test {' '.join(inputs.get('tests', []))}"
            )
            print(f"{name:<29} needs {needs if files else inputs['model'] + flags}")
        else:
            for row in (picked(name, wanted) for wanted in how["rows"]):
                seed = row.get("seed", how.get("seed", 0))
                key = files, how["calibration"], seed, inputs["dtype"]
                groups.setdefault(key, []).append((name, row))
    return groups


def main(args):
    given = (args.model, args.data, tuple(args.test or ())) if args.model else None
    groups, drifted, used = plan(given), 0, tables.used()
    print(f"\n{'results/':<29} {'row':<28} {'stored':>9} {'now':>9}      gap           in tables")
    for key, cases in groups.items():
        if "stage" in cases[0][1]:
            name, stage = key, cases[0][1]["stage"]
            drifted += say(name, f"{stage}, GB", *gigabytes(name, stage), used.get(name, ""))
            continue
        rows = [row for _, row in cases]
        for (name, row), kl in zip(cases, measured(rows, *key)):
            what, tolerance = f"{row['method']} at {row['sparsity']:g}", TOLERANCE
            if is_refitted(row):
                what, tolerance = what + ", refitted", TOLERANCE_REFITTED
            drifted += say(name, what, row["kl"], kl, used.get(name, ""), tolerance)
    allowed = f"{100 * TOLERANCE:g} %, a refit {100 * TOLERANCE_REFITTED:g} %"
    print(f"{drifted} drifted by more than {allowed}" if drifted else "nothing drifted")
    sys.exit(1 if drifted else 0)
