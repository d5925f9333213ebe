"""The linear parts of monotone equilibria: W = (1 - m) I - A^T A + B - B^T and the injection U x + b."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equilibria.nn.monotone.coupling import Coupling
from equilibria.nn.monotone.frames import Flat, Periodic
from equilibria.options import check_flag, check_integer, check_positive


class MonotoneLinear(nn.Module):
    """The linear part of a dense monotone equilibrium, W z + U x + b with W = (1 - m) I - A^T A + B - B^T.

    Whatever the weights, I - W is strongly monotone: its symmetric part is m I + A^T A.

    >>> layer = eq.nn.MonotoneDEQ(eq.nn.MonotoneLinear(3, 8))
    >>> layer(torch.randn(2, 3)).shape
    torch.Size([2, 8])

    Args:
        in_features: entries of an input, (batch, in_features).
        features: entries of the state, (batch, features).
        margin: m above 0; the larger, the fewer steps, the smaller the Lipschitz bound, and the less W can be.
        bias: whether there is a b.

    Source: Winston and Kolter (2020), Monotone operator equilibrium networks, proposition 1.
    """

    def __init__(self, in_features: int, features: int, margin: float = 0.1, bias: bool = True) -> None:
        super().__init__()
        check_integer("in_features", in_features, 1)
        check_integer("features", features, 1)
        check_positive("margin", margin)
        check_flag("bias", bias)
        self.in_features = in_features
        self.features = features
        self.margin = margin
        self.A = nn.Parameter(torch.empty(features, features))
        self.B = nn.Parameter(torch.empty(features, features))
        self.U = nn.Parameter(torch.empty(features, in_features))
        self.bias = nn.Parameter(torch.empty(features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, as `nn.Linear` does."""
        for weight in (self.A, self.B, self.U):
            _draw(weight)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def frame(self) -> Flat:
        """Of the state."""
        return Flat(self.features)

    @property
    def input_frame(self) -> Flat:
        """Of the input."""
        return Flat(self.in_features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of an input, without the batch."""
        return (self.in_features,)

    def coupling(self, dtype: torch.dtype) -> Coupling:
        """W, in `dtype`."""
        a, b = self.A.to(dtype), self.B.to(dtype)
        return Coupling.of(a[None], b[None], self.margin, self.frame)

    def inject(self, x: Tensor) -> Tensor:
        """U x + b, packed."""
        return F.linear(x, self.U.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def state(self, packed: Tensor) -> Any:
        """A packed state as the layer returns it."""
        return packed

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, features={self.features}, margin={self.margin}, "
            f"bias={self.bias is not None}"
        )


class MonotoneConv2d(nn.Module):
    """The linear part of a convolutional monotone equilibrium, of one resolution or of several at once.

    A, B and U are convolutions that wrap around the edges, so that W is one small matrix for each frequency, by which
    it is applied and inverted. With several `channels` the state is a tuple of maps, each half as high and wide as the
    one before it; A and B then lead from each to itself and, by strided convolutions, to the next coarser one, W
    therefore both up and down, and the input enters at the finest.

    >>> layer = eq.nn.MonotoneDEQ(eq.nn.MonotoneConv2d(1, (4, 8), size=8))
    >>> [part.shape for part in layer(torch.randn(2, 1, 8, 8))]
    [torch.Size([2, 4, 8, 8]), torch.Size([2, 8, 4, 4])]

    Args:
        in_channels: of an input, (batch, in_channels, height, width).
        channels: of the state; or a tuple, those of each resolution, finest first.
        size: height and width of the input, or one number for both; divisible by 2 for each further resolution.
        kernel_size: odd.
        margin, bias: as for `MonotoneLinear`.

    The cost of a product grows with the square of the channels times 4 for each further resolution: (16, 32, 64) are
    448 components a frequency.

    Source: Winston and Kolter (2020), Monotone operator equilibrium networks, section 4 and appendix.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int | tuple[int, ...],
        size: int | tuple[int, int],
        kernel_size: int = 3,
        margin: float = 0.1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_integer("in_channels", in_channels, 1)
        widths = channels if isinstance(channels, tuple) else (channels,)
        if not widths:
            raise ValueError("channels must name at least one resolution.")
        for width in widths:
            check_integer("channels", width, 1)
        height, width = size if isinstance(size, tuple) else (size, size)
        coarsest = 2 ** (len(widths) - 1)
        for side in (height, width):
            check_integer("size", side, 1)
            if side % coarsest:
                raise ValueError(f"size must be divisible by {coarsest} for {len(widths)} resolutions, not {side}.")
        check_integer("kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0 or kernel_size // 2 > min(height, width) // coarsest:
            raise ValueError(
                f"kernel_size must be odd and reach over at most one turn of the coarsest map, not {kernel_size}."
            )
        check_positive("margin", margin)
        check_flag("bias", bias)
        self.in_channels = in_channels
        self.channels = channels
        self.size = (height, width)
        self.kernel_size = kernel_size
        self.margin = margin
        kernel = (kernel_size, kernel_size)
        pairs = list(pairwise(widths))
        self.A = nn.ParameterList(torch.empty(c, c, *kernel) for c in widths)
        self.B = nn.ParameterList(torch.empty(c, c, *kernel) for c in widths)
        self.A_down = nn.ParameterList(torch.empty(coarse, fine, *kernel) for fine, coarse in pairs)
        self.B_down = nn.ParameterList(torch.empty(coarse, fine, *kernel) for fine, coarse in pairs)
        self.U = nn.Parameter(torch.empty(widths[0], in_channels, *kernel))
        self.bias = nn.ParameterList(torch.empty(c) for c in widths) if bias else None
        self.frame = Periodic(tuple((c, height >> k, width >> k) for k, c in enumerate(widths)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, as `nn.Conv2d` does."""
        for weight in (*self.A, *self.B, *self.A_down, *self.B_down, self.U):
            _draw(weight)
        for bias in self.bias or ():
            bound = (self.in_channels * self.kernel_size**2) ** -0.5
            nn.init.uniform_(bias, -bound, bound)

    @property
    def input_frame(self) -> Periodic:
        """Of the input, at the resolution of the coarsest map of the state."""
        height, width = self.frame.coarsest
        return Periodic(((self.in_channels, *self.size), (0, height, width)))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of an input, without the batch."""
        return (self.in_channels, *self.size)

    def coupling(self, dtype: torch.dtype) -> Coupling:
        """W, in `dtype`."""
        units = self.frame.units(self.U.to(dtype))
        a = self.frame.response(self._lower(units, self.A, self.A_down))
        b = self.frame.response(self._lower(units, self.B, self.B_down))
        return Coupling.of(a, b, self.margin, self.frame)

    def inject(self, x: Tensor) -> Tensor:
        """U x + b, packed; the coarser maps have b alone."""
        tiers = self.frame.tiers
        parts = [_wrapped(x, self.U)] + [x.new_zeros(len(x), *tier) for tier in tiers[1:]]
        if self.bias is not None:
            parts = [part + b.to(part.dtype)[:, None, None] for part, b in zip(parts, self.bias, strict=True)]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def state(self, packed: Tensor) -> Any:
        """A packed state as the layer returns it."""
        maps = self.frame.maps(packed)
        return tuple(maps) if isinstance(self.channels, tuple) else maps[0]

    def _lower(self, z: Tensor, same: nn.ParameterList, down: nn.ParameterList) -> Tensor:
        maps = self.frame.maps(z)
        images = [_wrapped(part, weight) for part, weight in zip(maps, same, strict=True)]
        for k, weight in enumerate(down):
            images[k + 1] = images[k + 1] + _wrapped(maps[k], weight, stride=2)
        return torch.cat([image.flatten(1) for image in images], dim=1)

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, channels={self.channels}, size={self.size}, "
            f"kernel_size={self.kernel_size}, margin={self.margin}, bias={self.bias is not None}"
        )


def _draw(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _wrapped(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    reach = weight.shape[-1] // 2
    return F.conv2d(F.pad(x, (reach,) * 4, mode="circular"), weight.to(x.dtype), stride=stride)
