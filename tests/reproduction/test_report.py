"""The page of figures: whole, honest, safe to open, and readable by anyone."""

import configparser
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gc_nc.errors import InputError
from gc_nc.reproduction import report
from gc_nc.reproduction.report import render_report, write_report

PNG = b"\x89PNG\r\n\x1a\nthe picture"


def a_record(number="1", **fields):
    finding = {"claim": "GC falls.", "verdict": "holds", "evidence": "rho -0.9", "numbers": {}}
    record = {
        "number": number,
        "title": "Learning rate",
        "scale": "small",
        "caption": "GC by step.",
        "image": f"figure_{number}.png",
        "findings": [finding],
    }
    return record | fields


def found(claim, verdict):
    return {"claim": claim, "verdict": verdict, "evidence": f"of {claim}", "numbers": {}}


def page_of(*records):
    return render_report(list(records), {record["image"]: PNG for record in records})


def style_of(page):
    [style] = re.findall(r"<style>(.*?)</style>", page, re.S)
    return style


def summary_of(page):
    return page.split('<section class="figure"')[0]


@pytest.fixture
def save(tmp_path):
    """Writes a record and its picture into the folder; returns the path of the record."""

    def save(record):
        (tmp_path / "figures").mkdir(exist_ok=True)
        (tmp_path / "figures" / record["image"]).write_bytes(PNG)
        path = tmp_path / "figures" / f"figure_{record['number']}.json"
        path.write_text(json.dumps(record))
        return path

    return save


class Parsed(HTMLParser):
    """Tags that do not balance, attributes by name, and the text outside of styles."""

    def __init__(self, page):
        super().__init__()
        self.open, self.wrong, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def values(self, name):
        return [value for _, of, value in self.attributes if of == name]


def full_record():
    return a_record(
        "E2",
        scale="smoke",
        findings=[found("One", "holds"), found("Two", "fails"), found("Three", "cannot be told")],
        table={"columns": ["setting", "GC"], "rows": [["rate 0.1", 2.0], ["rate 0.2", None]]},
        notes=["All values are ours."],
        missing=["seed=2: diverged"],
        command="python -m experiments.reproduce --figure=E2",
        seconds=7500.0,
        sweep="vgg13_cifar10",
        num_runs=32,
        config={"optimizer.learning_rate": 0.05, "model.name": "vgg13"},
        varied={"optimizer.l2": [0.0, 0.001]},
        commits=["abc1234"],
        versions={"jax": "0.10.2"},
        devices=["2 cores of AMD EPYC"],
        data="cifar10, 1,000 to train",
        date="2026-11-26T18:00:00+00:00",
    )


def test_writes_one_file(tmp_path, save):
    save(a_record("1"))
    save(a_record("A1", title="Appendix"))
    (tmp_path / "figures" / "notes.json").write_text("not a figure")
    (tmp_path / "report.html").write_text("an older one")
    written = write_report(tmp_path)
    assert written == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html"]
    records = [a_record("1"), a_record("A1", title="Appendix")]
    assert written.read_text("utf-8") == page_of(*records)


def test_tags_balance_and_anchors_lead_somewhere():
    # A folder may hold a figure at two scales.
    twice = a_record("1", image="figure_1_demo.png", scale="demo")
    parsed = Parsed(page_of(full_record(), a_record("1"), twice))
    assert parsed.wrong == parsed.open == []
    ids = parsed.values("id")
    assert len(ids) == len(set(ids)) == 4
    assert {f"#{name}" for name in ids} == {"#summary", *parsed.values("href")}
    assert set(parsed.values("aria-labelledby")) == set(ids)
    assert ("html", "lang", "en") in parsed.attributes
    assert ("meta", "charset", "utf-8") in parsed.attributes
    assert "viewport" in parsed.values("name")


def test_needs_no_network():
    parsed = Parsed(page_of(full_record(), a_record("1")))
    assert len(parsed.values("src")) == 2
    assert all(value.startswith("data:image/png;base64,") for value in parsed.values("src"))
    assert all(value.startswith("#") for value in parsed.values("href"))
    assert not {"script", "link", "iframe"} & {tag for tag, _, _ in parsed.attributes}
    assert not re.search(r"url\(|@import|https?:", style_of(page_of(a_record())))


