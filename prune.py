"""
Prune a Llama: from a request to a smaller checkpoint.

Reading   7 of 9. Before: ranks.py, which knows what goes first. Next: train.py. Beside it:
          curvature.py and refit.py, then request.py (a wish -> a strategy) and patterns.py (2:4).
Shapes    d blocks of 7 Linears, W (d_out, d_in), strategies (d,) or one sparsity for each Linear,
          (d, 7); windows (n, T) of tokens.

Laptop    python prune.py --sparsity 0.5                  (20 s; ends with the folder that it wrote)
Full      python prune.py --model ~/Llama-2-7b-hf --data c4.jsonl --sparsity 0.3 0.5 0.7
"""

import argparse
import hashlib
import json
import math
import platform
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from curvature import gradient_norms, read_curves
from eval import Divergence, draw, load_texts, stdlib_files
from llama import (
    Tokenizer,
    files_to_copy,
    load_llama,
    refuse_link_out,
    save_llama,
    stored_dtypes,
    weight_files,
)
from model import Llama
from offload import offload_blocks
from patterns import pattern_masks
from ranks import METRICS, Pruner, Survivors
from refit import CONTRAST, follow, row_counts
from request import (
    KINDS,
    Surrogate,
    packed_bytes,
    parse_request,
    read_requests,
    strategy_of,
)
from script import (
    RECORD,
    Parser,
    Refused,
    add_model,
    add_texts,
    at_least,
    choose,
    file_digest,
    join_processes,
    meet,
    new_folder,
    provenance,
    refuse_to_overwrite,
    refuse_to_replace,
    run,
    say,
    sha256,
    strict,
    together,
    write_json,
    write_provenance,
)
from unicuco import (
    Layout,
    cap_divergence,
    load_stratnet,
    softened,
    strategy_for,
    trained_on_table,
)


# -------------------------------------------------------------------------------------- measuring
class F2:
    """The objective f2 as an object: strategy -> KL(P_dense || P_pruned) in nats per token on
    windows (n, T).

    tokens_spent   of all evaluations so far
    """

    def __init__(self, pruner, windows):
        pruner.restore()
        self.pruner, self.divergence = pruner, Divergence(pruner.model, windows)
        self.windows, self.tokens_spent = windows, 0

    def __call__(self, strategy):
        """KL, 100 for a model pruned to ruin. The model stays pruned."""
        return cap_divergence(self.measure(strategy)[0])

    def measure(self, strategy):
        """(KL, perplexity) of the strategy; NaN and infinity as they are."""
        self.pruner.apply(strategy)
        self.tokens_spent += self.windows.numel()
        return self.divergence.measure()


# ----------------------------------------------------------------------------------------- requests
def sources(args):
    """What every run depends on: model, text and windows. `args.dtype` is the chosen one."""
    if args.data:
        name, digest = args.data.name, file_digest(args.data)
    else:
        name = f"stdlib {platform.python_version()}"
        digest = hashlib.sha256("".join(stdlib_files(False)).encode()).hexdigest()
    return {
        "model": args.model.resolve().name,
        "weights": [sha256(path) for path in weight_files(args.model)],
        "config": sha256(args.model / "config.json"),
        "data": name,
        "sha256": digest,
        "tokens": args.tokens,
        "calibration": args.calibration,
        "seqlen": args.seqlen,
        "dtype": args.dtype,
    }


def tests(args):
    """{name: digest} of the texts to test on; None for one that is no file any more."""
    return {path.name: file_digest(path) for path in args.test or []}


@dataclass
class Setting:
    """What pruning and its measurement share. Windows are (n, T) long, none is in two sets."""

    model: Llama
    tokenizer: Tokenizer
    calibration: torch.Tensor
    search: torch.Tensor
    held_out: dict  # {text: windows}


