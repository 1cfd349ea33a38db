"""Where a model's files are: the shipped one, a folder, or a repository of the Hugging Face hub. No torch."""

import re
from pathlib import Path

from glm52.errors import ConfigError

NANO = Path(__file__).parent / "nano"
_WEIGHTS = "*.safetensors"
_FILES = ["*.json", "*.jinja", "*.txt"]


def resolve(model: str | None, *, weights: bool = True) -> Path:
    """The folder of a model. None or ``nano``: the shipped one; ``owner/name``: fetched, resuming what is there.
    weights: whether a repository's are needed, hundreds of GB beside some 20 MB of other files."""
    if model is None or model == "nano":
        if not (NANO / "model.safetensors").is_file():
            raise ConfigError(
                "this copy of glm52 was built without its small model; name a folder of a GLM-5 checkpoint"
            )
        return NANO
    if not model:  # which, as a path, would be the current folder
        raise ConfigError("model: expected a folder or a name, found nothing; the current folder is .")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise ConfigError(f"{path}: expected a model folder with config.json, found {found}")
        return path
    if path.exists():
        raise ConfigError(f"{path}: expected a model folder, found a file; name the folder that holds it")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise _no_name(model)
    return _fetch(model, [*_FILES, *([_WEIGHTS] if weights else [])])


def name_of(folder: Path) -> str:
    """What a model is called: its folder's name, or its repository's, whose folder is called by a commit."""
    folder = folder.absolute()
    return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name


def _no_name(model: str) -> ConfigError:
    return ConfigError(f"{model}: no such folder, and not a repository name of the form owner/name")


def _fetch(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except HFValidationError as error:
        raise _no_name(repository) from error
    except HfHubHTTPError as error:
        raise ConfigError(f"{repository}: the hub refused it ({error}); check the name and your access") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{repository}: there is no folder of that name here and the hub cannot be reached; download the "
            "repository on a machine with a network and pass its folder"
        ) from error
