"""The README as the description of the package, shown where relative links lead nowhere."""

from __future__ import annotations

import re

IMAGES = (".png", ".jpg", ".svg", ".gif")

_CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]*`|\]\((?![a-z]+:)([^)\s]+)\)", re.DOTALL)


def repository(project: str) -> str:
    """The address of the repository that the text of a pyproject.toml names."""
    return re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)[1]


def with_absolute_links(readme: str, address: str) -> str:
    """Markdown whose links to files and headings lead to the repository at an address."""

    def absolute(found: re.Match[str]) -> str:
        target = found[1]
        if target is None:  # code is left alone
            return found[0]
        if target.startswith("#"):
            return f"]({address}{target})"
        kind = "raw" if target.endswith(IMAGES) else "blob"
        return f"]({address}/{kind}/HEAD/{target})"

    return _CODE_OR_LINK.sub(absolute, readme)
