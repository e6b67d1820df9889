"""
Figures of a run of train.py: a strategy matrix by matrix, the front, predicted against measured;
of compare.py: KL against evaluations; and the tables of both pages.

Reading   beside compare.py, after train.py. Nothing is computed here but StratNet's own curve.
Laptop    python plot.py                     (5 s; reads out/tiny, writes PNG and SVG into
          out/tiny/figures)
          python plot.py --tables            (2 s; rewrites the tables of README.md and RESULTS.md
          from results/)
          python plot.py --comparison out/tiny/compare.json --out results/figures
          python plot.py --check             (2 minutes; measures a cheap row of each again)
Full      python plot.py --run out/SmolLM2-135M --out results/figures
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import tables
from model import LINEARS
from report import METHODS, family, grouped, read_comparison, requests_table
from script import Parser, Refused, replacing, run
from tables import TEXTS
from unicuco import MAX, Trained, load_stratnet, strategy_for

# Okabe and Ito's colours, told apart by colour-blind readers too
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#666666"
SHOWN = (0.3, 0.5, 0.7)  # requests whose strategies are drawn


@dataclass
class Made:
    """What train.py wrote: measured.json, results.json, stratnet.safetensors."""

    measured: list
    rows: list
    trained: Trained

    @classmethod
    def read(cls, folder):
        measured = read_rows(folder / "measured.json", MEASURED)
        rows = read_rows(folder / "results.json", RESULT)
        outputs = len(measured[0]["strategy"])
        if any(len(e["strategy"]) != outputs or not numbers(e["strategy"]) for e in measured):
            raise Refused(f"{folder / 'measured.json'} holds no strategies of one length")
        blocks = outputs // len(LINEARS) if outputs % len(LINEARS) == 0 else outputs
        return cls(measured, rows, load_stratnet(folder / "stratnet.safetensors", blocks))

    def strategy(self, sparsity):
        """StratNet's strategy for a sparsity, (d, m)."""
        layout = self.trained.layout
        x = strategy_for(self.trained.net, sparsity, lambda x: float(layout.level(x)))
        return x.view(layout.blocks, layout.kinds)


# fields of a row, and what each may be
NUMBER = int, float
MEASURED = {"round": int, "strategy": list, "measured": NUMBER, "predicted": (*NUMBER, type(None))}
RESULT = {"method": str, "sparsity": NUMBER, "counted": NUMBER, "test": str, "kl": NUMBER}


def numbers(values):
    return all(isinstance(v, NUMBER) for v in values)


def read_rows(path, fields):
    """The rows of a JSON file of train.py, each with `fields` of the right kind."""
    try:
        rows = json.loads(Path(path).read_text())
        right = all(isinstance(row[key], kind) for row in rows for key, kind in fields.items())
    except (OSError, ValueError, RecursionError):
        raise Refused(f"{path} is not there or not readable: python train.py writes it") from None
    except (KeyError, TypeError, IndexError):
        right = False
    if not right or not rows:
        raise Refused(f"{path} holds no rows of train.py: python train.py writes them")
    return rows


def read_table(*paths):
    """The table of requests of files of compare.py, at the sparsities that all of them served, and
    how many they are; uniform is the first one's.
    """
    inputs, rows = read_comparison(paths[0])
    try:
        for path in paths[1:]:
            more, theirs = read_comparison(path)
            rows = rows + [r for r in theirs if r["method"] != "uniform"]
            inputs["served"] = [s for s in inputs["served"] if s in more["served"]]
        table = requests_table(rows, inputs)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        table = []
    if not table:
        raise Refused(f"{paths[-1]} holds no rows of compare.py: python compare.py writes them")
    return table, inputs["requests"]


# ------------------------------------------------------------------------------------- figures
def strategies(figure, made):
    """Heat maps, matrices by blocks, one for each of SHOWN: how much StratNet takes from what."""
    panels = figure.subplots(len(SHOWN), 1, sharex=True)
    names = [name.split(".")[1].removesuffix("_proj") for name in LINEARS]
    for axes, sparsity in zip(panels, SHOWN):
        x = made.strategy(sparsity)
        image = axes.imshow(x.T, vmin=0, vmax=MAX, cmap="cividis", aspect="auto")
        axes.set_yticks(range(x.shape[1]), names if x.shape[1] == len(names) else ["block"])
        axes.tick_params(length=0, labelsize=8)
        axes.set_title(f"request: sparsity {sparsity:g}", loc="left")
    blocks = made.trained.layout.blocks
    ticks = range(0, blocks, 1 if blocks < 16 else 3)
    panels[-1].set_xticks(ticks, [i + 1 for i in ticks])
    panels[-1].set_xlabel("block")
    figure.colorbar(image, ax=panels, label="sparsity of the matrix", shrink=0.8)


