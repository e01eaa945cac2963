"""The files that an installer reads agree with each other, and the installer says what is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import testkit

ROOT = testkit.ROOT
INSTALLER = ROOT / "install_xdit_usp.sh"


def requirements(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def install(*arguments: str, script: Path = INSTALLER, **environment: str) -> subprocess.CompletedProcess[str]:
    names = {"COMFYUI_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        ["bash", str(script), *arguments],
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


def test_distrifuser_cannot_bring_its_old_diffusers_in() -> None:
    assert "-c constraints_official_distrifusion.txt" in requirements("requirements_official_distrifusion.txt")
    assert requirements("constraints_official_distrifusion.txt") == ["diffusers>0.24.0"]
    assert any(line.startswith("distrifuser @ git+") for line in requirements("requirements_official_distrifusion.txt"))


def test_help_names_every_way_to_run_the_installer() -> None:
    helped = install("--help")
    assert helped.returncode == 0
    named = ("--demo", "--out", "--gpus", "--with-example-models", "--with-xfuser", "--with-distrifusion")
    for option in (*named, "COMFYUI_PYTHON"):
        assert option in helped.stdout


def test_an_unknown_option_is_refused() -> None:
    refused = install("--fast")
    assert refused.returncode == 2
    assert "--fast" in refused.stderr and "--help" in refused.stderr


def test_an_interpreter_without_torch_is_refused_before_anything_is_installed() -> None:
    refused = install(COMFYUI_PYTHON="/nowhere/python")
    assert refused.returncode == 2
    assert refused.stderr.startswith("COMFYUI_PYTHON is /nowhere/python, which cannot import torch.")


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder like ComfyUI's with this installer and stand-ins for the example models in a pack."""
    pack = tmp_path / "custom_nodes" / "wan parallel"
    (pack / "example_workflows" / "models").mkdir(parents=True)
    (tmp_path / "main.py").touch()
    shutil.copy(INSTALLER, pack)
    for name in ("tiny_wan_t2v", "tiny_wan_vae"):
        (pack / "example_workflows" / "models" / f"{name}.safetensors").write_text(name)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")  # says yes to everything, and installs nothing
    python.chmod(0o755)
    return tmp_path


def test_the_pack_is_found_whatever_cdpath_says(comfyui: Path) -> None:
    """cd prints the folder where it was found by CDPATH."""
    ran = subprocess.run(
        ["bash", f"custom_nodes/wan parallel/{INSTALLER.name}", "--with-example-models"],
        cwd=comfyui,
        env=os.environ | {"CDPATH": ".", "COMFYUI_PYTHON": str(comfyui / "python")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def link_models(comfyui: Path) -> subprocess.CompletedProcess[str]:
    script = comfyui / "custom_nodes" / "wan parallel" / INSTALLER.name
    return install("--with-example-models", script=script, COMFYUI_PYTHON=str(comfyui / "python"))


def test_the_example_models_are_linked_into_comfyui_and_linking_twice_is_safe(comfyui: Path) -> None:
    t2v = comfyui / "models" / "diffusion_models" / "tiny_wan_t2v.safetensors"
    vae = comfyui / "models" / "vae" / "tiny_wan_vae.safetensors"
    for said in ("Linked", "is there already"):
        done = link_models(comfyui)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(said) == 2
        assert t2v.is_symlink() and t2v.read_text() == "tiny_wan_t2v"
        assert vae.is_symlink() and vae.read_text() == "tiny_wan_vae"


def test_a_link_to_where_the_pack_was_before_is_made_anew(comfyui: Path) -> None:
    vae = comfyui / "models" / "vae" / "tiny_wan_vae.safetensors"
    vae.parent.mkdir(parents=True)
    vae.symlink_to(comfyui / "gone.safetensors")
    assert link_models(comfyui).returncode == 0
    assert vae.read_text() == "tiny_wan_vae"


def test_a_different_file_of_an_example_models_name_is_not_touched(comfyui: Path) -> None:
    vae = comfyui / "models" / "vae" / "tiny_wan_vae.safetensors"
    vae.parent.mkdir(parents=True)
    vae.write_text("mine")
    refused = link_models(comfyui)
    assert refused.returncode == 2
    assert f"{vae} is another file than the one of this pack. Move it away" in refused.stderr
    assert vae.read_text() == "mine"


def test_example_models_need_a_comfyui_to_be_linked_into(comfyui: Path) -> None:
    (comfyui / "main.py").unlink()
    refused = link_models(comfyui)
    assert refused.returncode == 2
    assert "has no model folders to link into. Move it there" in refused.stderr
