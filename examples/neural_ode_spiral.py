"""A Neural ODE learns a spiral from noisy points of it.

The data are points of one damped, cubic oscillation in the plane, with noise. The field that moves them is trained
through `eq.nn.ODELayer`. Printed: the error on a trajectory from a start that training has not seen.

    python examples/neural_ode_spiral.py --out spiral.png
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import trange

import equilibria as eq

NOISE = 0.02


class Field(nn.Module):
    """The rate from the cubes of the state, as in Chen et al. (2018); the truth has a `net` too."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z**3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="neural_ode_spiral.png")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.manual_seed(0)
    times = torch.linspace(0, 25, 501, dtype=torch.float64)
    starts = torch.tensor([[2.0, 0.0], [0.0, 1.6]])  # of the data, and held out
    truth = Field(nn.Linear(2, 2, bias=False)).requires_grad_(False)
    truth.net.weight.copy_(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))
    clean, unseen = eq.nn.ODELayer(truth, rtol=1e-6)(starts, times=times, trajectory=True).unbind(1)
    data = clean + NOISE * torch.randn(clean.shape)
    field = Field(nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2)))
    layer = eq.nn.ODELayer(field, times=times[:21:10], rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in (bar := trange(options.steps)):
        first = torch.randint(len(data) - 20, (64,))
        pieces = data[first + torch.tensor([[0], [10], [20]])]
        loss = (layer(pieces[0], trajectory=True) - pieces).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    x, y = torch.meshgrid(*2 * [torch.linspace(-2.2, 2.2, 22)], indexing="xy")
    with torch.no_grad():
        learnt, guess = layer(starts, times=times, trajectory=True).unbind(1)
        u, v = field(times[0], torch.stack((x, y), dim=-1)).unbind(-1)
    error, still = ((z - unseen).square().mean().sqrt() for z in (guess, starts[1]))
    print(f"loss of the last update {loss.item():.4f}, noise of the data {NOISE}")
    print(f"held-out trajectory: root-mean-square error {error:.3f}; standing still {still:.3f}")

    figure = Figure(figsize=(9, 4.2), layout="tight")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    left.scatter(*data.T, s=4, color="tab:gray", label="noisy data")
    left.plot(*learnt.T, color="tab:red", label="learnt, from the same start")
    right.streamplot(*(part.numpy() for part in (x, y, u, v)), color="lightgray")
    right.plot(*unseen.T, color="black", label="truth, from a held-out start")
    right.plot(*guess.T, "--", color="tab:red", label="learnt")
    for axis in (left, right):
        axis.legend(loc="upper right", fontsize=8)
        axis.set(xlabel="first coordinate", ylabel="second coordinate")
    figure.savefig(options.out, dpi=60)


if __name__ == "__main__":
    main()
