"""How long a busy server asks to be left alone: the header Retry-After of its answers.

The client shows status and body of an answer, and no headers. So the object's head is requested
once more, by an address that the client signs. Its only use is the header.
"""

import contextlib
import datetime
import email.utils
import urllib.error
import urllib.request
from typing import Any

_BUSY = (429, 503)
_TIMEOUT = 5.0


def asked_pause(client: Any, key: str) -> float:
    """Seconds; 0 if the server names no time, is not busy any more or cannot be asked."""
    with contextlib.suppress(Exception):  # a look that fails says nothing, whatever the reason
        from obstore import sign

        address = sign(client, "HEAD", key, datetime.timedelta(minutes=1))
        request = urllib.request.Request(address, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_TIMEOUT).close()
        except urllib.error.HTTPError as answer:
            with answer:
                if answer.code in _BUSY:
                    return seconds_of(answer.headers.get("Retry-After", ""))
    return 0.0


def seconds_of(header: str) -> float:
    """The time that the text of a Retry-After names: seconds, or a date; 0 if it is neither."""
    with contextlib.suppress(ValueError, TypeError):
        if header.strip().isdecimal():
            return float(header)
        date = email.utils.parsedate_to_datetime(header)
        return max((date - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
    return 0.0
