"""
What every command shares: errors in one line, files complete or absent, the same answer twice.

Run       pytest test_script.py        (each tolerance has its dtype beside it)
"""

import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import llama
import plot
import prune
import script
import train
from checks import fuzz
from conftest import ROOT, call, place_all, refuses, run_script, write_small
from llama import Tokenizer
from script import Journal, new_folder, replacing, strict, write_json, write_text


def test_the_hash_of_a_large_file_is_right_and_takes_little_memory(tmp_path):
    path = tmp_path / "weights"
    raw = b"some weights" + bytes(2**25)  # 32 MB
    path.write_bytes(raw)
    tracemalloc.start()
    digest = script.sha256(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert digest == hashlib.sha256(raw).hexdigest() and peak < 2**22


def test_json_holds_neither_nan_nor_infinity(tmp_path):
    for rows, value in (
        (False, {"a": [math.nan, (1.5, {"b": -math.inf})], "c": "NaN", "d": None, "e": True}),
        (True, [{"a": math.inf}, 2]),
    ):
        write_json(tmp_path / "x.json", value, rows)
        assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == strict(
            value
        )
    assert strict({"a": [math.nan, (1.5, {"b": -math.inf})], "c": "NaN"}) == {
        "a": [None, [1.5, {"b": None}]],
        "c": "NaN",
    }


def test_provenance_names_the_command_without_folders_of_the_machine(tmp_path, monkeypatch):
    for words, command in (
        ([ROOT / "train.py", "--seed", "1"], "python train.py --seed 1"),
        ([ROOT / "checks" / "coverage.py"], "python -m checks.coverage"),
        ([tmp_path / "my run.py", "a b"], "python 'my run.py' 'a b'"),
        ([ROOT / "plot.py", "--out", tmp_path / "mine"], "python plot.py --out mine"),
    ):
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        assert script.provenance() == script.provenance()
        assert script.provenance()["command"] == command


def test_the_commit_is_that_of_the_own_clone_and_none_where_git_is_missing(tmp_path, monkeypatch):
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"):
        monkeypatch.setenv(name, "a")
        monkeypatch.setenv(name.replace("NAME", "EMAIL"), "a@example.org")
    (tmp_path / "copy").mkdir()
    (tmp_path / "a").write_text("1")
    for words in (("init", "-q"), ("add", "a"), ("commit", "-qm", "a")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    clean = script.commit(tmp_path)
    (tmp_path / "a").write_text("2")
    assert re.fullmatch("[0-9a-f]{7,}", clean) and script.commit(tmp_path) == f"{clean}-dirty"
    assert script.commit(tmp_path / "copy") is None
    monkeypatch.setenv("PATH", str(tmp_path / "copy"))
    assert script.commit(tmp_path) is None


def test_a_file_or_a_folder_appears_when_it_is_complete_and_the_old_one_stays_when_it_is_not(
    tmp_path,
):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    for force, error in ((False, None), (True, RuntimeError)):
        folder = tmp_path / "folder"
        try:
            with new_folder(folder, force) as partial:
                (partial / "LICENSE").write_text("new" if force else "old")
                (partial / "strategy.json").write_text('{"strategy": []}')
                assert not list(folder.glob("*")) or force
                if error:
                    raise error
        except RuntimeError:
            pass
        assert (folder / "LICENSE").read_text() == "old" and sorted(os.listdir(tmp_path)) == [
            "a.json",
            "folder",
        ]
    with pytest.raises(ValueError, match="exists already"), new_folder(folder):
        pass


def test_what_a_killed_run_left_is_cleared_away_and_a_folder_that_it_had_moved_aside_comes_back(
    tmp_path,
):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("ha")
    (tmp_path / ".out.old.partial").mkdir()
    (tmp_path / ".out.old.partial" / "a").write_text("old")
    with pytest.raises(ValueError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def check(name, *words):
    """What `python -m checks.NAME` prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", f"checks.{name}", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_of_hundreds_of_mutated_inputs_is_read_or_refused_in_one_line(
    good, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(
        fuzz, "TOKENIZER", Tokenizer(place_all(good, tmp_path / "good") / "plain", 320)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line on stderr
        outcomes = [fuzz.read(*fuzz.mutated(good, "test", i), tmp_path) for i in range(400)]
    assert 40 < sum(outcomes) < 300  # neither all harmless nor all refused at the door
    assert capfd.readouterr().err == "" and {p.name for p in tmp_path.iterdir()} == {
        "good",
        "in",
        "out",
    }


def test_the_fuzzer_reads_or_refuses_what_hypothesis_chooses():
    done = check("fuzz", "--count", 12, "--seed", 7)
    assert re.fullmatch(r"\d+ inputs, \d+ read, the others refused in one line: 0 flaws\n", done), (
        done
    )


@pytest.mark.slow
def test_killed_runs_leave_the_old_result_the_new_one_or_none_and_the_next_run_goes_on():
    assert "kills in" in check("kills", "--prune", 6, "--train", 0)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_half_written():
    assert re.search(
        r"[1-9]\d* refused in one line, nothing half written", check("full_disk", "--quick")
    )


@pytest.mark.slow
def test_bad_files_end_in_one_line_and_exit_code_2_on_the_command_line(place, tmp_path):
    weights = load_file(place("plain") / "model.safetensors")
    cases = [
        {"config_json": fuzz.FIELDS | {"rope_scaling": [1]}},
        {"model_safetensors": weights | {"a\nb": torch.zeros(1)}},
        {"tokenizer.model": b"no"},
    ]
    for changed in cases:
        done = subprocess.run(
            [sys.executable, "llama.py", "--model", place("plain", **changed), "--tokens", "1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout, (
            done.stderr
        )


def test_ctrl_c_is_one_line_with_a_hint_and_130_and_a_closed_pipe_is_no_error(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        script.run(interrupted, ": a hint")
    assert end.value.code == 130 and capsys.readouterr().err == "\ninterrupted: a hint\n"
    program = "from script import run\nrun(lambda: [print('x' * 1000) for _ in range(1000)])"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
    assert script.choose_device("cpu", "float16")[:2] == (torch.device("cpu"), torch.float16)
    with pytest.raises(ValueError, match="--device"):
        script.choose_device("cuda:77")


def test_a_file_that_is_being_written_carries_its_machines_name(tmp_path):
    with script.replacing(tmp_path / "table.json") as partial:  # machines count processes alike
        assert socket.gethostname() in partial.name and str(os.getpid()) in partial.name
        partial.touch()


def test_a_folder_comes_back_when_its_replacement_fails(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "strategy.json").write_text('{"strategy": "old"}')
    with pytest.raises(RuntimeError):
        with new_folder(tmp_path / "model", force=True) as folder:
            (folder / "LICENSE").write_text("half")
            raise RuntimeError("the disk is full")
    rename = os.replace

    def fails(source, target):
        if (Path(source) / "LICENSE").exists():
            raise OSError("no")
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError):
            with new_folder(tmp_path / "model", force=True) as folder:
                (folder / "LICENSE").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and [
        p.name for p in (tmp_path / "model").iterdir()
    ] == ["strategy.json"]


def bad_inputs(small, text, tmp_path):
    """[(reason, script, its command line)]: the first five run as processes of their own."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("x = 1")
    (tmp_path / "one.txt").write_text("x = 1\n" * 40)  # 160 to 200 tokens: one window of 128
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    other = write_small(tmp_path / "other", vocab_size=100)
    out = ("--out", tmp_path / "out")
    base, half = (prune, "--model", small), (prune, "--sparsity", 0.5, "--model")
    again = (*half, small, "--data")
    strange = ("--stratnet", ROOT / "tiny" / "stratnet.safetensors")
    return [
        ("0.95 is outside", *base, "--sparsity", 0.95, *out),
        ("--initial must be", train, "--model", small, "--initial", 0, *out),
        ("--seqlen 4000: this model has 128", evaluation, "--model", small, "--seqlen", 4000),
        ("--tokens must be", llama, "--model", small, "--tokens", 0),
        ("measured.json is not there", plot, "--run", tmp_path),
        ("'x' is not a number", *base, "--sparsity", "x", *out),
        ("'nan' is not a number", *base, "--sparsity", "nan", *out),
        ("nothing is asked", *base, *out),
        ("nowhere is not a folder", *half, tmp_path / "nowhere", *out),
        ("broken holds neither", *half, tmp_path / "broken", *out),
        ("do not belong together", *half, other, *out),
        ("empty.txt is empty", *again, tmp_path / "empty.txt", *out),
        ("shorter than one window", *again, tmp_path / "short.txt", *out),
        ("one.txt is too short to be split", *again, tmp_path / "one.txt", *out),
        ("argument --seed", *base, "--sparsity", 0.5, "--seed", -1, *out),
        ("argument --seed", train, "--model", small, "--seed", 2**63, *out),
        ("for 12 blocks, the model has 3", *again, text, *strange, *out),
        ("existing exists already", *half, small, "--uniform", "--out", tmp_path / "existing"),
        ("cannot be read", train, "--model", small, "--data", tmp_path / "nowhere.txt", *out),
        ("broken holds neither", llama, "--model", tmp_path / "broken"),
    ]


@pytest.mark.slow
def test_bad_input_ends_in_one_line_and_exit_code_2_with_nothing_written(
    small, text, tmp_path, capsys
):
    cases = bad_inputs(small, text, tmp_path)
    (tmp_path / "existing").mkdir()

    def nothing_but_one_line(reason, module, code, error):
        said = reason, error
        assert code == 2 and len(error.strip().splitlines()) == 1, said
        assert error.startswith(module.__name__ + ".py: ") and reason in error, said
        assert not (tmp_path / "out").exists() and not list((tmp_path / "existing").iterdir())

    started = ThreadPoolExecutor(2).map(
        lambda case: run_script(case[1].__name__ + ".py", *case[2:]), cases[:5]
    )
    for (reason, module, *_), done in zip(cases, started):
        nothing_but_one_line(reason, module, done.returncode, done.stderr)
    for reason, module, *words in cases[5:]:
        capsys.readouterr()
        nothing_but_one_line(reason, module, call(module, *words), capsys.readouterr().err)


# ------------------------------------------------------------------------------------ errors
def test_a_bug_of_ours_keeps_its_traceback_and_bad_input_is_one_line():
    program = "from script import {0}, run\ndef main(): raise {1}('no\\nsense')\nrun(main)"
    for imported, error, code in (("Refused", "Refused", 2), ("fail", "ValueError", 1)):
        done = run_script("-c", program.format(imported, error))
        assert done.returncode == code and not done.stdout
        if error == "Refused":
            assert done.stderr == "-c: no sense\n"
        else:
            assert done.stderr.startswith("Traceback") and "in main" in done.stderr
            assert "ValueError: no" in done.stderr


def test_a_process_whose_peer_is_gone_says_so_in_one_line_whatever_they_exchange():
    program = (
        "from script import run, together\n"
        "def gone(x): raise RuntimeError('Connection closed by peer')\n"
        "run(lambda: together(gone, 1), ': what was written is whole')"
    )
    done = run_script("-c", program)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "a process of this run died: what was written is whole\n"


@pytest.mark.parametrize("bug", [ValueError, TypeError, AssertionError, KeyError, RuntimeError])
def test_no_error_but_refused_and_those_of_the_disk_is_turned_into_a_line(bug, capsys):
    def broken():
        raise bug("inside")

    with pytest.raises(bug, match="inside"):
        script.run(broken)
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------- journal
INPUTS = {"seed": 0, "model": "tiny", "sizes": (1, 2)}


def test_a_journal_makes_a_value_once_and_has_it_on_disk_at_once(tmp_path):
    path, made = tmp_path / "run" / "journal.json", []

    def make():
        made.append(1)
        return 1 / 3

    journal = Journal(path, INPUTS, resume=False)
    assert "a" not in journal and not path.exists()
    assert journal("a", make) == journal("a", make) == 1 / 3 and "a" in journal
    assert json.loads(path.read_text()) == {
        "inputs": {"seed": 0, "model": "tiny", "sizes": [1, 2]},
        "values": {"a": [1 / 3, journal.stamp]},
    }
    again = Journal(path, INPUTS, resume=True)
    assert again("a", make) == 1 / 3 and len(made) == 1
    again.remember("b", [math.nan, 2])
    read_back = Journal(path, INPUTS, resume=True).values
    assert read_back == {"a": 1 / 3, "b": [None, 2]}  # JSON has no NaN


def test_without_resume_a_journal_starts_empty_and_replaces_the_old_one_at_its_first_value(
    tmp_path,
):
    path = tmp_path / "journal.json"
    Journal(path, INPUTS, resume=False).remember("old", 1)
    before = path.read_bytes()
    fresh = Journal(path, INPUTS | {"seed": 1}, resume=False)
    assert fresh.values == {} and path.read_bytes() == before
    fresh.remember("new", 2)
    assert json.loads(path.read_text())["values"] == {"new": [2, fresh.stamp]}


def test_a_journal_of_another_run_is_refused_and_says_what_differs(tmp_path):
    path = tmp_path / "journal.json"
    Journal(path, INPUTS, resume=False).remember("a", 1)
    said = re.escape(f"{path} holds a run with another seed: 0, now 1")
    refuses(Journal, path, INPUTS | {"seed": 1}, True, match=said)
    refuses(Journal, path, INPUTS | {"more": 1}, True, match="another more: None, now 1")
    fewer = {"seed": 0, "model": "tiny"}
    refuses(Journal, path, fewer, True, match=re.escape("another sizes: [1, 2], now None"))


@pytest.mark.parametrize(
    "torn",
    [
        "",
        "[]",
        "{}",
        "\x00",
        '{"inputs": {"seed": 0}',
        json.dumps({"inputs": INPUTS, "values": []}),
        json.dumps({"inputs": [], "values": {}}),
    ],
)
def test_a_torn_or_foreign_journal_is_refused_in_one_line_and_left_as_it_is(tmp_path, torn):
    path = tmp_path / "journal.json"
    path.write_text(torn)
    refuses(Journal, path, INPUTS, True, match=re.escape(str(path)))
    assert path.read_text() == torn


def test_a_value_that_cannot_be_written_leaves_the_journal_of_before(tmp_path, monkeypatch):
    path = tmp_path / "journal.json"
    journal = Journal(path, INPUTS, resume=False)
    journal.remember("a", 1)

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError):
            journal.remember("b", 2)
    assert json.loads(path.read_text())["values"] == {"a": [1, journal.stamp]}
    assert os.listdir(tmp_path) == ["journal.json"]


# ------------------------------------------------------------------- two at once, links, streams
def test_of_two_that_write_one_folder_at_once_the_second_is_refused_and_the_first_ends_whole(
    tmp_path,
):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
        with pytest.raises(script.Refused, match="another process is writing"):
            with new_folder(tmp_path / "out"):
                pytest.fail("both write")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


def test_a_folder_that_was_renamed_before_it_could_be_locked_is_not_taken_for_a_new_one(tmp_path):
    (tmp_path / "gone").mkdir()
    handle = os.open

    def slow(path, *more):
        opened = handle(path, *more)
        os.rename(path, tmp_path / "finished")
        return opened

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", slow)
        with pytest.raises(script.Refused, match="busy"), script.locked(tmp_path / "gone", "busy"):
            pytest.fail("locked")


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o077, 0o600)])
def test_what_is_written_has_the_permissions_of_any_new_file(tmp_path, small, umask, mode):
    kept = os.umask(umask)
    try:
        write_text(tmp_path / "a", "text")
        llama.save_llama(llama.load_llama(small)[0], tmp_path / "model", small)
    finally:
        os.umask(kept)
    for path in (tmp_path / "a", tmp_path / "model" / "model.safetensors"):
        assert path.stat().st_mode & 0o777 == mode


