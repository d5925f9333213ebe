"""Denoising as an equilibrium of learnt filters, after Roth and Black (2009) and Gilton, Ongie and Willett (2021)."""

import argparse

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad
from tqdm import trange

import equilibria as eq


def piecewise_constant(count: int) -> Tensor:
    """Images of overlapping rectangles and discs: (count, 1, 32, 32), from 0 to 1."""
    y, x = torch.arange(32).view(-1, 1) / 32, torch.arange(32) / 32
    images = torch.rand(count, 1, 1, 1).expand(count, 1, 32, 32)
    for power in 3 * (2, 64):  # discs, and all but rectangles
        a, b, width, height, level = torch.rand(5, count, 1, 1, 1)
        across, down = (x - a) / (0.1 + 0.25 * width), (y - b) / (0.1 + 0.25 * height)
        images = torch.where(across.abs() ** power + down.abs() ** power < 1, level, images)
    return images


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(0.05 * torch.randn(12, 1, 5, 5))
        self.kernels.data[range(12), 0, 2 * [2, 3, 3, 3, 2, 4], 2 * [3, 2, 3, 1, 4, 2]] = 1
        self.kernels.data[:, 0, 2, 2] = -1  # differences, to begin with
        self.weight, self.scale = (nn.Parameter(torch.full((12, 1, 1), start)) for start in (-1.0, -2.0))

    def forward(self, z: Tensor, noisy: Tensor) -> Tensor:
        kernels = self.kernels - self.kernels.mean((2, 3), keepdim=True)
        kernels, weight = kernels / kernels.abs().sum((2, 3), keepdim=True), self.weight.exp()
        edges = conv2d(pad(z, (2, 2, 2, 2), mode="replicate"), kernels)
        slope = weight * edges / (1 + (edges / self.scale.exp()) ** 2)  # of a penalty that forgives large edges
        return z - (z - noisy + conv_transpose2d(slope, kernels)[:, :, 2:-2, 2:-2]) / (1 + weight.sum())


def total_variation(z: Tensor, noisy: Tensor, strength: float) -> Tensor:
    """|z - noisy|^2 / 2 + strength * (total variation of z, smooth below 0.01)."""
    edges = (pad(z.diff(dim=2), (0, 0, 0, 1)) ** 2 + pad(z.diff(dim=3), (0, 1)) ** 2 + 1e-4).sqrt()
    return ((z - noisy) ** 2 / 2 + strength * edges).sum((1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="denoising.png")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.manual_seed(0)
    layer = eq.DEQ(Step(), rtol=1e-3, max_steps=60)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in trange(options.steps):
        images = piecewise_constant(8)
        optimizer.zero_grad()
        (layer(images + 0.15 * torch.randn_like(images)) - images).square().mean().backward()
        optimizer.step()
        schedule.step()
    clean = piecewise_constant(80)
    noisy = clean + 0.15 * torch.randn_like(clean)
    found = layer.solve(noisy)
    rivals = [eq.argmin(total_variation, noisy, noisy, s, atol=1e-4, max_steps=500).value for s in (0.09, 0.11, 0.13)]
    tuned = min(rivals, key=lambda images: (images - clean).square().mean())
    pictures = {"noisy": noisy, "total variation": tuned, "learnt": found.value.detach()}
    decibels = {name: -10 * (a - clean).square().mean((1, 2, 3)).log10().mean() for name, a in pictures.items()}
    print(", ".join(f"{name} {value:.2f} dB" for name, value in decibels.items()))
    print(f"evaluations: {found.evaluations}, solved: {found.converged.double().mean():.0%}")
    columns = [torch.cat([*images[:3, 0].detach()]) for images in (clean, *pictures.values())]
    plt.imshow(torch.cat(columns, dim=1), cmap="gray", vmin=0, vmax=1)
    plt.title("          ".join(["clean", *(f"{name} {value:.1f} dB" for name, value in decibels.items())]), size=9)
    plt.axis("off")
    plt.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
