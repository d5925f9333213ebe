"""What the laws are tested on: states of every structure, and functions of them with known properties."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import equilibria as eq

# Leaves by their shape within one sample; the batch dimensions come in front.
STRUCTURES: dict[str, Any] = {
    "tensor": (4,),
    "tuple": [(2,), (1, 3)],
    "dict": {"h": (3,), "c": (2, 1)},
    "nested": {"a": [(2,), [(1,)]], "b": (2,)},
}


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def width(structure: str) -> int:
    shapes = pytree.tree_leaves(STRUCTURES[structure], is_leaf=_is_shape)
    return sum(torch.Size(shape).numel() for shape in shapes)


def split(rows: Tensor, structure: str) -> Any:
    """The state whose entries, sample by sample, are `rows` of shape (*batch, n); n is free for a single tensor."""
    if structure == "tensor":
        return rows
    batch = rows.shape[:-1]
    shapes, spec = pytree.tree_flatten(STRUCTURES[structure], is_leaf=_is_shape)
    parts = rows.split([torch.Size(shape).numel() for shape in shapes], dim=-1)
    tree = pytree.tree_unflatten([p.reshape(*batch, *s) for p, s in zip(parts, shapes, strict=True)], spec)
    return tuple(tree) if structure == "tuple" else tree


def join(state: Any, batch_dims: int) -> Tensor:
    """The entries of a state, (*batch, n)."""
    return torch.cat([leaf.flatten(batch_dims) for leaf in pytree.tree_leaves(state)], dim=-1)


def leaves(state: Any) -> list[Tensor]:
    return pytree.tree_leaves(state)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, signs of zeros and NaN included."""
    integer = {torch.float64: torch.int64, torch.float32: torch.int32}
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(torch.equal(x.detach().view(integer[x.dtype]), y.detach().view(integer[y.dtype])) for x, y in pairs)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(n: int, seed: int, norm: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random matrix without symmetry, of the given operator norm."""
    a = torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    return (a * (norm / torch.linalg.matrix_norm(a, 2))).to(dtype)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def tanh_map(structure: str = "tensor", batch_dims: int = 1) -> Callable[[Any, Tensor, Tensor], Any]:
    """f(z, W, x) = tanh(z W + x) on a state of any structure: contracts where the norm of W is below 1."""

    def f(z: Any, w: Tensor, x: Tensor) -> Any:
        return split(torch.tanh(join(z, batch_dims) @ w + x), structure)

    return f


def expanding(z: Tensor, a: Tensor, x: Tensor) -> Tensor:
    """Slope about -3 everywhere: plain iteration doubles its error and more, under-relaxation at 0.3 converges."""
    return x - 3 * z + a * torch.tanh(z)


class Cell(nn.Module):
    """tanh(A z + x) with a norm of A that makes it contract."""

    def __init__(self, n: int, norm: float = 0.6, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n, dtype=dtype)
        with torch.no_grad():
            self.linear.weight.copy_(matrix(n, 7, norm))
            self.linear.bias.copy_(normal(n, seed=8))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Counted:
    """A function that counts its calls."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.calls = 0

    def __call__(self, *inputs: Any) -> Any:
        self.calls += 1
        return self.f(*inputs)


def residual(f: Callable[..., Any], z: Any, *args: Any, norm: Any = eq.rms_norm, batch_dims: int = 1) -> Tensor:
    """norm(f(z) - z) / norm(f(z)) of the worst leaf, per sample: the definition, written down once more."""
    with torch.no_grad():
        image = f(z, *args)
        ratios = []
        for new, old in zip(leaves(image), leaves(z), strict=True):
            shape = old.shape[:batch_dims]
            wide = torch.promote_types(old.dtype, torch.float32)
            new, old = (t.to(wide).reshape(shape.numel(), *t.shape[batch_dims:]) for t in (new, old))
            above, below = norm(new - old), norm(new)
            ratios.append(torch.where(above == 0, above, above / below).reshape(shape))
        return torch.stack(ratios).amax(dim=0)
