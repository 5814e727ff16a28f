"""The commands that go over many photographs: when they do, what they print, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import undertow as ut
from sweep.photographs import NETS, classifier, crops
from undertow.cli import main
from undertow.cli.sweeps import is_many


def call(capfd, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    printed = capfd.readouterr()
    return left.value.code, printed.out, printed.err


@pytest.fixture
def net(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    return f"{tmp_path / 'nets.py'}:load"


def test_many_photographs_are_swept_and_the_same_command_draws_pictures(capfd, tmp_path, net):
    names = crops(tmp_path / "in", 13)
    (tmp_path / "in" / names[5]).write_bytes(b"no photograph")
    words = ("explain", tmp_path / "in", "--model", net, "--rule", "guided", "--out", tmp_path / "out")
    code, out, err = call(capfd, *words)
    assert code == 2
    assert f"error: {tmp_path / 'in' / names[5]} is not a photograph" in err
    assert "13 images with" in out
    assert "12 done, 1 failed, finished" in out
    assert "input: " in out
    small = classifier()
    alone = ut.explain(small, small.prepare(tmp_path / "in" / names[7]), rule="guided").numpy()[0]
    np.testing.assert_allclose(ut.Sweep(tmp_path / "out").map(names[7]), alone, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "out" / "pictures").exists()

    code, out, _ = call(capfd, *words, "--pictures", 1, "--json")
    assert (code, json.loads(out)["done"]) == (2, 12)
    assert (tmp_path / "out" / "pictures" / "000000-a_0000" / "panel.png").exists()
    code, _, err = call(capfd, *words, "--batch-size", "many")
    assert (code, "'many' is not a valid integer" in err) == (2, True)
    code, out, _ = call(capfd, *words, "--batch-size", "auto", "--json")
    assert (code, json.loads(out)["done"]) == (2, 12)
    code, _, err = call(capfd, *words, "--pictures", "few")
    assert (code, "'few' is not all, none or a number" in err) == (2, True)
    code, _, err = call(capfd, *words, "--target", "b")
    assert code == 2
    assert "is a sweep with settings target 'top:1', not [1]; choose another --out" in err


def test_words_that_name_many_photographs():
    assert all(map(is_many, ("a.txt", "a.TAR", "train-{00..09}.tar", "a.parquet:image")))
    assert not any(map(is_many, ("a.parquet", "a.png", "photographs", "a.txt/b.png")))


def test_twelve_photographs_have_a_folder_each_as_ever(capfd, tmp_path, net):
    crops(tmp_path / "in", 12)
    code, _, _ = call(capfd, "explain", tmp_path / "in", "--model", net, "--rule", "guided", "--out", tmp_path / "out")
    assert (code, len(list((tmp_path / "out").glob("*/panel.png")))) == (0, 12)


def test_status_and_check_know_a_sweep(capfd, tmp_path, net):
    crops(tmp_path / "in", 6)
    words = (
        "explain",
        tmp_path / "in",
        "--model",
        net,
        "--out",
        tmp_path / "out",
        "--engine",
        "local",
        "--shard-size",
        2,
    )
    assert call(capfd, *words)[0] == 0
    code, out, _ = call(capfd, "status", tmp_path / "out")
    assert (code, "6 done, finished" in out) == (0, True)
    assert call(capfd, "check", tmp_path / "out")[0] == 0
    file = tmp_path / "out" / "parts" / "000001" / "guided.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, out, _ = call(capfd, "check", tmp_path / "out")
    assert code == 2
    assert "1 part(s) damaged" in out
    assert "has changed since it was written" in out
    code, out, _ = call(capfd, "check", tmp_path / "out", "--repair", "--json")
    assert (code, list(json.loads(out)["faults"])) == (0, ["1"])
    code, out, _ = call(capfd, "status", tmp_path / "out")
    assert (code, "4 done, 2 missing" in out, "the same command goes on" in out) == (2, True, True)
    assert call(capfd, *words)[0] == 0
    assert call(capfd, "status", tmp_path / "out")[0] == 0


def test_a_recording_has_a_status_too(capfd, tmp_path, net):
    crops(tmp_path / "in", 5)
    words = ("record", tmp_path / "in", "--model", net, "--batch-size", 2)
    assert call(capfd, *words, "--out", tmp_path / "run")[0] == 0
    code, out, _ = call(capfd, "status", tmp_path / "run")
    assert (code, "3 batches recorded, finished" in out) == (0, True)
    code, out, _ = call(capfd, *words, "--out", tmp_path / "sweep", "--engine", "local", "--limit", 4)
    assert (code, "record of 4 images" in out) == (0, True)
    assert ut.Run(tmp_path / "sweep").table("batches").num_rows == 2
    code, _, err = call(capfd, *words, "--out", tmp_path / "run", "--shard-size", 3)
    assert (code, "--shard-size is of a sweep; add --engine" in err) == (2, True)
    code, _, err = call(capfd, "check", tmp_path / "run", "--repair")
    assert (code, "--repair is for the folder of a sweep" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_sweep_that_the_same_command_finishes(tmp_path, net, number, code):
    crops(tmp_path / "in", 200)
    words = [
        "explain",
        tmp_path / "in",
        "--model",
        net,
        "--batch-size",
        1,
        "--shard-size",
        5,
        "--rule",
        "guided",
        "--fast",
        "off",
    ]  # else what measures quicker at this moment decides the last bits
    command = [sys.executable, "-m", "undertow", *map(str, words), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    try:
        until = time.monotonic() + 120
        while len(list((tmp_path / "out" / "parts").glob("0*"))) < 2 and time.monotonic() < until:
            time.sleep(0.002)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code
    assert "what was finished is complete" in err
    half = ut.Sweep(tmp_path / "out")
    assert 2 <= len(half.done) < 40
    assert half.check().whole
    assert not list((tmp_path / "out" / "parts").glob(".*"))
    subprocess.run(command, check=True, capture_output=True)
    again = [sys.executable, "-m", "undertow", *map(str, words), "--out", str(tmp_path / "whole")]
    subprocess.run(again, check=True, capture_output=True)
    whole = ut.Sweep(tmp_path / "whole")
    assert half.digest() == whole.digest()
