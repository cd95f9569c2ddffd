"""The report in a real browser: no error, every chart drawn, and what can be clicked does what it says."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess

import pytest

from pretrain.metrics import Metrics
from pretrain.report_page import page
from pretrain.run_logs import RunLogs
from tests.runs import PATIENCE_S

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --enable-logging=stderr --window-size=1400,1000 --virtual-time-budget=3000
--dump-dom"""
NASTY = "</script><img src=x onerror='document.body.dataset.pwned = 1'>"
# What a reader does, after the page's own script; the last line of it is what the test reads.
READER = """
<script>
const all = (selector) => [...document.querySelectorAll(selector)];
const click = (selector, text) => all(selector).find((each) => each.textContent === text).click();
const loss = () => document.querySelector("#chart-loss path.line").getAttribute("d");
const shapes = (each) => each.querySelectorAll("path, rect").length;
const seen = { drawn: all(".chart[id]").map((each) => [each.id, each.dataset.drawn, shapes(each)]) };
seen.loss = [loss()];
click("#chart-loss button", "log"); seen.loss.push(loss());
click("#chart-loss button", "linear"); seen.loss.push(loss());
click("#axis button", "hours"); seen.loss.push(loss());
click("#axis button", "tokens"); seen.loss.push(loss());
const svg = document.querySelector("#chart-loss svg"), bounds = svg.getBoundingClientRect();
const middle = { clientX: bounds.left + bounds.width / 2, clientY: bounds.top + 50 };
svg.dispatchEvent(new PointerEvent("pointermove", middle));
seen.tip = document.querySelector("#chart-loss .tip").textContent;
seen.crossed = document.querySelectorAll(".cross[visibility=visible]").length;
seen.restarts = document.querySelectorAll("#chart-loss .restart").length;
document.querySelector("#legend button")?.click();
seen.lines = document.querySelectorAll("#chart-loss path.line").length;
document.getElementById("theme").click();
seen.theme = document.documentElement.dataset.theme;
seen.error = document.body.dataset.error || "";
seen.pwned = document.body.dataset.pwned || "";
seen.overflow = document.documentElement.scrollWidth > document.documentElement.clientWidth;
const told = Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) });
document.body.append(told);
</script>
"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium (Debian: apt-get install chromium)")


def write_run(folder, name, n_steps, first_step=0, **more):
    with Metrics(
        folder, [], first_step=first_step, total_steps=n_steps, clock=lambda: 1000.0 + 2 * first_step
    ) as metrics:
        for step in range(first_step + 1, n_steps + 1):
            fields = {
                "tokens": 100 * step,
                "loss": 3 + 7 * math.exp(-step / 40),
                "lr": 1e-3,
                "grad_norm": 1.0,
                "mfu": 0.4,
            }
            fields |= {"loss_scale": 65536.0, "tokens_per_second": 1000.0, "step_ms": 9.0, "data_wait_ms": 1.0} | more
            fields |= {"time": 1000.0 + 2 * step} | ({"val_loss": 4.0} if step % 20 == 0 else {})
            metrics.record({"step": step, **fields})
        metrics.record({"step": n_steps, "loss": "NaN" if first_step else 5.0, "time": 1000.0 + 2 * n_steps})
        metrics.event("checkpoint_saved", step=n_steps, name=f"checkpoint-{NASTY}", bytes=5)
        metrics.event("checkpoint_committed", step=n_steps, name=f"checkpoint-{NASTY}", bytes=5)
        metrics.event("upload_failed", step=n_steps, name="x", problem=NASTY)
        metrics.event("sample", step=n_steps, prompt="def ", text=NASTY)
        metrics.ended(stopped=not first_step)
    run = RunLogs(name, folder)
    run.refresh()
    return run


def everything(folder):
    """A run of which all is known, over two starts."""
    phases = {f"{name}_ms": 2.0 for name in ("forward", "backward", "optimizer", "checkpoint", "eval")}
    figures = {"mfu_causal": 0.38, "power_w": 600.0, "gpu_utilization": 97.0, "energy_j_per_token": 0.01}
    figures |= {"gpu_memory_gb": 60.0, "gpu_memory_peak_gb": 58.0, "host_memory_gb": 9.0}
    write_run(folder, "all", 60, **phases, **figures)
    rows = ["time,step,phase,gpu,power_w,utilization,temperature_c,sm_clock_mhz,memory_clock_mhz,throttle"]
    rows += [f"{1000 + tick / 10},{tick},{('data_wait', 'forward')[tick // 9 % 2]},{gpu},600,97,55,1980,2619,none"
             for tick in range(400) for gpu in (0, 1)]  # fmt: skip
    (folder / "power.csv").write_text("\n".join(rows) + "\n")
    ledger = {"tokens": 6000, "hours": 1.0, "hours_by_cause": {"training": 0.9, "lost": 0.1}}
    (folder / "summary.json").write_text(json.dumps({"steps": 120, "finished": True, "ledger": ledger}))
    return write_run(folder, "all", 120, first_step=50, **phases, **figures)


def browse(path):
    command = [BROWSER, *OPTIONS.split(), f"--user-data-dir={path.parent / 'profile'}", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def read(path, runs):
    """What the reader saw on the page of these runs, and the browser's complaints."""
    path.write_text(page(runs, 5000.0).replace("</body>", f"{READER}</body>"), encoding="utf-8")
    done = browse(path)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


EVERY_CHART = """loss lr grad_norm loss_scale throughput mfu step_ms data_wait memory power utilization energy phases-0
power_w-devices-0 utilization-devices-0 temperature_c-devices-0 close-up-0 timeline-0"""


def test_one_run_of_which_all_is_known(tmp_path):
    seen, complaints = read(tmp_path / "one.html", [everything(tmp_path / "all")])
    assert (complaints, seen["error"], seen["pwned"], seen["overflow"]) == ([], "", "", False)
    assert [chart[0].removeprefix("chart-") for chart in seen["drawn"]] == EVERY_CHART.split()
    assert all(drawn == "true" and shapes >= 2 for _, drawn, shapes in seen["drawn"])
    linear, logarithmic, back, hours, tokens = seen["loss"]
    assert linear == back == tokens and len({linear, logarithmic, hours}) == 3 and linear.startswith("M")
    assert "tokens" in seen["tip"] and "training" in seen["tip"] and "smoothed" in seen["tip"]
    assert seen["crossed"] > 10 and seen["restarts"] == 1 and seen["theme"] in ("light", "dark")


def test_two_runs_are_overlaid_and_one_can_be_hidden(tmp_path):
    runs = [write_run(tmp_path / "b", f"b{NASTY}", 30), everything(tmp_path / "all")]
    seen, complaints = read(tmp_path / "two.html", runs)
    assert (complaints, seen["error"], seen["pwned"], seen["overflow"]) == ([], "", "", False)
    drawn = [chart[0].removeprefix("chart-") for chart in seen["drawn"]]
    assert {"loss", "phases-0", "phases-1", "timeline-0", "timeline-1", "close-up-1"} <= set(drawn)
    assert all(drawn == "true" for _, drawn, _ in seen["drawn"])
    assert seen["lines"] == 3  # of the other run: the losses, their smoothed course, the validations


def test_a_run_without_a_step(tmp_path):
    run = RunLogs("none", tmp_path / "none")
    run.refresh()
    path = tmp_path / "none.html"
    path.write_text(page([run], 5000.0), encoding="utf-8")
    done = browse(path)
    assert "CONSOLE" not in done.stderr and 'data-charts="0"' in done.stdout
