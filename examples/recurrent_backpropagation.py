"""Recurrent back-propagation: an attractor network learns to complete letters, by `Implicit(solver=Picard())`.

Sources: Almeida (1987), IEEE First International Conference on Neural Networks; Pineda (1987), Phys. Rev. Lett. 59.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import trange

import equilibria as eq

LETTERS = ["vgguggv", "ehhhlid", "hhhhhhe", "e44444e", "ggggggv", "uhhuhhu", "uhhukih", "ehhvhhh"]  # rows, base 32
PATTERNS = torch.tensor([[2.0 * (int(c, 32) >> k & 1) - 1 for c in word for k in (4, 3, 2, 1, 0)] for word in LETTERS])


class Attractor(nn.Module):
    def __init__(self):
        super().__init__()
        self.units, self.drive = nn.Linear(100, 100), nn.Linear(35, 100)  # 35 visible units and 65 hidden ones

    def initial_state(self, cue):
        return cue.new_zeros(len(cue), 100)

    def forward(self, z, cue):
        return torch.tanh(self.units(z) + self.drive(cue))


def corrupted(patterns, rate):
    return torch.where(torch.rand_like(patterns) < rate, -patterns, patterns)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="recurrent_backpropagation.png")
    parser.add_argument("--steps", type=int, default=300, help="steps of training, of 128 cues each")
    options = parser.parse_args()
    torch.manual_seed(0)
    net = eq.DEQ(Attractor(), eq.Picard(), eq.Implicit(eq.Picard()), rtol=1e-3, max_steps=200, on_failure="ignore")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in trange(options.steps, disable=None):
        targets = PATTERNS[torch.randint(8, (128,))]
        found = net.solve(corrupted(targets, 0.2))  # between two letters a cue may not settle: it teaches nothing
        loss = (found.value[:, :35] - targets)[found.converged].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fig, (letters, recall, gradient) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    rates, targets = torch.arange(0, 0.51, 0.05), PATTERNS.repeat(100, 1).expand(11, 800, 35)
    cues = settled = corrupted(targets, rates[:, None, None])
    for _ in range(50):
        settled = (settled @ torch.linalg.pinv(PATTERNS) @ PATTERNS).sign()
    found = net.solve(cues.flatten(0, 1))
    answers = [found.value[:, :35].sign().view_as(cues), settled, PATTERNS[(cues @ PATTERNS.T).argmax(dim=2)]]
    shares = torch.stack([(answer == targets).all(dim=2).float().mean(dim=1) for answer in answers], dim=1)
    print("recalled, 20 % flipped: {:.3f}; Hopfield network: {:.3f}; nearest letter: {:.3f}".format(*shares[4]))
    print(f"cues that did not settle in 200 steps: {int((~found.converged).sum())} of {len(found.status)}")
    recall.plot(100 * rates, shares, ".-", label=["this network", "Hopfield network", "nearest letter (the best)"])
    recall.set(xlabel="pixels of the cue flipped (%)", ylabel="letters recalled without a wrong pixel (share)")
    recall.legend()
    cues = corrupted(PATTERNS, 0.2)
    tiles = torch.stack([PATTERNS, cues, net(cues)[:, :35].detach()]).view(3, 8, 7, 5)
    letters.imshow(nn.functional.pad(tiles, (1, 1, 1, 1), value=-1).transpose(1, 2).reshape(27, 56), cmap="gray")
    letters.set(xticks=[], yticks=(4, 13, 22), yticklabels=("stored", "cue", "recalled"))
    net, cues, slopes, products = net.double(), cues.double(), [], [1, 2, 5, 10, 20, 50, 100, 200]
    for adjoint in eq.Implicit(solver=eq.Dense()), *(eq.Implicit(solver=eq.Picard(), max_steps=n) for n in products):
        net.rtol, net.adjoint = 1e-13, adjoint
        slopes += torch.autograd.grad((net(cues)[:, :35] - PATTERNS).square().mean(), net.cell.units.weight)
    errors = [((slope - slopes[0]).norm() / slopes[0].norm()).item() for slope in slopes[1:]]
    print(f"recurrent back-propagation against the exact solve: relative error {errors[-1]:.1e}")
    gradient.loglog(products, errors, ".-")
    gradient.set(xlabel="steps of recurrent back-propagation", ylabel="relative error of the gradient")
    fig.savefig(options.out, dpi=75)


if __name__ == "__main__":
    main()
