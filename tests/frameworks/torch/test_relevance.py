"""AttnLRP and CP-LRP on models as they are, against twins that replace functions and walk no graph."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import undertow as ut
from frameworks.torch import real_models
from frameworks.torch.real_models import built, drawn, of_class, timm, torchvision, transformers
from frameworks.torch.relevance_twins import relevance
from undertow.frameworks.torch.explain.notes import ForwardNotes

pytestmark = pytest.mark.filterwarnings("ignore:.*left alone on the way:undertow.UndertowWarning")
RULES = ("attnlrp", "cp-lrp")


def vision(make, size=32):
    return lambda: (built(make), drawn(2, 3, size, size), of_class(1), 1)


def from_timm(name, size=32, **sizes):
    return vision(lambda: timm.create_model(name, pretrained=False, num_classes=5, **sizes), size)


def language(make, **others):
    """A model from embeddings, the next token's score after the last of them."""

    def build():
        names = real_models.with_tokens(built(make))
        x = {"inputs_embeds": names["embeddings"], "attention_mask": torch.ones_like(names["mask"]), **others}
        return names["model"], x, lambda output: output.logits[:, -1, 7], ut.targets.token(7)

    return build


def bert():
    names = real_models.bert()
    x = {"inputs_embeds": names["embeddings"], "attention_mask": names["mask"]}
    return names["model"], x, of_class(1), 1


def t5():
    names = real_models.t5()
    x = {"inputs_embeds": names["embeddings"], "decoder_input_ids": names["start"]}
    return names["model"], x, lambda output: output.logits[:, -1, 7], ut.targets.token(7)


def clip():
    names = real_models.clip()
    x = {"pixel_values": names["images"], "input_ids": names["texts"]}
    return names["model"], x, lambda output: output.logits_per_image[:, 1], lambda output: output.logits_per_image[:, 1]


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def from_transformers(name, task, **more):
    config = getattr(transformers, f"{name}Config")(**sizes(), **SPECIAL, intermediate_size=32, **more)
    return getattr(transformers, f"{name}For{task}")(config)


def causal(name, **more):
    """A causal language model of transformers, by the stem of its classes."""
    return language(lambda: from_transformers(name, "CausalLM", num_key_value_heads=1, **more))


def classifier(name, **more):
    """A text classifier of transformers, from embeddings."""

    def build():
        model = built(lambda: from_transformers(name, "SequenceClassification", num_labels=3, **more))
        names = real_models.with_tokens(model)
        return model, {"inputs_embeds": names["embeddings"], "attention_mask": names["mask"]}, of_class(1), 1

    return build


def sizes(**more):
    return {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | more


def gpt2(**more):
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, **more)
    return transformers.GPT2LMHeadModel(config)


