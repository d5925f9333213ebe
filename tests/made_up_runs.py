"""Made-up run folders with the files a training writes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "preset": "small",
    "command": ["onelayer", "train", "--preset", "small", "--data", "my text"],
    "model": {"depth": "equilibrium", "layers": 6, "width": 128, "rtol": 5e-3, "max_steps": 32, "eval_max_steps": 64},
    "data": {"path": None, "name": "Python 3.11.7 standard library"},
    "training": {"steps": 900, "batch_size": 32, "seed": 0},
}


def train_lines(steps: int = 900, equilibrium: bool = True) -> list[dict[str, Any]]:
    noise = np.random.default_rng(0).normal(size=(steps, 4))
    return [
        {
            "kind": "train",
            "step": step,
            "tokens": step * 4096,
            "seconds": step * 0.33,
            "bits_per_byte": 2.1 + 5.9 * math.exp(-step / 25) + 0.9 * math.exp(-step / 250) + 0.07 * noise[step - 1, 0],
            "evaluations_forward": max(2.0, 9 - 5 * math.exp(-step / 150) + 0.4 * noise[step - 1, 1])
            if equilibrium
            else None,
            "evaluations_backward": max(2.0, 7 - 3 * math.exp(-step / 200) + 0.3 * noise[step - 1, 2])
            if equilibrium
            else None,
            "residual": 3.5e-3 * math.exp(0.15 * noise[step - 1, 3]) if equilibrium else None,
            "backward_residual": 2e-2 * math.exp(0.2 * noise[step - 1, 2]) if equilibrium else None,
            "share_at_cap": 0.002 if equilibrium else None,
            "learning_rate": 6e-3,
            "gradient_norm": 1.0,
            "peak_memory_bytes": int(640e6 + 9e6 * min(step, 80) / 80),
        }
        for step in range(1, steps + 1)
    ]


def validation_lines(steps: int = 900, equilibrium: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "kind": "validation",
            "step": step,
            "bits_per_byte": 2.18 + 0.9 * math.exp(-step / 250),
            "evaluations_forward": 8.5 if equilibrium else None,
            "residual": 3.4e-3 if equilibrium else None,
            "share_at_cap": 0.001 if equilibrium else None,
        }
        for step in range(100, steps + 1, 100)
    ]


def evaluation(equilibrium: bool = True, share_at_cap: float = 0.001) -> dict[str, Any]:
    allowed = [(1, 4.9), (2, 3.9), (4, 2.62), (8, 2.25), (16, 2.203), (32, 2.2), (64, 2.2)]
    solves = {
        "residual": 3.4e-3,
        "residual_p95": 4.8e-3,
        "share_at_cap": share_at_cap,
        "evaluations": {
            "mean": 9.4,
            "p95": 13,
            "histogram": {"7": 14, "8": 52, "9": 88, "10": 61, "11": 24, "12": 10, "13": 5, "15": 2},
        },
        "by_allowed_evaluations": [
            {"max_steps": steps, "bits_per_byte": bits, "residual": 0.5 / steps} for steps, bits in allowed
        ],
    }
    return {
        "bits_per_byte": 2.2,
        **(solves if equilibrium else {}),
        "ngrams": {"0": 4.546, "1": 3.49, "2": 2.585},
        "parameters": {"total": 232_704, "without_embeddings": 199_936},
        "tokens": 3_686_400,
        "seconds": 297.4,
        "peak_memory_bytes": 649_000_000,
        "sample": {
            "prompt": "def read(",
            "text": 'def read(self, name="<stdin>", *args):\n'
            '    """Return the <b>next</b> line & close."""\n'
            "    if name is None:\n        raise ValueError('no name')\n"
            "\x1b[31m    return self._read(name, '</pre>')\n",
        },
    }


def write(
    folder: Path, config: dict[str, Any] | None, lines: list[dict[str, Any]], final: dict[str, Any] | None
) -> Path:
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if final is not None:
        (folder / "evaluation.json").write_text(json.dumps(final))
    return folder
