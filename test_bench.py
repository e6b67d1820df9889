"""
bench.py: stages against their floors, slopes.

Run       pytest test_bench.py        (10 s on 2 cores)
"""

import json
import math
import re
import statistics
import sys

import pytest
import torch

import bench
from conftest import CPU, call


def options(model, text, out):
    return (
        *("--model", model, "--data", text, *CPU),
        *("--seqlen", 64, "--calibration", 4, "--tokens", 256),
        *("--out", out),
    )


@pytest.mark.slow
def test_slopes_are_those_of_log_seconds_over_log_size(monkeypatch):
    calls = []

    def race(work, repeats):
        calls.append(work)
        return [float(2 ** (len(calls) % 4 * 2))]  # 4 times for each doubling

    monkeypatch.setattr(bench, "race", race)
    monkeypatch.setattr(bench, "Divergence", lambda model, windows: None)
    rows = bench.slopes()
    assert len(calls) == 4 * len(rows)
    for r in rows:
        assert r["sizes"][1] == 2 * r["sizes"][0] and len(r["seconds"]) == 4
        logs = ([math.log(v) for v in r[key]] for key in ("sizes", "seconds"))
        slope = statistics.linear_regression(*logs).slope
        assert r["slope"] == pytest.approx(slope, rel=1e-9)


@pytest.mark.slow
def test_stages_are_timed_against_their_floors_with_as_many_threads_as_before(
    small, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "botorch", None)  # as where it is not installed
    threads = torch.get_num_threads()
    assert call(bench, *options(small, text, tmp_path)) == 0
    content = json.loads((tmp_path / "stages.json").read_text())
    rows = content["rows"]
    assert content["slopes"] == []  # without --slopes
    assert {
        "rank one block",
        "64 masks from one ranking",
        "one evaluation of f2",
        "unpack one matrix, 1 thread",
    } <= {r["stage"] for r in rows}
    for r in rows:
        if "memory" in r["stage"]:
            assert 0 <= r["ratio"] < 1000  # MB
        else:
            assert r["ratio"] > 0 and r["seconds"] > 0 and math.isfinite(r["ratio"])
    assert torch.get_num_threads() == threads
    assert "not measured, pip install botorch" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gp_fits_as_well_as_botorchs(monkeypatch):
    pytest.importorskip("botorch")

    def race(*functions, repeats=5):  # once each, not timed
        for function in functions:
            function()
        return [1.0] * len(functions)

    monkeypatch.setattr(bench, "race", race)
    table = bench.Table()
    bench.time_gp(table)
    found = re.search(r"likelihood ([\d.-]+) / ([\d.-]+)", table.rows[0]["against"])
    theirs, ours = map(float, found.groups())
    # nats, of 200 values; no priors on either side
    assert len(table.rows) == 2 and ours > theirs - 0.5


@pytest.mark.parametrize(
    "words", [("--tokens", 0), ("--test-tokens", 0), ("--model", "nowhere"), ("--nonsense",)]
)
def test_bad_arguments_give_one_line_and_exit_code_2(words, capsys):
    assert call(bench, *words) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and error.startswith("bench.py: ")
