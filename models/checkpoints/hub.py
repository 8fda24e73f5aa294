"""Hub ids: `owner/name`, `owner/name@revision`, and `owner/name/file.gguf` for a file of it.

Only files that are needed are fetched, into the cache that all of Hugging Face's tools share. A
branch moves, so whoever runs a checkpoint again must do it by `Fetched.pinned`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from decant.models.checkpoints.hf_layout import CONFIG, INDEX, WEIGHTS
from decant.models.text.tokenizer import FILES

_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(/(?P<file>[^@]+\.gguf))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubId:
    """A repository, or a .gguf file of it, at a branch, tag or commit; None is the main branch."""

    repo: str
    file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubId | None:
        """None for what cannot be one."""
        match = _ID.fullmatch(name)
        return cls(**match.groupdict()) if match else None

    @property
    def name(self) -> str:
        """Without the revision."""
        return f"{self.repo}/{self.file}" if self.file else self.repo


@dataclass(frozen=True)
class Fetched:
    """Where a checkpoint's files lie, and the id that will always mean these files."""

    path: Path
    pinned: str


def fetch_checkpoint(hub_id: HubId) -> Fetched:
    """The checkpoint on this machine, fetched unless it is there.

    Offline (HF_HUB_OFFLINE=1, or no network) what was fetched before is used.
    FileNotFoundError for what is not there, ValueError for a repository that we cannot use.
    """
    if hub_id.file:
        snapshot = _download(hub_id, hub_id.revision, [hub_id.file])
        path = snapshot / hub_id.file
    else:
        path = snapshot = _download(hub_id, hub_id.revision, [CONFIG, *FILES, INDEX])
        _download(hub_id, snapshot.name, _weights(snapshot))
    if not path.exists() or not (hub_id.file or (path / CONFIG).exists()):
        raise FileNotFoundError(
            f"{hub_id.name} at {snapshot.name[:12]} has no {hub_id.file or CONFIG}. For a "
            "repository of .gguf files name one: owner/name/FILE.gguf"
        )
    missing = [] if hub_id.file else [n for n in _weights(path) if not (path / n).exists()]
    if missing:
        raise FileNotFoundError(
            f"{hub_id.name} at {snapshot.name[:12]} lacks {', '.join(missing[:3])}: the "
            "repository holds no .safetensors, or it was fetched in part and cannot be reached now"
        )
    return Fetched(path, f"{hub_id.name}@{snapshot.name}")


def without_commit(name: str) -> str | None:
    """The id without its commit, if `name` is one with a commit."""
    hub_id = HubId.parse(name)
    commit = hub_id and hub_id.revision and re.fullmatch("[0-9a-f]{40}", hub_id.revision)
    return hub_id.name if hub_id and commit else None


def _weights(snapshot: Path) -> list[str]:
    index = snapshot / INDEX
    if not index.exists():
        return [WEIGHTS]
    return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))


def _download(hub_id: HubId, revision: str | None, files: list[str]) -> Path:
    """The snapshot's directory, named after its commit, with those of `files` that there are."""
    # Reads the environment when imported, which nobody should pay for who has files.
    from huggingface_hub import errors, snapshot_download

    at = f" at {revision}" if revision else ""
    try:
        return Path(snapshot_download(hub_id.repo, revision=revision, allow_patterns=files))
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
        raise FileNotFoundError(
            f"{hub_id.repo}{at}: no directory of this name here ({Path.cwd()}), the hub cannot be "
            "reached (or HF_HUB_OFFLINE is set), and it was not fetched before. Fetch it where "
            f"there is a network (`hf download {hub_id.repo}`) and copy the directory or the cache"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise ValueError(f"{hub_id.repo}{at}: the hub refuses it: {error}") from error
