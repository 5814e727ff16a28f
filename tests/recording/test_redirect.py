"""Gradients redirected at sites: against hand-made gradients, and nothing left behind."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

import undertow as ut
from undertow.frameworks.torch.zoo.importing import import_torchvision
from undertow.recording.redirect import redirect


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def network(inplace=True):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.ReLU(inplace), nn.Linear(64, 3)
    )


def gradients(net, x, sites=None):
    net.zero_grad()
    if sites is None:
        net(x).square().sum().backward()
    else:
        with redirect(net, sites):
            net(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


IMAGE = (2, 3, 8, 8)


@pytest.mark.parametrize("site", ["0", "1", "2", "3", "4", "5", ""])
@pytest.mark.parametrize("inplace", [True, False])
def test_scale_at_a_site_scales_what_lies_before_it_and_nothing_after(site, inplace):
    net, x = network(inplace), torch.randn(IMAGE)
    plain = gradients(net, x)
    scaled = gradients(net, x, {site: redirect.scale(-2.0)})  # a power of two: exact
    for name, g in plain.items():
        before = site == "" or int(name[0]) <= int(site)
        assert torch.equal(scaled[name], -2 * g if before else g), name


@pytest.mark.parametrize("site", ["1", "2", "3"])
def test_zero(site):
    net, x = network(), torch.randn(IMAGE)
    plain, zeroed = gradients(net, x), gradients(net, x, {site: redirect.zero()})
    for name, g in plain.items():
        assert torch.equal(zeroed[name], torch.zeros_like(g) if int(name[0]) <= int(site) else g)
    assert torch.equal(
        gradients(net, x, {"5": lambda g: g * float("nan"), "4": redirect.zero()})["0.weight"], 0 * g_of(net)
    )


def g_of(net):
    return torch.zeros_like(net[0].weight)


def test_any_function_by_hand():
    """Linear, tanh, Linear: the chain rule written out with the gradient changed in the middle."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    got = gradients(net, x, {"1": lambda g: g.clamp(-0.1, 0.2) + 0.3})
    h = torch.tanh(x @ net[0].weight.T + net[0].bias).detach()
    at_output = 2 * (h @ net[2].weight.T + net[2].bias).detach()
    at_hidden = (at_output @ net[2].weight.detach()).clamp(-0.1, 0.2) + 0.3
    wanted = (at_hidden * (1 - h**2)).T @ x
    assert torch.allclose(got["0.weight"], wanted, rtol=1e-12)
    assert torch.allclose(got["2.weight"], at_output.T @ h, rtol=1e-12)
    assert not torch.allclose(got["0.weight"], -wanted, rtol=1e-2)


def test_clip_is_by_sample():
    g = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(redirect.clip(1.0)(g), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    large = torch.full((1, 4), 6e4, dtype=torch.float16)  # squares would overflow
    assert torch.allclose(redirect.clip(1.0)(large).float(), torch.full((1, 4), 0.5), atol=1e-3)
    assert redirect.clip(1.0)(torch.tensor(-3.0)) == -1.0
    with pytest.raises(ut.InputError, match="positive"):
        redirect.clip(0.0)


def test_noise_is_seeded_and_leaves_the_global_state():
    g, state = torch.zeros(1000), torch.get_rng_state()
    a, b, other = redirect.noise(0.5, seed=1), redirect.noise(0.5, seed=1), redirect.noise(0.5, seed=2)
    first = a(g)
    assert torch.equal(first, b(g))
    assert not torch.equal(first, a(g))
    assert not torch.equal(first, other(g))
    assert float(first.std()) == pytest.approx(0.5, rel=0.1)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ut.InputError, match="negative"):
        redirect.noise(-1.0)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.same = nn.Linear(3, 3), nn.Identity()

    def forward(self, x):
        first = self.fc(x)
        return self.fc(first) + self.same(first) + first


def test_reused_modules_are_given_each_call():
    net, x, seen = Reused(), torch.randn(2, 3), []

    def noting(g):
        seen.append(g.clone())
        return g * 3

    with redirect(net, {"fc": noting}) as redirected:
        net(x).sum().backward()
    ones, w = torch.ones(2, 3), net.fc.weight.detach()
    assert torch.equal(seen[0], ones)
    assert torch.allclose(seen[1], 3 * ones @ w + 2 * ones)
    assert redirected.changed == {"fc": 2}


def test_a_module_that_hands_on_its_input_does_not_redirect_its_other_readers():
    net, x = Reused(), torch.randn(2, 3)
    seen = []
    with redirect(net, {"same": redirect.zero(), "fc": lambda g: seen.append(g) or g}):
        net(x).sum().backward()
    ones, w = torch.ones(2, 3), net.fc.weight.detach()
    assert torch.allclose(seen[1], ones @ w + ones)  # without the Identity's one, with the sum's own


def test_several_outputs_and_integers():
    class Pair(nn.Module):
        def forward(self, x):
            return {"a": x * 2, "b": (x * 3, torch.arange(2))}

    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            out = self.pair(x)
            return out["a"] + out["b"][0]

    x = torch.ones(1, 2, requires_grad=True)
    net = Adding()
    with redirect(net, {"pair": redirect.scale(10)}) as redirected:
        net(x).sum().backward()
    assert x.grad.tolist() == [[50.0, 50.0]]
    assert redirected.changed == {"pair": 2}


