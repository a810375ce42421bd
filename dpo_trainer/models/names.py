"""Where the name of a model leads: a local folder, or a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ..registry import did_you_mean
from ..storage.hub import brief_without_network


def local_folder(name_or_path: str) -> Path | None:
    """The folder of that name, None for a hub id; an error for what can only be a path, and is not there."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{name_or_path!r} is a file: give the folder that it is in.")
    only_a_path = name_or_path.startswith((".", "/", "~")) or name_or_path.endswith("/") or name_or_path.count("/") > 1
    if only_a_path or not name_or_path.strip():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"There is no folder {name_or_path!r}.{did_you_mean(path.name, siblings)}")
    return None


def where(name_or_path: str) -> str:
    """What `from_pretrained` is told: the folder, `~` resolved, or the hub id."""
    return str(local_folder(name_or_path) or name_or_path)


def fetch(name_or_path: str, filename: str, revision: str | None) -> str | None:
    """Path of one file of a model (downloaded if need be), None if the model has no such file."""
    folder = local_folder(name_or_path)
    if folder:
        return str(folder / filename) if (folder / filename).is_file() else None
    try:
        with brief_without_network(name_or_path):
            return hf_hub_download(name_or_path, filename, revision=revision)
    except LocalEntryNotFoundError as error:  # the hub cannot be asked: a model in the cache still loads
        if isinstance(try_to_load_from_cache(name_or_path, "config.json", revision=revision), str):
            return None
        raise ValueError(
            f"There is no folder {name_or_path!r}, and the hub, where a model of that name could be, is out of reach "
            "(no network, or HF_HUB_OFFLINE is set) and no copy is in the cache. Check the spelling, or download the "
            "model where there is a network and give its folder."
        ) from error
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"There is no folder {name_or_path!r}, and no model of that name on the hub that you may read. Check the "
            "spelling; for a private or gated model, log in with `hf auth login`."
        ) from error