def test_nothing_in_a_record_is_markup():
    nasty = "<script>alert(\"x\")</script> 'y' & &lt; {0}"
    record = full_record()
    record |= {key: nasty for key in ("title", "caption", "command", "data", "date", "sweep")}
    record |= {"findings": [found(nasty, "fails")], "notes": [nasty], "missing": [nasty]}
    record |= {"table": {"columns": [nasty], "rows": [[nasty]]}, "config": {nasty: nasty}}
    record |= {"versions": {nasty: nasty}, "devices": [nasty], "commits": [nasty]}
    record |= {"varied": {nasty: [nasty]}, "number": nasty, "scale": nasty}
    page = page_of(record)
    assert "<script" not in page
    parsed = Parsed(page)
    assert parsed.wrong == parsed.open == []
    # As it was, in text and in attributes.
    assert parsed.text.count(nasty) > 15
    [alt] = parsed.values("alt")
    assert alt == f"Figure {nasty}: {nasty}. fails: {nasty}"
    known = {"id", "class", "src", "alt", "href", "lang", "charset", "name", "content", "scope"}
    used = {name for _, name, _ in parsed.attributes}
    assert used <= known | {"tabindex", "role", "aria-label", "aria-labelledby", "aria-hidden"}


def test_every_verdict_with_a_word_and_a_symbol():
    page = page_of(full_record() | {"scale": "small"})
    for claim, mark in (("One", "✓ holds"), ("Two", "✗ fails"), ("Three", "? cannot be told")):
        assert f"{mark}{claim}of {claim}" in Parsed(page).text
    [alt] = Parsed(page).values("alt")
    assert alt == "Figure E2: Learning rate. holds: One; fails: Two; cannot be told: Three"


def test_everything_in_a_record_is_shown():
    text = Parsed(page_of(full_record())).text
    shown = ["All values are ours.", "seed=2: diverged", "--figure=E2", "2 h 5 min", "32 runs"]
    shown += ["vgg13_cifar10", "optimizer.learning_rate: 0.05", 'model.name: "vgg13"', "abc1234"]
    shown += ["optimizer.l2: 0.0, 0.001", "jax 0.10.2", "2 cores of AMD EPYC", "2026-11-26"]
    for what in [*shown, "cifar10, 1,000 to train", "Missing runs", "32, 1 missing", "GC by step."]:
        assert what in text, what


def test_summary_counts_the_claims():
    one = a_record("1", findings=[found("a", "holds"), found("b", "holds"), found("c", "fails")])
    two = a_record("2", findings=[found("d", "holds"), found("e", "cannot be told")])
    page = Parsed(summary_of(page_of(one, two))).text
    assert "5 claims on 2 figures:" in page
    assert re.search(r"3 ✓ holds\s+1 ✗ fails\s+1 \? cannot be told\s", page)
    assert "here 5:" in page
    assert "Not counted" not in page
    assert "1Learning rate210small" in page
    assert "2Learning rate101small" in page


def test_smoke_figures_are_marked_and_not_counted():
    page = page_of(a_record("1"), a_record("2", scale="smoke"))
    summary, first, second = (Parsed(part).text for part in page.split('<section class="figure"'))
    assert "1 claim on 1 figure:" in summary
    assert "Not counted: 1 smoke figure" in summary
    assert "Smoke run." not in first
    assert "Smoke run." in second


