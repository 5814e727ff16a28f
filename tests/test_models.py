"""Classifiers by reference: real packages, photographs and files; and every way in which one cannot be had."""

import hashlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from undertow import models
from undertow.classifier import Classifier, find_class
from undertow.errors import FrameworkError, ModelError, TargetError
from undertow.frameworks import downloading
from undertow.frameworks.torch import weights
from undertow.frameworks.torch.zoo import importing
from undertow.images import Preprocessing, demo_photographs, read
from undertow.installing import install_command
from undertow.models import listing, load

SMALL = "torchvision:squeezenet1_1@none"


@pytest.fixture(scope="module")
def demo() -> Classifier:
    return load("demo")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and empty caches: the same on every machine that runs the tests."""

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    return tmp_path


def scores(classifier: Classifier, photograph: str) -> torch.Tensor:
    array = classifier.preprocessing.array(read(demo_photographs()[photograph]))
    with torch.no_grad():
        result: torch.Tensor = classifier.module(torch.from_numpy(array)[None])
    return result[0]


def message(call: Callable[[], Any], kind: type[Exception] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).isprintable(), "an error is one line"
    return str(caught.value)


@pytest.mark.parametrize(
    ("photograph", "expected"),
    [
        ("chelsea", [(285, "Egyptian cat", 0.36), (281, "tabby", 0.28), (282, "tiger cat", 0.22)]),
        ("coffee", [(967, "espresso", 0.84)]),
        ("camera", [(872, "tripod", 0.93)]),
        ("rocket", [(657, "missile", 0.41)]),
    ],
)
def test_the_demo_knows_the_photographs(
    demo: Classifier, photograph: str, expected: list[tuple[int, str, float]]
) -> None:
    probabilities, class_ids = scores(demo, photograph).softmax(0).topk(len(expected))
    assert [(int(i), demo.classes[i]) for i in class_ids] == [row[:2] for row in expected]
    assert probabilities.tolist() == pytest.approx([row[2] for row in expected], abs=0.01)


def test_the_demo_is_whole(demo: Classifier) -> None:
    assert (demo.reference, demo.weights, len(demo.classes)) == ("demo", "ImageNet, packaged", 1000)
    assert not demo.module.training
    assert demo.synonyms[281] == ("tabby cat",)


def test_load_needs_no_framework_until_asked() -> None:
    code = (
        "import sys, undertow.models, undertow.images; assert not {'torch', 'torchvision', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name", ["squeezenet1_1", "googlenet", pytest.param("inception_v3", marks=pytest.mark.slow), "mobilenet_v2"]
)
def test_random_torchvision_models_are_the_same_every_time(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load(f"torchvision:{name}@none")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = load(f"torchvision:{name}@none")
    assert first.weights_sha256 == second.weights_sha256
    assert first.weights == "random (seed 0)"
    assert not first.module.training
    assert first.classes[282] == "tiger cat"
    assert scores(first, "chelsea").shape == (1000,)
    size = 299 if name == "inception_v3" else 224
    assert first.preprocessing.view(read(demo_photographs()["chelsea"])).shape == (size, size, 3)


def test_torchvision_presets_are_those_of_the_weights() -> None:
    assert load("torchvision:efficientnet_b0@none").preprocessing.interpolation == "bicubic"
    kept = load("torchvision:mobilenet_v2@none").preprocessing
    assert (kept.resize, kept.crop) == (232, 224)  # of IMAGENET1K_V2, the default


def test_timm_models() -> None:
    random = load("timm:resnet18@none")
    assert (len(random.classes), random.classes[282], random.weights) == (1000, "tiger cat", "random (seed 0)")
    assert random.preprocessing == Preprocessing(235, 224, interpolation="bicubic")  # floor(224 / 0.95)
    assert random.weights_sha256 == load("timm:resnet18@none").weights_sha256
    assert scores(random, "coffee").shape == (1000,)
    assert load("timm:resnet18.fb_ssl_yfcc100m_ft_in1k@none").preprocessing.interpolation == "bilinear"


def test_features_are_no_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = importing.import_timm()
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: build(name, num_classes=0))
    assert "timm:resnet18 gives features, not classes" in message(lambda: load("timm:resnet18@none"))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("torchvision:vgg61", r"torchvision has no classifier 'vgg61'; did you mean .*vgg16"),
        ("torchvision:fcn_resnet50", "no classifier 'fcn_resnet50'"),
        ("torchvision:qqq", "`undertow models torchvision` lists them"),
        ("torchvision:vgg16@V9", r"vgg16 has no weights 'V9'; it has IMAGENET1K_V1 and none"),
        ("torchvision:vgg16@IMAGENET1K_FEATURES", "has no weights 'IMAGENET1K_FEATURES'"),
        ("timm:resnet81", r"timm has no model 'resnet81'; did you mean resnet18"),
        ("timm:resnet18.zzz", r"it has resnet18\.a1_in1k.* and resnet18@none"),
        ("timm:botnet50ts_256", r"no weights for botnet50ts_256; .*timm:botnet50ts_256@none"),
        ("vgg16", r"a reference is demo, .* did you mean torchvision:vgg16"),
        ("demoo", "did you mean demo"),
        ("dmo", "did you mean demo"),
        ("resnet5", "did you mean .*resnet50"),
        ("hff:gpt2", r"did you mean hf:gpt2\?"),
        ("huggingface:org/net", r"did you mean hf:org/net\?"),
        ("open-clip:ViT-B-32@openai", r"did you mean open_clip:ViT-B-32@openai\?"),
        ("vit-b-32-quickgel", "did you mean open_clip:ViT-B-32-quickgelu"),
        ("nets.py", "name the function that returns the network, as in nets.py:load"),
        ("", "unknown model ''"),
        ("new\nline", r"unknown model 'new\\nline'"),
        ("nowhere.py:net", r"no file nowhere\.py"),
    ],
)
def test_unknown_models_are_told_with_near_names(reference: str, expected: str) -> None:
    assert re.search(expected, message(lambda: load(reference)))


def test_no_network_is_one_line_and_quick(offline: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    text = message(lambda: load("torchvision:vgg16"))
    assert text.startswith("could not download the weights of torchvision:vgg16 (Name or service not known)")
    assert text.endswith("give --weights FILE or use torchvision:vgg16@none")
    text = message(lambda: load("timm:resnet18.a1_in1k"))
    assert text.endswith("give --weights FILE or use timm:resnet18@none")
    assert time.monotonic() - started < 120
    assert capfd.readouterr() == ("", "")


def test_the_network_is_asked_with_a_limit() -> None:
    assert "refused" in downloading.unreachable("http://127.0.0.1:9/weights.pth")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        started = time.monotonic()
        text = downloading.unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth", seconds=0.5)
        assert "no answer from 127.0.0.1" in text or "timed out" in text
        assert time.monotonic() - started < 60


def test_an_address_that_swallows_packets_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def swallow(*_: object, **__: object) -> None:  # address after address
        over.wait(8)
        raise TimeoutError

    monkeypatch.setattr("urllib.request.urlopen", swallow)
    started = time.monotonic()
    assert downloading.unreachable("http://example.org/x", seconds=0.2) == "no answer from example.org in 0.2 seconds"
    assert time.monotonic() - started < 60
    over.set()


def test_weights_in_torchs_cache_need_no_network(offline: Path) -> None:
    entry = importing.import_torchvision().models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    cached = offline / "checkpoints" / entry.url.rpartition("/")[2]
    cached.parent.mkdir()
    assert row("torchvision:squeezenet1_1").offline is False
    classifier = load(SMALL)
    torch.save(classifier.module.state_dict(), cached)
    assert row("torchvision:squeezenet1_1").offline is True
    assert row("torchvision:squeezenet1_1").why == "downloaded already"
    assert (load("torchvision:squeezenet1_1").weights, load("torchvision:squeezenet1_1@IMAGENET1K_V1").weights) == (
        "IMAGENET1K_V1",
        "IMAGENET1K_V1",
    )
    assert load("torchvision:squeezenet1_1").weights_sha256 == classifier.weights_sha256
    cached.write_bytes(b"cut short")
    assert "could not get the weights of torchvision:squeezenet1_1" in message(
        lambda: load("torchvision:squeezenet1_1")
    )


def test_weights_in_hugging_faces_cache_need_no_network(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load("timm:resnet18@none")
    safetensors.torch.save_file(classifier.module.state_dict(), offline / "model.safetensors")
    cached = {("timm/resnet18.a1_in1k", "model.safetensors"): str(offline / "model.safetensors")}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repository, name, revision=None: cached.get((repository, name))
    )
    loaded = load("timm:resnet18")
    assert (loaded.weights, loaded.weights_sha256) == ("a1_in1k", classifier.weights_sha256)
    assert row("timm:resnet18.a1_in1k").offline is True
    assert row("timm:resnet18.a2_in1k").offline is False


def row(reference: str) -> models.Reference:
    return next(row for row in listing(reference) if row.reference == reference)


def test_listing(offline: Path) -> None:
    overview = listing()
    assert overview[0] == models.Reference("demo", "packaged", "ImageNet, packaged", True, "installed as a package")
    assert {row.source for row in overview} == {"packaged", "torchvision", "timm", "keras", "hf", "open_clip"}
    (timm,) = (row for row in overview if row.reference == "timm:NAME")
    assert re.match(r"1,\d\d\d models", timm.why)
    names = [row.reference for row in listing("VGG16")]
    assert {"torchvision:vgg16", "torchvision:vgg16_bn", "torchvision:vgg16@none", "timm:vgg16.tv_in1k"} <= set(names)
    assert all("vgg16" in name.lower() for name in names)
    assert not any(row.offline for row in listing("vgg16") if "@none" not in row.reference)
    assert all(row.offline for row in listing("@none"))
    assert row("torchvision:resnet50@IMAGENET1K_V1").weights == "IMAGENET1K_V1"
    assert "did you mean" in message(lambda: listing("vgg61"))


def test_every_row_without_weights_of_its_own_can_be_loaded_by_its_name() -> None:
    for reference in [row.reference for row in listing("squeezenet1") if row.reference.endswith("@none")]:
        assert load(reference).reference == reference


def test_listing_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = models.importlib.util.find_spec
    hidden = ("torchvision", "efficientnet_lite_pytorch")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in hidden else real(name))
    rows = {row.reference: row for row in listing()}
    assert not rows["demo"].offline
    assert f"efficientnet_lite_pytorch missing; run: {install_command('demo')}" in rows["demo"].why
    assert install_command("vision") in rows["torchvision:NAME"].why
    assert install_command("vision") in rows["timm:NAME"].why
    assert install_command("vision") in message(lambda: load("torchvision:vgg16@none"), FrameworkError)


# Weights from a file


@pytest.fixture(scope="module")
def small() -> Classifier:
    return load(SMALL)


@pytest.fixture(scope="module")
def other(small: Classifier) -> dict[str, torch.Tensor]:
    """A state dict that is not the seeded one."""
    return {key: value * 2 for key, value in small.module.state_dict().items()}


def test_the_same_weights_have_the_same_hash_in_every_format(
    small: Classifier, other: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    reverse = dict(reversed(other.items()))
    torch.save(other, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": reverse}, tmp_path / "nested.ckpt")
    torch.save({"model": {f"module.{key}": value for key, value in other.items()}}, tmp_path / "parallel.pth")
    torch.save({"model_state_dict": {f"_orig_mod.{k}": v for k, v in other.items()}}, tmp_path / "compiled.pth")
    safetensors.torch.save_file(other, tmp_path / "a.safetensors")
    loaded = [load(SMALL, path) for path in sorted(tmp_path.iterdir())]
    assert len({each.weights_sha256 for each in loaded} - {small.weights_sha256}) == 1
    assert [each.weights for each in loaded] == sorted(path.name for path in tmp_path.iterdir())
    assert all(torch.equal(loaded[0].module.state_dict()[key], value) for key, value in other.items())


def test_the_hash_is_the_documented_one() -> None:
    module = torch.nn.BatchNorm1d(2)
    expected = b"bias\0float32\x002\0" + bytes(8) + b"num_batches_tracked\0int64\0\0" + bytes(8)
    expected += b"running_mean\0float32\x002\0" + bytes(8)
    expected += b"running_var\0float32\x002\0" + np.ones(2, "<f4").tobytes()
    expected += b"weight\0float32\x002\0" + np.ones(2, "<f4").tobytes()
    assert weights.weights_sha256(module) == hashlib.sha256(expected).hexdigest()
    assert weights.weights_sha256(module) != weights.weights_sha256(module.half())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code in a weights file was run')",)


def test_files_that_are_no_weights_are_refused(small: Classifier, tmp_path: Path) -> None:
    torch.save(small.module, tmp_path / "module.pt")
    torch.save({"state_dict": small.module.state_dict(), "hook": Evil()}, tmp_path / "evil.pt")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "numbers.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.pt").touch()
    expected = {
        "module.pt": "contains code or objects, which are never unpickled; save model.state_dict() or safetensors",
        "evil.pt": "contains code or objects",
        "numbers.pt": "holds no state dict (not tensors: epoch, lr)",
        "list.pt": "holds no state dict (a list)",
        "nothing.pt": "holds no state dict (nothing in it)",
        "text.pt": "is no readable weights file",
        "text.safetensors": "is no readable weights file",
        "empty.pt": "it is empty",
        "missing.pt": "there is no such file",
    }
    for name, text in expected.items():
        assert text in message(lambda name=name: load(SMALL, tmp_path / name)), name


def linear(**tensors: Any) -> dict[str, Any]:
    return {"weight": torch.eye(2), "bias": torch.zeros(2), **tensors}


EYE = torch.eye(2)
EXTRAORDINARY = [
    ("sparse", lambda: EYE.to_sparse()),
    ("sparse", lambda: EYE.to_sparse_csr()),
    ("meta", lambda: EYE.to("meta")),
    ("quantised", lambda: torch.quantize_per_tensor(EYE, 0.1, 0, torch.qint8)),
]


@pytest.mark.filterwarnings("ignore")  # torch's, of what it calls a beta or deprecated
@pytest.mark.parametrize(("kind", "make"), EXTRAORDINARY)
def test_weights_that_are_no_dense_ones_are_one_line(
    kind: str, make: Callable[[], torch.Tensor], tmp_path: Path
) -> None:
    tensor = make()
    torch.save(linear(weight=tensor), tmp_path / "w.pt")
    assert message(lambda: weights.read_state(tmp_path / "w.pt")).endswith(
        f"w.pt holds {kind} weights (weight); save dense ones, with their values"
    )
    module = torch.nn.Module()
    module.register_buffer("weight", tensor)
    assert f"the network has {kind} weights (weight)" in message(lambda: weights.weights_sha256(module))


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_checkpoint_that_holds_itself(key: str, tmp_path: Path) -> None:
    itself: dict[str, Any] = {}
    itself[key] = itself
    torch.save(itself, tmp_path / "w.pt")
    assert f"holds no state dict (not tensors: {key})" in message(lambda: weights.read_state(tmp_path / "w.pt"))
    torch.save({"model": {"state_dict": {"model_state_dict": linear()}}}, tmp_path / "deep.pt")
    assert list(weights.read_state(tmp_path / "deep.pt")) == ["weight", "bias"]


LOST = [EYE * 1j, EYE + 0j, (EYE * 1j).conj(), EYE.double() * 1e300, torch.full((2, 2), 2**53 + 1)]


@pytest.mark.parametrize("tensor", LOST, ids=str)
def test_weights_never_lose_a_part_in_silence(tensor: torch.Tensor) -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    text = message(lambda: weights.fit(module, linear(weight=tensor), Path("w.pt"), "net"))
    kind = str(tensor.dtype).removeprefix("torch.")
    assert text == f"w.pt would lose values in net: weight is {kind}, not float32"
    assert torch.equal(module.weight, before)


def test_weights_that_lose_nothing_are_taken() -> None:
    module = torch.nn.Linear(2, 2)
    for tensor in (EYE.long(), EYE.double() / 3, EYE.half(), EYE.bool(), EYE.double() * float("inf")):
        weights.fit(module, linear(weight=tensor), Path("w.pt"), "net")
        assert torch.equal(module.weight, tensor.float()) or tensor.isnan().any()
    counter = torch.nn.BatchNorm1d(2)
    state = counter.state_dict()
    weights.fit(counter, state | {"num_batches_tracked": torch.tensor(3.0)}, Path("w.pt"), "net")
    assert counter.num_batches_tracked == 3
    text = message(
        lambda: weights.fit(counter, state | {"num_batches_tracked": torch.tensor(3.5)}, Path("w.pt"), "net")
    )
    assert "num_batches_tracked is float32, not int64" in text


def test_the_hash_of_lazily_conjugated_weights_is_of_their_values() -> None:
    a, b = torch.nn.Module(), torch.nn.Module()
    a.register_buffer("w", (EYE * 1j).conj())
    b.register_buffer("w", (EYE * 1j).conj().resolve_conj())
    assert weights.weights_sha256(a) == weights.weights_sha256(b)


def test_weights_that_do_not_fit_are_counted(other: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state = {key: value for key, value in other.items() if not key.startswith("features.0")}
    state |= {f"extra.{index}": torch.zeros(1) for index in range(5)} | {
        "classifier.1.weight": torch.zeros(10, 512, 1, 1)
    }
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    text = message(lambda: load(SMALL, tmp_path / "w.safetensors"))
    assert "2 missing (features.0.weight, features.0.bias);" in text
    assert "5 unexpected (extra.0, extra.1, extra.2, ...);" in text
    assert "1 of another shape (classifier.1.weight is (10, 512, 1, 1), not (1000, 512, 1, 1));" in text
    assert text.endswith("for a changed network use FILE.py:FUNCTION")


def test_weights_files_for_the_demo_and_timm(demo: Classifier, tmp_path: Path) -> None:
    torch.save(demo.module.state_dict(), tmp_path / "mine.pt")
    again = load("demo", str(tmp_path / "mine.pt"))
    assert (again.weights, again.weights_sha256) == ("mine.pt", demo.weights_sha256)
    random = load("timm:resnet18@none")
    torch.save(random.module.state_dict(), tmp_path / "mine.pt")
    again = load("timm:resnet18", tmp_path / "mine.pt")
    assert (again.weights, again.weights_sha256) == ("mine.pt", random.weights_sha256)


@pytest.mark.slow
def test_published_files_of_peculiar_networks_fit(tmp_path: Path) -> None:
    network = importing.import_torchvision().models.get_model("densenet121")
    published = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", key): value for key, value in network.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in published
    torch.save(published, tmp_path / "densenet121-a639ec97.pth")
    loaded = load("torchvision:densenet121", tmp_path / "densenet121-a639ec97.pth")
    assert loaded.weights_sha256 == weights.weights_sha256(network)

    full = load("torchvision:googlenet@none").module
    torch.save(full.state_dict(), tmp_path / "full.pth")  # as published: with the auxiliary heads
    bare = {key: value for key, value in full.state_dict().items() if not key.startswith("aux")}
    torch.save(bare, tmp_path / "bare.pth")  # as torchvision's own loaded model saves
    for name in ("full.pth", "bare.pth"):
        loaded = load("torchvision:googlenet", tmp_path / name)
        assert loaded.module.transform_input is True  # the published weights expect it
        assert scores(loaded, "chelsea").shape == (1000,)
    assert load("torchvision:googlenet@none", tmp_path / "bare.pth").module.transform_input is False


# A person's own file

OWN = r"""
from dataclasses import dataclass
import torch
from beside import WIDTH

