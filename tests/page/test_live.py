"""`undertow view`: a real server, a real browser, and a run that is being written."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import undertow as ut


@contextmanager
def viewed(*words):
    process = subprocess.Popen(
        [sys.executable, "-m", "undertow", "view", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def recording_into(folder):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    return net, ut.record(folder, net, sites="conv", measures=["histogram"], diagnose=1, group=1)


def one_batch(net, recording, factor=1.0):
    with recording.batch():
        (factor * net(torch.ones(2, 1, 8, 8))).sum().backward()
    recording.flush()


def status_of(address, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_new_batches_and_findings_appear_without_a_reload_and_the_focus_stays(tmp_path, browser):
    net, opened = recording_into(tmp_path / "run")
    with opened as recording:
        one_batch(net, recording)
        with viewed(tmp_path / "run") as (_, address):
            page = browser.new_page()
            faults: list[str] = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda message: faults.append(message.text))
            page.goto(address)
            page.get_by_text("1 batch, not finished").wait_for()
            page.evaluate("window.same = true")
            layer = page.locator("label:has-text('Layer') select")
            layer.select_option("2")
            layer.focus()
            one_batch(net, recording, factor=float("nan"))
            page.get_by_text("2 batches, not finished").wait_for()
            page.locator("article.finding.error").first.wait_for()
            assert page.evaluate("window.same"), "the page was loaded anew"
            assert layer.input_value() == "2"
            assert page.evaluate("document.activeElement.tagName") == "SELECT"
            recording.__exit__(None, None, None)
            page.get_by_text("2 batches, finished").wait_for()
            assert faults == []
            page.close()


def test_without_the_token_and_under_another_name_nothing_is_served(tmp_path):
    net, opened = recording_into(tmp_path / "run")
    with opened as recording:
        one_batch(net, recording)
    with viewed(tmp_path / "run") as (_, address):
        base = address.rsplit("/", 2)[0]
        assert address.startswith("http://127.0.0.1:")
        assert status_of(address) == status_of(f"{address}data") == 200
        assert status_of(f"{address}data?seen=other") == 200
        assert [status_of(base + path) for path in ("/", "/data", "/x/data", "/../etc/passwd")] == [404] * 4
        assert status_of(f"{address}../../manifest.json") == 404
        assert status_of(address, Host="evil.example") == 404


def test_it_ends_by_ctrl_c_and_says_what_is_wrong(tmp_path):
    net, opened = recording_into(tmp_path / "run")
    with opened as recording:
        one_batch(net, recording)
    with viewed(tmp_path / "run") as (process, address):
        port = address.split(":")[2].split("/")[0]
        taken = subprocess.run(
            [sys.executable, "-m", "undertow", "view", str(tmp_path / "run"), "--port", port],
            capture_output=True,
            text=True,
        )
        assert (taken.returncode, f"error: port {port} cannot be used" in taken.stderr) == (2, True)
        os.unlink(tmp_path / "run" / "manifest.json")
        assert status_of(f"{address}data?seen=x") == 503
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.parametrize("word", ["nowhere", "empty"])
def test_what_is_no_run_is_one_line(tmp_path, word):
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "undertow", "view", str(tmp_path / word)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert word in done.stderr