ROWS = {"request", "kl"}, {"request", "unmet"}  # keys of the rows of a table of prune.py


def test_a_table_replaces_an_earlier_table_and_nothing_else(tmp_path):
    table, thesis = tmp_path / "table.json", tmp_path / "thesis.tex"
    script.refuse_to_overwrite(table, *ROWS)
    write_json(table, [{"request": "0.5", "kl": 0.1, "ppl": 9}, {"request": "x", "unmet": "no"}])
    script.write_provenance(table, script.provenance())
    script.refuse_to_overwrite(table, *ROWS)
    foreign = ('{"a": 1}', '[{"a": 1}]', "[" * 10**5, "[]", "{}", '""', '{"request": 1, "kl": 2}')
    for content in (*foreign, "years of work", "[1]", '[{"request": "GET /"}]'):
        thesis.write_text(content)
        refuses(script.refuse_to_overwrite, thesis, *ROWS, match="no earlier table:")
    refuses(script.refuse_to_overwrite, tmp_path, *ROWS, match="is a folder")
    beside = tmp_path / "table.provenance.json"
    for content in ("years of work", "[]", "{}", '["command", "commit"]'):
        beside.write_text(content)
        refuses(script.refuse_to_overwrite, table, *ROWS, match="no earlier table's provenance")
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    refuses(script.refuse_to_overwrite, tmp_path / "pipe.json", *ROWS, match="no earlier table:")


