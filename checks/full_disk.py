"""
Disks that are full and folders that cannot be written: one line on stderr, exit code 2, and nothing
half written.

What      prune.py (plain, packed, --force over an old folder, --json) and train.py, where there is
          room for a part of the output only:
          on a tmpfs of a few sizes where mounting is allowed, and everywhere with a limit on the
          size of a file (RLIMIT_FSIZE);
          then into a folder below a file, and, unless run by root, into one without the right to
          write.
Run       python -m checks.full_disk                 (57 runs, 20 s of processor time)
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

import prune
import train
from checks.kills import commands, contents, outcome, script


@contextlib.contextmanager
def small_disk(place, size):
    """A file system of `size` bytes at `place`; yields False where mounting is not allowed."""
    place.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True
        ).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)


def limit(size):
    """For `script`: no file may grow beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def refused(main, words, before=lambda: None):
    """Whether the script ended with exit code 2 and one line; it may succeed too."""
    code, said, *_ = script(main, words, before)
    assert (
        code == 0
        and not said
        or code == 2
        and len(said.splitlines()) == 1
        and "Traceback" not in said
    ), (code, words, said)
    return code == 2


def check_prune(root, place, prune_line, before=lambda: None):
    """Both layouts, onto nothing and, where it fits, over an old folder: (runs, refused)."""
    runs = stopped = 0
    for more in ([], ["--packed"]):
        for over in (False, True):
            out, table = place / "out" / "pruned", place / "table.json"
            if over:
                try:
                    shutil.copytree(root / "old", out)
                except shutil.Error:  # not even the old folder fits
                    shutil.rmtree(place / "out")
                    continue
            old, runs = contents(out), runs + 1
            failed = refused(
                prune.main,
                [*prune_line, *more, "--sparsity", 0.6, "--out", out, "--json", table],
                before,
            )
            left = contents(out)
            assert (
                left == old
                and failed
                or len(left) == 5
                and left != old
                and table.exists() != failed
            ), (more, over, failed, left.keys())
            assert not table.exists() or json.loads(table.read_text())
            expected = {"out", "pruned", "table.json", "table.provenance.json", *left}
            assert {p.name for p in place.rglob("*")} <= expected, list(place.rglob("*"))
            stopped += failed
            shutil.rmtree(place / "out", ignore_errors=True)
            for path in place.glob("table.*"):
                path.unlink()
    return runs, stopped


def check_train(root, place, train_line, before=lambda: None):
    """A run of train.py: (1, refused)."""
    out = place / "run"
    failed = refused(train.main, [*train_line, "--out", out], before)
    assert (outcome(out) is None) == failed
    assert not [p for p in place.rglob("*") if p.name.startswith(".")], list(place.rglob("*"))
    shutil.rmtree(out, ignore_errors=True)
    return 1, int(failed)


def limited_sizes(root, lines, quick):
    """(runs, refused) where no file may be larger than some bytes."""
    counts = []
    for size in (1000, 12_000) if quick else (0, 300, 1000, 4500, 12_000, 15_000):
        (place := root / f"limit{size}").mkdir()
        counts.append(check_prune(root, place, lines[0], limit(size)))
    for size in () if quick else (100, 1200, 100_000):
        (place := root / f"limit-train{size}").mkdir()
        counts.append(check_train(root, place, lines[1], limit(size)))
    return total("file size limited", counts)


def small_disks(root, lines, quick):
    """(runs, refused) on file systems of a few pages; none where nobody may mount one."""
    counts = []
    for pages in (10,) if quick else (4, 8, 10, 12, 16, 20, 40):
        with small_disk(root / f"disk{pages}", 4096 * pages) as mounted:
            if not mounted:
                print("no right to mount a small file system here")
                break
            counts.append(check_prune(root, root / f"disk{pages}", lines[0]))
    for pages in () if quick else (2, 4, 100, 300):
        with small_disk(root / f"disk-train{pages}", 4096 * pages) as mounted:
            if mounted:
                counts.append(check_train(root, root / f"disk-train{pages}", lines[1]))
    return total("small disks", counts)


def nowhere(root, lines):
    """(runs, refused) where nothing can be written at all."""
    places = [root / "text.txt" / "out"]
    if os.geteuid():
        (root / "closed").mkdir(0o500)
        places.append(root / "closed" / "out")
    for out in places:
        assert refused(prune.main, [*lines[0], "--sparsity", 0.5, "--out", out])
        assert refused(train.main, [*lines[1], "--out", out])
    return total("nowhere to write", [(2, 2)] * len(places))


def total(where, counts):
    runs, stopped = (sum(column) for column in zip(*counts)) if counts else (0, 0)
    print(f"{where}: {stopped} of {runs} runs refused", flush=True)
    return runs, stopped


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("--quick", action="store_true", help="prune.py alone, with two sizes")
    quick = p.parse_args().quick
    started = time.perf_counter()
    torch.set_num_threads(1)  # a fork has no other threads
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        lines = commands(root)
        assert not refused(prune.main, [*lines[0], "--sparsity", 0.3, "--out", root / "old"])
        counts = [limited_sizes(root, lines, quick), small_disks(root, lines, quick)]
        counts.append(nowhere(root, lines))
    runs, stopped = (sum(column) for column in zip(*counts))
    print(
        f"{runs} runs in {time.perf_counter() - started:.0f} s, {stopped} refused in one line,"
        " nothing half written"
    )


if __name__ == "__main__":
    main()
