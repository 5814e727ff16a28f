"""Maps at the patches of vision transformers, laid back over the image."""

import numpy as np
import pytest
import torch

import undertow as ut
from frameworks.torch.real_models import drawn, timm, torchvision
from tiny_transformers import transformers, vit

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def timm_vit(name="vit_tiny_patch16_224", **more):
    return timm.create_model(name, **VIT | more).double().eval()


def swin():
    sizes = {"window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "patch_size": 2}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, img_size=32, **sizes).double().eval()


def registers():
    config = transformers.Dinov2WithRegistersConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_register_tokens=4
    )
    return transformers.Dinov2WithRegistersForImageClassification(config).double().eval()


def torchvision_vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 32, num_classes=5).double().eval()


PLACES = {
    "timm, patches": (timm_vit, "patch_embed", 0, (4, 4)),
    "timm, tokens": (timm_vit, "pos_drop", 1, (4, 4)),
    "timm, a block": (timm_vit, "blocks.0", 1, (4, 4)),
    "DeiT, two extra tokens": (lambda: timm_vit("deit_tiny_distilled_patch16_224"), "blocks.0", 2, (4, 4)),
    "timm, four registers": (lambda: timm_vit("vit_tiny_patch16_224", reg_tokens=4), "blocks.0", 5, (4, 4)),
    "no class token": (lambda: timm_vit(class_token=False, global_pool="avg"), "blocks.0", 0, (4, 4)),
    "torchvision, patches": (torchvision_vit, "conv_proj", 0, (4, 4)),
    "torchvision, a block": (torchvision_vit, "encoder.layers.encoder_layer_0", 1, (4, 4)),
    "transformers": (lambda: vit().double(), "vit.embeddings", 1, (4, 4)),
    "transformers, registers": (registers, "dinov2_with_registers.embeddings", 5, (4, 4)),
    "Swin, (B, H, W, C)": (swin, "layers.0", 0, (16, 16)),
    "Swin, smaller": (swin, "layers.1", 0, (8, 8)),
}


def blocks_of(values, extra, grid, is_first):
    """Each patch's sum over its features, in a loop, blown up to its rectangle."""
    tokens = values.reshape(values.shape[0], -1).T if is_first else values.reshape(-1, values.shape[-1])
    side = 32 // grid[0]
    expected = np.zeros((32, 32))
    for i in range(grid[0]):
        for j in range(grid[1]):
            own = tokens[extra + i * grid[1] + j].sum()
            expected[i * side : (i + 1) * side, j * side : (j + 1) * side] = own
    return expected


@pytest.mark.parametrize("name", PLACES)
def test_patches_lie_where_they_were_cut(name):
    make, layer, extra, grid = PLACES[name]
    x = drawn(2, 3, 32, 32)
    axes = "btc" if layer == "pos_drop" else None  # it has no weights, and 24 may be 16 and 8 extra ones
    a = ut.explain(make(), x, rule="attnlrp", at=layer, target="top:2", axes=axes)
    values = a.values[1, 1].numpy()
    is_first = layer == "conv_proj"
    assert np.allclose(a.map(1, 1)[0], blocks_of(values, extra, grid, is_first), rtol=1e-5)
    assert a.map(1, 1).shape == (1, 32, 32)
    assert a.image(1, 1, "signed").size == (32, 32)
    assert a.overlay(np.zeros((32, 32, 3), np.uint8), 1, 1).size == (32, 32)
    assert "<img" in a._repr_html_()


def test_a_wide_image_has_a_wide_grid():
    model = timm.create_model("vit_tiny_patch16_224", **VIT | {"img_size": (32, 48)}).double().eval()
    a = ut.explain(model, drawn(1, 3, 32, 48), rule="gradient", at="blocks.0", target=0)
    assert a.layout.grid == (4, 6)
    norms = a.values[0, 1:].square().sum(-1).sqrt().reshape(4, 6).numpy()
    assert np.allclose(a.map()[0, ::8, ::8], norms, rtol=1e-5)


