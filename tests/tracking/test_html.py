import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from visiontuner.errors import JournalError
from visiontuner.evaluation.calibration import ChosenThreshold
from visiontuner.evaluation.report import evaluate_predictions
from visiontuner.journal import Finding, SearchRecord
from visiontuner.text import printable
from visiontuner.tracking.map_symbols import ImageMap, describe_image_map
from visiontuner.tracking.page import PAGE_FILE, search_page, write_page

NewSearch = Callable[..., Any]

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "شيواوا \u202e gnp.tac",
    "🐶 & 犬",
    "half \udc80 of a pair",
]


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)


@pytest.fixture(scope="module")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "white").save(buffer, format="png")
    return buffer.getvalue()


def record_of(search: Any) -> SearchRecord:
    return SearchRecord.load(search.folder)


def page_of(search: Any, **options: Any) -> Page:
    return Page(search_page(record_of(search), **{"figures": {}, **options}))


def evaluation(names: list[str], **facts: Any) -> dict[str, Any]:
    """Of four images, of which the second one is taken for the last class."""
    count = len(names)
    labels = np.array([0, 0, 1, 1])
    logits = np.zeros((4, count))
    logits[[0, 1, 2, 3], [0, count - 1, 1, 1]] = 3.0
    report = evaluate_predictions(
        logits=logits,
        labels=labels,
        class_names=names,
        temperature=1.5,
        threshold=ChosenThreshold(wanted_precision=0.9, value=0.5, precision=0.95, coverage=0.8),
        resamples=50,
    )
    raw = {
        **report.to_dict(),
        "looks": 1,
        "trial_id": "t0002",
        "choice": {
            "best": "t0002",
            "chosen": "t0002",
            "tied": ["t0002", "t0001"],
            "reason": "Why.",
        },
        "edges": ["Search 0.01 to 1 next."],
        "confused_pairs": [{"true": names[0], "predicted": names[-1], "count": 1, "share": 0.5}],
        "mistakes": [
            {"path": "a/1.jpg", "true": names[0], "predicted": names[-1], "probability": 0.87}
        ],
        **facts,
    }
    return dict(json.loads(json.dumps(raw)))


def image_map(names: list[str], paths: list[str], *, sprite: bytes = b"", **facts: Any) -> ImageMap:
    """Images of all classes in turn, one beside the other; the first is a suspect."""
    count = len(paths)
    raw = {
        "images": count,
        "method": "PCA",
        "explained": 0.25,
        "class_names": names,
        "paths": paths,
        "splits": ["train", *["validation"] * (count - 2), "test"],
        "labels": [row % len(names) for row in range(count)],
        "places": [[row / (count - 1), 0.5] for row in range(count)],
        "said": {"0": {"suspect": f"rather {names[-1]}"}},
        "sprite": base64.b64encode(sprite).decode(),
        "side": 8,
        "columns": 2,
        "suspects": {
            "count": 1,
            "first": [{"path": paths[0], "label": names[0], "suggested": names[-1], "score": 0.99,
                       "image": None}],
        },
        **facts,
    }  # fmt: skip
    return describe_image_map(json.loads(json.dumps(raw)))


