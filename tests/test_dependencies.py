"""What pyproject.toml allows excludes versions with known vulnerabilities, and the pinned set lies within it."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
    if not line.startswith("s2t-agents[")
]

VULNERABLE = {  # the newest version that has it
    "CVE-2025-27516": "jinja2 3.1.5",  # out of the sandbox, in which chat templates run
    "CVE-2025-68664": "langchain-core 1.2.4",  # injection by serialization
    "CVE-2026-34070": "langchain-core 1.2.21",  # files read by prompts' configurations
    "CVE-2026-44843": "langchain-core 1.3.2",  # load() instantiates too much
    "CVE-2026-55443": "langchain 1.3.8",  # out of the folder of the file search
    "CVE-2026-28277": "langgraph 1.0.9",  # checkpoints that run code (msgpack)
    "CVE-2026-27794": "langgraph-checkpoint 3.0.1",  # caches that run code (pickle)
    "CVE-2026-48775": "langgraph-checkpoint 4.1.0",  # checkpoints that run code (JSON)
    "CVE-2025-32434": "torch 2.5.1",  # torch.load with weights_only runs code
    "CVE-2026-24747": "torch 2.9.1",  # the same, by memory corruption
    "CVE-2025-3000": "torch 2.12.1",  # torch.jit.script corrupts memory
    "CVE-2026-4372": "transformers 5.2.0",  # a checkpoint's configuration runs code without consent
    "CVE-2026-5241": "transformers 5.4.0",  # the same in one architecture
    "CVE-2026-9856": "transformers 5.9.0",  # a tokenizer writes outside the folder that it is saved to
    "CVE-2025-71176": "pytest 9.0.2",  # temporary folders of others
}


@pytest.mark.parametrize("vulnerability", VULNERABLE)
def test_versions_with_a_known_vulnerability_are_not_allowed(vulnerability: str) -> None:
    name, version = VULNERABLE[vulnerability].split()
    matching = [requirement for requirement in REQUIREMENTS if requirement.name == name]
    assert matching
    assert not any(requirement.specifier.contains(version) for requirement in matching)


def test_the_pinned_set_lies_within_what_is_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), str(requirement)


def test_every_dependency_has_a_lowest_version() -> None:
    for requirement in REQUIREMENTS:
        assert any(bound.operator == ">=" for bound in requirement.specifier), str(requirement)