def measured_points(axes, made):
    """Size and KL of all measured strategies, the first design apart."""
    X = torch.tensor([e["strategy"] for e in made.measured], dtype=torch.float64)
    sizes = (1 - made.trained.layout.level(X)).tolist()
    points = list(zip(sizes, made.measured))
    first = [(s, e["measured"]) for s, e in points if e["round"] == 0]
    picked = [(s, e["measured"]) for s, e in points if e["round"]]
    axes.scatter(*zip(*first), s=14, color=GREY, alpha=0.7, label="measured, first design")
    if picked:  # --rounds 0 picks none
        axes.scatter(*zip(*picked), s=14, color=BLUE, alpha=0.7, label="measured, picked")


def front(figure, made):
    """All measured strategies, StratNet's curve as the surrogate sees it, both methods on unseen
    text.
    """
    axes = figure.subplots()
    measured_points(axes, made)
    with torch.no_grad():
        l1 = torch.linspace(0, 1, 200, dtype=torch.float64)
        x = made.trained.net(torch.stack([l1, 1 - l1], 1))
        predicted = made.trained.gp().posterior(x)[0].exp()
    sizes = 1 - made.trained.layout.level(x)
    axes.plot(sizes, predicted, color=BLUE, lw=1, label="StratNet, as predicted")
    drawn = (("uniform", ORANGE, "uniform"), ("unicuco", GREEN, "StratNet"))
    for method, colour, label in drawn:
        mine = [r for r in made.rows if r["method"] == method]
        mine = [r for r in mine if r["test"] == made.rows[0]["test"]]
        counted, kl = [1 - r["counted"] for r in mine], [r["kl"] for r in mine]
        axes.plot(counted, kl, "s--", color=colour, ms=5, lw=1, label=label + ", unseen text")
    axes.set(yscale="log", title="The Pareto front")
    axes.set_xlabel("size f1: fraction of block weights that survive")
    axes.set_ylabel("divergence f2: KL, nats per token")
    axes.legend(frameon=False, fontsize=8)


def prediction(figure, made):
    """Predicted against measured KL, by round."""
    axes = figure.subplots()
    asked = [e for e in made.measured if e["predicted"]]
    measured, predicted = [e["measured"] for e in asked], [e["predicted"] for e in asked]
    rounds = [e["round"] for e in asked]
    points = axes.scatter(measured, predicted, c=rounds, cmap="cividis", s=22)
    ends = [min(measured) * 0.8, max(measured) * 1.25]
    axes.plot(ends, ends, color=GREY, lw=1)
    below, above = [0.8 * e for e in ends], [1.2 * e for e in ends]
    axes.fill_between(ends, below, above, color=GREY, alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="measured KL, nats per token")
    axes.set_ylabel("predicted before measuring")
    axes.set_title("The surrogate's predictions (band: within 20 %)")
    figure.colorbar(points, ax=axes, label="round")


# every method has a marker of its own in all figures; those without a colour are grey
COLOURS = {
    "uniform": ORANGE,
    METHODS["unicuco"]: GREEN,
    METHODS["evopress"]: BLUE,
    METHODS["matrices"]: "#56B4E9",
}
MARKERS = dict(zip(["uniform", *METHODS.values()], "sD^vPoX<>phd", strict=True))


