"""
Zero-shot scores document by document: eval.py beside EleutherAI's lm-evaluation-harness 0.4.13,
both in float32 on the CPU.

Source    the harness as it is installed: its task files, its HFLM model with transformers, its
          `evaluate`. One thing is replaced:
          where it would download a data set, it gets the rows of the file that eval.py reads.
Needs     pip install "lm_eval[hf]==0.4.13" tokenizers      (no other file of this folder imports
          it)
Not here  the tokenizer's parity: the column "tokens" counts documents whose token ids differ, and
          no score can be equal there. It is 0
          where both read one tokenizer.json; not for tiny/, whose tokenizer.model transformers
          reads with a space in front.

Run       python -m checks.harness --model DIR --tasks zeroshot/ --limit 100
          (SmolLM2-135M: 13 minutes on one busy core, 8 of them computing; ends with "every choice
          is the same")
"""

import importlib.metadata
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np

import eval as evaluation
from eval import TASKS, read_rows
from llama import load_llama
from script import Parser, Refused, at_least, first_line, run


def harness(folder, tasks, limit):
    """Run the harness on the first `limit` documents of each task in the folder `tasks`.

    returns   {task: {"pairs": each choice's (token ids, how many are scored), all documents in a
              row,
              "scores": each document's log-likelihoods (choices,) in nats,
              "acc", "acc_norm": each document's chosen index and whether it is right; winogrande
              has no acc_norm}}
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # all it needs is here
    try:
        import datasets
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Refused(
            f'this check needs the harness ({first_line(error)}): pip install "lm_eval[hf]==0.4.13"'
        ) from None
    model, manager, result = (
        HFLM(pretrained=str(folder), dtype="float32", device="cpu"),
        TaskManager(),
        {},
    )
    for name in TASKS:
        rows = datasets.Dataset.from_list(read_rows(tasks, name, limit))
        splits = {split: rows for split in ("train", "validation", "test")}
        with mock.patch("datasets.load_dataset", return_value=splits):
            loaded = manager.load(name)
        samples = evaluate(model, loaded, bootstrap_iters=0)["samples"][name]
        samples = sorted(samples, key=lambda s: s["doc_id"])
        result[name] = of_samples(model, samples, loaded["tasks"][name].doc_to_choice)
    return result


def of_samples(model, samples, choices_of):
    """What `harness` returns of one task, from the harness's own samples."""
    encoded = [model._encode_pair(*arguments) for s in samples for arguments in s["arguments"]]
    scores = [np.array([score for score, _ in s["filtered_resps"]]) for s in samples]
    lengths = [np.array([len(choice) for choice in choices_of(s["doc"])]) for s in samples]
    # as its process_results chooses
    chosen = {"acc": scores, "acc_norm": [x / n for x, n in zip(scores, lengths)]}
    pairs = [(context + scored, len(scored)) for context, scored in encoded]
    return {"pairs": pairs, "scores": scores} | {
        metric: ([int(x.argmax()) for x in chosen[metric]], [s[metric] == 1 for s in samples])
        for metric in samples[0]["metrics"]
    }


def zero_shot(model, tokenizer, task, rows):
    """The same for eval.zero_shot, whose arguments these are."""
    seen, measure = [], evaluation.log_likelihoods
    with mock.patch.object(
        evaluation,
        "log_likelihoods",
        lambda m, pairs, label: seen.extend([pairs, measure(m, pairs, label)]) or seen[1],
    ):
        r = evaluation.zero_shot(model, tokenizer, task, rows)
    ends = np.cumsum([len(evaluation.prompts(task, row)[0]) for row in rows])
    chosen = {"acc": r["predictions"], "acc_norm": r["predictions_norm"]}
    return {"pairs": seen[0], "scores": np.split(seen[1].numpy(), ends[:-1])} | {
        metric: (c, [i == g for i, g in zip(c, r["gold"])])
        for metric, c in chosen.items()
        if c is not None
    }


def differences(theirs, ours):
    """{column: documents that differ} of one task, and the largest gap between scores, in nats."""
    ends = np.cumsum([0, *map(len, ours["scores"])])
    assert [len(x) for x in theirs["scores"]] == np.diff(ends).tolist(), (
        "every document has as many choices on both sides"
    )
    pairs = ((theirs["pairs"][i:j], ours["pairs"][i:j]) for i, j in zip(ends, ends[1:]))
    differ = {"tokens": sum(a != b for a, b in pairs)}
    for metric in ("acc", "acc_norm"):
        if metric in theirs:
            both = zip(zip(*theirs[metric]), zip(*ours[metric]))
            differ[metric] = sum(a != b for a, b in both)
    gaps = (float(np.abs(x - y).max()) for x, y in zip(theirs["scores"], ours["scores"]))
    return differ, max(gaps)


def show(task, theirs, ours):
    """Print the line of a task: how many choices differ."""
    differ, largest = differences(theirs, ours)
    both = (m for m in ("acc", "acc_norm") if m in theirs)
    means = (f"{np.mean(theirs[m][1]):.4f}, {np.mean(ours[m][1]):.4f}" for m in both)
    print(
        f"{task:<14} {len(ours['scores']):>9}  {differ['tokens']:>6}  {differ['acc']:>5}"
        f"  {differ.get('acc_norm', ''):>8}  {largest:>7.1e} nats    {'    '.join(means)}",
        flush=True,
    )
    return differ["acc"] + differ.get("acc_norm", 0)


def arguments():
    p = Parser(__doc__, ["python -m checks.harness --model DIR --tasks zeroshot/ --limit 200"])
    folder, files = "Hugging Face folder", "folder with " + ", ".join(TASKS.values())
    p.add_argument("--model", type=Path, required=True, metavar="DIR", help=folder)
    p.add_argument("--tasks", type=Path, required=True, metavar="DIR", help=files)
    first = "first N documents of each task (default: all)"
    p.add_argument("--limit", type=int, metavar="N", help=first)
    args = p.parse_args()
    at_least(args, 1, "limit")
    return args


def main():
    args = arguments()
    rows = {task: read_rows(args.tasks, task, args.limit) for task in TASKS}
    model, tokenizer = load_llama(args.model)
    results = harness(args.model, args.tasks, args.limit)
    versions = [importlib.metadata.version(name) for name in ("lm_eval", "transformers")]
    print(
        f"{args.model.resolve().name} in float32: lm_eval {versions[0]} with transformers"
        f" {versions[1]}, then eval.py\n"
        "                          documents that differ in   largest\n"
        "task           documents  tokens    acc  acc_norm    difference    acc"
        "               acc_norm"
    )
    wrong = sum(
        show(task, theirs, zero_shot(model, tokenizer, task, rows[task]))
        for task, theirs in results.items()
    )
    print(f"{wrong} choices differ" if wrong else "every choice is the same")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    run(main)
