"""The client for a bucket: obstore, set up as each cloud's own tools are."""

import datetime
import os
from importlib.util import find_spec
from typing import Any

from decant.store.base import StoreError
from decant.store.credentials import aws_profile, aws_provider, google_provider
from decant.store.urls import BucketUrl

# A body may take as long as the slowest link: 512 MB at 2 MB/s. Silence may not.
_CLIENT = {"connect_timeout": "3s", "read_timeout": "20s", "timeout": "300s"}


def client_settings(scheme: str) -> dict[str, Any]:
    """Keyword arguments for obstore's store of `s3` or `gs`, and for `obstore.fsspec`.

    StoreError if obstore is not installed, or if there are no credentials.
    """
    _require_obstore()
    settings = _s3_settings() if scheme == "s3" else _gs_settings()
    # `Patience` tries again: only it sees what an answer that was lost has left behind.
    retry = {"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=5)}
    options = {**_CLIENT, **settings.pop("client_options", {})}
    return {**settings, "client_options": options, "retry_config": retry}


def client_of(url: BucketUrl, *, tries: int = 1) -> Any:
    """obstore's store for the bucket, with keys relative to the address's prefix.

    `tries` of each request are made by the client itself.
    """
    settings = client_settings(url.scheme)
    settings["retry_config"]["max_retries"] = tries - 1
    if tries > 1:
        settings["retry_config"]["retry_timeout"] = datetime.timedelta(minutes=1)
    from obstore import store

    kind = store.S3Store if url.scheme == "s3" else store.GCSStore
    return kind(url.bucket, prefix=url.prefix or None, **settings)


def region_of(url: BucketUrl) -> str:
    """The region of an S3 bucket, in which requests are signed; empty if it is not known.

    A bucket in another one refuses them.
    """
    if url.scheme != "s3":
        return ""
    config = client_settings("s3")["config"]
    return config.get("region", "" if "endpoint" in config else "us-east-1")


def _require_obstore() -> None:
    if not find_spec("obstore"):
        raise StoreError("buckets need another package: pip install 'decant-distill[remote]'")


def _s3_settings() -> dict[str, Any]:
    provider = aws_provider()
    environ, profile = os.environ, aws_profile()
    config: dict[str, Any] = {
        # Servers may ignore the hash that is signed, but check this one: bytes that change on the
        # way are refused.
        "checksum_algorithm": "SHA256",
        "disable_bulk_delete": True,  # a DELETE an object, which every server knows
    }
    endpoint = (
        environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
        or environ.get("AWS_ENDPOINT")
        or profile.get("endpoint_url")
    )
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or profile.get("region")
    if endpoint:
        config["endpoint"] = endpoint
    if region:
        config["region"] = region
    settings: dict[str, Any] = {"config": config}
    if provider:
        settings["credential_provider"] = provider
    if endpoint and endpoint.startswith("http://"):
        settings["client_options"] = {"allow_http": True}
    return settings


def _gs_settings() -> dict[str, Any]:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        address = emulator if "://" in emulator else f"http://{emulator}"
        config = {"base_url": address, "bearer_token": "emulator"}
        return {"config": config, "client_options": {"allow_http": True}}
    provider = google_provider()
    base = os.environ.get("GOOGLE_BASE_URL", "")
    settings: dict[str, Any] = {"credential_provider": provider} if provider else {}
    if base.startswith("http://"):
        settings["client_options"] = {"allow_http": True}
    return settings