def test_a_table_that_no_disk_would_take_is_refused_and_folders_are_made_for_it(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    names = ("file/below.json", "file/b/c.json", "dangling/a.json", "ring/a.json", "é" * 81)
    for name in (*names, "a" * 256 + "/b.json"):
        refuses(script.refuse_to_overwrite, tmp_path / name, *ROWS, match="cannot be written here")
    script.refuse_to_overwrite(tmp_path / "new" / "folders" / "table.json", *ROWS)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)  # the disk is read-only
    for refuse in (script.refuse_to_overwrite, script.refuse_to_replace):
        refuses(refuse, tmp_path / "new" / "table.json", set(), match="cannot be")


def test_an_output_that_no_disk_would_take_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    for name in ("file", "file/below", "dangling", "ring", "ring/below", "é" * 125, "a" * 250):
        refuses(script.refuse_to_replace, tmp_path / name, True)


PRINTER = "from script import run, say\n{}\nrun(lambda: [say('x' * 1000) for _ in range(1000)])"


@pytest.mark.slow
def test_closed_streams_and_letters_that_they_cannot_show_end_no_work(tmp_path):
    done = tmp_path / "done"
    program = PRINTER.format("") + f"\nopen({str(done)!r}, 'w')"
    for closing in (">&-", "2>&-", ">&- 2>&-", "| true"):
        done.unlink(missing_ok=True)
        command = f'"{sys.executable}" -c "$PROGRAM" {closing}'
        environment = {**os.environ, "PROGRAM": program}
        end = subprocess.run(
            command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert end.returncode == 0 and end.stderr == "" and done.exists(), closing
    program = "from script import run, say\nrun(lambda: say('caf\\u00e9'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", program]
    end = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert end.stdout == "caf?\n" and end.returncode == 0


