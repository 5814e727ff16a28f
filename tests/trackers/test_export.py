"""What goes to a tracker is what was recorded, cell by cell, and each tracker's own reader finds it there, once."""

import csv
import json
import struct
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import undertow as ut
from page.making import command, write_nets
from sweep.photographs import classifier, crops
from undertow.measures import Histogram
from undertow.trackers.entries import CodeCounts

MEASURES = ["norm", "channel-norm", "zero-fraction", "moments", "histogram", "keep"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3))


def record(folder, stop=99, **options):
    """Two epochs of three batches, which stop before one of the second's."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    options = {"sites": "conv, params", "measures": MEASURES, "optimizer": optimizer, "diagnose": 2, **options}
    with ut.record(folder, net, group=2, **options) as recording:
        for epoch in range(2):
            for batch in range(3):
                if (epoch, batch) == (1, stop):
                    raise KeyboardInterrupt
                draw = torch.Generator().manual_seed(10 * epoch + batch)
                with recording.batch(epoch=epoch):
                    x = torch.randn(4, 1, 8, 8, generator=draw)
                    nn.functional.cross_entropy(net(x), torch.arange(4) % 3).backward()
                optimizer.step()
                optimizer.zero_grad()
    return ut.Run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("recorded") / "a")


def step_of(row):
    return 3 * row["epoch"] + row["batch"]


def expected(run):
    """Scalars by (tag, step), from the tables and the kept tensors themselves."""
    scalars = {}
    for row in run.table("norm").to_pylist():
        scalars[f"norm/{row['phase']}/{row['site']}", step_of(row)] = row["norm"]
    for row in run.table("zero_fraction").to_pylist():
        scalars[f"zero_fraction/{row['phase']}/{row['site']}", step_of(row)] = row["zeros"] / row["total"]
    for row, values in run.tensors():
        name, flat = f"{row['phase']}/{row['site']}", values.astype(np.float64).ravel()
        scalars[f"mean/{name}", step_of(row)], scalars[f"std/{name}", step_of(row)] = flat.mean(), flat.std()
        scalars[f"max/{name}", step_of(row)] = flat.max()
        middle = np.quantile(np.abs(flat), 0.9, method="inverted_cdf")
        scalars[f"magnitude/{name}/p90", step_of(row)] = pytest.approx(middle, rel=2.0**-8, abs=1e-30)
        scalars[f"nonfinite/{name}", step_of(row)] = 0
    return scalars


def assert_scalars(found, run):
    wanted = expected(run)
    assert len(wanted) > 200
    for (tag, step), value in wanted.items():
        assert found[tag, step] == (value if hasattr(value, "rel") else pytest.approx(value, rel=1e-5, abs=1e-7)), tag


def assert_counted(edges, counts, values):
    """Hold buckets to the values themselves: (lower, upper] below zero, [lower, upper) above; -0.0 lies below."""
    values = values.astype(np.float64).ravel()
    negative = np.signbit(values)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        inside = (values > low) & (values < high)
        inside |= (negative & (values == high) & (high <= 0)) | (~negative & (values == low) & (low >= 0))
        assert inside.sum() - (negative & (values == low) & inside).sum() == count, (low, high)
    assert sum(counts) == len(values)


def test_buckets_are_the_cells_that_were_counted():
    draw = np.random.default_rng(0)
    parts = [
        draw.normal(size=500) * 10.0 ** draw.integers(-40, 38, 500),
        [0.0, -0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-45],
    ]
    values = np.concatenate(parts).astype(np.float32)
    state = Histogram().reduce(values[None])
    histogram = CodeCounts("", 0, state["codes"], state["counts"])
    edges, counts = histogram.buckets()
    assert (np.diff(edges) > 0).all()
    assert_counted(edges, counts, values)
    for at_most in (512, 64, 5, 2):
        fewer, sums = histogram.buckets(at_most)
        assert len(sums) <= at_most
        assert sums.sum() == len(values)
        below = [counts[: np.searchsorted(edges, edge)].sum() for edge in fewer]
        assert np.array_equal(np.diff(below), sums)


def accumulator(folder, **sizes):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = dict.fromkeys(("scalars", "histograms", "images", "tensors", "compressedHistograms"), 0)
    return EventAccumulator(str(folder), size_guidance=everything | sizes).Reload()


def scalars_of(events):
    found = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert (tag, event.step) not in found
            found[tag, event.step] = event.value
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_was_sent(run, tmp_path):
    sent = ut.export(run, "tensorboard", tmp_path / "tb")
    assert sent.portions == 3 + len(ut.diagnose(run))
    events = accumulator(tmp_path / "tb")
    assert_scalars(scalars_of(events), run)
    kept = {(f"histogram/{row['phase']}/{row['site']}", step_of(row)): values for row, values in run.tensors()}
    for tag in events.Tags()["histograms"]:
        for event in events.Histograms(tag):
            proto = event.histogram_value
            values = kept.pop((tag, event.step))
            assert proto.bucket[0] == 0
            assert_counted(proto.bucket_limit, proto.bucket[1:], values)
            assert proto.num == values.size
            assert proto.sum == pytest.approx(values.sum(), abs=2.0**-8 * float(np.abs(values).sum()))
    assert not kept
    texts = {t for t in events.Tags()["tensors"] if t.startswith("findings/")}
    assert texts == {f"findings/{finding.cause}/text_summary" for finding in ut.diagnose(run)}
    [event] = events.Tensors("findings/pooling/text_summary")
    assert b"max_pool2d of 2 x 2" in event.tensor_proto.string_val[0]


def test_each_thing_is_sent_once_and_an_unfinished_run_goes_on(tmp_path, run):
    folder, out = tmp_path / "a", tmp_path / "tb"
    with pytest.raises(KeyboardInterrupt):
        record(folder, stop=1)
    first = ut.export(folder, "tensorboard", out)
    again = ut.export(folder, "tensorboard", out)
    assert (again.portions, again.before) == (0, first.portions)
    record(folder)
    last = ut.export(folder, "tensorboard", out)
    assert last.before == first.portions
    assert last.portions >= 1
    assert_scalars(scalars_of(accumulator(out)), run)


def test_every_takes_some_batches(run, tmp_path):
    ut.export(run, "tensorboard", tmp_path / "tb", every=2)
    found = scalars_of(accumulator(tmp_path / "tb"))
    assert {step for _, step in found} == {0, 2, 3, 5}


def records_of(path):
    """Read a .wandb file: blocks of 32 KiB behind a header of 7 bytes, as LevelDB's log has them."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            record = Record()
            try:
                record.ParseFromString(whole)
            except DecodeError:  # half written
                return
            yield record
            whole = b""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline_holds_what_was_sent(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ut.export(run, "wandb", tmp_path / "w")
    [path] = (tmp_path / "w").glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 120  # its service may still be writing
    while not any(one.HasField("exit") for one in records_of(path)) and time.monotonic() < until:
        time.sleep(0.1)
    found, histograms, texts = {}, {}, set()
    for record_ in records_of(path):
        items = {}
        for item in record_.history.item:
            key, *part = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            items[key] = {**items.get(key, {}), part[0]: value} if part else value
        step = items.pop("undertow/step", None)
        for tag, value in items.items():
            name = tag.removeprefix("undertow/")
            if isinstance(value, dict) and value["_type"] == "histogram":
                histograms[name, step] = value
            elif isinstance(value, dict):
                texts.add(name)
            elif name != tag:
                found[name, step] = value
    assert_scalars(found, run)
    for row, values in run.tensors():
        histogram = histograms[f"histogram/{row['phase']}/{row['site']}", step_of(row)]
        assert len(histogram["values"]) <= 512
        assert_counted(histogram["bins"], histogram["values"], values)
    assert "findings/pooling" in texts
    assert ut.export(run, "wandb", tmp_path / "w").entries == 0


@pytest.mark.filterwarnings("ignore")
def test_a_local_mlflow_holds_what_was_sent(run, tmp_path):
    from mlflow.tracking import MlflowClient

    ut.export(run, "mlflow", tmp_path / "m")
    assert ut.export(run, "mlflow", tmp_path / "m").entries == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/m/mlflow.db")
    [one] = client.search_runs([client.get_experiment_by_name("undertow").experiment_id])
    assert (one.info.status, one.info.run_name) == ("FINISHED", "a")
    found = {
        (tag, metric.step): metric.value
        for tag in one.data.metrics
        for metric in client.get_metric_history(one.info.run_id, tag)
    }
    assert_scalars(found, run)
    file = client.download_artifacts(one.info.run_id, "histogram/backward/0/00000004.npz", str(tmp_path))
    with np.load(file) as arrays:
        assert_counted(arrays["edges"], arrays["counts"], run.tensor(epoch=1, batch=1, site="0", phase="backward"))
    assert {item.path for item in client.list_artifacts(one.info.run_id, "findings")} >= {"findings/pooling.md"}


def test_files_hold_what_was_sent_and_are_written_whole(run, tmp_path):
    for _ in range(2):
        ut.export(run, "csv", tmp_path / "c")
        ut.export(run, "npz", tmp_path / "n")
    with open(tmp_path / "c" / "scalars.csv") as file:
        rows = list(csv.DictReader(file))
    found = {(row["tag"], int(row["step"])): float(row["value"]) for row in rows}
    assert len(found) == len(rows)
    assert_scalars(found, run)
    with np.load(tmp_path / "n" / "undertow.npz") as arrays:
        tags = [name.removesuffix(":values") for name in arrays if name.endswith(":values")]
        found = {
            (tag, int(step)): value
            for tag in tags
            for step, value in zip(arrays[f"{tag}:steps"], arrays[f"{tag}:values"], strict=True)
        }
        assert_scalars(found, run)
        codes, counts, starts = (arrays[f"histogram/backward/0:{name}"] for name in ("codes", "counts", "starts"))
        assert arrays["findings/pooling:texts"].shape == (1,)
    state = Histogram().reduce(run.tensor(epoch=0, batch=1, site="0", phase="backward"))
    assert np.array_equal(codes[starts[1] : starts[2]], state["codes"])
    assert np.array_equal(counts[starts[1] : starts[2]], state["counts"])


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    photograph = folder / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(photograph)
    out = folder / "out"
    command("explain", photograph, "--model", write_nets(folder, ["cat", "dog"]), "--rule", "guided", "--out", out)
    return out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_maps_go_as_images(explained, tmp_path):
    ut.export(explained, "tensorboard", tmp_path / "tb")
    events = accumulator(tmp_path / "tb")
    [tag] = events.Tags()["images"]
    assert tag.startswith("maps/one.png/guided/")
    [event] = events.Images(tag)
    assert (event.width, event.height) == (40, 40)
    ut.export(explained, "npz", tmp_path / "npz")
    with np.load(tmp_path / "npz" / "undertow.npz") as arrays:
        [values] = arrays[f"{tag}:values"]
    (tmp_path / "image.png").write_bytes(event.encoded_image_string)
    drawn = np.asarray(ut.show.draw(values).convert("RGB"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), drawn)
    with pytest.raises(ut.InputError, match="maps are no table; send them to npz"):
        ut.export(explained, "csv", tmp_path / "csv")


def test_maps_of_a_sweep(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    crops(folder, 5)
    sweep = ut.sweep.explain(folder, classifier(), tmp_path / "maps", rule="guided", device="cpu")
    assert ut.export(tmp_path / "maps", "npz", tmp_path / "npz").portions == 5
    with np.load(tmp_path / "npz" / "undertow.npz") as arrays:
        maps = {name[5:].rsplit("/", 2)[0]: arrays[name][0] for name in arrays if name.endswith(":values")}
    for name in sweep.names:
        assert np.array_equal(maps[name], sweep.map(name))


def test_what_is_in_the_way_is_refused_in_a_line(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("")
    for place in ("mine", "file"):
        with pytest.raises(ut.RunError, match=f"{place} is there already, and no export made it; choose another"):
            ut.export(run, "csv", tmp_path / place)
    ut.export(run, "csv", tmp_path / "c")
    with pytest.raises(ut.RunError, match="holds an export of something else"):
        ut.export(run, "npz", tmp_path / "c")
    with pytest.raises(ut.RunError, match="holds an export of something else"):
        ut.export(record(tmp_path / "b"), "csv", tmp_path / "c")
    with pytest.raises(ut.InputError, match=r"'tensorbord' is no tracker.*did you mean tensorboard"):
        ut.export(run, "tensorbord")
    with pytest.raises(ut.InputError, match="is no run, no sweep, and holds nothing that was explained"):
        ut.export(tmp_path / "mine", "npz", tmp_path / "n")
    for name in [name for name in sys.modules if name.startswith("tensorboard.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as Python has what cannot be imported
    with pytest.raises(ut.FrameworkError, match="pip install tensorboard"):
        ut.export(run, "tensorboard", tmp_path / "tb")


def test_the_command(run, tmp_path, capsys):
    from undertow.cli import main

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return ended.value.code, capsys.readouterr()

    out = tmp_path / "tables"
    code, said = call("export", run.folder, "--to", "csv", "--out", out, "--json")
    assert code == 0
    assert json.loads(said.out)["entries"] > 200
    code, said = call("export", run.folder, "--to", "csv", "--out", out)
    assert said.out.splitlines()[-1].endswith(f"entries of {3 + len(ut.diagnose(run))} parts to {out}")
    code, said = call("export", run.folder, "--to", "npz", "--out", out)
    assert (code, said.err.splitlines()[-1].partition(" ")[0], said.out) == (2, "error:", "")
    code, said = call("export", tmp_path / "nowhere", "--to", "npz")
    assert (code, "no folder" in said.err) == (2, True)
    code, said = call("export", "--help")
    assert "Examples:" in said.out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_recording_goes_to_tensorboard_while_it_is_written(tmp_path, run):
    net, out = network(), tmp_path / "tb"
    with ut.record(tmp_path / "a", net, measures=MEASURES, group=1, to=f"tensorboard:{out}") as recording:
        for batch in range(3):
            with recording.batch():
                net(torch.ones(2, 1, 8, 8)).sum().backward()
            recording.flush()
            if batch == 2:
                assert {step for _, step in scalars_of(accumulator(out))} == {0, 1}
    found = scalars_of(accumulator(out))
    assert {step for _, step in found} == {0, 1, 2}
    whole = record(tmp_path / "b", to=f"tensorboard:{tmp_path / 'whole'}")
    assert_scalars(scalars_of(accumulator(tmp_path / "whole")), whole)
    events = accumulator(tmp_path / "whole")
    assert "findings/pooling/text_summary" in events.Tags()["tensors"]
    assert [event.step for event in events.Histograms("histogram/backward/0")] == [
        1,
        3,
        5,
    ]  # of the last batch of a part


def test_a_tracker_that_fails_ends_no_training(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = record(tmp_path / "a", to=f"tensorboard:{tmp_path / 'mine'}")
    [message] = {str(one.message) for one in caught if one.category is ut.UndertowWarning}
    assert "nothing more goes to tensorboard" in message
    assert "undertow export" in message
    assert run.finished
    with pytest.raises(ut.InputError, match="to='csv' is not understood"):
        record(tmp_path / "b", to="csv")


def test_follow_goes_on_until_the_run_is_finished(tmp_path, run):
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "a", stop=0)
    followed = []
    out = tmp_path / "csv"
    thread = threading.Thread(target=lambda: followed.append(ut.export(tmp_path / "a", "csv", out, follow=True)))
    thread.start()
    record(tmp_path / "a")
    thread.join(60)
    assert followed
    with open(out / "scalars.csv") as file:
        rows = list(csv.DictReader(file))
    found = {(row["tag"], int(row["step"])): float(row["value"]) for row in rows}
    assert len(found) == len(rows)
    assert_scalars(found, run)
