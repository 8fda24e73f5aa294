"""The pages' scripts in a real browser, from files: their policy lets them run."""

import re
import shutil
import subprocess

import pytest

from decant.pipelines.__main__ import main

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


def rendered(address, profile):
    """The page's HTML after its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={profile}", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def test_a_row_page_finds_text_and_shows_the_token_beside_its_candidates(cache, tmp_path):
    page = tmp_path / "row.html"
    assert main(["inspect", str(cache.path), "--row", "1", "--html", str(page), "--top", "3"]) == 0
    html = rendered(f"{page.as_uri()}#find=teacher", tmp_path / "profile")
    found = int(re.search(r'id="found"[^>]*>(\d+) place', html).group(1))
    text = re.search(r'<div class="text">(.*?)</div>', html, re.S).group(1)
    assert found == re.sub(r"<[^>]*>", "", text).count("teacher") > 0
    assert re.search(r'id="token">\d+: \S', html)
    panel = html.split('id="likely"')[1].split("</table>")[0]
    assert panel.count('class="bar"') == 3
    assert 'value="norm of hidden/1"' in html
    assert 'value="attention/0 from the token"' in html
