"""One self-contained HTML page of all figures in a folder, with their verdicts."""

import base64
import html
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from gc_nc.errors import InputError
from gc_nc.files import read_json_object, write_atomically
from gc_nc.rank_statistics import ALPHA
from gc_nc.reproduction.claims import FAILS, HOLDS, UNDECIDED

#: Symbol and CSS class of each verdict: it must be told without colour.
_VERDICTS = {HOLDS: ("✓", "holds"), FAILS: ("✗", "fails"), UNDECIDED: ("?", "undecided")}

_SCALES = {
    "paper": "full width and all images; grids are ours where the paper's are not public",
    "small": "reduced networks and data, for two CPU cores",
    "demo": "scikit-learn's embedded digits",
    "smoke": "shows only that every step runs; its verdicts mean nothing",
}
_TEXTS = ("number", "title", "scale", "caption", "image")
# A record may lack these.
_VALUES = ("command", "seconds", "sweep", "num_runs", "data", "date")
_LISTS = ("notes", "missing", "commits", "devices")
_OBJECTS = ("table", "config", "varied", "versions")
_DASH = "\u2013"
_NUMBER = ' class="number"'
# A wide table scrolls by itself, by keyboard too.
_SCROLL = '<div class="scroll" tabindex="0" role="region" aria-label="{}">'


def write_report(workdir: Path) -> Path:
    """Writes report.html from figures/figure_*.json and the pictures beside them; returns its path.

    Args:
      workdir: the folder; a report that is there is replaced.

    Raises:
      InputError: there are no figures, one cannot be read, or the report cannot be written.
    """
    folder, report = workdir / "figures", workdir / "report.html"
    paths = sorted(folder.glob("figure_*.json"))
    if not paths:
        raise InputError(
            f"{folder} holds no figure_*.json, of which a report is made; draw a figure first:"
            f" python -m experiments.reproduce --figure=1 --workdir={workdir}"
        )
    records = [_read_record(path) for path in paths]
    images = {record["image"]: _read_image(folder, record["image"]) for record in records}
    try:
        write_atomically(report, render_report(records, images))
    except OSError as error:
        raise InputError(f"{report} cannot be written: {error}") from error
    return report


def render_report(records: list[dict[str, Any]], images: dict[str, bytes]) -> str:
    """The page: a summary, how to read it, and a section a figure.

    Args:
      records: of the figures, in any order: the JSON objects that are beside the pictures.
      images: PNG files, by the "image" of the records.
    """
    records = sorted((_filled(record) for record in records), key=_figure_order)
    sections = "".join(_figure(record, images[record["image"]]) for record in records)
    ours = any(record["number"].startswith("E") for record in records)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Reproductions of the paper, figure by figure</title>
<style>{_CSS}</style>
</head><body>
<header><h1>Reproductions of the paper, figure by figure</h1>
<p class="lead">Figures of Munn, Dherin and Gonzalvo, <cite>The Impact of Geometric Complexity on
Neural Collapse in Transfer Learning</cite> (NeurIPS 2024, arXiv 2405.15706), drawn anew from
networks trained with gc_nc, and what these runs say of each claim.
{"Figures E1 and on are not in the paper." if ours else ""}</p></header>
<main>
{_summary(records)}{sections}</main>
</body></html>
"""


def _read_record(path: Path) -> dict[str, Any]:
    hint = "; draw the figure again, or remove the file"
    record = read_json_object(path, hint=hint)
    try:
        for key in _TEXTS:
            if not isinstance(record[key], str):
                raise TypeError(f"{key} {record[key]!r} is no text")
        for finding in record["findings"]:
            if finding["verdict"] not in _VERDICTS:
                raise ValueError(f"{finding['verdict']!r} is none of {', '.join(_VERDICTS)}")
        # Any other fault of the record shows here, where the file can be named.
        _figure(_filled(record), b"")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no record of a figure ({error!r}){hint}") from error
    return record


def _read_image(folder: Path, name: str) -> bytes:
    hint = "; draw its figure again"
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise InputError(f"{folder / name} cannot be read ({error}){hint}") from error
    if not content.startswith(b"\x89PNG\r\n"):
        raise InputError(f"{folder / name} is no PNG file{hint}")
    return content


def _filled(record: dict[str, Any]) -> dict[str, Any]:
    empty = dict.fromkeys(_VALUES) | {key: [] for key in _LISTS} | {key: {} for key in _OBJECTS}
    return empty | {key: value for key, value in record.items() if value is not None}


def _figure_order(record: dict[str, Any]) -> tuple[str, int, str]:
    """The paper's figures, those of its appendix (A), ours (E); each by number."""
    letters, digits, rest = re.fullmatch(r"([A-Z]*)(\d*)(.*)", record["number"], re.S).groups()
    return letters, int(digits or 0), rest


