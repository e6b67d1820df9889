"""
Figures and tables: drawn from what a run wrote, and pages that say what results/ says.

Run       pytest test_plot.py
"""

import re
import shutil

import pytest

import plot
import tables
from conftest import ROOT, call, refuses


@pytest.mark.parametrize("name", tables.PAGES)
def test_every_table_of_a_page_is_what_results_say(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert tables.fill(page, tables.PAGES[name]) == page, "python plot.py --tables makes them anew"
    assert "<!-- table:" in page


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