def net():
    return torch.nn.Sequential(torch.nn.Conv2d(3, WIDTH, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

def whole():
    return {"module": net(), "classes": ["cat", ("dog", "hound"), "newt"],
            "preprocessing": {"resize": 40, "crop": [32, 30], "interpolation": "bicubic"}}

def again():
    from undertow.models import load
    return load(__file__ + ":whole")

def few(): return {"module": net(), "classes": ["cat"]}
def odd(): return {"module": net(), "clases": ["cat"]}
def text(): return "resnet"
def crop(): return {"module": net(), "preprocessing": {"side": 3}}
def call(): return {"module": net(), "preprocessing": len}
def deep(): return torch.nn.Flatten(0)
def wide(): return torch.nn.Linear(7, 7)
def fails():
    raise KeyError("no\nsuch key")
def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("WIDTH = 3")
    return tmp_path / "own.py"


def test_a_function_that_returns_a_network(own: Path, tmp_path: Path) -> None:
    path, state = list(sys.path), torch.get_rng_state()
    classifier = load(f"{own}:net")
    assert (sys.path, classifier.classes) == (path, ("class 0", "class 1", "class 2"))
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.preprocessing == Preprocessing()
    assert classifier.weights == f"made by {own}:net"
    assert not classifier.module.training
    assert load(f"{own}:net").weights_sha256 == classifier.weights_sha256
    torch.save({key: value + 1 for key, value in classifier.module.state_dict().items()}, tmp_path / "mine.pt")
    loaded = load(f"{own}:net", tmp_path / "mine.pt")
    assert loaded.weights == "mine.pt"
    assert torch.equal(loaded.module[0].weight, classifier.module[0].weight + 1)


def test_a_function_that_returns_the_parts_or_a_classifier(own: Path) -> None:
    for name in ("whole", "again"):
        classifier = load(f"{own}:{name}")
        assert classifier.preprocessing == Preprocessing(40, (32, 30), interpolation="bicubic")
        assert classifier.classes == ("cat", "dog", "newt")
        assert find_class(classifier, "hound") == 1
        assert classifier.reference == f"{own}:{name}"


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("few", "names 1 classes but scores 3"),
        ("odd", "not unknown clases"),
        ("text", "must return a torch.nn.Module, .* not str"),
        ("crop", "must be a Preprocessing or a dict of resize, crop, mean, std, interpolation"),
        ("call", "must be a Preprocessing"),
        ("deep", r"must return scores of shape \(B, classes\), not \(150528,\)"),
        ("wide", r"does not run on an input \(1, 3, 224, 224\) .*; return a dict with its own preprocessing"),
        ("fails", r"failed in line 25 with KeyError: 'no\\nsuch key'"),
        ("leaves", "failed in line 27 with SystemExit: 3"),
        ("nett", r"has no function 'nett'; did you mean net"),
        ("zzzzz", "has no function 'zzzzz'; it has "),
    ],
)
def test_what_goes_wrong_in_a_persons_file_is_one_line(own: Path, function: str, text: str) -> None:
    path = list(sys.path)
    assert re.search(text, message(lambda: load(f"{own}:{function}")))
    assert sys.path == path


