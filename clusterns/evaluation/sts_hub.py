"""STS sets from the hub: the archive that SimCSE's authors keep there, and mteb's data sets."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ..files import staging

# Sources other than a folder, and what mteb's data sets hold: one SICK-R of all parts, no sub-sets.
HUB_SENTEVAL, HUB_MTEB = "hub:senteval", "hub:mteb"
MTEB_DATASETS = {
    **{f"STS{year}": (f"mteb/sts{year}-sts", "test") for year in range(12, 17)},
    "STSBenchmark-train": ("mteb/stsbenchmark-sts", "train"),
    "STSBenchmark-dev": ("mteb/stsbenchmark-sts", "validation"),
    "STSBenchmark-test": ("mteb/stsbenchmark-sts", "test"),
    "SICK-R-all": ("mteb/sickr-sts", "test"),
}
# SentEval's layout with the published split of SICK, which mteb's data set lacks.
SENTEVAL_ARCHIVE = ("princeton-nlp/datasets-for-simcse", "senteval.tar")
OFFLINE = "without a connection give a folder in SentEval's layout"


def senteval_folder() -> Path:
    """Folder of the unpacked archive, in the hub's cache; downloaded and unpacked once.

    Raises FileNotFoundError where the hub cannot be reached, ValueError where the archive is not one.
    """
    from huggingface_hub import constants, hf_hub_download

    repository, file = SENTEVAL_ARCHIVE
    try:
        archive = Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"sts_dir: expected {HUB_SENTEVAL} ({repository}) in the cache or a reachable hub, "
            f"got {type(error).__name__}; {OFFLINE}"
        ) from error
    # The snapshot's folder is named by its commit, so a new version is unpacked anew.
    target = Path(constants.HF_HOME) / "clusterns" / f"senteval-{archive.parent.name}"
    if not target.is_dir():
        _unpack(archive, target)
    return target


def _unpack(archive: Path, target: Path) -> None:
    """Unpack STS and SICK in the folder of `target` and move them there whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging(target.parent) as place:
        try:
            _extract(archive, place)
        except tarfile.TarError as error:
            raise ValueError(f"{archive}: expected a tar archive of SentEval's data ({error})") from error
        if not (place / "STS").is_dir():
            raise ValueError(f"{archive}: expected SentEval's folders STS and SICK, got neither")
        try:
            os.rename(place, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise


def _extract(archive: Path, place: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            start = next((i for i, part in enumerate(parts) if part in ("STS", "SICK")), None)
            if start is not None and member.isfile():
                member.name = "/".join(parts[start:])
                tar.extract(member, place, filter="data")


def mteb_pairs(name: str) -> Iterator[tuple[str, str, float, str]]:
    """The rows of one of mteb's data sets, by our name for it: two sentences, gold score, and where it is.

    Raises as `load_sts_subsets` does, at the first row.
    """
    if name in ("SICK-R-test", "SICK-R-dev", "SICK-R-train"):
        raise ValueError(
            f"name: expected a set of {HUB_MTEB}, got {name!r}, which mteb does not keep apart: "
            f"it has SICK-R-all, and {HUB_SENTEVAL} has the published parts"
        )
    if name not in MTEB_DATASETS:
        raise ValueError(f"name: expected one of {', '.join(MTEB_DATASETS)}, got {name!r}")
    import datasets

    repository, split = MTEB_DATASETS[name]
    try:
        table = datasets.load_dataset(repository, split=split)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"sts_dir: expected {repository} in the cache or a reachable hub, "
            f"got {type(error).__name__}; {OFFLINE}"
        ) from error
    wanted = ("sentence1", "sentence2", "score")
    absent = [column for column in wanted if column not in table.column_names]
    if absent:
        raise ValueError(
            f"{repository}: expected the columns {', '.join(wanted)}, got {', '.join(table.column_names)}"
        )
    columns = (table[column] for column in wanted)
    for row, (first, second, score) in enumerate(zip(*columns, strict=True)):
        yield first, second, score, f"{repository}, {split} row {row}"