def _anchor(record: dict[str, Any]) -> str:
    # A folder may hold a number twice, at two scales.
    return re.sub(r"\W", "-", Path(record["image"]).stem)


def _summary(records: list[dict[str, Any]]) -> str:
    # What is no result must not be counted as one.
    told = [record for record in records if record["scale"] != "smoke"]
    counts = sum((_verdict_counts(record) for record in told), Counter())
    tiles = "".join(f"<li><strong>{counts[v]}</strong> {_chip(v)}</li>\n" for v in _VERDICTS)
    smoke = _count(len(records) - len(told), "smoke figure")
    left_out = f'<p class="banner">Not counted: {smoke}, whose verdicts mean nothing.</p>'
    heads = "".join(f"<th{_NUMBER}>{symbol} {v}</th>" for v, (symbol, _) in _VERDICTS.items())
    return f"""<section aria-labelledby="summary">
<h2 id="summary">Summary</h2>
<p>{_count(counts.total(), "claim")} on {_count(len(told), "figure")}:</p>
<ul class="tiles">
{tiles}</ul>
{left_out if told != records else ""}
{_SCROLL.format("Verdicts by figure")}<table>
<thead><tr><th>Figure</th><th>Title</th>{heads}<th>Scale</th>
<th{_NUMBER}>Runs</th><th{_NUMBER}>Time</th></tr></thead>
<tbody>
{"".join(map(_summary_row, records))}</tbody>
</table></div>
<h3>How to read the verdicts</h3>
<p>A claim that two quantities rise together, or against each other, is judged by their rank
correlation over runs. It holds, or fails, if the 95% interval of a bootstrap over the runs within
each setting lies on the claimed side of 0, or on the other, and a permutation test gives
p&nbsp;&lt;&nbsp;{ALPHA}. Anything else cannot be told from these runs. A claim counted over cases
holds if it does in every case, and fails if there is one in which it does not.</p>
<p>Claims are judged one by one, without a correction for their number, here {counts.total()}: of
correlations with nothing behind them, about 1 in 20 may get a verdict by chance. An interval tells
how sure a number is for these settings, not for others. The time of a figure adds up its runs, of
which several may have run at once.</p>
<h3>Scales</h3>
<dl>
{"".join(f"<dt>{name}</dt><dd>{text}</dd>{chr(10)}" for name, text in _SCALES.items())}</dl>
</section>
"""


def _summary_row(record: dict[str, Any]) -> str:
    counts = _verdict_counts(record)
    number, title, scale = (_text(record[key]) for key in ("number", "title", "scale"))
    told = "".join(f"<td{_NUMBER}>{counts[verdict]}</td>" for verdict in _VERDICTS)
    missing = f", {len(record['missing'])} missing" if record["missing"] else ""
    return (
        f'<tr class="{scale}"><th scope="row"><a href="#{_anchor(record)}">{number}</a></th>'
        f'<td class="title">{title}</td>{told}<td>{scale}</td>'
        f"<td{_NUMBER}>{_cell(record['num_runs'])}{missing}</td>"
        f"<td{_NUMBER}>{_duration(record['seconds'])}</td></tr>\n"
    )


