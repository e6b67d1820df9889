"""
What pruning costs: reading text, perplexity, KL divergence from the dense model (the objective f2),
zero-shot accuracy.

Source    perplexity as GPTQ, SparseGPT and Wanda score it; zero-shot tasks as EleutherAI
          lm-evaluation-harness 0.4.13.
Reading   5 of 9. Before: llama.py. Next: ranks.py.
Shapes    N tokens of a text, n windows of T tokens, D model width, V vocabulary.
Not here  few-shot prompts, generation tasks.

Laptop    python eval.py                (40 s; ends with one line: perplexity and its protocol)
Full      python eval.py --model DIR --data wiki.test.raw --seqlen 2048 --tasks zeroshot/
          --dense DENSE_DIR
"""

import gzip
import hashlib
import importlib
import itertools
import json
import lzma
import math
import platform
import re
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear
from tqdm import tqdm

from llama import load_llama
from script import (
    Parser,
    Refused,
    add_model,
    at_least,
    choose_device,
    first_line,
    refuse_pointer,
    run,
    send,
)

BATCH = 2048  # tokens that go through the blocks at once
LARGE = 2**25  # bytes from which a file of JSON lines is not parsed whole
POOL = 2**20  # tokens of a large file that windows are drawn from
CHUNK = 2**20  # logits that exist at once: 4 MB in float32, which stay in the processor's cache


# --------------------------------------------------------------------------------------------- text
def stdlib_files(held_out):
    """Python's standard library, its own .py files without tests, in path order: the documents of
    the embedded default text.

    A tenth of the files, chosen by the hash of their path, is held out: `held_out=True` gives that
    tenth, False the rest.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    paths = (p.relative_to(root) for p in root.rglob("*.py"))
    names = sorted(p.as_posix() for p in paths if not skipped & set(p.parts[:-1]))
    chosen = [
        n for n in names if (int(hashlib.sha256(n.encode()).hexdigest(), 16) % 10 == 0) == held_out
    ]
    return [(root / n).read_bytes().decode("utf-8") for n in chosen]


def wikitext(raw):
    """The file wiki.*.raw as the string that GPTQ, SparseGPT and Wanda score: its rows, blank ones
    empty, joined by blank lines.
    """
    rows = raw.replace("\r\n", "\n").split("\n")
    rows = rows[:-1] if rows[-1] == "" else rows
    return "\n\n".join("" if row.strip() == "" else row + "\n" for row in rows)


def json_rows(raw):
    """The objects of JSON lines, or of one JSON list, whatever the file is called; None for any
    other text.
    """
    try:
        if raw.lstrip()[:1] == "[":
            rows = json.loads(raw)
        elif raw.lstrip()[:1] == "{":
            rows = [json.loads(line) for line in raw.split("\n") if line.strip()]
        else:
            return None
    except (ValueError, RecursionError):
        return None
    return rows if all(isinstance(row, dict) for row in rows) else None


def package(name, path):
    """An optional package that the file `path` needs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing = name.split(".")[0]
        raise Refused(f"{path} needs one more package: pip install {missing}") from None


def read_bytes(path):
    """The bytes of a file, unpacked if it is gzip or zstandard."""
    try:
        refuse_pointer(path)
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            return gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Refused(f"text {path} is broken gzip: {first_line(error)}") from None
    except OSError as error:
        raise Refused(f"text {path} cannot be read: {error.strerror or error}") from None
    if path.suffix.lower() != ".zst":
        return raw
    zstandard = package("zstandard", path)
    try:
        unpacker = zstandard.ZstdDecompressor()
        return unpacker.stream_reader(raw, read_across_frames=True).read()
    except zstandard.ZstdError as error:
        raise Refused(f"text {path} is broken zstandard: {first_line(error)}") from None


