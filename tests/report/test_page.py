"""Whole pages: valid, self-contained, complete; names stay text, and damage is listed instead of spreading."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from fastskel.cli import main
from fastskel.report import page as page_module
from fastskel.report import write_report

HOSTILE = ('<script>alert("1")</script>', "\"><img src=x onerror='alert(2)'>", "a &amp; b </script><!-- Größe 走る")


def make(run: Path, read, **options):
    """Write the page of a run; returns its elements, its text, and what it was made of."""
    options = {"clips": 0, "device": "cpu", "progress": False, **options}
    path, found = write_report(run, **options)
    text = path.read_text(encoding="utf-8")
    return read(text), text, found


def reasons(found) -> dict[str, str]:
    return {Path(problem.where).parent.name: problem.reason for problem in found.problems}


def test_page_holds_the_whole_run(run: Path, read) -> None:
    cached = {path.name for path in (run / "features").iterdir()}
    shutil.rmtree(run / "features")
    root, text, found = make(run, read, clips=3)
    assert found.problems == []
    # the features of the map are those that the evaluations computed, of the test clips: they need not be computed again
    assert len({path.name for path in (run / "features").iterdir()} & cached) == 1
    assert {path.name for path in (run / "features").iterdir()} <= cached
    headings = [heading.text for heading in root.all("h2")]
    assert headings == ["Run", "Data", "Training", "Results", "Results in detail", "Features", "What is not shown"]
    facts = root.by_id("run").all("dl")[0].text
    assert all(word in facts for word in ("usdrl-demo", "xsub", "usdrl-dste", "mgfd", "torch", "cpu"))
    charts = [caption.text for caption in root.by_id("training").all("figcaption")]
    assert {"loss", "learning rate", "norm of the gradient", "samples a second", "share of time waiting for data"} <= set(charts)
    assert any(chart.startswith("terms of the loss") for chart in charts)
    results = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/results.json")}
    assert len(results) == 2
    rows = root.by_id("results").all("tr")[1:]
    assert [row.all("th")[0].text for row in rows] == ["knn", "linear"]
    for row, folder in zip(rows, ("knn-xsub-data", "linear-xsub-data-lr0.1-epochs3"), strict=True):
        result = results[folder]
        cells = [cell.text for cell in row.all("td")]
        assert re.match(rf"top1 {100 * result['top1']:.1f} % \[[\d.]+, [\d.]+\]$", cells[2]), cells
        assert cells[-1] == str(run / folder / "results.json")
    features = root.by_id("features")
    assert len(features.of_class("map")[0].all("circle")) == results["knn-xsub-data"]["num_test"]
    # 25 joints but the centred one, and their table
    assert len(features.of_class("joint")) == 24
    assert "spine_mid" in features.text and "always zero in the view" in features.text
    assert len(text) < 5e6


def test_page_is_self_contained_and_accessible(run: Path, read) -> None:
    root, text, _ = make(run, read, clips=2)
    assert text.startswith("<!DOCTYPE html>\n<html lang=\"en\">")
    policy = [meta.attributes for meta in root.all("meta") if "http-equiv" in meta.attributes]
    assert policy[0]["content"].startswith("default-src 'none'")
    # nothing is named that a browser would fetch, and nothing runs but the script
    assert not {e.tag for e in root.every()} & {"img", "link", "iframe", "object", "embed", "image", "use", "audio", "video"}
    names = {name for e in root.every() for name in e.attributes}
    assert not names & {"src", "srcset", "data", "action", "poster"} and not any(name.startswith("on") for name in names)
    assert "url(" not in text and "@import" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    assert {e.attributes["href"] for e in root.every() if "href" in e.attributes} <= {f"#{name}" for name in ids}
    pictures = root.all("svg")
    assert len(pictures) > 8
    assert all(svg.attributes["role"] == "img" and svg.attributes["aria-label"] for svg in pictures)
    assert all("viewbox" in svg.attributes for svg in pictures)
    for table in root.all("table"):
        assert table.all("caption") and all("scope" in head.attributes for head in table.all("th"))
        widths = {len(row.all("th") + row.all("td")) for row in table.all("tr")}
        assert len(widths) == 1, table.text


def test_a_result_says_what_it_is_of(run: Path, read, write_result) -> None:
    write_result("fusion", encoder=["DSTE", "STTR"], top1=0.5)
    root, _, _ = make(run, read)
    headings = [heading.text for heading in root.all("h3")]
    assert "fusion: DSTE + STTR, custom, xsub" in headings
    assert "DSTE + STTR" in [cell.text for cell in root.by_id("results").all("td")]


def test_what_is_not_known_is_said(run: Path, read, write_result) -> None:
    said = "Whether the encoder saw labels of the test clips is not known"

    def sentences() -> list[str]:
        root, _, _ = make(run, read)
        return [strong.text for strong in root.all("strong") if strong.text.startswith(said)]

    assert sentences() == []
    write_result("fusion", top1=0.5, test_labels_not_known="8 of 8 clips have names of others")
    assert sentences() == [f"{said}: 8 of 8 clips have names of others."]


def test_hostile_names_stay_text(run: Path, read, write_result) -> None:
    write_result(
        "<b>task</b>",
        encoder=HOSTILE[1],
        note=HOSTILE[0],
        top1=0.5,
        confusion=[[1, 2, 0], [0, 3, 0], [1, 0, 1]],
        timelines=[{"recording": HOSTILE[2], "num_frames": 9, "truth": [[0, 4, 0]], "predicted": [[1, 5, HOSTILE[1], 0.5]]}],
        examples=[{"query": 0, "label": 0, "neighbours": [1], "labels": [1], "similarities": [0.5]}],
        rows=[{HOSTILE[0]: HOSTILE[2]}],
        **{HOSTILE[0]: 0.25},
    )
    moved = run.rename(run.with_name('a "run" & <i>'))
    root, text, found = make(moved, read)
    assert found.problems == []
    # the frames of clips, and the script
    assert [script.attributes.get("type") for script in root.all("script")] == ["application/json", None]
    assert not {"b", "img"} & {tag for tag in ("b", "img") if root.all(tag)}
    assert len(root.all("i")) == len(re.findall(r"<i [^>]*aria-hidden", text))
    assert not any(name.startswith("on") for e in root.every() for name in e.attributes)
    for name in (*HOSTILE, "<b>task</b>", str(moved)):
        assert name in root.text, name
    assert "wrong: " + HOSTILE[1] in root.text
    titles = {title.text for title in root.all("title")}
    assert f"true {HOSTILE[0]}, predicted {HOSTILE[1]}: 2 of 3" in titles


def test_what_is_known_is_drawn(run: Path, read, write_result) -> None:
    write_result("early", curve=[{"ratio": r / 10, "top1": r / 12} for r in range(1, 11)], area=0.4)
    write_result("semi", curve=[{"fraction": f, "mean": m, "deviation": d} for f, m, d in ((0.1, 0.3, 0.02), (0.5, 0.6, 0.01))])
    write_result(
        "detection",
        thresholds=[{"iou": 0.1, "map_action": 0.9, "map_video": 0.8}, {"iou": 0.5, "map_action": 0.4, "map_video": None}],
        timelines=[{"recording": "r1", "num_frames": 100, "truth": [[0, 50, 0], [60, 90, 2]], "predicted": [[5, 45, 0, 0.9]]}],
    )
    named = {"class": HOSTILE[1], "start": 10, "end": 20}
    spread = {"mean": 0.5, "deviation": 0.1, "values": [0.4, 0.6]}
    write_result(
        "segmentation",
        timelines=[{"recording": "r2", "num_frames": 100, "truth": [named], "predicted": [{**named, "score": 0.5}]}],
        thresholds={"0.25": {"f1": 0.5, "per_class": [0.1]}, "0.5": {"f1": 0.25, "per_class": [0.1]}},
        per_class={HOSTILE[0]: 0.5, HOSTILE[1]: None},
    )
    write_result("labels", fractions=[{"fraction": f, "num_labels": 3, "top1": spread, "subsets": ["x"]} for f in (0.1, 0.5)])
    write_result("subset", confusion=[[1, 0], [0, 2]])
    write_result("few_shot", accuracy={"mean": 0.71, "deviation": 0.05, "values": [0.7, 0.72]}, settings={"shots": 0.5})
    write_result("novel", nested={"left": 0.25, "seconds": 0.5})
    root, _, found = make(run, read)
    assert found.problems == []
    place = {result.task: root.by_id(f"result-{number}") for number, result in enumerate(found.results)}
    (early,) = place["early"].of_class("line")
    assert len(early.attributes["points"].split()) == 10
    assert "ratio 0.5\ntop1: 41.7 %" in {title.text for title in place["early"].all("title")}
    assert len(place["semi"].of_class("band")) == 1
    cells = [[cell.text for cell in row.all("th") + row.all("td")] for row in place["detection"].all("tr")]
    assert cells[-3:] == [["iou", "map_action", "map_video"], ["0.1", "90.0 %", "80.0 %"], ["0.5", "40.0 %", "-"]]
    (timeline,) = place["detection"].of_class("timeline")
    boxes = [box for box in timeline.all("rect") if "fill" in box.attributes]
    assert [(float(b.attributes["x"]), float(b.attributes["width"]), b.attributes["y"]) for b in boxes] == [
        (600, 300, "0"), (0, 500, "0"), (50, 400, "32"),
    ]  # fmt: skip
    boxes = [box for box in place["segmentation"].of_class("timeline")[0].all("rect") if "fill" in box.attributes]
    assert [float(box.attributes["x"]) for box in boxes] == [100, 100]
    assert boxes[0].attributes["fill"] == boxes[1].attributes["fill"]
    cells = [[cell.text for cell in row.all("th") + row.all("td")] for row in place["segmentation"].all("tr")]
    assert cells[:3] == [["iou", "f1"], ["0.25", "50.0 %"], ["0.5", "25.0 %"]]
    assert cells[3:] == [["class", "value"], [HOSTILE[0], "50.0 %"], [HOSTILE[1], "-"]]
    assert [cell.text for cell in place["labels"].all("tr")[1].all("td")] == ["3", "50.0 ± 10.0 %"]
    assert len(place["labels"].of_class("band")) == 1
    # two classes of the data set's three: whose names are not told
    assert "true class 1, predicted class 1: 2 of 2" in {title.text for title in place["subset"].all("title")}
    rows = {row.all("th")[0].text: [cell.text for cell in row.all("td")] for row in root.by_id("results").all("tr")[1:]}
    assert rows["labels"][2:4] == ["top1 at fraction 0.1 50.0 ± 10.0 %", "top1 at fraction 0.5 50.0 ± 10.0 %"]
    assert rows["few_shot"][2] == "accuracy 71.0 ± 5.0 %"
    assert rows["novel"][2:4] == ["nested/left 25.0 %", "nested/seconds 0.5"]


DAMAGE = {
    "confusion": ([[1, 2]], "the confusion matrix cannot be shown: confusion must be (K, K)"),
    "curve": ([{"top1": 0.5}], "the curve cannot be shown: rows must have one of"),
    "timelines": ([{"recording": "r"}], "the timelines cannot be shown: KeyError: 'num_frames'"),
    "thresholds": (7, "the table over thresholds cannot be shown"),
    "examples": ([{"query": 10**6, "label": 0, "neighbours": [], "labels": []}], "clip must be in 0 .. 23"),
    "history": ("text", "the history cannot be shown"),
}


def test_damage_is_listed_and_stays_where_it_is(run: Path, read, write_result) -> None:
    for key, (value, _) in DAMAGE.items():
        write_result(key, top1=0.5, **{key: value})
    for name, text in {"half": '{"task": "knn", "top1": 0.', "nan": '{"task": "knn", "top1": NaN}', "list": "[1]"}.items():
        (run / name).mkdir()
        (run / name / "results.json").write_text(text)
    (run / "summary").mkdir()
    (run / "summary" / "results.json").write_text('{"seconds": 3}')
    (run / "bytes").mkdir()
    (run / "bytes" / "results.json").write_bytes(b"\xff\xfe")
    root, _, found = make(run, read)
    told = reasons(found)
    for key, (_, reason) in DAMAGE.items():
        assert reason in told[f"{key}-xsub-data"], told
    assert all("cannot be read" in told[name] for name in ("half", "nan", "list", "bytes"))
    assert "not the result of a task" in told["summary"]
    listed = root.by_id("problems").text
    assert all(problem.where in listed and problem.reason in listed for problem in found.problems)
    assert len(found.problems) == len(DAMAGE) + 5
    # every readable result has its row, the damaged parts are all that is missing
    assert len(root.by_id("results").all("tr")) == 1 + 2 + len(DAMAGE)
    assert root.by_id("features").of_class("map")


@pytest.mark.parametrize("file, text", [("log.jsonl", "{\n{}\n"), ("config.json", "{"), ("config.json", '{"recipe": 3}')])
def test_damaged_records(run: Path, read, finished: Path, file: str, text: str) -> None:
    (run / file).write_text(text)
    root, _, found = make(run, read, data=finished / "data")
    assert [problem.where for problem in found.problems] == [str(run / file)]
    assert len(root.by_id("results").all("tr")) == 3
    assert root.by_id("features").of_class("map")


def test_table_of_confusions(run: Path, read) -> None:
    path = run / "knn-xsub-data" / "results.json"
    told = json.loads(path.read_text())
    counts = told.pop("confusion")
    path.write_text(json.dumps(told))
    (run / "linear-xsub-data-lr0.1-epochs3" / "confusion.csv").write_text("true,a\nb,1,2\n")
    root, _, found = make(run, read)
    # counts of the file where the result has none; counts of the result where the file is damaged
    for place in range(2):
        (matrix,) = root.by_id(f"result-{place}").of_class("matrix")
        assert any(title.text.startswith(f"true {HOSTILE[0]}, ") for title in matrix.all("title"))
    assert len(root.by_id("result-0").of_class("cell")) == sum(count > 0 for row in counts for count in row)
    (problem,) = found.problems
    assert Path(problem.where).name == "confusion.csv" and "no square table" in problem.reason


def test_result_of_other_data(run: Path, read, write_result) -> None:
    examples = [{"query": 0, "label": 0, "neighbours": [1], "labels": [0]}]
    path = write_result("other", top1=0.5, examples=examples)
    told = json.loads(path.read_text())
    told["dataset"]["sha256"] = "0" * 64
    path.write_text(json.dumps(told))
    root, _, found = make(run, read)
    text = "\n".join(problem.reason for problem in found.problems)
    assert "it is another data set than the run recorded" in text
    assert "the retrieval examples cannot be shown: the data set of the result is not at hand" in text
    assert root.of_class("clips") == []


def test_without_data(run: Path, read) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(run / "gone")}))
    for path in run.glob("*/results.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "dataset": {**told["dataset"], "path": str(run / "gone")}}))
    root, _, found = make(run, read)
    assert [heading.text for heading in root.all("h2")][-2:] == ["Results in detail", "What is not shown"]
    assert "Give it with --data." in found.problems[-1].reason
    # class names are those of confusion.csv then
    assert any(title.text.startswith(f"true {HOSTILE[0]}, predicted") for title in root.all("title"))


def test_results_elsewhere_and_beside_a_published_file(run: Path, read, tmp_path: Path) -> None:
    published = tmp_path / "weights.pth.tar"
    published.write_bytes(b"weights")
    (run / "knn-xsub-data").rename(tmp_path / "weights.pth.tar-results")
    results = tmp_path / "weights.pth.tar-results"
    (results / "deep").mkdir()
    (results / "results.json").rename(results / "deep" / "results.json")
    root, _, found = make(published, read, results=[run])
    assert [result.task for result in found.results] == ["knn", "linear"]
    assert "There is no record of the training." in root.text
    assert ["does not record its encoder's settings" in problem.reason for problem in found.problems] == [True]
    assert (results / "report.html").is_file()
    # a fine-tuned classifier lies beside its own results
    root, _, found = make(run / "linear-xsub-data-lr0.1-epochs3", read)
    assert [result.task for result in found.results] == ["linear"] and "linear" in root.by_id("results").text
    # the same folder twice is one result
    assert len(write_report(run, results=[run, run], clips=0, progress=False)[1].results) == 1


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report: run must be a run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="report: results must be folders"):
        write_report(run, results=[tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="report: clips must be at least 0"):
        write_report(run, clips=-1)
    with pytest.raises(ValueError, match="nowhere"):
        write_report(run, data=tmp_path / "nowhere")


def test_a_page_is_written_whole_or_not_at_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "pages" / "page.html"
    assert write_report(run, out=out, clips=0, progress=False)[0] == out
    before = out.read_bytes()
    # a lone surrogate cannot be written
    monkeypatch.setattr(page_module, "_page", lambda *_: "new page \ud800")
    with pytest.raises(UnicodeEncodeError):
        write_report(run, out=out, clips=0, progress=False)
    assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]


def test_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--clips", "1", "--device", "cpu", "--quiet"]) == 0
    assert re.fullmatch(rf"2 results, [\d.]+ MiB: {re.escape(str(run / 'report.html'))}\n", capsys.readouterr().out)
    (run / "half").mkdir()
    (run / "half" / "results.json").write_text("{")
    assert main(["report", str(run), "--clips", "0", "--quiet"]) == 0
    assert "1 parts are missing or damaged" in capsys.readouterr().out
    assert main(["report", str(run / "nowhere")]) == 2
