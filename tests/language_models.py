"""Language models that tests share: each architecture in each of its forms, small and in float64."""

from dataclasses import replace

import torch
from torch import Tensor

from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel

DEPTHS = ["equilibrium", "untied", "tied"]

# Solved until rounding, so that what is compared is the equilibrium and not how a solver came near it.
EXACT = {"rtol": 1e-11, "max_steps": 150, "eval_max_steps": 150, "backward_rtol": 1e-11, "backward_max_steps": 300}
TINY = ModelConfig(layers=3, vocabulary=20, width=16, heads=2, context=12, **EXACT)

FORMS = {
    "post": TINY,
    "subtracted": replace(TINY, block="subtracted"),
    "relative": replace(TINY, positions="relative"),
    "subtracted, relative": replace(TINY, block="subtracted", positions="relative"),
    "trellisnet": replace(TINY, architecture="trellisnet"),
    "trellisnet, kernel 3": replace(TINY, architecture="trellisnet", kernel=3),
}


def model_of(form: str, depth: str = "equilibrium", **values) -> LanguageModel:
    """A model in evaluation mode, the same at every call, whose biases are not the zeros they start at."""
    torch.manual_seed(0)
    model = LanguageModel(replace(FORMS[form], depth=depth, **values)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return model


def some_tokens(batch: int = 3, time: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(0, 20, (batch, time), generator=torch.Generator().manual_seed(seed))


def near(a: Tensor, b: Tensor, depth: str) -> None:
    """Equal up to rounding of sums in another order; for an equilibrium, up to where the solver stops."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-8 if depth == "equilibrium" else 1e-12)
