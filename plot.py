"""
Figures from the JSON that train.py and bench.py write: strategies block by block, the front,
predicted against measured, the bars.

Reading   after bench.py. Nothing is computed here but StratNet's own curve.
Laptop    python plot.py                     (5 s; reads out/tiny, writes PNG and SVG into
          out/tiny/figures)
Full      python plot.py --run out/SmolLM2-135M --out results/figures
"""

import json
from pathlib import Path

import torch

from script import Parser, Refused, read_json, replacing, run
from unicuco import load_stratnet, strategy_for

# Okabe and Ito's colours, told apart by colour-blind readers too
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"


def read_list(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        raise Refused(f"{path} is not there or not readable: python train.py writes it") from None


def blocks(axes, net, cmap):
    """One line for each request: the sparsity of every block."""
    for s in (0.3, 0.4, 0.5, 0.6, 0.7):
        colour = cmap((s - 0.3) * 2.1)
        strategy = strategy_for(net, s, lambda x: float(x.mean()))
        axes.plot(range(1, len(strategy) + 1), strategy, "o-", color=colour, ms=4, lw=1.5)
        axes.axhline(s, color=colour, lw=0.8, ls=":")
        axes.annotate(
            f"{s:g}",
            (len(strategy), strategy[-1]),
            xytext=(8, -3),
            textcoords="offset points",
            color=colour,
        )
    axes.set(
        xlabel="block",
        ylabel="sparsity of the block",
        title="StratNet's strategy for five requests (dotted: uniform)",
    )
    axes.set_xticks(range(1, len(strategy) + 1, 1 if len(strategy) < 16 else 3))


def front(axes, measured, rows, net, scale, gp):
    """All measured strategies, StratNet's curve as the surrogate sees it, and both methods on
    unseen text.
    """
    sizes = [1 - sum(e["strategy"]) / len(e["strategy"]) for e in measured]
    first = [e["round"] == 0 for e in measured]
    for chosen, colour, label in (
        (True, GREY, "measured, first design"),
        (False, BLUE, "measured, picked by StratNet"),
    ):
        points = [(s, e["measured"]) for s, e, f in zip(sizes, measured, first) if f == chosen]
        if points:  # --rounds 0 picks none
            axes.scatter(*zip(*points), s=14, color=colour, alpha=0.7, label=label)
    with torch.no_grad():
        l1 = torch.linspace(0, 1, 200, dtype=torch.float64)
        x = net(torch.stack([l1, 1 - l1], 1))
        axes.plot(
            1 - x.mean(1),
            gp.posterior(x)[0].exp(),
            color=BLUE,
            lw=1,
            label="StratNet, as predicted",
        )
    for method, colour, label in (
        ("uniform", ORANGE, "uniform, unseen text"),
        ("unicuco", GREEN, "StratNet, unseen text"),
    ):
        mine = [r for r in rows if r["method"] == method and r["test"] == rows[0]["test"]]
        axes.plot(
            [1 - r["counted"] for r in mine],
            [r["kl"] for r in mine],
            "s--",
            color=colour,
            ms=5,
            lw=1,
            label=label,
        )
    axes.set(
        yscale="log",
        xlabel="size f1: fraction of block weights that survive",
        ylabel="divergence f2: KL, nats per token",
        title="The Pareto front",
    )
    axes.legend(frameon=False, fontsize=8)


def prediction(axes, measured):
    """Predicted against measured KL, by round."""
    asked = [e for e in measured if e["predicted"]]
    points = axes.scatter(
        [e["measured"] for e in asked],
        [e["predicted"] for e in asked],
        c=[e["round"] for e in asked],
        cmap="cividis",
        s=22,
    )
    ends = [min(e["measured"] for e in asked) * 0.8, max(e["measured"] for e in asked) * 1.25]
    axes.plot(ends, ends, color=GREY, lw=1)
    axes.fill_between(
        ends, [0.8 * e for e in ends], [1.2 * e for e in ends], color=GREY, alpha=0.15, lw=0
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="measured KL, nats per token",
        ylabel="predicted before measuring",
        title="The surrogate's predictions (band: within 20 %)",
    )
    axes.figure.colorbar(points, ax=axes, label="round")


def bars(axes, bench):
    """Seconds for all requests, shared and per request."""
    rows = [r for r in bench["table"] if r["seconds"] > 0]
    names = [r["method"] for r in rows]
    shared = [r["seconds_shared"] for r in rows]
    axes.barh(
        names,
        [r["seconds"] for r in rows],
        color=ORANGE,
        label=f"per request, times {bench['requests']}",
    )
    axes.barh(names, shared, color=BLUE, label="shared by all requests")
    for r in rows:
        axes.annotate(
            f" {r['seconds']:,.0f} s" + (" (extrapolated)" if r["extrapolated"] else ""),
            (r["seconds"], r["method"]),
            va="center",
            fontsize=8,
        )
    axes.set(xlabel="seconds", title=f"Serving {bench['requests']} requests")
    axes.set_xlim(right=max(r["seconds"] for r in rows) * 1.45)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def main():
    p = Parser(__doc__, ["python plot.py", "python plot.py --run out/SmolLM2-135M --out figures"])
    p.add_argument(
        "--run",
        type=Path,
        default=Path("out/tiny"),
        metavar="DIR",
        help="folder of a run of train.py (out/tiny)",
    )
    p.add_argument(
        "--bench",
        type=Path,
        metavar="FILE",
        help="of bench.py (default: bench.json in --run, if there)",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="default: figures in --run")
    a = p.parse_args()
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise Refused("plot.py needs one more package: pip install matplotlib") from None
    from gp import GaussianProcess

    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "svg.hashsalt": "unicuco",
        }
    )
    measured, rows = read_list(a.run / "measured.json"), read_list(a.run / "results.json")
    trained = load_stratnet(a.run / "stratnet.safetensors", len(measured[0]["strategy"]))
    net, scale = trained.net, trained.scale
    gp, out = (
        GaussianProcess(trained.about["mean"]).fit(trained.X, trained.y),
        a.out or a.run / "figures",
    )
    bench = a.bench or a.run / "bench.json"
    figures = {
        "blocks": lambda axes: blocks(axes, net, plt.get_cmap("cividis")),
        "front": lambda axes: front(axes, measured, rows, net, scale, gp),
    }
    if any(e["predicted"] for e in measured):
        figures["prediction"] = lambda axes: prediction(axes, measured)
    if bench.exists():
        figures["bars"] = lambda axes: bars(axes, read_json(bench))
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        draw(axes)
        for kind in ("png", "svg"):
            with replacing(out / f"{name}.{kind}") as partial:
                figure.savefig(partial, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        plt.close(figure)
    print(f"wrote {', '.join(figures)} (png, svg) into {out}")


if __name__ == "__main__":
    run(main)
