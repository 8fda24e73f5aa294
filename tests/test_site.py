"""The built pages load nothing from the network, and a broken link fails the build."""

import re
import subprocess
import sys

import pytest

from tests.paths import ROOT, environment

LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\" >]+)")


def build(config, site):
    """The finished process of a strict build."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)],
        env=environment() | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", directory)
    assert done.returncode == 0, done.stderr
    return directory


def test_the_pages_load_nothing_from_the_network(site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = LOADED.findall(page.read_text("utf-8"))
        assert loaded == [], page.name
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text("utf-8")


def test_the_site_holds_what_its_pages_link_to(site):
    assert (site / "examples" / "own-teacher.toml").is_file()
    assert (site / "benchmarks" / "figures" / "quality.png").is_file()
    assert 'href="examples/own-teacher.toml"' in (site / "own-teacher.html").read_text("utf-8")


def test_broken_links_fail_the_build(tmp_path):
    broken = ["index.md#nowhere", "no-page.md", "../examples/no-file.toml", "/index.md"]
    (tmp_path / "docs").mkdir()
    hook = "repository_files.py"
    (tmp_path / "docs" / hook).write_text((ROOT / "docs" / hook).read_text("utf-8"), "utf-8")
    links = "\n".join(f"[a link]({link})" for link in broken)
    (tmp_path / "docs" / "index.md").write_text(f"# Index\n\n{links}\n")
    settings = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings, "utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("# A page\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    assert not [link for link in broken if f"'{link}'" not in done.stderr]
