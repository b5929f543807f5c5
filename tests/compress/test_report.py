"""The report as a table, as files and as a picture."""

import csv
import dataclasses
import json
from xml.etree import ElementTree

import pytest

from glm_edge.compress import Point, Report, Row
from glm_edge.compress.report import Latency
from glm_edge.errors import MissingExtraError, OutputError

ROWS = (
    Row("quantize.rtn", "decoder/weight", "int4-g32", 1.0, 4.5, 4096, 576, 0.0971),
    Row("prune.structured", "embed/weight", "shrunk [2, 3] -> [1, 3]", 0.5, 32.0, 24, 12),
)
REPORT = Report(
    ROWS,
    5000,
    1000,
    1250,
    1247,
    curve=(Point(1, 2.0, 1.0, 1.0, 1e-3), Point(2, 1.5, 0.5, 1.0, 5e-4)),
    notes=("calibration had no audio",),
)


def test_it_prints_aligned_with_totals():
    lines = str(REPORT).splitlines()
    assert lines[0].split("  ")[0] == "transform"
    assert "9.71e-02" in lines[2]
    ends = {
        line.index(cell) + len(cell) for line, cell in zip(lines[2:4], ("576", " 12"), strict=True)
    }
    assert len(ends) == 1
    total = next(line for line in lines if line.startswith("total"))
    assert "5,000" in total
    assert "1,000" in total
    assert "1,250 -> 1,247 parameters" in total
    assert "training: 2 steps, loss 2.0000 -> 1.5000" in lines
    assert lines[-1] == "note: calibration had no audio"


def test_total_bits_are_stored_bytes_over_remaining_parameters():
    assert REPORT.total.bits == pytest.approx(8 * 1000 / 1247)


def test_markdown_has_a_line_for_each_row():
    lines = REPORT.to_markdown().splitlines()
    assert len(lines) == 2 + len(ROWS) + 1
    assert len({line.count("|") for line in lines}) == 1


def test_csv_keeps_numbers_unrounded(tmp_path):
    REPORT.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    paths = [row["path"] for row in rows]
    assert paths == ["decoder/weight", "embed/weight", "all parameters", ""]
    assert float(rows[0]["relative_error"]) == 0.0971
    assert rows[1]["relative_error"] == ""
    with pytest.raises(OutputError, match=r"report\.csv: cannot be written"):
        REPORT.to_csv(tmp_path / "missing" / "report.csv")


def test_words_and_numbers_have_columns_of_their_own(tmp_path):
    action = "int4-g32 (output error 0.00397, damping 0.1)"
    row = dataclasses.replace(ROWS[0], action=action, output_error=0.003971)
    report = dataclasses.replace(REPORT, rows=(row, ROWS[1]))
    report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        first, second, total, _ = csv.DictReader(file)
    assert (first["action"], float(first["output_error"])) == ("int4-g32", 0.003971)
    assert first["note"] == "output error 0.00397, damping 0.1"
    assert (second["action"], second["note"]) == ("shrunk [2, 3] -> [1, 3]", "")
    assert (total["action"], total["count_before"], total["count_after"]) == ("", "1250", "1247")
    assert report.to_dict()["rows"][0] == row.columns()
    assert action in str(report)


def test_to_dict_is_json_with_every_attribute():
    latency = Latency("token", 3.25, 2.5, 1.3, 1.2, 1.45, 15)
    report = dataclasses.replace(REPORT, flops_before={"token": 3}).with_latency([latency])
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields.keys() == {field.name for field in dataclasses.fields(Report)} | {"total"}
    assert (fields["flops_before"], fields["flops_after"]) == ({"token": 3}, None)
    assert fields["curve"][1]["loss"] == 1.5
    assert fields["latency"] == [dataclasses.asdict(latency)]
    assert fields["total"]["bytes_after"] == 1000


def test_a_notebook_shows_a_table_whose_words_are_escaped():
    row = dataclasses.replace(ROWS[0], path="a<b>/weight")
    shown = dataclasses.replace(REPORT, rows=(row,), notes=("x & y",))._repr_html_()
    tree = ElementTree.fromstring(f"<div>{shown}</div>")
    cells = [[cell.text or "" for cell in line] for line in tree.find("table")]
    assert cells[0][:3] == ["transform", "path", "action"]
    assert cells[1][1] == "a<b>/weight"
    assert cells[2][0] == "total"
    assert [line.text for line in tree.findall("p")][-1] == "note: x & y"


def test_csv_holds_flops_latency_and_notes(tmp_path):
    times = Latency("token", 3.25, 2.5, 1.3, 1.2, 1.45, 15)
    flops = {"flops_before": {"token": 3000, "clip": 70}, "flops_after": {"token": 2001}}
    report = dataclasses.replace(REPORT, **flops).with_latency([times])
    report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        *parameters, counted, timed, note = csv.DictReader(file)
    assert [row["transform"] for row in parameters] == ["quantize.rtn", "prune.structured", "total"]
    assert not any(row[name] for row in parameters for name in ("flops_after", "before_ms"))

    def filled(row):
        return {name: cell for name, cell in row.items() if cell}

    expected = {"flops_before": "3000", "flops_after": "2001"}
    assert filled(counted) == {"transform": "FLOPs", "path": "token", **expected}
    measured = {name: str(value) for name, value in dataclasses.asdict(times).items()}
    assert filled(timed) == {"transform": "latency", "path": measured.pop("work"), **measured}
    assert filled(note) == {"transform": "note", "note": "calibration had no audio"}
    assert "FLOPs per token: 3,000 -> 2,001 (66.7%)" in str(report)
    assert "latency per token: 3.250 -> 2.500 ms (1.30 x" in report.to_markdown()


def test_reports_join_from_the_first_to_the_last():
    later = Report(ROWS[:1], 1000, 700, 1247, 1247, notes=("later",))
    both = REPORT + later
    assert len(both.rows) == 3
    assert (both.bytes_before, both.bytes_after) == (5000, 700)
    assert (both.count_before, both.count_after) == (1250, 1247)
    assert both.notes == ("calibration had no audio", "later")


def test_it_draws_itself(tmp_path):
    pytest.importorskip("matplotlib")
    REPORT.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match=r"report\.png: cannot be written"):
        REPORT.plot(tmp_path / "missing" / "report.png")


def test_plot_of_an_odd_name(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match="cannot be drawn: Format 'odd' is not supported"):
        REPORT.plot(tmp_path / "report.odd")
    REPORT.plot(tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


@pytest.mark.parametrize("name", ["report.csv", "report.png"])
def test_a_report_is_not_written_through_a_link(tmp_path, name):
    (tmp_path / "file").write_text("old")
    (tmp_path / name).symlink_to(tmp_path / "file")
    if name.endswith("png"):
        pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match="is a link to"):
        (REPORT.plot if name.endswith("png") else REPORT.to_csv)(tmp_path / name)
    assert (tmp_path / "file").read_text() == "old"


def test_large_models_fit_on_a_page(monkeypatch, tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    sizes = []
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda figure, *_, **__: sizes.append(figure.get_size_inches())
    )
    rows = [dataclasses.replace(ROWS[0], path=f"{i}/weight") for i in range(300)]
    dataclasses.replace(REPORT, rows=tuple(rows)).plot(tmp_path / "report.png")
    assert sizes[0][1] <= 14


def test_drawing_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="plot"):
        REPORT.plot(tmp_path / "report.png")


def test_repr_is_one_line():
    assert repr(REPORT) == "Report(2 rows, 5,000 -> 1,000 bytes)"
