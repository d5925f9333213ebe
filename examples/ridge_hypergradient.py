"""Ridge penalties tuned by gradient descent: the gradient of a validation loss through the training that made it.

Two groups of features have a penalty each. Training is `eq.argmin` of the penalised loss, and the implicit function
theorem gives the slope of the validation loss in the penalties without differentiating the steps of training.
Source: Bengio (2000), Gradient-based optimization of hyperparameters.
"""

import argparse

import matplotlib.pyplot as plt
import torch

import equilibria as eq

torch.manual_seed(0)
TRUTH = torch.cat([torch.randn(10), torch.zeros(30)]).double()  # the second group of features says nothing
GROUP = torch.cat([torch.zeros(10), torch.ones(30)]).long()
X = torch.randn(60, 40).double()
Y = X @ TRUTH + 2.0 * torch.randn(60).double()
X_HELD_OUT = torch.randn(200, 40).double()
Y_HELD_OUT = X_HELD_OUT @ TRUTH + 2.0 * torch.randn(200).double()


def training_loss(weights, log_penalty):
    """One scalar a sample: (batch, 40) weights and (batch, 2) natural logarithms of the penalties."""
    return (weights @ X.T - Y).square().mean(dim=1) + (log_penalty.exp()[:, GROUP] * weights.square()).sum(dim=1)


def validation_loss(weights):
    return (weights @ X_HELD_OUT.T - Y_HELD_OUT).square().mean(dim=1)


def trained(log_penalty):
    """The weights of each of a batch of penalties, (batch, 40), all trained at once."""
    start, newton = X.new_zeros(len(log_penalty), 40), eq.Newton(linear_solver=eq.Dense())
    return eq.argmin(training_loss, start, log_penalty, solver=newton, atol=1e-11).value


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="ridge_hypergradient.png", help="the picture")
    parser.add_argument("--steps", type=int, default=40, help="steps of gradient descent on the penalties")
    options = parser.parse_args()

    log_penalty, path = X.new_tensor([[2.0, -5.0]]).requires_grad_(), []
    nudge = 1e-4 * torch.eye(2).double()
    for step in range(options.steps + 1):
        loss = validation_loss(trained(log_penalty))
        (gradient,) = torch.autograd.grad(loss.sum(), log_penalty)
        path.append([*log_penalty[0].tolist(), loss.item()])
        if step == 0:
            gram = X.T @ X / len(X) + torch.diag_embed(log_penalty.exp()[:, GROUP])
            closed_form = validation_loss(torch.linalg.solve(gram, X.T @ Y / len(X)))
            (exact,) = torch.autograd.grad(closed_form.sum(), log_penalty)
            ends = [validation_loss(trained(log_penalty.detach() + sign * nudge)) for sign in (1, -1)]
            for name, other in ("finite differences", (ends[0] - ends[1]) / 2e-4), ("the closed form", exact[0]):
                error = (gradient[0] - other).norm() / other.norm()
                print(f"implicit hyper-gradient against {name}: relative error {error:.1e}")
        log_penalty = (log_penalty - 0.5 * gradient).detach().requires_grad_()
    print(f"validation loss: {path[0][2]:.3f} at the start, {path[-1][2]:.3f} after {options.steps} steps")
    print("penalties found: {:.3f} (features that matter), {:.3f} (noise)".format(*log_penalty.detach().exp()[0]))

    axis = torch.linspace(-7, 3, 41).double()
    surface = validation_loss(trained(torch.cartesian_prod(axis, axis))).detach().reshape(41, 41)
    fig, ax = plt.subplots(figsize=(6, 4.6), layout="constrained")
    filled = ax.contourf(axis.exp(), axis.exp(), surface.T, levels=range(4, 28))
    fig.colorbar(filled, label="mean squared error on the validation set")
    first, second, _ = torch.tensor(path).T.exp()
    ax.plot(first, second, "w.-", label="descent by the implicit gradient")
    ax.plot(first[-1], second[-1], "r*", markersize=14, label="found")
    ax.set(
        xscale="log", yscale="log", xlabel="penalty of the 10 features that matter", ylabel="penalty of the 30 others"
    )
    ax.legend(facecolor="0.6", loc="upper left")
    fig.savefig(options.out, dpi=90)


if __name__ == "__main__":
    main()
