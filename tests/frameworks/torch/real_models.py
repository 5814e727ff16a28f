"""Real models with random weights, built small from their configurations: how each is called, and what is refused.

`python -m frameworks.torch.real_models`, run in `tests/`, prints `docs/models.md`, which a test holds to this table. A
call stands here as it is written in Python, so that the page shows what the tests run.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undertow.frameworks.torch.zoo.importing import import_torchvision

torchvision = import_torchvision()  # before transformers and timm, which import it

import timm  # noqa: E402
import transformers  # noqa: E402
from torchvision.models.detection.retinanet import RetinaNetHead  # noqa: E402
from torchvision.models.video import resnet as video  # noqa: E402

Names = dict[str, Any]
Score = Callable[[Any], Tensor]
Planes = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Refused:
    """A call that is refused.

    Attributes:
        call: in Python.
        line: the whole message.
        instead: the call that works, which the line leads to.
    """

    call: str
    line: str
    instead: str


@dataclass(frozen=True)
class Also:
    """Another question to the same model.

    Attributes:
        call: in Python; its rule is the gradient unless it says another.
        score: what it explains, of the output as the model returned it.
        at: the layer by whose output it explains, and which of its calls; None for the input.
    """

    call: str
    score: Score
    at: tuple[str, int] | None = None


@dataclass(frozen=True)
class RealModel:
    """A model and what is asked of it.

    Attributes:
        name: with the library it comes from.
        build: makes what the names in the calls stand for; "twin" is the model as the references must have it.
        call: in Python.
        score: what `call` explains, of the output as the model returns it; for the references.
        rewired: how many activations guided acts on; None where there are none, of which `refused` has the line.
        activations: those that `rewired` counts.
        left: activations that a rule leaves alone, of which it warns.
        layers: layers that Grad-CAM is taken of, and their outputs as `(B, channels, *positions)`.
        also: other questions to it.
        refused: calls that are refused.
        warnings: a filter of pytest's, for what the model's own library warns of.
    """

    name: str
    build: Callable[[], Names]
    call: str
    score: Score
    rewired: int | None = None
    activations: str = "relu-like"
    left: str = ""
    layers: tuple[tuple[str, Planes], ...] = ()
    also: tuple[Also, ...] = ()
    refused: tuple[Refused, ...] = ()
    warnings: str = ""


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model in eval mode, of float64: no comparison may depend on how a processor rounds."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double().eval()


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_class(index: int) -> Score:
    return lambda output: getattr(output, "logits", output)[:, index]


IDS = torch.tensor([[5, 9, 31, 2, 17, 40, 8], [3, 3, 12, 44, 6, 0, 0]])
MASK = (IDS > 0).long()


def with_tokens(model: Any) -> Names:
    """A language model, token ids and their embeddings."""
    return {"model": model, "ids": IDS, "mask": MASK, "embeddings": model.get_input_embeddings()(IDS).detach()}


def likeliest_query(logits: Tensor) -> Tensor:
    """Return the highest score of the query that is surest of its class, "no object" aside, of each image."""
    sure = logits.softmax(-1)[..., :-1].amax(-1).argmax(1)
    return logits[torch.arange(len(logits)), sure, :-1].amax(-1)


def with_images(make: Callable[[], nn.Module]) -> Callable[[], Names]:
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:5, 3:7] = True
    return lambda: {"model": built(make), "images": drawn(2, 3, 32, 32), "region": region}


# --- transformers -----------------------------------------------------------------------------------------------------


def bert() -> Names:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=16, num_labels=3)
    return with_tokens(built(lambda: transformers.BertForSequenceClassification(config))) | {
        "transformers": transformers,
        "labels": torch.tensor([0, 2]),
    }


def gpt2() -> Names:
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    return with_tokens(built(lambda: transformers.GPT2LMHeadModel(config)))


def t5() -> Names:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    start = torch.zeros(2, 1, dtype=torch.long)
    return with_tokens(built(lambda: transformers.T5ForConditionalGeneration(config))) | {"start": start}


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    )


def swin() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, window_size=4, num_labels=5))


def segformer() -> nn.Module:
    blocks = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
    patches = {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(**blocks, **patches, decoder_hidden_size=16, num_labels=4)
    )


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6, "num_labels": 4}
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(backbone_config=backbone, d_model=16, **layers, **heads)
    )


def clip() -> Names:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 49}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    texts = torch.tensor([[1, 7, 30, 49, 49], [1, 22, 4, 18, 49], [1, 9, 49, 49, 49]])
    return {"model": built(lambda: transformers.CLIPModel(config)), "texts": texts, "images": drawn(2, 3, 32, 32)}


def wav2vec2() -> Names:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8}
    config = transformers.Wav2Vec2Config(
        **sizes, **convolutions, num_conv_pos_embedding_groups=2, num_labels=3, classifier_proj_size=8
    )
    return {"model": built(lambda: transformers.Wav2Vec2ForSequenceClassification(config)), "waves": drawn(2, 400)}


# --- timm and torchvision ---------------------------------------------------------------------------------------------


def of_timm(name: str, **sizes: Any) -> Callable[[], Names]:
    return with_images(lambda: timm.create_model(name, pretrained=False, num_classes=5, **sizes))


def deeplab() -> nn.Module:
    return torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, aux_loss=True
    )


class Retina(nn.Module):
    """RetinaNet's own head over two levels of features."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 32, 3, 4, 1), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU())
        self.head = RetinaNetHead(in_channels=32, num_anchors=2, num_classes=4, norm_layer=nn.BatchNorm2d)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(images)
        return self.head([fine, self.coarse(fine)])


