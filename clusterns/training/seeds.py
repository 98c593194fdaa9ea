"""`clusterns train --seeds N`: one training with several seeds, each in a process and folder of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..checks import check_count, check_seed
from ..files import expanded, staging
from .arguments import show_config
from .config import TrainConfig
from .run_folder import claimed


def train_seeds(config: TrainConfig, count: int) -> list[Path]:
    """Train with `count` seeds from `config.seed` on, in OUTPUT_DIR/seed-N; returns these folders.

    One process after another, or one on each GPU at a time, which then writes into OUTPUT_DIR/seed-N.log.
    With `config.resume` runs that have ended stay as they are, and the others go on or begin.

    Raises ValueError in one line for what cannot be repeated so, and where a run fails: no other begins then,
    and those beside it are stopped.
    """
    check_count("--seeds", count, at_least=1)
    check_seed("--seed", config.seed, count)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--seeds: expected one process, which starts one for each seed, got torchrun's")
    if config.push_to_hub is not None:
        raise ValueError(f"--push-to-hub: expected none with --seeds, whose models are {count}, got a name")
    output, gpus = expanded(config.output_dir, "--output-dir"), _gpus(config.device)
    seeds = range(config.seed, config.seed + count)
    folders = [output / f"seed-{seed}" for seed in seeds]
    for folder in folders:  # before the first trains for hours
        with claimed(folder, overwrite=config.overwrite_output_dir, resume=config.resume):
            pass
    output.mkdir(parents=True, exist_ok=True)
    waiting, free = list(zip(seeds, folders, strict=True)), [*gpus] or [None]
    running: dict[subprocess.Popen, tuple[Path, str | None]] = {}
    # In the background of a script a process is deaf to SIGINT, and so are those that it starts.
    is_deaf = sys.platform == "win32" or signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    end = signal.SIGTERM if is_deaf else signal.SIGINT
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with staging(output) as place:
            while waiting or running:
                while waiting and free:
                    (seed, folder), gpu = waiting.pop(0), free.pop(0)
                    settings = place / f"{seed}.yaml"
                    one = replace(config, seed=seed, output_dir=str(folder))
                    settings.write_text(show_config(one), encoding="utf-8")
                    print(f"seed {seed}, {count - len(waiting)} of {count}: {folder}", flush=True)
                    running[_start(settings, folder, gpu, alone=len(gpus) < 2)] = folder, gpu
                time.sleep(0.1)
                for process in [each for each in running if each.poll() is not None]:
                    folder, gpu = running.pop(process)
                    free.append(gpu)
                    if process.returncode:
                        raise ValueError(
                            f"{folder}: expected a training that ends well, got exit status "
                            f"{process.returncode}; the others are kept, and --resume goes on with all"
                        )
    finally:
        for process in running:
            process.send_signal(end)
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, before)
        with suppress(OSError):  # but for a failure it is not empty
            output.rmdir()
    return folders


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _gpus(device: str) -> list[str | None]:
    """Names of the GPUs to share out, as CUDA_VISIBLE_DEVICES takes them; none where one device is named."""
    if device not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    count = torch.cuda.device_count()
    return [*(names or map(str, range(count)))][:count]


def _start(settings: Path, folder: Path, gpu: str | None, *, alone: bool) -> subprocess.Popen:
    """A training of its own; beside others its lines go to a file."""
    command = [sys.executable, "-m", "clusterns", "train", "--config", str(settings)]
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    given: dict[str, Any] = {"env": environment}
    if sys.platform == "linux":
        given["preexec_fn"] = _end_with_parent
    if alone:
        return subprocess.Popen(command, **given)
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **given)


def _end_with_parent() -> None:
    """Let the kernel end this process with the one that started it, were that killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
