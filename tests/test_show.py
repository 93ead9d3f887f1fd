"""What the command line prints: names and messages come out as they are."""

from __future__ import annotations

from typing import Any

import pytest
from rich.progress import Progress

from trtbuild import show
from trtbuild.steps.folder_run.ending import Outcome

ODD = ["brain[left]", "[/red]", "[bold]x[/bold]", ":brain:", "a\\[b]"]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrapped."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.mark.parametrize("name", ODD)
def test_tables_show_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show.summary({"outcomes": [{"case": name, "output": "x", "seconds": {"read": 1.0}}]})
    assert name in capsys.readouterr().out
    show.exported([{"fold": name, "max_error": 0.0, "file": f"{name}.onnx"}])
    assert capsys.readouterr().out.count(name) == 2


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_progress_shows_names_as_they_are(
    name: str, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    with show.steps(quiet=False) as report:
        report(f"reading {name}")
    assert f"reading {name}" in capsys.readouterr().err
    with show.cases(quiet=False) as events:
        events.case_ended(Outcome(case=name, output=None, error=f"no [{name}]", seconds={}, warnings=()))
        events.case_progress(name, "network", 1, 2)
    text = capsys.readouterr().err
    assert f"{name}: FAILED. no [{name}]" in text
    assert (f"{name}: network" in text) == terminal


def test_every_case_that_runs_has_a_line_until_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two run at once; `a` goes to be written, and `b` fails."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")

    def lines() -> set[str]:
        return {task.description.strip() for task in bars[0].tasks}

    bars: list[Progress] = []
    start = Progress.start
    monkeypatch.setattr(Progress, "start", lambda self: (bars.append(self), start(self))[1])
    with show.cases(quiet=False) as events:
        events.case_progress("a", "prepare", 0, 1)
        events.case_progress("b", "network", 1, 4)
        events.case_progress("a", "network", 3, 4)
        assert lines() == {"cases", "a: network", "b: network"}
        events.case_progress("a", "write", 0, 1)
        assert lines() == {"cases", "b: network"}
        for case, error in (("a", None), ("b", "broken")):
            events.case_ended(Outcome(case=case, output="x", error=error, seconds={}, warnings=()))
        assert lines() == {"cases"}
    assert "b: FAILED. broken" in capsys.readouterr().err


@pytest.mark.parametrize("name", ODD)
def test_a_bundle_is_shown_with_its_path_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show.bundle({"path": name, "bytes": 1, "identity": "0" * 64, "stages": [], "engines": []})
    assert name in capsys.readouterr().out


def test_the_command_that_installs_an_extra_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    facts: dict[str, Any] = {"trtbuild": "1", "python": "3", "system": "x", "processors": 2, "backends": [],
                             "gpus": []}  # fmt: skip
    show.health({**facts, "extras": {"base": {"numpy": None}, "graph": {"onnx": None}}})
    text = capsys.readouterr().out
    assert "pip install 'trtbuild[graph]'" in text
    assert "pip install trtbuild\n" in text.replace(" \n", "\n")


def test_what_cleaning_left_alone_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    passes = [
        {"name": "fold", "modified": False, "left": ["node [a]: too large", "node b: no shape"]},
        {"name": "drop", "modified": True, "left": []},
    ]
    show.cleaned({"rows": [], "passes": passes})
    text = capsys.readouterr().out
    assert "changed by: drop" in text
    assert "fold left node [a]: too large\nfold left node b: no shape" in text
