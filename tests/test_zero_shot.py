"""Networks that score texts for an image, by reference: open_clip's, and CLIP and SigLIP of transformers."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

import undertow as ut
from frameworks.torch.relevance_twins import _Identity, half, layer_norm
from tiny_transformers import SIZES, saved, seeded, transformers, wordpiece
from undertow.cli import main
from undertow.frameworks.torch import zoo
from undertow.frameworks.torch.zoo.open_clip import architectures

open_clip = pytest.importorskip("open_clip")
TEXTS = ["a photo of a cat", "a photo of a dog", "the moon"]
VISION = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def spread(model):
    """Draw what initialisation leaves at 0 or 1 or makes tiny, so that no weight is idle."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": preprocess}
    (root / "open_clip_config.json").write_text(json.dumps(config))
    model = spread(open_clip.create_model(f"local-dir:{root}", load_weights=False))
    save_file(model.state_dict(), root / "open_clip_model.safetensors")
    return root


@pytest.fixture(scope="module")
def theirs(folder):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


def picture(width=90, height=70):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def test_scores_and_pixels_are_open_clips_own(folder, theirs):
    model, transform, tokenizer = theirs
    classifier = ut.load(f"open_clip:{folder}", classes=TEXTS)
    x = classifier.prepare(picture())
    assert torch.allclose(x[0], transform(picture()), atol=1e-6)
    with torch.no_grad():
        image, text, scale = model(x, tokenizer(TEXTS))
        assert torch.allclose(classifier.module(x), scale * image @ text.T, atol=1e-4)
    assert classifier.classes == tuple(TEXTS)
    assert classifier.id("dog") == 1
    assert classifier.weights == "open_clip_model.safetensors"
    assert not any("transformer.resblocks" in name and "visual" not in name for name in classifier.module.state_dict())