def test_the_headline_says_what_was_searched_and_what_came_out(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    search.trial(2)
    search.finish()
    page = page_of(search)
    assert "images-20261122" in page.text
    assert "Searched: learning rate, batch size, by validation accuracy" in page.text
    assert "Completed: 2 of 16 trials finished" in page.text
    assert "2023-11-14 22:13 UTC" in page.text
    assert "56.00%" in page.text
    assert "t0002 has the highest validation accuracy" in page.text
    assert "visiontuner evaluate FOLDER" in page.text


def test_every_trial_has_a_row_with_its_numbers_best_first(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    search.trial(2)
    search.trial(3, state="failed", best_value=None, best_epoch=None, error="loss is NaN")
    page = page_of(search)
    heading = page.row("Trial")
    assert heading[:4] == ["Trial", "Learning rate", "Batch size", "Validation accuracy"]
    trials = [row for row in page.rows if re.fullmatch(r"t\d{4}", row[0])]
    # Three epochs of half a second each.
    assert trials[0] == ["t0002", "0.01002", "128", "56.00%", "2", "3", "1.5", "completed", "", ""]
    assert [row[0] for row in trials] == ["t0002", "t0001", "t0003"]
    assert (trials[2][3], trials[2][7], trials[2][9]) == ("–", "failed", "loss is NaN")


def test_what_is_found_of_several_splits_all_reaches_the_report(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    found = [
        Finding(rule="missing_classes", severity="warning", evidence=f"no {split}", advice="Add.")
        for split in ("validation", "test", "test")
    ]
    page = page_of(search, findings=found)
    rows = [row[3] for row in page.rows if row and row[0] == "warning"]
    assert rows == ["no validation", "no test"] or rows == ["no test", "no validation"]


def test_findings_are_grouped_by_rule_errors_first(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    for number in range(1, 10):
        search.start(number)
        search.append(
            "finding", trial_id=f"t{number:04d}", attempt=1, rule="overfit", severity="warning",
            step=3, evidence=f"gap in {number}", advice="Use `dropout`.",
        )  # fmt: skip
        search.end(number)
    data = Finding(rule="imbalance", severity="error", evidence="90 to 1", advice="Balance.")
    page = page_of(search, findings=[data])
    assert [row[1] for row in page.rows if row and row[0] in ("error", "warning")] == [
        "imbalance",
        "overfit",
    ]
    row = page.row("warning")
    assert row[2].endswith(" and 3 more")
    # The words are the best trial's.
    assert row[3:] == ["gap in 6", "Use dropout."]


def test_test_results_come_with_intervals_threshold_ties_and_edges(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    search.trial(2)
    page = page_of(search, evaluation=evaluation(["cat", "dog", "owl"], looks=3))
    assert page.row("Accuracy")[1] == "75.0%"
    low, high = re.findall(r"[\d.]+", page.row("Accuracy")[2])
    assert float(low) <= 75 <= float(high)
    assert "evaluation 3 of the test set" in page.text
    assert "confidence of at least 0.500" in page.text
    assert "Why." in page.text
    assert "tied with it on the validation images: t0001" in page.text
    assert "Search 0.01 to 1 next." in page.text
    assert page.row("owl")[1:] == ["0.0%", "–", "0.0%", "0", "1"]
    assert ["cat", "owl", "1", "50.0%"] in page.rows
    assert page.row("a/1.jpg") == ["a/1.jpg", "cat", "owl", "87.0%"]


def test_the_table_of_classes_says_what_figures_call_a_name_without_a_font(
    new_search: NewSearch,
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    # Linear B, which no font here has; and one that figures can write.
    text = page_of(search, evaluation=evaluation(["cat", "𐀀𐀁𐀂"])).text
    assert "𐀀𐀁𐀂 (class 1 in the figures)" in text
    assert "(class 0" not in text


def test_a_threshold_out_of_reach_says_that_every_answer_abstains(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    raw = evaluation(["cat", "dog"])
    raw["threshold"] |= {"value": None, "validation_precision": None, "precision": None}
    assert "so every answer abstains" in page_of(search, evaluation=raw).text


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_from_outside_becomes_markup(new_search: NewSearch, name: str, png: bytes) -> None:
    page = Page(_made_of(name, new_search("hostile"), png))
    harmless = Page(_made_of("harmless", new_search("harmless"), png))
    assert [(tag, attrs.keys()) for tag, attrs in page.tags] == [
        (tag, attrs.keys()) for tag, attrs in harmless.tags
    ]
    shown = printable(name)
    # YAML writes some of them in its own way in the experiment's two places.
    assert page.text.count(shown) >= harmless.text.count("harmless") - 2 > 20
    assert next(attrs["alt"] for tag, attrs in page.tags if tag == "img") == shown


def _made_of(name: str, search: Any, png: bytes) -> str:
    """A page on which everything that comes from outside is called `name`."""
    search.append(
        "search_started",
        name=name,
        experiment={
            **search.experiment.model_dump(mode="json"),
            "model": {"backbone": name, "train": name},
        },
        data={
            "source": name,
            "root": name,
            "digest": name,
            "class_names": [name, "dog"],
            "counts": {"train": 2},
            "class_counts": {"train": [1, 1]},
        },
        code={"version": name, "commit": name, "dirty": True},
        machine={"host": name, "packages": {name: name}},
    )
    search.start(1)
    search.append(
        "finding", trial_id="t0001", attempt=1, rule=name, severity=name, evidence=name, advice=name
    )
    search.end(1, "failed", best_value=None, error=name, reason=name)
    raw = evaluation([name, "dog"], trial_id=name, edges=[name], model=name)
    raw["choice"] = {"reason": name, "tied": [name], "chosen": "t0001"}
    raw["mistakes"][0]["path"] = name
    return search_page(
        record_of(search),
        figures={name: png},
        evaluation=raw,
        evaluation_figures={name: png},
        findings=[Finding(rule=name, severity="info", evidence=name, advice=name)],
        image_map=image_map([name, "dog"], [name, "b", "c"]),
        where={"folder": name, "tracking_uri": name, "runs": {"t0001": name}},
        notes=[name],
    )


def test_secrets_in_urls_stay_out(new_search: NewSearch) -> None:
    search = new_search(data={"source": "https://me:hunter2@example.org/p.zip?sig=hunter2"})
    search.begin()
    where = {"tracking_uri": "https://user:hunter2@mlflow.example.org"}
    source = search_page(record_of(search), figures={}, where=where)
    assert "hunter2" not in source
    assert "example.org/p.zip" in source


def test_the_page_asks_for_nothing_and_allows_only_its_own_script(
    new_search: NewSearch, png: bytes
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    source = search_page(record_of(search), figures={"all_curves": png})
    page = Page(source)
    places = [
        v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "srcset")
    ]
    assert places
    assert all(str(place).startswith("data:") for place in places)
    assert "url(" not in source
    assert "@import" not in source
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert str(policy).startswith("default-src 'none'")
    assert "unsafe" not in str(policy)
    image = next(attrs["src"] for tag, attrs in page.tags if tag == "img")
    assert base64.b64decode(str(image).split(",")[1]) == png


def test_single_images_are_listed_counted_and_drawn(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    page = page_of(search, image_map=image_map(["cat", "dog"], ["a.jpg", "b.jpg", "c.jpg"]))
    assert "1 of the training and validation images have a label that" in page.text
    assert "All 3 images by the two principal components" in page.text
    assert "which hold 25% of what their features vary" in page.text
    for row in ("cat → dog", "a.jpg", "1 cat (2)", "2 dog (1)", "label probably wrong (1)"):
        assert row in page.text
    # Of each class a symbol on the map and one in the legend; the suspect's ring over it.
    shapes = [tag for tag, attrs in page.tags if str(attrs.get("class")) in ("c0", "c1")]
    assert sorted(shapes) == ["circle"] * 3 + ["path"] * 2
    assert "names labels that are probably wrong, and draws" in page_of(search).text


def test_a_map_of_5000_images_stays_below_five_megabytes(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    paths = [f"train/class {row % 120}/{row:060}.jpg" for row in range(5_000)]
    names = [f"class {number}" for number in range(120)]
    # The most that `workflow/image_map.py` writes.
    drawn = image_map(names, paths, sprite=bytes(2_200_000), images=70_000)
    source = search_page(record_of(search), figures={}, image_map=drawn)
    assert len(source.encode()) < 5e6 - 800_000  # which an evaluation's figures take
    assert "5,000 of 70,000 images, of each class as many" in source


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 9}', '{"version": 1, "paths": [1]}'])
def test_a_damaged_map_is_left_out(new_search: NewSearch, content: str) -> None:
    search = new_search()
    search.begin()
    (search.folder / "image_map.json").write_text(content)
    page = Page(write_page(search.folder, figures={}).read_text(encoding="utf-8"))
    assert "Map of the images" not in page.text


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", "Still running when this page was written: 1 of 16 trials finished so far."),
        ("interrupted", "Interrupted: 1 of 16 trials finished. visiontuner tune --resume FOLDER"),
        ("time_budget", "Ended by its time budget: 1 of 16 trials finished."),
        ("failed", "Failed: no reason was recorded"),
        ("unheard_of", "unheard_of: 1 of 16 trials finished."),
    ],
)
def test_the_page_says_how_the_search_ended(new_search: NewSearch, state: str, said: str) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    search.start(2)
    page = page_of(search, state=state)
    assert said in page.text
    assert page.row("t0002")[7] == ("running" if state == "running" else "interrupted")


def test_a_search_in_which_every_trial_failed_says_so(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    for number in (1, 2):
        search.trial(number, state="failed", best_value=None, best_epoch=None, error="NaN")
    search.finish()
    text = page_of(search).text
    assert "No trial gave a usable result; 2 of 2 failed." in text
    assert "No trial has a usable result." in text


def test_a_single_trial_has_nothing_to_be_compared_with(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    text = page_of(search).text
    assert "nothing to compare it with" in text
    assert "There is no test split" in text  # its data has train and validation only


def test_an_evaluation_without_test_images_says_so(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    raw = evaluation(["cat", "dog"], looks=0)
    raw |= {"num_images": 0, "metrics": {}, "classes": [], "threshold": None, "notes": ["None."],
            "confused_pairs": [], "mistakes": []}  # fmt: skip
    page = page_of(search, evaluation=raw)
    assert "no test image was looked at" in page.text
    assert "Test accuracy" not in page.text


def test_an_optimum_at_the_edge_is_said_before_an_evaluation(new_search: NewSearch) -> None:
    search = new_search(search={"space": {"learning_rate": {"low": 1e-4, "high": 0.01005}}})
    search.begin()
    for number in (1, 2):
        search.trial(number)
    assert re.search(r"learning_rate.*0\.01", page_of(search).text.split("Test images")[0])


def test_losses_are_numbers_and_the_lowest_wins(new_search: NewSearch) -> None:
    search = new_search(objective="validation_loss")
    search.begin()
    search.trial(1, best_value=0.25)
    search.trial(2, best_value=0.5)
    search.trial(3, best_value=math.inf)
    page = page_of(search)
    assert "t0001 has the lowest validation loss: 0.2500" in page.text
    assert page.row("t0003")[3] == "inf"


def test_classes_are_counted_by_split(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    record = record_of(search)
    record.started["data"]["class_counts"] = {"train": [5, 3], "validation": [4, 0]}
    page = Page(search_page(record, figures={}))
    assert page.row("cat") == ["cat", "5", "4"]
    assert page.row("dog") == ["dog", "3", "0"]


def test_the_experiment_can_be_read_back_from_the_page(new_search: NewSearch) -> None:
    from visiontuner.experiment.reading import read_experiment
    from visiontuner.experiment.schema import Experiment

    search = new_search(training={"epochs": 3}, name="a & b")
    search.begin()
    source = search_page(record_of(search), figures={})
    text = html.unescape(re.findall(r"<pre><code>(.*?)</code></pre>", source, re.DOTALL)[1])
    path = search.folder / "copy.yaml"
    path.write_text(text)
    assert Experiment.parse(read_experiment(path)) == search.experiment


def test_a_search_that_has_not_begun_has_a_page() -> None:
    page = Page(search_page(SearchRecord(), figures={}))
    assert "No trial has begun." in page.text


# The page in its folder


def test_the_page_of_a_folder_has_figures_findings_and_places(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.append("finding", rule="imbalance", severity="warning", evidence="9:1", advice="Weigh.")
    search.trial(1)
    search.finish()
    (search.folder / "mlflow.json").write_text(json.dumps({"parent_run_id": "r0", "runs": {}}))
    path = write_page(search.folder)
    assert path == search.folder / PAGE_FILE
    page = Page(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("img") == 4
    assert all(text in page.text for text in ("r0", "efficientnet_lite0", "ONNX"))
    assert page.row("warning") == ["warning", "imbalance", "the search", "9:1", "Weigh."]
    assert [p.name for p in search.folder.iterdir() if "new" in p.name] == []


def test_a_folder_shows_its_evaluation(new_search: NewSearch, png: bytes) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    folder = search.folder / "evaluation"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(evaluation(["cat", "dog"])))
    (folder / "zebra.png").write_bytes(png)
    (folder / "reliability.png").write_bytes(png)
    page = Page(write_page(search.folder, figures={}).read_text(encoding="utf-8"))
    assert "Test accuracy" in page.text
    captions = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert captions == [
        "Confidence against accuracy, before and after temperature scaling",
        "zebra",
    ]


def test_the_rules_look_at_the_curves_once(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    for number in (1, 2):
        search.start(number)
        for step in (1, 2):
            search.epoch(number, step, train_loss=math.nan)
        if number == 1:
            search.append(
                "finding", trial_id="t0001", attempt=1, rule="not_a_number", severity="error",
                step=1, evidence="seen live", advice="Lower it.",
            )  # fmt: skip
        search.end(number, "failed", best_value=None, error="loss is not finite")
    page = Page(write_page(search.folder, figures={}).read_text(encoding="utf-8"))
    (row,) = [row for row in page.rows if row[1:2] == ["not_a_number"]]
    assert row[2:] == ["t0001, t0002", "seen live", "Lower it."]


@pytest.mark.parametrize("content", ["{", "[]", '{"metrics": 3}', "\udcff"])
def test_a_damaged_evaluation_is_named_and_the_rest_is_shown(
    new_search: NewSearch, content: str
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    (search.folder / "evaluation").mkdir()
    path = search.folder / "evaluation" / "report.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    page = Page(write_page(search.folder, figures={}).read_text(encoding="utf-8"))
    assert f"{path} cannot be read" in page.text
    assert page.row("t0001")[7] == "completed"


def test_a_live_search_is_running_and_a_dead_one_interrupted(new_search: NewSearch) -> None:
    search = new_search()
    search.begin()
    search.start(1)
    assert "Still running" in write_page(search.folder, figures={}).read_text()
    search.journal.close()
    assert "Interrupted" in write_page(search.folder, figures={}).read_text()


def test_a_folder_without_a_journal_is_no_search(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no search folder"):
        write_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


# In a browser


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class _Watcher(BaseHTTPRequestHandler):
    """Serves one page and remembers whatever else is asked for."""

    page = b""
    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200 if self.path == "/report.html" else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        if self.path == "/report.html":
            self.wfile.write(self.server.page)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: `apt-get install chromium`"
)


class Seen(NamedTuple):
    asked: list[str]
    complaints: list[str]
    document: str
    image: Image.Image


def browse(source: str, folder: Path) -> Seen:
    """Open a page in a headless browser: what it asked for, said and showed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Watcher)
    server.page, server.asked = source.encode(), []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update",
                "--enable-logging=stderr", "--timeout=5000", "--window-size=1000,1400",
                f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}",
                "--dump-dom", f"http://127.0.0.1:{server.server_port}/report.html",
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    return Seen(
        asked=server.asked,  # type: ignore[attr-defined]
        complaints=[line for line in done.stderr.splitlines() if "CONSOLE" in line],
        document=done.stdout,
        image=Image.open(folder / "page.png").convert("L"),
    )


@needs_browser
def test_a_browser_shows_it_without_a_request_or_a_complaint(
    new_search: NewSearch, png: bytes, tmp_path: Path
) -> None:
    source = search_page(
        record_of(_three_trials(new_search)),
        figures={"all_curves": png},
        evaluation=evaluation(["cat", *HOSTILE]),
        image_map=image_map(["cat", *HOSTILE], HOSTILE, sprite=_webp("red")),
        notes=HOSTILE,
    )
    seen = browse(source, tmp_path)
    assert seen.asked == ["/report.html"]
    assert seen.complaints == []
    assert np.asarray(seen.image).std() > 10
    # The same eyes see what this page must not do.
    policy = re.search(r"<meta http-equiv.*?>", source)
    assert policy is not None
    bad = "<script src=x.js></script><script>missing()</script></body>"
    seen = browse(source.replace(policy[0], "").replace("</body>", bad), tmp_path)
    assert "/x.js" in seen.asked
    assert any("missing is not defined" in line for line in seen.complaints)


@needs_browser
def test_a_click_on_a_heading_sorts_the_table(new_search: NewSearch, tmp_path: Path) -> None:
    source = search_page(record_of(_three_trials(new_search)), figures={})
    click = "[...document.querySelectorAll('th button')].find(b => b.textContent === 'Batch size')"
    source = re.sub(r"<meta http-equiv.*?>", "", source)
    source = source.replace("</body>", f"<script>{click}.click()</script></body>")
    page = Page(browse(source, tmp_path).document)
    sizes = [row[2] for row in page.rows if re.fullmatch(r"t\d{4}", row[0])]
    assert sizes == ["32", "64", "128"]  # as numbers, not as words
    assert ("th", {"class": "number", "aria-sort": "ascending"}) in page.tags


@needs_browser
def test_an_image_is_shown_under_the_pointer_and_others_can_be_faded(
    new_search: NewSearch, tmp_path: Path
) -> None:
    drawn = image_map(
        ["cat", "dog"], ["a.jpg", "b.jpg", "c.jpg"], sprite=_webp("red", "lime", "blue")
    )
    source = search_page(record_of(_three_trials(new_search)), figures={}, image_map=drawn)
    source = re.sub(r"<meta http-equiv.*?>", "", source)
    script = """
      addEventListener("load", () => {
        const svg = document.querySelector(".map > svg"), box = svg.getBoundingClientRect();
        const at = {clientX: box.left + box.width / 2 + 3, clientY: box.top + box.height / 2};
        svg.dispatchEvent(new PointerEvent("pointermove", at));
        const canvas = document.querySelector(".tip canvas").getContext("2d");
        document.body.dataset.pixel = canvas.getImageData(64, 64, 1, 1).data.join();
        const select = document.querySelector(".filter select[name=split]");
        select.value = "train";
        select.dispatchEvent(new Event("change", {bubbles: true}));
      });
    """
    source = source.replace("</body>", f"<script>{script}</script></body>")
    seen = browse(source, tmp_path)
    assert seen.complaints == []
    page = Page(seen.document)
    body = next(attrs for tag, attrs in page.tags if tag == "body")
    red, green, blue, _ = map(int, str(body["data-pixel"]).split(","))
    assert green > 200 > 60 > max(red, blue)  # the second of three
    assert "dog\nb.jpg" in page.text
    tip = next(attrs for tag, attrs in page.tags if attrs.get("class") == "tip")
    assert "hidden" not in tip
    faded = [str(attrs["class"]) for _, attrs in page.tags if "off" in str(attrs.get("class"))]
    assert faded == ["c1 off", "c0 off"]  # of validation and test


def _webp(*colours: str) -> bytes:
    """Images of 8 x 8 pixels, two in a row."""
    sheet = Image.new("RGB", (16, 8 * math.ceil(len(colours) / 2)))
    for place, colour in enumerate(colours):
        sheet.paste(colour, (place % 2 * 8, place // 2 * 8, place % 2 * 8 + 8, place // 2 * 8 + 8))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


MANY = {
    "learning_rate": 0.00312345, "batch_size": 128, "weight_decay": 0.000123, "dropout": 0.25,
    "label_smoothing": 0.05, "optimizer": "adamw", "epochs": 40,
    "backbone_learning_rate_factor": 0.123,
    "backbone": "timm:mobilenetv4_conv_medium.e500_r256_in12k",
}  # fmt: skip


def _widest_table(search: Any, media: str, width: int, folder: Path) -> int:
    """Pixels of the widest table of a search's page, laid out for a medium that is so wide."""
    source = re.sub(r"<meta http-equiv.*?>", "", search_page(record_of(search), figures={}))
    source = source.replace(f"@media {media} ", "@media all ")
    widest = "Math.max(...[...document.querySelectorAll('table')].map(t => t.offsetWidth))"
    script = f"document.body.style.width = '{width}px'; document.title = 'widest ' + {widest};"
    seen = browse(source.replace("</body>", f"<script>{script}</script></body>"), folder)
    found = re.search(r"<title>widest (\d+)</title>", seen.document)
    assert found is not None
    return int(found[1])


@needs_browser
@pytest.mark.parametrize(
    ("names", "media", "width"),
    [(("learning_rate", "batch_size"), "screen", 1184), (tuple(MANY), "print", 700)],
)
def test_the_tables_fit_a_window_of_1200_pixels_and_paper(
    new_search: NewSearch, tmp_path: Path, names: tuple[str, ...], media: str, width: int
) -> None:
    search = new_search()
    search.begin()
    for number, state in enumerate(("completed", "stopped_early"), 1):
        head = {"trial_id": f"t{number:04d}", "attempt": 1}
        search.append("trial_started", **head, configuration={n: MANY[n] for n in names})
        for rule in ("learning_rate_too_low", "overfit"):
            said = {"severity": "warning", "evidence": "It falls. " * 9, "advice": "Wait. " * 9}
            search.append("finding", **head, rule=rule, step=1, **said)
        search.end(number, state=state, reason="the rule learning_rate_too_low ended it")
    assert _widest_table(search, media, width, tmp_path) <= width


def _three_trials(new_search: NewSearch) -> Any:
    search = new_search()
    search.begin()
    for number in range(1, 4):
        search.trial(number)
    search.finish()
    return search
