"""
Runs that are killed, at any moment: the old result or the new one is there, complete, or none; and
the next run is not confused.

What      prune.py --force over an old result, and train.py, on a model of one block: half of the
          kills (SIGKILL) come after a random
          time, half just before a random file operation (open to write, rename, remove, ...), so
          that the narrow moments are met too.
Checked   prune.py: the folder is absent, or every file of it equals the old or the new one; the
          same command then succeeds and leaves
          nothing else. train.py: every file is absent or whole; --resume ends with the results of
          an undisturbed run.
How       everything is imported once, each run is a fork of that.

Run       python -m checks.kills                     (56 runs, at least 50 killed; 2 minutes)
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import prune
import train
from checks.fuzz import TEXT, make_folders
from script import read_json, run
from unicuco import load_stratnet

WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile")


class FileOperations:
    """Counts what this process does to files, and kills it before operation number `at`."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __call__(self, event, args):
        if event in WRITES or event == "open" and opened_to_write(args):
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def opened_to_write(args):
    path, _, flags = args
    writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
    return writes and "/dev/" not in str(path)


def in_the_fork(main, words, before, operations, stderr):
    """Run the script's `main` in this process, a fork: its exit code."""
    try:
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        os.dup2(stderr, 2)
        sys.argv = list(map(str, words))
        sys.addaudithook(operations)
        before()
        run(main)
        return 0
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1


def script(main, words, before=lambda: None, at=None, after=None):
    """Run the script's `main` with the command line `words` in a fork: (exit code, -9 if killed;
    stderr; file operations; seconds).

    at        number of the file operation before which it kills itself;  after: seconds after which
              it is killed
    before    called in the fork, to limit what it may use
    """
    started, (reading, writing), (errors, stderr) = time.perf_counter(), os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        operations = FileOperations(at)
        code = in_the_fork(main, words, before, operations, stderr)
        os.write(writing, str(operations.count).encode())
        os._exit(code)
    os.close(writing)
    os.close(stderr)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reading) as f, os.fdopen(errors) as said:
        return code, said.read(), int(f.read() or -1), time.perf_counter() - started


def commands(root):
    """A model of one block, a text, and the command lines of prune.py and train.py for them."""
    make_folders(root / "good")
    (root / "text.txt").write_text(TEXT)
    common = [
        "--model",
        root / "good" / "plain",
        "--data",
        root / "text.txt",
        "--calibration",
        2,
        "--seqlen",
        64,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    return (
        ["prune.py", *common, "--uniform", "--tokens", 64, "--force"],
        [
            "train.py",
            *common,
            "--initial",
            4,
            "--rounds",
            1,
            "--batch",
            2,
            "--tokens",
            64,
            "--test-tokens",
            64,
        ],
    )


def contents(folder):
    """{file name: bytes} of a folder, {} if it is absent; of a record without what a clock says."""
    files = {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}
    return {
        name: raw
        if name != "strategy.json"
        else {k: v for k, v in json.loads(raw).items() if k != "seconds"}
        for name, raw in files.items()
    }


def outcome(folder):
    """Every file of a run of train.py is absent or whole; returns its results without times, None
    where there are none yet.
    """
    for name in ("settings.json", "evaluations.0.json"):
        assert not (folder / name).exists() or read_json(folder / name)
    stratnet, results, measured = (
        folder / "stratnet.safetensors",
        folder / "results.json",
        folder / "measured.json",
    )
    assert not stratnet.exists() or load_stratnet(stratnet, 1)
    if not results.exists():
        return None
    return json.loads(measured.read_text()), [
        {k: v for k, v in row.items() if k != "seconds"} for row in json.loads(results.read_text())
    ]


def moments(kills, operations, seconds, r):
    """`kills` keyword arguments for `script`: before each file operation in random order, and as
    many after random times.
    """
    order = r.sample(range(operations), operations)
    return [
        {"at": order[i // 2 % operations]} if i % 2 else {"after": 0.9 * seconds * r.random()}
        for i in range(kills)
    ]


def check_prune(root, prune_line, kills, r):
    """-> killed, old folder still there, none, new one already there, file operations of a run."""
    out, seen = root / "out" / "pruned", [0, 0, 0, 0]
    old_line, new_line = (
        [*prune_line, "--out", out, "--sparsity", s, *more]
        for s, more in ((0.3, []), (0.6, ["--packed"]))
    )
    assert script(prune.main, new_line)[0] == 0
    new = contents(out)
    assert script(prune.main, old_line)[0] == 0
    old = contents(out)
    shutil.copytree(out, root / "old")
    code, _, operations, seconds = script(prune.main, new_line)
    assert code == 0 and contents(out) == new != old and os.listdir(root / "out") == ["pruned"]
    for moment in moments(kills, operations, seconds, r):
        shutil.rmtree(out)
        shutil.copytree(root / "old", out)
        code, *_ = script(prune.main, new_line, **moment)
        left = contents(out)
        assert code in (0, -9) and left in ({}, old, new), (code, moment, left.keys())
        seen[0] += code == -9
        seen[1 + ({}, old, new).index(left)] += 1
        assert (
            script(prune.main, new_line)[0] == 0
            and contents(out) == new
            and os.listdir(root / "out") == ["pruned"]
        ), moment
    return seen[0], seen[2], seen[1], seen[3], operations


def check_train(root, train_line, kills, r):
    """-> (killed, without results, file operations of one run)"""
    out, killed, unfinished = root / "run", 0, 0
    code, _, operations, seconds = script(train.main, [*train_line, "--out", out])
    undisturbed = outcome(out)
    assert code == 0 and undisturbed
    for i, moment in enumerate(moments(kills, operations, seconds, r)):
        here = root / f"run{i}"
        code, *_ = script(train.main, [*train_line, "--out", here], **moment)
        killed, unfinished = killed + (code == -9), unfinished + (outcome(here) is None)
        assert code in (0, -9) and outcome(here) in (None, undisturbed), moment
        assert (
            script(train.main, [*train_line, "--out", here, "--resume"])[0] == 0
            and outcome(here) == undisturbed
        ), moment
    return killed, unfinished, operations


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("--prune", type=int, default=36, help="runs of prune.py to kill (36)")
    p.add_argument("--train", type=int, default=20, help="runs of train.py to kill (20)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    a = p.parse_args()
    started, r = time.perf_counter(), random.Random(a.seed)
    torch.set_num_threads(1)  # a fork has no other threads
    with tempfile.TemporaryDirectory() as root:
        prune_line, train_line = commands(Path(root))
        killed, old, none, new, operations = check_prune(Path(root), prune_line, a.prune, r)
        assert killed
        print(
            f"prune.py: {killed} of {a.prune} runs killed before their end; then {old} times the"
            f" old folder, {none} times none, {new} times the new",
            flush=True,
        )
        killed_, unfinished, operations_ = (
            check_train(Path(root), train_line, a.train, r) if a.train else (0, 0, 0)
        )
        print(
            f"train.py: {killed_} of {a.train} runs killed before their end, {unfinished} without"
            " results; all resumed to the same results"
        )
    print(f"prune.py has {operations} file operations, train.py {operations_}")
    print(
        f"{killed + killed_} kills in {time.perf_counter() - started:.0f} s, nothing half written"
    )


if __name__ == "__main__":
    main()