class Guided(torch.autograd.Function):
    """GELU whose backward is that of the positive part of the gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return g.clamp(min=0) * (0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density)


def by_hand(state, x, texts, scale, activation, norm, factor, held):
    """A CLIP's scores out of functions alone; the four say what becomes of its parts backward."""
    w = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}

    def normed(x, name):
        return norm(x) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = F.conv2d(x, w["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = normed(x, "ln_pre")
    for i in range(2):
        block = f"transformer.resblocks.{i}"
        h = F.linear(normed(x, f"{block}.ln_1"), w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"])
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in h.chunk(3, -1))
        p = (factor(q) @ factor(k).transpose(-2, -1) / math.sqrt(8)).softmax(-1)
        h = (factor(p) @ factor(v)).transpose(1, 2).flatten(2)
        x = x + F.linear(h, w[f"{block}.attn.out_proj.weight"], w[f"{block}.attn.out_proj.bias"])
        h = F.linear(normed(x, f"{block}.ln_2"), w[f"{block}.mlp.c_fc.weight"], w[f"{block}.mlp.c_fc.bias"])
        x = x + F.linear(activation(h), w[f"{block}.mlp.c_proj.weight"], w[f"{block}.mlp.c_proj.bias"])
    features = normed(x[:, 0], "ln_post") @ w["proj"]
    return scale * (features / held(features.pow(2).sum(-1, keepdim=True).sqrt())) @ texts.T


PARTS = {
    "guided": (Guided.apply, lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: x, lambda x: x),
    "attnlrp": (
        lambda x: _Identity.apply(x, F.gelu(x.detach())),
        lambda x: layer_norm(x, (-1,), 1e-5),
        half,
        torch.Tensor.detach,
    ),
}


@pytest.mark.parametrize("rule", PARTS)
def test_rules_equal_a_functional_twin(rule, folder, theirs):
    model, _, tokenizer = theirs
    classifier = ut.load(f"open_clip:{folder}", classes=TEXTS)
    module = classifier.module.double()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = ut.explain(module, images, rule=rule, target=[2, 0], activations="all" if rule == "guided" else "relu-like")
    with torch.no_grad():
        texts = model.encode_text(tokenizer(TEXTS), normalize=True).double()
    state = {name: value.double() for name, value in model.state_dict().items()}
    x = images.clone().requires_grad_()
    scores = by_hand(state, x, texts, model.logit_scale.exp().double().detach(), *PARTS[rule])
    (g,) = torch.autograd.grad(scores[0, 2] + scores[1, 0], x)
    wanted = g if rule == "guided" else g * x.detach()
    assert torch.allclose(a.scores, torch.stack([scores[0, 2], scores[1, 0]]).detach(), atol=1e-4)
    assert float((a.values - wanted).norm() / wanted.norm()) < 1e-6  # texts' features are float32


@pytest.mark.parametrize("rule", ["deconvnet", "cp-lrp", "attention-rollout", "attention-gradient"])
def test_the_other_rules_work_and_the_verdict_too(rule, folder):
    classifier = ut.load(f"open_clip:{folder}", classes=TEXTS)
    x = classifier.prepare(picture())
    activations = "all" if rule == "deconvnet" else "relu-like"
    a = ut.explain(classifier, x, rule=rule, target="moon", activations=activations)
    assert a.values.shape[-2:] == (32, 32)
    assert float(torch.as_tensor(a.values).abs().sum()) > 0


def test_weights_by_file_random_and_of_a_known_architecture(folder, tmp_path):
    own = ut.load(f"open_clip:{folder}", classes=TEXTS)
    file = folder / "open_clip_model.safetensors"
    assert ut.load(f"open_clip:{folder}@none", weights=file, classes=TEXTS).weights_sha256 == own.weights_sha256
    first, second = (ut.load(f"open_clip:{folder}@none", classes=TEXTS) for _ in range(2))
    assert first.weights == "random (seed 0)"
    assert first.weights_sha256 == second.weights_sha256 != own.weights_sha256
    with pytest.raises(ut.ModelError, match="does not fit open_clip:ViT-S-32-alt"):
        ut.load(f"open_clip:ViT-S-32-alt@{file}", classes=TEXTS)


def test_classes_are_texts_a_file_or_imagenets(folder, tmp_path):
    (tmp_path / "names.txt").write_text("a red car\n\nthe sea, at night\n")
    assert ut.load(f"open_clip:{folder}", classes=str(tmp_path / "names.txt")).classes == (
        "a red car",
        "the sea, at night",
    )
    assert ut.load(f"open_clip:{folder}", classes="a cat, a dog").classes == ("a cat", "a dog")
    imagenet = ut.load(f"open_clip:{folder}", classes="imagenet")
    assert len(imagenet.classes) == 1000
    assert imagenet.id("tiger cat") == 282
    cat = ut.load(f"open_clip:{folder}", classes=["a photo of a tiger cat."])
    assert torch.allclose(imagenet.module.head.weight[282], cat.module.head.weight[0], atol=1e-5)


@pytest.mark.parametrize(
    ("reference", "classes", "line"),
    [
        ("open_clip:{folder}", None, "scores any text: name the classes, as in --classes 'a photo of a cat"),
        ("open_clip:{folder}", ["a cat", " "], "one is empty"),
        ("open_clip:{folder}", "a cat,a cat", "'a cat' is there twice"),
        ("open_clip:{folder}", ["a " * 40], "as many tokens as the network reads"),
        ("open_clip:{folder}", "nothere.txt", r"nothere.txt cannot be read \(.*No such file"),
        ("open_clip:ViT-B-33@openai", ["a cat"], "no architecture 'ViT-B-33'.*did you mean ViT-B-32"),
        ("open_clip:ViT-B-32@opena", ["a cat"], "no weights 'opena'.*did you mean openai"),
        ("open_clip:ViT-B-32", ["a cat"], "needs weights: @openai, .*@FILE, @none"),
        ("open_clip:", ["a cat"], "open_clip has no architecture ''"),
        ("open_clip:{empty}", ["a cat"], "has no open_clip_config.json"),
        ("demo", ["a cat"], "demo has classes of its own"),
    ],
)
def test_refusals_name_the_remedy(reference, classes, line, folder, tmp_path):
    with pytest.raises((ut.ModelError, ut.InputError), match=line) as caught:
        ut.load(reference.format(folder=folder, empty=tmp_path), classes=classes)
    assert str(caught.value).isprintable()


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(ut.ModelError, match="has no weights"):
        ut.load(f"open_clip:{tmp_path}", classes=TEXTS)
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 8}}')
    with pytest.raises(ut.ModelError, match="could not build"):
        ut.load(f"open_clip:{tmp_path}@none", classes=TEXTS)


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ut.FrameworkError, match=r"open_clip .*undertow\[clip\]"):
        ut.load(f"open_clip:{folder}", classes=TEXTS)


