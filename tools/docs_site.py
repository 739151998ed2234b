"""Additions of mkdocs.yml to MkDocs: files of the repository as pages, docstrings as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages of the site that lie outside docs/, and their names there."""

LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|math):`~?([^`]*)`")
TABLE = re.compile(r"^=[= ]+\n(?:.*\n)+?=[= ]+\n(?:.*\n)+?=[= ]+$", re.M)
LATEX = {
    r"\\frac\{v\}\{(.*)\}": r"v / \1",
    r"\\[lr]Vert( v)?": r"‖\1",
    r"‖ v ": "‖v",
    r"\\max": "max",
    r"\\leftarrow": "←",
    r"\\epsilon": "ε",
    r"\\sigma": "\N{GREEK SMALL LETTER SIGMA}",
    r"\\mu": "μ",
    r"\\cdot": "·",
    r" ?\\(,|qquad)|_2": "",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and the pictures that lie outside docs/."""
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()}
    for source, name in (pages | OUTSIDE).items():
        text = (ROOT / source).read_text()
        for is_picture, _, target, _ in LINK.findall(text):
            uri = _in_repository(source, target)
            if is_picture and uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri)))
        if source in OUTSIDE:
            files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into links of the site. A link to a file that is no part of the site becomes its
    name."""
    sources = {name: source for source, name in OUTSIDE.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(found: re.Match[str]) -> str:
        exclamation, words, target, anchor = found.groups(default="")
        uri = _in_repository(source, target)
        uri = OUTSIDE.get(uri, uri.removeprefix("docs/"))
        words = words.removeprefix("docs/")
        return f"{exclamation}[{words}]({uri}{anchor})" if uri in files.src_uris else words

    return LINK.sub(link, markdown)


def _in_repository(source: str, target: str) -> str:
    return (ROOT / source).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()


class Docstrings(griffe.Extension):
    """Turns the roles and directives of reStructuredText in docstrings into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of every object that is collected."""
        if obj.docstring is not None:
            obj.docstring.value = _markdown(obj.docstring.value)


def _markdown(text: str) -> str:
    text = TABLE.sub(_table, text)
    text = re.sub(r"^\.\. math:: (.*)$", lambda found: f"    {_plain(found[1])}", text, flags=re.M)
    text = re.sub(r"^::\n", "", text, flags=re.M).replace("::\n", ":\n")
    text = re.sub(r"docs/(\w+)\.md", r"[\1](\1.html)", text)
    text = re.sub(r":\w+:`(wnkernel[^`]*)`", r"[`\1`][\1]", text)
    return ROLE.sub(lambda found: f"`{_plain(found[1])}`", text)


def _table(found: re.Match[str]) -> str:
    header, *rows = (
        re.split(r"\s{2,}", line) for line in found[0].splitlines() if not line.startswith("=")
    )
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(formula: str) -> str:
    for pattern, replacement in LATEX.items():
        formula = re.sub(pattern, replacement, formula)
    return formula