def test_a_file_that_imports_what_is_missing_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a user of the base, or of the extra `ray` alone, whose file imports torch."""
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "own.py").write_text("import timm\n")
    said = message(lambda: load(f"{tmp_path / 'own.py'}:net"))
    assert said.endswith(f"; run: {install_command('vision')}")
    assert "own.py failed in line 1 with ModuleNotFoundError" in said


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("\n\ndef net(:\n")
    assert "own.py failed in line 3 with SyntaxError" in message(lambda: load(f"{tmp_path / 'own.py'}:net"))


# Classes


@pytest.mark.parametrize(
    ("word", "index"),
    [
        ("282", 282),
        ("0", 0),
        (" 999 ", 999),
        ("tiger cat", 282),
        ("Tiger CAT", 282),
        ("tabby cat", 281),
        ("egyptian", 285),
        ("missile", 657),  # 744 is "projectile, missile"
        ("MISSILE", 657),
        ("cardigan", 474),
        ("Cardigan", 264),  # the corgi
    ],
)
def test_find_class(demo: Classifier, word: str, index: int) -> None:
    assert find_class(demo, word) == index


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("1000", "class 1000 is out of range; the model's 1,000 classes are 0 to 999"),
        ("-1", "class -1 is out of range"),
        ("tigr cat", r"no class 'tigr cat' among 1,000; did you mean tiger cat"),
        ("qqqq", "give its number or its name"),
        ("", "no class ''"),
        ("crane", "'crane' could be 134 crane, 517 crane; give"),
        ("cat", "'cat' could be 281 tabby, 282 tiger cat, .*; give"),
        ("(", r"no class '\('"),
    ],
)
def test_classes_that_are_not_there(demo: Classifier, word: str, text: str) -> None:
    assert re.search(text, message(lambda: find_class(demo, word), TargetError))


def test_find_class_in_plain_names() -> None:
    assert find_class(["a", "b"], "B") == 1
    assert "0 to 1" in message(lambda: find_class(["a", "b"], "2"), TargetError)


# torchvision beside a torch that it was not built for


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str, str], str]:
    """Import a torchvision that was built for some torch, in a process of its own; what was said of it."""

    def imported(body: str, requires: str) -> str:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(body)
        (tmp_path / "torchvision-0.99.2.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.2\nRequires-Dist: {requires}\n"
        (tmp_path / "torchvision-0.99.2.dist-info" / "METADATA").write_text(metadata)
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
            "import torch; torch.__version__ = '2.13.0+cpu'\n"
            "import undertow\nfrom undertow.frameworks.torch.zoo import importing\n"
            "try: print(importing.import_torchvision().word)\n"
            "except undertow.FrameworkError as error: print(error)"
        )
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
        ).stdout

    return imported


BROKEN = "raise RuntimeError('operator torchvision::nms\\n does not exist')"


@pytest.mark.slow
@pytest.mark.parametrize("requires", ["torch (==2.14.2)", "torch==2.14.2"])
def test_a_torchvision_for_another_torch(fake: Callable[[str, str], str], requires: str) -> None:
    assert fake(BROKEN, requires) == (
        "torchvision 0.99.2 is built for torch 2.14.2, but torch 2.13.0 is installed; "
        'run: pip install "torchvision==0.28.*"\n'
    )


@pytest.mark.slow
def test_a_torchvision_that_is_broken(fake: Callable[[str, str], str]) -> None:
    text = fake(BROKEN, "torch==2.13.0")
    assert text.startswith("torchvision 0.99.2 cannot be imported (operator torchvision::nms does not exist); run: pip")
    assert text.count("\n") == 1


@pytest.mark.slow
def test_the_missing_operators_are_declared_before_the_import(fake: Callable[[str, str], str]) -> None:
    body = "import torch, warnings\nwarnings.warn('no CUDA')\ntorch.ops.torchvision.nms, torch.ops.torchvision.qnms\n"
    body += "word = 'declared'"
    assert fake(body, "torch==2.14.2") == "declared\n"


@pytest.mark.slow
def test_torchvision_imports_in_threads_and_once() -> None:
    code = (
        "import threading, sys\nfrom undertow.frameworks.torch.zoo import importing\nfound = []\n"
        "threads = [threading.Thread(target=lambda: found.append(importing.import_torchvision())) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert len(found) == 8 and set(map(id, found)) == {id(sys.modules['torchvision'])}\n"
        "assert found[0].models.resnet18 and len(importing._declared) <= 1"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