def torchvision_vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
MODELS = {
    "timm ViT": from_timm("vit_tiny_patch16_224", **VIT),
    "timm DeiT": from_timm("deit_tiny_patch16_224", **VIT),
    "timm Swin": from_timm(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2)
    ),
    "timm ConvNeXt": from_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "torchvision ViT": vision(torchvision_vit),
    "ViT": vision(real_models.vit),
    "BERT": bert,
    "GPT-2": language(gpt2),
    "GPT-2, eager": language(lambda: gpt2(attn_implementation="eager")),
    "Llama": causal("Llama"),
    "Mistral": causal("Mistral", head_dim=8, sliding_window=3),
    "Gemma": causal("Gemma", head_dim=8),
    "Qwen2": causal("Qwen2"),
    "Qwen3": causal("Qwen3", head_dim=8),
    "Phi3": causal("Phi3"),
    "DeBERTa": classifier("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "ModernBERT": classifier("ModernBert"),
    "T5": t5,
    "CLIP": clip,
    "timm Swin V2": from_timm(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    ),
    "timm ConvNeXt V2": from_timm("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "timm EVA-02": from_timm("eva02_tiny_patch14_224", img_size=28, embed_dim=16, depth=2, num_heads=2, size=28),
    "timm CaiT": from_timm("cait_xxs24_224", **VIT),
    "timm XCiT": from_timm("xcit_nano_12_p16_224", img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2),
    "timm MobileNetV3": from_timm("mobilenetv3_small_050"),
}


def perturbed(model: nn.Module) -> nn.Module:
    """Draw what initialisation leaves at 0 or 1, so that no weight is idle."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1 or not p.any():
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def distance(values, wanted) -> float:
    return float((values - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_an_unmodified_model_equals_the_twin(name, rule):
    model, x, score, target = MODELS[name]()
    perturbed(model)
    a = ut.explain(model, x, rule=rule, target=target)
    values = a.values if isinstance(x, torch.Tensor) else a.values[next(iter(x))]
    assert distance(values, relevance(model, x, score, rule)) < 1e-12
    assert a.skipped == a.opaque == {}
    assert a.rewired > 4


@pytest.mark.parametrize("name", ["timm ViT", "Llama"])
def test_in_single_precision_it_is_the_same_map(name):
    model, x, score, target = MODELS[name]()
    perturbed(model)
    wide = relevance(model, x, score, "attnlrp")
    first = None if isinstance(x, torch.Tensor) else next(iter(x))
    narrow = x.float() if first is None else {**x, first: x[first].float()}
    a = ut.explain(model.float(), narrow, rule="attnlrp", target=target)
    values = a.values if first is None else a.values[first]
    assert values.dtype == torch.float32
    assert distance(values.double(), wide) < 1e-5


def test_token_ids_at_their_embeddings_are_the_embeddings_themselves():
    model, x, _, target = MODELS["Llama"]()
    ids, layer = {"input_ids": real_models.IDS, "attention_mask": x["attention_mask"]}, "model.embed_tokens"
    a = ut.explain(model, ids, rule="attnlrp", target=target, at=layer)
    b = ut.explain(model, x, rule="attnlrp", target=target)
    assert distance(a.values, b.values["inputs_embeds"]) < 1e-12
    assert torch.tensor(a.conservation).allclose(torch.tensor(b.conservation))


def test_a_token_bears_no_label_of_a_classifier():
    model = gpt2().eval()  # its configuration names two classes, as every one does
    options = {"rule": "gradient", "at": "transformer.wte", "target": ut.targets.token(1)}
    assert ut.explain(model, {"input_ids": torch.tensor([[5, 9, 31]])}, **options).names == {}


def test_several_targets_are_each_ones_own_map():
    model, x, *_ = MODELS["timm ViT"]()
    several = ut.explain(model, x, rule="attnlrp", target=[[0, 3], [2, 1]])
    for k, ids in enumerate(([0, 2], [3, 1])):
        assert distance(several.values[:, k], ut.explain(model, x, rule="attnlrp", target=ids).values) < 1e-12
    assert several.conservation.shape == (2, 2)


WRITTEN_OUT = {
    "tanh-GELU": (
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    ),
    "tanh-GELU, by products": (
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda x: x * 0.5 * (torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)) + 1),
    ),
    "erf-GELU": (nn.functional.gelu, lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5))),
    "SiLU": (nn.functional.silu, lambda x: x * torch.sigmoid(x)),
    "SiLU, by exp": (nn.functional.silu, lambda x: x / (1 + torch.exp(-x))),
    "SiLU of a sum": (
        lambda x: nn.functional.silu(x + x.flip(-1)),
        lambda x: _silu_of(x + x.flip(-1)),
    ),
    "Mish": (nn.functional.mish, lambda x: x * torch.tanh(nn.functional.softplus(x))),
    "layer norm": (
        lambda x: nn.functional.layer_norm(x, (6,)),
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt(),
    ),
    "layer norm, by products": (
        lambda x: nn.functional.layer_norm(x, (6,)),
        lambda x: (x - x.mean(-1, keepdim=True)) * _inverse_spread(x - x.mean(-1, keepdim=True)),
    ),
    "layer norm, by two means": (
        lambda x: nn.functional.layer_norm(x, (6,)),
        lambda x: (x - x.mean(-1, True)) * ((x * x).mean(-1, True) - x.mean(-1, True) ** 2 + 1e-5).rsqrt(),
    ),
    "RMS norm": (
        lambda x: nn.functional.rms_norm(x, (6,), eps=1e-6),
        lambda x: x / (x.pow(2).mean(-1, True) + 1e-6) ** 0.5,
    ),
    "unit length": (nn.functional.normalize, lambda x: x / x.pow(2).sum(1, keepdim=True).sqrt()),
    "softmax": (lambda x: x.softmax(-1), lambda x: _softmax(x)),
    "softmax, by its logarithm": (lambda x: x.softmax(-1), lambda x: x.log_softmax(-1).exp()),
    "softmax, by the sum's logarithm": (lambda x: x.softmax(-1), lambda x: (x - x.logsumexp(-1, True)).exp()),
}


def _silu_of(h):
    return h * h.sigmoid()


def _inverse_spread(centred):
    return torch.rsqrt((centred**2).mean(-1, keepdim=True) + 1e-5)


def _softmax(x):
    e = torch.exp(x - x.max(-1, keepdim=True).values.detach())
    return e / e.sum(-1, keepdim=True)


class Around(nn.Module):
    """An operation between two linear layers, and a GELU."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.first, self.last = operation, nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(nn.functional.gelu(self.operation(self.first(x))))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_what_is_written_out_counts_as_the_one_operation_that_it_is(name, rule):
    maps = [
        ut.explain(built(lambda op=op: Around(op)), drawn(2, 6), rule=rule, target=[[0], [2]])
        for op in WRITTEN_OUT[name]
    ]
    nothing_passes = rule == "cp-lrp" and name.startswith("softmax")
    assert distance(maps[1].values, maps[0].values) < 1e-12 or nothing_passes
    assert maps[1].skipped == {}
    if nothing_passes:
        assert not maps[0].values.any()
        assert not maps[1].values.any()


def test_an_input_that_an_in_place_tanh_overwrites_is_noted_before():
    a, b = (
        ut.explain(built(lambda op=op: Around(op)), drawn(2, 6), rule="attnlrp") for op in (torch.tanh, torch.tanh_)
    )
    assert torch.equal(a.values, b.values)


def test_zeros_before_an_activation_have_its_own_slope():
    x = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    for silu in (nn.functional.silu, lambda x: x * x.sigmoid()):
        halved = ut.Rule({"smooth": ut.rules.identity}, name="slopes")
        a = ut.explain(lambda x, f=silu: f(x).sum(1, keepdim=True), x, rule=halved, target=0)
        assert a.values.tolist() == [[0.5, torch.sigmoid(x[0, 1]).item()]]


def test_the_short_way_of_halving_is_the_general_one():
    model, x, *_ = MODELS["timm ViT"]()
    rows = {**ut.rules.ATTNLRP.rows, **dict.fromkeys(("product", "matmul"), lambda g, local, op: local(g / 2))}
    general = ut.explain(model, x, rule=ut.Rule(rows, values="input-times"))
    assert torch.equal(general.values, ut.explain(model, x, rule="attnlrp").values)


@pytest.mark.parametrize("f", [nn.functional.silu, lambda x: x * x.sigmoid()], ids=["one node", "written out"])
def test_a_row_may_call_local_twice(f):
    x = drawn(2, 4)
    weights = torch.tensor([1.0, -2.0, 3.0, -0.5], dtype=torch.float64)

    def split(g, local, op):
        return local(g.clamp(min=0)) - 0.5 * local(g.clamp(max=0))

    a = ut.explain(f, x, rule=ut.Rule({"smooth": split}), target=lambda y: (y * weights).sum(1))
    slope = x.sigmoid() * (1 + x * (1 - x.sigmoid()))
    assert a.values.allclose(slope * (weights.clamp(min=0) - 0.5 * weights.clamp(max=0)), rtol=1e-12)


class BiasFree(nn.Module):
    """Attention and a gated layer, with nothing that could absorb relevance."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)
        self.gate, self.up, self.down = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        q, k, v = self.qkv(nn.functional.rms_norm(x, (8,))).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return (x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))).mean(1)


def test_cp_lrp_conserves_the_score_where_there_is_no_bias():
    a = ut.explain(built(BiasFree), drawn(2, 5, 8), rule="cp-lrp", target=[[0, 3], [1, 2]])
    assert torch.tensor(a.conservation).sub(1).abs().max() < 1e-12


def test_cp_lrp_conserves_the_score_at_the_layers_of_a_llama():
    model, x, _, target = MODELS["Llama"]()  # which has no bias
    ids = {"input_ids": real_models.IDS, "attention_mask": x["attention_mask"]}
    at = ["model.embed_tokens", "model.layers.0"]
    layers = ut.explain(model, ids, rule="cp-lrp", target=target, at=at)
    assert len(layers.conservation) == 2
    for conserved in layers.conservation.values():
        assert torch.tensor(conserved).sub(1).abs().max() < 1e-5  # its norms are in float32


@pytest.mark.filterwarnings("ignore:.*grouped_mm.*")
def test_cp_lrp_conserves_the_score_of_a_mixture_of_experts():
    model = built(lambda: from_transformers("Mixtral", "CausalLM", num_local_experts=3, num_key_value_heads=1)).float()
    perturbed(model)
    embeddings = model.get_input_embeddings()(real_models.IDS).detach()
    for kernels in ("grouped_mm", "eager"):
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation(kernels)
        a = ut.explain(model, {"inputs_embeds": embeddings}, rule="cp-lrp", target=ut.targets.token(7))
        assert torch.tensor(a.conservation).sub(1).abs().max() < 1e-5


class WithoutSoftmax(nn.Module):
    """Norms, a gated layer and activations through zero, with nothing that could absorb relevance."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.up, self.down = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(8, bias=False)

    def forward(self, x):
        x = self.first(self.norm(x)).tanh()
        return (x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))).mean(1)


