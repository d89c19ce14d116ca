"""Fixtures that every Python test shares."""
import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> pathlib.Path:
    return ROOT


@pytest.fixture(scope="session")
def build() -> pathlib.Path:
    return pathlib.Path(os.environ.get("CASEMATE_BUILD", ROOT / "build"))


@pytest.fixture(scope="session")
def smollm_gguf() -> pathlib.Path:
    path = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.exists(), f"{path} is missing: ./run model fetches it"
    return path


@pytest.fixture(scope="session")
def gemma_gguf() -> pathlib.Path:
    path = ROOT / ".cache" / "gemma-3-270m-q4_k_m.gguf"
    assert path.exists(), f"{path} is missing: ./run model fetches it"
    return path
