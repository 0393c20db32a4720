"""docs/licences.md has every encoder of the zoo with its licence; LICENSE, CITATION.cff and pyproject.toml agree."""

import fnmatch
import re
import tomllib

import yaml

from eupe_jax.models import zoo
from tests.docs.pages import ROOT, tables

TABLES = {header[0]: rows for header, rows in tables((ROOT / "docs" / "licences.md").read_text())}


def test_every_encoder_has_its_licence():
    for name in zoo.names():
        rows = [
            row for row in TABLES["weights"] if any(fnmatch.fnmatch(name, p) for p in re.findall("`([^`]+)`", row[1]))
        ]
        assert len(rows) == 1, f"{name} stands in {len(rows)} rows of docs/licences.md"
        licence = zoo.spec(name).licence
        assert not licence or rows[0][3] == licence, f"{name}: {licence!r} in the zoo, {rows[0][3]!r} in the page"


def test_every_line_says_whether_commercial_use_is_known():
    for kind in ("weights", "data"):
        for row in TABLES[kind]:
            assert re.match("yes|no|not known|not available|allowed|as |yours|see ", row[-1]), row


def test_citation_licence_and_package_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == "Apache-2.0" == project.get("license", "Apache-2.0")
    assert citation["cff-version"] == "1.2.0" and citation["title"] and citation["message"] and citation["authors"]
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2603.22387" and len(paper["authors"]) == 11
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert f"Copyright 2026 {citation['authors'][0]['name']}" in text
    assert f"To be {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
