"""What an experiment is: trials that can be run in any order, and what their rows of results say together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

from matplotlib.figure import Figure

Row = dict[str, Any]  # a trial's key, and what was measured in it
Settings = TypeVar("Settings")
FAILED = "failed"  # the name under which a row says why its trial ended in nothing
Progress = Callable[[int], None]  # told of units of work as they are done


@dataclass(frozen=True)
class Trial:
    """One thing to measure, alone and in one process.

    >>> Trial("parity", "equilibrium", seed=0, rate=0.003).key["arm"]
    'equilibrium'

    Attributes:
        task: the data, or what else the arms have in common.
        arm: what is compared.
        seed: of weights and data.
        rate: of learning; `None` where nothing is learnt.
        stage: whether its rows choose a setting, on seeds of their own, or are the result.
        units: of work that it reports to `Progress`.
    """

    task: str
    arm: str
    seed: int
    rate: float | None = None
    stage: Literal["choose", "measure"] = "measure"
    units: int = 1

    @property
    def key(self) -> Row:
        """What tells its row from all others of the experiment."""
        return {name: value for name, value in asdict(self).items() if name != "units"}

    def __str__(self) -> str:
        return f"{self.task}, {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, and a note below them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """What should be seen, what was, and whether that is so."""

    asked: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Drawing:
    """A picture with its title and caption."""

    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Findings:
    """What the rows of an experiment say, also while some of them are missing."""

    tables: Sequence[Table] = ()
    claims: Sequence[Claim] = ()
    drawings: Mapping[str, Drawing] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment(Generic[Settings]):
    """A question, the trials that answer it, and how their rows are read.

    Attributes:
        name: of the command line.
        title: of the page.
        question: one sentence.
        presets: settings by name, a frozen dataclass each whose `minutes` is the budget on the machine it is meant for,
            and whose `device` is `"cpu"` or `"cuda"`.
        plan: from settings and rows so far, all the trials that can be named by now, done or not. A stage that hangs
            on rows which are not there yet is named once they are.
        measure: from settings, a trial and where to report progress, what is measured in it.
        tell: from settings and rows, the findings.
        sceptic: what a reviewer who believes nothing would say, a paragraph.
    """

    name: str
    title: str
    question: str
    presets: Mapping[str, Settings]
    plan: Callable[[Settings, Sequence[Row]], list[Trial]]
    measure: Callable[[Settings, Trial, Progress], Row]
    tell: Callable[[Settings, Sequence[Row]], Findings]
    sceptic: str