def test_units_decide_between_sum_and_length():
    model, x = timm_vit(), drawn(1, 3, 32, 32)
    a = ut.explain(model, x, rule="gradient", estimator="input-times", at="patch_embed", target=0)
    assert np.allclose(a.map()[0, ::8, ::8].ravel(), a.values[0].sum(-1).numpy(), rtol=1e-5)
    a = ut.explain(model, x, rule="gradient", estimator="integrated:4", at="patch_embed", target=0)
    assert np.allclose(a.map()[0, ::8, ::8].ravel(), a.values[0].sum(-1).numpy(), rtol=1e-5)


def test_a_convolutional_layer_lies_over_the_image_too():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1280, 3)
    )
    a = ut.explain(model.eval(), drawn(1, 3, 32, 32).float(), rule="lrp:epsilon", at="1", target=0)
    assert np.allclose(a.map()[0, ::2, ::2], a.values[0].sum(0).numpy(), rtol=1e-4, atol=1e-7)


def test_where_the_grid_cannot_be_told_it_is_asked_for():
    class Pooled(torch.nn.Module):
        """20 tokens: 10 extra ones, then 2 by 5 of patches that are no squares."""

        def __init__(self):
            super().__init__()
            self.tokens = torch.nn.Linear(3 * 32 * 32, 20 * 6)
            self.shape = torch.nn.Unflatten(1, (20, 6))
            self.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(120, 3))

        def forward(self, x):
            return self.head(self.shape(self.tokens(x.flatten(1))))

    model, x = Pooled().double().eval(), drawn(1, 3, 32, 32)
    a = ut.explain(model, x, rule="gradient", at="shape", target=0)
    assert a.layout is None
    with pytest.raises(ut.InputError, match=r"'shape' gives .* cannot be told|no grid of square patches"):
        a.map()
    values = a.map(grid=(2, 5))
    norms = a.values[0, 10:].square().sum(-1).sqrt().reshape(2, 5).numpy()
    assert np.allclose(values[0, ::16, ::7][:, :5], norms, rtol=1e-5)
    with pytest.raises(ut.InputError, match="no place among 20 tokens"):
        a.map(grid=(5, 5))
    with pytest.raises(ut.InputError, match="there is no sample 1"):
        a.map(1, grid=(2, 5))
    with pytest.raises(ut.InputError, match="leave it out"):
        ut.explain(model, x, rule="gradient", target=0).map(grid=(2, 5))


def test_axes_are_told_where_sizes_do_not_tell():
    model, x = timm_vit(embed_dim=16), drawn(1, 3, 32, 32)  # 17 tokens of 16 features, or 16 of 17
    a = ut.explain(model, x, rule="gradient", at="blocks.0", target=0)
    assert a.layout.channel_axis == -1  # its modules tell
    told = ut.explain(model, x, rule="gradient", at="blocks.0", target=0, axes="btc")
    assert np.array_equal(told.map(), a.map())
    with pytest.raises(ut.InputError, match="axes 'bxy' are not understood"):
        ut.explain(model, x, rule="gradient", at="blocks.0", target=0, axes="bxy")


def test_several_layers_are_drawn_one_by_one():
    a = ut.explain(timm_vit(), drawn(1, 3, 32, 32), rule="gradient", at=["blocks.0", "blocks.1"], target=0)
    with pytest.raises(ut.InputError, match=r"several layers or calls \(blocks.0, blocks.1\)"):
        a.map()


def test_they_survive_the_disk(tmp_path):
    a = ut.explain(timm_vit(), drawn(2, 3, 32, 32), rule="attnlrp", at="blocks.0", target=1)
    loaded = ut.Attribution.load(a.save(tmp_path / "a.safetensors"))
    assert loaded.layout == a.layout
    assert np.array_equal(loaded.map(1), a.map(1))


def test_texts_have_no_plane():
    ids = torch.tensor([[1, 2, 3]])
    network = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval()
    assert ut.explain(network, ids, rule="gradient", at="0", target=0).plane == ()
