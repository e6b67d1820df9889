"""
What pruning costs: reading text, perplexity, KL divergence from the dense model (the objective f2), zero-shot accuracy.

Source    perplexity as GPTQ, SparseGPT and Wanda score it; zero-shot tasks as EleutherAI lm-evaluation-harness 0.4.13.
Reading   2 of 6. Before: llama.py. Next: gp.py.
Shapes    N tokens of a text, n windows of T tokens, D model width, V vocabulary.
Not here  few-shot prompts, generation tasks.

Laptop    python eval.py                               (40 s; ends with one line: perplexity and its protocol)
Full      python eval.py --model DIR --data wiki.test.raw --seqlen 2048 --tasks zeroshot/ --dense DENSE_DIR
"""
import hashlib
import json
import lzma
import math
import platform
import re
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear
from tqdm import tqdm

from llama import Parser, add_model, choose_device, first_line, load_llama, run

BATCH = 2048          # tokens that go through the blocks at once
CHUNK = 2**20         # logits that exist at once: 4 MB in float32, which stay in the processor's cache


# ----------------------------------------------------------------------------------------------------------------- text
def stdlib_files(held_out):
    """Python's standard library, its own .py files without tests, in path order: the documents of the embedded default text.

    A tenth of the files, chosen by the hash of their path, is held out: `held_out=True` gives that tenth, False the rest.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    paths = (p.relative_to(root) for p in root.rglob("*.py"))
    names = sorted(p.as_posix() for p in paths if not skipped & set(p.parts[:-1]))
    chosen = [n for n in names if (int(hashlib.sha256(n.encode()).hexdigest(), 16) % 10 == 0) == held_out]
    return [(root / n).read_bytes().decode("utf-8") for n in chosen]


def wikitext(raw):
    """The file wiki.*.raw as the string that GPTQ, SparseGPT and Wanda score: its rows, blank ones empty, joined by blank lines."""
    rows = raw.split("\n")[:-1] if raw.endswith("\n") else raw.split("\n")
    return "\n\n".join("" if row.strip() == "" else row + "\n" for row in rows)


def read_documents(path):
    """The documents of a text file: .jsonl gives each row's "text" and a blank line (C4), .raw the WikiText string, else one text."""
    path = Path(path)
    try:
        raw = path.read_bytes().decode("utf-8")
        if path.suffix == ".jsonl":
            documents = [row["text"] + "\n\n" for row in map(json.loads, filter(str.strip, raw.split("\n")))]
        else:
            documents = [wikitext(raw) if path.suffix == ".raw" else raw]
    except OSError as error:
        raise ValueError(f"text {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"text {path} is not UTF-8 text, or not jsonl with a text in each row: {first_line(error)}") from None
    if not any(d.strip() for d in documents):
        raise ValueError(f"text {path} is empty")
    return documents


def tokenise(tokenizer, documents):
    """Documents, each tokenised once, one after the other -> (N,) long, the begin token in front where the tokenizer adds it."""
    ids = [[tokenizer.bos_id] * tokenizer.adds_bos, *tokenizer.encode(documents)]
    return torch.from_numpy(np.concatenate([np.array(i, dtype=np.int64) for i in ids]))


def cut(tokens, seqlen):
    """tokens (N,) -> windows (N // seqlen, seqlen), the remainder dropped; ValueError when there is none."""
    if len(tokens) < seqlen:
        raise ValueError(f"a text of {len(tokens)} tokens is shorter than one window of {seqlen}")
    return tokens[:len(tokens) // seqlen * seqlen].view(-1, seqlen)


def load_texts(tokenizer, data, tests, seqlen):
    """-> windows (n, seqlen) to choose on, {name: windows} to test on; no window is in both.

    data      file for calibration and search, None = the embedded default; without `tests`, its last fifth is kept for testing
    """
    if data is None:
        documents, held_out = stdlib_files(False), {"stdlib held-out files": stdlib_files(True)}
    else:
        documents, held_out = read_documents(data), {}
        if not tests and len(documents) >= 5:
            share = len(documents) * 4 // 5
            documents, held_out = documents[:share], {f"last fifth of {Path(data).name}": documents[share:]}
        elif not tests:
            windows = cut(tokenise(tokenizer, documents), seqlen)
            share = len(windows) * 4 // 5
            return windows[:share], {f"last fifth of {Path(data).name}": windows[share:]}
    if tests:
        held_out = {Path(t).name: read_documents(t) for t in tests}
    held_out = {name: cut(tokenise(tokenizer, d), seqlen) for name, d in held_out.items()}
    return cut(tokenise(tokenizer, documents), seqlen), held_out


def draw(windows, counts, seed):
    """Disjoint random sets of windows (n, T), one for each of `counts`; ValueError when there are too few."""
    if sum(counts) > len(windows):
        raise ValueError(f"the text has {len(windows)} windows of {windows.shape[1]} tokens, {sum(counts)} are needed")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[part] for part in order[:sum(counts)].split(counts)]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ----------------------------------------------------------------------------------------------- perplexity, divergence
def batches(windows):
    return windows.split(max(1, BATCH // windows.shape[1]))


def losses(model, h, targets, dense=None):
    """What hidden states h (tokens, D) cost: negative log-likelihood of targets (tokens,) and, given the `dense` model's states, KL
    from them: two (tokens,) float64 in nats, the second None without `dense`. A target of -1 is none; its likelihood means nothing.

    The vocabulary goes by in slices, so that at most CHUNK logits exist of each side. With z the logits and L the log of their
    summed exponentials, -log q_y = L_q - z_qy and KL = sum_v p_v (z_pv - z_qv) - L_p + L_q, the sum over v slice by slice.
    """
    size = max(1, (CHUNK if h.device.type == "cpu" else 16 * CHUNK) // max(1, len(h)))      # many small kernels starve a GPU
    slices, target = model.head.weight.split(size), torch.zeros(len(h), device=h.device)
    # before the loop, for small tensors that outlive their slice would lie between the large ones and scatter the heap
    q_sum, p_sum, gap = torch.zeros(3, len(slices), len(h), dtype=torch.float64, device=h.device)
    for i, words in enumerate(slices):
        q, place = linear(h, words).float(), targets - i * size
        target += q.gather(1, place.clamp(0, len(words) - 1)[:, None])[:, 0].where((place >= 0) & (place < len(words)), 0)
        q_sum[i] = q.logsumexp(1)
        if dense is not None:
            p = linear(dense, words).float()
            p_sum[i] = p.logsumexp(1)
            q.sub_(p)
            gap[i] = p.sub_(p_sum[i].float()[:, None]).exp_().mul_(q).sum(1)                 # p within its slice, times z_q - z_p
    q_all, p_all = q_sum.logsumexp(0), p_sum.logsumexp(0)
    return q_all - target, None if dense is None else q_all - p_all - ((p_sum - p_all).exp() * gap).sum(0)


@torch.inference_mode()
def perplexity(model, tokens, seqlen=None):
    """exp of the mean negative log-likelihood of tokens (N,), in windows of `seqlen` whose first token is context only."""
    seqlen = seqlen or min(2048, model.config.max_position_embeddings)
    total, count = 0.0, 0
    for w in tqdm(batches(cut(tokens, seqlen)), desc="perplexity", disable=None, leave=False):
        w = w.to(model.embed.weight.device)
        nll, _ = losses(model, model.hidden(w)[:, :-1].flatten(0, 1), w[:, 1:].flatten())
        total, count = total + nll.sum(), count + nll.numel()
    return math.exp(min(float(total) / count, 700))


@torch.inference_mode()
def bits_per_byte(model, tokens, n_bytes, bos, seqlen):
    """Bits per raw byte of a text: windows open with the begin token, so that every token counts, the first included."""
    total = 0.0
    for y in (*batches(cut(tokens, seqlen)), tokens[None, len(tokens) // seqlen * seqlen:]):
        y = y.to(model.embed.weight.device)
        x = torch.cat([torch.full_like(y[:, :1], bos), y[:, :-1]], 1)
        total += losses(model, model.hidden(x).flatten(0, 1), y.flatten())[0].sum()
    return float(total) / math.log(2) / n_bytes


class Divergence:
    """f2: KL(P_dense || P_pruned) in nats per token, the mean over all positions of windows (n, T).

    The dense side is recorded at construction, as final hidden states: (n T, D) instead of (n T, V), for the head is never pruned.
    Calling it measures the model as it is now. Memory beyond that: four times CHUNK logits in float32.
    """

    @torch.inference_mode()
    def __init__(self, model, windows):
        self.model, self.windows = model, windows.to(model.embed.weight.device)
        self.dense = [model.hidden(w).flatten(0, 1) for w in batches(self.windows)]

    def __call__(self):
        return self.measure()[0]

    @torch.inference_mode()
    def measure(self):
        """(KL, perplexity) of the model as it is now, from one forward pass; perplexity as in `perplexity`. NaN stays NaN."""
        kl = loss = torch.zeros((), dtype=torch.float64, device=self.windows.device)
        for w, dense in zip(batches(self.windows), self.dense):
            y = torch.cat([w[:, 1:], torch.full_like(w[:, :1], -1)], 1).flatten()        # -1: the last position has no target
            nll, divergence = losses(self.model, self.model.hidden(w).flatten(0, 1), y, dense)
            loss, kl = loss + nll.where(y >= 0, 0).sum(), kl + divergence.sum()
        scored = self.windows.numel() - len(self.windows)
        return max(float(kl) / self.windows.numel(), 0.0), math.exp(min(float(loss) / scored, 700))


# ------------------------------------------------------------------------------------------------------------ zero-shot
TASKS = {"piqa": "piqa_validation.jsonl", "arc_easy": "arc_easy_test.jsonl", "arc_challenge": "arc_challenge_test.jsonl",
         "hellaswag": "hellaswag_validation.jsonl", "winogrande": "winogrande_xl_validation.jsonl"}


def clean(text):
    """HellaSwag without the marks that its WikiHow part carries."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def prompts(task, row):
    """One row of a task -> (contexts, continuations, lengths in characters that acc_norm divides by or None, gold index)."""
    if task == "winogrande":              # partial scoring: the options stand in the context, what follows them is scored
        before, after = row["sentence"].split("_", 1)
        return [before + row["option1"], before + row["option2"]], [" " + after.strip()] * 2, None, int(row["answer"]) - 1
    if task == "piqa":
        context, choices, gold = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]
    elif task == "hellaswag":
        context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        choices, gold = [clean(e) for e in row["endings"]], row["label"]
    else:
        context, choices = f"Question: {row['question']}\nAnswer:", row["choices"]["text"]
        gold = row["choices"]["label"].index(row["answerKey"])
    return [context] * len(choices), [" " + c for c in choices], [len(c) for c in choices], gold


def encode_pair(tokenizer, context, continuation):
    """Token ids of context + continuation, and how many of them belong to the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    whole = start + tokenizer.encode(context + continuation)
    return whole, len(whole) - len(start + tokenizer.encode(context))


@torch.inference_mode()
def log_likelihoods(model, pairs, label=""):
    """Sum of log-probabilities in nats of the last `count` ids of each (ids, count): batched by length, padded on the right."""
    device, room = model.embed.weight.device, model.config.max_position_embeddings
    result = torch.empty(len(pairs), dtype=torch.float64)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
    with tqdm(total=len(pairs), desc=label, disable=None) as bar:
        while order:
            width = min(len(pairs[order[0]][0]) - 1, room)
            batch, order = order[:max(1, BATCH // width)], order[max(1, BATCH // width):]
            ids = [pairs[i][0][-room - 1:] for i in batch]
            h = model.hidden(torch.tensor([s[:-1] + [0] * (width + 1 - len(s)) for s in ids], device=device))
            counts = [min(pairs[i][1], len(s) - 1) for i, s in zip(batch, ids)]
            scored = torch.cat([h[j, len(s) - 1 - c:len(s) - 1] for j, (s, c) in enumerate(zip(ids, counts))])
            targets = torch.tensor([t for s, c in zip(ids, counts) for t in s[len(s) - c:]], device=device)
            nll = losses(model, scored, targets)[0].cpu().split(counts)
            result[batch] = -torch.stack([x.sum() for x in nll])
            bar.update(len(batch))
    return result


def zero_shot(model, tokenizer, task, rows):
    """Multiple choice by likelihood, as lm-evaluation-harness 0.4.13 scores it.

    task      one of TASKS;  rows: list of dicts in the schema of the Hugging Face dataset
    returns   {"acc", "acc_norm", "predictions", "predictions_norm", "gold"}: shares right, and each row's chosen index; acc_norm
              compares log-likelihoods per character of the choice; it and predictions_norm are None for winogrande
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}")
    try:
        asked = [prompts(task, row) for row in rows]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"a row of {task} does not have the task's fields: {first_line(error)}") from None
    pairs = [encode_pair(tokenizer, c, x) for contexts, continuations, _, _ in asked for c, x in zip(contexts, continuations)]
    scores = log_likelihoods(model, pairs, task).numpy()
    best, best_norm, first = [], [], 0
    for contexts, _, lengths, _ in asked:
        score, first = scores[first:first + len(contexts)], first + len(contexts)
        best.append(int(score.argmax()))
        best_norm.append(int((score / np.array(lengths)).argmax()) if lengths else None)
    gold = [g for *_, g in asked]
    normed = task != "winogrande"
    return {"acc": float(np.mean(np.equal(best, gold))), "acc_norm": float(np.mean(np.equal(best_norm, gold))) if normed else None,
            "predictions": best, "predictions_norm": best_norm if normed else None, "gold": gold}


def standard_error(right):
    """Of the mean of 0/1 outcomes, or of their paired differences, (n,): sample deviation over sqrt n."""
    return float(np.std(right, ddof=1) / math.sqrt(len(right))) if len(right) > 1 else float("nan")


def read_rows(folder, task, limit=None):
    path = Path(folder) / TASKS[task]
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"task file {path} cannot be read: {first_line(error)}") from None
    if not rows:
        raise ValueError(f"task file {path} is empty")
    return rows[:limit]


def zero_shot_table(model, tokenizer, folder, limit=None, reference=None):
    """Print acc and acc_norm of every task in `folder`, with standard errors; paired differences from `reference` results."""
    results = {}
    for task in TASKS:
        r = results[task] = zero_shot(model, tokenizer, task, read_rows(folder, task, limit))
        for metric, chosen in (("acc", "predictions"), ("acc_norm", "predictions_norm")):
            if r[chosen] is not None:
                right = np.equal(r[chosen], r["gold"]).astype(float)
                line = f"{task:<14} {metric:<9} {right.mean():.4f} ± {standard_error(right):.4f}  ({len(right)} documents)"
                if reference:
                    change = right - np.equal(reference[task][chosen], r["gold"])
                    line += f"   {change.mean():+.4f} ± {standard_error(change):.4f} paired with the dense model"
                print(line, flush=True)
    mean = np.mean([r["acc"] for r in results.values()])
    print(f"{'average':<14} {'acc':<9} {mean:.4f}")
    return results


def accelerate(model):                                  # pragma: no cover (needs CUDA)
    """Put block Linears with a 2:4 pattern on torch's semi-structured kernels (NVIDIA, compute capability 8 and newer): how many."""
    linears = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear) and m.in_features % 4 == 0]
    fitting = [m for m in linears if int((m.weight.view(-1, 4) != 0).sum(1).max()) <= 2]
    for m in fitting:
        m.weight = torch.nn.Parameter(torch.sparse.to_sparse_semi_structured(m.weight), requires_grad=False)
    return len(fitting)


@torch.inference_mode()
def seconds(model, windows, repeats=5):
    """Median time of one forward pass through the blocks."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model.hidden(windows)[0, 0, 0].item()               # .item() waits for the device
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


# --------------------------------------------------------------------------------------------------------- command line
def main():
    p = Parser(__doc__, ["python eval.py --bits", "python eval.py --model DIR --data wiki.test.raw --seqlen 2048",
                         "python eval.py --model out/tiny-0.5 --dense tiny", "python eval.py --model DIR --tasks zeroshot/ --limit 200"])
    add_model(p)
    p.add_argument("--dense", type=Path, metavar="DIR", help="also KL(dense || model), and paired task differences, from this model")
    p.add_argument("--data", type=Path, metavar="FILE", help="text, .raw (WikiText) or .jsonl (default: held-out stdlib files)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window (default: the model's positions, at most 2048)")
    p.add_argument("--tokens", type=int, metavar="N", help="score only the first N tokens (default: all)")
    p.add_argument("--bits", action="store_true", help="also bits per byte over the whole text, beside xz -9e")
    p.add_argument("--accelerate", action="store_true", help="2:4 blocks on torch's semi-structured kernels (CUDA), with the speed-up")
    p.add_argument("--tasks", type=Path, metavar="DIR", help="zero-shot: folder with " + ", ".join(TASKS.values()))
    p.add_argument("--limit", type=int, metavar="N", help="first N documents of each task (default: all)")
    a = p.parse_args()
    for name in ("seqlen", "tokens", "limit"):
        if getattr(a, name) is not None and getattr(a, name) < 2:
            raise ValueError(f"--{name} must be at least 2")
    device, dtype, reason = choose_device(a.device, a.dtype)
    documents = stdlib_files(True) if a.data is None else read_documents(a.data)
    rows = {task: read_rows(a.tasks, task, 1) for task in TASKS} if a.tasks else {}
    model, tokenizer = load_llama(a.model, device, dtype)
    dense, dense_results = None, None
    seqlen = a.seqlen or min(2048, model.config.max_position_embeddings)
    if seqlen > model.config.max_position_embeddings:
        raise ValueError(f"--seqlen {seqlen}: this model has {model.config.max_position_embeddings} positions")
    tokens = tokenise(tokenizer, documents)[:a.tokens]
    windows = cut(tokens, seqlen)
    if a.accelerate and device.type != "cuda":
        print(f"no speed-up on {device}: torch's semi-structured kernels need an NVIDIA GPU; the dense kernels are used")
    elif a.accelerate:                                      # pragma: no cover (needs CUDA)
        batch = batches(windows)[0].to(device)
        plain = seconds(model, batch)
        print(f"{accelerate(model)} Linears on semi-structured kernels: {plain / seconds(model, batch):.2f} times as fast as dense")
    if a.dense:
        dense, _ = load_llama(a.dense, device, dtype)
        divergence = Divergence(dense, windows)
        divergence.model = model
        print(f"KL {divergence():.6f} nats per token, KL({a.dense.name} || {a.model.name})")
        if rows:
            print(f"dense model {a.dense.name}:")
            dense_results = zero_shot_table(dense, tokenizer, a.tasks, a.limit)
        del divergence, dense
    if rows:
        print(f"model {a.model.name}:")
        zero_shot_table(model, tokenizer, a.tasks, a.limit, dense_results)
    if a.bits:
        raw = "".join(documents).encode()
        xz = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(raw)
        bits = bits_per_byte(model, tokenise(tokenizer, documents)[int(tokenizer.adds_bos):], len(raw), tokenizer.bos_id or 0, seqlen)
        print(f"bits per byte {bits:.4f} over {len(raw)} bytes, every token counted (xz -9e: {xz:.4f})")
    source = a.data.name if a.data else f"held-out standard library of Python {platform.python_version()}"
    print(f"perplexity {perplexity(model, tokens, seqlen):.4f}  {a.model.resolve().name} on {source}: {len(windows)} windows of {seqlen}, "
          f"{len(windows) * (seqlen - 1)} tokens scored, {str(dtype)[6:]} on {device} ({reason})")


if __name__ == "__main__":
    run(main)