def video_resnet() -> Names:
    def make() -> nn.Module:
        return video.VideoResNet(
            video.BasicBlock, [video.Conv3DSimple] * 4, [1, 1, 1, 1], video.BasicStem, num_classes=5
        )

    return {"model": built(make), "clips": drawn(2, 3, 4, 16, 16)}


# --- of one's own -----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An LSTM over tokens; the last step is scored, or the mean of those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True, bidirectional=True), nn.Linear(16, 3)

    def forward(self, steps: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.head(self.lstm(steps)[0][:, -1])
        packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(padded.sum(1) / lengths[:, None])


class Siamese(nn.Module):
    """Two images through one trunk: how alike they are."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = small(8)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(self.trunk(a), self.trunk(b))


class GraphNet(nn.Module):
    """Two rounds of messages along edges; a score for each node, or, with `graph`, for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor | None = None) -> Tensor:
        def gathered(h: Tensor) -> Tensor:
            return h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])

        scores = self.second(gathered(self.first(gathered(nodes)).relu()))
        if graph is None:
            return scores
        return scores.new_zeros(int(graph.max()) + 1, 3).index_add(0, graph, scores)


def graph_net() -> Names:
    edges, graph = torch.tensor([[0, 1, 1, 2, 3], [1, 0, 1, 3, 2]]), torch.tensor([0, 0, 1, 1])
    return {"model": built(GraphNet), "nodes": drawn(4, 4), "edges": edges, "graph": graph}


