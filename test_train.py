"""
train.py: f2 with a memory, the table, whole runs; killed, resumed and shared runs, the slow ones.

Run       pytest test_train.py                          (10 s on 2 cores)
          pytest -m "slow or not slow" test_train.py    (two minutes)
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import llama
import script
import train
import unicuco
from conftest import CPU, ROOT, call, random_model, random_net, spied, write_small
from prune import F2
from ranks import Pruner
from script import TINY, Journal, Refused
from unicuco import SearchSettings, one_thread, search, strategy_for

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def few_steps(measure, blocks, settings, *more):
    """Algorithm 1 with a few steps of training."""
    settings = dataclasses.replace(settings, steps=5, final_steps=5)
    return search(measure, blocks, settings, *more)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(train, "search", few_steps)


# ------------------------------------------------------------------------ measuring once
def memory(f2, folder, resume):
    """What train.py measures with, in a folder of its own."""
    return train.Measure(f2, unicuco.Layout(3), *train.open_journals(folder, {"seed": 0}, resume))


def test_what_was_measured_is_never_measured_again_and_survives_the_run(tmp_path):
    asked = []

    def f2(x):
        asked.append(x.tolist())
        return math.nan if x[0] > 0.5 else float(x.sum())

    strategies = [torch.tensor([v, 0.25], dtype=torch.float64) for v in (0.125, 0.25, 0.625)]
    measure = memory(f2, tmp_path, False)
    first = measure(strategies[:2]) + measure(strategies)
    assert first[:4] == [0.375, 0.5, 0.375, 0.5] and math.isnan(first[4]) and len(asked) == 3
    again = memory(f2, tmp_path, True)(strategies)
    assert again[:2] == [0.375, 0.5] and math.isnan(again[2]) and len(asked) == 3
    # NaN is remembered too, in JSON that has none
    text = (tmp_path / "evaluations.0.json").read_text()
    content = json.loads(text, parse_constant=pytest.fail)
    assert [value for value, _ in content["values"].values()] == [0.375, 0.5, None]
    memory(f2, tmp_path, False)(strategies[:1])
    assert len(asked) == 4  # without --resume it starts anew


def test_evaluations_of_all_processes_are_read_back_bit_for_bit(tmp_path):
    values = {"[0.1, 0.3333333333333333]": 0.123456789012345678, "[0.0, 0.9]": 1 / 3}
    for rank, (key, kl) in enumerate(values.items()):
        path = tmp_path / f"evaluations.{rank}.json"
        Journal(path, {"seed": 0}, False).remember(key, kl)
    measure = memory(None, tmp_path, True)
    assert measure.known == values
    strategies = [torch.tensor(json.loads(key), dtype=torch.float64) for key in values]
    assert measure(strategies) == list(values.values())


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        "{}",
        '{"inputs": {"seed": 0}}',
        '{"inputs": {"seed": 0}, "values": 3}',
        '{"inputs": {"seed": 0}, "values": [[1, 2]]}',
        '{"inputs": {"seed": 0}, "values": {"[0.1]": 0.5}}',
        '{"inputs": {"seed": 0}, "values": {"[0.1]": [0.5, "another"]}}',
        '{"inputs": {"seed": 0}, "values": {"[0.1]": ["x", "STAMP"]}}',
        '{"inputs": {"seed": 0}, "values": {"[0.1]": [[1], "STAMP"]}}',
        '{"inputs": {"seed": 0}, "values": {"[0.1]": [1HUGE, "STAMP"]}}',
        '{"inputs": {"seed": 0}, "values": {"[0.1]": 0.5',
        '{"inputs": {"seed": 1}, "values": {}}',
    ],
)
def test_what_is_no_journal_of_this_run_is_refused_in_one_line(tmp_path, broken):
    path = tmp_path / "evaluations.0.json"
    stamp = Journal(path, {"seed": 0}, False).stamp
    path.write_text(broken.replace("STAMP", stamp).replace("HUGE", "0" * 400))
    with pytest.raises(Refused) as error:
        memory(None, tmp_path, True)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_every_setting_that_a_run_depends_on_changes_its_fingerprint(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    base = {
        "model": ROOT / "tiny",
        "data": tmp_path / "a.txt",
        "seed": 0,
        "initial": 5,
        "rounds": 2,
        "batch": 2,
        "mean": "blocks",
        "granularity": "matrix",
        "metric": "wanda",
        "tokens": 128,
        "calibration": 4,
        "seqlen": 64,
        "dtype": "float32",
    }
    others = {
        "data": tmp_path / "b.txt",
        "seed": 1,
        "initial": 6,
        "rounds": 3,
        "batch": 3,
        "mean": "constant",
        "granularity": "block",
        "metric": "magnitude",
        "tokens": 64,
        "calibration": 5,
        "seqlen": 32,
        "dtype": "bfloat16",
    }

    def fingerprint(**changes):
        return train.fingerprint(argparse.Namespace(**base | changes))

    assert fingerprint() == fingerprint()
    assert all(fingerprint(**{key: value}) != fingerprint() for key, value in others.items())


# ------------------------------------------------------------------------------------- the table
def test_the_table_holds_both_methods_at_equal_counts_and_names_where_stratnet_wins(capsys):
    windows = torch.randint(3, 512, (12, 64), generator=torch.Generator().manual_seed(1))
    pruner = Pruner(random_model(), windows)
    net = random_net(3, 2.0)
    pruner.apply([0.6] * 3)  # as the search leaves it
    rows = train.table(net, pruner, {"text": windows[:4]}, (0.3, 0.6))
    divergence = evaluation.Divergence(pruner.model, windows[:4])
    assert divergence.measure()[0] == 0  # the model is left dense
    for u, s in zip(rows[::2], rows[1::2]):
        assert abs(u["counted"] - s["counted"]) <= 1 / (3 * 64)
        learned = strategy_for(net, u["sparsity"], pruner.sparsity)
        for row, strategy in ((u, [u["sparsity"]] * 3), (s, learned)):
            pruner.apply(strategy)
            assert (row["kl"], row["ppl"]) == divergence.measure()
            assert row["counted"] == pruner.sparsity(strategy)
    pruner.restore()
    for row, kl in zip(rows, (0.2, 0.1, 0.2, 0.3)):
        row["kl"] = kl
    said = "StratNet's KL is below uniform's at "
    assert last_line(rows, capsys) == said + "0.3 (-50.0 %); not at 0.6 (+50.0 %)."
    rows[3]["kl"] = 0.1
    assert last_line(rows, capsys) == said + "0.3 (-50.0 %), 0.6 (-50.0 %)."


def last_line(rows, capsys):
    train.show(rows)
    return capsys.readouterr().out.splitlines()[-1]


# ------------------------------------------------------------------------------------ whole runs
def run_words(model, text, out, initial, rounds):
    return (
        *("--model", model, "--data", text, "--out", out, *CPU),
        *("--initial", initial, "--rounds", rounds, "--batch", 2, "--tokens", 64),
        *("--calibration", 2, "--seqlen", 64, "--test-tokens", 64),
    )


def test_a_model_that_pruning_cannot_change_ends_with_a_table_of_zeros(
    text, tmp_path, capsys, short
):
    folder = write_small(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(weights[name])  # no block writes anything
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert call(train, *run_words(folder, text, tmp_path / "out", 4, 1)) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(rows) == 12 and all(r["kl"] == 0 for r in rows)
    made = json.loads((tmp_path / "out" / "results.provenance.json").read_text())
    assert made["command"].startswith("python train.py --model ") and made["threads"] >= 1
    assert made["inputs"]["weights"] == [script.sha256(folder / "model.safetensors")]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "below uniform's at no sparsity; not at 0.2 (+0.0 %)" in last


def test_progress_is_printed_as_the_last_surrogate_sees_the_answers_of_every_round(capsys):
    class Known:  # log KL of a strategy is its mean
        def posterior(self, x):
            return x.mean(1), None

    answers = lambda kl: torch.full((5, 4), math.log(kl), dtype=torch.float64)
    made = types.SimpleNamespace(gp=Known(), progress=[(40, answers(0.5)), (44, answers(0.25))])
    train.show_progress(made)
    assert capsys.readouterr().out == (
        "evaluations and KL of StratNet's answers, mean of 0.3 to 0.7: 40 0.5000, 44 0.2500\n"
    )


def test_train_without_rounds_writes_a_stratnet_for_the_depth_of_its_model(
    small, text, tmp_path, capsys, short
):
    words = run_words(small, text, tmp_path, 3, 0)
    assert call(train, *words, "--metric", "magnitude") == 0
    printed = capsys.readouterr().out
    assert "prune.py --no-refit asks this StratNet" in printed  # it has a prior to leave aside
    assert "last round" not in printed and "StratNet's KL is below uniform's at" in printed
    made = unicuco.load_stratnet(tmp_path / "stratnet.safetensors", 3)
    assert made.X.shape == (3, 21) and made.y.shape == (3,) and math.isfinite(made.scale.hi)
    assert made.about["evaluations"] == 3 and made.about["seed"] == 0
    # what prune.py compares before it uses a StratNet
    assert made.about["weights"] == [script.sha256(small / "model.safetensors")]
    assert made.about["metric"] == "magnitude" and made.about["granularity"] == "matrix"
    with pytest.raises(Refused, match="is a StratNet for 3 blocks, the model has 12"):
        unicuco.load_stratnet(tmp_path / "stratnet.safetensors", 12)


@pytest.mark.parametrize(
    "reason,words",
    [
        ("--initial must be at least 1", ("--initial", 0)),
        ("--rounds must be at least 0", ("--rounds", -1)),
        ("--test-tokens must be at least 1", ("--test-tokens", 0)),
        ("--calibration must be at least 1", ("--calibration", 0)),
        ("--calibration must be at least 1", ("--calibration", -1)),
        ("nowhere.txt cannot be read", ("--data", "nowhere.txt")),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2_with_nothing_written(
    small, tmp_path, capsys, reason, words
):
    assert call(train, "--model", small, *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and error.startswith("train.py: ")
    assert reason in error and not (tmp_path / "out").exists()


# ------------------------------------------------------- many processes, killed and resumed runs
@pytest.fixture(scope="module")
def command(small, text):
    return [
        *("train.py", "--model", str(small), "--data", str(text), *CPU),
        *("--initial", "6", "--rounds", "2", "--batch", "3", "--tokens", "128"),
        *("--calibration", "4", "--seqlen", "64", "--test-tokens", "128"),
    ]


def start(words, env=ONE_THREAD, **more):
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, text=True, **more)


def finish(words):
    """Run a script to its end in a process of its own: exit code, standard error."""
    process = start(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.communicate(timeout=170)[1]
    return process.returncode, error


def results(folder):
    """What a run wrote, seconds apart."""
    rows = json.loads((folder / "results.json").read_text())
    measured = json.loads((folder / "measured.json").read_text())
    return measured, [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def kept(path):
    """How many evaluations a journal holds."""
    return len(json.loads(path.read_text())["values"]) if path.exists() else 0


def kill_after(process, path, count):
    while process.poll() is None and kept(path) < count:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    assert finish([*command, "--out", str(out)])[0] == 0
    return results(out)


def test_the_first_process_of_all_machines_and_no_other_prints_writes_and_hashes(monkeypatch):
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda made, rank: made.append(rank))
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank, first in (("0", True), ("8", False)):  # 8: the first of the second machine
        monkeypatch.setenv("RANK", rank)
        assert script.join_processes() is first
        asked = []
        train.from_the_first(first, lambda: asked.append("hashed"))
        assert asked == ["hashed"] * first


@pytest.mark.slow
def test_two_processes_measure_what_one_does_bit_for_bit(command, undisturbed, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code, error = finish([*torchrun, *command, "--out", str(tmp_path / "two")])
    assert code == 0, error
    assert results(tmp_path / "two") == undisturbed
    assert len(list((tmp_path / "two").glob("evaluations.*.json"))) == 2


@pytest.mark.slow
def test_a_run_killed_in_the_middle_resumes_and_ends_like_an_undisturbed_one(
    command, undisturbed, tmp_path
):
    out = tmp_path / "run"
    path = out / "evaluations.0.json"
    words = [*command, "--out", str(out)]
    process = start(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_after(process, path, 7)
    process.wait()
    count = kept(path)
    assert count >= 7 and not (out / "results.json").exists()
    code, error = finish([*words, "--resume", "--seed", "1"])
    assert code == 2 and "another seed" in error and kept(path) == count
    assert finish([*words, "--resume"])[0] == 0
    assert results(out) == undisturbed


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_one_message_and_what_was_measured_is_kept(
    command, undisturbed, tmp_path
):
    out = tmp_path / "run"
    words = [*command, "--out", str(out)]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in "01":
        env = ONE_THREAD | meeting | {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(start(words, env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    kill_after(processes[1], out / "evaluations.1.json", 4)
    said = processes[0].communicate(timeout=120)[1]
    processes[1].communicate()
    assert processes[0].returncode == 1 and "Traceback" not in said
    assert said.strip().splitlines()[-1] == (
        "a process of this run died: what was measured is kept,"
        " the same command with --resume goes on"
    )
    assert sum(kept(out / f"evaluations.{rank}.json") for rank in range(2)) >= 8
    assert not (out / "results.json").exists()
    assert finish([*words, "--resume"])[0] == 0  # one process goes on where two stopped
    assert results(out) == undisturbed


# -------------------------------------------------------------------------- the same answer twice
def answer():
    """Texts, windows, ranks, a short search and its StratNet on the embedded model, with one
    thread: one hash of all of it."""
    texts = evaluation.stdlib_files(True), evaluation.stdlib_files(False)
    with one_thread():
        model, tokenizer = llama.load_llama(TINY)
        windows = evaluation.cut(evaluation.tokenise(tokenizer, texts[0][:6]), 64)
        calibration, searched = evaluation.draw(windows, [4, 2], 0)
        pruner = Pruner(model, calibration)
        f2 = F2(pruner, searched)
        settings = SearchSettings(initial=6, rounds=1, batch=2, steps=10, final_steps=10)
        found = search(lambda batch: [f2(x) for x in batch], 12, settings)
    files = list(llama.weight_files(TINY))
    digest = hashlib.sha256(repr((texts, found.log, found.scale, files)).encode())
    ranks = (r for block in pruner.ranks for r in block)
    for part in (windows, *ranks, found.gp.theta, *found.net.state_dict().values()):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


SHUFFLED = """
import functools, os, random
listdir, scandir = os.listdir, os.scandir
class Entries(list):
    def __enter__(self): return self
    def __exit__(self, *why): pass
