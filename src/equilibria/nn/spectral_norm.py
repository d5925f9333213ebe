"""Weights whose operator norm has a bound."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equilibria.options import check_positive

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Frequencies that the symbol of a convolution is looked at, for each tap of its kernel, in each dimension.
FREQUENCIES = 6

Layer = TypeVar("Layer", bound=nn.Module)


def spectral_norm(module: Layer, name: str = "weight", bound: float = 1.0) -> Layer:
    """Keep the operator norm of a layer's weight at or below `bound`, by shrinking it where it is above.

    >>> layer = eq.nn.spectral_norm(nn.Linear(8, 8), bound=0.9)
    >>> with torch.no_grad():
    ...     layer.parametrizations.weight.original *= 100
    >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 0.9 + 1e-5)
    True

    The norm is worked out from the weight as it is at each access, by a singular value decomposition: there is no
    estimate that could be stale, in `eval()`, after a step of the optimizer or after `load_state_dict`. A DEQ accesses
    the weights of its cell once a forward.

    Of a convolution it is that of the operator on images of any size, zero or circular padding, with groups, strides
    and dilation: the supremum over all frequencies w of the norm of sum_k K[k] exp(i w k), of which a grid of six
    frequencies for each tap gives an upper bound, 1.5% above at most for each dimension of a kernel of 3. It is reached
    by large images without a stride.

    Args:
        module: an `nn.Linear`, a convolution or a transposed one, or any module whose tensor `name` is a matrix.
        name: of the tensor.
        bound: of the norm, above 0.

    Returns:
        The module itself; `torch.nn.utils.parametrize.remove_parametrizations` takes the bound away again.

    Raises:
        TypeError, ValueError: the tensor has no operator norm that is known, such as that of a convolution whose
            padding reflects.

    Sources: Miyato et al. (2018), Spectral normalization for generative adversarial networks, without its power
    iteration; Sedghi, Gupta and Long (2019), The singular values of convolutional layers; Ehlich and Zeller (1964),
    Schwankung von Polynomen zwischen Gitterpunkten, for what lies between frequencies of a grid.
    """
    check_positive("bound", bound)
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{type(module).__name__} has no floating tensor '{name}' to bound the norm of.")
    if isinstance(module, CONVOLUTIONS) and name == "weight":
        if module.padding_mode not in ("zeros", "circular"):
            raise ValueError(
                f"A convolution whose padding is '{module.padding_mode}' may be of a larger norm than its kernel says: "
                "use padding_mode='zeros' or 'circular'."
            )
        groups = module.groups
    elif weight.ndim == 2:
        groups = 1
    else:
        raise TypeError(
            f"The operator norm of '{name}' of {type(module).__name__}, of shape {tuple(weight.shape)}, is not known: "
            "take a matrix, or the weight of a convolution."
        )
    parametrize.register_parametrization(module, name, _Bounded(bound, groups))
    return module


class _Bounded(nn.Module):
    """A weight times the factor that brings its operator norm to the bound, 1 where it is below."""

    def __init__(self, bound: float, groups: int) -> None:
        super().__init__()
        self.bound = bound
        self.groups = groups

    def forward(self, weight: Tensor) -> Tensor:
        norm = operator_norm_of(weight.to(torch.promote_types(weight.dtype, torch.float32)), self.groups)
        factor = self.bound / norm.clamp(min=self.bound)
        # What is not finite has no norm, and stays what it is.
        return (weight * torch.where(norm.isfinite(), factor, 1)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


def operator_norm_of(weight: Tensor, groups: int = 1) -> Tensor:
    """The norm of a matrix, or an upper bound on that of a convolution on images of any size, differentiable."""
    if weight.numel() == 0 or not bool(weight.isfinite().all()):
        return weight.sum() * (0.0 if weight.numel() == 0 else math.nan)
    kernel = weight.shape[2:]
    matrices = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], *kernel)
    slack = 1.0
    if kernel:
        grid = [FREQUENCIES * taps if taps > 1 else 1 for taps in kernel]
        # Between two neighbours of a grid of n frequencies, polynomials with as many terms rise by this much at most.
        slack = math.prod(1 / math.cos(math.pi * (taps - 1) / (2 * n)) for taps, n in zip(kernel, grid, strict=True))
        spectrum = torch.fft.rfftn(matrices, s=grid, dim=tuple(range(3, 3 + len(kernel))))
        matrices = spectrum.flatten(3).permute(0, 3, 1, 2).flatten(0, 1)
    with torch.no_grad():
        wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mH
        largest = torch.linalg.eigvalsh(wide @ wide.mH)[:, -1].argmax()
    return slack * torch.linalg.matrix_norm(matrices[largest], 2)
