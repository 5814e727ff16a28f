"""Maps of attention layers on models as they are, against twins that ask models for their weights and walk no graph."""

import copy
from contextlib import nullcontext
from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import undertow as ut
from frameworks.torch.real_models import built, drawn, timm, torchvision, transformers
from tiny_transformers import bert, gpt2, llama, vit
from undertow.layouts import upsampled

RULES = ("attention-rollout", "attention-gradient")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def perturbed(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.double().eval()


def twin(rule, weights, score, rows):
    """The papers' matrices in full, from the first layer up; the mean of the rows that the score reads, `(B, N)`."""
    for w in weights:
        w.retain_grad()
    score.sum().backward(retain_graph=True)
    eye = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype)
    total = eye.expand(len(score), -1, -1)
    for w in weights:
        if rule == "attention-rollout":
            mean = w.detach().mean(1) + eye
            total = mean / mean.sum(-1, keepdim=True) @ total
        else:
            total = total + (w.grad * w.detach()).clamp(min=0).mean(1) @ total
    return total[:, rows].mean(1)


def weights_of_transformers(model, x, score):
    """The weights that a model of transformers returns when asked, and the score."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(**x, output_attentions=True)
    return list(output.attentions), score(output.logits)


def weights_of_timm(model, x, score):
    """The weights that timm's unfused attention drops out of."""
    eager, weights = copy.deepcopy(model), []
    for block in eager.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, output: weights.append(output))
    output = eager(x)
    return weights, score(output)


def over_image(tokens, grid=(4, 4), extra=1, size=(32, 32)):
    return upsampled(tokens[:, extra:].reshape(len(tokens), 1, *grid).numpy(), size)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("backend", [None, SDPBackend.MATH])
