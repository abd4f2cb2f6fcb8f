"""Render index pages as PEP 503 asks: a list of projects, and each project's files with hashes and Python versions."""

from __future__ import annotations

from html import escape
from typing import Iterable, List
from urllib.parse import quote

from packaging.utils import NormalizedName

from wheelindex.wheels import Wheel


def root_page(projects: Iterable[NormalizedName]) -> str:
    """Render the list of projects of one directory."""
    return _page("Simple index", [f'<a href="{name}/">{name}</a>' for name in sorted(set(projects))])


def project_page(project: NormalizedName, wheels: Iterable[Wheel]) -> str:
    """Render the files of one project, oldest version first; links are relative, so the tree can be moved."""
    ordered = sorted(wheels, key=lambda wheel: (wheel.version, wheel.filename))
    return _page(f"Links for {project}", [_link(wheel) for wheel in ordered])


def _link(wheel: Wheel) -> str:
    requires = f' data-requires-python="{escape(wheel.requires_python)}"' if wheel.requires_python else ""
    return f'<a href="{quote(wheel.filename)}#sha256={wheel.sha256}"{requires}>{escape(wheel.filename)}</a>'


def _page(title: str, links: List[str]) -> str:
    body = "".join(f"    {link}<br>\n" for link in links)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n'
        "  <head>\n"
        '    <meta charset="utf-8">\n'
        '    <meta name="pypi:repository-version" content="1.0">\n'
        f"    <title>{escape(title)}</title>\n"
        "  </head>\n"
        "  <body>\n"
        f"    <h1>{escape(title)}</h1>\n"
        f"{body}"
        "  </body>\n"
        "</html>\n"
    )
