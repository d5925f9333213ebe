"""What sequences were modelled with before attention, as blocks that stand in the place of the Transformer's.

They read the embedded text alone, not the state: with `depth="tied"` and one layer they are the whole network between
the embedding and the unembedding that all arms share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.models.configuration import ModelConfig
from onelayer.models.weights import Linear, Prepared, mask, masked
from onelayer.models.window import Slot, Window


class RecurrentBlock(nn.Module):
    """An LSTM or a GRU over the embedded text, one layer as wide as it.

    >>> from onelayer.models.language_model import LanguageModel
    >>> config = ModelConfig(width=16, heads=1, depth="tied", layers=1)
    >>> LanguageModel(config, gru)(torch.randint(0, 256, (3, 10))).state.shape
    torch.Size([3, 10, 16])

    Args:
        config: width; the forget gate of an LSTM begins open, see `lstm`.
        network: `nn.LSTM` or `nn.GRU` of that width, which reads `(batch, time, width)`.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Cho et al., 2014 (arXiv:1406.1078).
    """

    def __init__(self, config: ModelConfig, network: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.state_width = config.width
        self.network = network

    def prepare(self, x: Tensor) -> Prepared:
        """Nothing: the network keeps its weights to itself."""
        return Prepared((), ())

    def place(self, window: Window, dtype: torch.dtype) -> Window:
        """The window as it is: order is all that the network knows of positions."""
        return window

    def context(self, x: Tensor, window: Window, prepared: Prepared, past: Slot | None = None) -> None:
        """Nothing.

        Raises:
            UsageError: there is a past or padding, which the network does not know.
        """
        _whole(window, past)

    def forward(self, z: Tensor, x: Tensor, context: None) -> Tensor:
        """The hidden state of each token, `(batch, time, width)`, whatever `z` is."""
        return self.network(x)[0]

    def remember(self, z: Tensor, x: Tensor, context: None) -> Slot:
        """Refused.

        Raises:
            UsageError: always.
        """
        raise UsageError(_ONLY_WHOLE)

    def read(self, z: Tensor) -> Tensor:
        """The hidden state that logits are read off."""
        return z


def lstm(config: ModelConfig) -> RecurrentBlock:
    """An LSTM whose forget gates begin open, at a bias of 1, as is usual where something is to be kept for long.

    >>> sum(parameter.numel() for parameter in lstm(ModelConfig(width=16, heads=1)).parameters())
    2176

    Source: Jozefowicz, Zaremba and Sutskever, "An Empirical Exploration of Recurrent Network Architectures", 2015.
    """
    network = nn.LSTM(config.width, config.width, batch_first=True)
    with torch.no_grad():
        network.get_parameter("bias_hh_l0")[config.width : 2 * config.width] += 1.0
    return RecurrentBlock(config, network)


def gru(config: ModelConfig) -> RecurrentBlock:
    """A GRU as PyTorch begins it.

    >>> sum(parameter.numel() for parameter in gru(ModelConfig(width=16, heads=1)).parameters())
    1632
    """
    return RecurrentBlock(config, nn.GRU(config.width, config.width, batch_first=True))


class ConvolutionalBlock(nn.Module):
    """A temporal convolutional network (TCN): causal convolutions at doubling strides, two in each residual part.

    There are as many parts as it takes for the last token of a window to see the first.

    >>> from onelayer.models.language_model import LanguageModel
    >>> config = ModelConfig(width=16, heads=1, depth="tied", layers=1, context=40, kernel=4)
    >>> model = LanguageModel(config, ConvolutionalBlock)
    >>> model(torch.randint(0, 256, (3, 40))).state.shape, len(model.depth.block.convolutions)
    (torch.Size([3, 40, 16]), 6)

    Args:
        config: width, context, kernel, dropout and weight normalisation, which the paper has.

    Source: Bai, Kolter and Koltun, "An Empirical Evaluation of Generic Convolutional and Recurrent Networks for
    Sequence Modeling", 2018 (arXiv:1803.01271), section 3.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kernel, self.state_width = config.kernel, config.width
        parts = 1
        while receptive_field(config.kernel, parts) < config.context:
            parts += 1

        self.convolutions = nn.ModuleList(
            Linear(config.kernel * config.width, config.width, config.weight_norm) for _ in range(2 * parts)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(config.width)) for _ in range(2 * parts))
        self.dropout = eq.nn.VariationalDropout(config.dropout)

    def prepare(self, x: Tensor) -> Prepared:
        """Matrices and masks for a forward on embedded tokens `x`, `(batch, time, width)`, in the order of use."""
        matrices = tuple(part.matrix() for part in self.convolutions if isinstance(part, Linear))
        return Prepared(matrices, tuple(mask(self.dropout, x, x.shape[2]) for _ in matrices))

    def place(self, window: Window, dtype: torch.dtype) -> Window:
        """The window as it is: a convolution knows distances by itself."""
        return window

    def context(self, x: Tensor, window: Window, prepared: Prepared, past: Slot | None = None) -> Prepared:
        """Matrices and masks.

        Raises:
            UsageError: there is a past or padding, which the network does not know.
        """
        _whole(window, past)
        return prepared

    def forward(self, z: Tensor, x: Tensor, context: Prepared) -> Tensor:
        """The state of each token, `(batch, time, width)`, whatever `z` is."""
        state = inner = x.mT
        for k, (matrix, factors) in enumerate(zip(context.matrices, context.masks, strict=True)):
            stride = 2 ** (k // 2)
            # The columns of a matrix are the taps of the kernel, one after the other, the oldest first.
            weight = matrix.unflatten(1, (self.kernel, -1)).mT
            inner = F.conv1d(
                F.pad(inner, ((self.kernel - 1) * stride, 0)), weight, self.biases[k].to(weight.dtype), dilation=stride
            )
            inner = masked(inner.relu().mT, factors).mT
            if k % 2:
                state = inner = (state + inner).relu()
        return state.mT

    def remember(self, z: Tensor, x: Tensor, context: Prepared) -> Slot:
        """Refused.

        Raises:
            UsageError: always.
        """
        raise UsageError(_ONLY_WHOLE)

    def read(self, z: Tensor) -> Tensor:
        """The hidden state that logits are read off."""
        return z


def receptive_field(kernel: int, parts: int) -> int:
    """Tokens that the last one sees, itself among them, through so many parts of two convolutions each.

    >>> receptive_field(kernel=8, parts=4)
    211
    """
    return 1 + 2 * (kernel - 1) * (2**parts - 1)


_ONLY_WHOLE = "The recurrent and convolutional baselines read whole windows: give them no past, memory or padding."


def _whole(window: Window, past: Slot | None) -> None:
    if past is not None or window.real is not None or window.stored:
        raise UsageError(_ONLY_WHOLE)