@pytest.mark.parametrize("rule", RULES)
def test_without_softmax_and_bias_attnlrp_conserves_the_score_at_every_layer(rule):
    net, x = built(WithoutSoftmax), drawn(2, 5, 8)
    assert torch.tensor(ut.explain(net, x, rule=rule, target=[[0, 3], [1, 2]]).conservation).sub(1).abs().max() < 1e-12
    layers = ut.explain(net, x, rule=rule, target=[[0, 3], [1, 2]], at=["norm", "first"])
    for conserved in layers.conservation.values():
        assert torch.tensor(conserved).sub(1).abs().max() < 1e-12


def test_refusals_are_one_line_with_a_remedy():
    model, x, *_ = MODELS["timm ViT"]()
    for options, line in (
        ({"through": "swap"}, "through='graph' alone"),
        ({"through": "hook"}, "through='graph' alone"),
        ({"estimator": "integrated"}, "take estimator='gradient'"),
        ({"estimator": "input-times"}, "take estimator='gradient'"),
    ):
        with pytest.raises(ut.UndertowError, match=line) as refused:
            ut.explain(model, x, rule="attnlrp", **options)
        assert "\n" not in str(refused.value)
    with pytest.raises(ut.RuleError, match="found no operation of its kinds"):
        ut.explain(nn.Linear(4, 2), drawn(1, 4).float(), rule=ut.Rule({"attention": lambda g, local, op: local(g)}))
    with pytest.raises(ut.InputError, match="did you mean product"):
        ut.Rule({"prodct": lambda g, local, op: g})


