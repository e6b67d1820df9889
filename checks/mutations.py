"""
Do the tests notice? Break the code on purpose, one place at a time, and run the tests of its file.

Breaks    first those of NAMED, each of which all tests once let pass; then some drawn from the
          syntax tree, so a renamed line breaks nothing: a comparison or an operator turned round,
          a number moved by one, a condition negated, an assignment dropped, an option of the
          command line ignored, one text taken for another.
Run       python checks/mutations.py                 (NAMED and 40 more, 30 minutes on one core)
          python checks/mutations.py --named
          python checks/mutations.py --files gp.py --count 10 --seed 3
          python checks/mutations.py --kinds option text --count 999
A break is caught when a test fails, and survives when all pass: each survivor is printed, to be
read by a person, for some breaks change nothing that matters. Of NAMED none may survive: exit code
1. The folder is copied: nothing here changes; in the copy as it is all tests must pass, for
otherwise every break would count as caught.
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
    "unicuco.py": ["test_unicuco.py", "test_train.py"],
    "curvature.py": ["test_curvature.py"],
    "refit.py": ["test_refit.py"],
    "model.py": ["test_llama.py"],
    "llama.py": ["test_llama.py"],
    "tokenizer.py": ["test_tokenizer.py", "test_llama.py"],
    "eval.py": ["test_eval.py"],
    "prune.py": ["test_prune.py", "test_request.py", "test_refit.py", "test_train.py"],
    "patterns.py": ["test_prune.py"],
    "offload.py": ["test_prune.py", "test_refit.py", "test_cuda.py"],
    "ranks.py": ["test_prune.py", "test_refit.py"],
    "request.py": ["test_request.py", "test_prune.py"],
    "train.py": ["test_train.py"],
    "baselines.py": ["test_compare.py", "test_opponents.py"],
    "compare.py": ["test_compare.py"],
    "report.py": ["test_compare.py", "test_plot.py"],
    "plot.py": ["test_plot.py"],
    "tables.py": ["test_plot.py"],
    "script.py": ["test_script.py"],
}
# {file: [(text that is in it once, what it becomes, what that breaks)]}: none may survive again
NAMED = {
    "prune.py": [
        (
            "self.divergence = Divergence(self.model, self.test)",
            "self.divergence = Divergence(self.model, self.calibration)",
            "KL is measured on the calibration windows",
        ),
        (
            "Pruner(self.model, self.calibration, args.metric)",
            "Pruner(self.model, self.calibration)",
            "--metric is ignored",
        ),
        (
            "draw(windows, [wanted, searched], args.seed)",
            "draw(windows, [wanted, searched], 0)",
            "windows are drawn whatever --seed says",
        ),
        (
            "seqlen, args.seed, enough)",
            "seqlen, 0, enough)",
            "documents are drawn whatever --seed says",
        ),
        (
            "self.dense_ppl = self.divergence.measure()[1]",
            "self.dense_ppl = 1.0 + self.divergence.measure()[1]",
            "the dense model's perplexity is wrong",
        ),
        (
            'places = [Path("out") / model_folder.resolve().name / name, model_folder / name]',
            'places = [model_folder / name, Path("out") / model_folder.resolve().name / name]',
            "the StratNet beside the model wins over that of the last run",
        ),
        (
            "searched = max(1, search_tokens // seqlen)",
            "searched = max(1, search_tokens // seqlen // 2)",
            "f2 is measured on half of --tokens",
        ),
        (
            '"weights": [sha256(path) for path in weight_files(args.model)],',
            '"weights": [sha256(path) for path in list(weight_files(args.model))[:1]],',
            "a run depends on the first shard alone",
        ),
    ],
    "train.py": [
        (
            "F2(pruner, setting.search)",
            "F2(pruner, next(iter(setting.held_out.values())))",
            "the search measures on the test text",
        ),
        (
            "    pruner.restore()\n    references = ",
            "    references = ",
            "the table's dense reference is a pruned model",
        ),
        (
            "pruner = Pruner(setting.model, setting.calibration, args.metric)",
            "pruner = Pruner(setting.model, setting.search, args.metric)",
            "scores are of the windows of f2",
        ),
        (
            "pruner = Pruner(setting.model, setting.calibration, args.metric)",
            "pruner = Pruner(setting.model, setting.calibration)",
            "--metric is ignored",
        ),
        (
            "search(measure, layout, settings, args.seed, curves, measure.show)",
            "search(measure, layout, settings, 0, curves, measure.show)",
            "the search ignores --seed",
        ),
        (
            "how = args.mean, args.granularity, args.seed",
            'how = "curvature", args.granularity, args.seed',
            "--mean is ignored",
        ),
    ],
    "unicuco.py": [
        (
            "times * s.final_steps, 0.0, g, rate=rate)",
            "times * s.final_steps, 0.5, g, rate=rate)",
            "the last StratNet is trained on the bound, not on the mean",
        ),
        (
            "        nn.utils.clip_grad_norm_(net.parameters(), 1.0)\n",
            "",
            "gradients are not clipped",
        ),
    ],
    "eval.py": [
        (
            "order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))",
            "order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))",
            "windows are drawn the same for every seed",
        ),
    ],
    "tokenizer.py": [
        (
            'bool(self.settings.get("add_bos_token", True)) and self.bos_id >= 0',
            "self.bos_id >= 0",
            "add_bos_token is ignored",
        ),
    ],
    "script.py": [
        (
            "    with replacing(path) as partial:\n"
            '        partial.write_text(text, encoding="utf-8")',
            '    Path(path).write_text(text, encoding="utf-8")',
            "a file is written in its place, where a reader sees half of it",
        ),
    ],
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
# {who has it: {its windows: the others that it has}}
SETTING = {"calibration": "search", "search": "calibration"}
SERVICE = {"calibration": "test", "test": "calibration"}
OTHER_TEXT = {"setting": SETTING, "self": SERVICE, "service": SERVICE}


def wiring_breaks(node):
    """Breaks of an attribute: what a function is handed is not what it should be."""
    named = isinstance(node.value, ast.Name) and node.value.id
    if named == "args" and node.attr in OPTIONS:
        ignored = ast.parse(IGNORED, mode="eval").body
        return [("option", lambda n: setattr(n, "value", ignored))]
    other = OTHER_TEXT.get(named, {}).get(node.attr)
    return [("text", lambda n: setattr(n, "attr", other))] if other else []


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


def passes(tests, scratch):
    """Whether these test files pass in the copy as it is now."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(words, cwd=scratch, capture_output=True, timeout=600).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def notices(file, source, scratch):
    """Whether the tests of `file` fail with `source` in its place."""
    kept = (scratch / file).read_text()
    (scratch / file).write_text(source)
    try:
        return not passes(TESTS[file], scratch)
    finally:
        (scratch / file).write_text(kept)


