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
    layer, head = eq.nn.MonotoneDEQ(eq.nn.MonotoneConv2d(1, 32, 8, margin=1.0), rtol=1e-3), nn.Linear(32 * 64, 10)
    model = nn.Sequential(layer, nn.Flatten(), head)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in trange(steps, disable=None, leave=False):
        batch = torch.randint(len(images), (128,))
        shifted = F.pad(images[batch], (1,) * 4)
        top, left = torch.randint(3, (2,)).tolist()
        loss = F.cross_entropy(model(shifted[..., top : top + 8, left : left + 8]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def attack(model, x, labels, radius, steps=100):
    """Projected gradient steps that stay within each image's radius; whether one has changed the answer."""
    size, broken = radius.float()[:, None, None, None], torch.zeros(len(x), dtype=torch.bool)
    delta = F.normalize(torch.randn_like(x).flatten(1), dim=1).reshape(x.shape) * size / 2
    for _ in trange(steps + 1, disable=None, leave=False):
        logits = model(x + delta.requires_grad_())
        broken |= logits.argmax(1) != labels
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), delta)
        delta = delta.detach() + size / 4 * F.normalize(gradient.flatten(1), dim=1).reshape(x.shape)
        delta *= (size / delta.flatten(1).norm(dim=1)[:, None, None, None].clamp(min=1e-9)).clamp(max=1 - 1e-6)
    return broken


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="monotone_digits.png")
    parser.add_argument("--steps", type=int, default=400, help="steps of training, of 128 digits each")
    parser.add_argument("--folds", type=int, default=1, help="how many of the five folds of cross-validation to run")
    options = parser.parse_args()

    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(images, labels)
    scores, radii, broken = [], [], 0
    for seed, (inside, outside) in zip(range(options.folds), folds, strict=False):
        torch.manual_seed(seed)
        model = train(images[inside], labels[inside], options.steps)
        x, y = images[outside], labels[outside]
        right = model(x).argmax(1) == y
        scores.append(right.float().mean().item())
        radius = torch.where(right, model[0].certified_radius(x, model[1:]), 0)
        broken += int(attack(model, x[right], y[right], radius[right]).sum())
        radii.append(radius)
        print(f"fold {seed}: accuracy {scores[-1]:.3f}, median radius {radius.median():.3f}")
    radii = torch.cat(radii)
    print(f"accuracy {sum(scores) / len(scores):.4f}, the mean of {len(scores)} of five folds")
    print(f"attacks within the radius that changed an answer: {broken} of {int((radii > 0).sum())}")

    fig, (left, right_side) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = torch.linspace(0, 2, 9)
    left.plot(radii.sort().values, torch.linspace(1, 0, len(radii)), label="certified")
    held = [(~attack(model, x, y, torch.full((len(x),), size), 20)).float().mean().item() for size in sizes]
    left.plot(sizes, held, "o--", label="under attack, 20 steps")
    left.set(xlabel="Euclidean distance from the image, pixels from 0 to 1", ylabel="share of answers that are right")
    left.legend()
    order = radius.argsort()[torch.linspace(0, len(x) - 1, 10).long()]
    right_side.imshow(x[order, 0].reshape(2, 5, 8, 8).permute(0, 2, 1, 3).reshape(16, 40), cmap="gray_r")
    right_side.set(title="From the least certain image to the most: " + ", ".join(f"{r:.2f}" for r in radius[order]))
    right_side.title.set_fontsize(8)
    right_side.axis("off")
    fig.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
