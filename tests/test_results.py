"""The results that docs show are the ones in their JSON files."""

import html
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from gc_nc.reproduction.catalogue import FIGURES
from gc_nc.reproduction.report import render_report

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "results" / "figures"
RECORDS = {path: json.loads(path.read_text()) for path in sorted(FOLDER.glob("figure_*.json"))}
# | [1](...) | title | ... | 9 hold, 1 fail, 2 open | ...
ROW = re.compile(r"^\| \[(\w+)\]\(.*?\| (\d+) hold, (\d+) fail, (\d+) open \|", re.M)


def test_the_table_of_readme_counts_the_verdicts_of_each_figure():
    rows = {number: counts for number, *counts in ROW.findall((ROOT / "README.md").read_text())}
    expected = {}
    for record in RECORDS.values():
        counts = Counter(finding["verdict"] for finding in record["findings"])
        expected[record["number"]] = [
            str(counts[verdict]) for verdict in ("holds", "fails", "cannot be told")
        ]
    assert len(expected) >= 8
    assert rows == expected


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_result_says_how_it_was_made(path):
    record = RECORDS[path]
    assert record["title"].startswith(f"{FIGURES[record['number']].title}: ")
    assert record["scale"] in FIGURES[record["number"]].cost
    assert (FOLDER / record["image"]).read_bytes().startswith(b"\x89PNG")
    assert record["commits"]
    assert not any("dirty" in commit or commit == "None" for commit in record["commits"])
    assert record["seeds"]
    assert record["seconds"] > 0
    text = path.read_text()
    # No place of anybody's machine.
    assert not re.search(r'["\s=](/|~)\w', text)
    page = render_report([record], {record["image"]: b""})
    assert record["title"] in html.unescape(page)


def test_every_result_has_its_section():
    sections = (ROOT / "docs" / "results" / "figures.md").read_text()
    for record in RECORDS.values():
        assert f"## Figure {record['number']}:" in sections
        assert f"figures/{record['image']}" in sections
        for finding in record["findings"]:
            verdict = finding["verdict"].replace("holds", "**holds**").replace("fails", "**fails**")
            # A bar would end the cell.
            cells = [
                x.replace("|", r"\|") for x in (finding["claim"], verdict, finding["evidence"])
            ]
            assert f"| {' | '.join(cells)} |" in sections
