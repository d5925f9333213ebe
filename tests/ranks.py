"""What each of two processes does in the tests of layers on several ranks; a light module, as each imports it anew."""

import os
import socket

import pytest
import torch
from maps import Cell, Counted, normal
from torch import Tensor, nn

import equilibria as eq

DOUBLE = torch.float64


def on_each_rank(work, ranks: int = 2) -> None:
    """Run work(rank) in processes that share a gloo group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (work, ranks, port), nprocs=ranks)


def _rank(rank: int, work, ranks: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        work(rank)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over ranks of a tensor, and of its gradient: a collective inside of f, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, *grads):
        return _Sum.forward(ctx, grads[0])


def _own(z: Tensor, rank: int) -> Tensor:
    """The tensor itself, by way of all ranks."""
    parts = [torch.zeros_like(z), torch.zeros_like(z)]
    parts[rank] = z
    return _Sum.apply(torch.stack(parts))[rank]


def work(rank: int) -> None:
    stop_together(rank)
    fail_together(rank)
    train_like_one(rank)


def stop_together(rank: int) -> None:
    # Rank 0 is done after a few evaluations, rank 1 needs many; each evaluation is a collective.
    slope = torch.tensor([0.1, 0.8][rank], dtype=DOUBLE, requires_grad=True)
    f = lambda z: slope * _own(z, rank) + 1  # noqa: E731
    for adjoint in (eq.Implicit(), eq.Implicit(solver=eq.Picard()), eq.Unrolled(), eq.Phantom(2)):
        for solver in (eq.Picard(), eq.Anderson()):
            counted = Counted(f)
            sol = eq.fixed_point(
                counted,
                torch.zeros(2, 3, dtype=DOUBLE),
                solver=solver,
                adjoint=adjoint,
                process_group=torch.distributed.group.WORLD,
            )
            torch.testing.assert_close(sol.value, (1 / (1 - slope)).expand(2, 3), rtol=1e-6, atol=0)
            (gradient,) = torch.autograd.grad(sol.value.sum(), slope)
            if not isinstance(adjoint, eq.Phantom):
                assert gradient.item() == pytest.approx(6 / (1 - slope.item()) ** 2, rel=1e-4)
            calls = torch.tensor([counted.calls, -counted.calls])
            torch.distributed.all_reduce(calls, torch.distributed.ReduceOp.MAX)
            assert calls[0] == -calls[1]  # all ranks called alike
            if solver == eq.Picard() and rank == 0:
                assert (sol.steps < sol.evaluations).all()


def fail_together(rank: int) -> None:
    group = torch.distributed.group.WORLD
    slope = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    x = torch.full((2, 3), torch.nan if rank == 1 else 1.0, dtype=DOUBLE)
    f = lambda z: slope * _own(z, rank) + x  # noqa: E731
    zeros = torch.zeros(2, 3, dtype=DOUBLE)
    with pytest.raises(eq.SolveError, match="another rank" if rank == 0 else "NaN"):
        eq.fixed_point(f, zeros, process_group=group)
    for adjoint in (eq.Implicit(), eq.Unrolled(), eq.Phantom(2)):
        for has_aux in (False, True):
            g = (lambda z: (f(z), z)) if has_aux else f
            options = {"adjoint": adjoint, "process_group": group, "on_failure": "ignore", "has_aux": has_aux}
            sol = eq.fixed_point(g, zeros, **options)
            (gradient,) = torch.autograd.grad(sol.value.sum(), slope)
            assert (gradient == 0) if rank == 1 else (gradient > 0)


def _model() -> nn.Module:
    torch.manual_seed(0)
    layer = eq.DEQ(Cell(8, norm=0.9, dtype=torch.float32), rtol=1e-6, max_steps=100)
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 1))


def _train(model: nn.Module, x: Tensor) -> list[Tensor]:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    return [p.detach() for p in model.parameters()]


def train_like_one(rank: int) -> None:
    x = normal(6, 8, seed=3, dtype=torch.float32)
    x[3:] *= 5  # so that the ranks need different counts
    want = _train(_model(), x)
    for static in (False, True):
        model = nn.parallel.DistributedDataParallel(_model(), static_graph=static)
        got = _train(model, x[3 * rank : 3 * rank + 3])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