def decoded(path, raw):
    """The text of a file's bytes, without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"text {path} is not UTF-8: {first_line(error)}") from None


def read_parquet(path, columns=None):
    """The table of a parquet file; only `columns`, all of which it must have, if they are named."""
    parquet = package("pyarrow.parquet", path)
    try:
        refuse_pointer(path)
        table = parquet.ParquetFile(path).read(columns)
    except Refused:
        raise
    except Exception as error:  # pyarrow raises what it likes on a broken file
        raise Refused(f"{path} is no readable parquet: {first_line(error)}") from None
    if columns and table.column_names != columns:
        raise Refused(f"{path} has no column {columns[0]}")
    return table


def parquet_documents(path):
    """The documents of a parquet file. WikiText has a line in each row: it is one text, the string
    that `wikitext` makes of the .raw file.
    """
    column = read_parquet(path, ["text"])["text"]
    rows = column.slice(0, None if column.nbytes < LARGE else 1000).to_pylist()
    if not all(isinstance(row, str) for row in rows):
        raise Refused(f"text {path} does not have a text in each row")
    if all(row == "" or row.find("\n") == len(row) - 1 for row in rows):
        return ["\n\n".join(column.to_pylist())]
    if len(rows) < len(column):
        return Lazy(lambda i: (column[i].as_py() or "") + "\n\n", np.arange(len(column)))
    return [row + "\n\n" for row in rows]


class Lazy:
    """Documents of a large file, parsed one by one when they are asked for.

    text   key -> document;  keys: (n,) numpy array. A part of them, by slice or by order, is Lazy.
    """

    def __init__(self, text, keys):
        self.text, self.keys = text, keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, part):
        return Lazy(self.text, self.keys[part])

    def __iter__(self):
        return map(self.text, self.keys)


def large_documents(path, raw):
    """The rows of large JSON lines `raw`, bytes, which are never copied: a shard of C4 has 825 MB.
    None for any other text. A row without a text is refused only when it is asked for.
    """
    begin = 3 if raw[:3] == b"\xef\xbb\xbf" else 0
    starts = []
    while 0 <= begin < len(raw):
        starts.append(begin)
        begin = raw.find(b"\n", begin) + 1 or len(raw)

    def text(start):
        end = raw.find(b"\n", start)
        try:
            return json.loads(raw[start : None if end < 0 else end])["text"] + "\n\n"
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused(f"text {path}: no JSON object with a text at byte {start}") from None

    try:
        text(starts[0])
    except Refused:
        return None
    return Lazy(text, np.array([s for s in starts if raw[s : s + 1] not in (b"\n", b"\r", b"")]))


def read_documents(path):
    """The documents of a text file; Refused where there is no text in it."""
    path = Path(path)
    parquet = path.suffix.lower() == ".parquet"
    documents = parquet_documents(path) if parquet else text_documents(path)
    if not any(d.strip() for d in documents):  # stops at the first that is not
        raise Refused(f"text {path} is empty")
    return documents


def text_documents(path):
    """JSON lines or a JSON list, recognised by content, give each row's "text" and a blank line
    (C4), .raw the WikiText string, anything else is one text.
    """
    raw = read_bytes(path)
    lazy = large_documents(path, raw) if len(raw) >= LARGE else None
    if lazy is not None:
        return lazy
    raw = decoded(path, raw)
    names = [suffix.lower() for suffix in path.suffixes]
    rows = json_rows(raw)
    if rows is not None and all(isinstance(row.get("text"), str) for row in rows):
        return [row["text"] + "\n\n" for row in rows]
    if {".json", ".jsonl", ".ndjson"} & set(names):
        raise Refused(f"text {path} does not have a JSON object with a text in each row")
    return [wikitext(raw) if ".raw" in names else raw]


def tokenise(tokenizer, documents, enough=math.inf):
    """Documents, each tokenised once, one after the other -> (N,) long, the begin token in front
    where the tokenizer adds it; no more documents once there are `enough` tokens.
    """
    ids = [np.array([tokenizer.bos_id] * tokenizer.adds_bos, dtype=np.int64)]
    count, documents = 0, iter(documents)
    while count < enough and (some := list(itertools.islice(documents, 256))):
        ids += [np.array(i, dtype=np.int64) for i in tokenizer.encode(some)]
        count += sum(map(len, ids[-len(some) :]))
    return torch.from_numpy(np.concatenate(ids))


def cut(tokens, seqlen):
    """tokens (N,) -> windows (N // seqlen, seqlen), the remainder dropped; Refused when there is
    none.
    """
    if len(tokens) < seqlen:
        raise Refused(f"a text of {len(tokens)} tokens is shorter than one window of {seqlen}")
    return tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)


def split_documents(documents, name):
    """The first four fifths of the documents to choose on, {name: the last fifth} to test on."""
    share = len(documents) * 4 // 5
    if not share:
        raise Refused(f"{name} is too short to be split: it has one window, give a --test")
    return documents[:share], {f"last fifth of {name}": documents[share:]}


def load_texts(tokenizer, data, tests, seqlen, seed=0, enough=0):
    """-> windows (n, seqlen) to choose on, {name: windows} to test on; no window is in both.

    data      file for calibration and search, None = the embedded default; without `tests`, its
              last fifth is kept for testing, by document where it has five or more
    tests     files, none of which may be `data` or hold a window of it: Refused
    Of JSON lines from LARGE bytes on, documents to choose on are drawn in an order of `seed` and
    tokenised until there are POOL tokens, or `enough`; those to test on from the first one on.
    Windows of any smaller text are all of its windows.
    """
    documents = stdlib_files(False) if data is None else read_documents(data)
    if tests:
        held_out = {name: read_documents(t) for name, t in named_tests(data, tests).items()}
    elif data is None:
        held_out = {"stdlib held-out files": stdlib_files(True)}
    elif len(documents) >= 5:
        documents, held_out = split_documents(documents, Path(data).name)
    else:
        windows = cut(tokenise(tokenizer, documents), seqlen)
        windows, held_out = split_documents(windows, Path(data).name)
        return windows, without_shared(windows.flatten(), held_out)
    if isinstance(documents, Lazy):
        documents = documents[np.random.default_rng(seed).permutation(len(documents))]
    tokens = tokenise_pool(tokenizer, documents, enough)
    chosen_on = cut(tokens, seqlen)
    held_out = {n: cut(tokenise_pool(tokenizer, d), seqlen) for n, d in held_out.items()}
    if tests:
        refuse_shared(tokens, held_out)
    else:
        held_out = without_shared(tokens, held_out)
    return chosen_on, held_out


def tokenise_pool(tokenizer, documents, enough=0):
    """All tokens; of a large file POOL of them, or `enough`."""
    large = isinstance(documents, Lazy)
    return tokenise(tokenizer, documents, max(POOL, enough) if large else math.inf)


def without_shared(tokens, held_out):
    """held_out less the windows that stand in tokens (N,) too: a text may repeat a document."""
    kept = {name: windows[~are_shared(windows, tokens)] for name, windows in held_out.items()}
    for name, windows in kept.items():
        if not len(windows):
            raise Refused(f"all of the {name} is in what precedes it: give a --test")
    return kept


def refuse_shared(tokens, held_out):
    for name, windows in held_out.items():
        if shared := int(are_shared(windows, tokens).sum()):
            raise Refused(
                f"{shared} of {len(windows)} windows of --test {name} are in --data too: what is"
                " tested on must be unseen"
            )


def named_tests(data, tests):
    """{name: path} of texts to test on, whole paths where two have one name; Refused for one that
    is there twice or is `data`.
    """
    paths = [Path(t).resolve() for t in ([] if data is None else [data]) + list(tests)]
    for path in paths:
        if paths.count(path) > 1:
            raise Refused(f"{path} is given twice: each --test is another text than --data")
    names = [Path(t).name for t in tests]
    return {str(t) if names.count(name) > 1 else name: t for name, t in zip(names, tests)}


def are_shared(windows, tokens):
    """Which of the windows (n, T) stand in tokens (N,), at any place, (n,) bool: those whose first
    tokens have the same weighted sum are compared whole.
    """
    windows, tokens = windows.numpy(), tokens.numpy()
    width = windows.shape[1]
    weights = np.random.default_rng(0).integers(2**62, size=min(width, 16))
    sums = np.lib.stride_tricks.sliding_window_view(tokens, len(weights)) @ weights
    likely = np.flatnonzero(np.isin(sums, windows[:, : len(weights)] @ weights))
    places = {tokens[i : i + width].tobytes() for i in likely}
    return torch.tensor([window.tobytes() in places for window in windows])


def draw(windows, counts, seed):
    """Disjoint random sets of windows (n, T), one for each of `counts`; Refused when there are too
    few.
    """
    if sum(counts) > len(windows):
        raise Refused(
            f"the text has {len(windows)} windows of {windows.shape[1]} tokens, {sum(counts)} are"
            " needed"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[part] for part in order[: sum(counts)].split(counts)]


# --------------------------------------------------------------------------- perplexity, divergence
def batches(windows):
    return windows.split(max(1, BATCH // windows.shape[1]))


def slice_size(tokens, device):
    """Words of the vocabulary whose logits for `tokens` tokens make a CHUNK; many small kernels
    would starve a GPU.
    """
    return max(1, (CHUNK if device.type == "cpu" else 16 * CHUNK) // max(1, tokens))


def token_losses(head, h, targets, dense=None):
    """What hidden states h (tokens, D) cost, each (tokens,) float64 in nats: -log q of `targets`
    (tokens,), and KL from a dense model.

    head      (V, D), the weights that make logits of h;  a target of -1 is none: its likelihood
              means nothing
    dense     None, or (head (V, D'), states (tokens, D')) of the dense model: each model's states
              go through its own head
    returns   negative log-likelihoods, KL (None without `dense`)
    The vocabulary goes by in slices, so that at most CHUNK logits exist of each side. With z the
    logits and L the log of their summed exponentials, -log q_y = L_q - z_qy and
    KL = sum_v p_v (z_pv - z_qv) - L_p + L_q, the sum over v slice by slice.
    """
    size = slice_size(len(h), h.device)
    slices = head.split(size)
    dense_slices = [None] * len(slices) if dense is None else dense[0].split(size)
    target = torch.zeros(len(h), device=h.device)
    # before the loop, for small tensors that outlive their slice would lie between the large ones
    # and scatter the heap
    q_sum, p_sum, gap = torch.zeros(3, len(slices), len(h), dtype=torch.float64, device=h.device)
    for i, (words, dense_words) in enumerate(zip(slices, dense_slices)):
        q = linear(h, words).float()
        place = targets - i * size
        here = (place >= 0) & (place < len(words))
        target += q.gather(1, place.clamp(0, len(words) - 1)[:, None])[:, 0].where(here, 0)
        q_sum[i] = q.logsumexp(1)
        if dense is not None:
            p = linear(dense[1], dense_words).float()
            p_sum[i] = p.logsumexp(1)
            q.sub_(p)
            # p within its slice, times z_q - z_p
            gap[i] = p.sub_(p_sum[i].float()[:, None]).exp_().mul_(q).sum(1)
    q_all, p_all = q_sum.logsumexp(0), p_sum.logsumexp(0)
    kl = None if dense is None else q_all - p_all - ((p_sum - p_all).exp() * gap).sum(0)
    return q_all - target, kl


@torch.inference_mode()
def perplexity(model, tokens, seqlen=None):
    """exp of the mean negative log-likelihood of tokens (N,), in windows of `seqlen` whose first
    token is context only.
    """
    seqlen = seqlen or min(2048, model.config.max_position_embeddings)
    total, count = 0.0, 0
    for w in tqdm(batches(cut(tokens, seqlen)), desc="perplexity", disable=None, leave=False):
        w = send(w, model.embed.weight.device)
        states = model.hidden(w)[:, :-1].flatten(0, 1)
        nll, _ = token_losses(model.head.weight, states, w[:, 1:].flatten())
        total += nll.sum()
        count += nll.numel()
    return math.exp(min(float(total) / count, 700))


@torch.inference_mode()
def bits_per_byte(model, tokens, n_bytes, bos, seqlen):
    """Bits per raw byte of a text: windows open with the begin token, so that every token counts,
    the first included.
    """
    total = 0.0
    rest = tokens[None, len(tokens) // seqlen * seqlen :]
    whole = batches(cut(tokens, seqlen)) if len(tokens) >= seqlen else []
    for y in (*whole, rest) if rest.numel() else whole:
        y = y.to(model.embed.weight.device)
        x = torch.cat([torch.full_like(y[:, :1], bos), y[:, :-1]], 1)
        states = model.hidden(x).flatten(0, 1)
        total += token_losses(model.head.weight, states, y.flatten())[0].sum()
    return float(total) / math.log(2) / n_bytes


class Divergence:
    """KL(P_dense || P_model) in nats per token, the mean over all positions of windows (n, T).

    The direction is that of distillation and of EvoPress; a public review of the paper writes the
    reverse. The dense side is recorded at construction, as final hidden states: (n T, D) instead of
    (n T, V). Calling it measures `model`, by default the same object as it is now, pruned in place
    since. Memory beyond that: four times CHUNK logits in float32.
    """

    @torch.inference_mode()
    def __init__(self, dense, windows):
        self.model, self.windows = dense, windows.to(dense.embed.weight.device)
        self.head = dense.head.weight  # pruning leaves it alone
        self.states = [dense.hidden(w).flatten(0, 1) for w in batches(self.windows)]

    def __call__(self, model=None):
        return self.measure(model)[0]

    @torch.inference_mode()
    def measure(self, model=None):
        """(KL, perplexity) of `model` from one forward pass; perplexity as in `perplexity`. NaN
        stays NaN.
        """
        model = self.model if model is None else model
        if len(model.head.weight) != len(self.head):
            raise Refused(
                f"KL between models of different vocabulary, {len(self.head)} and"
                f" {len(model.head.weight)} tokens, is not defined"
            )
        kl = loss = torch.zeros((), dtype=torch.float64, device=self.windows.device)
        each = []
        for w, states in zip(batches(self.windows), self.states):
            # -1: the last position has no target
            y = torch.cat([w[:, 1:], torch.full_like(w[:, :1], -1)], 1).flatten()
            h = model.hidden(w).flatten(0, 1)
            nll, divergence = token_losses(model.head.weight, h, y, (self.head, states))
            loss = loss + nll.where(y >= 0, 0).sum()
            kl = kl + divergence.sum()
            each.append(divergence.view(w.shape).mean(1))
        self.of_windows = torch.cat(each)  # (n,) KL of each window
        kl, loss = torch.stack([kl, loss]).tolist()  # the one wait for the device
        scored = self.windows.numel() - len(self.windows)
        return max(kl / self.windows.numel(), 0.0), math.exp(min(loss / scored, 700))

    def at_most(self, confidence):
        """What the KL of the last measured model on all such text stays below with probability
        `confidence`: its windows are a sample, so Student's t of their mean.
        """
        n = len(self.of_windows)
        if n < 3:
            raise Refused("--confidence needs three windows at least: raise --tokens")
        error = float(self.of_windows.std()) / math.sqrt(n)
        return float(self.of_windows.mean()) + t_quantile(confidence, n - 1) * error


def t_quantile(p, freedom):
    """The p-quantile, p >= 0.5, of Student's t with `freedom` degrees, by bisection."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        below = (1 + t_within(middle, freedom)) / 2
        low, high = (middle, high) if below < p else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def t_within(angle, freedom):
    """The probability that |t| < sqrt(freedom) tan(angle): the finite series of Abramowitz & Stegun
    26.7.3 and 26.7.4, exact for a whole number of degrees of freedom.
    """
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (i + 1) / (i + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


# ---------------------------------------------------------------------------------------- zero-shot
TASKS = {
    "piqa": "piqa_validation.jsonl",
    "arc_easy": "arc_easy_test.jsonl",
    "arc_challenge": "arc_challenge_test.jsonl",
    "hellaswag": "hellaswag_validation.jsonl",
    "winogrande": "winogrande_xl_validation.jsonl",
}


def clean(text):
    """HellaSwag without the marks that its WikiHow part carries."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def winogrande_prompt(row):
    """Partial scoring: the options stand in the context, what follows them is scored."""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return contexts, [" " + after.strip()] * 2, None, int(row["answer"]) - 1


def question(task, row):
    """One row of a task with one context -> context, choices, gold index."""
    if task == "piqa":
        context = f"Question: {row['goal']}\nAnswer:"
        return context, [row["sol1"], row["sol2"]], int(row["label"])
    if task == "hellaswag":
        context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        return context, [clean(ending) for ending in row["endings"]], int(row["label"])
    labels = row["choices"]["label"]
    context = f"Question: {row['question']}\nAnswer:"
    return context, row["choices"]["text"], labels.index(row["answerKey"])


def prompts(task, row):
    """One row of a task -> (contexts, continuations, lengths in characters that acc_norm divides by
    or None, gold index).
    """
    if task == "winogrande":
        return winogrande_prompt(row)
    context, choices, gold = question(task, row)
    continuations = [" " + choice for choice in choices]
    return [context] * len(choices), continuations, [len(c) for c in choices], gold


def encode_pair(tokenizer, context, continuation):
    """Token ids of context + continuation, and how many of them belong to the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    whole = start + tokenizer.encode(context + continuation)
    return whole, len(whole) - len(start + tokenizer.encode(context))


def all_prompts(task, rows):
    """`prompts` of all rows; Refused where a row lacks a field or its right answer, as hidden test
    sets do: label -1.
    """
    try:
        asked = [prompts(task, row) for row in rows]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise Refused(
            f"a row of {task} does not have the task's fields: {first_line(error)}"
        ) from None
    for number, (contexts, *_, gold) in enumerate(asked, 1):
        if not 0 <= gold < len(contexts):
            raise Refused(f"row {number} of {task} has no right answer (label {gold}): a test set?")
    return asked


class Batch:
    """Pairs (ids, count) of about one length, padded on the right: what goes through the model at
    once.
    """

    def __init__(self, pairs, room):
        # what does not fit loses its beginning, as in the harness
        self.ids = [ids[-room - 1 :] for ids, _ in pairs]
        self.counts = [min(count, len(s) - 1) for s, (_, count) in zip(self.ids, pairs)]

    def tokens(self):
        """(B, T) long: all ids but the last, which nothing follows."""
        width = max(map(len, self.ids)) - 1
        return torch.tensor([s[:-1] + [0] * (width + 1 - len(s)) for s in self.ids])

    def scored(self, h):
        """Of states h (B, T, D), those that predict the last `count` ids of each: (sum of counts,
        D).
        """
        rows = zip(h, self.ids, self.counts)
        return torch.cat([x[len(s) - 1 - c : len(s) - 1] for x, s, c in rows])

    def targets(self):
        return torch.tensor([t for s, c in zip(self.ids, self.counts) for t in s[len(s) - c :]])


@torch.inference_mode()
def log_likelihoods(model, pairs, label=""):
    """Sum of log-probabilities in nats of the last `count` ids of each (ids, count): (len(pairs),)
    float64.
    """
    device, room = model.embed.weight.device, model.config.max_position_embeddings
    result = torch.empty(len(pairs), dtype=torch.float64)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
    with tqdm(total=len(pairs), desc=label, disable=None) as bar:
        while order:
            width = min(len(pairs[order[0]][0]) - 1, room)
            size = max(1, BATCH // width)
            chosen, order = order[:size], order[size:]
            batch = Batch([pairs[i] for i in chosen], room)
            scored = batch.scored(model.hidden(send(batch.tokens(), device)))
            nll, _ = token_losses(model.head.weight, scored, send(batch.targets(), device))
            result[chosen] = -torch.stack([x.sum() for x in nll.cpu().split(batch.counts)])
            bar.update(len(chosen))
    return result


def zero_shot(model, tokenizer, task, rows):
    """Multiple choice by likelihood, as lm-evaluation-harness 0.4.13 scores it.

    task      one of TASKS;  rows: list of dicts in the schema of the Hugging Face dataset
    returns   {"acc", "acc_norm", "predictions", "predictions_norm", "gold"}: shares right, and each
              row's chosen index; acc_norm compares log-likelihoods per character of the choice; it
              and predictions_norm are None for winogrande
    """
    if task not in TASKS:
        raise Refused(f"task {task!r} is not one of {', '.join(TASKS)}")
    asked = all_prompts(task, rows)
    pairs = [
        encode_pair(tokenizer, context, continuation)
        for contexts, continuations, _, _ in asked
        for context, continuation in zip(contexts, continuations)
    ]
    scores = log_likelihoods(model, pairs, task).split([len(contexts) for contexts, *_ in asked])
    best = [int(score.argmax()) for score in scores]
    gold = [right for *_, right in asked]
    result = {"acc": float(np.mean(np.equal(best, gold))), "predictions": best, "gold": gold}
    result |= {"acc_norm": None, "predictions_norm": None}
    if task != "winogrande":
        lengths = [torch.tensor(length, dtype=torch.float64) for _, _, length, _ in asked]
        normed = [int((s / n).argmax()) for s, n in zip(scores, lengths)]
        result |= {"acc_norm": float(np.mean(np.equal(normed, gold))), "predictions_norm": normed}
    return result


def standard_error(right):
    """Of the mean of 0/1 outcomes, or of their paired differences, (n,): sample deviation over sqrt
    n.
    """
    n = len(right)
    return float(np.std(right, ddof=1) / math.sqrt(n)) if n > 1 else float("nan")


def task_file(folder, task):
    """The file of a task in `folder`: as TASKS names it, packed, or as parquet."""
    plain = Path(folder) / TASKS[task]
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        if plain.with_suffix(suffix).exists():
            return plain.with_suffix(suffix)
    raise Refused(f"task file {plain} is not there, nor as .gz, .zst or .parquet")


def read_rows(folder, task, limit=None):
    """The first `limit` rows, dicts, of a task's file in `folder`."""
    path = task_file(folder, task)
    if path.suffix == ".parquet":
        rows = read_parquet(path).slice(0, limit).to_pylist()
    else:
        raw = decoded(path, read_bytes(path))
        rows = json_rows(raw) if raw.strip() else []
    if rows is None:
        raise Refused(f"task file {path} cannot be read: not a JSON object in each row")
    if not rows:
        raise Refused(f"task file {path} is empty")
    return rows[:limit]


def show_accuracy(task, result, reference):
    """Print acc and acc_norm of one task with standard errors, and paired differences from
    `reference` if there is one.
    """
    for metric, chosen in (("acc", "predictions"), ("acc_norm", "predictions_norm")):
        if result[chosen] is None:
            continue
        right = np.equal(result[chosen], result["gold"]).astype(float)
        error = standard_error(right)
        line = f"{task:<14} {metric:<9} {right.mean():.4f} ± {error:.4f}  ({len(right)} documents)"
        if reference:
            change = right - np.equal(reference[chosen], result["gold"])
            error = standard_error(change)
            line += f"   {change.mean():+.4f} ± {error:.4f} paired with the dense model"
        print(line, flush=True)


def zero_shot_table(model, tokenizer, folder, limit=None, reference=None):
    """Print the accuracies of every task in `folder`; {task: result of `zero_shot`}. reference:
    such results of the dense model.
    """
    results = {}
    for task in TASKS:
        results[task] = zero_shot(model, tokenizer, task, read_rows(folder, task, limit))
        show_accuracy(task, results[task], reference and reference[task])
    line = f"{'average':<14} {'acc':<9} {np.mean([r['acc'] for r in results.values()]):.4f}"
    if reference:
        change, error = average_change(results, reference)
        line += f"   {change:+.4f} ± {error:.4f} paired with the dense model"
    print(line)
    return results


def average_change(results, reference):
    """How much higher the average accuracy of `results` is than that of `reference`, both {task:
    result of `zero_shot`}, and its standard error, paired by document.
    """
    changes = [
        np.equal(mine["predictions"], mine["gold"]).astype(float)
        - np.equal(reference[task]["predictions"], mine["gold"])
        for task, mine in results.items()
    ]
    error = math.sqrt(sum(standard_error(change) ** 2 for change in changes)) / len(changes)
    return float(np.mean([change.mean() for change in changes])), error


# -------------------------------------------------------------------------- semi-structured kernels
def has_two_in_four(W):
    return W.shape[1] % 4 == 0 and int((W.view(-1, 4) != 0).sum(1).max()) <= 2


def suits_kernels(W):
    """The semi-structured kernels take float16 and bfloat16, both dimensions multiples of 16."""
    short = W.dtype in (torch.float16, torch.bfloat16)
    return short and W.shape[0] % 16 == 0 and W.shape[1] % 16 == 0


def accelerate(model):
    """Put block Linears with a 2:4 pattern on torch's semi-structured kernels (NVIDIA, compute
    capability 8 and newer): how many, and how many with the pattern do not suit them.
    """
    linears = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    patterned = [m for m in linears if has_two_in_four(m.weight)]
    fitting = [m for m in patterned if suits_kernels(m.weight)]
    for m in fitting:
        sparse = torch.sparse.to_sparse_semi_structured(m.weight)
        m.weight = torch.nn.Parameter(sparse, requires_grad=False)
    return len(fitting), len(patterned) - len(fitting)


@torch.inference_mode()
def seconds(model, windows, repeats=5):
    """Median time of one forward pass through the blocks."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model.hidden(windows)[0, 0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def show_speed_up(model, windows, device):
    """Move 2:4 blocks to semi-structured kernels and print how much faster a forward pass is;
    elsewhere say that it is not.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        print(
            f"no speed-up on {device}: torch's semi-structured kernels need an NVIDIA GPU from"
            " compute capability 8 on; the dense kernels are used"
        )
        return
    batch = batches(windows)[0].to(device)
    plain = seconds(model, batch)
    moved, left = accelerate(model)
    times = plain / seconds(model, batch)
    print(f"{moved} Linears on semi-structured kernels: {times:.2f} times as fast as dense")
    if left:
        print(f"{left} left out: they want 16-bit floats, and dimensions that are multiples of 16")


# ------------------------------------------------------------------------------------- command line
def add_options(parser):
    tasks = "zero-shot: folder with " + ", ".join(TASKS.values())
    text = "text, .raw (WikiText), JSON lines or parquet (default: held-out stdlib files)"
    dense = "also KL(dense || model), and paired task differences, from this model"
    kernels = "2:4 blocks on torch's semi-structured kernels (CUDA), with the speed-up"
    number, flag = {"type": int, "metavar": "N"}, {"action": "store_true"}
    parser.add_argument("--dense", type=Path, metavar="DIR", help=dense)
    parser.add_argument("--data", type=Path, metavar="FILE", help=text)
    parser.add_argument("--seqlen", **number, help="window (default: positions, at most 2048)")
    parser.add_argument("--tokens", **number, help="score only the first N tokens (default: all)")
    parser.add_argument("--bits", **flag, help="also bits per byte of the text, beside xz -9e")
    parser.add_argument("--accelerate", **flag, help=kernels)
    parser.add_argument("--tasks", type=Path, metavar="DIR", help=tasks)
    parser.add_argument("--limit", **number, help="first N documents of each task (default: all)")


def arguments():
    examples = [
        "python eval.py --bits",
        "python eval.py --model DIR --data wiki.test.raw --seqlen 2048",
        "python eval.py --model out/tiny-0.5 --dense tiny",
        "python eval.py --model DIR --tasks zeroshot/ --limit 200",
    ]
    parser = Parser(__doc__, examples)
    add_model(parser)
    add_options(parser)
    args = parser.parse_args()
    at_least(args, 2, "seqlen", "tokens", "limit")
    return args


def show_divergence(args, model, windows, device, dtype):
    """Print KL from --dense and, if tasks are asked for, its accuracies, which are returned."""
    dense, tokenizer = load_llama(args.dense, device, dtype)
    kl = Divergence(dense, windows)(model)
    names = f"KL({args.dense.name} || {args.model.name})"
    print(f"KL {kl:.6f} nats per token, {names}")
    if args.tasks is None:
        return None
    print(f"dense model {args.dense.name}:")
    return zero_shot_table(dense, tokenizer, args.tasks, args.limit)


def show_bits(model, tokenizer, documents, seqlen):
    """Print bits per byte of the whole text, beside what xz needs."""
    raw = "".join(documents).encode()
    xz = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(raw)
    tokens = tokenise(tokenizer, documents)[int(tokenizer.adds_bos) :]
    bits = bits_per_byte(model, tokens, len(raw), tokenizer.bos_id or 0, seqlen)
    print(f"bits per byte {bits:.4f} over {len(raw)} bytes, every token counted (xz -9e: {xz:.4f})")


def show_perplexity(args, value, windows, how):
    """Print it with all that it depends on; windows (n, T)."""
    n, seqlen = windows.shape
    source = f"held-out standard library of Python {platform.python_version()}"
    if args.data:
        source = args.data.name
    print(
        f"perplexity {value:.4f}  {args.model.resolve().name} on {source}: {n} windows of"
        f" {seqlen}, {n * (seqlen - 1)} tokens scored, {how}"
    )


def main():
    args = arguments()
    device, dtype, reason = choose_device(args.device, args.dtype)
    documents = stdlib_files(True) if args.data is None else read_documents(args.data)
    if args.tasks:  # all task files are read once, before anything is scored
        for task in TASKS:
            all_prompts(task, read_rows(args.tasks, task, args.limit))
    model, tokenizer = load_llama(args.model, device, dtype)
    positions = model.config.max_position_embeddings
    seqlen = args.seqlen or min(2048, positions)
    if seqlen > positions:
        raise Refused(f"--seqlen {seqlen}: this model has {positions} positions")
    tokens = tokenise(tokenizer, documents, args.tokens or math.inf)[: args.tokens]
    windows = cut(tokens, seqlen)
    if args.accelerate:
        show_speed_up(model, windows, device)
    reference = show_divergence(args, model, windows, device, dtype) if args.dense else None
    if args.tasks:
        print(f"model {args.model.name}:")
        zero_shot_table(model, tokenizer, args.tasks, args.limit, reference)
    if args.bits:
        show_bits(model, tokenizer, documents, seqlen)
    how = f"{str(dtype)[6:]} on {device} ({reason})"
    show_perplexity(args, perplexity(model, tokens, seqlen), windows, how)


if __name__ == "__main__":
    run(main)
