"""Does clustering help, and which part or rule of it? Variants of the loss × seeds, in the time there is.

    python bench/ablations.py --data ../shared/data --output runs/wiki [--minutes 60] [--seeds 10]
    python bench/ablations.py … --search --variants SimCSE rules ClusterNS,start_cosine=0.8

Each run is the loop of `clusterns train`, in this process: encoder and sentences are loaded once, a text is
tokenised once, the best weights stay in memory, and a run costs its steps and evaluations. It keeps the best
checkpoint by dev, and scores that on the test sets. All variants have the first seed, then the second. A run
that has its result is not run again: start the command anew and it goes on where it stopped. `--minutes`
begins no run that would end later. Ends with every run as CSV, a table (mean ± standard deviation over seeds,
paired tests against the first variant, the difference that so many seeds can show), and a figure.

Nothing is chosen by a test set: `--search` sees dev only, and trains with seeds that the comparison does not
use. DATA is a folder with models, wiki_sentences.txt, snli_triplets.csv, sts_raw and clustering.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from report import machine, write, write_csv, write_json
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar
from trial import MODEL, SHORT, TEXTS, TimeIsUp, configured, one_run, prepare, protocol, varied
from variants import GROUPS, chosen

from clusterns.compare import draw_groups, metric, report
from clusterns.evaluation.sts import SEVEN, load_sts
from clusterns.evaluation.sts_scores import GEOMETRY_SET
from clusterns.files import holding, replacing

SEARCH_SEED = 1000
MOST_SEEDS = 999
STS_TITLES = {"dev": "STS-B dev", "avg": "seven test sets, mean"}
SHORT_TITLES = {"dev": "dev accuracy", "accuracy": "test accuracy"}
COLUMNS = """best_step clustering_started mean_cosine nearest_cosine hard_negative_cosine centroids_cosine
    empty_clusters with_mates seconds commit cpu gpu""".split()


# --- which runs --------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A folder's name."""
    return re.sub(r"[ ,=]+", "-", name).lower()


def planned(wanted: argparse.Namespace) -> Iterator[tuple[int, str, Path]]:
    """Seed, variant and folder of each run, in order: an interruption leaves whole seeds."""
    first, count = SEARCH_SEED if wanted.search else 1, wanted.seeds or (MOST_SEEDS if wanted.minutes else 5)
    for seed, name in itertools.product(range(first, first + count), chosen(wanted.variants)):
        yield seed, name, folder_of(wanted) / slug(name) / str(seed)


def folder_of(wanted: argparse.Namespace) -> Path:
    """Where the runs are."""
    return wanted.output / "search" if wanted.search else wanted.output