def evaluations(figure, made):
    """KL over uniform's against evaluations of f2 for all requests, a panel for each text: a marker
    for each method, a curve of them for the budgets of an evolution.
    """
    table, requests = made
    methods = grouped([r | {"family": family(r["method"])} for r in table], "family")
    texts = list(table[0]["ratio"])
    spent = [r["evaluations"] for r in table if r["evaluations"]] or [1.0]
    none = min(spent) / 4  # where 0 is drawn
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, texts):
        for method, mine in methods.items():
            draw_method(axes, method, mine, text, none)
        axes.set(xscale="log", yscale="log", xlim=(none / 1.6, max(spent) * 1.6))
        label_ticks(axes, none, max(spent))
        axes.set_title(TEXTS.get(text, text), loc="left")
        axes.set_xlabel(f"evaluations of f2 for {requests} requests")
    panels[0].set_ylabel("KL over that of uniform pruning")
    labels = panels[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def sizes(figure, made):
    """KL over uniform's against the number of weights, a curve for each sparsity.

    made    as of `tables.gains`
    """
    axes = figure.subplots()
    weights = [count for _, count, _ in made]
    for s, colour in zip(made[0][2], (GREEN, BLUE, ORANGE, PINK)):
        measured, ratios = zip(*((count, of[s]) for _, count, of in made if s in of))
        means = [statistics.mean(r) for r in ratios]
        wide = [statistics.stdev(r) if len(r) > 1 else 0 for r in ratios]
        axes.errorbar(measured, means, wide, fmt="o-", color=colour, lw=1, label=f"at {s}")
    axes.axhline(1, color=GREY, lw=1)
    axes.set(xscale="log", xlabel="weights of the model", ylabel="KL over that of uniform pruning")
    names = [name.replace("-", "-\n", 1) for name, _, _ in made]  # or neighbours overlap
    axes.set_xticks(weights, [f"{name}\n{n / 1e6:g}M" for name, n in zip(names, weights)])
    axes.minorticks_off()
    axes.set(ylim=(0, 1.1), xlim=(weights[0] / 2, weights[-1] * 2))
    axes.set_title("The gain over uniform pruning, by size of the model", loc="left")
    axes.legend(frameon=False, loc="lower right")


def draw_method(axes, method, rows, text, none):
    """The points of one method, rows of a table; bars: over seeds, where there are several."""
    x = [r["evaluations"] or none for r in rows]
    y, wide = [r["ratio"][text] for r in rows], [r["spread"][text] or 0 for r in rows]
    line = "-" if len(rows) > 1 else ""
    style = {"color": COLOURS.get(method, GREY), "lw": 1, "ms": 6, "label": method}
    style |= {"elinewidth": 1 if any(wide) else 0, "zorder": 3 if method in COLOURS else 2}
    axes.errorbar(x, y, wide, fmt=MARKERS.get(method, "*") + line, **style)


def label_ticks(axes, none, most):
    """Plain numbers on both log axes, and 0 where it is drawn."""
    from matplotlib.ticker import MaxNLocator  # not installed everywhere: see `library`

    decades = [10**k for k in range(10) if 1.5 * none < 10**k <= 1.6 * most]
    axes.set_xticks([none, *decades], ["0", *(f"{x:,}" for x in decades)])
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def library():
    """matplotlib, without a screen, in this project's style."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise Refused("plot.py needs one more package: pip install matplotlib") from None
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
    plt.rcParams.update(style | {"svg.hashsalt": "unicuco"})
    return plt


def save(plt, draw, made, stem):
    """One figure as PNG and SVG, the same bytes every time."""
    figure = plt.figure(figsize=(7, 4.2), layout="constrained")
    draw(figure, made)
    for kind, metadata in (("png", None), ("svg", {"Date": None})):
        with replacing(stem.with_suffix("." + kind)) as partial:
            figure.savefig(partial, dpi=150, metadata=metadata)
    plt.close(figure)


def arguments():
    parser = Parser(__doc__, ["python plot.py", "python plot.py --run DIR --out figures"])
    parser.add_argument(
        "--run", type=Path, default=Path("out/tiny"), metavar="DIR", help="of train.py"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: figures in --run")
    parser.add_argument(
        "--tables", action="store_true", help="the tables of README.md and RESULTS.md"
    )
    comparison = "of compare.py, one or several of the same seeds: draw their figure of evaluations"
    some = {"nargs": "+", "metavar": "FILE", "help": comparison}
    parser.add_argument("--comparison", type=Path, **some)
    parser.add_argument("--sizes", action="store_true", help="the gain against model size, alone")
    again = "measure a cheap row of every results file again; those of SmolLM2-135M need"
    parser.add_argument("--check", action="store_true", help=f"{again} --model, --data, --test")
    for flag, several in (("--model", None), ("--data", None), ("--test", "+")):
        parser.add_argument(flag, type=Path, nargs=several, help="of --check")
    return parser.parse_args()


def main():
    args = arguments()
    if args.tables:
        print("rewrote " + (", ".join(tables.write()) or "nothing: every table is as it was"))
        return
    if args.check:
        from checks import drift  # it measures: nothing else here needs that much

        return drift.main(args)
    plt = library()
    if args.sizes:
        made, figures = tables.gains(), {"sizes": sizes}
        out = args.out or tables.RESULTS / "figures"
    elif args.comparison:
        made, figures = read_table(*args.comparison), {"evaluations": evaluations}
        out = args.out or args.comparison[0].parent / "figures"
    else:
        made = Made.read(args.run)
        figures = {"strategies": strategies, "front": front}
        if any(e["predicted"] for e in made.measured):
            figures["prediction"] = prediction
        out = args.out or args.run / "figures"
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        save(plt, draw, made, out / name)
    print(f"wrote {', '.join(figures)} (png, svg) into {out}")


if __name__ == "__main__":
    run(main)
