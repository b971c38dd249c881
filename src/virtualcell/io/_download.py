"""Fetch Arc's published models from the Hugging Face hub: a fixed commit, only what is read, every file checked."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

from virtualcell._errors import unknown_name
from virtualcell._interrupted import told_when_interrupted

logger = logging.getLogger(__name__)

LICENCE = (
    "the Arc Research Institute State Model Non-Commercial License and its Acceptable Use Policy "
    "(https://github.com/ArcInstitute/state/blob/main/MODEL_LICENSE.md)"
)
# Commits as public projects that used them have noted down (2026). A wrong one would not be found: it cannot stand for
# other files.
REVISIONS = {
    "arcinstitute/SE-600M": "5a9a80f44f7ce32ce57059933ef0d735d7c10ce5",
    "arcinstitute/SE-100M": "bc72702320639217128df42673e94a9658f67d24",
    "arcinstitute/ST-HVG-Replogle": "bb6a9562cbbf1fd152df14cc53b4cc7517c77175",
    "arcinstitute/ST-SE-Replogle": "e324967ff4cea5ec199e29bcbb5c1f00e5b9d69c",
    "arcinstitute/st-x-replogle-full": "48ad5f70215ab4c58caa5a68e77d837601d29d35",
    "arcinstitute/st-se-replogle-full": "d1441f5587ace12c46247b3703c7d25f24f8abb6",
    "arcinstitute/ST-HVG-Tahoe": "ca6b751972493f8448e3256d1340ae70ad43e1e7",
    "arcinstitute/ST-SE-Tahoe": "03b1971d7cc93a7535fd2e957c6948dba267378b",
    "arcinstitute/ST-HVG-Parse": "827df657cd87063026d2abefd73e99036755ac1b",
    "arcinstitute/ST-SE-Parse": "fa458ffda8690c5c5bdff080dfdc46b46713043b",
}
_LICENCE_FILES = ("*LICENSE*", "*ACCEPTABLE_USE*")
_SE_FILES = ("config.yaml", "*embeddings*.pt")
_RUN_FILES = ("config.yaml", "var_dims.pkl", "*_onehot_map.*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@told_when_interrupted("The download was interrupted: files that are whole stay, and the same call fetches the others.")
def download(
    repo: str,
    *,
    accept_license: bool = False,
    run: str | None = None,
    revision: str | None = None,
    cache: str | os.PathLike | None = None,
) -> Path:
    """Fetch a published model, check every file against its checksum, and return the folder to load it from.

    The files go into the hub's own cache and are fetched once; the checksums are computed at every call. Needs
    `pip install "virtualcell[hub]"`. The weights are under a non-commercial licence that is not virtualcell's.

    Parameters
    ----------
    repo
        For instance "arcinstitute/SE-600M", for :meth:`virtualcell.models.SE.from_arc`, or
        "arcinstitute/ST-HVG-Replogle", for :meth:`virtualcell.models.ST.from_arc`.
    accept_license
        State that you have read the licence of the weights and abide by it.
    run
        Folder of the one model to fetch from a repository of ST models, such as "fewshot/k562"; may be left out where
        there is one.
    revision
        Commit, branch or tag; by default a commit noted in virtualcell, so that everyone has the same files.
    cache
        Folder of the cache, by default that of the hub (`HF_HUB_CACHE`).

    Returns
    -------
    The folder of an SE model, or the run folder of an ST model, with `checkpoints/final.ckpt`, or `best.ckpt` where the
    run has no final one.

    Raises
    ------
    KeyError
        For an unknown repository or run.
    PermissionError
        If the licence was not accepted.
    ConnectionError
        If the hub cannot be reached, or refuses, and the cache has not all the files. The message says what to fetch
        by hand and where to put it.
    ValueError
        If a file is not what its checksum says.

    Examples
    --------
    >>> folder = vc.io.download("arcinstitute/SE-600M", accept_license=True)  # doctest: +SKIP
    >>> se = vc.models.SE.from_arc(folder)  # doctest: +SKIP
    """
    if repo not in REVISIONS:
        raise unknown_name("repo", repo, REVISIONS, "These are the models that virtualcell can read.")
    if not accept_license:
        raise PermissionError(
            f"accept_license=False: the weights of {repo} are under {LICENCE}, for non-commercial use only. Read it, "
            "and pass accept_license=True if you abide by it."
        )
    hub = _hub()
    revision = revision or REVISIONS[repo]
    cached = Path(cache or hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        commit, sums = info.sha, {f.rfilename: f.lfs.sha256 if f.lfs else f.blob_id for f in info.siblings}
    except Exception as error:  # every release of the client has other classes for a refused connection
        logger.warning("%s: no list of files from the hub (%s); looking into the cache.", repo, type(error).__name__)
        reason, commit = error, _cached_commit(cached, revision)
        there = cached / "snapshots" / commit
        sums = {p.relative_to(there).as_posix(): p.resolve().name for p in there.rglob("*") if not p.is_dir()}
        if not sums:
            raise ConnectionError(_by_hand(repo, revision, run)) from error
    else:
        reason = None
    run = _run(repo, sums, run)
    wanted, missing = _files(repo, sums, run)
    if missing and reason is not None:
        raise ConnectionError(f"The cache lacks {', '.join(missing)}. {_by_hand(repo, revision, run)}") from reason
    if missing:
        raise ValueError(
            f"{repo} has no {', '.join(missing)} at {commit}: it is not a model that virtualcell can read."
        )
    logger.info("%s at %s: %d files, under %s.", repo, commit, len(wanted), LICENCE)
    for name in wanted:
        try:
            path = hub.hf_hub_download(
                repo, name, revision=commit, cache_dir=cache, local_files_only=reason is not None
            )
        except Exception as error:
            raise ConnectionError(f"{name} was not fetched. {_by_hand(repo, revision, run)}") from error
        _check(Path(path), sums[name])
    return cached / "snapshots" / commit / run


def _hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError as error:
        raise ImportError('vc.io.download needs huggingface_hub: pip install "virtualcell[hub]"') from error
    return huggingface_hub


def _cached_commit(cached: Path, revision: str) -> str:
    """Return the commit that a revision stood for when it was last fetched."""
    ref = cached / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else revision


def _run(repo: str, names: Iterable[str], run: str | None) -> str:
    """Return the folder inside the repository, "" for its root."""
    if _is_se(repo):
        if run is not None:
            raise ValueError(f"run={run!r}: {repo} holds one SE model, leave run out.")
        return ""
    end = "/config.yaml"
    runs = sorted(name.removesuffix(end) for name in names if name.endswith(end))
    if run is None and len(runs) == 1:
        return runs[0]
    if run is None:
        raise ValueError(f"run=None, but {repo} holds {len(runs)} models. Name one: {', '.join(map(repr, runs))}.")
    if run.strip("/") not in runs:
        raise unknown_name("run", run, runs, f"It must be a folder of {repo}.")
    return run.strip("/")


def _is_se(repo: str) -> bool:
    return repo.split("/")[1].startswith("SE-")


def _files(repo: str, names: Iterable[str], run: str) -> tuple[list[str], list[str]]:
    """Return the files to fetch, and what is missing among those that no model can be read without."""
    patterns = _SE_FILES if _is_se(repo) else tuple(f"{run}/{p}" for p in _RUN_FILES)
    top = [n for n in names if "/" not in n]
    inside = top if _is_se(repo) else [n for n in names if n.rpartition("/")[0] == run]
    chosen = [n for n in inside if any(fnmatchcase(n, p) for p in patterns)]
    chosen += [n for n in top if any(fnmatchcase(n, p) for p in _LICENCE_FILES)]
    if _is_se(repo):
        weights = [n for n in top if n == "model.safetensors"] or sorted(n for n in top if n.endswith(".ckpt"))[-1:]
        missing = [] if weights else ["model.safetensors"]
        missing += [] if "config.yaml" in names else ["config.yaml"]
    else:
        checkpoints = [f"{run}/checkpoints/{n}" for n in ("final.ckpt", "best.ckpt")]
        weights = [n for n in checkpoints if n in names][:1]
        missing = [] if weights else checkpoints[:1]
        missing += [n for n in (f"{run}/var_dims.pkl", f"{run}/pert_onehot_map.pt") if n not in names]
    return sorted({*chosen, *weights}), missing


def _check(path: Path, expected: str) -> None:
    """Compare a file with its sum: SHA-256 for large files, git's SHA-1 of a blob for small ones."""
    if len(expected) == 64:
        digest = hashlib.sha256()
    elif _COMMIT.fullmatch(expected):
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:  # a cache on a file system without links
        raise ValueError(f"{path} cannot be checked offline: this cache does not hold its checksum. Go online once.")
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path} is damaged: its checksum is {digest.hexdigest()}, it should be {expected}. Delete "
            f"{path.resolve()} and download again."
        )


def _by_hand(repo: str, revision: str, run: str | None) -> str:
    """Say which files to fetch in a browser, and what to do with them."""
    if _is_se(repo):
        files = ["config.yaml", "model.safetensors (or the .ckpt)", "protein_embeddings.pt"]
        load = "that folder to `vc.models.SE.from_arc`"
    else:
        names = ["config.yaml", "var_dims.pkl", "pert_onehot_map.pt", "batch_onehot_map.*", "cell_type_onehot_map.*"]
        files = [f"{run or '<run>'}/{n}" for n in (*names, "checkpoints/final.ckpt")]
        load = "the folder of the run to `vc.models.ST.from_arc`"
    return (
        f"{repo} could not be fetched from the hub. By hand: get {', '.join(files)} from "
        f"https://huggingface.co/{repo}/tree/{revision}, keep their names and folders, put them into one folder of "
        f"your choice, and pass {load}."
    )
