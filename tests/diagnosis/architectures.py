"""The architectures that people train, small and written by hand, and one step of training for each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[Tensor], Tensor]  # from a seed's generator's numbers to a loss


class MLP(nn.Sequential):
    def __init__(self, inputs: int = 16, width: int = 32, outputs: int = 5, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(nn.Linear(inputs, width), act(), nn.Linear(width, width), act(), nn.Linear(width, outputs))


class CNN(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 5)),
        )


class ResNet(nn.Module):
    """Post-activation blocks with batch norm; `gamma` is what the last norm of each block begins with."""

    def __init__(self, blocks: int = 4, width: int = 16, gamma: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(self._block(width, gamma) for _ in range(blocks))
        self.head, self.scale = nn.Linear(width, 5), scale

    @staticmethod
    def _block(width: int, gamma: float) -> nn.Sequential:
        convs = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        last = nn.BatchNorm2d(width)
        nn.init.constant_(last.weight, gamma)
        return nn.Sequential(convs[0], nn.BatchNorm2d(width), nn.ReLU(), convs[1], last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(self.scale * x + block(x))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def conv(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())

        self.down, self.middle, self.bottom = conv(3, 8), conv(8, 16), conv(16, 16)
        self.up, self.top, self.head = conv(32, 8), conv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.middle(F.max_pool2d(a, 2))
        c = F.interpolate(self.bottom(F.max_pool2d(b, 2)), scale_factor=2)
        d = F.interpolate(self.up(torch.cat([b, c], 1)), scale_factor=2)
        return self.head(self.top(torch.cat([a, d], 1)))


class Block(nn.Module):
    """A transformer block; norms before its parts, as in GPT-2 and ViT, or behind the sums, as in BERT."""

    def __init__(self, width: int, first: bool, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.first, self.causal = first, causal

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, 2))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = x + self.attend(self.ln1(x))
            return x + self.down(F.gelu(self.up(self.ln2(x))))
        x = self.ln1(x + self.attend(x))
        return self.ln2(x + self.down(F.gelu(self.up(x))))


class GPT(nn.Module):
    def __init__(self, layers: int = 3, width: int = 32, words: int = 40) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width, first=True, causal=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        _bert_like(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class BERT(nn.Module):
    def __init__(self, layers: int = 2, width: int = 32) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(40, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, first=False, causal=False) for _ in range(layers))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 2)
        _bert_like(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class ViT(nn.Module):
    def __init__(self, layers: int = 3, width: int = 32) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, first=True, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def _bert_like(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.code = nn.Linear(64, 32), nn.Linear(32, 8)
        self.decoder, self.out = nn.Linear(4, 32), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.code(F.relu(self.encoder(x))).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.out(F.relu(self.decoder(z))), mean, log_variance


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        layers = [nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)]
        self.discriminator = nn.Sequential(*layers)


class Recurrent(nn.Module):
    """`nn.LSTM` or `nn.GRU` over a sequence, and a layer that reads its last output."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(8, 24, 2, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Cell(nn.Module):
    """A cell called once for each point of time, and a layer that reads the last state, or each of them."""

    def __init__(self, cell: nn.Module, each: bool = False, width: int = 24) -> None:
        super().__init__()
        self.cell, self.head, self.each = cell, nn.Linear(width, 5), each

    def forward(self, x: Tensor) -> Tensor:
        state, states = None, []
        for now in x.unbind(1):
            state = self.cell(now, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack([self.head(h) for h in states], 1).mean(1) if self.each else self.head(states[-1])


class Adapted(nn.Module):
    """A linear layer that is frozen, and a low-rank adapter beside it whose second half begins at zero (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


def lora() -> nn.Module:
    """Freeze a small GPT, and put adapters beside the first layer of each attention and of each MLP."""
    model = GPT().requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.up = Adapted(block.qkv), Adapted(block.up)
    return model


class DQN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = MLP(4, 64, 2), MLP(4, 64, 2).requires_grad_(False)
        self.target.load_state_dict(self.online.state_dict())


def classify(model: nn.Module, draw: torch.Generator, shape: tuple[int, ...] = (32, 16)) -> Tensor:
    """A task that can be learnt: which fifth of the mean of the input's first numbers it lies in."""
    x = torch.randn(shape, generator=draw)
    level = x.flatten(1)[:, :8].mean(1)
    return F.cross_entropy(model(x), (5 * (0.5 + 0.5 * torch.erf(level * 2))).long().clamp(0, 4))


def segment(model: nn.Module, draw: torch.Generator) -> Tensor:
    x = torch.randn(8, 3, 16, 16, generator=draw)
    return F.cross_entropy(model(x), (x.mean(1) > 0).long())


def _ids(draw: torch.Generator) -> Tensor:
    return torch.randint(1, 40, (8, 12), generator=draw)


def predict_next(model: nn.Module, draw: torch.Generator) -> Tensor:
    ids = _ids(draw).cumsum(1) % 40
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def classify_text(model: nn.Module, draw: torch.Generator) -> Tensor:
    ids = _ids(draw)
    return F.cross_entropy(model(ids), (ids[:, 1] > 20).long())


def reconstruct(model: nn.Module, draw: torch.Generator) -> Tensor:
    x = (torch.randn(32, 4, generator=draw) @ torch.linspace(-1, 1, 256).view(4, 64).sin()).sigmoid()
    out, mean, log_variance = model(x)
    kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
    return F.binary_cross_entropy_with_logits(out, x, reduction="sum") / len(x) + kl


def play(model: GAN, draw: torch.Generator) -> Tensor:
    """Both losses of a GAN; each takes its own way through the discriminator."""
    real, z = 1 + 0.5 * torch.randn(32, 16, generator=draw), torch.randn(32, 8, generator=draw)
    fake = model.generator(z)
    of_real, of_fake = model.discriminator(real), model.discriminator(fake.detach())
    loss = F.softplus(-of_real).mean() + F.softplus(of_fake).mean()
    return loss + F.softplus(-model.discriminator(fake)).mean()


def regress(model: nn.Module, draw: torch.Generator) -> Tensor:
    """Targets far from zero, as prices or temperatures are before anybody has scaled them."""
    x = torch.randn(32, 16, generator=draw)
    return F.mse_loss(model(x)[:, 0], 100 + 10 * x[:, 0] - 5 * x[:, 1])


def learn_q(model: DQN, draw: torch.Generator) -> Tensor:
    """States as those of a pole on a cart: small, and much alike."""
    state, moved = (0.05 * torch.randn(64, 4, generator=draw) for _ in range(2))
    action = torch.randint(2, (64,), generator=draw)
    with torch.no_grad():
        wanted = 1 + 0.99 * model.target(state + moved).amax(1)
    return F.smooth_l1_loss(model.online(state).gather(1, action[:, None])[:, 0], wanted)


def images(model: nn.Module, draw: torch.Generator) -> Tensor:
    return classify(model, draw, (16, 3, 16, 16))


def sequences(model: nn.Module, draw: torch.Generator) -> Tensor:
    return classify(model, draw, (32, 10, 8))


HEALTHY: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "MLP": (MLP, classify),
    "CNN": (CNN, images),
    "ResNet with batch norm": (ResNet, images),
    "ResNet, last norms at zero": (lambda: ResNet(gamma=0.0), images),
    "U-Net": (UNet, segment),
    "GPT": (GPT, predict_next),
    "BERT": (BERT, classify_text),
    "ViT": (ViT, images),
    "VAE": (VAE, reconstruct),
    "GAN": (GAN, play),
    "LSTM": (lambda: Recurrent(nn.LSTM), sequences),
    "GRU": (lambda: Recurrent(nn.GRU), sequences),
    "GRU cell, all states read": (lambda: Cell(nn.GRUCell(8, 24), each=True), sequences),
    "LoRA on GPT": (lora, predict_next),
    "regression, shifted target": (lambda: MLP(outputs=1), regress),
    "DQN": (DQN, learn_q),
}
"""Networks that learn, with their losses."""
