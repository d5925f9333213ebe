"""States and inputs in the coordinates in which a coupling is one small matrix for each frequency."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


@dataclass(frozen=True)
class Flat:
    """Vectors of `n` entries: one frequency, at which every entry is a component."""

    n: int

    @property
    def components(self) -> int:
        return self.n

    def to(self, z: Tensor) -> Tensor:
        """From (batch, n) to (frequencies, components, batch)."""
        return z.mT[None]

    def back(self, z: Tensor) -> Tensor:
        """The inverse of `to`, which is its transpose, too."""
        return z[0].mT

    def units(self, like: Tensor) -> Tensor:
        """(components, n): a unit vector for each component."""
        return torch.eye(self.n, dtype=like.dtype, device=like.device)

    def response(self, images: Tensor) -> Tensor:
        """The matrices of a linear map to this frame, (frequencies, components, units), from the images of units."""
        return self.to(images)


@dataclass(frozen=True)
class Periodic:
    """Maps of several resolutions on a torus, of (channels, height, width) each, finest first.

    A map that is r times finer than the coarsest counts as r^2 channels of the coarsest resolution, so that whatever
    commutes with translations of the coarsest is a matrix at each of its frequencies, also across resolutions.
    """

    tiers: tuple[tuple[int, int, int], ...]

    @property
    def coarsest(self) -> tuple[int, int]:
        return self.tiers[-1][1:]

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(height // self.coarsest[0] for _, height, _ in self.tiers)

    @property
    def channels(self) -> list[int]:
        """Channels of each tier at the coarsest resolution."""
        return [tier[0] * factor**2 for tier, factor in zip(self.tiers, self.factors, strict=True)]

    @property
    def components(self) -> int:
        return sum(self.channels)

    @property
    def n(self) -> int:
        """Entries of a packed state."""
        return sum(c * h * w for c, h, w in self.tiers)

    def maps(self, z: Tensor) -> list[Tensor]:
        """(batch, n) as maps of each tier."""
        parts = z.split([c * h * w for c, h, w in self.tiers], dim=1)
        return [part.reshape(len(z), *tier) for part, tier in zip(parts, self.tiers, strict=True)]

    def to(self, z: Tensor) -> Tensor:
        """From (batch, n) to (frequencies, components, batch), the upper half of them."""
        if len(z) == 0:
            # Which no transform takes.
            height, width = self.coarsest
            shape = (height * (width // 2 + 1), self.components, 0)
            return torch.complex(*(z.reshape(-1)[:0].reshape(shape) for _ in range(2)))
        together = [pixel_unshuffle(part, f) for part, f in zip(self.maps(z), self.factors, strict=True)]
        return torch.fft.rfft2(torch.cat(together, dim=1), norm="ortho").flatten(2).permute(2, 1, 0)

    def back(self, z: Tensor) -> Tensor:
        """The inverse of `to`, which is its transpose, too."""
        height, width = self.coarsest
        batch = z.shape[2]
        if batch == 0:
            return torch.cat((z.real, z.imag), dim=1).reshape(-1)[:0].reshape(0, self.n)
        spectrum = z.permute(2, 1, 0).reshape(batch, self.components, height, width // 2 + 1)
        return self._apart(torch.fft.irfft2(spectrum, s=(height, width), norm="ortho"))

    def units(self, like: Tensor) -> Tensor:
        """(components, n): a unit impulse at the origin for each component."""
        count = self.components
        impulses = torch.zeros(count, count, *self.coarsest, dtype=like.dtype, device=like.device)
        impulses[:, :, 0, 0] = torch.eye(count, dtype=like.dtype, device=like.device)
        return self._apart(impulses)

    def response(self, images: Tensor) -> Tensor:
        """The matrices of a linear map to this frame, (frequencies, components, units), from the images of units."""
        height, width = self.coarsest
        return self.to(images) * (height * width) ** 0.5  # whose inputs have a flat spectrum of this much less

    def _apart(self, together: Tensor) -> Tensor:
        parts = zip(together.split(self.channels, dim=1), self.factors, strict=True)
        return torch.cat([pixel_shuffle(part, f).flatten(1) for part, f in parts], dim=1)


Frame = Flat | Periodic
