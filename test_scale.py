"""
Scale: blocks that pass through the device, processes that share a batch, runs that are killed.

Run       pytest test_scale.py        (50 s on 2 cores)
"""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from eval import Divergence
from llama import load_llama
from offload import offload_blocks
from prune import Pruner
from test_unicuco import ROOT, write_small


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text((ROOT / "test_unicuco.py").read_text())
    return path


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 4096, (16, 64), generator=torch.Generator().manual_seed(1))


def test_offloaded_blocks_compute_rank_and_prune_bit_for_bit_like_resident_ones(small, tokens):
    results = []
    for offload in (False, True):
        model, _ = load_llama(small)
        if offload:
            offload_blocks(model, "cpu")
        divergence, pruner = Divergence(model, tokens), Pruner(model, tokens)
        pruner.apply([0.2, 0.5, 0.7])
        results.append((divergence.measure(), [r for block in pruner.ranks for r in block], dict(model.named_parameters())))
    (kl, ranks, weights), (kl_, ranks_, weights_) = results
    assert kl == kl_ and kl[0] > 0 and weights.keys() == weights_.keys()
    assert all(map(torch.equal, ranks, ranks_)) and all(torch.equal(weights[n], weights_[n]) for n in weights)


def test_sequential_ranks_equal_those_of_a_model_whose_earlier_blocks_are_pruned_already(small, tokens):
    model, _ = load_llama(small)
    pruner = Pruner(model, tokens)
    dense_ranks = [[r.clone() for r in block] for block in pruner.ranks]
    pruner.apply_sequential([0.4, 0.5, 0.6], tokens)
    assert all(map(torch.equal, pruner.ranks[0], dense_ranks[0])) and not all(map(torch.equal, pruner.ranks[2], dense_ranks[2]))
    by_hand, _ = load_llama(small)
    for i in range(3):                                       # prune block 0, measure, prune block 1, measure, prune block 2
        again = Pruner(by_hand, tokens)
        assert all(map(torch.equal, again.ranks[i], pruner.ranks[i]))
        again.apply([[0.4, 0.5, 0.6][j] if j == i else 0 for j in range(3)])
    assert all(torch.equal(p, q) for p, q in zip(by_hand.parameters(), model.parameters()))


def test_8_bit_ranks_count_what_they_drop_and_equal_16_bit_ones_at_multiples_of_1_in_256(small, tokens):
    exact, coarse = (Pruner(load_llama(small)[0], tokens, rank_bits=bits) for bits in (16, 8))
    assert all(r.dtype == torch.uint8 for block in coarse.ranks for r in block)
    for strategy in ([0.25, 0.5, 0.75], [0.1, 0.333, 0.9], [0.0, 0.001, 0.004]):
        masks = coarse.masks(strategy)
        assert coarse.sparsity(strategy) == pytest.approx(coarse.counted(masks), abs=1e-12)
        assert abs(coarse.sparsity(strategy) - exact.sparsity(strategy)) <= 1 / 256 + 1 / 48        # a level, and a weight of a row of 48
        counts = coarse.counts(strategy) / coarse.d_in                                              # masks are those of these exact counts
        assert all(torch.equal(m, masks[name]) for name, m in exact.masks(counts).items())
        coarse.apply(strategy)
        assert all(torch.equal(p != 0, masks[name]) for name, p in coarse.model.named_parameters() if name in masks)


def common(small, text):
    return ["train.py", "--model", str(small), "--data", str(text), "--initial", "6", "--rounds", "2", "--batch", "3", "--tokens", "128",
            "--calibration", "4", "--seqlen", "64", "--test-tokens", "128", "--device", "cpu", "--dtype", "float32"]


def outcome(folder):
    rows = json.loads((folder / "results.json").read_text())
    return json.loads((folder / "measured.json").read_text()), [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


@pytest.fixture(scope="module")
def undisturbed(small, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    subprocess.run([sys.executable, *common(small, text), "--out", str(out)], cwd=ROOT, check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    return outcome(out)


def test_two_processes_measure_what_one_does_bit_for_bit(small, text, undisturbed, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", *common(small, text),
                           "--out", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, timeout=170,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "two") == undisturbed
    assert len(list((tmp_path / "two").glob("evaluations.*.json"))) == 2


def test_a_run_killed_in_the_middle_resumes_and_ends_like_an_undisturbed_one(small, text, undisturbed, tmp_path):
    out, env = tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *common(small, text), "--out", str(out)], cwd=ROOT, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    evaluations = out / "evaluations.0.json"
    while process.poll() is None and not (evaluations.exists() and len(json.loads(evaluations.read_text())["evaluations"]) >= 7):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(json.loads(evaluations.read_text())["evaluations"])
    assert kept >= 7 and not (out / "results.json").exists()
    refused = subprocess.run([sys.executable, *common(small, text), "--out", str(out), "--resume", "--seed", "1"], cwd=ROOT, env=env,
                             capture_output=True, text=True)
    assert refused.returncode == 2 and "another seed" in refused.stderr and kept == len(json.loads(evaluations.read_text())["evaluations"])
    subprocess.run([sys.executable, *common(small, text), "--out", str(out), "--resume"], cwd=ROOT, env=env, check=True, capture_output=True)
    assert outcome(out) == undisturbed


def test_a_process_that_dies_ends_the_run_with_one_message_and_what_was_measured_is_kept(small, text, undisturbed, tmp_path):
    out, processes = tmp_path / "run", []
    for rank in range(2):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
        processes.append(subprocess.Popen([sys.executable, *common(small, text), "--out", str(out)], cwd=ROOT, env=env,
                                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    evaluations = out / "evaluations.1.json"
    while processes[1].poll() is None and not (evaluations.exists() and len(json.loads(evaluations.read_text())["evaluations"]) >= 4):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    said = processes[0].communicate(timeout=120)[1]
    processes[1].communicate()
    assert processes[0].returncode == 1 and "Traceback" not in said
    assert said.strip().splitlines()[-1] == "a process of this run died; finished evaluations are kept, the same command with --resume goes on"
    kept = sum(len(json.loads((out / f"evaluations.{r}.json").read_text())["evaluations"]) for r in range(2))
    assert kept >= 8 and not (out / "results.json").exists()
    subprocess.run([sys.executable, *common(small, text), "--out", str(out), "--resume"], cwd=ROOT, check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert outcome(out) == undisturbed
