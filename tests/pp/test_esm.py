from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import logging
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import virtualcell as vc

esm = pytest.importorskip("esm")
LAYERS, WIDTH = 2, 24


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_weights(path: Path, seed: int = 0) -> Path:
    """Write a tiny random ESM-2 as fair-esm publishes its own: a Namespace, prefixed names, no contact head."""
    torch.manual_seed(seed)
    network = esm.model.esm2.ESM2(num_layers=LAYERS, embed_dim=WIDTH, attention_heads=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    names = {
        f"encoder.{'' if n.startswith('lm_head') else 'sentence_encoder.'}{n}": p
        for n, p in network.state_dict().items()
        if not n.startswith("contact_head")
    }
    model = argparse.Namespace(
        encoder_layers=LAYERS, encoder_embed_dim=WIDTH, encoder_attention_heads=3, token_dropout=True
    )
    torch.save({"cfg": {"model": model}, "model": names}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("esm") / "tiny.pt")


@pytest.fixture(scope="module")
def proteins(kinase_fasta: Path) -> dict[str, str]:
    """Real proteins of 24 genes, three of them longer than 1,022 residues."""
    text = kinase_fasta.read_text().split(">")[1:]
    every = {re.search(r"GN=(\S+)", r)[1]: "".join(r.split("\n")[1:]) for r in text}
    long = [g for g, s in every.items() if 1022 < len(s) < 1500][:3]
    short = [g for g, s in every.items() if len(s) < 400][:21]
    return {g: every[g] for g in (*short, *long)}


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Residues of the windows that went through a network, one entry per window."""
    seen: list[int] = []

    def record(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, esm.model.esm2.ESM2):
            seen.extend((inputs[0] != module.padding_idx).sum(1).sub(2).tolist())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(record)
    yield seen
    handle.remove()


def direct(weights: Path, windows: list[str]) -> np.ndarray:
    """Residue vectors straight from fair-esm's classes, one sequence at a time, by its own batch converter."""
    data = torch.load(weights, weights_only=False)
    network = esm.model.esm2.ESM2(LAYERS, WIDTH, 3)
    prefix = re.compile(r"^encoder\.(sentence_encoder\.)?")
    missing = network.load_state_dict({prefix.sub("", n): p for n, p in data["model"].items()}, strict=False)
    assert all(n.startswith("contact_head") for n in missing.missing_keys)
    convert = network.alphabet.get_batch_converter()
    out = []
    for window in windows:
        tokens = convert([("", window)])[2]
        with torch.no_grad():
            out.append(network.eval()(tokens, repr_layers=[LAYERS])["representations"][LAYERS][0, 1:-1].numpy())
    return np.concatenate(out)


def embed(sequences: object, weights: Path, **options: object) -> pd.DataFrame:
    return vc.pp.gene_embeddings(sequences, model=weights, progress_bar=False, device="cpu", **options)


def test_mean_over_residues_of_real_proteins(weights: Path, proteins: dict[str, str]) -> None:
    frame = embed(proteins, weights)
    assert list(frame.index) == list(proteins)
    assert frame.index.name == "gene"
    assert (frame.dtypes == np.float32).all()
    for gene in list(proteins)[:6]:
        np.testing.assert_allclose(frame.loc[gene], direct(weights, [proteins[gene]]).mean(0), atol=1e-5)
    assert frame.attrs == {
        "source": "esm2",
        "model": f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()}",
        "layer": LAYERS,
        "max_length": 1022,
        "n_genes": 24,
        "n_isoforms": 24,
        "n_proteins_in_windows": 3,
        "fair_esm_version": "2.0.0",
    }