def test_figures_of_the_paper_come_first_by_number():
    numbers = ["E1", "A10", "10", "A2", "2", "1", "E10", "E2"]
    page = page_of(*map(a_record, numbers))
    ordered = ["1", "2", "10", "A2", "A10", "E1", "E2", "E10"]
    assert re.findall(r"Figure (\w+)\.", Parsed(page).text) == ordered
    assert Parsed(page).values("href") == [f"#figure_{number}" for number in ordered]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\u2013"),
        (float("nan"), "\u2013"),
        (float("inf"), "inf"),
        (-float("inf"), "-inf"),
        (105.2345, "105.2"),
        (-0.123456, "-0.1235"),
        (12345.6, "12,350"),
        (99999.0, "100,000"),
        (0.0, "0"),
        (1.23456e-5, "1.235e-05"),
        (3.2e9, "3.2e+09"),
        (1234567, "1,234,567"),
        (True, "True"),
        ("a word", "a word"),
    ],
)
def test_cells(value, shown, tmp_path, save):
    # Through the file: Python's JSON holds NaN and Infinity bare.
    save(a_record(table={"columns": ["x"], "rows": [[value]]}))
    _, figure = write_report(tmp_path).read_text("utf-8").split('<section class="figure"')
    assert re.findall(r"<td[^>]*>(.*)</td>", figure) == [shown]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(18.4, "18 s"), (45.0, "1 min"), (3599.0, "1 h 0 min"), (7500, "2 h 5 min"), (None, "\u2013")],
)
def test_times(seconds, shown):
    assert f"<dt>Time</dt><dd>{shown}</dd>" in page_of(a_record(seconds=seconds))


def test_a_record_with_no_more_than_it_must_have():
    text = Parsed(page_of(a_record(findings=[], table=None, notes=None))).text
    assert "No claim is judged here." in text
    assert "None" not in text
    for heading in ("Notes", "Missing runs", "Smoke run."):
        assert heading not in text


def message_of(workdir):
    with pytest.raises(InputError) as caught:
        write_report(workdir)
    assert "\n" not in str(caught.value)
    assert not (workdir / "report.html").exists()
    return str(caught.value)


def test_no_figures(tmp_path):
    message = message_of(tmp_path)
    assert str(tmp_path / "figures") in message
    assert "experiments.reproduce" in message


def test_a_missing_image_is_named(tmp_path, save):
    save(a_record("1"))
    save(a_record("2")).with_suffix(".png").unlink()
    assert f"{tmp_path}/figures/figure_2.png cannot be read" in message_of(tmp_path)


def test_an_image_that_is_none_is_named(tmp_path, save):
    save(a_record("2")).with_suffix(".png").write_bytes(b"")
    assert f"{tmp_path}/figures/figure_2.png is not a PNG file" in message_of(tmp_path)


@pytest.mark.parametrize("content", [b'{"number": "1', b"[]", b"", b"\xff"])
def test_broken_json_is_named(content, tmp_path, save):
    save(a_record("1"))
    save(a_record("2")).write_bytes(content)
    assert "figures/figure_2.json" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"title": None}, "title None is not a text"),
        ({"number": "2", "caption": 3}, "caption 3 is not a text"),
        ({"findings": [{"claim": "x", "verdict": "holds"}]}, "'evidence'"),
        ({"findings": [found("x", "maybe")]}, "'maybe' is not one of holds, fails, cannot be told"),
        ({"findings": ["x"]}, "not a record of a figure"),
        ({"findings": None}, "not a record of a figure"),
        ({"table": {"columns": ["a", "b"], "rows": [[1]]}}, "not a record of a figure"),
        ({"table": {"columns": ["a"], "rows": [[1], [1, 2]]}}, "not a record of a figure"),
    ],
)
def test_a_faulty_record_is_named(fields, said, tmp_path, save):
    path = save(a_record("1") | fields)
    message = message_of(tmp_path)
    assert message.startswith(str(path))
    assert said in message
    assert "draw the figure again" in message


def test_a_field_that_a_record_must_have(tmp_path, save):
    record = a_record("1")
    path = save(record)
    for key in ("number", "title", "scale", "caption", "image", "findings"):
        path.write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        assert f"not a record of a figure (KeyError('{key}'))" in message_of(tmp_path)


def test_the_template_is_installed():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    patterns = setup["options.package_data"]["gc_nc.reproduction"].split()
    folder = Path(report.__file__).parent
    files = {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert files == {path for pattern in patterns for path in folder.glob(pattern)} != set()


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme):
    """WCAG AA: 4.5 for text."""
    blocks = re.findall(r":root \{(.*?)\}", style_of(page_of(a_record())), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", blocks[scheme]))
    pairs = [(name, "page") for name in ("text", "soft", "link")]
    pairs += [(name, f"{name}-box") for name in ("good", "bad", "warn")]
    pairs += [("text", "open-box"), ("text", "box")]
    for front, back in pairs:
        dark, light = sorted((luminance(colours[front]), luminance(colours[back])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)
