"""One self-contained HTML page of all figures in a folder, with their verdicts."""

import base64
import json
import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from gc_nc.errors import InputError
from gc_nc.files import read_json_object, write_atomically
from gc_nc.rank_statistics import ALPHA
from gc_nc.reproduction.claims import FAILS, HOLDS, UNDECIDED

#: Symbol and CSS class of each verdict: a reader must be able to tell verdicts without colour.
_VERDICTS = {HOLDS: ("✓", "holds"), FAILS: ("✗", "fails"), UNDECIDED: ("?", "undecided")}

_TEXTS = ("number", "title", "scale", "caption", "image")
_OPTIONAL = (
    dict.fromkeys(("command", "seconds", "sweep", "num_runs", "data", "date"))
    | dict.fromkeys(("notes", "missing", "commits", "devices"), ())
    | {key: {} for key in ("config", "varied", "versions")}
    | {"table": {"columns": (), "rows": ()}}
)
_DASH = "\u2013"


def write_report(workdir: Path) -> Path:
    """Writes report.html from figures/figure_*.json and the pictures beside them; returns its path.

    Args:
      workdir: the folder. A report that is already there is replaced.

    Raises:
      InputError: there are no figures, one cannot be read, or the report cannot be written.
    """
    folder, report = workdir / "figures", workdir / "report.html"
    paths = sorted(folder.glob("figure_*.json"))
    if not paths:
        raise InputError(
            f"{folder} has no figure_*.json, from which a report is made; draw a figure first:"
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
    """Renders the page: a summary, how to read it, and a section for each figure.

    Args:
      records: the figures in any order: the JSON objects that are stored beside the pictures.
      images: the PNG files, by the "image" of the records.
    """
    figures = sorted(map(_figure, records), key=_figure_order)
    # Smoke figures are not results, so they must not be counted as such.
    counted = [figure["counts"] for figure in figures if figure["scale"] != "smoke"]
    return _ENVIRONMENT.get_template("report.html.jinja").render(
        figures=figures,
        images=images,
        verdicts=_VERDICTS,
        counts=sum(counted, Counter()),
        num_counted=len(counted),
        alpha=ALPHA,
    )


def _read_record(path: Path) -> dict[str, Any]:
    hint = "; draw the figure again, or remove the file"
    record = read_json_object(path, hint=hint)
    try:
        for key in _TEXTS:
            if not isinstance(record[key], str):
                raise TypeError(f"{key} {record[key]!r} is not a text")
        for finding in record["findings"]:
            if finding["verdict"] not in _VERDICTS:
                raise ValueError(f"{finding['verdict']!r} is not one of {', '.join(_VERDICTS)}")
        # Any other fault of the record shows up here, where the file can be named.
        render_report([record], {record["image"]: b""})
    except (AttributeError, KeyError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise InputError(f"{path} is not a record of a figure ({error!r}){hint}") from error
    return record


def _read_image(folder: Path, name: str) -> bytes:
    hint = "; draw its figure again"
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise InputError(f"{folder / name} cannot be read ({error}){hint}") from error
    if not content.startswith(b"\x89PNG\r\n"):
        raise InputError(f"{folder / name} is not a PNG file{hint}")
    return content


def _figure(record: dict[str, Any]) -> dict[str, Any]:
    """The record with defaults for what it lacks, and with what the template needs besides."""
    figure = _OPTIONAL | {key: value for key, value in record.items() if value is not None}
    table = figure["table"]
    names = table["columns"] if table["rows"] else ()
    kinds = [
        {} if any(isinstance(value, str) for value in column) else {"class": "number"}
        for column in zip(*table["rows"], strict=True)
    ]
    return figure | {
        # Not the number, which a folder may have twice, at two scales.
        "anchor": re.sub(r"\W", "-", Path(figure["image"]).stem),
        "counts": Counter(finding["verdict"] for finding in figure["findings"]),
        "columns": list(zip(kinds, names, strict=True)),
    }


def _figure_order(figure: dict[str, Any]) -> tuple[str, int, str]:
    """The paper's figures, then those of its appendix (A), then ours (E); each by number."""
    letters, digits, rest = re.fullmatch(r"([A-Z]*)(\d*)(.*)", figure["number"], re.S).groups()
    return letters, int(digits or 0), rest


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _cell(value: object) -> str:
    """A float to 4 significant digits, a whole number in full, a dash for None and NaN."""
    if value is None or value != value:
        return _DASH
    if isinstance(value, float):
        rounded = float(f"{value:.4g}")
        return f"{rounded:,.0f}" if 1e4 <= abs(rounded) < 1e7 else f"{rounded:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _duration(seconds: float | int | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return _DASH
    hours, minutes = divmod(round(seconds / 60), 60)
    short = f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return f"{hours} h {minutes} min" if hours else short


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"cell": _cell, "counted": _counted, "duration": _duration}
_ENVIRONMENT.filters["base64"] = lambda content: base64.b64encode(content).decode()
_ENVIRONMENT.filters["json"] = partial(json.dumps, ensure_ascii=False)
