"""What a client's error means: a short message that says what to do, and whether to try again.

The client's own text is never shown. It holds the whole answer of the server, with ids of keys.
"""

import re
from typing import Literal, NamedTuple

Again = Literal["no", "missing", "absent", "damaged", "busy", "long"]
"""Whether to try again:

- `no`; or `missing`, because there is no such object
- `absent`: for seconds, because a host that is not there may be misspelt
- `damaged`: a few times, because other bytes came than should
- `busy` and `long`: as long as a server may be busy or fail; the busy one may say for how long
"""

_STATUS = re.compile(r"status(?: code)?: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_BUSY = {429, 503}
_PASSING = {408, 409, 412, 425, 500, 502, 504, *_BUSY}
_LOGIN = {
    "s3": "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws/credentials",
    "gs": "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}
_RENEW = {
    "s3": "Renew them (for example with `aws sso login`)",
    "gs": "Renew them (`gcloud auth application-default login`)",
}
_OTHER_REGION = "the bucket is in another region. Set AWS_REGION to it"
NO_CREDENTIALS = {
    "s3": "no AWS credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE, or run where the machine has a role. A public bucket is read without them: set "
    "AWS_SKIP_SIGNATURE=true",
    "gs": "no Google credentials were found. Run `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS to a service account's file. A public bucket is read without "
    "them: set GOOGLE_SKIP_SIGNATURE=true",
}


class Trouble(NamedTuple):
    """Why a request failed."""

    message: str
    again: Again


def trouble(text: str, *, scheme: str, doing: str) -> Trouble:
    """What the client's error `text` means; `doing` is `read`, `write`, `list` or `delete`."""
    status = int(found[1]) if (found := _STATUS.search(text)) else None
    code = found[1] if (found := _CODE.search(text)) else ""
    if _asks_metadata(text):
        return Trouble(NO_CREDENTIALS[scheme], "no")
    if _token_refused(text):
        return Trouble(f"the credentials were refused. {_LOGIN[scheme]}", "no")
    if "redirect without LOCATION" in text:
        return Trouble(_OTHER_REGION, "no")
    if status is None:
        return _without_answer(text, scheme)
    return _of_code(code, text, scheme, doing) or _of_status(status, code, scheme, doing)


def _asks_metadata(text: str) -> bool:
    """Whether the client looked for credentials where only a cloud's machines have them."""
    return bool(re.search(r"169\.254\.169\.254|metadata\.google\.internal|169\.254\.170\.2", text))


def _token_refused(text: str) -> bool:
    return "token request" in text or "invalid_grant" in text


def _without_answer(text: str, scheme: str) -> Trouble:
    if "dns error" in text:
        hint = "AWS_ENDPOINT_URL and AWS_REGION" if scheme == "s3" else "the network"
        return Trouble(f"the server's name is unknown. Check {hint}", "absent")
    if "Connect" in text and ("InvalidMessage" in text or "Certificate" in text):
        return Trouble("no secure connection. Check whether the endpoint speaks https", "no")
    if "ConnectionRefused" in text or "tcp connect error" in text:
        return Trouble("the server does not answer. Check the endpoint and the network", "absent")
    return Trouble("the connection broke or took too long. Run the command again", "long")


def _of_code(code: str, text: str, scheme: str, doing: str) -> Trouble | None:
    if code == "NoSuchBucket" or "bucket does not exist" in text:
        return Trouble("there is no such bucket. Check its name and the endpoint, or make it", "no")
    if code in ("ExpiredToken", "TokenRefreshRequired", "ExpiredTokenException"):
        renewed = f"{_RENEW[scheme]} and run the command again: it goes on from here"
        return Trouble(f"the credentials have expired. {renewed}", "no")
    if code == "RequestTimeTooSkewed":
        told = "this machine's clock is wrong by more than 15 minutes. Set it (NTP)"
        return Trouble(told, "no")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"):
        return Trouble(f"the credentials are wrong. {_LOGIN[scheme]}", "no")
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"):
        return Trouble(_OTHER_REGION, "no")
    if code == "NoSuchUpload":  # the answer to its end was lost, or somebody tidied
        return Trouble("an upload in parts was not finished. Run the command again", "long")
    if code in ("BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"):
        return Trouble(f"what was sent arrived damaged ({code})", "long")
    return None


def _of_status(status: int, code: str, scheme: str, doing: str) -> Trouble:
    told = f"{status} {code}".strip()
    if status == 404:
        return Trouble("there is no such object", "missing")
    if status == 403:
        return Trouble(f"no permission to {doing}. Ask the bucket's owner for it", "no")
    if status == 401:
        return Trouble(f"the credentials are wrong or have expired. {_LOGIN[scheme]}", "no")
    if status in _PASSING:
        return Trouble(
            f"the server is busy or failing ({told}). Run the command again later",
            "busy" if status in _BUSY else "long",
        )
    return Trouble(f"the server refused the request ({told})", "no")