def test_timm_as_it_is(rule, pool, backend):
    model, x = perturbed(timm.create_model("vit_tiny_patch16_224", global_pool=pool, **VIT)), drawn(2, 3, 32, 32)
    with nullcontext() if backend is None else sdpa_kernel(backend):
        a = ut.explain(model, x, rule=rule, target=1)
    weights, score = weights_of_timm(model, x, lambda scores: scores[:, 1])
    rows = [0] if pool == "token" else list(range(1, 17))
    expected = over_image(twin(rule, weights, score, rows))
    assert a.values.shape == (2, 1, 32, 32)
    assert np.allclose(a.values.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert a.rewired == 3
    assert not a.is_relevance


@pytest.mark.parametrize("rule", RULES)
def test_tokens_beyond_the_class_token_are_taken_off(rule):
    model = perturbed(timm.create_model("deit_tiny_distilled_patch16_224", **VIT))
    x = drawn(2, 3, 32, 32)
    a = ut.explain(model, x, rule=rule, target=1)
    weights, score = weights_of_timm(model, x, lambda scores: scores[:, 1])
    assert np.allclose(a.values.numpy(), over_image(twin(rule, weights, score, [0, 1]), extra=2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_torchvision_as_it_is(rule):
    model, x = perturbed(torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)), drawn(2, 3, 32, 32)
    a = ut.explain(model, x, rule=rule, target=1)
    asked, weights = copy.deepcopy(model), []

    def attend(self, q, k, v, **_):
        parts = nn.functional.linear(q, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        weights.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return self.out_proj((weights[-1] @ v).transpose(1, 2).flatten(2)), None

    for block in asked.encoder.layers:
        block.self_attention.forward = MethodType(attend, block.self_attention)
    score = asked(x)[:, 1]
    expected = over_image(twin(rule, weights, score, [0]))
    assert np.allclose(a.values.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert a.rewired == 2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [bert, gpt2, llama], ids=lambda make: make.__name__)
def test_texts_of_transformers(rule, implementation, make):
    model = make().double()
    model.set_attn_implementation(implementation)
    is_bert = make is bert
    mask = torch.ones_like(IDS)
    if is_bert:
        mask[1, 3:] = 0  # padding, at which nothing is to arrive
    x = {"input_ids": IDS, "attention_mask": mask}
    target = 1 if is_bert else ut.targets.token(7)
    layer = next(name for name, part in model.named_modules() if part is model.get_input_embeddings())
    a = ut.explain(model, x, rule=rule, at=layer, target=target)
    weights, score = weights_of_transformers(model, x, lambda s: s[:, 1] if is_bert else s[:, -1, 7])
    expected = twin(rule, weights, score, [0] if is_bert else [-1])
    assert a.values.shape == (2, 5, 1)
    assert torch.allclose(a.values[..., 0], expected, rtol=1e-5, atol=1e-8)  # transformers' own softmax is float32
    if is_bert:
        assert float(a.values[1, 3:].abs().max()) == 0
    assert a.rewired == 2


@pytest.mark.parametrize("rule", RULES)
def test_images_of_transformers_and_several_targets(rule):
    model, x = vit().double(), drawn(2, 3, 32, 32)
    a = ut.explain(model, x, rule=rule, target="top:2")
    assert a.values.shape == (2, 2, 1, 32, 32)
    for k in (0, 1):
        weights, scores = weights_of_transformers(model, {"pixel_values": x}, lambda scores: scores)
        score = scores.gather(1, a.targets[:, k : k + 1])
        expected = over_image(twin(rule, weights, score, [0]))
        assert np.allclose(a.values[:, k].numpy(), expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(a.values[:, 0], a.values[:, 1]) == (rule == "attention-rollout")


def test_what_is_behind_a_layer_alone_counts():
    model, x = perturbed(timm.create_model("vit_tiny_patch16_224", **VIT)), drawn(2, 3, 32, 32)
    a = ut.explain(model, x, rule="attention-rollout", at="blocks.1", target=1)
    weights, score = weights_of_timm(model, x, lambda scores: scores[:, 1])
    assert torch.allclose(a.values[..., 0], twin("attention-rollout", weights[2:], score, [0]), rtol=1e-9, atol=1e-12)


def test_nothing_is_left_behind():
    model, x = perturbed(timm.create_model("vit_tiny_patch16_224", **VIT)), drawn(2, 3, 32, 32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = (ut.explain(model, x, rule="attention-gradient", target=1).values for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    half = ut.explain(model.bfloat16(), x.bfloat16(), rule="attention-gradient", target=1).values
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.flatten().double(), first.flatten(), dim=0) > 0.9


def swin():
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, patch_size=2, **sizes).double().eval()


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", **VIT)

    def forward(self, x):
        scores = self.vit(x)
        return scores * scores.softmax(-1)


@pytest.mark.parametrize(
    ("call", "error", "line"),
    [
        (lambda x: ut.explain(nn.Flatten(), x, rule=RULES[0], target=0), ut.RuleError, "found no attention"),
        (lambda x: ut.explain(swin(), x, rule=RULES[0], target=0), ut.RuleError, r"as in windows .* rule='attnlrp'"),
        (lambda x: ut.explain(Gated().double().eval(), x, rule=RULES[0], target=0), ut.RuleError, "weighs no values"),
        (lambda x: ut.explain(vit().double(), x, rule=RULES[0], through="hook"), ut.RuleError, "through='graph' alone"),
        (
            lambda x: ut.explain(vit().double(), x, rule=RULES[1], estimator="integrated:2"),
            ut.InputError,
            "is of gradients",
        ),
        (
            lambda x: ut.explain(vit().double(), x, rule="attention-rolout"),
            ut.InputError,
            "did you mean attention-rollout",
        ),
    ],
    ids=["none", "windows", "gate", "hook", "estimator", "name"],
)
def test_refusals(call, error, line):
    with pytest.raises(error, match=line) as caught:
        call(drawn(2, 3, 32, 32))
    assert str(caught.value).isprintable()


def test_across_two_sequences_is_refused():
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = built(lambda: transformers.T5ForConditionalGeneration(config))
    x = {"input_ids": IDS, "decoder_input_ids": IDS[:, :2]}
    with pytest.raises(ut.RuleError, match="across two sequences"):
        ut.explain(model, x, rule=RULES[0], at="encoder.embed_tokens@0", target=ut.targets.token(7))


def test_smoothgrad_averages_them():
    a = ut.explain(vit().double(), drawn(2, 3, 32, 32), rule="attention-gradient", estimator="smoothgrad:2")
    assert a.values.shape == (2, 1, 32, 32)


def test_trust_judges_them():
    verdict = ut.trust(vit(), drawn(1, 3, 32, 32).float(), rule="attention-rollout", samples=19)
    assert verdict.answers["class"].level == "no"  # the map is the same for every class
    assert "convergence" not in verdict.answers
    assert "sends nothing back" in verdict.unanswered["convergence"]


def test_texts_by_attention():
    from tiny_transformers import byte_level

    explained = ut.explain_text(gpt2(), "the cat", tokenizer=byte_level(), rule="attention-rollout")
    values = explained.tokens().values
    assert np.isclose(values.sum(), 1)
    assert (values >= 0).all()
