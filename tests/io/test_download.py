from __future__ import annotations

import functools
import hashlib
import http.server
import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

import virtualcell as vc
from virtualcell.io._download import REVISIONS

SE, ST = "arcinstitute/SE-600M", "arcinstitute/ST-HVG-Replogle"
LARGE = (".safetensors", ".ckpt", ".pt")
SE_FILES = {
    "config.yaml": b"model: {emsize: 16}\n",
    "model.safetensors": b"weights" * 1000,
    "se600m_epoch4.ckpt": b"older weights",
    "se600m_epoch16.ckpt": b"weights again",
    "protein_embeddings.pt": b"vectors" * 500,
    "LICENSE.md": b"code",
    "MODEL_LICENSE.md": b"not for commerce",
    "MODEL_ACCEPTABLE_USE_POLICY.md": b"nor for harm",
    "README.md": b"hello",
}
RUN_FILES = {
    "config.yaml": b"data: {}\n",
    "var_dims.pkl": b"sizes",
    "pert_onehot_map.pt": b"perturbations",
    "batch_onehot_map.pkl": b"batches",
    "cell_type_onehot_map.pkl": b"cell types",
    "data_module.torch": b"paths",
    "checkpoints/best.ckpt": b"best",
    "checkpoints/final.ckpt": b"final",
    "checkpoints/last.ckpt": b"last",
    "eval_final.ckpt/adata_real.h5ad": b"gigabytes",
}
ST_FILES = {
    f"{run}/{name}": content for run in ("fewshot/k562", "zeroshot/rpe1") for name, content in RUN_FILES.items()
}
NEEDED_SE = {"config.yaml", "model.safetensors", "protein_embeddings.pt"}
NEEDED_SE |= {"LICENSE.md", "MODEL_LICENSE.md", "MODEL_ACCEPTABLE_USE_POLICY.md"}