def test_windows_count_each_residue_once(weights: Path, proteins: dict[str, str], embedded: list[int]) -> None:
    gene = list(proteins)[-1]
    sequence = proteins[gene]
    frame = embed({gene: sequence}, weights, max_length=300)
    assert sum(embedded) == len(sequence)
    assert len(embedded) == -(-len(sequence) // 300)
    assert max(embedded) - min(embedded) <= 1
    cuts = [len(sequence) * i // len(embedded) for i in range(len(embedded) + 1)]
    residues = direct(weights, [sequence[a:b] for a, b in itertools.pairwise(cuts)])
    assert len(residues) == len(sequence)
    np.testing.assert_allclose(frame.loc[gene], residues.mean(0), atol=1e-5)


def test_mean_over_distinct_isoforms(weights: Path, proteins: dict[str, str], embedded: list[int]) -> None:
    a, b = list(proteins.values())[:2]
    frame = embed({"TWO": [a, b], "SAME": [a, a + "*", a.lower(), b], "A": a}, weights)
    assert len(embedded) == 2
    expected = (direct(weights, [a]).mean(0) + direct(weights, [b]).mean(0)) / 2
    np.testing.assert_allclose(frame.loc["TWO"], expected, atol=1e-5)
    np.testing.assert_array_equal(frame.loc["SAME"], frame.loc["TWO"])
    assert frame.attrs["n_isoforms"] == 5


@pytest.mark.parametrize("residues_per_batch", [1, 2000, 10**6])
def test_batches_and_order_do_not_matter(weights: Path, proteins: dict[str, str], residues_per_batch: int) -> None:
    some = dict(list(proteins.items())[:12] + list(proteins.items())[-1:])
    expected = embed(some, weights)
    found = embed(dict(reversed(some.items())), weights, residues_per_batch=residues_per_batch)
    np.testing.assert_allclose(found.loc[list(some)], expected, atol=1e-5)


def test_batches_stay_within_the_budget(weights: Path, proteins: dict[str, str]) -> None:
    shapes = []

    def record(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, esm.model.esm2.ESM2):
            shapes.append((inputs[0].shape[0], inputs[0].shape[1] - 2))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(record)
    embed(proteins, weights, residues_per_batch=1500)
    handle.remove()
    assert all(rows * residues <= 1500 for rows, residues in shapes)
    assert len(shapes) < 20


def test_an_interrupted_run_goes_on(
    weights: Path, proteins: dict[str, str], tmp_path: Path, embedded: list[int]
) -> None:
    expected = embed(proteins, weights)
    n_windows = len(embedded)
    embedded.clear()

    def interrupt(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, esm.model.esm2.ESM2) and len(embedded) > n_windows / 2:
            raise KeyboardInterrupt

    handle = torch.nn.modules.module.register_module_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        embed(proteins, weights, cache=tmp_path, residues_per_batch=1500)
    handle.remove()
    kept = sum(len(f.keys()) for f in map(open_shard, tmp_path.rglob("*.safetensors")))
    assert n_windows / 3 < kept < n_windows

    embedded.clear()
    frame = embed(proteins, weights, cache=tmp_path, residues_per_batch=4000)
    assert len(embedded) == n_windows - kept
    np.testing.assert_allclose(frame, expected, atol=1e-5)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".safetensors"]

    embedded.clear()
    again = embed(proteins, weights, cache=tmp_path)
    assert embedded == []
    pd.testing.assert_frame_equal(again, frame)


def open_shard(path: Path) -> object:
    from safetensors import safe_open

    return safe_open(path, framework="np")


def test_the_cache_knows_the_weights(weights: Path, proteins: dict[str, str], tmp_path: Path) -> None:
    some = dict(list(proteins.items())[:3])
    first = embed(some, weights, cache=tmp_path / "cache")
    other = write_weights(tmp_path / "tiny.pt", seed=1)
    second = embed(some, other, cache=tmp_path / "cache")
    np.testing.assert_array_equal(second, embed(some, other))
    assert abs(first - second).to_numpy().max() > 0.1


def test_a_name_loads_the_file_in_torchs_hub_folder(
    weights: Path, proteins: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.hub.get_dir()
    (tmp_path / "checkpoints").mkdir()
    write_weights(tmp_path / "checkpoints" / "esm2_t6_8M_UR50D.pt")
    some = dict(list(proteins.items())[:3])
    try:
        torch.hub.set_dir(tmp_path)
        frame = vc.pp.gene_embeddings(some, model="esm2_t6_8M_UR50D", progress_bar=False, device="cpu")
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        with pytest.raises(ConnectionError, match=r"give its path: model='.../esm2_t12_35M_UR50D.pt'"):
            vc.pp.gene_embeddings(some, model="esm2_t12_35M_UR50D", progress_bar=False)
    finally:
        torch.hub.set_dir(before)
    assert frame.attrs["model"] == "esm2_t6_8M_UR50D"
    np.testing.assert_allclose(frame, embed(some, weights), atol=1e-6)


def test_wrong_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match=r"model='esm2_t33_650M' is unknown. Did you mean 'esm2_t33_650M_UR50D'"):
        vc.pp.gene_embeddings({"A": "MK"}, model="esm2_t33_650M")
    with pytest.raises(FileNotFoundError, match=r"none\.pt' does not exist"):
        embed({"A": "MK"}, tmp_path / "none.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no ESM-2 weights: entries 'cfg' and 'model' are expected"):
        embed({"A": "MK"}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="max_length=0"):
        embed({"A": "MK"}, tmp_path / "other.pt", max_length=0)
    monkeypatch.setitem(sys.modules, "esm.pretrained", None)
    with pytest.raises(ImportError, match=r'pip install "virtualcell\[esm\]"'):
        vc.pp.gene_embeddings({"A": "MK"})


def test_weights_are_read_without_unpickling_objects(tmp_path: Path) -> None:
    torch.save({"cfg": {"model": Path("x")}, "model": {}}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        embed({"A": "MK"}, tmp_path / "evil.pt")


def test_fasta_headers(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """>ENSP1.1 pep gene:ENSG00000115415.20 transcript:ENST1.1 gene_symbol:STAT1 description:not GN=X
MKVL
AAW*
>ENSP2.1 pep gene:ENSG00000115415.20 transcript:ENST2.1 gene_symbol:STAT1
MKVLAA
>ENSP3.1 pep gene:ENSG00000282253.1 transcript:ENST3.1 gene_biotype:TR_D_gene
MK*VJ
>sp|P42224|X_HUMAN Some protein OS=Homo sapiens OX=9606 GN=HLA-A PE=1 SV=2
MKRU
>nameless
MMM
"""
    with gzip.open(tmp_path / "p.fa.gz", "wt") as file:
        file.write(text)
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        frame = embed(tmp_path / "p.fa.gz", weights)
    expected = embed({"STAT1": ["MKVLAAW", "MKVLAA"], "ENSG00000282253": "MKXVX", "HLA-A": "MKRU"}, weights)
    pd.testing.assert_frame_equal(frame, expected)
    assert caplog.messages == [
        "p.fa.gz: 1 of 5 records name no gene and are left out.",
        "2 residues '*' or 'J' inside sequences are read as X (unknown): ESM-2 has none such.",
    ]


def test_the_whole_kinase_file(weights: Path, kinase_fasta: Path) -> None:
    from virtualcell.pp._fasta import isoforms_of_genes

    found = isoforms_of_genes(kinase_fasta)
    headers = [line for line in kinase_fasta.read_text().splitlines() if line.startswith(">")]
    assert sum(map(len, found.values())) <= len(headers) == 334
    assert set(found) == {re.search(r"GN=(\S+)", h)[1] for h in headers}


def test_wrong_sequences(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gene 'B' holds \['-', '1'\], which are no amino acids"):
        embed({"A": "MK", "B": "M-K1"}, weights)
    with pytest.raises(ValueError, match="gene 'A' is empty"):
        embed({"A": ["MK", "*"]}, weights)
    with pytest.raises(ValueError, match="sequences holds no gene"):
        embed({}, weights)
    (tmp_path / "p.fasta").write_text(">one\nMK\n")
    with pytest.raises(ValueError, match=r"No header of p\.fasta names a gene \(the first is '>one'\)"):
        embed(tmp_path / "p.fasta", weights)
    (tmp_path / "p.fasta").write_text("MK\n")
    with pytest.raises(ValueError, match="there is no line that begins with '>'"):
        embed(tmp_path / "p.fasta", weights)
    with pytest.raises(FileNotFoundError, match=r"sequences='.*none.fa' does not exist"):
        embed(tmp_path / "none.fa", weights)