def test_what_is_not_known_is_listed_and_passed():
    net = built(lambda: Around(lambda x: x.cumprod(-1)))
    with pytest.warns(ut.UndertowWarning, match="CumprodBackward0"):
        a = ut.explain(net, drawn(2, 6), rule=ut.Rule({"linear": lambda g, local, op: local(g)}, name="linear"))
    assert a.skipped == {"CumprodBackward0": 1}


def test_threads_do_not_meet():
    model, x, *_ = MODELS["timm ViT"]()
    wanted = [ut.explain(model, x, rule="attnlrp", target=k).values for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(lambda k: ut.explain(model, x, rule="attnlrp", target=k % 4).values, range(12)))
    assert all(torch.equal(values, wanted[k % 4]) for k, values in enumerate(maps))


def test_nothing_of_a_call_stays_behind():
    model, x, *_ = MODELS["BERT"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ut.explain(model, x, rule="attnlrp", target=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    kept = [t for t in gc.get_objects() if type(t) is ForwardNotes and t._notes]
    assert kept == []


def test_traced_and_exported_modules_are_the_same_to_it():
    model, x = built(BiasFree), drawn(2, 5, 8)
    wanted = ut.explain(model, x, rule="attnlrp", target=1).values
    with pytest.warns(DeprecationWarning, match="trace"):
        traced = torch.jit.trace(model, x)
    for made in (traced, torch.export.export(model, (x,)).module()):
        assert distance(ut.explain(made, x, rule="attnlrp", target=1).values, wanted) < 1e-12


class Gated(nn.Module):
    """Activations of several kinds, each called once as a module, and a product of two of them."""

    def __init__(self, gated=True):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Linear(64, 8), nn.Linear(64, 8)
        self.act, self.smooth, self.sigmoid, self.head = nn.ReLU(), nn.ELU(), nn.Sigmoid(), nn.Linear(8, 3)
        self.gated = gated

    def forward(self, x):
        h = self.act(self.a(x)).flatten(1)
        h = self.smooth(self.b(h)) * (self.sigmoid(self.c(h)) if self.gated else 1)
        return self.head(h)


def test_deeplift_equals_captums_where_captum_can():
    captum = pytest.importorskip("captum.attr")
    net, x, baseline = built(lambda: Gated(gated=False)), drawn(2, 3, 6, 6), drawn(2, 3, 6, 6, seed=9)
    with pytest.warns(UserWarning, match="hooks|required_grads"):
        wanted = captum.DeepLift(net, eps=1e-6).attribute(x.clone().requires_grad_(), baseline, target=1)
    a = ut.explain(net, x, rule="deeplift", baseline=baseline, target=1)
    assert distance(a.values, wanted.detach()) < 1e-10


@pytest.mark.parametrize("baseline", ["zero", 0.5, ["zero", 1.0]])
def test_deeplift_accounts_for_the_whole_difference(baseline):
    net, x = built(Gated), drawn(2, 3, 6, 6)
    a = ut.explain(net, x, rule="deeplift", baseline=baseline, target=[[0, 1], [2, 0]])
    assert torch.tensor(a.completeness).abs().max() < 1e-10
    starts = {"zero": [0.0], 0.5: [0.5]}.get(baseline if isinstance(baseline, str | float) else "", [0.0, 1.0])
    with torch.no_grad():
        difference = net(x) - sum(net(torch.full_like(x, start)) for start in starts) / len(starts)
    assert torch.allclose(a.values[0, 1].sum(), difference[0, 1], rtol=1e-10)
    assert a.conservation is None
    with pytest.raises(ut.InputError, match="leave estimator='smoothgrad' out"):
        ut.explain(net, x, rule="deeplift", estimator="smoothgrad:2")


def test_deeplift_says_that_a_model_is_for_one_size_of_batch():
    net, x = built(Gated), drawn(2, 3, 6, 6)
    exported = torch.export.export(net, (x,)).module()
    with pytest.raises(ut.InputError, match=r"with 4 samples for 2 the model fails .*dynamic_shapes"):
        ut.explain(exported, x, rule="deeplift", target=1)
    any_batch = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    wanted = ut.explain(net, x, rule="deeplift", target=1).values
    assert distance(ut.explain(any_batch, x, rule="deeplift", target=1).values, wanted) < 1e-12


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, of run_decompositions
def test_exported_and_decomposed_transformers_are_the_same_to_it():
    model, x, _, target = MODELS["timm ViT"]()
    perturbed(model)
    exported = torch.export.export(model, (x,))
    for rule in RULES:
        wanted = ut.explain(model, x, rule=rule, target=target).values
        for made in (exported, exported.run_decompositions()):
            assert distance(ut.explain(made.module(), x, rule=rule, target=target).values, wanted) < 1e-12
