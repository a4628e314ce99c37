"""Links of the documents, which are written to work among the repository's files, made to work on the site.

A hook of MkDocs (`mkdocs.yml`). A link to a file that is a page of the site leads to that page, wherever the site has
put it; a link to another file leads to the repository, at `repo_url`; and while that is not set, the file's name stands
there as code. A link to nothing ends the build.
"""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element, SubElement

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

BRANCH = "main"


class RepositoryLinks(Extension):
    """Rewrites the links of one page after another.

    Args:
        root: the repository's folder.
        repository: its address, or None.
    """

    def __init__(self, root: Path, repository: str | None) -> None:
        super().__init__()
        self.root = root
        self.repository = repository
        self.pages: dict[str, str] = {}
        """Files of the repository, from its root, and where the site has them."""
        self.file = ""
        """The page's own file, from the repository's root; empty for a page that was made of docstrings."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Take part in the making of HTML, before MkDocs turns links between pages into links between addresses."""
        md.treeprocessors.register(_Rewriting(md, self), "repository_links", 10)

    def rewrite(self, link: Element, attribute: str) -> None:
        """Change one link or picture in place.

        Raises:
            PluginError: it leads to nothing, or it is a picture that the site does not have.
        """
        address = urlsplit(link.get(attribute, ""))
        if not self.file or address.scheme or address.netloc or not address.path:
            return
        target = posixpath.normpath(posixpath.join(posixpath.dirname(self.file), unquote(address.path)))
        page = self.pages.get(target) or self.pages.get(f"{target}/README.md")
        if page is not None:
            here = posixpath.dirname(self.pages[self.file])
            fragment = f"#{address.fragment}" if address.fragment else ""
            link.set(attribute, posixpath.relpath(page, here or ".") + fragment)
        elif target.startswith("..") or not (self.root / target).exists() or attribute == "src":
            raise PluginError(f"{self.file}: {address.path} leads to nothing the site could show")
        elif self.repository:
            kind = "tree" if (self.root / target).is_dir() else "blob"
            link.set(attribute, f"{self.repository.rstrip('/')}/{kind}/{BRANCH}/{target}")
        else:
            _name_instead(link, target)


class _Rewriting(Treeprocessor):
    def __init__(self, md: Markdown, links: RepositoryLinks) -> None:
        super().__init__(md)
        self.links = links

    def run(self, root: Element) -> None:
        for element in list(root.iter()):
            if element.tag == "a" and element.get("href"):
                self.links.rewrite(element, "href")
            elif element.tag == "img":
                self.links.rewrite(element, "src")


def _name_instead(link: Element, target: str) -> None:
    """Turn a link into its words, with the file's name where they do not say it."""
    words = "".join(link.itertext())
    link.tag = "span"
    del link.attrib["href"]
    link.set("title", target)
    if not target.endswith(words.rstrip("/")):
        last = link[-1] if len(link) else None
        if last is None:
            link.text = f"{link.text} ("
        else:
            last.tail = f"{last.tail or ''} ("
        SubElement(link, "code").text = target
        link[-1].tail = ")"
    elif not len(link):
        link.text = None
        SubElement(link, "code").text = words


_links: RepositoryLinks


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Begin a build."""
    global _links
    _links = RepositoryLinks(Path(config.config_file_path).parent, config.repo_url)
    config.markdown_extensions.append(_links)  # type: ignore[arg-type]  # Markdown takes instances as well as names
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Learn which files of the repository the site has."""
    for file in files:
        if file.abs_src_path and Path(file.abs_src_path).is_relative_to(_links.root):
            source = Path(os.path.relpath(file.abs_src_path, _links.root)).as_posix()
            _links.pages[source] = file.src_uri
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Say whose links come next."""
    source = page.file.abs_src_path
    _links.file = Path(os.path.relpath(source, _links.root)).as_posix() if source else ""
    return markdown