def _figure(record: dict[str, Any], image: bytes) -> str:
    number, title, findings = record["number"], record["title"], record["findings"]
    runs = None if record["num_runs"] is None else _count(record["num_runs"], "run")
    facts = [fact for fact in (f"{record['scale']} scale", runs, record["data"]) if fact]
    said = "; ".join(f"{found['verdict']}: {found['claim']}" for found in findings)
    anchor, png = _anchor(record), base64.b64encode(image).decode()
    smoke = (
        '<p class="banner"><strong>Smoke run.</strong> It shows only that every step runs. Its'
        " verdicts and numbers mean nothing.</p>\n"
    )
    return f"""<section class="figure" aria-labelledby="{anchor}">
<h2 id="{anchor}">Figure {_text(number)}. {_text(title)}</h2>
<p class="facts">{_text(" · ".join(facts))}</p>
{smoke if record["scale"] == "smoke" else ""}{_listed("banner", "Missing runs", record["missing"])}
<ul class="verdicts">
{"".join(map(_finding, findings)) or "<li>No claim is judged here.</li>"}</ul>
<figure><img src="data:image/png;base64,{png}" alt="{_text(f"Figure {number}: {title}. {said}")}">
<figcaption>{_text(record["caption"])}</figcaption></figure>
{_table(record["table"], f"Numbers of figure {number}")}
{_listed("notes", "Notes", record["notes"])}
{_details(record)}</section>
"""


def _finding(finding: dict[str, Any]) -> str:
    claim, evidence = _text(finding["claim"]), _text(finding["evidence"])
    return (
        f"<li>{_chip(finding['verdict'])}"
        f'<div><p class="claim">{claim}</p><p class="evidence">{evidence}</p></div></li>\n'
    )


def _chip(verdict: str) -> str:
    symbol, name = _VERDICTS[verdict]
    return f'<span class="chip {name}"><span aria-hidden="true">{symbol}</span> {verdict}</span>'


def _table(table: dict[str, Any], label: str) -> str:
    if not table or not table["rows"]:
        return ""
    columns = zip(*table["rows"], strict=True)
    kinds = ["" if any(isinstance(v, str) for v in column) else _NUMBER for column in columns]

    def row_of(tag, cells):
        inner = (f"<{tag}{kind}>{v}</{tag}>" for v, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(inner)}</tr>\n"

    head = row_of("th", map(_text, table["columns"]))
    rows = "".join(row_of("td", map(_cell, row)) for row in table["rows"])
    return (
        f"{_SCROLL.format(_text(label))}<table>\n"
        f"<thead>{head}</thead>\n<tbody>\n{rows}</tbody></table></div>"
    )


def _listed(kind: str, heading: str, items: list[str]) -> str:
    points = "".join(f"<li>{_text(item)}</li>\n" for item in items)
    return f'<div class="{kind}"><h3>{heading}</h3><ul>\n{points}</ul></div>' if items else ""


def _details(record: dict[str, Any]) -> str:
    varied = (f"{key}: {', '.join(map(str, v))}" for key, v in record["varied"].items())
    facts = {
        "Sweep": record["sweep"],
        "Varied": "; ".join(varied),
        "Data": record["data"],
        "Hardware": ", ".join(record["devices"]),
        "Versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "Commits": ", ".join(record["commits"]),
        "Date": record["date"],
        "Time": _duration(record["seconds"]),
    }
    rows = "".join(f"<dt>{key}</dt><dd>{_text(v or _DASH)}</dd>\n" for key, v in facts.items())
    config = (f"{key}: {json.dumps(v, ensure_ascii=False)}" for key, v in record["config"].items())
    return f"""<details><summary>How figure {_text(record["number"])} was made</summary>
<pre tabindex="0"><code>{_text(record["command"] or _DASH)}</code></pre>
<dl>
{rows}</dl>
<h3>Config</h3>
<pre class="config" tabindex="0"><code>{_text(chr(10).join(config) or _DASH)}</code></pre>
<p class="printed">All settings are in the HTML file.</p></details>
"""


def _verdict_counts(record: dict[str, Any]) -> Counter:
    return Counter(finding["verdict"] for finding in record["findings"])


def _text(value: object) -> str:
    return html.escape(str(value))


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _cell(value: object) -> str:
    """A float to 4 significant digits, a whole number in full, a dash where there is none."""
    if value is None or value != value:
        return _DASH
    if isinstance(value, float):
        rounded = float(f"{value:.4g}")
        return f"{rounded:,.0f}" if 1e4 <= abs(rounded) < 1e7 else f"{rounded:.4g}"
    return f"{value:,}" if type(value) is int else _text(value)


