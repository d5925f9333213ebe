"""The networks that claim A is put to the proof on: ordinary ones of every shape, one of them trained here and now."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelayer.errors import UsageError


@dataclass(frozen=True)
class Subject:
    """A network and the inputs it takes.

    >>> subject = Subject("linear", lambda: nn.Linear(3, 2), lambda batch: (torch.randn(batch, 3),))

    Attributes:
        name: in words, as the table shows it.
        network: makes it; random weights, or training, draw from the seed set before.
        inputs: arguments of a call for so many samples.
        score: a number between 0 and 1 that says how well a network does, where there is one.
    """

    name: str
    network: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    score: Callable[[nn.Module], float] | None = None


def perceptron(layers: int, width: int, activation: Callable[[], nn.Module], gain: float) -> nn.Sequential:
    """So many linear layers with an activation between any two; `gain` keeps signals alive through many of them.

    >>> len(perceptron(16, 8, nn.Tanh, 5 / 3))
    31
    """
    linear = [nn.Linear(width, width) for _ in range(layers)]
    for layer in linear:
        nn.init.orthogonal_(layer.weight, gain)
    parts = [part for layer in linear for part in (layer, activation())]
    return nn.Sequential(*parts[:-1])


class Residual(nn.Module):
    """Pre-norm residual blocks."""

    def __init__(self, width: int = 16, blocks: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class UShaped(nn.Module):
    """Down to a quarter of the resolution and up again, with a skip at each."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()

        def stage(channels: int, out: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(2, out), nn.SiLU())

        self.down = nn.ModuleList([stage(3, width), stage(width, 2 * width)])
        self.bottom = stage(2 * width, 4 * width)
        self.up = nn.ModuleList([stage(6 * width, 2 * width), stage(3 * width, width)])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down[0](x)
        low = self.down[1](F.max_pool2d(high, 2))
        x = self.bottom(F.max_pool2d(low, 2))
        x = self.up[0](torch.cat([F.interpolate(x, scale_factor=2.0), low], dim=1))
        x = self.up[1](torch.cat([F.interpolate(x, scale_factor=2.0), high], dim=1))
        return self.head(x)


class Attention(nn.Module):
    """Causal self-attention; keys have no bias, whose gradient would be rounding alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.read, self.write = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.write(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Transformer(nn.Module):
    """A causal Transformer over bytes, pre-norm, with learnt positions."""

    def __init__(self, width: int = 16, heads: int = 2, blocks: int = 3, context: int = 24) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Parameter(0.1 * torch.randn(context, width))
        self.attend = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), Attention(width, heads)) for _ in range(blocks))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.positions
        for attend, feed in zip(self.attend, self.feed, strict=True):
            x = x + attend(x)
            x = x + feed(x)
        return self.head(self.norm(x))


class EncoderBlock(nn.Module):
    """Attention over all positions, then a feed-forward part, each normalised after its sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.attention(x, x, x, need_weights=False)[0])
        return self.norms[1](x + self.feed(x))


