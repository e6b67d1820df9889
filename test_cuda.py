"""
CUDA without a GPU: all paths run to their end on a simulated device, with the CPU's numbers.
"""

import contextlib

import pytest
import torch

import simcuda
from curvature import damage_table
from eval import Divergence, perplexity, zero_shot
from llama import load_llama
from model import generate
from offload import offload_blocks
from patterns import pattern_masks
from prune import Pruner
from refit import follow
from simcuda import Mismatch, simulated

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
        self.at = at or (lambda phase: contextlib.nullcontext())
        with self.at("load"):
            self.model, self.tokenizer = load_llama(folder, "cpu" if offload else device)
        if offload:
            offload_blocks(self.model, device)
        self.divergence = Divergence(self.model, windows)
        with self.at("rank"):
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
        self.results["curvature"] = damage_table(pruner, self.windows, 4, 32).tolist()
        values = follow(pruner, pruner.masks(STRATEGY), self.windows)
        self.results["refit"] = {name: V.tolist() for name, V in values.items()}
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

    def walk(self):
        self.prune(), self.learn(), self.ask()
        return self.results


@pytest.mark.parametrize("offload", [False, True])
def test_the_library_on_cuda_gives_the_cpus_numbers_bit_for_bit(small, windows, offload):
    wanted = Paths(small, windows, "cpu").walk()
    with simulated() as log:
        assert Paths(small, windows, CUDA, offload).walk() == wanted
    assert not log.races


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
