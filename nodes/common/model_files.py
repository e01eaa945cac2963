"""The models that the loader offers: what ComfyUI lists, and also GGUF files and folders of shards; model patches.

Nodes open files that ComfyUI or this module lists, and no others, whatever name or path a prompt gives: anyone who can
queue a prompt could otherwise have any file of the machine opened. A refusal does not show whether a file exists.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

import folder_paths

from ...wanvideo.base.tensor_info import CheckpointError, shortened
from ...wanvideo.checkpoint.file_header import is_gguf, is_index, is_shard

MODEL_FOLDER, PATCH_FOLDER, LORA_FOLDER = "diffusion_models", "model_patches", "loras"

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


def model_path(name: object) -> str:
    """Return the path of a model that `model_names` lists.

    Raises:
        CheckpointError: `name` is not in the list.
    """
    if not isinstance(name, str) or name not in model_names():
        raise _not_listed(name, MODEL_FOLDER)
    return _path_below(MODEL_FOLDER, name)


def listed_model(path: object) -> str:
    """Return `path`, which another node gave, if it is that of a model that `model_names` lists.

    Raises:
        CheckpointError: it is not.
    """
    return _listed(path, MODEL_FOLDER, model_names())


def listed_lora(path: object) -> str:
    """Return `path`, which another node gave, if it is that of a LoRA that ComfyUI lists.

    Raises:
        CheckpointError: it is not.
    """
    return _listed(path, LORA_FOLDER, folder_paths.get_filename_list(LORA_FOLDER))


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


def _path_below(folder: str, name: str) -> str:
    """The path of a listed name: of the first file or folder that has it, as ComfyUI searches."""
    roots = folder_paths.get_folder_paths(folder)
    paths = [os.path.join(root, name) for root in roots]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def _listed(path: object, folder: str, names: Collection[str]) -> str:
    if isinstance(path, str) and os.path.isabs(path):
        for root in folder_paths.get_folder_paths(folder):
            name = os.path.relpath(path, root)
            if name in names:
                return os.path.join(root, name)
        # Other nodes may give the path of a file behind links.
        alike = [name for name in names if os.path.basename(name) == os.path.basename(path)]
        if any(os.path.realpath(_path_below(folder, name)) == path for name in alike):
            return path
    raise _not_listed(path, folder)


def _not_listed(name: object, folder: str) -> CheckpointError:
    shown = f'"{shortened(name)}"' if isinstance(name, str) else f"A {type(name).__name__}"
    return CheckpointError(
        f"{shown} is not in the list of models/{folder}. Choose one of the list; press R in the browser where the file "
        "is new."
    )