def prepare(args, device, dtype, search_tokens):
    """Setting of a command line with the options of `add_model` and `add_texts`, and of --offload
    if it has it.
    """
    offload = getattr(args, "offload", False)
    model, tokenizer = load_llama(args.model, "cpu" if offload else device, dtype)
    if offload:
        offload_blocks(model, device)
    positions = model.config.max_position_embeddings
    seqlen = args.seqlen or min(512, positions)
    if not 2 <= seqlen <= positions:
        raise Refused(f"--seqlen {seqlen}: this model has 2 to {positions} positions")
    searched = max(1, search_tokens // seqlen)
    wanted = args.calibration
    enough = ((wanted or 64) + searched + 1) * seqlen
    windows, held_out = load_texts(tokenizer, args.data, args.test, seqlen, args.seed, enough)
    if wanted is None:  # a refit learns from its windows: it gains from every one up to 64
        wanted = max(1, min(64 if args.refit else 32, len(windows) - searched))
    calibration, search = draw(windows, [wanted, searched], args.seed)
    return Setting(model, tokenizer, calibration, search, held_out)


def find_stratnet(path, model_folder, blocks):
    """Trained StratNet from `path`, else out/<model name>/, else the model's folder; None if there
    is none. A `path` that is not there is refused.
    """
    name = "stratnet.safetensors"
    places = [Path("out") / model_folder.resolve().name / name, model_folder / name]
    if path:
        places = [path]
    for place in places:
        if Path(place).is_file():
            return load_stratnet(place, blocks)
    if path:
        raise Refused(f"no StratNet at {path}: python train.py --model {model_folder} makes one")
    return None


def check_made_for(about, args):
    """Refuse a StratNet that was trained on other weights, or for another pruning score: its
    settings `about` say so.
    """
    again = "python train.py makes one for this model, --uniform does without"
    metric = about.get("metric", args.metric)
    if metric != args.metric:
        raise Refused(f"the StratNet was trained for --metric {metric}, not {args.metric}: {again}")
    weights = about.get("weights")
    if weights is not None and weights != [sha256(path) for path in weight_files(args.model)]:
        raise Refused(
            f"the StratNet was trained on other weights than those of {args.model}: {again}"
        )


def chosen_by_refit(args):
    """Whether the refit says which weights of a row go, and not their scores."""
    return args.refit and not (args.keep_masks or args.pattern)


def stamps(folder):
    """Size and time of every weight file: what changes when somebody replaces one."""
    return [(p.stat().st_size, p.stat().st_mtime_ns) for p in weight_files(folder)]


def stratnet_from_curvature(pruner, windows, seed):
    """Trained on the table of curvature alone: what serves where train.py never ran."""
    curves = torch.stack(read_curves(pruner, windows, seed))
    layout = Layout(len(pruner.live), pruner.d_in * pruner.d_out)
    return trained_on_table(layout, curves, seed)


class Service:
    """Answers requests: model, ranks, StratNet and the text to measure on, prepared once for all of
    them.
    """

    def __init__(self, args, device, dtype):
        self.args = args
        self.stamps = stamps(args.model)
        setting = prepare(args, device, dtype, search_tokens=1)
        self.model, self.calibration = setting.model, setting.calibration
        blocks = len(self.model.blocks)
        self.trained, self.method = None, "uniform"
        self.last = None, None  # what was measured last, and what `prune` returned for it
        if not args.uniform:
            self.trained = find_stratnet(args.stratnet, args.model, blocks)
            self.method = "unicuco" if self.trained else "curvature"
        if self.method == "unicuco":
            check_made_for(self.trained.about, args)
        self.text, test = next(iter(setting.held_out.items()))
        self.test = test[: max(1, args.tokens // test.shape[1])]
        self.divergence = Divergence(self.model, self.test)
        self.dense_ppl = self.divergence.measure()[1]
        self.pruner = Pruner(self.model, self.calibration, args.metric)
        self.source_zeros = self.pruner.zeros()
        if self.method == "curvature":
            self.trained = stratnet_from_curvature(self.pruner, self.calibration, args.seed)
        self.net, self.method = self.stratnet()

    def stratnet(self):
        """The StratNet that answers, None: uniform; and the method that strategy.json names. Behind
        a refit, of one that has a table of curvature, the table alone.
        """
        if self.method == "unicuco" and self.args.refit and self.trained.curves is not None:
            return self.trained.unmeasured(self.args.seed).net, "curvature"
        return self.trained and self.trained.net, self.method

    def curve(self, sparsity):
        """The strategy for a sparsity: StratNet's (D,), or uniform (d,)."""
        if self.net is None:
            return torch.full((len(self.model.blocks),), sparsity, dtype=torch.float64)
        return strategy_for(self.net, sparsity, self.pruner.sparsity)

    def surrogate(self, predicts):
        """What `strategy_of` asks; if it predicts, the GP is fitted again, from StratNet's data."""
        trained = self.trained
        gp = trained.gp() if trained is not None and predicts else None
        sure = self.args.confidence
        return Surrogate(self.curve, self.net, gp, self.measure, self.bytes, sure)

    def measure(self, strategy):
        """KL of the model that would be delivered, refitted if it would be: as measured, or what
        it stays below with probability --confidence.
        """
        strategy = self.delivered(strategy)
        self.last = None, None  # nothing of it stays in memory beside the next
        self.last = strategy, self.prune(strategy)
        kl, confidence = self.divergence(), self.args.confidence
        return kl if confidence is None else self.divergence.at_most(confidence)

    def bytes(self, strategy):
        return packed_bytes(self.pruner, self.args.model, self.delivered(strategy))

    def delivered(self, strategy):
        """The strategy (D,) that is applied: nearer to uniform if survivors are refitted."""
        if self.net is None or not self.args.refit:
            return strategy
        return softened(strategy, CONTRAST, self.pruner.sparsity)

    @cached_property
    def g_norms(self):
        """Of the gradients at the outputs of the dense model: which rows a refit spares."""
        return gradient_norms(self.pruner, self.calibration, self.args.seed)

    def prune(self, strategy):
        """Make the model that of the strategy, by ranks or in a pattern, survivors refitted or not.

        returns   masks, counted sparsity, refitted values or None
        """
        pruner, masks = self.pruner, self.pruner.masks(strategy)
        counted = pruner.sparsity(strategy)
        if self.args.pattern:
            keep, group = map(int, self.args.pattern.split(":"))
            masks = pattern_masks(pruner, strategy, keep, group)
            counted = pruner.mask_sparsity(masks)
        if self.args.refit:
            chosen = chosen_by_refit(self.args)
            wanted = row_counts(pruner, strategy, self.g_norms) if chosen else masks
            values = follow(pruner, wanted, self.calibration, stored_dtypes(self.args.model))
            return Survivors(values) if chosen else masks, counted, values
        pruner.apply_masks(masks) if self.args.pattern else pruner.apply(strategy)
        return masks, counted, None

    def pruned_once(self, strategy):
        """As `prune`; nothing is done where the last measurement has left the model like that."""
        last, made = self.last
        self.last = None, None
        if last is not None and torch.equal(last, strategy):
            return made
        return self.prune(strategy)

    def write(self, request, row, masks, values):
        """The folder of one request: weights, tokenizer and strategy.json; row["bytes"] is filled
        in.
        """
        args = self.args
        with new_folder(request["out"], args.force) as folder:
            save_llama(self.model, folder, args.model, masks, args.packed, values)
            if stamps(args.model) != self.stamps:
                raise Refused(f"the weights of {args.model} changed meanwhile: run it again")
            row["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            write_json(folder / RECORD, row | self.record(request, row))

    def record(self, request, row):
        """What strategy.json says beyond the row of the table."""
        args = self.args
        return {
            "counted": row["sparsity"],
            "zeros": self.pruner.zeros(),
            "source_zeros": self.source_zeros,
            "request": {request["kind"]: request["value"]},
            "method": self.method,
            "refitted": args.refit,
            "masks": "chosen by the refit" if chosen_by_refit(args) else "ranked",
            "metric": args.metric,
            "pattern": args.pattern,
            "model": args.model.resolve().name,
            "dense_ppl": self.dense_ppl,
            "measured_on": self.text,
            "tokens": self.test.numel(),
            "calibration": {
                "text": args.data.name if args.data else "stdlib",
                "tokens": self.calibration.numel(),
                "sha256": file_digest(args.data),
            },
        }

    def serve(self, request, surrogate):
        """Prune for one request, measure, write: its row of the table. Refused when no strategy
        meets it, or what it gives is no model.
        """
        started = time.perf_counter()
        strategy = self.delivered(strategy_of(request, surrogate))
        masks, counted, values = self.pruned_once(strategy)
        kl, ppl = self.divergence.measure()
        sure = self.args.confidence
        if not math.isfinite(kl):
            raise Refused("the pruned model computes NaN; try --dtype float32")
        row = {"request": request["name"], request["kind"]: request["text"], "sparsity": counted}
        row |= {
            "kl": kl,
            "ppl": ppl,
            "bytes": None,
            "strategy": self.pruner.full(strategy).tolist(),
        }
        if sure is not None:
            row |= {"confidence": sure, "kl_at_most": self.divergence.at_most(sure)}
        if not self.args.dry_run:
            self.write(request, row, masks, values)
        row["seconds"] = round(time.perf_counter() - started, 3)
        return row


# ------------------------------------------------------------------------------------- command line
class Table:
    """The rows as they come, for a person; silent when standard output carries the JSON."""

    def __init__(self, names, silent):
        self.width, self.silent = max(map(len, [*names, "request"])), silent

    def say(self, line):
        if not self.silent:
            say(line)

    def head(self, dense_ppl):
        width = self.width
        self.say(f"{'request':<{width}}  sparsity      KL  perplexity      bytes  seconds")
        self.say(f"{'dense':<{width}}    0.0000  0.0000  {dense_ppl:10.3f}")

    def row(self, row, with_strategy):
        self.say(
            f"{row['request']:<{self.width}}  {row['sparsity']:8.4f}  {row['kl']:6.4f}"
            f"  {row['ppl']:10.3f}  {row['bytes'] or '-':>9}  {row['seconds']:7.2f}"
        )
        if "kl_at_most" in row:
            sure, most = row["confidence"], row["kl_at_most"]
            self.say(f"{'':<{self.width}}  KL below {most:.4f} with probability {sure:g}")
        if with_strategy:
            means = " ".join(f"{sum(x) / len(x):.2f}" for x in row["strategy"])
            self.say(f"{'':<{self.width}}  blocks {means}")


def add_wishes(parser):
    for kind, (unit, meaning) in KINDS.items():
        flag = "--" + kind.replace("_", "-")
        several = {"nargs": "+", "action": "extend", "default": []}
        parser.add_argument(flag, **several, metavar=unit, help=meaning)
    sure = "--max-kl holds on all such text with this probability, not as measured alone"
    parser.add_argument("--confidence", type=float, metavar="P", help=sure)
    parser.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help='jsonl, one request a line: {"name": "phone", "max_size": "9MB"}',
    )


def add_ways(parser):
    """How to prune."""
    where = "default: out/<model>/, then the model's folder; else curvature alone"
    pattern = "semi-structured masks, up to sparsity 0.5"
    flag = {"action": "store_true"}
    parser.add_argument("--stratnet", type=Path, metavar="FILE", help=where)
    parser.add_argument("--uniform", **flag, help="the same sparsity everywhere, no StratNet")
    parser.add_argument("--metric", choices=METRICS, default="wanda", help="pruning score")
    parser.add_argument("--pattern", choices=["2:4", "4:8"], help=pattern)
    parser.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="move survivors to follow the dense model; --no-refit: bit-identical to the source",
    )
    masks = "refit on the masks of --metric, instead of masks that the refit chooses"
    parser.add_argument("--keep-masks", **flag, help=masks)
    parser.add_argument("--offload", **flag, help="keep the blocks in host memory, two on the GPU")


def add_outputs(parser):
    """What to write, and where."""
    packed = "write bit masks and survivors: smaller files, read by load_llama alone"
    out = "default: out/<model>-<request>; the parent folder for several requests"
    table = "the table as JSON, into FILE or alone on standard output"
    flag = {"action": "store_true"}
    parser.add_argument("--packed", **flag, help=packed)
    parser.add_argument(
        "--unpack", type=Path, metavar="DIR", help="packed folder -> plain one, --out"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    parser.add_argument("--force", **flag, help="replace existing folders")
    parser.add_argument("--dry-run", **flag, help="print the strategies, write nothing")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help=table)


def arguments():
    examples = [
        "python prune.py --sparsity 0.5",
        "python prune.py --sparsity 0.3 0.5 0.7 --packed --model DIR --data c4.jsonl",
        "python prune.py --max-kl 0.1 --max-size 9MB --preference 0.4 --packed",
        "python prune.py --requests wishes.jsonl --out served --json table.json",
        "python prune.py --unpack served/phone --out plain",
    ]
    parser = Parser(__doc__, examples)
    add_model(parser)
    add_wishes(parser)
    add_texts(parser, "tokens to measure KL and perplexity on", windows=None)
    add_ways(parser)
    add_outputs(parser)
    args = parser.parse_args()
    at_least(args, 1, "tokens", "calibration")
    if args.confidence is not None and not 0.5 <= args.confidence <= 0.999:
        raise Refused("--confidence is a probability from 0.5 to 0.999")
    if args.test and len(args.test) > 1:
        raise Refused("prune.py measures on one --test; eval.py measures what it wrote on others")
    return args


def requests_of(args):
    """All requests of a command line, each with the folder that it will be written to: checked
    before any work.
    """
    requests = [parse_request({kind: v}) for kind in KINDS for v in getattr(args, kind)]
    if args.requests:
        requests += read_requests(args.requests)
    if not requests:
        raise Refused("nothing is asked: give --sparsity or another request")
    names = [r["name"] for r in requests]
    if len(set(names)) < len(names):
        raise Refused(f"two requests are named {max(names, key=names.count)}")
    check_together(args, requests)
    if args.json not in (None, "-"):
        refuse_to_overwrite(Path(args.json), {"request", "kl"}, {"request", "unmet"})
    for r in requests:
        r["out"] = output_of(args, r, len(requests) > 1)
        if not args.dry_run:
            refuse_to_replace(r["out"], args.force, precious_of(args))
    return requests


def precious_of(args):
    """What no output may replace: the source and every file that is read."""
    given = (args.model, args.data, *(args.test or []), args.stratnet, args.requests, args.unpack)
    return [path for path in given if path is not None]


def check_together(args, requests):
    """Refuse what cannot be done, before anything is: half of a batch helps nobody."""
    kinds = {r["kind"] for r in requests}
    if args.pattern and "max_kl" in kinds:
        raise Refused("--pattern does not go with --max-kl, whose measurements it would change")
    if args.uniform and "preference" in kinds:
        raise Refused("a preference needs StratNet: it cannot be asked with --uniform")
    if "max_size" in kinds and not (args.packed or args.dry_run):
        raise Refused("a plain file keeps its size: --max-size goes with --packed, or --dry-run")
    for r in requests:
        if r["kind"] == "sparsity" and args.pattern and r["value"] > 0.5:
            raise Refused(f"sparsity {r['text']}: a {args.pattern} pattern reaches 0.5 at most")


def output_of(args, request, several):
    if args.out is None:
        return Path("out") / f"{args.model.resolve().name}-{request['name']}"
    return args.out / request["name"] if several else args.out


def unpack_folder(args):
    if not args.out or args.dry_run:
        raise Refused("--unpack needs --out, and writes: it does not go with --dry-run")
    refuse_to_replace(args.out, args.force, precious_of(args))
    record = args.unpack / RECORD
    refuse_link_out(record, args.unpack)
    model, _ = load_llama(args.unpack)
    with new_folder(args.out, args.force) as folder:
        save_llama(model, folder, args.unpack, {})
        if record.is_file():
            shutil.copyfile(record, folder / RECORD)
    print(f"wrote {args.out}")


def serve_all(service, requests, table):
    """Serve all requests: a row for each, with "unmet" where it cannot be."""
    rows = []
    surrogate = service.surrogate(any(r["kind"] == "max_kl" for r in requests))
    for request in requests:
        try:
            row = service.serve(request, surrogate)
            table.row(row, with_strategy=len(requests) == 1 or service.args.dry_run)
        except Refused as error:  # the others' files matter as much
            row = {
                "request": request["name"],
                request["kind"]: request["text"],
                "unmet": str(error),
            }
        rows.append(row)
    return rows


def serve_shared(service, requests, table):
    """`serve_all`; under torchrun, process r of n serves every n-th request from the r-th on, and
    all have all rows.
    """
    if not dist.is_initialized():
        return serve_all(service, requests, table)
    rank, world = dist.get_rank(), dist.get_world_size()
    shares = [None] * world
    together(dist.all_gather_object, shares, serve_all(service, requests[rank::world], table))
    dist.destroy_process_group()
    return [shares[i % world][i // world] for i in range(len(requests))]


def main():
    args = arguments()
    if args.unpack:
        return unpack_folder(args)
    first = join_processes()
    requests = requests_of(args)
    if args.model.is_dir():
        files_to_copy(args.model)  # refused now, not after an hour of work
    meet()  # before one process writes, all have seen that nothing is there
    device, dtype, reason = choose(args)
    service = Service(args, device, dtype)
    table = Table([r["name"] for r in requests], silent=args.json == "-")
    if first:
        announce(args, service, table, f"on {device}, {args.dtype} ({reason})")
    meet()  # nobody's row before the head of the table
    rows = serve_shared(service, requests, table)
    if first:
        report(args, service, table, device, requests, rows)
    unmet = [f"{row['request']}: {row['unmet']}" for row in rows if "unmet" in row]
    if unmet and first:  # an error of another process would end the first while it reports
        raise Refused("; ".join(unmet))


def announce(args, service, table, where):
    """What a table says before its first row."""
    table.say(
        f"{args.model.resolve().name} {where};"
        f" calibrated on {service.calibration.numel()} tokens, measured on {service.test.numel()}"
        f" of {service.text}"
    )
    if service.method == "curvature" and not args.refit:
        table.say("no StratNet of this model: curvature alone chooses; python train.py makes one")
    if service.source_zeros > 0.01:
        table.say(
            f"{service.source_zeros:.2f} of the source's block weights are 0 already: KL is from it"
            " as it is, and sparsity counts what this run drops"
        )
    table.head(service.dense_ppl)


def report(args, service, table, device, requests, rows):
    """The rows as JSON, if asked, and what was written."""
    if args.json == "-":
        say(json.dumps(strict(rows), indent=1))
    elif args.json:
        args.calibration = len(service.calibration)
        inputs = sources(args) | {"tests": tests(args), "device": str(device)}
        write_provenance(args.json, provenance() | {"inputs": inputs})
        write_json(args.json, rows)
    if not args.dry_run:
        written = [str(r["out"]) for r, row in zip(requests, rows) if "unmet" not in row]
        more = f" and {len(written) - 3} more" if len(written) > 3 else ""
        table.say("wrote " + (", ".join(written[:3]) or "nothing") + more)


if __name__ == "__main__":
    run(main, ": every folder that is there is complete")