def shuffled(entries):
    entries = list(entries)
    random.Random(0).shuffle(entries)
    return Entries(entries)
os.listdir = functools.partial(lambda *a: shuffled(listdir(*a)))      # partial: not a method
os.scandir = functools.partial(lambda *a: shuffled(scandir(*a)))
from test_train import answer
print(answer())
"""


@pytest.mark.slow
def test_hash_seed_locale_and_the_order_of_files_on_disk_change_nothing():
    odd = {"PYTHONHASHSEED": "12345", "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment = {**os.environ, **odd, "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", SHUFFLED]
    other = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert other.stdout.strip() == answer(), other.stderr


def test_a_folder_with_a_run_is_kept_unless_it_is_resumed_or_given_up(
    small, text, tmp_path, capsys, short
):
    words = run_words(small, text, tmp_path, 3, 0)
    assert call(train, *words) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert call(train, *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--resume goes on with it, --force begins anew" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    capsys.readouterr()
    assert call(train, *words, "--resume") == 0
    assert "3 of this process's strategies had been measured before" in capsys.readouterr().out
    assert call(train, *words, "--force") == 0


# ------------------------------------------------------------------- what reaches what, two at once
def test_no_window_of_the_test_text_reaches_calibration_table_or_search(
    small, tmp_path, monkeypatch, short, capsys
):
    (tmp_path / "choose.txt").write_text("alpha beta " * 3000)
    (tmp_path / "test.txt").write_text("omega psi " * 3000)
    seen = []
    for name in ("Pruner", "damage_table", "F2", "Divergence"):
        spied(monkeypatch, train, name, seen)
    words = run_words(small, tmp_path / "choose.txt", tmp_path / "out", 3, 1)
    words += ("--tokens", 128, "--test", tmp_path / "test.txt", "--seed", 3)
    spied(monkeypatch, train, "prior_of", how := [])
    spied(monkeypatch, train, "search", searches := [])
    assert call(train, *words) == 0
    assert how[0][1][2:] == ("curvature", "matrix", 3)
    assert searches[0][1][3] == 3  # the seed
    _, tokenizer = llama.load_llama(small)
    assert [name for name, _ in seen] == ["Pruner", "damage_table", "F2", "Divergence"]
    windows = {name: arguments[1] for name, arguments in seen}
    for name, ids in windows.items():
        said = set(tokenizer.decode(ids.flatten().tolist()).split())
        chosen_on, tested_on = {"alpha", "beta"} & said, {"omega", "psi"} & said
        assert bool(tested_on) == (name == "Divergence") != bool(chosen_on), name
    assert torch.equal(windows["Pruner"], windows["damage_table"])
    assert "calibration 128 tokens, f2 128 tokens" in capsys.readouterr().out
    assert windows["Pruner"].shape == (2, 64) and windows["F2"].shape == (2, 64)
    rows = {tuple(w.tolist()) for w in windows["Pruner"]}
    assert all(tuple(w.tolist()) not in rows for w in windows["F2"]) or len(rows) == 1


def log_of(small, text, out, *words):
    """What a short search measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "search", few_steps)
        assert call(train, *run_words(small, text, out, 3, 1), *words) == 0
    return json.loads((out / "measured.json").read_text())


