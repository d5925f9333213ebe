"""What each of two processes does in the tests of layers on several ranks; a light module, as each imports it anew."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from maps import Cell, Counted, normal
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import equilibria as eq

DOUBLE = torch.float64

# Pairs of a solver and an adjoint, as layers are trained with.
PAIRS = {
    "Implicit": (eq.Anderson(), eq.Implicit()),
    "Implicit by Picard": (eq.Picard(), eq.Implicit(solver=eq.Picard(), order=1)),
    "Implicit by BiCGSTAB": (eq.Broyden(), eq.Implicit(solver=eq.BiCGSTAB())),
    "Implicit of order 2": (eq.Anderson(), eq.Implicit(order=2)),
    "Phantom": (eq.Anderson(), eq.Phantom(3)),
    "Unrolled": (eq.Anderson(), eq.Unrolled()),
    "Unrolled with checkpoints": (eq.Picard(), eq.Unrolled(checkpoint=True)),
}


def on_each_rank(work: Callable[[int], None], ranks: int = 2) -> None:
    """Run work(rank) in processes that share a gloo group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (work, ranks, port), nprocs=ranks)


def _rank(rank: int, work: Callable[[int], None], ranks: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # A rank that waits for another in vain is to fail, and soon.
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        work(rank)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def on_all_ranks(number: int) -> list[int]:
    """The numbers that the ranks give, smallest first."""
    ends = torch.tensor([number, -number])
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    return [-int(ends[1]), int(ends[0])]


class _Sum(torch.autograd.Function):
    """The sum over ranks of a tensor, and of its gradient: a collective inside of f, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, *grads):
        return _Sum.apply(grads[0])  # so that it has derivatives of its own


def _own(z: Tensor, rank: int) -> Tensor:
    """The tensor itself, by way of all ranks."""
    parts = [torch.zeros_like(z), torch.zeros_like(z)]
    parts[rank] = z
    return _Sum.apply(torch.stack(parts))[rank]


# Cells with collectives.


def work(rank: int) -> None:
    stop_together(rank)
    stop_together_with_other_solvers(rank)
    find_roots_and_minima_together(rank)
    fail_together(rank)
    raise_together(rank)
    solve_with_a_sharded_cell(rank)
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
            fewest, most = on_all_ranks(counted.calls)
            assert fewest == most
            if solver == eq.Picard() and rank == 0:
                assert (sol.steps < sol.evaluations).all()


def stop_together_with_other_solvers(rank: int) -> None:
    slope = torch.tensor([0.1, 0.8][rank], dtype=DOUBLE, requires_grad=True)
    solvers = (eq.GMRES(), eq.BiCGSTAB(), eq.ConjugateGradient(), eq.Dense(), eq.Anderson(), eq.Broyden())
    adjoints = [eq.Implicit(solver=solver) for solver in solvers]
    for adjoint in (*adjoints, eq.Implicit(order=2), eq.Neumann(2), eq.OneStep()):
        for solver in (eq.Broyden(), eq.Newton()):
            counted = Counted(lambda z: torch.sin(slope * _own(z, rank)) + 1)
            sol = eq.fixed_point(
                counted,
                torch.zeros(2, 3, dtype=DOUBLE),
                solver=solver,
                adjoint=adjoint,
                process_group=torch.distributed.group.WORLD,
            )
            (gradient,) = torch.autograd.grad(sol.value.sum(), slope)
            if isinstance(adjoint, eq.Implicit):
                z = sol.value[0, 0].item()
                derivative = torch.cos(slope.detach() * z).item()
                assert gradient.item() == pytest.approx(6 * derivative * z / (1 - slope.item() * derivative), rel=1e-6)
            fewest, most = on_all_ranks(counted.calls)
            assert fewest == most, (solver, adjoint)
            steps = on_all_ranks(int(sol.steps.max()))
            assert steps[0] < steps[1], (solver, adjoint)


def find_roots_and_minima_together(rank: int) -> None:
    # The function of rank 0 is flat at its start, that of rank 1 is far from its solution.
    group = torch.distributed.group.WORLD
    target = torch.tensor([1e-3, 50.0][rank], dtype=DOUBLE, requires_grad=True)
    start = torch.zeros(2, 3, dtype=DOUBLE)

    def cubic(z):
        return _own(z, rank) ** 3 + z - target

    def quartic(z):
        return (_own(z, rank) ** 4 / 4 + z**2 / 2 - target * z).sum(dim=1)

    solves = [(eq.root, cubic, solver) for solver in (eq.Newton(), eq.Newton(linear_solver=eq.Dense()), eq.Broyden())]
    solves += [(eq.argmin, quartic, solver) for solver in (eq.LBFGS(), eq.Newton(), eq.GradientDescent(0.01))]
    for entry, function, solver in solves:
        counted = Counted(function)
        sol = entry(counted, start, solver=solver, process_group=group, max_steps=2000)
        z = sol.value.detach()
        torch.testing.assert_close(z**3 + z, target.detach().expand(2, 3), rtol=1e-6, atol=1e-7)
        (gradient,) = torch.autograd.grad(sol.value.sum(), target)
        assert gradient.item() == pytest.approx((1 / (3 * z**2 + 1)).sum().item(), rel=1e-6)
        fewest, most = on_all_ranks(counted.calls)
        assert fewest == most, (entry, solver)
        steps = on_all_ranks(int(sol.steps.max()))
        assert steps[0] < steps[1], (entry, solver)


def raise_together(rank: int) -> None:
    """One rank fails, forward or backward, in any entry point: all raise, none waits for the others."""
    group = torch.distributed.group.WORLD
    start = torch.zeros(2, 3, dtype=DOUBLE)
    hard = rank == 1
    match = "did not meet the tolerance" if hard else "another rank"
    slope = torch.tensor(0.9 if hard else 0.01, dtype=DOUBLE, requires_grad=True)
    f = lambda z: slope * _own(z, rank) + 1  # noqa: E731
    objective = lambda z: (0.5 * z**2 - slope * _own(z, rank) ** 2 / 2 - z).sum(dim=1)  # noqa: E731
    with pytest.raises(eq.SolveError, match=match):
        eq.fixed_point(f, start, solver=eq.Picard(), process_group=group, max_steps=10)
    with pytest.raises(eq.SolveError, match=match):
        eq.root(lambda z: z - f(z), start, solver=eq.Picard(), process_group=group, max_steps=10)
    with pytest.raises(eq.SolveError, match=match):
        eq.argmin(objective, start, solver=eq.GradientDescent(1.0), process_group=group, max_steps=10)
    for solver in (eq.Picard(), eq.GMRES(restart=1)):
        bent = lambda z: slope * torch.sin(_own(z, rank) * torch.arange(1.0, 4.0, dtype=DOUBLE) / 3) + 1  # noqa: E731
        sol = eq.fixed_point(bent, start, adjoint=eq.Implicit(solver=solver, max_steps=5), process_group=group)
        with pytest.raises(eq.SolveError, match="backward solve"):
            sol.value.sum().backward()


def solve_with_a_sharded_cell(rank: int) -> None:
    """FSDP2 on the cell makes every evaluation a collective, and a process group keeps the ranks together."""
    x = _batch()
    for solver in (eq.Anderson(), eq.Broyden()):
        for adjoint in (eq.Implicit(), eq.Phantom(2), eq.Unrolled()):
            whole, sharded = Cell(8, norm=0.9), Cell(8, norm=0.9)
            fully_shard(sharded, mesh=_mesh())
            options = {"solver": solver, "adjoint": adjoint}
            eq.fixed_point(whole, torch.zeros_like(x), x, **options).value.sum().backward()
            mine = _mine(x, rank)
            group = torch.distributed.group.WORLD
            sol = eq.fixed_point(sharded, torch.zeros_like(mine), mine, process_group=group, **options)
            sol.value.sum().backward()
            fewest, most = on_all_ranks(int(sol.steps.max()))
            assert fewest < most
            got = sharded.linear.weight.grad.full_tensor()
            torch.testing.assert_close(2 * got, whole.linear.weight.grad, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match=r"fully_shard\(layer\)"):
        eq.DEQ(sharded)(mine)


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


# Training in parallel.


def _batch() -> Tensor:
    x = normal(6, 8, seed=3)
    x[3:] *= 8  # so that the ranks need different counts
    return x


def _mine(x: Tensor, rank: int) -> Tensor:
    return x[3 * rank : 3 * rank + 3]


def _mesh() -> Any:
    return torch.distributed.init_device_mesh("cpu", (2,))


def _layer(pair: str) -> eq.DEQ:
    solver, adjoint = PAIRS[pair]
    cell = Cell(8, norm=0.9)
    return eq.DEQ(cell, solver=solver, adjoint=adjoint, rtol=1e-9, max_steps=300, on_failure="raise")


class Net(nn.Module):
    """A DEQ between linear layers, with a part that is not used, a layer used twice, or checkpoints around it."""

    def __init__(self, pair: str = "Implicit", spare: bool = False, passes: int = 1, saving: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.passes, self.saving = passes, saving
        self.before, self.layer, self.after = nn.Linear(8, 8), _layer(pair), nn.Linear(8, 1)
        if spare:
            self.spare = nn.Linear(8, 8)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for _ in range(self.passes):
            x = checkpoint(self.layer, x, use_reentrant=False) if self.saving else self.layer(x)
        return self.after(x)


def _train_differently(model: nn.Module, x: Tensor, apart: bool = True) -> None:
    """Several steps of an optimiser, in which the ranks need different numbers of evaluations."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    different = []
    for _ in range(3):
        optimiser.zero_grad()
        with eq.monitor(model) as reports:
            loss = model(x).square().mean()
        loss.backward()
        optimiser.step()
        if apart:
            fewest, most = on_all_ranks(reports[0].evaluations)
            different.append(fewest < most)
    assert any(different) == apart


def _assert_same(got: dict[str, Tensor], one: nn.Module) -> None:
    assert got.keys() == one.state_dict().keys()
    for name, want in one.state_dict().items():
        torch.testing.assert_close(got[name], want, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def work_ddp(rank: int) -> None:
    ddp = nn.parallel.DistributedDataParallel
    x = _batch()
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [({"pair": pair}, {}) for pair in PAIRS]
    cases += [
        ({}, {"static_graph": True}),
        ({}, {"gradient_as_bucket_view": True}),
        ({"spare": True}, {"find_unused_parameters": True}),
        ({"passes": 2}, {}),
        ({"saving": True}, {"static_graph": True}),
    ]
    for of_net, of_ddp in cases:
        one, model = Net(**of_net), ddp(Net(**of_net), **of_ddp)
        _train_differently(one, x, apart=False)
        _train_differently(model, _mine(x, rank))
        _assert_same(model.module.state_dict(), one)
    # Gradients of several batches, added up on each rank and exchanged once.
    one, model = Net(), ddp(Net())
    y = 2 * x
    (one(x).square().mean() + one(y).square().mean()).backward()
    with model.no_sync():
        model(_mine(x, rank)).square().mean().backward()
    model(_mine(y, rank)).square().mean().backward()
    for got, want in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-7, atol=1e-9)


def _sharded(model: Net, **options: Any) -> Net:
    """The layer as a whole, and the model around it."""
    fully_shard(model.layer, mesh=_mesh(), **options)
    fully_shard(model, mesh=_mesh(), **options)
    return model


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def work_fsdp(rank: int) -> None:
    x = _batch()
    for of_net in (*({"pair": pair} for pair in PAIRS), {"passes": 2}, {"saving": True}):
        one, model = Net(**of_net), _sharded(Net(**of_net))
        _train_differently(one, x, apart=False)
        _train_differently(model, _mine(x, rank))
        _assert_same(_whole(model), one)
    whole = _whole(model)
    twin = _sharded(Net())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    # Rank 0 alone has what is loaded; a copy, since the others' places in it are filled in.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(twin, dict(whole) if rank == 0 else {}, options=options)
    assert all(torch.equal(value, whole[name]) for name, value in _whole(twin).items())
    torch.testing.assert_close(twin(_mine(x, rank)), model(_mine(x, rank)), rtol=0, atol=0)
    shard_in_half_precision(rank)


def shard_in_half_precision(rank: int) -> None:
    x = _batch().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    one, model = Net().float(), Net().float()
    model.layer.rtol = None  # the default of bfloat16, in which every product is now
    model = _sharded(model, mp_policy=policy)
    one.layer.rtol = 1e-6
    one(x).square().mean().backward()
    with eq.monitor(model) as reports:
        out = model(_mine(x, rank))
    assert out.dtype == torch.bfloat16
    assert (reports[0].residual > 1e-5).all()
    out.float().square().mean().backward()
    for got, want in zip(model.parameters(), one.parameters(), strict=True):
        assert got.grad.dtype == torch.float32
        assert (got.grad.full_tensor() - want.grad).norm() < 0.1 * want.grad.norm()
