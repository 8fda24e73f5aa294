"""Checkpoints from the Hugging Face hub, by `owner/name` or `owner/name/file.gguf`.

Either may end in `@revision`. Only the files that are needed are fetched, into the cache that all
Hugging Face tools share. A branch moves, so `Fetched.pinned` is the id to run a checkpoint again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from decant.models.checkpoints.hf_layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    WEIGHTS,
)
from decant.models.checkpoints.weight_index import read_index
from decant.models.text.named_templates import ADDITIONAL
from decant.models.text.tokenizer import FILES

_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(/(?P<file>[^@]+\.gguf))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubId:
    """A repository, or one .gguf file of it, at a revision."""

    repo: str
    file: str | None = None
    """Path of a .gguf file in the repository. None: the repository is a model directory."""
    revision: str | None = None
    """A branch, tag or commit; None is the main branch."""

    @classmethod
    def parse(cls, name: str) -> HubId | None:
        """The id that `name` spells, or None if it cannot be one."""
        match = _ID.fullmatch(name)
        # Of a file or revision like ../x the client would make a path outside of its cache.
        leads_out = not {".", ".."}.isdisjoint(re.split("[/@]", name))
        return None if match is None or leads_out else cls(**match.groupdict())

    @property
    def name(self) -> str:
        """The id without its revision."""
        return f"{self.repo}/{self.file}" if self.file else self.repo


@dataclass(frozen=True)
class Fetched:
    """A checkpoint's files on this machine."""

    path: Path
    """The directory, or the .gguf file."""
    pinned: str
    """The id with the commit, which always refers to these files."""


def fetch_checkpoint(hub_id: HubId, *, fetch: bool = True) -> Fetched:
    """Fetch the checkpoint's files, unless this machine has them already.

    With `fetch` False nothing is asked of the network: the files must have been fetched before.
    Offline (HF_HUB_OFFLINE=1, or no network) it uses files that were fetched before.
    FileNotFoundError if repository, revision or files do not exist or cannot be reached.
    ValueError if the hub refuses the request.
    """
    if hub_id.file:
        snapshot = _download(hub_id, hub_id.revision, [hub_id.file], fetch=fetch)
        path = snapshot / hub_id.file
    else:
        small = [CONFIG, ADAPTER_CONFIG, *FILES, f"{ADDITIONAL}/*", INDEX]
        path = snapshot = _download(hub_id, hub_id.revision, small, fetch=fetch)
        # An adapter has no weights of a whole model.
        weights = [*_weights(snapshot), ADAPTER_WEIGHTS]
        _download(hub_id, snapshot.name, weights, fetch=fetch)
    known = hub_id.file or (path / CONFIG).exists() or (path / ADAPTER_CONFIG).exists()
    if not path.exists() or not known:
        raise FileNotFoundError(
            f"{hub_id.name} at {snapshot.name[:12]} has no {hub_id.file or CONFIG}. For a "
            "repository of .gguf files name one: owner/name/FILE.gguf"
        )
    missing = [] if hub_id.file else [n for n in _weights(path) if not (path / n).exists()]
    if missing and not (path / ADAPTER_WEIGHTS).exists():
        raise FileNotFoundError(
            f"{hub_id.name} at {snapshot.name[:12]} lacks {', '.join(missing[:3])}: the "
            "repository holds no .safetensors, or it was fetched in part and cannot be reached now"
        )
    return Fetched(path, f"{hub_id.name}@{snapshot.name}")


def without_commit(name: str) -> str | None:
    """The id without its commit; None if `name` is not a hub id with a commit."""
    hub_id = HubId.parse(name)
    commit = hub_id and hub_id.revision and re.fullmatch("[0-9a-f]{40}", hub_id.revision)
    return hub_id.name if hub_id and commit else None


def _weights(snapshot: Path) -> list[str]:
    """Names of the snapshot's weight files, some of which may not be fetched yet."""
    if not (snapshot / INDEX).exists():
        return [WEIGHTS]
    return sorted(set(read_index(snapshot).values()))


def _download(hub_id: HubId, revision: str | None, files: list[str], *, fetch: bool) -> Path:
    """Fetch the `files` that the revision has; returns the directory, named after its commit."""
    # Imported here because it reads the environment, which local checkpoints do not need.
    from huggingface_hub import errors, snapshot_download

    at = f" at {revision}" if revision else ""
    try:
        return Path(
            snapshot_download(
                hub_id.repo, revision=revision, allow_patterns=files, local_files_only=not fetch
            )
        )
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{hub_id.repo} is gated: accept its terms on its page, then log in (`hf auth login`, "
            "or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{hub_id.repo} has no branch, tag or commit {revision!r}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{hub_id.repo}: no directory of this name here ({Path.cwd()}), and none on the hub "
            "that you can see. A private one needs a login (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if not fetch:
            raise FileNotFoundError(f"{hub_id.repo}{at}: not fetched before.") from error
        raise FileNotFoundError(
            f"{hub_id.repo}{at}: no directory of this name here ({Path.cwd()}), the hub cannot be "
            "reached (or HF_HUB_OFFLINE is set), and it was not fetched before. Fetch it where "
            f"there is a network (`hf download {hub_id.repo}`) and copy the directory or the cache"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise ValueError(f"{hub_id.repo}{at}: the hub refuses it: {error}") from error