@pytest.fixture(scope="module")
def usual(small, text, tmp_path_factory):
    return log_of(small, text, tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(
    "flag,value",
    [
        *(("--seed", 1), ("--mean", "blocks"), ("--granularity", "block")),
        *(("--metric", "magnitude"), ("--initial", 4), ("--rounds", 0), ("--batch", 3)),
        *(("--calibration", 3), ("--tokens", 128)),
    ],
)
def test_another_value_of_a_flag_gives_another_search(small, text, tmp_path, usual, flag, value):
    assert log_of(small, text, tmp_path, flag, value) != usual


def test_the_same_flags_give_the_same_search(small, text, tmp_path, usual):
    assert log_of(small, text, tmp_path) == usual


def test_the_last_stratnet_is_trained_on_the_mean_alone_and_the_ones_before_on_the_bound(
    monkeypatch,
):
    kappas, original = [], unicuco.train_stratnet

    def spy(net, layout, gp, scale, steps, kappa, generator, **how):
        kappas.append(kappa)
        original(net, layout, gp, scale, 1, kappa, generator)

    monkeypatch.setattr(unicuco, "train_stratnet", spy)
    f2 = lambda batch: [float(x.sum()) + 0.1 for x in batch]
    search(f2, 3, SearchSettings(initial=4, rounds=2, batch=2))
    assert kappas == [0.5, 0.5, 0.0]


def test_a_second_run_into_one_folder_is_refused_while_the_first_goes_on(
    small, text, tmp_path, capsys
):
    words = run_words(small, text, tmp_path / "out", 3, 0)
    (tmp_path / "out").mkdir()
    with script.locked(tmp_path / "out", "mine"):
        assert call(train, *words) == 2
    assert "another train.py is running" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_resuming_with_another_text_split_tokenizer_or_configuration_is_refused(
    text, tmp_path, capsys, short
):
    model = write_small(tmp_path / "model")
    words = (*run_words(model, text, tmp_path / "out", 3, 0), "--resume")
    assert call(train, *words) == 0
    (tmp_path / "test.txt").write_text("omega psi " * 3000)
    assert call(train, *words, "--test", tmp_path / "test.txt") == 2  # --data is split no more
    assert "another windows" in capsys.readouterr().err
    own = (model / "tokenizer_config.json").read_text()
    changed = json.dumps(json.loads(own) | {"add_bos_token": False})
    (model / "tokenizer_config.json").write_text(changed)
    assert call(train, *words) == 2
    assert "another windows" in capsys.readouterr().err
    (model / "tokenizer_config.json").write_text(own)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    assert call(train, *words) == 2
    assert "another config" in capsys.readouterr().err


def test_a_run_begun_anew_and_killed_leaves_no_stratnet_of_the_run_before(
    small, text, tmp_path, short, monkeypatch
):
    words = run_words(small, text, tmp_path, 3, 0)
    assert call(train, *words) == 0
    monkeypatch.setattr(train, "search", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    call(train, *words, "--force")
    assert not list(tmp_path.iterdir())


def test_a_search_larger_than_a_stratnet_file_may_hold_is_refused_before_it_is_measured(
    small, text, tmp_path, capsys
):
    words = run_words(small, text, tmp_path, unicuco.MOST_MEASURED - 1, 1)
    assert call(train, *words) == 2 and "1000 strategies at most" in capsys.readouterr().err


def test_what_a_killed_run_left_half_written_goes(small, text, tmp_path, short):
    left = tmp_path / ".evaluations.0.4711.partial.json"
    left.write_text("{")
    assert call(train, *run_words(small, text, tmp_path, 3, 0)) == 0
    assert not list(tmp_path.glob(".*"))


def test_every_shard_is_in_the_fingerprint(tmp_path):
    tensors = {f"{i}": torch.full((2,), float(i)) for i in range(3)}
    index = {name: f"part-{name}.safetensors" for name in tensors}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / index[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text("{}")
    args = argparse.Namespace(
        model=tmp_path, data=None, tokens=1, calibration=1, seqlen=1, dtype="float32"
    )
    digests = [hashlib.sha256((tmp_path / f).read_bytes()).hexdigest() for f in index.values()]
    assert train.sources(args)["weights"] == digests
