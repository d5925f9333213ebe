"""Networks of many kinds, each of any depth, to be embedded: from a depth to a network and a maker of its inputs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Inputs = Callable[[int], tuple[Tensor, ...]]
WIDTH = 8
TOKENS = 11


def mlp(activation: Callable[[], nn.Module]) -> Callable[[int], tuple[nn.Module, Inputs]]:
    def build(depth: int) -> tuple[nn.Module, Inputs]:
        layers: list[nn.Module] = [nn.Linear(5, WIDTH)]
        for _ in range(depth - 2):
            layers += [activation(), nn.Linear(WIDTH, WIDTH)]
        return nn.Sequential(*layers, activation(), nn.Linear(WIDTH, 3)), lambda batch: (torch.randn(batch, 5),)

    return build


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.second(F.silu(self.first(x)))


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = (part.view(batch, length, 2, width // 2).transpose(1, 2) for part in self.mix(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, attention: nn.Module, pre: bool) -> None:
        super().__init__()
        self.attention, self.pre = attention, pre
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attention(self.norm1(x))
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.feed(x))


def transformer(attention: Callable[[], nn.Module], pre: bool) -> Callable[[int], tuple[nn.Module, Inputs]]:
    def build(depth: int) -> tuple[nn.Module, Inputs]:
        blocks = [Block(attention(), pre) for _ in range(max(1, depth // 8))]
        return nn.Sequential(*blocks, nn.Linear(WIDTH, 2)).eval(), lambda batch: (torch.randn(batch, 3, WIDTH),)

    return build


class LanguageModel(nn.Module):
    """Tokens to logits, with the embedding's weights once more at the end, and positions that depend on no input."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList([Block(Attention(causal=True), pre=True) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Masked(nn.Module):
    """Attention written out, with -inf where a mask of the input's length hides what comes later."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.keys = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        hidden = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for keys in self.keys:
            x = x + self.softmax(x @ keys(x).transpose(1, 2) / 3 + hidden) @ x
            x = x / x.square().mean(dim=-1, keepdim=True).add(1).sqrt()
        return x


class Convolutional(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1 if k == 0 else 4, 4, 3, padding=1) for k in range(layers)]
        self.layers = nn.ModuleList([nn.Sequential(c, nn.BatchNorm2d(4), nn.ReLU(inplace=True)) for c in convolutions])
        self.head = nn.Linear(16, 3)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean, part.running_var = torch.randn(4), torch.rand(4) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k == 0:
                x = F.max_pool2d(x, 2)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Shaped(nn.Module):
    """Down and up again, what was on the way down beside what comes up."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv1d(2 if k == 0 else 3, 3, 3, padding=1) for k in range(layers)])
        self.up = nn.ModuleList([nn.Conv1d(6, 3, 3, padding=1) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = torch.tanh(layer(x))
            kept.append(x)
        x = F.avg_pool1d(x, 2)
        x = F.interpolate(x, scale_factor=2.0)
        for layer in self.up:
            x = F.softplus(layer(torch.cat((x, kept.pop()), dim=1)))
        return x


class Joined(nn.Module):
    """Two inputs, of which one is used late, and a dict with a list in it, of floats and of integers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
        self.second = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor, y: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> dict[str, Any]:
        x = self.first(x)
        for layer in self.layers:
            x = torch.where(x > 0, layer(x), x)
        if mask is not None:
            x = x * mask
        joined = torch.sin(scale * x + self.second(y).sigmoid())
        return {"joined": joined, "parts": [x, joined.argmax(dim=-1)]}


class Thrice(nn.Module):
    """One layer, used again and again."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.norm(x + self.layer(x).tanh())
        return x


class Recurrent(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.GRU(WIDTH, WIDTH, batch_first=True) for _ in range(layers)])
        self.last = nn.LSTM(WIDTH, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x, _ = layer(x)
        x, (states, _) = self.last(x)
        return self.head(x), states[-1]


def tied(depth: int) -> tuple[nn.Module, Inputs]:
    first, *others = layers = [nn.Linear(WIDTH, WIDTH) for _ in range(depth // 2)]
    for layer in others:
        layer.weight = first.weight
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))), _vectors


def normed(depth: int) -> tuple[nn.Module, Inputs]:
    layers: list[nn.Module] = []
    for k in range(max(1, depth // 2)):
        norm = parametrizations.spectral_norm if k % 2 else parametrizations.weight_norm
        layers += [norm(nn.Linear(WIDTH, WIDTH)), nn.LeakyReLU()]
    return nn.Sequential(*layers).eval(), _vectors


def encoder_layers(depth: int) -> tuple[nn.Module, Inputs]:
    layers = [
        nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True, norm_first=bool(k % 2)) for k in range(depth)
    ]
    return nn.Sequential(*layers).eval(), lambda batch: (torch.randn(batch, 3, WIDTH),)


def _vectors(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, WIDTH),)


def _sequences(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, WIDTH),)


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Inputs]]] = {
    "MLP, tanh": mlp(nn.Tanh),
    "MLP, ReLU": mlp(nn.ReLU),
    "MLP, GELU": mlp(nn.GELU),
    "MLP, sigmoid": mlp(nn.Sigmoid),
    "residual MLP": lambda depth: (nn.Sequential(*(Residual() for _ in range(max(1, depth // 3)))), _vectors),
    "transformer, pre-norm": transformer(lambda: Attention(causal=False), pre=True),
    "transformer, post-norm": transformer(lambda: Attention(causal=False), pre=False),
    "nn.MultiheadAttention, pre-norm": transformer(TorchAttention, pre=True),
    "nn.MultiheadAttention, post-norm": transformer(TorchAttention, pre=False),
    "nn.TransformerEncoderLayer": encoder_layers,
    "attention with a mask of -inf": lambda depth: (Masked(max(1, depth // 5)), _sequences),
    "tokens, causal, tied head": lambda depth: (
        LanguageModel(max(1, depth // 9)).eval(),
        lambda batch: (torch.randint(TOKENS, (batch, 4)),),
    ),
    "convolutional, BatchNorm in eval": lambda depth: (
        Convolutional(max(1, depth // 3)).eval(),
        lambda batch: (torch.randn(batch, 1, 6, 6),),
    ),
    "U-shaped": lambda depth: (Shaped(max(1, depth // 4)), lambda batch: (torch.randn(batch, 2, 6),)),
    "two inputs, dict of outputs": lambda depth: (
        Joined(max(1, depth // 2)),
        lambda batch: (torch.randn(batch, 3), torch.randn(batch, 4)),
    ),
    "one layer again and again": lambda depth: (Thrice(max(3, depth // 2)), _vectors),
    "tied weights": tied,
    "GRU and LSTM": lambda depth: (Recurrent(max(1, depth // 2)), _sequences),
    "weight and spectral norm": normed,
}
