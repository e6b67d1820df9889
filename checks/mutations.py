"""
Do the tests notice? Break the code on purpose, one place at a time, and run the tests that should
fail.

Run       python checks/mutations.py                  (all of them; 135 take 6 minutes on one core)
          python checks/mutations.py --only 12        (the first 12)
A break is caught when a named test fails, and survives when all pass. The folder is copied: nothing
here is ever changed.
Ends with one line; exit code 1 when a break survived, 2 when an entry of the list is wrong.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401 (what the tests import, imported here once)
import pytest
import scipy.stats  # noqa: F401
import torch  # noqa: F401
import transformers

ROOT = Path(__file__).resolve().parent.parent
PARITY, PICKS = "unicuco: logits and grouped", "properties: picks"
KL, HOOKS = "unicuco: divergence_is_0", "unicuco: activation_norms_equal"
LIKELIHOOD, GRADIENTS = "unicuco: log_likelihood_equals", "unicuco: posterior_equals"
PLAIN_LOOPS, SAME_TWICE = "properties: log_likelihoods_and_bits", "properties: bitwise_equal"

# file, the text that is there exactly once, what it becomes, the tests that must notice ("NAME: -k
# expression" in test_NAME.py)
BREAKS = [
    # llama.py: the model
    ("llama.py", "torch.cat((-second, first), -1)", "torch.cat((second, -first), -1)", PARITY),
    ("llama.py", "first, second = x.chunk(2, -1)", "second, first = x.chunk(2, -1)", PARITY),
    ("llama.py", "is_causal=T > 1,", "is_causal=False,", PARITY),
    ("llama.py", "is_causal=T > 1,", "is_causal=T > 1, scale=1.0,", PARITY),
    (
        "llama.py",
        "(q, k, v, is_causal=T > 1, enable_gqa=q.shape[1] != k.shape[1])",
        "(q, *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v)), is_causal=T > 1)",
        PARITY,
    ),
    ("llama.py", "return h + self.mlp.down_proj(", "return self.mlp.down_proj(", PARITY),
    (
        "llama.py",
        "F.silu(self.gate_proj(x)) * self.up_proj(x)",
        "self.gate_proj(x) * F.silu(self.up_proj(x))",
        PARITY,
    ),
    (
        "llama.py",
        "    if tied:\n        model.lm_head.weight = ",
        "    if not tied:\n        model.lm_head.weight = ",
        PARITY,
    ),
    (
        "llama.py",
        "        if config.tie_word_embeddings:\n            self.lm_head",
        "        if False:\n            self.lm_head",
        PARITY,
    ),
    (
        "llama.py",
        'frequency / c.rope_scaling["factor"]',
        'frequency * c.rope_scaling["factor"]',
        "unicuco: logits and linear",
    ),
    (
        "llama.py",
        '(1 - blend) * frequency / s["factor"] + blend * frequency',
        'blend * frequency / s["factor"] + (1 - blend) * frequency',
        "unicuco: logits and llama3",
    ),
    (
        "llama.py",
        'bias or family == "qwen2", bias,',
        "bias, bias,",
        "properties: transformers_made",
    ),
    (
        "llama.py",
        "start, step = start + step.shape[1],",
        "start, step = start + 1,",
        "unicuco: generation",
    ),
    # llama.py: files
    (
        "packed.py",
        "(1 << torch.arange(8))).sum",
        "(1 << torch.arange(7, -1, -1))).sum",
        "properties: bit_pattern",
    ),
    ("packed.py", "or kept[:, d_in:].any()", "", "properties: bit_pattern"),
    (
        "packed.py",
        "values.new_zeros(1), values]",
        "-values.new_zeros(1), values]",
        "properties: bit_pattern",
    ),
    (
        "llama.py",
        "torch.where(kept.cpu(), value,",
        "torch.where(kept.cpu(), live[name].detach().to(value.dtype),",
        "unicuco: pruned_in_bfloat16",
    ),
    (
        "llama.py",
        "kept = (weight != 0) | weight.signbit() | (value.to(weight.dtype) == 0)",
        "kept = weight != 0",
        "unicuco: pruned_in_bfloat16",
    ),
    # eval.py
    (
        "eval.py",
        "ids = [[tokenizer.bos_id] * tokenizer.adds_bos,",
        "ids = [[tokenizer.bos_id] * (2 * tokenizer.adds_bos),",
        "properties: begin_token",
    ),
    (
        "eval.py",
        "start = [tokenizer.bos_id] if tokenizer.adds_bos",
        "start = [tokenizer.bos_id] * 2 if tokenizer.adds_bos",
        "properties: begin_token",
    ),
    (
        "eval.py",
        "context, continuation = context[:-spaces], context[-spaces:] + continuation",
        "context = context[:-spaces]",
        "properties: begin_token",
    ),
    (
        "eval.py",
        "names = sorted(p.as_posix()",
        "names = list(p.as_posix()",
        "properties: hash_seed",
    ),
    ("eval.py", "return windows[:share], {", "return windows, {", "properties: chosen_on"),
    (
        "eval.py",
        "for part in order[:sum(counts)].split(counts)",
        "for part in map(order.__getitem__, map(slice, counts))",
        "properties: chosen_on",
    ),
    (
        "eval.py",
        "losses(model, model.hidden(w)[:, :-1].flatten(0, 1), w[:, 1:]",
        "losses(model, model.hidden(w)[:, 1:].flatten(0, 1), w[:, 1:]",
        "unicuco: perplexity_equals",
    ),
    ("eval.py", "count + nll.numel()", "count + w.numel()", "unicuco: perplexity_equals"),
    (
        "eval.py",
        "torch.cat([w[:, 1:], torch.full_like(w[:, :1], -1)], 1)",
        "torch.cat([w[:, :-1], torch.full_like(w[:, :1], -1)], 1)",
        KL,
    ),
    ("eval.py", "q_all - p_all - (", "q_all - p_all + (", KL),
    ("eval.py", "((p_sum - p_all).exp() * gap)", "(gap / len(slices))", "unicuco: kl_div_for"),
    ("eval.py", "targets - i * size", "targets - (i + 1) * size", "unicuco: perplexity_equals"),
    ("eval.py", "max(float(kl) / self.windows.numel(), 0.0)", "max(float(kl) / scored, 0.0)", KL),
    (
        "eval.py",
        "max(float(kl) / self.windows.numel(), 0.0)",
        "max(0.0, float(kl) / self.windows.numel())",
        "properties: nan_weights",
    ),
    (
        "eval.py",
        "torch.cat([torch.full_like(y[:, :1], bos), y[:, :-1]], 1)",
        "y.roll(1, 1)",
        PLAIN_LOOPS,
    ),
    ("eval.py", "h[j, len(s) - 1 - c:len(s) - 1]", "h[j, len(s) - 2 - c:len(s) - 2]", PLAIN_LOOPS),
    (
        "eval.py",
        "ids = [pairs[i][0][-room - 1:] for i in batch]",
        "ids = [pairs[i][0][:room + 1] for i in batch]",
        PLAIN_LOOPS,
    ),
    (
        "eval.py",
        "(score / np.array(lengths))",
        "(score / np.array([n for _, n in pairs[first - len(contexts):first]]))",
        "properties: characters_not_by",
    ),
    (
        "eval.py",
        'return [before + row["option1"], before + row["option2"]], [" " + after.strip()] * 2,',
        'return [before] * 2, [row["option1"], row["option2"]],',
        "unicuco: prompts",
    ),
    ("eval.py", "np.std(right, ddof=1)", "np.std(right)", "properties: standard_errors"),
    # gp.py
    ("gp.py", "psi.mul_(5 / 3)", "psi.mul_(3 / 5)", LIKELIHOOD),
    ("gp.py", "value=1 / 3)", "value=5 / 3)", LIKELIHOOD),
    ("gp.py", "signal = 0.5 * ((G * K).sum()", "signal = -0.5 * ((G * K).sum()", LIKELIHOOD),
    (
        "gp.py",
        "- chol.diagonal().log().sum() -",
        "- 0.5 * chol.diagonal().log().sum() -",
        LIKELIHOOD,
    ),
    ("gp.py", "(-2 * theta[:-2]).exp()", "(-theta[:-2]).exp()", LIKELIHOOD),
    (
        "gp.py",
        "for jitter in (0.0, *(JITTER * 10 ** k * size for k in range(8))):",
        "for jitter in (0.0,):",
        "properties: cholesky",
    ),
    ("gp.py", "if not math.isfinite(value):  ", "if False:  ", "properties: minimising"),
    ("gp.py", "if chol is None:", "if False:", "properties: a_fit_goes_on"),
    (
        "gp.py",
        "gradient - deviation / width",
        "gradient + deviation / width",
        "properties: stationary",
    ),
    ("gp.py", "grad_a * alpha.sigmoid()", "grad_a", "properties: stationary"),
    ("gp.py", "(self.a / (x + SHIFT) + self.b)", "(self.a / (x + SHIFT))", GRADIENTS),
    ("gp.py", "-self.deviation ** 2 / std", "self.deviation ** 2 / std", GRADIENTS),
    ("gp.py", "self.weights = self.mean.scale * signal", "self.weights = signal", GRADIENTS),
    (
        "gp.py",
        "torch.where(left > VARIANCE_FLOOR, -self.deviation ** 2 / std, 0)",
        "-self.deviation ** 2 / std",
        "properties: no_variance",
    ),
    ("gp.py", "float(spread) if spread > 1e-8 else 1.0", "float(spread)", "unicuco: gp_survives"),
    # unicuco.py
    (
        "unicuco.py",
        "if math.isfinite(kl) else DIVERGENCES[1]",
        "if math.isfinite(kl) else DIVERGENCES[0]",
        "properties: 100_nats",
    ),
    (
        "unicuco.py",
        "max(float(max(y)), float(min(y)) + 1e-3)",
        "float(max(y))",
        "properties: divides_by_no_zero",
    ),
    (
        "unicuco.py",
        "[(MAX - strategies.mean(1)) / MAX, (y - self.lo) / (self.hi - self.lo)]",
        "[(y - self.lo) / (self.hi - self.lo), (MAX - strategies.mean(1)) / MAX]",
        "properties: worked_by_hand",
    ),
    (
        "unicuco.py",
        "requests * (objectives - IDEAL)",
        "requests * (objectives + IDEAL)",
        "unicuco: tchebycheff",
    ),
    (
        "unicuco.py",
        "weighted.amax(1) + AUGMENT * weighted.sum(1)",
        "weighted.amax(1)",
        "properties: pareto_optimal_point",
    ),
    (
        "unicuco.py",
        "weighted.amax(1) + AUGMENT * weighted.sum(1)",
        "weighted.sum(1)",
        "properties: weighted_sum",
    ),
    (
        "unicuco.py",
        "(torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) /"
        " count",
        "torch.rand(count, generator=generator, dtype=torch.float64)",
        "properties: first_design",
    ),
    (
        "unicuco.py",
        "mean - kappa * std), requests)",
        "mean + kappa * std), requests)",
        "properties: learns_to_prefer",
    ),
    ("unicuco.py", "mean - kappa * std), []", "mean + kappa * std), []", PICKS),
    ("unicuco.py", "strategies = strategies[wanted]", "pass", PICKS),
    (
        "unicuco.py",
        "gain = std.clone()\n                gain[picks] = -1",
        "gain = std.clone()",
        PICKS,
    ),
    ("unicuco.py", "if wanted.sum() < count:", "if False:", PICKS),
    ("unicuco.py", "measured = torch.cat([measured, objectives[picks[-1:]]])", "pass", PICKS),
    ("unicuco.py", ".mean()) < sparsity:", ".mean()) > sparsity:", "properties: stays_close"),
    ("unicuco.py", "[0].clamp(-CLAMP, CLAMP)", "[0]", "properties: within_one_step"),
    (
        "unicuco.py",
        "(logits + middle)) < target",
        "(logits + middle)) > target",
        "properties: within_one_step",
    ),
    (
        "unicuco.py",
        "torch.cat([above[:i + 1], below[i + 1:]])",
        "above",
        "properties: within_one_step",
    ),
    (
        "unicuco.py",
        "edges[2:] - edges[1:-1]) * (1 - heights[1:])",
        "edges[2:] - edges[1:-1]) * (1 - heights[:-1])",
        "properties: hypervolume",
    ),
    (
        "unicuco.py",
        "torch.maximum(edges[:-1], candidates[:, :1])",
        "edges[:-1]",
        "properties: hypervolume",
    ),
    (
        "unicuco.py",
        "if size < 1 and divergence < height:",
        "if divergence < height:",
        "properties: hypervolume",
    ),
    # prune.py
    (
        "prune.py",
        "return W.abs().float() * x_norm",
        "return W.abs().float() / x_norm",
        "unicuco: wanda_differs",
    ),
    ("prune.py", "squares[name].sqrt() for", "squares[name] for", HOOKS),
    ("prune.py", "see(mixed, LINEARS[3])", "see(x, LINEARS[3])", HOOKS),
    ("prune.py", "squares.get(name, 0) + energy", "energy", "properties: activation_norms"),
    (
        "prune.py",
        "return int(sparsity * d_in + 1e-6)",
        "return int(sparsity * d_in)",
        "unicuco: masks_drop",
    ),
    ("prune.py", "np.sort(keys.numpy())", "-np.sort(-keys.numpy())", "unicuco: masks_drop"),
    (
        "prune.py",
        ".bitwise_left_shift_(24).bitwise_or_(columns)",
        ".bitwise_right_shift_(2).bitwise_left_shift_(24).bitwise_or_(columns)",
        "properties: superset",
    ),
    (
        "prune.py",
        "return rank(score.float()) >= count(",
        "return rank(score.float()) > count(",
        "unicuco: masks_drop",
    ),
    ("prune.py", 'if not float(score.sum()) < float("inf"):', "if False:", "unicuco: masks_drop"),
    ("prune.py", "torch.ge(r, k, out=o)", "torch.gt(r, k, out=o)", "unicuco: applying"),
    (
        "prune.py",
        "zip(W.view(bits).split(step), ranks.split(step), out.view(bits).split(step))",
        "zip(W.split(step), ranks.split(step), out.split(step))",
        "unicuco: applying",
    ),
    (
        "prune.py",
        "return {name: r >= k for names",
        "return {name: (r >= k).T.reshape(r.shape) for names",
        "unicuco: applying",
    ),
    (
        "prune.py",
        "return float((self.counts(strategy) * self.d_out).sum() / ((self.d_in *"
        " self.d_out).sum() * len(self.live)))",
        "return float(torch.as_tensor(strategy).mean())",
        "properties: counted_sparsity",
    ),
    ("gp.py", "(w * X).T @ e + (b - common) / 0.25", "(w * X).T @ e", "properties: stationary"),
    (
        "unicuco.py",
        "logit(strategies) + by * torch.randn",
        "logit(strategies) + by * by * torch.randn",
        "properties: scattered",
    ),
    ("prune.py", "* self.d_in / 256).ceil()", "* self.d_in / 256).floor()", "scale: 8_bit"),
    (
        "prune.py",
        "self.d_in) + 1e-6).floor()",
        "self.d_in) + 1e-6).round()",
        "properties: counted_sparsity or column_order",
    ),
    ("prune.py", "            return True\n", "            return False\n", "scale: sequential"),
    (
        "prune.py",
        "x.argsort(descending=True, stable=True)",
        "x.argsort(stable=True)",
        "walkthrough: semi_structured",
    ),
    # wishes.py, offload.py
    (
        "wishes.py",
        "(middle, high) if fits(middle) else (low, middle)",
        "(low, middle) if fits(middle) else (middle, high)",
        "properties: a_wish",
    ),
    (
        "wishes.py",
        "if not measure(curve(0.01)) <= value:",
        "if measure(curve(0.01)) > value:",
        "properties: a_wish",
    ),
    (
        "wishes.py",
        "offset = log_divergence(kl)",
        "offset = math.log(max(kl, 1e-6))",
        "properties: a_wish",
    ),
    (
        "offload.py",
        "            yield room\n",
        "            yield self.rooms[0][0]\n",
        "scale: offloaded",
    ),
    # train.py
    ("train.py", "    torch.manual_seed(seed)\n", "", SAME_TWICE),
    (
        "train.py",
        "gp.posterior(picks)[0].exp().tolist()",
        "gp.posterior(picks)[0].tolist()",
        SAME_TWICE,
    ),
    (
        "train.py",
        'log_divergence(e["measured"]) for e in log], dtype=torch.float64))\n\n',
        'e["measured"] for e in log], dtype=torch.float64))\n\n',
        "properties: broken_or_constant",
    ),
    ("train.py", "if key not in self.known:", "if True:", "properties: never_measured_again"),
    ("train.py", '"seed": a.seed, ', "", "properties: fingerprint"),
    (
        "train.py",
        'uniform if method == "uniform" else strategy_for(net, sparsity, pruner.sparsity)',
        "uniform",
        "properties: the_table",
    ),
    (
        "train.py",
        "(wins if ratio < 1 else losses)",
        "(losses if ratio < 1 else wins)",
        "properties: the_table",
    ),
    # baselines.py: a weakened opponent must not go unnoticed
    (
        "baselines.py",
        "(scores > m * scores.mean())",
        "(scores < m * scores.mean())",
        "comparison: outlier_shares",
    ),
    (
        "baselines.py",
        "return shift_to(logit(sparsity - (spread",
        "return shift_to(logit(sparsity + (spread",
        "comparison: owl_keeps",
    ),
    (
        "baselines.py",
        ".clamp(min=1e-12) * 2 * lam",
        ".clamp(min=1e-12) * lam",
        "comparison: owl_keeps",
    ),
    (
        "baselines.py",
        "return min(candidates, key=f2)",
        "return candidates[0]",
        "comparison: owl_keeps",
    ),
    ("baselines.py", "if kl < best:", "if kl > best:", "comparison: evopress"),
    ("baselines.py", "parent, best = child, kl", "best = kl", "comparison: evopress"),
    (
        "baselines.py",
        "child[up] + size, child[down] - size",
        "child[up] + size, child[down] + size",
        "comparison: child_of_evopress",
    ),
    (
        "baselines.py",
        "children.sort(key=quick)",
        "children.sort(key=quick, reverse=True)",
        "comparison: evopress",
    ),
    ("baselines.py", "        children.sort(key=quick)\n", "", "comparison: evopress"),
    ("baselines.py", "spent += cost", "spent += survivors", "comparison: evopress"),
    (
        "baselines.py",
        "wanted = sorted({*snapshots, budget})",
        "wanted = sorted({*snapshots, budget // 2})",
        "comparison: evopress",
    ),
    ("baselines.py", "mean - 0.5 * std + 100", "100 - mean + 100", "comparison: a_gp_for_one"),
    (
        "baselines.py",
        "picks = [shift_to(p,",
        "picks = [shift_to(start[0],",
        "comparison: a_gp_for_one",
    ),
    (
        "baselines.py",
        "return X[min(range(len(X))",
        "return X[max(range(len(X))",
        "comparison: a_gp_for_one",
    ),
    # bench.py
    (
        "bench.py",
        "self.tokens += self.divergence.windows.numel()",
        "self.tokens += 1",
        "comparison: writes_and_prints",
    ),
    ("bench.py", "if earlier.get(key) != inputs[key]", "if False", "comparison: was_stopped"),
    (
        "bench.py",
        'self.content = {"found": {}, **read_json(path)}',
        "pass",
        "comparison: was_stopped",
    ),
    (
        "bench.py",
        "gp_search(f2, s, blocks, counted, budget // 2, seed)",
        "gp_search(f2, s, blocks, counted, budget // 4, seed)",
        "comparison: writes_and_prints",
    ),
    (
        "bench.py",
        "    pruner.restore()\n    references = {",
        "    references = {",
        "comparison: writes_and_prints",
    ),
    (
        "bench.py",
        "            pruner.restore()\n            references.append(",
        "            references.append(",
        "comparison: table_of_benchmarks",
    ),
    (
        "bench.py",
        'j[method][s][test][0] / j["uniform"][s][test][0]',
        'j[method][s][test][1] / j["uniform"][s][test][1]',
        "comparison: writes_and_prints",
    ),
    (
        "bench.py",
        'fixed + each * requests, "tokens"',
        'fixed + each, "tokens"',
        "comparison: writes_and_prints or medians",
    ),
    (
        "bench.py",
        "typical = statistics.median if",
        "typical = statistics.mean if",
        "comparison: medians",
    ),
    ("bench.py", "shared + per_request * requests", "shared + per_request", "comparison: medians"),
    ("bench.py", "{t: max(r for per", "{t: min(r for per", "comparison: writes_and_prints"),
    (
        "bench.py",
        'np.divide(ours["each_seed"][t], theirs["each_seed"][t])',
        'np.divide(theirs["each_seed"][t], ours["each_seed"][t])',
        "comparison: a_tie",
    ),
    (
        "bench.py",
        '"a tie" if abs(mean - 1) <= spread',
        '"a tie" if abs(mean - 1) < 0',
        "comparison: a_tie",
    ),
    (
        "bench.py",
        "right[0][task] - own[task]",
        "own[task] - right[0][task]",
        "comparison: paired_by_document",
    ),
    (
        "bench.py",
        "sum(standard_error(x) ** 2 for x in lost)) / len(TASKS)",
        "sum(standard_error(x) ** 2 for x in lost) / len(TASKS))",
        "comparison: paired_by_document",
    ),
    (
        "bench.py",
        "cut(windows.flatten()[:tokens],",
        "cut(windows.flatten(),",
        "comparison: table_of_benchmarks",
    ),
    (
        "bench.py",
        'ratios = [r["kl"] / kl for',
        'ratios = [kl / r["kl"] for',
        "comparison: table_of_benchmarks",
    ),
    (
        "bench.py",
        "if mean(r) <= mean(ours)",
        "if mean(r) >= mean(ours)",
        "comparison: writes_and_prints",
    ),
]


def run_tests(folder, tests):
    """Exit code and output of the tests "NAME: expression" in the copy. Forked, so that torch is
    imported once for all breaks.
    """
    name, expression = tests.split(": ")
    with tempfile.TemporaryFile("w+") as log:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = pytest.main(
                ["-x", "-q", "-p", "no:cacheprovider", f"test_{name}.py", "-k", expression]
            )
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        return code, log.read()


def outcome(code, output):
    """One word and why: a test that cannot even start has caught nothing."""
    if code == 0:
        return "SURVIVED", ""
    failed = re.findall(r"^FAILED \S+::(\w+)", output, re.M)
    if code == 1 and failed:
        return "caught", failed[0]
    return "WRONG", f"pytest ended with {code}: {output.strip().splitlines()[-1]}"


def stop(message):
    print(message, file=sys.stderr)
    sys.exit(2)


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument(
        "--only",
        type=int,
        default=len(BREAKS),
        metavar="N",
        help="the first N breaks (default: all)",
    )
    p.add_argument("--first", type=int, default=1, metavar="N", help="start with break N (1)")
    a = p.parse_args()
    transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # imported on first use
    sys.dont_write_bytecode = True  # two breaks of one second have the same time: no stale bytecode
    chosen, started, outcomes = (
        list(enumerate(BREAKS, 1))[a.first - 1 :][: a.only],
        time.perf_counter(),
        [],
    )
    for number, (file, old, new, _) in chosen:
        found = (ROOT / file).read_text(encoding="utf-8").count(old)
        if found != 1:
            stop(f"break {number}: {file} holds {old!r} {found} times, not once")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "out"))
        for name in sorted({tests.split(": ")[0] for _, (*_, tests) in chosen}):
            mine = {
                tests.split(": ")[1] for _, (*_, tests) in chosen if tests.startswith(name + ": ")
            }
            code, output = run_tests(
                folder, f"{name}: " + " or ".join(f"({e})" for e in sorted(mine))
            )
            if code:
                stop(f"unbroken, the named tests of test_{name}.py fail already:\n{output}")
        print(f"unbroken, all named tests pass ({time.perf_counter() - started:.0f} s)", flush=True)
        for number, (file, old, new, tests) in chosen:
            text = (ROOT / file).read_text(encoding="utf-8")
            (folder / file).write_text(text.replace(old, new), encoding="utf-8")
            word, why = outcome(*run_tests(folder, tests))
            (folder / file).write_text(text, encoding="utf-8")
            outcomes.append(word)
            print(
                f"{number:3} {word:<8} {file:<10} {' '.join(old.split())[:48]:<48}  {why}",
                flush=True,
            )
    print(
        f"{len(outcomes)} breaks: {outcomes.count('caught')} caught, {outcomes.count('SURVIVED')}"
        f" survived, {outcomes.count('WRONG')} wrong entries; "
        f"{time.perf_counter() - started:.0f} s"
    )
    sys.exit(1 if "SURVIVED" in outcomes else 2 if "WRONG" in outcomes else 0)


if __name__ == "__main__":
    main()
