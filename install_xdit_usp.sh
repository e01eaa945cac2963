#!/usr/bin/env bash
# Installs WanParallel's Python dependencies, or runs its demo. `--help` says the rest.
set -euo pipefail

readonly DEMO_TORCH="2.13.0"
# Logical path: a pack linked into custom_nodes stays there. With CDPATH set, cd would print the folder too.
PACK="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly PACK
readonly VENV="$PACK/.venv"

usage() {
    cat <<EOF
Usage:
  ./install_xdit_usp.sh [--with-example-models] [--with-xfuser] [--with-distrifusion]
      Installs requirements_compatible.txt into the ComfyUI that this folder lies in
      (ComfyUI/custom_nodes/<this folder>). Your torch stays as it is.
      --with-example-models links the two small models of example_workflows/tiny_wan_demo.json (39 MB, part of
      this folder) into models/diffusion_models and models/vae of that ComfyUI.
      --with-xfuser adds xfuser, the second sequence-parallel path for NVIDIA GPUs (about ten packages).
      --with-distrifusion adds MIT's distrifuser without what it depends on; the DistriFusion nodes run without it too.

  ./install_xdit_usp.sh --demo [--out DIR] [--gpus N] [--prompt TEXT] [...]
      Samples a short video of a prompt with a small model on all GPUs (or on 2 CPU workers), compares it with
      one worker, and writes video, contact sheet and report to DIR (default: demo_output in this folder).
      Uses ComfyUI's Python where this folder lies in a ComfyUI, else a virtual environment of its own
      ($VENV, with torch $DEMO_TORCH). Other arguments go to tools/demo.py.

  ./install_xdit_usp.sh --make-venv FILE...
      Makes that virtual environment with the given requirement files too. test_xdit_usp.py uses it.

Environment: COMFYUI_PYTHON names ComfyUI's interpreter where it is not found by itself.
Running any of these again is safe, and quick where nothing has changed.
EOF
}

say() { printf '%s\n' "$*" >&2; }

fail() { # two sentences: what is wrong, and what to do
    say "$*"
    exit 2
}

has_torch() { "$1" -c 'import torch' >/dev/null 2>&1; }

torch_version() { # that interpreter $1 has installed; fails where it has none
    "$1" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null
}

comfyui_folder() {
    local comfyui
    comfyui="$(dirname "$(dirname "$PACK")")"
    [[ "$(basename "$(dirname "$PACK")")" == custom_nodes && -f "$comfyui/main.py" ]] && printf '%s\n' "$comfyui"
}