@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_a_line_is_one_write_so_that_none_of_another_process_comes_between(options):
    program = "from script import run, say\nrun(lambda: [say('a b'), say(), say('c')])"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a packet is a write
    with ours, theirs:
        subprocess.run(
            [sys.executable, *options, "-c", program], cwd=ROOT, stdout=theirs, check=True
        )
        ours.settimeout(10)
        assert [ours.recv(100) for _ in range(3)] == [b"a b\n", b"\n", b"c\n"]


def test_under_torchrun_the_first_process_alone_says_what_was_refused(capsys, monkeypatch):
    def refused():
        raise script.Refused("no")

    def unknown_option():
        script.Parser("What it does.", []).parse_args(["--nonsense"])

    slept = []
    monkeypatch.setattr(script.time, "sleep", slept.append)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        for main in (refused, unknown_option):
            with pytest.raises(SystemExit) as end:
                script.run(main)
            assert end.value.code == 2 and capsys.readouterr().err.count("\n") == lines
    assert slept == [script.GRACE] * 2  # torchrun would end the first process before it speaks


@pytest.mark.slow
@pytest.mark.parametrize(
    "words,reason",
    [
        (("--model", "nowhere", "--sparsity", 0.5), "nowhere is not a folder"),
        (("--sparsity", 0.5, "--nonsense"), "unrecognized arguments: --nonsense"),
        (("--sparsity", 2), "sparsity 2 is outside"),
    ],
)
def test_two_processes_of_torchrun_say_in_one_line_what_was_refused(tmp_path, words, reason):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run_script(*torchrun, "prune.py", *words, "--out", tmp_path / "out")
    ours = [line for line in done.stderr.splitlines() if line.startswith("prune.py: ")]
    assert len(ours) == 1 and reason in ours[0], done.stderr
    frames = re.findall(r'File "(.*?)"', done.stderr)  # torchrun's own report has some
    assert not [frame for frame in frames if Path(frame).parent == ROOT]
    assert done.returncode == 1 and not done.stdout and not (tmp_path / "out").exists()
