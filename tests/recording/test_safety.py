"""A recording knows its folder and its process: links, locks, forks, signals, and files that vanish meanwhile."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

from runs.damaging import network, small_run
from undertow.errors import RunError
from undertow.files import clear_asides, published
from undertow.recording import record
from undertow.runs import Run
from undertow.signals import Terminated, interrupts, unwound_by_sigterm

pytestmark = pytest.mark.xdist_group("safety")  # the tests of a process of their own share one


def step(model):
    model(torch.ones(2, 1, 4, 4)).sum().backward()


def alone(test):
    """Run a test in a process of one thread: a child of one with more of OpenMP's may wait for them for ever."""

    @functools.wraps(test)
    def runs_alone(*args, **kwargs):
        if "ALONE" in os.environ:
            test(*args, **kwargs)
            return
        said = all_alone()
        assert re.search(rf"^PASSED .*::{test.__name__}$", said, re.M), said[-3000:]

    ALONE.append(test.__name__)
    return runs_alone


ALONE: list[str] = []


@functools.cache
def all_alone() -> str:
    """Run all such tests in one process, whose start takes longer than they do; return what it says."""
    tests = [f"{__file__}::{name}" for name in ALONE]
    words = [sys.executable, "-m", "pytest", "-q", "-rA", *tests]
    environment = {**os.environ, "ALONE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout


def in_child(work, seconds=60):
    """Fork, work, and return the exit code; 99 for an error that is none of ours, -1 for a hang."""
    with warnings.catch_warnings(action="ignore"):  # Python dislikes forks beside threads; so do we
        child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work() or 0
        except RunError:
            code = 2
        except SystemExit as left:
            code = left.code
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@alone
def test_a_forked_child_is_refused_and_ends_nothing(tmp_path):
    model = network()
    with record(tmp_path, model, sites="conv", group=1) as recording:
        with recording.batch():
            step(model)
        recording.flush()

        def inside_a_batch():
            with recording.batch():
                step(model)

        uses = [recording.flush, inside_a_batch, lambda: recording.__exit__(None, None, None)]
        assert [in_child(use) for use in uses] == [2, 2, 2]
        assert not Run(tmp_path).finished
        with recording.batch():
            assert in_child(lambda: step(model)) == 0  # to compute is no use of the recording
            step(model)
        with pytest.raises(RunError, match="at this moment"):
            small_run(tmp_path)
    assert Run(tmp_path).finished
    assert Run(tmp_path).table("batches").num_rows == 2


@alone
def test_a_child_that_leaves_a_batch_is_refused(tmp_path):
    model = network()
    with record(tmp_path, model, sites="conv", group=1) as recording:
        with recording.batch():
            step(model)

        own = record(tmp_path / "own", model, sites="conv")
        assert in_child(lambda: own.__enter__() and 0) == 0  # a child may open one of its own
        before = recording.batches
        batch = recording.batch()
        batch.__enter__()
        step(model)
        assert in_child(lambda: batch.__exit__(None, None, None)) == 2
        batch.__exit__(None, None, None)
        assert recording.batches == before + 1


@alone
def test_an_error_of_the_childs_own_is_not_hidden(tmp_path):
    model = network()
    with record(tmp_path, model, sites="conv") as recording:
        with recording.batch():
            step(model)

        def fail():
            error = ValueError("mine")
            recording.__exit__(ValueError, error, None)
            return 7 if "belongs to process" in error.__notes__[0] else 8

        assert in_child(fail) == 7


@alone
def test_sigterm_leaves_a_run_that_can_be_gone_on_with(tmp_path):
    model = network()

    def train():
        with record(tmp_path, model, sites="conv", group=100) as recording:
            for number in range(1000):
                with recording.batch(batch=number):
                    step(model)
                if number == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(5)

    assert in_child(train) == 143
    run = Run(tmp_path)
    assert not run.finished
    assert run.table("batches").num_rows == 6
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with record(tmp_path, model, sites="conv", group=100) as recording, recording.batch(batch=6):
        step(model)
    assert Run(tmp_path).table("batches").num_rows == 7


def struck_by(number):
    os.kill(os.getpid(), number)
    time.sleep(1)


@alone
def test_signals_of_others_are_left_alone():
    def mine(number, frame):
        came.append(number)

    came = []
    signal.signal(signal.SIGTERM, mine)
    try:
        with unwound_by_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(Terminated) as caught, unwound_by_sigterm():
        struck_by(signal.SIGTERM)
    assert caught.value.code == 143
    with unwound_by_sigterm():
        assert in_child(lambda: struck_by(signal.SIGTERM)) == -signal.SIGTERM


def test_ctrl_c_is_told_from_an_interrupt_of_the_code():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), interrupts() as came:
            raise KeyboardInterrupt
        assert came == []
        with pytest.raises(KeyboardInterrupt), interrupts() as came:
            struck_by(signal.SIGINT)
        assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", [".lock-000", "batches", "channel_norm", "tensors", "checksums", "manifest.json"])
def test_a_link_leads_nowhere(tmp_path, name):
    """What lies outside the run's folder stays as it is, byte by byte."""
    outside, run = tmp_path / "outside", small_run(tmp_path / "run", end=False, measures=["channel-norm", "keep"])
    outside.mkdir()
    if name in ("manifest.json", ".lock-000"):
        (outside / "it").write_text("not to be lost")
        (run / name).unlink()
        (run / name).symlink_to(outside / "it")
    else:
        for file in ("part-000-000007.parquet", "part-000-000007.sha256", ".undertow-1-a.safetensors"):
            (outside / file).write_text("not to be lost")
        shutil.rmtree(run / name)
        (run / name).symlink_to(outside)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    with pytest.raises(RunError):
        small_run(run, measures=["channel-norm", "keep"])
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_no_lock_is_left_in_a_folder_that_was_refused(tmp_path):
    small_run(tmp_path / "done")
    (tmp_path / "done" / ".lock-000").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for folder in ("done", "other"):
        with pytest.raises(RunError):
            small_run(tmp_path / folder)
        assert not list((tmp_path / folder).glob(".lock*")), folder
    small_run(tmp_path / "done2")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match=r"cannot record into .*run"):
        small_run(tmp_path / "run")


@pytest.mark.parametrize("lost", ["channel_norm", "batches", "samples", "checksums", "tensors", "."])
def test_a_run_whose_tables_vanish_is_not_finished(tmp_path, lost):
    model, folder = network(), tmp_path / "run"

    def train():
        with record(folder, model, sites="conv", measures=["channel-norm", "keep"], group=1) as recording:
            for _ in range(2):
                with recording.batch():
                    step(model)
                recording.flush()
                shutil.rmtree(folder / lost, ignore_errors=True)

    with pytest.raises(RunError, match=r"vanished while it was written|is no run"):
        train()
    assert not (folder / "manifest.json").exists() or not Run(folder).finished


@alone
def test_what_a_killed_process_left_half_written_is_cleared(tmp_path):
    def killed():
        with published(tmp_path / "a.png"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with published(tmp_path / "b.png") as aside:
        clear_asides(tmp_path)
        assert list(tmp_path.iterdir()) == [aside]
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def test_the_umask_is_kept_and_never_touched(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.delattr(os, "umask")
            with published(tmp_path / "a"):
                pass
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_another_thread_may_end_a_recording(tmp_path):
    model, errors = network(), []
    recording = record(tmp_path, model, sites="conv").__enter__()
    with recording.batch():
        step(model)

    def end():
        try:
            recording.__exit__(None, None, None)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert errors == []
    assert Run(tmp_path).finished