def work(_: int, wanted: argparse.Namespace, deadline: float) -> None:
    """One of the processes that share the runs out: make those that nobody has made or is at."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // wanted.processes))
    # In the background of a script it would be ignored, also where it says that the first process is gone.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    disable_progress_bar()
    variants, prepared, longest = chosen(wanted.variants), None, 0.0
    for seed, name, folder in planned(wanted):
        file = folder / "result.json"
        if file.is_file():
            continue
        if longest and time.time() + longest > deadline:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(BlockingIOError), holding(folder / ".lock"):
            if file.is_file():
                continue
            try:
                prepared = prepared or prepare(wanted)
                began = time.time()
                result = one_run(prepared, wanted, variants[name], seed, folder, deadline)
            except TimeIsUp as error:
                needed = math.ceil((time.time() - began) / error.args[0] / 60) + 1
                text = f"--minutes: expected at least {needed} for one such run here, got {wanted.minutes:g}"
                if longest or results_of(wanted):
                    text = f"the time is up within {name}, seed {seed}, which is not kept"
                tqdm.write(text, sys.stderr)
                return
            except (OSError, ValueError) as error:
                cure = "; fewer --processes leave more for each" if "out of memory" in str(error) else ""
                raise SystemExit(f"{name}, seed {seed}: {error}{cure}") from None
            write_json(file, result)
            longest = max(longest, 1.05 * (time.time() - began))


# --- table and figure --------------------------------------------------------------------------------------


def results_of(wanted: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Runs there are, by variant and then by seed; those of other settings are refused with one line."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, variant in chosen(wanted.variants).items():
        files = (folder_of(wanted) / slug(name)).glob("*/result.json")
        runs = [(file, json.loads(file.read_text(encoding="utf-8"))) for file in files]
        for file, run in runs:
            for key, expected in (("protocol", protocol(wanted)), ("settings", varied(variant))):
                if run.get(key) != expected:
                    raise SystemExit(f"--output: expected runs of {expected}, got {file} of {run.get(key)}")
        if runs:
            found[name] = sorted((run for _, run in runs), key=lambda run: run["seed"])
    return found


def table_of(wanted: argparse.Namespace) -> Path:
    """The table; CSV and figure are beside it."""
    return wanted.output / ("search.md" if wanted.search else "comparison.md")


def write_tables(found: dict[str, list[dict[str, Any]]], wanted: argparse.Namespace) -> None:
    """CSV of the runs, Markdown and figure of what there is so far; the first variant is the baseline."""
    rows = [
        {"variant": name, **run["last"], **run["machine"], **run.get("test", {}), **run}
        for name, runs in found.items()
        for run in runs
        if "failed" not in run
    ]
    lines = [
        f"{name}, seed {run['seed']}, has no figures: {run['failed']}\n"
        for name, runs in found.items()
        for run in runs
        if "failed" in run
    ]
    path = table_of(wanted)
    if not rows:
        write(path, "\n".join(lines))
        return
    tests = list(dict.fromkeys(key for row in rows for key in row.get("test", {})))
    write_csv(path.with_suffix(".csv"), ["variant", "seed", "dev", *tests, *COLUMNS], rows)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    metrics = {
        title: metric({n: {row["seed"]: row[key] for row in rows if row["variant"] == n} for n in names})
        for key, title in (STS_TITLES if wanted.text in TEXTS else SHORT_TITLES).items()
        if key in rows[0]
    }
    seeds = {n: of["seeds"] for n, of in next(iter(metrics.values()))["groups"].items()}
    found_out = report({"groups": seeds, "metrics": metrics, "differing": {}, "never_clustered": {}})
    lines = [
        found_out,
        "",
        *lines,
        "This table was written by (commits of the runs: in the CSV)",
        "",
        "```json",
    ]
    write(path, "\n".join([*lines, json.dumps(protocol(wanted) | machine()), "```", ""]))
    with replacing(path.with_suffix(".png")) as temporary:
        draw_groups(metrics, temporary)


# --- as a script -------------------------------------------------------------------------------------------


def checked(wanted: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse with one line what no run can begin with."""
    needed = [f"{MODEL}/config.json", {**TEXTS, **SHORT}[wanted.text]]
    needed += ["sts_raw/STS"] if wanted.text in TEXTS else []
    for name in needed:
        if not (wanted.data / name).exists():
            parser.error(f"--data: expected a folder with {name}, got {wanted.data}")
    if wanted.text in TEXTS:
        for name in (GEOMETRY_SET, *SEVEN):
            try:
                load_sts(wanted.data / "sts_raw", name)
            except (OSError, ValueError) as error:
                parser.error(f"--data: {error}")
    layers = json.loads((wanted.data / MODEL / "config.json").read_text(encoding="utf-8"))["n_layers"]
    for name, most in (("layers", layers), ("processes", math.inf), ("seeds", MOST_SEEDS)):
        if (given := getattr(wanted, name)) is not None and not 1 <= given <= most:
            parser.error(
                f"--{name}: expected 1{f' to {most}' if most < math.inf else ' or more'}, got {given}"
            )
    for name, variant in chosen(wanted.variants).items():
        try:
            config = configured(wanted, variant, 1, wanted.output)
            config.check()
            config.build_loss(8)
        except (TypeError, ValueError) as error:
            parser.error(f"--variants {name}: {error}")
    if wanted.minutes is not None and not wanted.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {wanted.minutes:g}")


def main() -> int:
    """Share out what is missing; tables after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with models, texts and judged sets")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--text", choices=[*TEXTS, *SHORT], default="wiki", help="what is trained on")
    parser.add_argument("--search", action="store_true", help="by dev alone, with seeds of its own")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--seeds", type=int, help="default 5, or as many as --minutes allow")
    parser.add_argument(
        "--variants", nargs="+", default=["parts"], help=f"names, with settings, or {', '.join(GROUPS)}"
    )
    on_gpu = torch.cuda.is_available()
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--processes", type=int, default=max(1, min(4, cores // 2)) if on_gpu else cores, help="side by side"
    )
    parser.add_argument("--layers", type=int, default=6 if on_gpu else 2)
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 64)
    parser.add_argument("--steps", type=int, default=500 if on_gpu else 60)
    parser.add_argument("--eval-steps", type=int, default=125 if on_gpu else 20)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=32)
    wanted = parser.parse_args()
    checked(wanted, parser)
    deadline = time.time() + 60 * (wanted.minutes or math.inf)
    found = results_of(wanted)
    wanted.output.mkdir(parents=True, exist_ok=True)
    total, ended = len(list(planned(wanted))) if wanted.seeds or not wanted.minutes else None, False
    context = torch.multiprocessing.spawn(work, (wanted, deadline), wanted.processes, join=False, daemon=True)
    try:
        with tqdm(total=total, unit="run") as bar:
            while not ended:
                ended = context.join(timeout=1)
                count, found = bar.n, results_of(wanted)
                bar.update(sum(map(len, found.values())) - count)
                if bar.n > count:
                    write_tables(found, wanted)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code < 0:  # else it has said why
            print(f"a process was ended by signal {-error.exit_code}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; what has ended is kept in {folder_of(wanted)}", file=sys.stderr)
        return 130
    if not found:
        return 1
    print(table_of(wanted).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
