"""Kills a training again and again at random moments, and looks whether anything but time was lost.

    python benchmarks/kills.py --processes 2 --parallel fsdp2

trains a run without interruption, then the same run killed with SIGKILL at random moments and resumed each time. It
prints what each kill cost, and how far the losses of the two runs are apart; it ends with exit code 1 where a kill cost
more updates than lie between two saves, or where the losses differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from onelayer import checkpoints
from onelayer.metrics import read_metrics
from onelayer.parallel import Processes

CLOSE = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training again and again, and see what is lost.")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", choices=["ddp", "fsdp2"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, run = Path(folder, "whole"), Path(folder, "run")
        size = ["--preset", "tiny", "--steps", str(options.steps), "--save-every", str(options.save_every)]
        _finish(_start(options, *size, "--out", str(whole)))
        arguments = [*size, "--out", str(run)]
        print(f"{'kill':>4} {'at step':>8} {'saved':>6} {'lost':>5}")
        most = 0
        for kill in range(options.kills):
            process = _start(options, *arguments)
            _wait(process, run, beyond=_done(run) + moments.randrange(1, 3 * options.save_every))
            _kill(process)
            done = _done(run)
            saved = int(checkpoints.newest(run / "checkpoints", Processes(torch.device("cpu")))[1]["step"])
            most = max(most, done - saved)
            print(f"{kill + 1:4} {done:8} {saved:6} {done - saved:5}", flush=True)
            arguments = ["--resume", str(run)]
        _finish(_start(options, *arguments))
        apart = max(abs(a - b) for a, b in zip(_losses(run), _losses(whole), strict=True))
        print(f"updates lost by a kill: at most {most}, {options.save_every} between two saves")
        print(f"losses of {options.steps} updates, killed {options.kills} times: at most {apart:.1e} apart")
    return 0 if most <= options.save_every and apart <= CLOSE else 1


def _start(options: argparse.Namespace, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m"]
    if options.parallel is not None:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes), "-m"]
        arguments = (*arguments, "--parallel", options.parallel)
    return subprocess.Popen(
        [*command, "onelayer", "train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _wait(process: subprocess.Popen[bytes], run: Path, beyond: int) -> None:
    while _done(run) < beyond:
        if process.poll() is not None:
            raise SystemExit(f"The run ended at step {_done(run)}, before it was killed: give it more --steps.")
        time.sleep(0.005)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """As a machine that goes down does: all processes at once."""
    pids = [process.pid]
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # others come and go
            if path.read_text().rpartition(")")[2].split()[1] == str(process.pid):
                pids.append(int(path.parent.name))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise SystemExit(f"A run that was left alone ended with exit code {process.returncode}.")


def _done(run: Path) -> int:
    return max((int(line["step"]) for line in read_metrics(run)), default=0)


def _losses(run: Path) -> list[float]:
    return [line["bits_per_byte"] for line in read_metrics(run) if line["kind"] == "train"]


if __name__ == "__main__":
    sys.exit(main())
