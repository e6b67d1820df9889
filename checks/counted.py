"""
What pruning Llama 2 costs on a GPU, counted on shapes alone: no weight exists, nothing is timed.

Run       python checks/counted.py            (15 minutes; ends with results/counted-llama2.json)
Counted   bytes that kernels touch, FLOPs of matrix products, kernels, the most bytes held: by the
          simulated device of simcuda.py, with bfloat16 weights and the defaults of prune.py.
Not here  time, for no GPU has run this; the table of curvature, whose operators need values.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import Divergence
from model import Config, Llama, generate
from offload import offload_blocks
from ranks import Pruner, activation_norms
from refit import follow
from script import TOKENS, provenance, write_json
from simcuda import simulated

SHAPES = {
    "Llama-2-7B": Config(32000, 4096, 11008, 32, 32, 32, 128, 4096),
    "Llama-2-13B": Config(32000, 5120, 13824, 40, 40, 40, 128, 4096),
}
SEQLEN, CALIBRATION = 512, 64  # prune.py's defaults
CUDA = torch.device("cuda")


def empty_model(config, device):
    """A Llama in bfloat16 on `device`, its weights never filled."""
    with torch.device("meta"):
        model = Llama(config)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            weight = torch.empty(p.shape, dtype=torch.bfloat16, device=device)
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    return model


def rows_of(log, stages, weights):
    """A row for each stage: what was counted, and bytes for each weight of the blocks."""
    return [
        {
            "stage": stage,
            "kernels": log.counts[stage]["kernels"],
            "waits": log.counts[stage]["waits"],
            "bytes": log.counts[stage]["bytes"],
            "bytes_per_weight": log.counts[stage]["bytes"] / weights,
            "flops": log.counts[stage]["flops"],
            "peak": log.peaks[stage],
        }
        for stage in stages
    ]


def resident(config):
    """The stages of prune.py with the model on the GPU: (rows, block weights)."""
    windows = torch.zeros(CALIBRATION, SEQLEN, dtype=torch.long)
    measured = torch.zeros(TOKENS["cuda"] // SEQLEN, SEQLEN, dtype=torch.long)
    with simulated(values=False, answer=1.0) as log:
        model, blocks = empty_model(config, CUDA), config.num_hidden_layers
        with log.at("dense reference of f2"):
            divergence = Divergence(model, measured)
        with log.at("calibrate and rank"):
            pruner = Pruner(model, windows)
        with log.at("apply a strategy"):
            pruner.apply([0.5] * blocks)
        with log.at("f2"):
            divergence.measure()
        with log.at("refit"):
            follow(pruner, pruner.masks([0.5] * blocks).counts(), windows)
        with log.at("generate a token"):
            list(generate(model, [1], 1))
        weights = sum(W.numel() for block in pruner.dense for W in block)
        return rows_of(log, list(log.counts)[1:], weights), weights


def offloaded(config):
    """Calibration and f2 with the blocks in host memory: rows."""
    windows = torch.zeros(CALIBRATION, SEQLEN, dtype=torch.long)
    with simulated(values=False, answer=1.0) as log:
        model = empty_model(config, "cpu")
        offload_blocks(model, CUDA)
        with log.at("calibrate, --offload"):
            activation_norms(model, windows)
        with log.at("f2, --offload"):
            Divergence(model, windows[: TOKENS["cuda"] // SEQLEN]).measure()
        return rows_of(log, list(log.counts)[1:], sum(p.numel() for p in model.blocks.parameters()))


def main():
    results = {"provenance": provenance(), "tokens": TOKENS["cuda"]}
    results |= {"calibration": CALIBRATION * SEQLEN, "models": {}}
    for name, config in SHAPES.items():
        rows, weights = resident(config)
        rows += offloaded(config)
        results["models"][name] = {"block_weights": weights, "rows": rows}
        for r in rows:
            print(
                f"{name} {r['stage']:<24} {r['kernels']:8} kernels {r['bytes'] / 1e9:9.1f} GB"
                f" {r['bytes_per_weight']:8.2f} a weight {r['flops'] / 1e12:9.1f} TFLOP,"
                f" peak {r['peak'] / 1e9:6.2f} GB, {r['waits']} waits",
                flush=True,
            )
        write_json(ROOT / "results" / "counted-llama2.json", results)


if __name__ == "__main__":
    main()