def test_globs_and_several_keys():
    net, x = network(), torch.randn(IMAGE)
    plain = gradients(net, x)
    both = gradients(net, x, {"[02]": redirect.scale(2.0), "2": lambda g: g * 4})
    assert torch.equal(both["2.weight"], 8 * plain["2.weight"])
    assert torch.equal(both["0.weight"], 16 * plain["0.weight"])
    assert torch.equal(both["5.weight"], plain["5.weight"])
    net, order = nn.Sequential(nn.Linear(2, 2)), []
    with (
        redirect(net, {"0": lambda g: order.append("outer") or g}),
        redirect(net, {"0": lambda g: order.append("inner") or g}),
    ):
        net(torch.ones(1, 2)).sum().backward()
    assert order == ["outer", "inner"]


def left(net):
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs)) for m in net.modules()
    ]


def test_nothing_is_left_whatever_happens():
    net, x = network(), torch.randn(IMAGE)
    before, plain = left(net), gradients(net, x)

    def failing(g):
        raise OSError("no")

    with pytest.raises(OSError, match="no"), redirect(net, {"2": failing}):
        net(x).sum().backward()
    with pytest.raises(KeyError), redirect(net, {"2": failing}):
        raise KeyError
    assert left(net) == before
    after = gradients(net, x)
    assert all(torch.equal(after[name], plain[name]) for name in plain)


def test_a_graph_made_inside_and_used_later_is_left_alone():
    net, x = network(), torch.randn(IMAGE)
    plain = gradients(net, x)
    net.zero_grad()
    with redirect(net, {"0": redirect.zero()}):
        net(x).sum().backward()
        net.zero_grad()
        later = net(x).square().sum()
    later.backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in net.named_parameters())


def test_forgetting_the_backward_is_an_error():
    net, x = network(), torch.randn(IMAGE)
    with pytest.raises(ut.RuleError, match=r"call backward\(\) inside"), redirect(net, {"2": redirect.zero()}):
        net(x)
    with redirect(net, {"2": redirect.zero()}), torch.no_grad():
        net(x)
    with redirect(net, {"2": redirect.zero()}):
        pass

    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.aside = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    net = Aside()
    with pytest.raises(ut.RuleError, match="'aside': never called"), redirect(net, {"aside": redirect.zero()}):
        net(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda g: g[:1], r"\(1, 4, 4, 4\) torch.float32 on cpu where the gradient is \(2, 4, 4, 4\) torch.float32"),
        (lambda g: g.double(), r"\(2, 4, 4, 4\) torch.float64 on cpu where"),
        (lambda g: None, "a NoneType"),
        (lambda g: 0.0, "a float"),
    ],
)
def test_what_does_not_fit_is_named_with_its_site(answer, said):
    net, x = network(), torch.randn(IMAGE)
    with pytest.raises(ut.InputError, match=rf"'2' \(call 0\) returned {said}"), redirect(net, {"2": answer}):
        net(x).sum().backward()


def test_refusals():
    net = nn.Sequential()
    net.add_module("features", network())
    with pytest.raises(ut.InputError, match=r"did you mean features"):
        redirect(net, {"feature": redirect.zero()})
    with pytest.raises(ut.InputError, match=r"no module matches 'layer9\*'; at the top there are features"):
        redirect(net, {"layer9*": redirect.zero()})
    with pytest.raises(ut.InputError, match="not a function"):
        redirect(net, {"features": 0.1})
    with pytest.raises(ut.InputError, match="empty"):
        redirect(net, {})
    with pytest.raises(ut.InputError, match="is a function"):
        redirect(lambda x: x, {"features": redirect.zero()})
    with pytest.raises(ut.InputError, match="compiled"):
        redirect(torch.compile(net, backend="eager"), {"features": redirect.zero()})


def test_checkpointing_redirects_once():
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(True), nn.Linear(3, 3))

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    net, x = Saving(), torch.randn(2, 3)
    plain = gradients(net, x)
    scaled = gradients(net, x, {"body.0": redirect.scale(4.0)})
    assert torch.equal(scaled["body.0.weight"], 4 * plain["body.0.weight"])
    assert torch.equal(scaled["body.2.weight"], plain["body.2.weight"])


def test_other_threads_are_left_alone():
    net, x = network().double(), torch.randn(IMAGE).double()
    plain, in_thread = gradients(net, x), []

    def elsewhere():
        loss = net(x).square().sum()
        in_thread.append(torch.autograd.grad(loss, list(net.parameters())))

    with redirect(net, {"2": redirect.zero()}):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        net(x).sum().backward()
    assert all(map(torch.allclose, in_thread[0], plain.values()))


def test_a_long_loop_keeps_no_handles():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with redirect(net, {"*": redirect.scale(0.5)}) as redirected:
        for _ in range(300):
            net(torch.ones(1, 2)).sum().backward()
        gc.collect()
        assert sum(type(item) is RemovableHandle for item in gc.get_objects()) < 200
    assert redirected.changed == {"0": 300, "1": 300}


def test_an_exception_inside_a_forward_does_not_disturb_the_next():
    class Fragile(nn.Module):
        fails = True

        def forward(self, x):
            if self.fails:
                raise OSError
            return x * 1

    net = nn.Sequential(nn.Linear(2, 2), Fragile())
    with redirect(net, {"*": redirect.scale(2.0)}) as redirected:
        with pytest.raises(OSError):
            net(torch.ones(1, 2))
        net[1].fails = False
        net(torch.ones(1, 2)).sum().backward()
    assert redirected.changed == {"0": 1, "1": 1}


@pytest.mark.slow
def test_vgg_in_place():
    net = import_torchvision().models.vgg11(weights=None, num_classes=5, init_weights=False).eval()
    x = torch.randn(1, 3, 32, 32)
    plain = gradients(net, x)
    scaled = gradients(net, x, {"features.8": redirect.scale(2.0)})
    for name, g in plain.items():
        upstream = name.startswith("features") and int(name.split(".")[1]) <= 8
        assert torch.equal(scaled[name], 2 * g if upstream else g), name
