"""The tanh fixed-point layer z = tanh(W z + U x + b): four solvers, a classifier of digits, its gradient checked.

Source: Kolter, Duvenaud and Johnson (2020), Deep implicit layers, NeurIPS tutorial, chapter 1. Needs scikit-learn.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import trange

import equilibria as eq


class Cell(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.state, self.input = nn.Linear(width, width, bias=False), nn.Linear(inputs, width)

    def initial_state(self, x):
        return x.new_zeros(len(x), self.state.out_features)

    def forward(self, z, x):
        return torch.tanh(self.state(z) + self.input(x))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="tanh_layer.png")
    parser.add_argument("--steps", type=int, default=300, help="steps of training, of 100 digits each")
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    train, test = torch.randperm(len(images)).split([1400, 397])
    cell, classifier, losses = Cell(64, 64), nn.Linear(64, 10), []
    model = nn.Sequential(eq.DEQ(cell, max_steps=60), classifier)
    # W learns slowly: at the rate of the rest it soon expands, and then no solver is sure to find an equilibrium.
    rest = [*cell.input.parameters(), *classifier.parameters()]
    optimizer = torch.optim.Adam([{"params": cell.state.parameters(), "lr": 1e-4}, {"params": rest, "lr": 3e-3}])
    for _ in trange(options.steps, disable=None):
        batch = train[torch.randint(len(train), (100,))]
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = [(model(images[part]).argmax(1) == labels[part]).float().mean() for part in (train, test)]
    print("accuracy: {:.3f} on the 1400 digits of training, {:.3f} on 397 others".format(*accuracy))

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.semilogy(losses)
    left.set(xlabel="steps of training", ylabel="cross-entropy of a batch (nats)")
    cell, x = cell.double(), images[test].double()
    for solver in eq.Picard(), eq.Anderson(), eq.Broyden(), eq.Newton():
        seen, name = [], type(solver).__name__
        eq.fixed_point(cell, cell.initial_state(x), x, solver=solver, rtol=1e-10, callback=seen.append)
        evaluations, residual = zip(*((one.evaluations, one.residual.max().item()) for one in seen), strict=True)
        print(f"{name}: relative residual {residual[-1]:.1e} after {evaluations[-1]} evaluations")
        right.semilogy(
            evaluations, residual, ".-", label=name + " (its products with J uncounted)" * (name == "Newton")
        )
    right.set(xlabel="evaluations of the cell", ylabel="relative residual, the worst of 397 digits")
    right.legend()
    fig.savefig(options.out, dpi=80)
    layer, inputs = eq.DEQ(Cell(3, 5).double(), rtol=1e-12), torch.randn(2, 3).double()
    names, tensors = zip(*layer.named_parameters(), strict=True)
    agree = torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), inputs), tensors
    )
    print(f"gradients of the parameters agree with finite differences: {agree}")


if __name__ == "__main__":
    main()