def git_sum(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def checksum(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_sum(content)


def write_cache(cache: Path, repo: str, files: dict[str, bytes], commit: str | None = None) -> Path:
    """The layout that the hub's client leaves: blobs named by their checksum, and links to them by commit."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / (commit or REVISIONS[repo])
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    for name, content in files.items():
        blob = folder / "blobs" / checksum(name, content)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


@pytest.fixture
def offline(monkeypatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
    # a client before 1.0 keeps its sessions, and with them that it was offline
    getattr(importlib.import_module("huggingface_hub.utils"), "reset_sessions", lambda: None)()


# -- from the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_cached_models_need_no_network(tmp_path):
    snapshot = write_cache(tmp_path, SE, SE_FILES)
    folder = vc.io.download(SE, accept_license=True, cache=tmp_path)
    assert folder == snapshot
    assert (folder / "model.safetensors").read_bytes() == SE_FILES["model.safetensors"]
    # by the name of a branch, as it was when last fetched
    assert vc.io.download(SE, accept_license=True, cache=tmp_path, revision="main") == snapshot

    snapshot = write_cache(tmp_path, ST, ST_FILES)
    folder = vc.io.download(ST, accept_license=True, cache=tmp_path, run="fewshot/k562")
    assert folder == snapshot / "fewshot" / "k562"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_damaged_files_are_found(tmp_path, name):
    snapshot = write_cache(tmp_path, SE, SE_FILES)
    blob = (snapshot / name).resolve()
    blob.write_bytes(SE_FILES[name][:-1] + b"!")
    with pytest.raises(
        ValueError, match=rf"{name} is damaged: its checksum is [0-9a-f]+, it should be {blob.name}. Del"
    ):
        vc.io.download(SE, accept_license=True, cache=tmp_path)
    blob.write_bytes(SE_FILES[name])
    vc.io.download(SE, accept_license=True, cache=tmp_path)


@pytest.mark.usefixtures("offline")
def test_damage_to_files_that_are_not_read_does_not_matter(tmp_path):
    snapshot = write_cache(tmp_path, SE, SE_FILES)
    (snapshot / "se600m_epoch4.ckpt").resolve().write_bytes(b"")
    vc.io.download(SE, accept_license=True, cache=tmp_path)


@pytest.mark.usefixtures("offline")
def test_files_that_cannot_be_checked_are_refused(tmp_path):
    snapshot = write_cache(tmp_path, SE, SE_FILES)
    (snapshot / "config.yaml").unlink()
    (snapshot / "config.yaml").write_bytes(b"something")  # no link: nothing says what it should be
    with pytest.raises(ValueError, match=r"config.yaml cannot be checked offline"):
        vc.io.download(SE, accept_license=True, cache=tmp_path)


@pytest.mark.usefixtures("offline")
def test_what_to_do_by_hand(tmp_path):
    with pytest.raises(ConnectionError) as error:
        vc.io.download(SE, accept_license=True, cache=tmp_path)
    message = str(error.value)
    assert "get config.yaml, model.safetensors (or the .ckpt), protein_embeddings.pt from " in message
    assert f"https://huggingface.co/{SE}/tree/{REVISIONS[SE]}" in message
    assert "one folder of your choice, and pass that folder to `vc.models.SE.from_arc`." in message

    with pytest.raises(
        ConnectionError, match=r"fewshot/k562/checkpoints/final\.ckpt from .*folder of the run to `vc.mod"
    ):
        vc.io.download(ST, accept_license=True, cache=tmp_path, run="fewshot/k562")

    write_cache(tmp_path, SE, {k: v for k, v in SE_FILES.items() if k.endswith((".yaml", ".md"))})
    with pytest.raises(ConnectionError, match=r"^The cache lacks model.safetensors\. .*By hand: get config.yaml"):
        vc.io.download(SE, accept_license=True, cache=tmp_path)


# -- what is asked for ------------------------------------------------------------------------------------------------


def test_unknown_repositories_name_the_known_ones(tmp_path):
    with pytest.raises(KeyError, match=r"repo='arcinstitute/SE600M' is unknown. Did you mean 'arcinstitute/SE-600M'"):
        vc.io.download("arcinstitute/SE600M", accept_license=True, cache=tmp_path)
    with pytest.raises(KeyError, match=r"Known: 'arcinstitute/SE-600M', 'arcinstitute/SE-100M', .* and 2 more"):
        vc.io.download("gpt2", cache=tmp_path)


def test_the_licence_is_accepted_or_nothing_happens(tmp_path):
    with pytest.raises(PermissionError) as error:
        vc.io.download(SE, cache=tmp_path)
    for part in ("Arc Research Institute State Model Non-Commercial License", "non-commercial use only", "=True"):
        assert part in str(error.value)
    assert not any(tmp_path.iterdir())


def test_revisions_are_commits():
    assert all(len(commit) == 40 and int(commit, 16) for commit in REVISIONS.values())
    assert len(set(REVISIONS.values())) == len(REVISIONS)


@pytest.mark.usefixtures("offline")
def test_runs(tmp_path):
    write_cache(tmp_path, ST, ST_FILES)
    with pytest.raises(ValueError, match=r"holds 2 models. Name one: 'fewshot/k562', 'zeroshot/rpe1'\."):
        vc.io.download(ST, accept_license=True, cache=tmp_path)
    with pytest.raises(KeyError, match=r"run='fewshot/k652' is unknown. Did you mean 'fewshot/k562'"):
        vc.io.download(ST, accept_license=True, cache=tmp_path, run="fewshot/k652")
    write_cache(tmp_path, SE, SE_FILES)
    with pytest.raises(ValueError, match="holds one SE model, leave run out"):
        vc.io.download(SE, accept_license=True, cache=tmp_path, run="fewshot/k562")


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "virtualcell\[hub\]"'):
        vc.io.download(SE, accept_license=True, cache=tmp_path)


# -- from a hub -------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The two endpoints of the hub that are used: what a commit holds, and the files themselves."""

    def __init__(self, served: dict, asked: list[str], *args) -> None:
        self.served, self.asked = served, asked
        super().__init__(*args)

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        refused = self.served.get("refused", ())
        for repo in [r for r in (SE, ST) if r in self.served]:
            files = self.served[repo]
            if path.startswith(f"api/models/{repo}/revision/"):
                wanted = path.rsplit("/", 1)[1]
                if wanted not in ("main", REVISIONS[repo]):
                    return self.answer(b"{}", status=404, headers={"X-Error-Code": "RevisionNotFound"})
                return self.answer(json.dumps(listing(repo, files)).encode(), {"Content-Type": "application/json"})
            start = f"{repo}/resolve/{REVISIONS[repo]}/"
            if path.startswith(start) and path.removeprefix(start) in set(files) - set(refused):
                name = path.removeprefix(start)
                if self.command == "GET":
                    self.asked.append(name)
                content, told = files[name]
                return self.answer(content, {"ETag": f'"{told}"', "X-Repo-Commit": REVISIONS[repo]})
        return self.answer(b"", status=403)

    def answer(self, body: bytes, headers: dict | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def listing(repo: str, files: dict[str, tuple[bytes, str]]) -> dict:
    siblings = []
    for name, (content, told) in files.items():
        one = {"rfilename": name, "size": len(content), "blobId": told if len(told) == 40 else "0" * 40}
        if len(told) == 64:
            one["lfs"] = {"sha256": told, "size": len(content), "pointerSize": 135}
        siblings.append(one)
    return {"_id": "1", "id": repo, "modelId": repo, "sha": REVISIONS[repo], "siblings": siblings, "tags": []}


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine: what it serves, and which files were fetched from it."""
    if int(huggingface_hub.__version__.split(".")[0]) < 1:
        pytest.skip("a client of the hub before 1.0 reads the hub's address once, when it is imported")
    served = {
        SE: {name: (content, checksum(name, content)) for name, content in SE_FILES.items()},
        ST: {name: (content, checksum(name, content)) for name, content in ST_FILES.items()},
    }
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, served, asked))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", here)
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace("https://huggingface.co", here)
    )
    yield served, asked
    server.shutdown()
    server.server_close()


download = functools.partial(vc.io.download, accept_license=True)


def test_only_what_is_needed_is_fetched_and_once(hub, tmp_path, caplog):
    _, asked = hub
    with caplog.at_level(logging.INFO):
        folder = download(SE, cache=tmp_path)
    assert folder == tmp_path / "models--arcinstitute--SE-600M" / "snapshots" / REVISIONS[SE]
    assert sorted(asked) == sorted(NEEDED_SE)
    assert {p.name for p in folder.iterdir()} == NEEDED_SE
    assert (folder / "model.safetensors").read_bytes() == SE_FILES["model.safetensors"]
    assert (
        f"{SE} at {REVISIONS[SE]}: 6 files, under the Arc Research Institute State Model Non-Commercial" in caplog.text
    )
    asked.clear()
    assert download(SE, cache=tmp_path, revision="main") == folder  # the branch stands for the same commit
    assert asked == []

    run = download(ST, cache=tmp_path, run="fewshot/k562")
    unread = {"data_module.torch", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "eval_final.ckpt/adata_real.h5ad"}
    assert {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()} == set(RUN_FILES) - unread


def test_a_model_from_the_hub_loads(hub, tmp_path, golden):
    served, _ = hub
    files = {p.name: p.read_bytes() for p in (golden / "se").iterdir() if p.name in NEEDED_SE}
    served[SE] = {name: (content, checksum(name, content)) for name, content in files.items()}
    assert len(vc.models.SE.from_arc(download(SE, cache=tmp_path)).gene_names) > 100


def test_best_stands_in_for_a_final_checkpoint(hub, tmp_path):
    served, _ = hub
    del served[ST]["zeroshot/rpe1/checkpoints/final.ckpt"]
    run = download(ST, cache=tmp_path, run="zeroshot/rpe1")
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["best.ckpt"]
    del served[ST]["zeroshot/rpe1/checkpoints/best.ckpt"]
    with pytest.raises(ValueError, match=rf"^{ST} has no zeroshot/rpe1/checkpoints/final.ckpt at {REVISIONS[ST]}"):
        download(ST, cache=tmp_path, run="zeroshot/rpe1")


def test_other_content_than_the_hub_lists_is_refused(hub, tmp_path):
    served, _ = hub
    content, told = served[SE]["protein_embeddings.pt"]
    served[SE]["protein_embeddings.pt"] = content.replace(b"vectors", b"VECTORS"), told
    with pytest.raises(ValueError, match=r"protein_embeddings\.pt is damaged"):
        download(SE, cache=tmp_path)


def test_refusal_and_unknown_commits_tell_what_to_do(hub, tmp_path, caplog):
    served, _ = hub
    with pytest.raises(ConnectionError, match=rf"^{SE} could not be fetched from the hub\. By hand: get config.yaml"):
        download(SE, cache=tmp_path, revision="0" * 40)
    assert "no list of files from the hub (RevisionNotFoundError)" in caplog.text
    served["refused"] = {"model.safetensors"}
    with pytest.raises(ConnectionError, match=rf"^model.safetensors was not fetched\. {SE} could not be fetched"):
        download(SE, cache=tmp_path)
    del served["refused"]
    folder = download(SE, cache=tmp_path)
    del served[SE]
    assert download(SE, cache=tmp_path) == folder  # from the cache, though the hub says no
