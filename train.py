"""
Algorithm 1: measure strategies, learn them with a Gaussian process, train StratNet on it; then the table against uniform pruning.

Source    UniCuCo (arXiv 2505.12216), on the batched loop of PSL-MOBO (arXiv 2210.08495).
Reading   6 of 6. Before: prune.py. The end of the core; baselines.py, bench.py and plot.py compare and draw.
Shapes    n strategies measured, d blocks.

Laptop    python train.py                                   (60 s; ends with where StratNet wins)
Full      torchrun --nproc-per-node=8 train.py --model ~/Llama-2-7b-hf --data c4.jsonl --test wiki.test.raw --tokens 16384
"""
import contextlib
import hashlib
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from eval import Divergence, sha256, stdlib_files
from gp import GaussianProcess
from llama import Parser, add_model, choose_device, first_line, read_json, run, weight_files
from outputs import write_json
from prune import METRICS, Pruner, setting
from unicuco import (Scale, StratNet, first_design, hypervolume, log_divergence, save_stratnet, scattered, select_batch, strategy_for,
                     train_stratnet)

SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@contextlib.contextmanager
def one_thread():
    """The GP and StratNet are so small that a second thread costs more than it brings; and one thread always adds in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def search(measure, blocks, initial=48, rounds=14, batch=4, mean="blocks", kappa=0.5, steps=300, final_steps=1500, seed=0, bar=None):
    """Algorithm 1. Returns StratNet, its Scale, the final GP, and the log of evaluations.

    measure   list of strategies (d,) -> list of f2, KL in nats per token; every call is one batch, costly
    log       [{"round", "strategy", "predicted", "measured"}], predicted = exp of the GP's mean before measuring, None in round 0
    """
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net, log = StratNet(blocks), []

    def add(round, strategies, predicted):
        for x, kl, guess in zip(strategies, measure(list(strategies)), predicted):
            log.append({"round": round, "strategy": x.tolist(), "predicted": guess, "measured": kl})

    def data():
        return (torch.tensor([e["strategy"] for e in log], dtype=torch.float64),
                torch.tensor([log_divergence(e["measured"]) for e in log], dtype=torch.float64))

    # 1. measure a first design
    add(0, first_design(initial, blocks, g), [None] * initial)
    scale = Scale.of(data()[1])
    for round in range(1, rounds + 1):
        X, y = data()
        with one_thread():
            # 2. fit the Gaussian process to everything measured so far
            gp = GaussianProcess(mean).fit(X, y)
            # 3. update StratNet on its lower confidence bound
            train_stratnet(net, gp, scale, steps, kappa, g)
            # 4. of the strategies of random requests, pick the batch that adds most hypervolume, and scatter it a little
            picks = scattered(select_batch(net, gp, scale, scale(X, y), batch, kappa, g), g)
            predicted = gp.posterior(picks)[0].exp().tolist()
        # 5. prune, measure, remember
        add(round, picks, predicted)
        if bar is not None:
            last = log[-batch:]
            bar.set_postfix(hypervolume=f"{hypervolume(scale(*data())):.4f}", refresh=False,
                            predicted=f"{last[-1]['predicted']:.3f}", measured=f"{last[-1]['measured']:.3f}")
    # 6. refit, and train StratNet to the end on the mean alone
    with one_thread():
        gp = GaussianProcess(mean).fit(*data())
        train_stratnet(net, gp, scale, final_steps, 0.0, g)
    return net, scale, gp, log


def read_evaluations(path):
    """[[strategy, KL], ...] of the file `path`, which `Measure` wrote; ValueError, in one line, for anything else."""
    try:
        return [[[float(v) for v in x], math.nan if kl is None else float(kl)] for x, kl in read_json(path)["evaluations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no evaluations to resume from: {first_line(error)}") from None


class Measure:
    """f2 with a memory on disk: every value is written the moment it is measured, and never measured twice.

    Resuming replays the search from its seed: whatever is known comes from the file, so the run ends as if undisturbed.
    Under torchrun, rank r measures every world-th strategy of a batch; all ranks get all values, each keeps its own file.
    """

    def __init__(self, f2, folder, resume, bar, device="cpu"):
        self.f2, self.bar, self.device, self.seconds = f2, bar, device, 0.0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.path, self.known = folder / f"evaluations.{self.rank}.json", {}
        self.own = read_evaluations(self.path) if resume and self.path.exists() else []
        for path in sorted(folder.glob("evaluations.*.json")) if resume else ():
            self.known.update({tuple(x): kl for x, kl in read_evaluations(path)})

    def __call__(self, strategies):
        values = torch.zeros(len(strategies), dtype=torch.float64)
        for i, x in enumerate(strategies):
            if i % self.world == self.rank:
                key = tuple(x.tolist())
                if key not in self.known:
                    started = time.perf_counter()
                    self.known[key] = self.f2(x)
                    self.seconds += time.perf_counter() - started
                    self.own.append([list(key), self.known[key]])
                    write_json(self.path, {"evaluations": self.own})
                values[i] = self.known[key]
                self.bar.update(self.world if i + self.world < len(strategies) else len(strategies) - i)
        if self.world > 1:
            values = values.to(self.device)                 # nccl adds on the GPU, gloo on the CPU
            try:
                dist.all_reduce(values)
            except RuntimeError:                            # pragma: no cover (in a process of its own, which ends here)
                print("a process of this run died; finished evaluations are kept, the same command with --resume goes on", file=sys.stderr, flush=True)
                os._exit(1)                                 # the usual way out, gloo's own threads can abort
        return values.tolist()


def compare(net, pruner, tests, sparsities=SPARSITIES, done=lambda rows: None):
    """Uniform and StratNet at equal counted sparsity on every test text: rows of results.json."""
    rows = []
    references = {name: Divergence(pruner.model, windows) for name, windows in tests.items()}
    for sparsity in tqdm(sparsities, desc="table", disable=None):
        for method in ("uniform", "unicuco"):
            started = time.perf_counter()
            uniform = torch.full((len(pruner.live),), sparsity, dtype=torch.float64)
            strategy = uniform if method == "uniform" else strategy_for(net, sparsity, pruner.sparsity)
            pruner.apply(strategy)
            seconds = time.perf_counter() - started
            for name, divergence in references.items():
                kl, ppl = divergence.measure()
                rows.append({"method": method, "sparsity": sparsity, "counted": pruner.sparsity(strategy), "kl": kl, "ppl": ppl,
                             "seconds": round(seconds, 4), "test": name, "tokens": divergence.windows.numel()})
        pruner.restore()
    return rows


def show(rows):
    """Print the table, then where StratNet wins and where it does not."""
    for test in dict.fromkeys(r["test"] for r in rows):
        print(f"\n{test}, {next(r['tokens'] for r in rows if r['test'] == test)} tokens that no choice ever saw")
        print("sparsity   counted: uniform  StratNet   KL: uniform  StratNet  ratio   perplexity: uniform  StratNet")
        wins, losses = [], []
        for u, s in zip(*([r for r in rows if r["test"] == test and r["method"] == m] for m in ("uniform", "unicuco"))):
            ratio = max(s["kl"], 1e-12) / max(u["kl"], 1e-12)     # 0 against 0 is no win
            (wins if ratio < 1 else losses).append(f"{u['sparsity']:g} ({100 * (ratio - 1):+.1f} %)")
            print(f"{u['sparsity']:8.2f}   {u['counted']:16.4f} {s['counted']:9.4f}   {u['kl']:11.4f} {s['kl']:9.4f}  {ratio:5.3f}"
                  f"   {u['ppl']:19.3f} {s['ppl']:9.3f}")
        print(f"StratNet's KL is below uniform's at {', '.join(wins) or 'no sparsity'}" + "; not at " * bool(losses) + ", ".join(losses) + ".")


def fingerprint(a):
    """What a run depends on: resuming with anything else is refused."""
    weights = [sha256(path) for path in weight_files(a.model)]
    text = sha256(a.data) if a.data else hashlib.sha256("".join(stdlib_files(False)).encode()).hexdigest()
    return {"model": a.model.resolve().name, "weights": weights, "data": a.data.name if a.data else f"stdlib {platform.python_version()}",
            "sha256": text, "seed": a.seed, "initial": a.initial, "rounds": a.rounds, "batch": a.batch, "mean": a.mean,
            "metric": a.metric, "rank_bits": a.rank_bits, "tokens": a.tokens, "calibration": a.calibration, "seqlen": a.seqlen, "dtype": a.dtype}


def main():
    p = Parser(__doc__, ["python train.py", "python train.py --model DIR --data c4.jsonl --test wiki.test.raw --seed 1",
                         "python train.py --resume", "torchrun --nproc-per-node=2 train.py --device cpu"])
    add_model(p)
    p.add_argument("--data", type=Path, metavar="FILE", help="text for calibration and search (default: the embedded default text)")
    p.add_argument("--test", type=Path, nargs="+", metavar="FILE", help="texts for the table (default: held-out part of --data)")
    p.add_argument("--seed", type=int, default=0, help="of windows, first design, StratNet and requests (0)")
    p.add_argument("--initial", type=int, default=48, metavar="N", help="strategies measured first (48)")
    p.add_argument("--rounds", type=int, default=14, metavar="N", help="rounds of picking and measuring (14)")
    p.add_argument("--batch", type=int, default=4, metavar="N", help="strategies measured in each round (4)")
    p.add_argument("--mean", choices=["blocks", "constant"], default="blocks", help="the GP's prior mean (blocks)")
    p.add_argument("--metric", choices=METRICS, default="wanda", help="pruning score (wanda)")
    p.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens of one measurement of f2 (2048)")
    p.add_argument("--calibration", type=int, default=32, metavar="N", help="calibration windows (32)")
    p.add_argument("--test-tokens", type=int, default=16384, metavar="N", help="tokens of each test text (16384)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window (default: the model's positions, at most 512)")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: out/<model>")
    p.add_argument("--offload", action="store_true", help="keep the blocks in host memory, two at a time on the GPU")
    p.add_argument("--rank-bits", type=int, choices=[8, 16], default=16, help="8: half the memory of ranks, sparsities in steps of 1/256 (16)")
    p.add_argument("--resume", action="store_true", help="go on where a run with the same settings was stopped")
    a = p.parse_args()
    for name in ("initial", "batch", "tokens", "calibration", "test_tokens"):
        if getattr(a, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if a.rounds < 0:
        raise ValueError("--rounds must be at least 0")
    started, local_rank = time.perf_counter(), int(os.environ.get("LOCAL_RANK", 0))
    device, dtype, reason = choose_device(a.device, a.dtype)
    if "RANK" in os.environ:                                # started by torchrun
        if device.type == "cuda":                           # pragma: no cover (needs CUDA)
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    a.dtype, out = str(dtype)[6:], a.out or Path("out") / a.model.resolve().name
    model, tokenizer, windows, search_windows, held_out = setting(
        a.model, a.data, a.test, device, dtype, a.seqlen, a.calibration, a.tokens, a.seed, a.offload)
    tests = {name: w[:max(1, a.test_tokens // w.shape[1])] for name, w in held_out.items()}
    settings, settings_path = fingerprint(a), out / "settings.json"
    if a.resume and settings_path.exists():
        earlier = read_json(settings_path)
        changed = [key for key in settings if earlier.get(key) != settings[key]]
        if changed:
            raise ValueError(f"{out} holds a run with another {changed[0]}: {earlier.get(changed[0])!r}, now {settings[changed[0]]!r}")
    if local_rank == 0:
        for path in () if a.resume and settings_path.exists() else out.glob("evaluations.*.json"):
            path.unlink()                                   # of an earlier run
        write_json(settings_path, settings)
        print(f"{a.model.resolve().name} on {device}, {a.dtype} ({reason}); Python {platform.python_version()}, torch {torch.__version__}, "
              f"{torch.get_num_threads()} threads; calibration {windows.numel()} tokens, f2 {search_windows.numel()} tokens")
    if dist.is_initialized():
        dist.barrier()                                      # nobody measures before an earlier run is cleared away
    divergence = Divergence(model, search_windows)
    pruner = Pruner(model, windows, a.metric, a.rank_bits)

    def f2(strategy):
        pruner.apply(strategy)
        return divergence()

    total = a.initial + a.rounds * a.batch
    with tqdm(total=total, desc="evaluations of f2", disable=True if local_rank else None) as bar:
        measure = Measure(f2, out, a.resume, bar, device)
        net, scale, gp, log = search(measure, len(model.blocks), a.initial, a.rounds, a.batch, a.mean, seed=a.seed, bar=bar)
    if dist.is_initialized():
        dist.destroy_process_group()
    if local_rank:
        return                                              # one process of each machine measures the table and writes the files
    searched = time.perf_counter() - started
    write_json(out / "measured.json", log, rows=True)
    save_stratnet(out / "stratnet.safetensors", net, scale, torch.tensor([e["strategy"] for e in log], dtype=torch.float64),
                  torch.tensor([log_divergence(e["measured"]) for e in log], dtype=torch.float64), {**settings, "evaluations": total})
    pruner.restore()
    rows = compare(net, pruner, tests)
    write_json(out / "results.json", rows, rows=True)
    print(f"\n{total} evaluations of f2 in {measure.seconds:.1f} s, {100 * measure.seconds / searched:.0f} % of the {searched:.1f} s before the table;"
          f" {time.perf_counter() - started:.1f} s in all; wrote {out}")
    last = [e for e in log if e["round"] == a.rounds and e["predicted"]]
    if last:
        print("last round, predicted and measured KL: " + ", ".join(f"{e['predicted']:.3f} {e['measured']:.3f}" for e in last)
              + f"; median gap {100 * statistics.median(abs(e['predicted'] / max(e['measured'], 1e-6) - 1) for e in last):.1f} %")
    show(rows)


if __name__ == "__main__":
    run(main, ": what was measured is kept, the same command with --resume goes on")
