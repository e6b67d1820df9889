"""
Do the tests notice? Break the code on purpose, one place at a time, and run the tests of its file.

Breaks    found in the syntax tree, so a renamed line breaks nothing: a comparison or an operator
          turned round, a number moved by one, a condition negated, an assignment dropped, an
          option of the command line ignored, one text taken for another.
Run       python checks/mutations.py                          (40 breaks, 10 minutes on one core)
          python checks/mutations.py --files gp.py --count 10 --seed 3
          python checks/mutations.py --kinds option text --count 999
A break is caught when a test fails, and survives when all pass: each survivor is printed, to be
read by a person, for some breaks change nothing that matters. The folder is copied: nothing here
changes.
"""

import argparse
import ast
import copy
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "gp.py": ["test_gp.py"],
    "unicuco.py": ["test_unicuco.py"],
    "curvature.py": ["test_curvature.py"],
    "refit.py": ["test_refit.py"],
    "model.py": ["test_llama.py"],
    "llama.py": ["test_llama.py"],
    "eval.py": ["test_eval.py"],
    "prune.py": ["test_prune.py", "test_request.py", "test_refit.py"],
    "patterns.py": ["test_prune.py"],
    "ranks.py": ["test_prune.py", "test_refit.py"],
    "request.py": ["test_request.py", "test_prune.py"],
    "train.py": ["test_train.py"],
    "baselines.py": ["test_compare.py", "test_opponents.py"],
    "compare.py": ["test_compare.py"],
    "report.py": ["test_compare.py", "test_plot.py"],
    "script.py": ["test_script.py"],
}
OPPOSITE = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


KINDS = "comparison operator number condition assignment option text".split()
# options that could be ignored without a crash, as if nobody had given them
IGNORED = "__import__('types').SimpleNamespace(metric='wanda', seed=0, mean='curvature')"
OPTIONS = "metric", "seed", "mean"
OTHER_TEXT = {"calibration": "search", "search": "calibration", "test": "calibration"}


def wiring_breaks(node):
    """Breaks of an attribute: what a function is handed is not what it should be."""
    named = isinstance(node.value, ast.Name) and node.value.id
    if named == "args" and node.attr in OPTIONS:
        ignored = ast.parse(IGNORED, mode="eval").body
        return [("option", lambda n: setattr(n, "value", ignored))]
    if named in ("self", "setting", "service") and node.attr in OTHER_TEXT:
        return [("text", lambda n: setattr(n, "attr", OTHER_TEXT[n.attr]))]
    return []


def breaks(node):
    """[(what, function that does it to a node of the same kind)] of one node of a syntax tree."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITE:
        return [("comparison", lambda n: n.ops.__setitem__(0, OPPOSITE[type(n.ops[0])]()))]
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPPOSITE:
        return [("operator", lambda n: setattr(n, "op", OPPOSITE[type(n.op)]()))]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return [("number", lambda n: setattr(n, "value", n.value + 1))]
    if isinstance(node, ast.If):
        return [("condition", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test)))]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        return wiring_breaks(node)
    if isinstance(node, ast.AugAssign):
        return [("assignment", lambda n: setattr(n, "value", ast.Constant(0)))]
    return []


def places(tree):
    """(number of the node in walking order, what, break) of every place that can be broken."""
    return [(k, what, do) for k, node in enumerate(ast.walk(tree)) for what, do in breaks(node)]


def notices(file, source, scratch):
    """Whether the tests of `file` fail with `source` in its place."""
    kept = (scratch / file).read_text()
    (scratch / file).write_text(source)
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS[file]]
    try:
        done = subprocess.run(words, cwd=scratch, capture_output=True, timeout=300)
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        (scratch / file).write_text(kept)


def broken(file, number, do):
    """The file's source with one break, and the line that it is in."""
    tree = copy.deepcopy(ast.parse((ROOT / file).read_text()))
    node = list(ast.walk(tree))[number]
    do(node)
    return ast.unparse(ast.fix_missing_locations(tree)), node.lineno


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--files", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = [
        (file, *place)
        for file in args.files
        for place in places(ast.parse((ROOT / file).read_text()))
        if place[1] in args.kinds
    ]
    chosen = random.Random(args.seed).sample(found, min(args.count, len(found)))
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "copy"
        shutil.copytree(ROOT, scratch, ignore=shutil.ignore_patterns(".git", "out", "results"))
        for file, number, what, do in chosen:
            source, line = broken(file, number, do)
            noticed = notices(file, source, scratch)
            caught += noticed
            if not noticed:
                print(f"survived: {what} in {file}, line {line}", flush=True)
    print(f"{caught} of {len(chosen)} breaks caught, of {len(found)} possible")


if __name__ == "__main__":
    main()