def _duration(seconds: float | int | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return _DASH
    hours, minutes = divmod(round(seconds / 60), 60)
    short = f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return f"{hours} h {minutes} min" if hours else short


# Each text colour has a contrast of at least 4.5 to what is behind it, light and dark.
_CSS = """
:root { color-scheme: light dark; --page: #fff; --text: #1d1f23; --soft: #555a63; --line: #d9dbe0;
  --box: #f5f6f8; --link: #1a4f9c; --good: #12562f; --good-box: #e4f3ea; --bad: #8f1d1d;
  --bad-box: #fbeae8; --open-box: #ecedf1; --warn: #6b4700; --warn-box: #fdf3dc; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #16181c; --text: #e4e6ea;
  --soft: #a9aeb8; --line: #3a3e46; --box: #20232a; --link: #8db8f5; --good: #8fdcae;
  --good-box: #173425; --bad: #f5aba4; --bad-box: #3e1e1d; --open-box: #2d3139; --warn: #f0cb7e;
  --warn-box: #382c12; } }
* { box-sizing: border-box; } figure { margin: 1.25rem 0; }
body { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; background: var(--page);
  color: var(--text); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; margin: 0 0 .5rem; text-wrap: balance; }
h1 { font-size: 1.8rem; } h2 { font-size: 1.4rem; } h3 { font-size: 1rem; margin-top: 1.5rem; }
p, figcaption, ul { margin: 0 0 .75rem; max-width: 44rem; } ul { padding-left: 1.25rem; }
a, summary { color: var(--link); } summary { cursor: pointer; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.75rem; }
.facts, .evidence, figcaption { color: var(--soft); font-size: .92rem; }
.tiles, .verdicts { list-style: none; padding: 0; max-width: none; }
.tiles { display: flex; flex-wrap: wrap; gap: .5rem 2rem; } .tiles strong { font-size: 1.6rem; }
.verdicts li { display: grid; grid-template-columns: 9.5rem 1fr; gap: .25rem .75rem;
  padding: .6rem 0; border-bottom: 1px solid var(--line); } .verdicts p { margin: 0; }
.chip, .claim { font-weight: 600; } .chip { font-size: .88rem; white-space: nowrap;
  place-self: start; padding: .1rem .6rem; border: 1px solid; border-radius: 1rem; }
.holds { color: var(--good); background: var(--good-box); }
.fails { color: var(--bad); background: var(--bad-box); }
.undecided { background: var(--open-box); border-style: dashed; }
.banner { color: var(--warn); background: var(--warn-box); border-left: 4px solid; max-width: none;
  padding: .6rem .9rem; margin: 0 0 1rem; } .banner > * { margin: 0; }
img { display: block; max-width: 100%; margin: 0 auto .6rem; background: #fff; padding: .5rem; }
/* A shadow where there is more to the right; the end of the table covers it. */
.scroll { overflow-x: auto; margin: 1rem 0; background:
  linear-gradient(to left, var(--page) 50%, transparent) 100% 0 / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent) 100% 0 / 1rem 100% no-repeat; }
table { border-collapse: collapse; min-width: 100%; font-size: .92rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); } .number { text-align: right; }
:is(th, td):first-child { padding-left: 0; } tr.smoke td { color: var(--soft); }
thead th, td.title { white-space: normal; } thead th { color: var(--soft); vertical-align: bottom; }
pre { background: var(--box); padding: .75rem; overflow: auto; max-height: 24rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .75rem 0; }
dt { color: var(--soft); } dd { margin: 0; } pre { font-size: .85rem; }
td.title { min-width: 6rem; } .printed { display: none; break-before: avoid; }
@media (max-width: 34rem) { .verdicts li { grid-template-columns: 1fr; } }
@media print { @page { margin: 16mm; }
  body { max-width: none; padding: 0; font-size: 10pt; line-height: 1.4; }
  h2, h3, .facts { break-after: avoid; } img { max-height: 11cm; padding: 0; }
  figure, tr, .verdicts li, .banner, pre { break-inside: avoid; }
  .figure { break-before: page; border: 0; margin: 0; padding: 0; }
  .scroll { overflow: visible; background: none; } td:not(.number) { white-space: normal; }
  .chip, .banner { background: none; color: #000; } pre { white-space: pre-wrap; max-height: none; }
  .config, h3:has(+ .config), summary { display: none; } .printed { display: block; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