def broken(file, number, do):
    """The file's source with one break, and the line that it is in."""
    tree = copy.deepcopy(ast.parse((ROOT / file).read_text()))
    node = list(ast.walk(tree))[number]
    do(node)
    return ast.unparse(ast.fix_missing_locations(tree)), node.lineno


def check_named():
    """Refuse to begin when a text of NAMED is not in its file, or there twice: nobody would see
    that its break is tried no more; nor may the break be one of syntax, which any test notices.
    """
    for file, named in NAMED.items():
        source = (ROOT / file).read_text()
        for text, replacement, what in named:
            ast.parse(source.replace(text, replacement))
            if source.count(text) != 1:
                sys.exit(f"{file} has {source.count(text)} times, not once: {text!r} ({what})")


def named_breaks(files):
    """[(file, its source with the break, what that breaks)] of NAMED."""
    return [
        (file, (ROOT / file).read_text().replace(text, replacement), what)
        for file in files
        for text, replacement, what in NAMED.get(file, [])
    ]


def drawn_breaks(files, kinds, count, seed):
    """[(file, its source with the break, what and where)] drawn from the syntax trees, and of how
    many.
    """
    found = [
        (file, *place)
        for file in files
        for place in places(ast.parse((ROOT / file).read_text()))
        if place[1] in kinds
    ]
    drawn = []
    for file, number, what, do in random.Random(seed).sample(found, min(count, len(found))):
        source, line = broken(file, number, do)
        drawn.append((file, source, f"{what} in line {line}"))
    return drawn, len(found)


def survivors(tried, scratch):
    """Try the breaks and print those that no test notices, with their file: how many."""
    survived = 0
    for file, source, what in tried:
        if not notices(file, source, scratch):
            survived += 1
            print(f"survived: {file}, {what}", flush=True)
    return survived


def check_unbroken(files, scratch):
    for tests in sorted({tuple(TESTS[file]) for file in files}):
        if not passes(tests, scratch):
            sys.exit(f"{' '.join(tests)}: fails without any break, in a copy of this folder")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--files", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--count", type=int, default=40, help="breaks that are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--named", action="store_true", help="those of NAMED alone")
    return parser.parse_args()


def main():
    args = arguments()
    check_named()
    named = named_breaks(args.files)
    count = 0 if args.named else args.count
    drawn, possible = drawn_breaks(args.files, args.kinds, count, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "copy"
        shutil.copytree(ROOT, scratch, ignore=shutil.ignore_patterns(".git", "out"))
        check_unbroken({file for file, *_ in named + drawn}, scratch)
        came_back = survivors(named, scratch)
        if named:
            print(f"{len(named) - came_back} of {len(named)} named breaks caught")
        if drawn:
            caught = len(drawn) - survivors(drawn, scratch)
            print(f"{caught} of {len(drawn)} breaks caught, of {possible} possible")
    sys.exit(bool(came_back))


if __name__ == "__main__":
    main()
