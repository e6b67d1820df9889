"""
CUDA without a GPU: all paths run to their end on a simulated device, with the CPU's numbers.
"""

import contextlib
import json
import re
from types import SimpleNamespace

import pytest
import torch

import bench
import eval as eval_module
import prune
import ranks
import script
import simcuda
import train
from checks.counted import empty_model
from conftest import ROOT, call, random_net, refuses, write_small
from curvature import damage_table, gradient_norms
from eval import Divergence, accelerate, perplexity, zero_shot
from llama import load_llama, pack, save_llama, unpack
from model import Config, generate
from offload import offload_blocks
from patterns import pattern_masks
from ranks import Pruner, Survivors, rank
from refit import follow, row_counts
from script import choose_device, choose_tokens
from simcuda import Mismatch, simulated
from unicuco import Scale, SearchResult

FEW = ("--tokens", 64, "--calibration", 2, "--seqlen", 32, "--dtype", "float32")
STRATEGY = [0.3, 0.5, 0.7]
ROWS = [
    {"goal": "open a file", "sol1": "use open", "sol2": "eat it", "label": 0},
    {"goal": "sort", "sol1": "x", "sol2": "use sorted", "label": 1},
]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 4096, (4, 32), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- the library, path by path
class Paths:
    """Every path of the library, on one device: `results` {name: numbers}. at: a context for each
    phase.
    """

    def __init__(self, folder, windows, device, offload=False, at=None):
        self.folder, self.windows, self.results = folder, windows, {}
        self.device = device
        self.at = at or (lambda phase: contextlib.nullcontext())
        with self.at("load"):
            self.model, self.tokenizer = load_llama(folder, "cpu" if offload else device)
        if offload:
            offload_blocks(self.model, device)
        self.divergence = Divergence(self.model, windows)
        with self.at("calibrate and rank"):
            self.pruner = Pruner(self.model, windows)

    def prune(self):
        pruner = self.pruner
        for phase, work in (("apply", pruner.apply), ("masks", pruner.masks)):
            with self.at(phase):
                masks = work(STRATEGY)
        with self.at("f2"):
            self.results["f2"] = self.divergence.measure()
        self.results["counted"] = pruner.mask_sparsity(masks)
        with self.at("restore"):
            pruner.restore()
        self.results["restored"] = self.divergence.measure()
        pruner.apply_masks(pattern_masks(pruner, [0.4] * 3, 2, 4))
        self.results["pattern"] = self.divergence.measure()

    def learn(self):
        pruner = self.pruner
        self.results["curvature"] = damage_table(pruner, self.windows, 2, 32).tolist()
        masks = pruner.masks(STRATEGY)
        follow(pruner, masks, self.windows)
        self.results["refitted on its masks"] = self.divergence.measure()
        g_norms = gradient_norms(pruner, self.windows)
        self.values = follow(pruner, row_counts(pruner, STRATEGY, g_norms), self.windows)
        self.masks = Survivors(self.values)
        self.results["refitted"] = self.divergence.measure()

    def ask(self):
        model = self.model
        self.results["perplexity"] = perplexity(model, self.windows.flatten(), 32)
        with self.at("generate"):
            self.results["likeliest"] = list(generate(model, [5, 6, 7], 5))
            self.results["drawn"] = list(generate(model, [5, 6, 7], 3, 0.8))
        with self.at("zero-shot"):
            asked = zero_shot(model, self.tokenizer, "piqa", ROWS)
        self.results["zero-shot"] = asked["predictions"], asked["predictions_norm"]

    def save(self, out):
        """Plain and packed, with refitted values: {form: (file's bytes, KL when read again)}."""
        for form in ("plain", "packed"):
            folder, how = out / form, (self.masks, form == "packed", self.values)
            with self.at(form):
                save_llama(self.model, folder, self.folder, *how)
            again, _ = load_llama(folder, self.device)
            kl = Divergence(again, self.windows).measure()
            self.results[form] = next(folder.glob("*.safetensors")).read_bytes(), kl

    def walk(self, out):
        self.prune(), self.learn(), self.ask(), self.save(out)
        return self.results


@pytest.mark.parametrize("offload", [False, True])
def test_the_library_on_cuda_gives_the_cpus_numbers_and_files_bit_for_bit(
    small, windows, tmp_path, offload
):
    wanted = Paths(small, windows, "cpu").walk(tmp_path / "cpu")
    with simulated() as log:
        found = Paths(small, windows, CUDA, offload, log.at).walk(tmp_path / "cuda")
    assert found == wanted and not log.races
    waits = {phase: count["waits"] for phase, count in log.counts.items()}
    if not offload:  # which waits for its streams, too
        assert waits["load"] == waits["f2"] == waits["zero-shot"] == 1
        assert waits["plain"] == waits["packed"] == 1  # a file has one
        assert waits["apply"] == waits["masks"] == waits["restore"] == 0
        assert waits["calibrate and rank"] == 1 + 3  # once, then once a block
        assert waits["generate"] == 5 + 3  # once a token


