"""LRP on torchvision's and timm's own classes as they are, against a twin that replaces layers and walks no graph."""

import pytest
import torch
from torch import nn

import undertow as ut
from frameworks.torch import lrp_twins as twins
from frameworks.torch.real_models import drawn, timm, torchvision
from frameworks.torch.test_lrp import BOX, distance, ready, rule_of


def vgg(batch_norm):
    def make():
        with torch.device("meta"):  # its own linear layers are of 100 million weights
            net = torchvision.models.VGG(nn.Identity(), init_weights=False)
        net.features = torchvision.models.vgg.make_layers([8, "M", 16, 12, "M"], batch_norm)
        layers = nn.Linear(12 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5)
        net.classifier = nn.Sequential(*layers)
        return net

    return make


def resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)


NETWORKS = {
    "VGG": vgg(False),
    "VGG with batch norm": vgg(True),
    "ResNet of bottlenecks": resnet,
    "DenseNet": lambda: torchvision.models.DenseNet(4, (2, 2, 1), 8, bn_size=2, num_classes=5),
    "MobileNet V2": lambda: torchvision.models.MobileNetV2(5, 0.1),
    "timm MobileNet V3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "SqueezeNet": lambda: torchvision.models.SqueezeNet("1_1", num_classes=5),
}
RULES = {
    "lrp:epsilon": (twins.epsilon, twins.epsilon, twins.epsilon),
    "lrp:epsilon-plus-flat": (twins.flat, twins.plus, twins.epsilon),
    "lrp:epsilon-gamma-box": (twins.box(*BOX), twins.gamma, twins.epsilon),
    "lrp:epsilon-alpha2-beta1": (twins.alpha2_beta1, twins.alpha2_beta1, twins.epsilon),
    "excitation": (twins.excitation, twins.excitation, twins.excitation),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return ready(NETWORKS[request.param]).requires_grad_(False)


@pytest.mark.parametrize("rule", RULES)
def test_an_unmodified_network_equals_the_twin(network, rule):
    x = drawn(2, 3, 32, 32)
    a = ut.explain(network, x, rule=rule_of(rule), target=1)
    assert distance(a.values, twins.relevance(network, x, RULES[rule], 1)) < 1e-9  # of outputs next to 0
    assert a.skipped == a.opaque == {}


TIMM = (
    *("repvgg_a0", "seresnet18", "skresnet18", "resnext26ts", "efficientnet_b0", "regnety_002", "ghostnet_050"),
    *("mixnet_s", "hrnet_w18_small"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_equal_the_twin(name):
    net, x = ready(lambda: timm.create_model(name)).requires_grad_(False), drawn(1, 3, 96, 96)
    for rule in ("lrp:epsilon-plus-flat", "lrp:epsilon-gamma-box"):
        a = ut.explain(net, x, rule=rule_of(rule), target=1)
        assert distance(a.values, twins.relevance(net, x, RULES[rule], 1)) < 1e-8
