"""AC power flow on a grid of nine buses: voltages as the root of the power balance, and their sensitivities to loads.

A batch of load levels is solved at once; the one beyond the nose of the curve has no solution, as its status says.
Source of the data: the nine-bus system of Anderson and Fouad (1977), Power system control and stability, chapter 2.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from torch.autograd.functional import jacobian

import equilibria as eq

LINES = [(1, 4, 0, 0.0576, 0), (2, 7, 0, 0.0625, 0), (3, 9, 0, 0.0586, 0), (4, 5, 0.01, 0.085, 0.176)]
LINES += [(4, 6, 0.017, 0.092, 0.158), (5, 7, 0.032, 0.161, 0.306), (6, 9, 0.039, 0.17, 0.358)]
LINES += [(7, 8, 0.0085, 0.072, 0.149), (8, 9, 0.0119, 0.1008, 0.209)]
START, END, R, X, CHARGE = torch.tensor(LINES, dtype=torch.float64).T  # resistance, reactance, susceptance: per unit
BUSES, START, END = torch.eye(9).double(), START.long() - 1, END.long() - 1
LOADS = torch.tensor([[[1.25, 0.9, 1.0], [0.5, 0.3, 0.35]]], dtype=torch.float64)  # P and Q at buses 5, 6 and 8
INCIDENCE = BUSES[START] - BUSES[END]
G = INCIDENCE.T @ ((R / (R**2 + X**2))[:, None] * INCIDENCE)
B = (INCIDENCE.abs().T @ CHARGE / 2).diag() - INCIDENCE.T @ ((X / (R**2 + X**2))[:, None] * INCIDENCE)


def power(state):
    """Voltage of each bus, held where buses 1 to 3 generate, and what it sends to each other, active and reactive."""
    angle = torch.nn.functional.pad(state[:, :8], (1, 0))
    voltage = torch.cat([state.new_tensor([[1.04, 1.025, 1.025]] * len(state)), state[:, 8:]], dim=1)
    turn, product = angle[:, :, None] - angle[:, None, :], voltage[:, :, None] * voltage[:, None, :]
    return voltage, product * (G * turn.cos() + B * turn.sin()), product * (G * turn.sin() - B * turn.cos())


def imbalance(state, loads):
    """Active power missing at buses 2 to 9, reactive at 4 to 9, for as many unknown angles and voltages."""
    (_, active, reactive), load = power(state), loads @ BUSES[[4, 5, 7]]
    missing = load[:, 0] - 1.63 * BUSES[1] - 0.85 * BUSES[2] + active.sum(dim=2)
    return torch.cat([missing[:, 1:], (load[:, 1] + reactive.sum(dim=2))[:, 3:]], dim=1)


def solve(loads):
    flat = loads.new_tensor([[0.0] * 8 + [1.0] * 6] * len(loads))
    return eq.root(imbalance, flat, loads, solver=eq.Newton(linear_solver=eq.Dense()), atol=1e-11, on_failure="ignore")


def voltages_and_flows(loads):
    """Voltages of buses 4 to 9 and active power into the nine lines at their start: 15 outputs."""
    voltage, active, _ = power(solve(loads).value)
    return torch.cat([voltage[:, 3:], active[:, START, END] - voltage[:, START] ** 2 * G[START, END]], dim=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="power_flow.png")
    parser.add_argument("--steps", type=int, default=45, help="load levels, from 0.2 to 2.4 times the nominal load")
    options = parser.parse_args()
    print(f"bus 1 gives {100 * voltages_and_flows(LOADS)[0, 6]:.1f} MW (the book: 71.6)")
    implicit, nudges = jacobian(voltages_and_flows, LOADS).reshape(15, 6), 1e-5 * torch.eye(6).double().view(6, 2, 3)
    numeric = (voltages_and_flows(LOADS + nudges) - voltages_and_flows(LOADS - nudges)).T / 2e-5
    error = (implicit - numeric).norm() / numeric.norm()
    print(f"sensitivities against finite differences: relative error {error:.1e}")
    levels = torch.linspace(0.2, 2.4, options.steps).double()
    solution = solve(levels[:, None, None] * LOADS)
    found, last = solution.converged, eq.Status(int(solution.status[-1])).name
    print(f"{int(found.sum())} of {len(levels)} loads converged; at {levels[-1]:.1f} times the nominal load: {last}")
    fig, (nose, heat) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    nose.plot(levels[found], power(solution.value)[0][found][:, [4, 5, 7]], ".-", label=["bus 5", "bus 6", "bus 8"])
    nose.axvline(levels[~found].min(), color="red", linestyle=":", label="no solution: not converged")
    nose.set(xlabel="load (multiples of the nominal load)", ylabel="voltage (per unit)")
    nose.legend()
    tenth = heat.imshow(10 * implicit[:6], extent=(-0.5, 5.5, 9.5, 3.5))  # of the base power, 100 MVA
    heat.set_xticks(range(6), [f"{kind} {bus}" for kind in "PQ" for bus in (5, 6, 8)])
    heat.set(xlabel="active (P) and reactive (Q) load at bus", ylabel="voltage at bus")
    fig.colorbar(tenth, label="change of voltage (% per 10 MW or Mvar)")
    fig.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