class Detector(nn.Module):
    """Takes a list of images of any sizes and returns a dict for each, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"scores": self.trunk(i[None]).mean((2, 3))[0], "boxes": torch.zeros(5, 4).to(i)} for i in images]


class LowRank(nn.Module):
    """A frozen layer and what fine-tuning adds to it, as in LoRA (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def small(classes: int) -> nn.Sequential:
    convolutions = (nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def traced() -> Names:
    names = with_images(lambda: small(5))()
    return {
        "model": torch.jit.trace(names["model"], names["images"]),
        "twin": names["model"],
        "images": names["images"],
    }


def exported() -> Names:
    names = with_images(lambda: small(5))()
    return {"program": torch.export.export(names["model"], (names["images"],)), "images": names["images"]}


def quantised() -> Names:
    model = built(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    copy = torch.ao.quantization.quantize_dynamic(deepcopy(model).float(), {nn.Linear}, dtype=torch.qint8)
    return {"quantised": copy, "model": model, "x": drawn(4, 6)}


# --- the table --------------------------------------------------------------------------------------------------------


def planes(t: Tensor) -> Tensor:
    return t


def last(t: Tensor) -> Tensor:
    return t.movedim(-1, 1)


def tokens(height: int, width: int, extra: int = 0) -> Planes:
    return lambda t: t[:, extra:].mT.unflatten(2, (height, width))


INTEGERS = "x is torch.int64; a map needs floating point: pass x.float(), or at='LAYER' of embeddings"
NO_SCORES = (
    "; it must be a float tensor, a tuple of them, or have .logits; name the part that holds the scores, as in "
    "output='out', or pass target=lambda output: ... that returns one score for each sample"
)
DENSE = (
    "target 1 names no place in scores of shape (2, 4, 8, 8): pass 3 whole numbers, one for each axis after the batch, "
    "as in (class, y, x), or ut.targets.where(mask, class)"
)


def smooth_only(met: str) -> str:
    return (
        f"rule 'guided' found no activation to rewire between the input and the scores (met: {met}); "
        "activations='all' takes the smooth ones too; rule='gradient' needs none"
    )


def none_at_all(met: str) -> str:
    return (
        f"rule 'guided' found no activation to rewire between the input and the scores (met: {met}); "
        "rule='gradient' needs none"
    )


def guided_refused(call: str, line: str, instead: str = "") -> Refused:
    """Of the guided map in place of the gradient; `instead` is what makes it work."""
    guided = call.replace(', rule="gradient"', "")
    return Refused(guided, line, f"{guided[:-1]}, {instead})" if instead else call)


BERT = 'ut.explain(model, {"inputs_embeds": embeddings, "attention_mask": mask}, target=1, rule="gradient")'
GPT2 = (
    'ut.explain(model, {"inputs_embeds": embeddings, "attention_mask": mask}, '
    'target=lambda out: out.logits[:, -1, 7], rule="gradient")'
)
T5 = (
    'ut.explain(model, {"inputs_embeds": embeddings, "attention_mask": mask, "decoder_input_ids": start}, '
    "target=lambda out: out.logits[:, -1, 7])"
)
IMAGES = "ut.explain(model, images, target=1)"
SMOOTH_IMAGES = 'ut.explain(model, images, target=1, rule="gradient")'
ALL = 'activations="all"'
SEGFORMER = "ut.explain(model, images, target=lambda out: out.logits[:, 1].mean((1, 2)))"
DETR = "ut.explain(model, images, target=lambda out: out.logits[:, 2, 1])"
CLIP = (
    'ut.explain(model, {"pixel_values": images, "input_ids": texts}, output="logits_per_image", target=2, '
    'rule="gradient")'
)
DEEPLAB = 'ut.explain(model, images, output="out", target=lambda out: out[:, 1].mean((1, 2)))'
RETINA = 'ut.explain(model, images, output="cls_logits", target=lambda scores: scores[:, 40, 1])'
LSTM = 'ut.explain(model, (steps, lengths), target=1, rule="gradient")'
SIAMESE = "ut.explain(model, (images, others), target=lambda likeness: likeness)"
EXPORTED = "ut.explain(program.module(), images, target=1)"
DETECTOR = 'ut.explain(model, images, target=lambda out: torch.stack([of["scores"][2] for of in out]))'

REAL_MODELS = [
    RealModel(
        "BERT, classes of a text (transformers)",
        bert,
        BERT,
        of_class(1),
        rewired=2,
        activations="all",
        left="TanhBackward0 x1",
        also=(
            Also(
                'ut.explain(model, {"input_ids": ids, "attention_mask": mask}, at="bert.embeddings", target="LABEL_1", '
                'rule="gradient")',
                of_class(1),
                ("bert.embeddings", 0),
            ),
        ),
        refused=(
            guided_refused(BERT, smooth_only("GeluBackward0 x2, TanhBackward0 x1"), ALL),
            Refused(
                'ut.explain(model, {"input_ids": ids, "attention_mask": mask}, rule="gradient")',
                INTEGERS,
                'ut.explain(model, {"input_ids": ids, "attention_mask": mask}, rule="gradient", at="bert.embeddings")',
            ),
            Refused(
                'ut.explain(model, {"inputs_embeds": embeddings, "labels": labels, "return_dict": False}, '
                'rule="gradient", target=1)',
                "the model returned shape (), not (batch, classes); name another part of it, as in output=1, or pass "
                "target=lambda output: ... that returns one score for each sample",
                'ut.explain(model, {"inputs_embeds": embeddings, "labels": labels, "return_dict": False}, '
                'rule="gradient", target=1, output=1)',
            ),
        ),
    ),
    RealModel(
        "GPT-2, the next token (transformers)",
        gpt2,
        GPT2,
        lambda out: out.logits[:, -1, 7],
        also=(
            Also(
                'ut.explain(model, {"input_ids": ids, "attention_mask": mask}, at="transformer.wte", '
                'target=ut.targets.token(7), rule="gradient")',
                lambda out: out.logits[:, -1, 7],
                ("transformer.wte", 0),
            ),
        ),
        refused=(guided_refused(GPT2, none_at_all("TanhBackward0 x2")),),
    ),
    RealModel(
        "T5, the next token (transformers)",
        t5,
        T5,
        lambda out: out.logits[:, -1, 7],
        rewired=4,
        also=(
            Also(
                'ut.explain(model, {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": start}, '
                'at="encoder.embed_tokens", target=ut.targets.token(7), rule="gradient")',
                lambda out: out.logits[:, -1, 7],
                ("encoder.embed_tokens", 0),
            ),
        ),
    ),
    RealModel(
        "ViT (transformers)",
        with_images(vit),
        SMOOTH_IMAGES,
        of_class(1),
        rewired=2,
        activations="all",
        layers=(("vit.layers.0", tokens(4, 4, 1)),),
        refused=(guided_refused(SMOOTH_IMAGES, smooth_only("GeluBackward0 x2"), ALL),),
    ),
    RealModel(
        "Swin (transformers)",
        with_images(swin),
        SMOOTH_IMAGES,
        of_class(1),
        rewired=2,
        activations="all",
        layers=(("swin.layernorm", tokens(8, 8)),),
        refused=(guided_refused(SMOOTH_IMAGES, smooth_only("GeluBackward0 x2"), ALL),),
    ),
    RealModel(
        "Segformer (transformers)",
        with_images(segformer),
        SEGFORMER,
        lambda out: out.logits[:, 1].mean((1, 2)),
        rewired=1,
        left="GeluBackward0 x2",
        layers=(("decode_head.linear_fuse", planes),),
        also=(
            Also(
                "ut.explain(model, images, target=ut.targets.where(region, 1))",
                lambda out: out.logits[:, 1, 2:5, 3:7],
            ),
            Also("ut.explain(model, images, target=(1, 4, 4))", lambda out: out.logits[:, 1, 4, 4]),
        ),
        refused=(Refused(IMAGES, DENSE, "ut.explain(model, images, rule='gradient', target=(1, 4, 4))"),),
    ),
    RealModel(
        "DETR, a query's class (transformers)",
        with_images(detr),
        DETR,
        lambda out: out.logits[:, 2, 1],
        rewired=7,
        layers=(("model.input_projection", planes),),
        also=(
            Also(
                "ut.explain(model, images, target=ut.targets.box())",
                lambda out: likeliest_query(out.logits),
            ),
            Also(
                'ut.explain(model, images, output="pred_boxes", target=(2, 0), head="as is")',
                lambda out: out.pred_boxes[:, 2, 0],
            ),
        ),
    ),
    RealModel(
        "CLIP, an image among texts (transformers)",
        clip,
        CLIP,
        lambda out: out.logits_per_image[:, 2],
        layers=(("vision_model.encoder.layers.0", tokens(4, 4, 1)),),
        also=(
            Also(
                'ut.explain(model, {"pixel_values": images, "input_ids": texts}, output="logits_per_text", target=1, '
                'at="text_model.embeddings", rule="gradient")',
                lambda out: out.logits_per_text[:, 1],
                ("text_model.embeddings", 0),
            ),
        ),
        refused=(
            guided_refused(CLIP, none_at_all("SigmoidBackward0 x2")),
            Refused(
                'ut.explain(model, {"pixel_values": images, "input_ids": texts})',
                "the model returned a CLIPOutput of logits_per_image, logits_per_text, text_embeds, image_embeds, "
                f"text_model_output, vision_model_output{NO_SCORES}",
                CLIP,
            ),
            Refused(
                f'{CLIP[:-1]}, estimator="grad-cam:text_model.encoder.layers.0")',
                "layer 'text_model.encoder.layers.0' is not on the way from x to the scores, or returns no tensor",
                f'{CLIP[:-1]}, estimator="grad-cam:vision_model.encoder.layers.0")',
            ),
        ),
    ),
    RealModel(
        "wav2vec2 (transformers)",
        wav2vec2,
        'ut.explain(model, waves, target=1, rule="gradient")',
        of_class(1),
        rewired=5,
        activations="all",
        layers=(("wav2vec2.feature_extractor.conv_layers.1", planes),),
    ),
    RealModel(
        "ViT (timm)",
        of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2),
        SMOOTH_IMAGES,
        of_class(1),
        rewired=2,
        activations="all",
        layers=(("blocks.0", tokens(4, 4, 1)),),
    ),
    RealModel(
        "Swin (timm)",
        of_timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=8,
            depths=(1, 1),
            num_heads=(1, 2),
        ),
        SMOOTH_IMAGES,
        of_class(1),
        rewired=2,
        activations="all",
        layers=(("layers.0", last), ("layers.1", last)),
    ),
    RealModel(
        "ConvNeXt (timm)",
        of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        SMOOTH_IMAGES,
        of_class(1),
        rewired=4,
        activations="all",
        layers=(("stages.1", planes),),
    ),
    RealModel(
        "MobileNetV3 (timm)",
        of_timm("mobilenetv3_small_050"),
        IMAGES,
        of_class(1),
        rewired=14,
        left="HardsigmoidBackward0 x9, HardswishBackward0 x19",
        layers=(("blocks.1", planes),),
    ),
    RealModel(
        "DeepLabV3 (torchvision)",
        with_images(deeplab),
        DEEPLAB,
        lambda out: out["out"][:, 1].mean((1, 2)),
        rewired=26,
        left="HardsigmoidBackward0 x8, HardswishBackward0 x20",
        layers=(("backbone.1", planes), ("classifier.0", planes)),
        also=(Also('ut.explain(model, images, output="out", target=(1, 9, 20))', lambda out: out["out"][:, 1, 9, 20]),),
        refused=(
            Refused("ut.explain(model, images)", f"the model returned an OrderedDict of out, aux{NO_SCORES}", DEEPLAB),
        ),
    ),
    RealModel(
        "RetinaNet's head (torchvision)",
        with_images(Retina),
        RETINA,
        lambda out: out["cls_logits"][:, 40, 1],
        rewired=10,
        layers=(("fine", planes),),
        also=(
            Also(
                'ut.explain(model, images, output="cls_logits", target=(40, 1))',
                lambda out: out["cls_logits"][:, 40, 1],
            ),
        ),
    ),
    RealModel(
        "ResNet of videos (torchvision)",
        video_resnet,
        "ut.explain(model, clips, target=1)",
        of_class(1),
        rewired=9,
        layers=(("layer1", planes), ("layer2", planes)),
    ),
    RealModel(
        "GoogLeNet (torchvision)",
        with_images(lambda: torchvision.models.googlenet(weights=None, init_weights=False, num_classes=5)),
        IMAGES,
        of_class(1),
        rewired=57,
        layers=(("conv2", planes),),
    ),
    RealModel(
        "LSTM over steps",
        lambda: {"model": built(Classifier), "steps": drawn(2, 5, 6), "lengths": torch.tensor([5, 3])},
        LSTM,
        of_class(1),
        refused=(guided_refused(LSTM, none_at_all("SigmoidBackward0 x30, TanhBackward0 x20")),),
    ),
    RealModel(
        "siamese net",
        lambda: {"model": built(Siamese), "images": drawn(2, 3, 32, 32), "others": drawn(2, 3, 32, 32, seed=6)},
        SIAMESE,
        lambda out: out,
        rewired=4,
        refused=(
            Refused(
                "ut.explain(model, (images, others))",
                "the model returned shape (2,) for a batch of 2, not (2, classes); pass target=lambda output: ... that "
                "returns one score for each sample",
                SIAMESE,
            ),
        ),
    ),
    RealModel("graph net, graphs", graph_net, "ut.explain(model, (nodes, edges, graph), target=1)", of_class(1), 1),
    RealModel(
        "graph net, a node",
        graph_net,
        "ut.explain(model, (nodes, edges), target=lambda scores: scores[3:4, 1])",
        lambda out: out[3, 1],
        1,
    ),
    RealModel(
        "graph net, edges closed over",
        graph_net,
        "ut.explain(lambda nodes: model(nodes, edges), nodes, target=1)",
        of_class(1),
        1,
    ),
    RealModel(
        "detector of a list of images",
        lambda: {"model": built(Detector), "images": [drawn(3, 12, 10), drawn(3, 9, 14, seed=6)], "torch": torch},
        DETECTOR,
        lambda out: out[0]["scores"][2] + out[1]["scores"][2],
        rewired=2,
        also=(
            Also(
                "ut.explain(model, images, target=ut.targets.box(2))",
                lambda out: out[0]["scores"][2] + out[1]["scores"][2],
            ),
        ),
        refused=(Refused("ut.explain(model, images)", f"the model returned a list of 2{NO_SCORES}", DETECTOR),),
    ),
    RealModel(
        "traced network (TorchScript)",
        traced,
        IMAGES,
        of_class(1),
        rewired=2,
        warnings="ignore:`torch.jit:DeprecationWarning",
    ),
    RealModel(
        "exported network (torch.export)",
        exported,
        EXPORTED,
        of_class(1),
        rewired=2,
        refused=(
            Refused(
                "ut.explain(program, images, target=1)",
                "an ExportedProgram cannot be called; pass its module, as in program.module()",
                EXPORTED,
            ),
        ),
    ),
    RealModel(
        "DataParallel",
        with_images(lambda: nn.DataParallel(small(5))),
        IMAGES,
        of_class(1),
        rewired=2,
        layers=(("module.3", planes),),
    ),
    RealModel(
        "LoRA on frozen layers",
        lambda: {
            "model": built(lambda: nn.Sequential(LowRank(nn.Linear(6, 8)), nn.ReLU(), LowRank(nn.Linear(8, 3)))),
            "x": drawn(4, 6),
        },
        "ut.explain(model, x, target=1)",
        of_class(1),
        rewired=1,
    ),
    RealModel(
        "quantised network (int8)",
        quantised,
        "ut.explain(model, x, target=1)",
        of_class(1),
        rewired=1,
        refused=(
            Refused(
                "ut.explain(quantised, x.float(), target=1)",
                "the gradient of the scores does not reach input 0: it ends in '0' (no_grad, detach, .item(), "
                "quantised weights or whole numbers)",
                "ut.explain(model, x, target=1)",
            ),
        ),
        warnings="ignore",
    ),
]


def page() -> str:
    """Return `docs/models.md`."""
    models = [f"| {m.name} | `{m.call}` | {_guided(m)} | {_layers(m)} |" for m in REAL_MODELS]
    also = [f"| {m.name} | `{a.call}` |" for m in REAL_MODELS for a in m.also]
    refused = [f"| {m.name} | `{r.call}` | {r.line} | `{r.instead}` |" for m in REAL_MODELS for r in m.refused]
    return "\n".join([*HEAD, *models, *ALSO, *also, *REFUSED, *refused, ""])


HEAD = (
    "# Models",
    "",
    "How models that people use are called, and what becomes of it. They are built small from their configurations,",
    "with random weights. The tests run each call as it stands, and with other rules and estimators: gradient, guided,",
    "deconvnet, SmoothGrad and the Grad-CAM of the layers named equal maps that are not undertow's (autograd's own,",
    "activations replaced by hand). This page is printed from `tests/frameworks/torch/real_models.py`.",
    "",
    "| model | called as | activations that guided rewires | Grad-CAM of |",
    "|---|---|---|---|",
)
ALSO = (
    "",
    "## Other questions: tokens, places, boxes, layers",
    "",
    "| model | called as |",
    "|---|---|",
)
REFUSED = (
    "",
    "## Refused, in one line",
    "",
    "| model | call | the line | instead |",
    "|---|---|---|---|",
)


def _guided(model: RealModel) -> str:
    if model.rewired is None:
        return "none: refused"
    rewired = f"{model.rewired}" + (', with `activations="all"`' if model.activations == "all" else "")
    return rewired + (f"; a warning that these are left alone: {model.left}" if model.left else "")


def _layers(model: RealModel) -> str:
    return ", ".join(f"`{name}`" for name, _ in model.layers)


if __name__ == "__main__":
    print(page(), end="")
