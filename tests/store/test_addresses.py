"""Which text is an address, and what an unsupported one is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from decant.schemas import open_cache
from decant.store import is_url, open_store, url_of
from decant.store.urls import bucket_url, require_scheme
from tests.paths import ROOT


def test_an_address_is_known_also_after_pathlib_took_a_slash():
    assert url_of(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert url_of("GS://bucket") == "gs://bucket"
    assert not any(map(is_url, ["runs/cache", "/a/b", "c:/windows", "owner/name@main", "a:b"]))


def test_an_address_has_a_scheme_a_bucket_and_a_prefix():
    assert bucket_url("gs://my-bucket/a/b/") == ("gs", "my-bucket", "a/b")
    assert bucket_url("s3://my.bucket") == ("s3", "my.bucket", "")
    assert str(bucket_url("s3://my.bucket/x/")) == "s3://my.bucket/x"
    for wrong in ("s3://", "s3:///a", "gs://a b/c", "s3://-x/y"):
        with pytest.raises(ValueError, match="cannot be the name of a bucket"):
            bucket_url(wrong)


def test_another_scheme_is_an_error_that_lists_those_that_can_be():
    told = r"output is ftp://b: 'ftp://' is not supported here; supported: a local path, s3://, gs"
    with pytest.raises(ValueError, match=told):
        require_scheme("ftp://b", ("s3", "gs"), name="output")
    with pytest.raises(ValueError, match="supported: a local path, s3://, gs://"):
        open_store("az://bucket/a")
    with pytest.raises(ValueError, match="supported: a local path, s3://, gs://"):
        open_cache("az://bucket/a")


def test_nothing_is_asked_of_obstore_until_a_bucket_is_opened(tmp_path):
    code = f"""
import sys, decant, decant.store
decant.store.open_store({str(tmp_path)!r}).put("a", b"")
assert "obstore" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
