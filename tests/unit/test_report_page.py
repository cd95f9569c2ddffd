from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from pretrain import report_page
from pretrain.metrics import Metrics
from pretrain.report_page import ReportSink, embedded, page, write_report
from pretrain.run_logs import RunLogs

NASTY = "</script><script>document.body.dataset.pwned = 1</script><img src=x onerror=alert(1)>&\u2028]]>'\""
LEDGER = {
    "tokens": 4096,
    "hours": 2.0,
    "hours_by_cause": {"training": 1.5, "data_wait": 0.1, "lost": 0.4},
    "restarts": 1,
    "lost_steps": 7,
    "energy_kwh": None,
}


def write_run(folder, name="run", lr=0.1, **more):
    with Metrics(folder, [], total_steps=3, clock=lambda: 1000.0) as metrics:
        for step in (1, 2, 3):
            metrics.record({"step": step, "tokens": 10 * step, "loss": 5.0 / step, "lr": lr, "step_ms": 5.0, **more})
        metrics.event("sample", step=3, prompt=f"a{NASTY}", text=f"def {NASTY}\n\tx \x1b[31m{'y' * 3000}")
        metrics.summary({"steps": 3, "finished": True, "ledger": LEDGER, "logs": f"x{NASTY}", "about": {"a": 1}})
        metrics.ended(stopped=False)
    (folder / "config.yaml").write_text(
        f"run: {{name: {name}}}\noptim: {{lr: {lr}}}\ndata: {{source: {json.dumps(NASTY)}}}\n"
    )
    (folder / "training.log").write_text(f"2026-01-02 03:04:05,678 WARNING pretrain.x  {NASTY}\n")
    run = RunLogs(name, folder)
    run.refresh()
    return run


class Parts(HTMLParser):
    """The elements of a page, its texts, and what its scripts hold."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.scripts = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        (self.scripts if self.tags[-1:] == ["script"] else self.texts).append(data)

    def handle_endtag(self, tag):
        if tag == "script":
            self.tags.append("/script")


def test_whatever_a_run_says_is_text_and_never_markup(tmp_path):
    run = write_run(tmp_path, name=f"r{NASTY}")
    parts = Parts(page([run], 1100.0))
    assert parts.tags.count("script") == 2 and "img" not in parts.tags
    assert not [each for each in parts.attributes if each[1].startswith("on")]
    assert "document.body.dataset.pwned" in "".join(parts.texts)  # shown, not run
    data = json.loads(parts.scripts[0])
    assert data["runs"][0]["name"] == f"r{NASTY}"
    assert "\x1b" not in "".join(parts.texts)


def test_runs_of_one_name_from_two_places_are_both_in_the_ledger(tmp_path):
    runs = [write_run(tmp_path / place) for place in ("here", "there")]
    runs[1].summary["ledger"] = {**LEDGER, "tokens": 8192}
    texts = Parts(page(runs, 1100.0)).texts
    begin = texts.index("Ledger over all restarts")
    at = texts.index("tokens", begin)
    assert texts[at : at + 3] == ["tokens", "4,096", "8,192"]
    assert texts[begin:at].count("run") == 4  # over its bar, and over its column


def test_json_inside_a_script_element_cant_end_it():
    text = embedded({"a": NASTY, "b": "<!--"})
    assert not re.search(r"[<>&\u2028]", text) and json.loads(text) == {"a": NASTY, "b": "<!--"}
    with pytest.raises(ValueError, match="JSON"):
        embedded({"a": float("nan")})


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text = page([write_run(tmp_path)], 1100.0)
    parts = Parts(text)
    assert not [each for each in parts.attributes if each[1] in ("src", "href", "srcset", "action")]
    assert "default-src 'none'" in text and "@import" not in text and "url(http" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text.replace(NASTY, ""))) <= {"http://www.w3.org/2000/svg"}


def test_it_tells_the_state_the_ledger_the_settings_the_samples_and_the_summary(tmp_path):
    text = " ".join(Parts(page([write_run(tmp_path)], 1100.0)).texts)
    for word in (
        "done",
        "1.6667",
        "steps lost to restarts",
        "training 1:30:00 (75.0%)",
        "optim.lr",
        "about.a",
        "step 3",
    ):
        assert word in text, word
    assert "energy, kWh" not in text  # not known: no row
    assert "y" * 1800 in text and "y" * 2001 not in text


def test_of_several_runs_only_the_settings_that_differ_are_shown(tmp_path):
    runs = [write_run(tmp_path / "a", "a", 0.1), write_run(tmp_path / "b", "b", 0.2)]
    text = page(runs, 1100.0)
    table = text[text.index("Settings that differ") :]
    assert "optim.lr" in table and "0.2" in table and "data.source" not in table
    runs[1].config_text = ""
    assert "no config.yaml is known of b" in page(runs, 1100.0)
    runs[1].config_text = "- 1\n: :"
    assert "is no YAML" in page(runs, 1100.0)


def test_a_run_of_nothing_has_a_page(tmp_path):
    run = RunLogs("none", tmp_path)
    run.refresh()
    text = page([run], 1100.0)
    assert "nothing is recorded yet" in text and "Samples" not in text


def test_the_page_is_made_when_a_run_ends_however_it_ends(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError), Metrics(tmp_path, [ReportSink(tmp_path)]) as metrics:
        metrics.record({"step": 1, "loss": 2.0})
        raise RuntimeError("the cat sat on the power switch")
    assert "the cat sat on the power switch" in (tmp_path / "report.html").read_text()
    warnings = []
    monkeypatch.setattr(report_page.logger, "warning", lambda form, *words: warnings.append(form % words))
    monkeypatch.setattr(report_page, "page", lambda *_: 1 / 0)
    with Metrics(tmp_path, [ReportSink(tmp_path)]):
        pass
    assert len(warnings) == 1 and "division by zero" in warnings[0]


def test_a_page_is_whole_or_not_there(tmp_path):
    run = write_run(tmp_path / "run")
    size = write_report([run], tmp_path / "new" / "x.html", 1100.0)
    assert (tmp_path / "new" / "x.html").stat().st_size == size
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.html"]
