"""A monotone equilibrium that classifies digits, with a radius in which nothing changes its answer, and attacks.

Source: Winston and Kolter (2020), Monotone operator equilibrium networks. Needs scikit-learn.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.nn import functional as F
from tqdm import trange

import equilibria as eq


def train(images, labels, steps):
    model = nn.Sequential(eq.nn.MonotoneDEQ(eq.nn.MonotoneLinear(64, 100, margin=1.0), rtol=1e-3), nn.Linear(100, 10))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in trange(steps, disable=None, leave=False):
        batch = torch.randint(len(images), (128,))
        loss = F.cross_entropy(model(images[batch] + 0.15 * torch.randn(128, 64)), labels[batch])
        model.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def attack(model, x, labels, radius, steps):
    """Projected gradient steps that stay within each image's radius; whether any of them changed the answer."""
    size, broken = radius.float()[:, None] * (1 - 1e-6), torch.zeros(len(x), dtype=torch.bool)
    delta = F.normalize(torch.randn_like(x), dim=1) * size / 2
    for _ in trange(steps + 1, disable=None, leave=False):
        logits = model(x + delta.requires_grad_())
        broken |= logits.argmax(1) != labels
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), delta)
        delta = delta.detach() + size / 4 * F.normalize(gradient, dim=1)
        delta *= (size / delta.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1)
    return broken


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="monotone_digits.png")
    parser.add_argument("--steps", type=int, default=400, help="of training; attacks take a quarter")
    options = parser.parse_args()

    digits, accuracy, radii, broken = load_digits(), [], [], 0
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    for seed, (inside, outside) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(images, labels)):
        torch.manual_seed(seed)
        model, x, y = train(images[inside], labels[inside], options.steps), images[outside], labels[outside]
        right = model(x).argmax(1) == y
        accuracy.append(right.float().mean().item())
        radii.append(torch.where(right, model[0].certified_radius(x, model[1]), 0))
        broken += int(attack(model, x[right], y[right], radii[-1][right], options.steps // 4).sum())
        print(f"fold {seed}: accuracy {accuracy[-1]:.4f}, median radius {radii[-1].median():.3f}")
    print(f"mean accuracy: {sum(accuracy) / 5:.4f}")
    print(f"answers changed by an attack within the certified radius: {broken} of {int((torch.cat(radii) > 0).sum())}")

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(torch.cat(radii).sort().values, torch.linspace(1, 0, len(images)), label="certified")
    sizes = torch.linspace(0, 1.5, 7)
    held = [1 - attack(model, x, y, size.expand(len(x)), options.steps // 20).float().mean() for size in sizes]
    left.plot(sizes, held, "o--", label="under attack, last fold")
    left.set(xlabel="Euclidean distance from an image (pixels are 0 to 1)", ylabel="share of right answers")
    left.legend()
    order = radii[-1].argsort()[torch.linspace(0, len(x) - 1, 10).long()]
    right.imshow(x[order].reshape(2, 5, 8, 8).permute(0, 2, 1, 3).reshape(16, 40), cmap="gray_r")
    right.set(title="certified radius:\n" + " ".join(f"{r:.2f}" for r in radii[-1][order]), xticks=[], yticks=[])
    fig.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
