"""What single calls of a cell tell: whether it is a function of its state and its inputs, sample by sample."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.diagnosis.causes import Cause, Finding
from equilibria.norms import rms_norm
from equilibria.problem import FixedPoint
from equilibria.problem.evaluation import rounding_level
from equilibria.problem.randomness import Watch, culprits
from equilibria.tree import Layout

# Relative changes below this many rounding levels are none; in half precision, whose levels are coarse, fewer.
NOISE = 100.0
HALF_NOISE = 4.0
# A cell that is further from smooth than so many levels rounds more coarsely somewhere inside than its dtype says.
ROUGH = 20.0


class Calls:
    """Single calls of a cell on packed states.

    Args:
        cell: from a state and the inputs to a state.
        z0: a state.
        inputs: of the cell.
        batch_dims: as for `eq.fixed_point`.
    """

    def __init__(self, cell: Callable[..., Any], z0: Any, inputs: tuple[Any, ...], batch_dims: int) -> None:
        self.cell = cell
        self.inputs = inputs
        self.layout = Layout.of(z0, batch_dims)
        self.start = self.layout.pack_start(z0)
        self.problem = FixedPoint(cell, inputs, self.layout, rms_norm, None, None, has_aux=False)
        self.image = self.start
        self.parameters: dict[str, Tensor] = {}
        # The relative accuracy of its values, where that is coarser than its dtype says.
        self.noise = 0.0

    @property
    def level(self) -> float:
        """The relative residual that rounding alone explains."""
        return max(rounding_level(self.problem.compute_dtype or self.layout.dtype), self.noise)

    def findings(self) -> list[Finding]:
        """What is wrong; after some of it nothing further can be measured, and the list ends with it."""
        found = self._contract()
        if found:
            return found
        found = [*self._finite()]
        found += self._constant()
        if any(one.cause in (Cause.RANDOM, Cause.STATEFUL) for one in found):
            return found
        return found + self._dependence()

    def call(self, z: Tensor) -> Tensor:
        """The packed image of a packed state, without grad."""
        with torch.no_grad():
            return self.problem.apply(z).clone()

    def probe(self, seed: int) -> Tensor:
        """A state of the size of images, away from all that is special."""
        noise = torch.randn(self.start.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        scale = rms_norm(self.image.nan_to_num(0, 0, 0)).clamp(min=1e-3)
        return self.problem.round(self.start + scale[:, None] * noise.to(self.start))

    def moved(self, one: Tensor, other: Tensor) -> Tensor:
        """Which samples of two images differ by more than rounding."""
        dtype = self.problem.compute_dtype or self.layout.dtype
        level = rounding_level(dtype) * (HALF_NOISE if dtype.itemsize == 2 else NOISE)
        size = torch.maximum(rms_norm(one), rms_norm(other)).nan_to_num(0, 0, 0)
        apart = rms_norm((one - other).nan_to_num(0, 0, 0))
        return apart > level * size

    def _contract(self) -> list[Finding]:
        tree = self.layout.unpack(self.start.clone())
        tensors = [leaf for leaf in pytree.tree_leaves((tree, self.inputs)) if isinstance(leaf, Tensor)]
        before = [tensor.clone() for tensor in tensors]
        try:
            with torch.no_grad():
                output = self.cell(tree, *self.inputs)
        except Exception as error:  # whatever a user's code raises is what there is to tell
            return [Finding(Cause.FAILS, f"{type(error).__name__}: {error}"[:300])]
        changed = any(
            not torch.equal(old.nan_to_num(), new.nan_to_num()) for old, new in zip(before, tensors, strict=True)
        )
        if changed:
            return [Finding(Cause.IN_PLACE)]
        try:
            self.image = self.layout.pack(output, "the cell").clone()
        except (TypeError, ValueError) as error:
            return [Finding(Cause.STRUCTURE, str(error).rstrip("."))]
        return []

    def _finite(self) -> list[Finding]:
        batch = self.layout.batch
        bad_input = torch.zeros(batch, dtype=torch.bool)
        for leaf in pytree.tree_leaves(self.inputs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (batch,):
                bad_input |= ~leaf.isfinite().reshape(batch, -1).all(dim=1).cpu()
        bad = ~self.call(self.start).isfinite().all(dim=1).cpu() & ~bad_input
        found = []
        for cause, which in ((Cause.INPUT_NOT_FINITE, bad_input), (Cause.NOT_FINITE, bad)):
            if bool(which.any()):
                found.append(Finding(cause, "", tuple(which.nonzero().flatten().tolist())))
        return found

    def _constant(self) -> list[Finding]:
        z = self.probe(1)
        watch = Watch(z.device)
        outputs = [self.call(z) for _ in range(5)]
        if not any(bool(self.moved(outputs[0], other).any()) for other in outputs[1:]):
            return []
        if watch.moved():
            return [Finding(Cause.RANDOM, culprits(lambda: self.call(z), z.device).removeprefix(" "))]
        return [Finding(Cause.STATEFUL)]

    def _dependence(self) -> list[Finding]:
        z, other = self.probe(1), self.probe(2)
        at, elsewhere = self.call(z), self.call(other)
        found = []
        if not bool(self.moved(at, elsewhere).any()):
            return [Finding(Cause.IGNORES_STATE)]
        if self.layout.batch > 1:
            mixed = torch.cat([z[:1], other[1:]])
            coupled = self.moved(at[:1], self.call(mixed)[:1])
            if bool(coupled.any()):
                found.append(Finding(Cause.COUPLED, "the first sample moves with the states of the others"))
        if self.inputs and not bool(self.moved(at, self._at_other_inputs(z)).any()):
            found.append(Finding(Cause.IGNORES_INPUT))
        return found + self._derivative(z, other)

    def _at_other_inputs(self, z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)

        def change(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if not leaf.is_floating_point():
                return leaf.roll(1, 0) if leaf.ndim else leaf
            noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
            size = float(leaf.nan_to_num(0, 0, 0).abs().max()) if leaf.numel() else 0.0
            return leaf + max(size, 1e-3) * noise

        changed = pytree.tree_map(change, self.inputs)
        with torch.no_grad():
            try:
                return self.layout.pack(self.cell(self.layout.unpack(z.clone()), *changed), "the cell").clone()
            except Exception:  # inputs that nobody gave may be ones that it does not take
                return torch.full_like(z, torch.inf)

    def _derivative(self, z: Tensor, other: Tensor) -> list[Finding]:
        jacobian = self.problem.linearize(z)
        if not jacobian.image.requires_grad:
            return [Finding(Cause.DETACHED)]
        dtype = self.problem.compute_dtype or self.layout.dtype
        u = other - z
        # A second difference, to which no derivative contributes.
        near = (ROUGH * self.level) ** 0.5 / 4
        bent = self.call(z + near * u) - 2 * self.call(z + near / 2 * u) + self.call(z)
        rough = float((rms_norm(bent) / rms_norm(self.call(z))).nan_to_num(0, 0, 0).max())
        if rough > ROUGH * self.level:
            self.noise = rough
        if self.noise or torch.finfo(dtype).eps > 1e-4:
            return []  # differences of what is computed in half precision say nothing
        step = torch.finfo(dtype).eps ** (1 / 3)
        difference = (self.call(z + step * u) - self.call(z - step * u)) / (2 * step)
        product = jacobian.product(u)
        apart = rms_norm((product - difference).nan_to_num(0, 0, 0))
        size = torch.maximum(rms_norm(product), rms_norm(difference)).nan_to_num(0, 0, 0)
        rounding = torch.finfo(dtype).eps ** (2 / 3) * rms_norm(self.call(z)).nan_to_num(0, 0, 0)
        wrong = apart > 0.2 * size + 10 * rounding
        if bool(wrong.any()):
            worst = float((apart / size.clamp(min=1e-30)).max())
            which = tuple(wrong.nonzero().flatten().tolist())
            return [Finding(Cause.WRONG_DERIVATIVE, f"off from finite differences by {worst:.0%}", which)]
        return []
