"""The files that an installer reads agree with each other, and the installer says what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALLER = ROOT / "install_xdit_usp.sh"


def requirements(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def install(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = {"COMFYUI_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        ["bash", str(INSTALLER), *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_pyproject_and_both_requirement_files_name_the_same_packages() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib came with Python 3.11
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert re.findall(r'"(.+?)"', listed[1]) == requirements("requirements_compatible.txt")
    assert requirements("requirements.txt") == requirements("requirements_compatible.txt")


@pytest.mark.parametrize("name", ["requirements_compatible.txt", "requirements_official_distrifusion.txt"])
def test_nothing_that_users_install_pins_torch_or_old_diffusers(name: str) -> None:
    packages = {re.split(r"[<>=!~ \[]", line)[0] for line in requirements(name)}
    assert not packages & {"torch", "torchvision", "torchaudio", "diffusers", "transformers", "huggingface_hub"}


def test_help_names_every_way_to_run_the_installer() -> None:
    helped = install("--help")
    assert helped.returncode == 0
    for option in ("--demo", "--out", "--gpus", "--with-xfuser", "COMFYUI_PYTHON"):
        assert option in helped.stdout


def test_an_unknown_option_is_refused() -> None:
    refused = install("--fast")
    assert refused.returncode == 2
    assert "--fast" in refused.stderr and "--help" in refused.stderr


def test_an_interpreter_without_torch_is_refused_before_anything_is_installed() -> None:
    refused = install(COMFYUI_PYTHON="/nowhere/python")
    assert refused.returncode == 2
    assert refused.stderr.startswith("COMFYUI_PYTHON is /nowhere/python, which cannot import torch.")