comfyui_python() { # prints the interpreter of the ComfyUI in folder $1: the first one that has torch
    local candidate
    for candidate in \
        "$1/venv/bin/python" "$1/.venv/bin/python" "$1/../python_embeded/python.exe" \
        "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
        "$(command -v python3 || true)"; do
        if [[ -x "$candidate" ]] && has_torch "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# pip_install PYTHON ARGUMENTS...: installs with the torch that PYTHON has held fixed, and checks that it stayed.
pip_install() {
    local python="$1" before constraints
    shift
    before="$(torch_version "$python")" || fail "$python has no torch. Install torch there first."
    "$python" -m pip --version >/dev/null 2>&1 ||
        fail "$python has no pip. Add it with '$python -m ensurepip', or install $PACK/requirements_compatible.txt" \
            "with the tool that manages this environment."
    constraints="$(mktemp)"
    "$python" - >"$constraints" <<'PY'
from importlib import metadata
for name in ("torch", "torchvision", "torchaudio", "triton"):
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        pass
PY
    local status=0
    "$python" -m pip install -qq --disable-pip-version-check --constraint "$constraints" "$@" || status=$?
    rm -f "$constraints"
    [[ $status == 0 ]] || fail "pip could not install the packages (its message is above), and torch $before is" \
        "untouched. Put that right and run this script again."
    [[ "$(torch_version "$python")" == "$before" ]] ||
        fail "torch was $before and no longer is. Install torch==$before again in $python and report this."
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# make_venv FILE...: the pack's own environment; pip runs only when the requirement files have changed.
make_venv() {
    local file candidate base="" wanted stamp="$VENV/installed"
    local files=("$PACK/requirements_compatible.txt" "$@")
    for file in "${files[@]}"; do
        [[ -f "$file" ]] || fail "There is no requirement file $file. Name files that exist after --make-venv."
    done
    wanted="$(for file in "${files[@]}"; do printf '%s %s %s\n' "${file#"$PACK"/}" "$DEMO_TORCH" "$(cksum <"$file")"; done)"
    if [[ -x "$VENV/bin/python" && -f "$stamp" ]] && ! grep -qvxFf "$stamp" <<<"$wanted"; then return; fi

    # One that was cut off while it was made lacks pip or its configuration.
    if [[ ! -f "$VENV/pyvenv.cfg" ]] || ! new_enough "$VENV/bin/python" ||
        ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
            if command -v "$candidate" >/dev/null && new_enough "$candidate"; then base="$candidate" && break; fi
        done
        [[ -n "$base" ]] || fail "No Python 3.10 or newer was found. Install one and run this script again."
        say "Making a virtual environment in $VENV ..."
        "$base" -m venv --clear "$VENV" >&2 ||
            fail "$base could not make a virtual environment. Install its venv module (Debian, Ubuntu:" \
                "'apt install python3-venv') and run this script again."
    fi
    if [[ "$(torch_version "$VENV/bin/python" || true)" != "$DEMO_TORCH"* ]]; then
        say "Installing torch $DEMO_TORCH into it (the largest part, once) ..."
        local quiet=-qq
        [[ -t 2 ]] && quiet=--progress-bar=on
        "$VENV/bin/python" -m pip install "$quiet" --disable-pip-version-check "torch==$DEMO_TORCH" >&2 ||
            fail "torch $DEMO_TORCH could not be installed (pip's message is above). Put that right and run this" \
                "script again."
    fi
    say "Installing ${files[*]#"$PACK"/} into it ..."
    local arguments=()
    for file in "${files[@]}"; do arguments+=(--requirement "$file"); done
    pip_install "$VENV/bin/python" "${arguments[@]}" >&2
    for file in "${files[@]}"; do # what other files have installed stays noted
        if [[ -f "$stamp" ]]; then sed -i "\\|^${file#"$PACK"/} |d" "$stamp"; fi
    done
    printf '%s\n' "$wanted" >>"$stamp"
}

link_example_models() { # into the model folders of the ComfyUI in folder $1
    local model name source target
    for model in diffusion_models/tiny_wan_t2v vae/tiny_wan_vae; do
        name="$(basename "$model").safetensors"
        source="$PACK/example_workflows/models/$name" target="$1/models/$model.safetensors"
        [[ -f "$source" ]] || fail "$source is missing. Restore it with 'git checkout', or get the whole pack again."
        if [[ -e "$target" ]]; then
            cmp -s "$source" "$target" ||
                fail "$target is another file than the one of this pack. Move it away and run this script again."
            say "$target is there already."
            continue
        fi
        # What `rm` takes away is a link to where this pack was before.
        if mkdir -p "$(dirname "$target")" && rm -f "$target" && ln -s "$source" "$target" 2>/dev/null; then
            say "Linked $target."
        else
            cp "$source" "$target" || fail "$target can neither be linked nor copied (the reason is above)." \
                "Make that folder writable and run this script again."
            say "Copied $target (this file system has no links)."
        fi
    done
}

install_into_comfyui() {
    local with_xfuser="$1" with_models="$2" with_distrifusion="$3" comfyui python
    local arguments=(--requirement "$PACK/requirements_compatible.txt")
    if [[ -n "${COMFYUI_PYTHON:-}" ]]; then
        python="$COMFYUI_PYTHON"
        has_torch "$python" ||
            fail "COMFYUI_PYTHON is $python, which cannot import torch. Set it to the interpreter that starts ComfyUI."
    else
        comfyui="$(comfyui_folder)" ||
            fail "$PACK does not lie in ComfyUI/custom_nodes. Move it there, or set COMFYUI_PYTHON to the" \
                "interpreter that starts ComfyUI."
        python="$(comfyui_python "$comfyui")" ||
            fail "No Python with torch was found for $comfyui. Set COMFYUI_PYTHON to the interpreter that starts" \
                "ComfyUI."
    fi
    if [[ "$with_models" == yes ]]; then
        comfyui="$(comfyui_folder)" ||
            fail "$PACK does not lie in ComfyUI/custom_nodes, so --with-example-models has no model folders to" \
                "link into. Move it there and run this script again."
        link_example_models "$comfyui"
    fi
    [[ "$with_xfuser" == yes ]] && arguments+=("xfuser>=0.7,<0.8")
    say "Installing requirements_compatible.txt$([[ "$with_xfuser" == yes ]] && printf ' and xfuser') into $python."
    say "torch $(torch_version "$python") stays as it is."
    pip_install "$python" "${arguments[@]}"
    if [[ "$with_distrifusion" == yes ]]; then
        say "Installing distrifuser without what it depends on."
        pip_install "$python" --no-deps --requirement "$PACK/requirements_official_distrifusion.txt"
    fi
    say "Done. Restart ComfyUI and open example_workflows/$([[ "$with_models" == yes ]] &&
        printf tiny_wan_demo || printf xdit_usp_example).json."
}

run_demo() {
    local comfyui python=""
    if comfyui="$(comfyui_folder)"; then
        python="${COMFYUI_PYTHON:-$(comfyui_python "$comfyui" || true)}"
    fi
    if [[ -n "$python" ]]; then
        say "This folder lies in $comfyui: the demo uses its Python, $python."
        say "Installing requirements_compatible.txt there; torch $(torch_version "$python") stays as it is."
        pip_install "$python" --requirement "$PACK/requirements_compatible.txt"
    else
        make_venv "$PACK/tools/requirements.txt"
        python="$VENV/bin/python"
    fi
    exec "$python" "$PACK/tools/demo.py" "$@"
}

main() {
    local mode=install with_xfuser=no with_models=no with_distrifusion=no rest=()
    for argument in "$@"; do
        case "$argument" in
            -h | --help) usage && return ;;
            --demo) mode=demo ;;
            --make-venv) mode=venv ;;
            --with-xfuser) with_xfuser=yes ;;
            --with-example-models) with_models=yes ;;
            --with-distrifusion) with_distrifusion=yes ;;
            *) rest+=("$argument") ;;
        esac
    done
    case "$mode" in
        demo) run_demo "${rest[@]}" ;;
        venv) make_venv "${rest[@]}" ;;
        install)
            [[ ${#rest[@]} == 0 ]] || fail "There is no option '${rest[0]}'. Run '$0 --help' to see the options."
            install_into_comfyui "$with_xfuser" "$with_models" "$with_distrifusion"
            ;;
    esac
}

main "$@"
