"""Where each cloud's tools look for credentials, in their order.

The client reads the environment, tokens of pods and the machine's role itself. Added here: the
files in `~/.aws`, and an error at once where the client would look for a role for minutes.
"""

import configparser
import datetime
import json
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from decant.store.base import StoreError
from decant.store.troubles import NO_CREDENTIALS

Provider = Callable[[], Any]
_OF_PODS = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_OF_GOOGLE = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_SKIP_SIGNATURE",
)
_NEEDS_BOTO = ("sso_session", "sso_start_url", "role_arn", "credential_process")


def aws_profile() -> dict[str, str]:
    """The chosen profile's entries in `~/.aws/config` and `~/.aws/credentials`; the latter win."""
    name = os.environ.get("AWS_PROFILE", "default")
    entries: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        path = Path(os.environ.get(variable) or f"~/.aws/{file}").expanduser()
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            # Without the parser's own text: it quotes the line.
            raise StoreError(f"{path}: cannot be read as AWS writes it. Check its lines") from None
        if parser.has_section(section):
            entries |= dict(parser.items(section))
    return entries


def aws_provider() -> Provider | None:
    """Gives credentials to the client; None if the client finds them itself.

    StoreError if there are none.
    """
    environ = os.environ
    if environ.get("AWS_ACCESS_KEY_ID") or environ.get("AWS_SKIP_SIGNATURE"):
        return None
    if any(environ.get(name) for name in _OF_PODS):
        return None
    profile = aws_profile()
    if "aws_access_key_id" in profile:
        return _from_file
    if any(name in profile for name in _NEEDS_BOTO):
        return _boto_provider()
    disabled = environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    if disabled or not _answers("169.254.169.254"):
        raise StoreError(NO_CREDENTIALS["s3"])
    return None


def _from_file() -> dict[str, Any]:
    """The keys in the profile now: tools that renew them write them there."""
    profile = aws_profile()
    return {
        "access_key_id": profile["aws_access_key_id"],
        "secret_access_key": profile.get("aws_secret_access_key", ""),
        "token": profile.get("aws_session_token"),
        "expires_at": datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=10),
    }


def _boto_provider() -> Provider:
    name = os.environ.get("AWS_PROFILE", "default")
    if not find_spec("boto3"):
        raise StoreError(
            f"the AWS profile {name!r} logs in in a way that needs boto3: pip install boto3"
        )
    from obstore.auth.boto3 import Boto3CredentialProvider

    return Boto3CredentialProvider()


def google_provider() -> Provider | None:
    """As `aws_provider`, for Google."""
    if any(os.environ.get(name) for name in _OF_GOOGLE):
        return None
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    path = Path(named or "~/.config/gcloud/application_default_credentials.json").expanduser()
    if named and not path.exists():
        raise StoreError(f"GOOGLE_APPLICATION_CREDENTIALS is {path}, which is not there")
    if path.exists():
        return _google_file_provider(path)
    if not _answers(os.environ.get("GCE_METADATA_HOST", "169.254.169.254")):
        raise StoreError(NO_CREDENTIALS["gs"])
    return None


def _google_file_provider(path: Path) -> Provider | None:
    try:
        kind = json.loads(path.read_text("utf-8"))["type"]
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{path}: is no file of Google credentials") from None
    if kind in ("service_account", "authorized_user"):
        return None
    if not (find_spec("google") and find_spec("google.auth")):
        raise StoreError(f"{path}: credentials of type {kind} need google-auth: pip install it")
    from obstore.auth.google import GoogleCredentialProvider

    return GoogleCredentialProvider()


def _answers(host: str) -> bool:
    """Whether something listens there. A machine outside the cloud has no route, and no answer."""
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 80)), timeout=1).close()
    except OSError:
        return False
    return True
