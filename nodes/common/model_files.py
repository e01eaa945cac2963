"""The models that the loader offers: what ComfyUI lists, and also GGUF files and folders of shards; model patches."""

from __future__ import annotations

import os
from collections.abc import Iterator

import folder_paths

from ...wanvideo.checkpoint.file_header import is_gguf, is_index, is_shard

MODEL_FOLDER, PATCH_FOLDER = "diffusion_models", "model_patches"

_found: dict[str, tuple[list[str], dict[str, float]]] = {}
"""For each folder of models: the files below it, and when its subfolders were last changed."""


def model_names() -> list[str]:
    """List the models in ComfyUI's folders for diffusion models, by their paths below these folders.

    A stock ComfyUI lists neither GGUF files nor folders of shards. This function looks for both itself and leaves
    ComfyUI's own lists, which belong to all nodes, unchanged.
    """
    files = [file for root in folder_paths.get_folder_paths(MODEL_FOLDER) for file in _files_below(root)]
    folders = {os.path.dirname(file) for file in files if _is_index_of_model(file)} - {""}
    names = {name for name in folder_paths.get_filename_list(MODEL_FOLDER) if not _is_part(name, folders)}
    return sorted(names | folders | {file for file in files if is_gguf(file)})


def model_path(name: str) -> str:
    """Return the path of a listed model; for a model that is gone, a path that `read_header` refuses by name."""
    path = folder_paths.get_full_path(MODEL_FOLDER, name)
    if path is not None:
        return path
    inside = os.path.relpath(os.path.join("/", name), "/")  # whatever ".." the name has
    for root in folder_paths.get_folder_paths(MODEL_FOLDER):
        folder = os.path.join(root, inside)
        if inside != "." and os.path.isdir(folder):
            return folder
    return os.path.join(MODEL_FOLDER, name)


def patch_files() -> Iterator[str]:
    """Iterate over the paths of the files that ModelPatchLoader offers; the search begins with the first file."""
    for name in folder_paths.get_filename_list(PATCH_FOLDER):
        path = folder_paths.get_full_path(PATCH_FOLDER, name)
        if path is not None:
            yield path


def _is_index_of_model(file: str) -> bool:
    """Whether a file is the index of a transformer's shards, not the index of a text encoder in a nearby folder."""
    return is_index(file) and os.path.basename(file).startswith("diffusion_pytorch_model")


def _is_part(name: str, folders: set[str]) -> bool:
    return is_shard(name) and os.path.dirname(name) in folders


def _files_below(root: str) -> list[str]:
    files, changed = _found.get(root, ([], {}))
    if not changed or any(_changed(folder) != time for folder, time in changed.items()):
        files, changed = _found[root] = folder_paths.recursive_search(root, excluded_dir_names=[".git"])
    return files


def _changed(folder: str) -> float | None:
    try:
        return os.path.getmtime(folder)
    except OSError:
        return None