def test_loading_logs_nothing_and_leaves_logging_alone(folder, caplog, capfd):
    import logging

    before = list(logging.getLogger().handlers)
    ut.load(f"open_clip:{folder}@none", classes=TEXTS)
    assert logging.getLogger().handlers == before
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_the_architectures_are_those_that_it_lists():
    assert sorted(architectures()) == sorted(open_clip.list_models())
    assert [row.reference for row in zoo.rows("open_clip", "ViT-S-32-alt")] == ["open_clip:ViT-S-32-alt@none"]
    assert [row.reference for row in zoo.rows("open_clip", None)] == ["open_clip:NAME@TAG"]
    assert "open_clip:ViT-B-32@openai" in [row.reference for row in zoo.rows("open_clip", "vit-b-32@")]


def clip():
    towers = {"text_config": {**SIZES, "vocab_size": 13, "max_position_embeddings": 12, "eos_token_id": 2},
              "vision_config": {**SIZES, "image_size": 32, "patch_size": 8}}  # fmt: skip
    return seeded(transformers.CLIPModel, transformers.CLIPConfig(**towers, projection_dim=8), 0.1)


def siglip():
    towers = {"text_config": {**SIZES, "vocab_size": 13, "max_position_embeddings": 12, "projection_size": 16},
              "vision_config": {**SIZES, "image_size": 32, "patch_size": 8}}  # fmt: skip
    return seeded(transformers.SiglipModel, transformers.SiglipConfig(**towers), 0.1)


@pytest.mark.parametrize("make", [clip, siglip])
def test_clip_and_siglip_of_transformers(make, tmp_path):
    size = {"height": 32, "width": 32}
    how = {"size": size} if make is siglip else {"size": {"shortest_edge": 32}, "crop_size": size}
    processor = transformers.CLIPImageProcessor if make is clip else transformers.SiglipImageProcessor
    model = make()
    saved(tmp_path, model, wordpiece(), processor(**how))
    texts = ["the food was not bad", "the cat"]
    classifier = ut.load(f"hf:{tmp_path}", classes=texts)
    x = classifier.prepare(picture())
    padding = True if make is clip else "max_length"
    ids = wordpiece()(texts, return_tensors="pt", padding=padding, max_length=12, truncation=True)["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=x).logits_per_image
    assert torch.allclose(classifier.module(x), wanted, atol=1e-4)
    assert classifier.classes == tuple(texts)
    a = ut.explain(classifier, x, rule="attnlrp", target="the cat")
    assert a.values.shape == (1, 3, 32, 32)
    with pytest.raises(ut.ModelError, match="scores any text"):
        ut.load(f"hf:{tmp_path}")


def test_classes_of_a_classifier_are_refused(tmp_path):
    from tiny_transformers import bert

    saved(tmp_path, bert(), wordpiece())
    with pytest.raises(ut.InputError, match="has classes of its own"):
        ut.load(f"hf:{tmp_path}", classes=["a cat"])


def test_on_the_command_line(folder, tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    words = [
        "explain",
        str(tmp_path / "a.png"),
        "--model",
        f"open_clip:{folder}",
        "--rule",
        "attnlrp",
        "--device",
        "cpu",
    ]
    words += ["--classes", ",".join(TEXTS), "--target", "moon", "--out"]
    with pytest.raises(SystemExit) as left:
        main([*words, str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert "explained: 2 the moon" in out
    with pytest.raises(SystemExit) as left:
        main([*words, str(tmp_path / "sweep"), "--engine", "local"])
    assert left.value.code == 0
    assert ut.Sweep(tmp_path / "sweep").map(0).shape[-2:] == (32, 32)