class TwoInputs(nn.Module):
    """A picture and numbers beside it, read apart, multiplied together; two answers."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Conv2d(1, width, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.numbers = nn.Sequential(nn.Linear(5, width), nn.Sigmoid())
        self.first, self.second = nn.Linear(width, 3), nn.Linear(width, 2)

    def forward(self, picture: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        both = self.picture(picture) * self.numbers(numbers)
        return self.first(both), F.softplus(self.second(both))


class Shared(nn.Module):
    """One block used four times, and an output that reads by the transposed weight of the input."""

    def __init__(self, width: int = 16, inner: int = 12) -> None:
        super().__init__()
        self.encoder, self.block, self.norm = nn.Linear(width, inner), nn.Linear(inner, inner), nn.LayerNorm(inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for _ in range(4):
            x = self.norm(x + torch.tanh(self.block(x)))
        return F.linear(x, self.encoder.weight.t())


class Temporal(nn.Module):
    """Gated causal convolutions over time at growing strides; the answer sums what every layer gives."""

    def __init__(self, width: int = 8, layers: int = 5) -> None:
        super().__init__()
        self.read = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(layers))
        self.mix = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.write = nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        skips = torch.zeros_like(x)
        for i, (gate, mix) in enumerate(zip(self.gates, self.mix, strict=True)):
            value, opening = gate(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            step = mix(torch.tanh(value) * torch.sigmoid(opening))
            x, skips = x + step, skips + step
        return self.write(torch.relu(skips))


class Recurrent(nn.Module):
    """A gated recurrent network over a sequence, two layers deep, as one part among others."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.read, self.gru = nn.Linear(4, width), nn.GRU(width, width, num_layers=2, batch_first=True)
        self.write = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(torch.tanh(self.read(x)))
        return self.write(states[:, -1])


class DigitsClassifier(nn.Module):
    """Convolutions with BatchNorm for pictures of 8 by 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits, (samples, 1, 8, 8) between 0 and 1 in float32, and what they show.

    >>> digits()[0].shape
    torch.Size([1797, 1, 8, 8])

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        message = "The digits come with scikit-learn, which is missing: pip install 'equilibria[prove]'."
        raise UsageError(message) from None
    pixels, labels = load_digits(return_X_y=True)
    return torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.as_tensor(labels)


HELD_BACK = 360  # digits, the last ones, that training does not see


def trained_on_digits(epochs: int = 12, batch_size: int = 64) -> nn.Module:
    """The classifier, trained for a few seconds on all digits but the last `HELD_BACK`.

    >>> right_on_digits(trained_on_digits(epochs=2)) > 0.5
    True
    """
    pictures, labels = (part[:-HELD_BACK] for part in digits())
    network = DigitsClassifier()
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    batches = math.ceil(len(labels) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(pictures[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def right_on_digits(network: nn.Module) -> float:
    """Share of the digits held back that a network, or what stands for it, names right.

    >>> 0 <= right_on_digits(DigitsClassifier().eval()) <= 1
    True
    """
    pictures, labels = (part[-HELD_BACK:] for part in digits())
    with torch.no_grad():
        scores = network(pictures.to(next(network.parameters()).dtype))
    return float((scores.argmax(dim=1) == labels).float().mean())


def _random(*shape: int) -> Callable[[int], tuple[Tensor]]:
    return lambda n: (torch.randn(n, *shape),)


NETWORKS: tuple[Subject, ...] = (
    Subject("perceptron, 2 layers, ReLU", lambda: perceptron(2, 32, nn.ReLU, math.sqrt(2)), _random(32)),
    Subject("perceptron, 16 layers, tanh", lambda: perceptron(16, 24, nn.Tanh, 5 / 3), _random(24)),
    Subject("perceptron, 64 layers, GELU", lambda: perceptron(64, 16, nn.GELU, 1.5), _random(16)),
    Subject("residual, 8 blocks", Residual, _random(16)),
    Subject("U-shaped, convolutional, skips", UShaped, _random(3, 16, 16)),
    Subject("digits classifier, trained here", trained_on_digits, lambda n: (digits()[0][-n:],), right_on_digits),
    Subject("causal Transformer over bytes", Transformer, lambda n: (torch.randint(256, (n, 24)),)),
    Subject("post-norm encoder", lambda: nn.Sequential(*(EncoderBlock(16, 2) for _ in range(3))), _random(10, 16)),
    Subject("two inputs, two outputs", TwoInputs, lambda n: (torch.randn(n, 1, 8, 8), torch.randn(n, 5))),
    Subject("shared weights, a block used 4 times", Shared, _random(16)),
    Subject("gated temporal convolution", Temporal, _random(1, 40)),
    Subject("GRU as a part", Recurrent, _random(12, 4)),
)