# --------------------------------------------------------------------- what the device refuses
def test_tensors_of_two_devices_do_not_meet():
    with simulated(devices=2):
        here, there = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
        assert (here + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a 0-dim CPU tensor may
        assert here[torch.tensor([0])].tolist() == [1]  # and CPU indices
        for other in (torch.ones(3), there):
            with pytest.raises(Mismatch):
                here + other
        for reading in (here.numpy, here.data_ptr, here.pin_memory):
            with pytest.raises(Mismatch):
                reading()


def test_a_copy_that_nobody_waits_for_races_with_the_host_and_with_a_side_stream():
    for waits in (True, False):
        with simulated() as log:
            host = torch.ones(3).pin_memory()
            torch.zeros(3, device="cuda").copy_(host, non_blocking=True)
            if waits:
                torch.cuda.current_stream().synchronize()
            host.zero_()
        assert bool(log.races) is not waits
        with simulated() as log:
            side, x = torch.cuda.Stream(), torch.zeros(3, device="cuda")
            with torch.cuda.stream(side):
                x.add_(1)
            if waits:
                torch.cuda.current_stream().wait_stream(side)
            x.add_(1)
        assert bool(log.races) is not waits


@pytest.mark.parametrize("forgetful", ["side", "main"])
def test_an_offloaded_block_without_either_wait_of_its_streams_is_a_race(
    small, windows, forgetful, monkeypatch
):
    wait = simcuda.Stream.wait_stream
    forgets = lambda self, other: None if self.name.startswith(forgetful) else wait(self, other)
    monkeypatch.setattr(simcuda.Stream, "wait_stream", forgets)
    with simulated() as log:
        model, _ = load_llama(small)
        offload_blocks(model, CUDA)
        Divergence(model, windows)()
    assert log.races


# ------------------------------------------------------------------------- faults that were there
def test_the_dense_reference_of_offloaded_blocks_is_complete_before_weights_are_written(
    small, windows
):
    with simulated() as log:
        model, _ = load_llama(small)
        offload_blocks(model, CUDA)
        pruner = Pruner(model, windows)
        Divergence(model, windows)
        pruner.apply(STRATEGY)
    assert not log.races


def test_weights_cross_as_they_are_stored_and_are_cast_on_the_device(tmp_path):
    folder = write_small(tmp_path / "half", dtype=torch.float16)
    stored = sum(p.numel() for p in load_llama(folder)[0].parameters()) * 2
    with simulated() as log:
        with log.at("load"):
            load_llama(folder, CUDA, torch.float32)
        assert log.counts["load"]["to device"] == stored


def test_packing_and_unpacking_happen_where_the_weights_are():
    W = torch.randn(6, 20)
    with simulated():
        mask, values = pack(W.to(CUDA), W.to(CUDA) > 0)
        assert mask.is_cuda and unpack(mask, values, 20).tolist() == W.clamp(min=0).tolist()


def test_the_csr_product_of_the_benchmark_meets_one_device(small, windows, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to_sparse_csr", lambda W: W)
    with simulated():
        pruner = Pruner(load_llama(small, CUDA)[0], windows)
        monkeypatch.setattr(bench, "race", lambda *works: [len(work()) for work in works])
        bench.time_sparse_products(bench.Table(), pruner)


def test_ranks_on_cuda_are_those_of_the_cpu_ties_and_chunks_included(monkeypatch):
    score = torch.randint(0, 5, (40, 50), generator=torch.Generator().manual_seed(0)).float()
    wanted = rank(score).tolist()
    for chunk in (2**24, 120):
        monkeypatch.setattr(ranks, "CUDA_CHUNK", chunk)
        with simulated():
            assert rank(score.to(CUDA)).tolist() == wanted


def test_a_refit_lets_go_of_what_it_used_and_parks_dense_copies_meanwhile(monkeypatch):
    held, parked = [], Pruner.parked

    @contextlib.contextmanager
    def watched(pruner):
        with parked(pruner):
            yield held.append(log.held)
            held.append(log.held)

    monkeypatch.setattr(Pruner, "parked", watched)
    config = Config(512, 1024, 2752, 2, 8, 8, 128)  # a quarter of the width of Llama-2-7B
    windows = torch.zeros(16, 512, dtype=torch.long)
    with simulated(values=False, answer=1.0) as log:
        pruner = Pruner(empty_model(config, CUDA), windows)
        resident, dense = log.held, sum(W.nbytes for W in pruner.dense[0])
        with log.at("refit"):
            follow(pruner, pruner.masks([0.5] * 2).counts(), windows)
        assert log.held == resident
    # of one block, the first of four: when the others come back, nothing of the refit is left
    assert held == [resident - dense] * 2
    # at down, the largest: both streams, its inputs, the sums, the inverse, what solving takes
    streams, x, H, W = 2 * 2 * 16 * 512 * 1024, 2 * 16 * 512 * 2752, 4 * 2752**2, 4 * 1024 * 2752
    assert log.peaks["refit"] - (resident - dense) < streams + x + 2 * H + 13 * W


def test_dense_copies_come_back_from_where_they_were_parked(small, windows):
    with simulated() as log:
        pruner = Pruner(load_llama(small, CUDA)[0], windows)
        before = [W.tolist() for block in pruner.dense for W in block]
        with pytest.raises(KeyError), pruner.parked():
            assert [W.is_cuda for (W, *_) in pruner.dense] == [False, True, True]
            raise KeyError
        assert [W.tolist() for block in pruner.dense for W in block] == before
        assert all(W.is_cuda for block in pruner.dense for W in block) and not log.races


# --------------------------------------------------------------------------------------- devices
def test_a_process_of_torchrun_takes_its_own_gpu_unless_told_and_touches_no_other(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for asked, index in (("auto", 1), ("cuda", 1), ("cuda:2", 2)):
        with simulated(devices=3) as log:
            assert choose_device(asked)[0] == torch.device("cuda", index)
            assert torch.cuda.current_device() == index and not log.sizes
    with simulated(devices=1):
        refuses(choose_device, "cuda", match="has 1 CUDA devices")
        refuses(choose_device, "meta", match="only cpu and cuda")
        refuses(choose_device, "gpu", match="--device gpu")


def test_the_dtype_and_the_tokens_of_a_measurement_follow_the_gpu_and_say_so():
    with simulated(capability=(7, 5)):
        device, dtype, reason = choose_device()
        assert dtype == torch.float16 and "no bfloat16" in reason
        assert choose_device("cuda", "bfloat16")[1] == torch.bfloat16  # as asked
    with simulated():
        device, dtype, reason = choose_device()
        assert dtype == torch.bfloat16
        args = SimpleNamespace(tokens=None)
        assert "--tokens 16384" in choose_tokens(args, device, reason) and args.tokens == 16384
        args = SimpleNamespace(tokens=64)
        assert choose_tokens(args, device, reason) == reason and args.tokens == 64
    args = SimpleNamespace(tokens=None)
    assert choose_tokens(args, torch.device("cpu"), "why") == "why" and args.tokens == 2048


def test_too_little_memory_ends_in_one_line_that_names_offload(small, text, tmp_path, capsys):
    how = ("--sparsity", "0.5", "--device", "cuda")
    with simulated(limit=2**20):
        assert command(prune, small, text, tmp_path / "out", *how) == 2
    said = capsys.readouterr().err
    assert "--offload" in said and len(said.splitlines()) == 1


def test_2_in_4_runs_on_the_kernels_that_take_it_and_the_rest_is_left_out(tmp_path, windows):
    folder = write_small(tmp_path / "m", intermediate_size=104)  # no multiple of 16
    answers = []
    for fast in (False, True):
        with simulated():
            model, _ = load_llama(folder, CUDA, torch.bfloat16)
            pruner = Pruner(model, windows)
            pruner.apply_masks(pattern_masks(pruner, [0.5] * 3, 2, 4))
            if fast:
                assert accelerate(model) == (12, 9)  # gate, up and down have 104 rows or columns
            answers.append(perplexity(model, windows.flatten(), 32))
    assert answers[1] == pytest.approx(answers[0], rel=2e-2)  # bfloat16, added in another order


# -------------------------------------------------------------------------------------- commands
def command(module, folder, text, out, *words):
    return call(module, "--model", folder, "--data", text, "--out", out, *FEW, *words)


def test_eval_moves_2_in_4_onto_the_kernels_and_says_how_fast_how_many_and_what_is_left_out(
    text, tmp_path, capsys
):
    source = write_small(tmp_path / "m", intermediate_size=104)  # no multiple of 16
    pruned, how = tmp_path / "pruned", ("--data", text, "--seqlen", 32, "--device", "cuda")
    ways = ("--uniform", "--sparsity", 0.5, "--pattern", "2:4", "--no-refit")
    with simulated():
        assert command(prune, source, text, pruned, *ways) == 0
    said = {}
    for dtype, capability in (("bfloat16", (8, 0)), ("bfloat16", (7, 5)), ("float32", (8, 0))):
        capsys.readouterr()
        with simulated(capability=capability) as log:
            more = ("--accelerate", "--dense", source, "--tokens", 128, "--dtype", dtype)
            assert call(eval_module, "--model", pruned, *how, *more) == 0
        said[dtype, capability] = capsys.readouterr().out
        assert not log.races
    fast = said["bfloat16", (8, 0)].splitlines()
    assert re.fullmatch(
        r"12 Linears on semi-structured kernels: \d+\.\d\d times as fast as dense", fast[0]
    )
    assert fast[1].startswith("9 left out") and fast[-1].startswith("perplexity")
    assert said["bfloat16", (7, 5)].startswith("no speed-up on cuda:0: ")
    assert said["float32", (8, 0)].splitlines()[1].startswith("21 left out")


@pytest.mark.parametrize(
    "how", [(), ("--packed",), ("--pattern", "2:4", "--no-refit"), ("--offload",)]
)
def test_prune_writes_on_cuda_what_it_writes_on_the_cpu(small, text, tmp_path, how):
    how = ("--sparsity", "0.5", "--uniform", *how)
    assert command(prune, small, text, tmp_path / "cpu", *how, "--device", "cpu") == 0
    with simulated() as log:
        assert command(prune, small, text, tmp_path / "cuda", *how, "--device", "cuda") == 0
    here, there = (next((tmp_path / n).glob("*.safetensors")) for n in ("cpu", "cuda"))
    assert here.read_bytes() == there.read_bytes() and not log.races


def test_train_measures_on_cuda_what_it_measures_on_the_cpu(small, text, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "search", measure_two)
    for device in ("cpu", "cuda"):
        with simulated() if device == "cuda" else contextlib.nullcontext() as log:
            out, how = tmp_path / device, ("--test-tokens", 64, "--device", device)
            assert command(train, small, text, out, *how) == 0
    assert not log.races
    here, there = (json.loads((tmp_path / d / "results.json").read_text()) for d in ("cpu", "cuda"))
    assert [r | {"seconds": 0} for r in here] == [r | {"seconds": 0} for r in there]


@pytest.mark.parametrize("module", [prune, train])
def test_commands_print_how_many_tokens_measure_on_a_gpu_and_why(
    small, text, tmp_path, monkeypatch, capsys, module
):
    monkeypatch.setitem(script.TOKENS, "cuda", 96)
    monkeypatch.setattr(train, "search_and_report", lambda run, args: run.greet())
    own = ("--uniform", "--sparsity", 0.5, "--no-refit", "--dry-run") if module is prune else ()
    words = ("--model", small, "--data", text, "--out", tmp_path / "out", "--device", "cuda")
    with simulated():
        assert call(module, *words, "--calibration", 2, "--seqlen", 32, *own) == 0
    said = capsys.readouterr().out
    assert "; --tokens 96, for measuring is cheap there)" in said
    assert "f2 96 tokens" in said or "measured on 96 of" in said


def measure_two(measure, layout, settings, seed, curves, show):
    """In the place of `search`, which knows no device: two strategies, and a StratNet of noise."""
    strategies = [torch.full((21,), x, dtype=torch.float64) for x in (0.3, 0.6)]
    log = [
        {"round": 0, "strategy": x.tolist(), "measured": kl, "predicted": None}
        for x, kl in zip(strategies, measure(strategies))
    ]
    return SearchResult(random_net(21), layout, Scale(0.0, 1.0), None, log, [])


@pytest.mark.parametrize("name, blocks, most", [("7B", 32, 40e9), ("13B", 40, 78e9)])
def test_what_was_counted_for_billions_of_weights_keeps_its_budgets(name, blocks, most):
    """Of results/counted-llama2.json, by checks/counted.py."""
    counted = json.loads((ROOT / "results" / "counted-llama2.json").read_text())["models"]
    stages = {r["stage"]: r for r in counted[f"Llama-2-{name}"]["rows"]}
    assert stages["apply a strategy"]["bytes_per_weight"] <= 6.5
    assert stages["apply a strategy"]["waits"] == 0
    assert stages["f2"]["waits"] == 1 and stages["calibrate and rank"]["waits"] == 1 + blocks
    assert (
        stages["refit"]["waits"] == 1 + 1 + 7 * blocks
    )  # windows, parked copies, then once a matrix
    on_the_gpu = ("dense reference of f2", "calibrate and rank", "apply a strategy", "f2", "refit")
    for stage in on_the_gpu:
        assert stages[stage]["peak"] <= most
    for stage in ("calibrate, --offload", "f2, --offload"):
        assert stages[stage]["peak"] <= 3e9
