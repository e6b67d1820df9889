"""
Figures and tables: drawn from what a run wrote, and pages that say what results/ says.

Run       pytest test_plot.py
"""

import argparse
import re
import shutil

import pytest
import torch

import plot
import tables
from checks import drift
from conftest import ROOT, call, refuses
from prune import F2, prepare, sources
from ranks import Pruner
from script import write_json


@pytest.mark.parametrize("name", tables.PAGES)
def test_every_table_of_a_page_is_what_results_say(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert tables.fill(page, tables.PAGES[name]) == page, "python plot.py --tables makes them anew"
    assert "<!-- table:" in page


def test_every_results_file_says_how_it_was_made_and_which_row_can_be_rerun():
    assert tables.read_json(tables.RESULTS / "sources.json").keys() <= set(tables.files())
    for name in tables.files():
        made = tables.source(name)
        assert re.fullmatch(r"[0-9a-f]{7,}", made["commit"]), "made with changes not committed"
        assert made["command"].startswith("python ") and made["inputs"]["model"], name
        for wanted in made["rerun"].get("rows", []) if isinstance(made["rerun"], dict) else ():
            assert drift.picked(name, wanted)["kl"] > 0


@pytest.fixture
def results(small, text, tmp_path, monkeypatch):
    """write(**changes): results/one.json, of two uniform rows of the small model and a strategy's,
    the last with changes; nothing else is in results/.
    """
    words = {"model": small, "data": text, "test": None, "seqlen": None}
    args = argparse.Namespace(**words, calibration=4, seed=0, tokens=64, dtype="float32")
    setting = prepare(args, torch.device("cpu"), torch.float32, 2048)
    pruner, (name, windows) = Pruner(setting.model, setting.calibration), *setting.held_out.items()
    rows = []
    for tokens, strategy in ((128, [0.5] * 3), (256, [0.5] * 3), (256, [0.2, 0.5, 0.7])):
        row = {"method": "a", "test": name, "tokens": tokens, "sparsity": 0.5}
        kl = F2(pruner, windows[: tokens // 128])(torch.tensor(strategy))
        rows.append(row | {"kl": kl} | ({} if strategy[0] == 0.5 else {"strategy": strategy}))
    wanted = [{"tokens": 128}, {"tokens": 256}, {"strategy": rows[2]["strategy"]}]
    made = {"command": "python train.py", "commit": "1234567", "inputs": sources(args)}
    write_json(
        tmp_path / "sources.json",
        {"one.json": made | {"rerun": {"calibration": 4, "rows": wanted}}},
    )
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "BLOCKS", {})
    return lambda **changes: write_json(
        tmp_path / "one.json", [*rows[:2], rows[2] | changes], rows=True
    )


def test_check_passes_as_measured_and_reports_a_changed_number(results, small, text, capsys):
    asked = ("--check", "--model", small, "--data", text)
    for changes, code, verdicts in (({}, 0, "ok ok ok"), ({"kl": 0.9}, 1, "ok ok DRIFTED")):
        results(**changes)
        assert call(plot, *asked) == code
        printed = capsys.readouterr().out
        assert re.findall(r"%  (\w+)", printed) == verdicts.split(), printed
    assert call(plot, "--check") == 0  # what cannot be measured here is said
    assert "needs small: --model DIR --data text.py" in capsys.readouterr().out
    assert call(plot, *asked[:-1], ROOT / "eval.py") == 0
    assert "needs text.py" in capsys.readouterr().out


def test_what_a_run_recorded_stands_over_what_is_written_by_hand(results, tmp_path):
    results()
    made = {"command": "python a.py", "commit": "7654321-dirty", "torch": "2", "threads": 3}
    write_json(tmp_path / "one.provenance.json", made | {"inputs": {"model": "b"}})
    said = tables.made_by(["one.json"])
    assert "`python a.py` at 7654321-dirty" in said and "threads 3, torch 2." in said


def test_what_made_a_file_stands_whole_under_its_first_table_and_is_pointed_to_from_the_next(
    results, monkeypatch
):
    results()
    table = "| a |\n| - |"
    one = lambda: tables.results("one.json") and table  # noqa: E731
    monkeypatch.setattr(tables, "BLOCKS", {"a": one, "b": one})
    page = tables.fill("<!-- table:a -->\n<!-- end -->\n<!-- table:b -->\n<!-- end -->", True)
    assert page.count("made by") == 1 and page.count("one.json: see above.") == 1
    assert page.index("made by") < page.index("see above")


def test_every_flag_and_file_that_the_readme_names_is_there():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) - {"--nproc-per-node", "--help"}:
        name = flag.removeprefix("--").removeprefix("no-")
        wish = f'"{name.replace("-", "_")}"'
        assert f'"--{name}"' in code or wish in code, flag
    for file in re.findall(r"\b[\w/]+\.(?:py|md|png)\b", page):
        assert (ROOT / file).exists(), file


def test_a_table_that_does_not_exist_is_refused():
    with pytest.raises(tables.Refused, match="no table is called nonsense"):
        tables.fill("<!-- table:nonsense -->\n<!-- end -->")


def test_figures_are_drawn_of_what_a_run_wrote_and_are_the_same_bytes_twice(tmp_path):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(ROOT / "tiny" / "stratnet.safetensors", run)
    shutil.copy(ROOT / "results" / "tiny-seed0.json", run / "results.json")
    shutil.copy(ROOT / "results" / "tiny-measured.json", run / "measured.json")
    for out in ("one", "two"):
        assert call(plot, "--run", run, "--out", tmp_path / out) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(
        f"{n}.{k}" for n in ("strategies", "front", "prediction") for k in ("png", "svg")
    )
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def drawn(name):
    """{method: (evaluations, KL ratios)} of each panel of the figure of results/compare-NAME."""
    figure = plot.library().figure()
    made = plot.read_table(ROOT / "results" / f"compare-{name}.json")
    plot.evaluations(figure, made)
    panels = []
    for axes in figure.axes:
        points = {c.get_label(): c.lines[0].get_data() for c in axes.containers}
        panels.append({method: (list(x), list(y)) for method, (x, y) in points.items()})
    return panels, {r["method"]: r for r in made[0]}


def test_the_figure_of_evaluations_has_every_method_at_what_it_spent_and_reached():
    pytest.importorskip("matplotlib")
    ((panel,), table) = drawn("tiny-refitted")
    (text,) = table["uniform"]["ratio"]
    budgets = [table[f"EvoPress, {b} each"] for b in (13, 26, 52, 104)]
    x, y = panel["EvoPress"]
    assert x == [r["evaluations"] for r in budgets] and y == [r["ratio"][text] for r in budgets]
    assert all(spent <= 64 * b < spent + 64 * 8 for spent, b in zip(x, (13, 26, 52, 104)))
    ours = table["UniCuCo"]
    assert panel["UniCuCo"] == ([ours["evaluations"]], [ours["ratio"][text]])
    # 0 has no place on a log axis: left of all others
    (zero,), (one,) = panel["uniform"]
    free = {"uniform", "DLP"}
    assert panel["DLP"][0] == [zero]
    assert 0 < zero < min(x[0] for method, (x, _) in panel.items() if method not in free)
    assert one == 1 and set(panel) == {plot.family(method) for method in table}
    panels, table = drawn("smollm2")
    assert len(panels) == len(table["uniform"]["ratio"]) == 2


def test_several_comparisons_share_a_figure_where_all_of_them_served():
    names = ("opponents", "blocks", "matrices")
    paths = [ROOT / "results" / f"compare-smollm2-{name}.json" for name in names]
    table, _ = plot.read_table(*paths)
    alone = [r for path in paths for r in plot.read_table(path)[0]]
    assert {r["method"] for r in table} == {r["method"] for r in alone}
    assert [r["method"] for r in table].count("uniform") == 1
    for r in table:  # the blocks served 0.5 alone
        (mine,) = [a for a in alone[1:] if a["method"] == r["method"] != "uniform"] or [r]
        for text, ratio in r["ratio"].items():
            assert ratio == pytest.approx(mine["at"][text][0.5], rel=2e-3)  # bfloat16, float32


def test_the_figure_of_evaluations_is_written_alone_and_the_same_bytes_twice(tmp_path):
    pytest.importorskip("matplotlib")
    path = ROOT / "results" / "compare-tiny.json"
    for out in ("one", "two"):
        assert call(plot, "--comparison", path, "--out", tmp_path / out) == 0
    for kind in ("png", "svg"):
        first, second = (tmp_path / out / f"evaluations.{kind}" for out in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 2


ROW = '{"table": "requests", "method": "uniform"}'


@pytest.mark.parametrize(
    "broken",
    [
        *("{", "[]", "null", "{}", '{"inputs": {}, "rows": []}', '{"inputs": 3, "rows": 4}'),
        *('{"inputs": {}, "rows": [3]}', f'{{"inputs": {{"requests": 64}}, "rows": [{ROW}]}}'),
    ],
)
def test_a_file_that_is_no_comparison_is_one_line(broken, tmp_path):
    (tmp_path / "compare.json").write_text(broken)
    refuses(plot.read_table, tmp_path / "compare.json", match="compare.json")


@pytest.mark.parametrize("broken", ["[]", "nonsense", '[{"a": 1}]', "{}"])
def test_a_folder_without_a_run_is_one_line(broken, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("measured.json", "results.json"):
        (tmp_path / name).write_text(broken)
    assert call(plot, "--run", tmp_path) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["measured.json", "results.json"])
@pytest.mark.parametrize(
    "broken", ["{", "[]", "3", "[3]", '[{"strategy": 1}]', "null", "[" * 10**5, '[{"kl": "a"}]']
)
def test_rows_that_train_did_not_write_are_one_line(tmp_path, name, broken):
    (tmp_path / name).write_text(broken)
    fields = plot.MEASURED if name == "measured.json" else plot.RESULT
    refuses(plot.read_rows, tmp_path / name, fields, match=name)


def test_a_score_is_of_the_first_comparison_that_has_the_method_and_of_evopress_best_form(
    monkeypatch,
):
    def row(method, at, evaluations):
        return {"method": method, "at": at, "evaluations": evaluations}

    found = {
        "one": [
            row("uniform", {"a": {0.5: 1.0}}, 0),
            row("UniCuCo", {"a": {0.5: 0.4}, "b": {0.5: 0.9}}, 64),  # over texts sqrt(0.36)
            row("EvoPress, 104 each", {"a": {0.5: 0.8}}, 6208),
            row("OWL, best of 12", {"a": {0.6: 0.1}}, 768),  # not at 0.5
        ],
        "two": [
            row("UniCuCo", {"a": {0.5: 0.1}}, 200),
            row("matrix EvoPress, 104 each", {"a": {0.5: 0.7}}, 6464),
            row("EvoPress, 52 each", {"a": {0.5: 0.2}}, 3136),  # no budget of the table
        ],
    }
    monkeypatch.setattr(tables, "requests_of", found.get)
    scores = tables.scores(["one", "two"])
    assert scores == {"unicuco": (pytest.approx(0.6, rel=1e-12), 64), 104: (0.7, 6464)}  # float64


def test_the_figure_of_sizes_is_drawn_from_results_alone(tmp_path):
    assert call(plot, "--sizes", "--out", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"sizes.png", "sizes.svg"}
    for name, weights, ratios in tables.gains():
        assert name and weights > 1e6 and all(0 < r < 1 for of in ratios.values() for r in of)
