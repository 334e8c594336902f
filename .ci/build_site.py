"""Build the documentation into site/, and fail on whatever is wrong with it: `python .ci/build_site.py`.

zensical refuses broken links and anchors between pages, and names that the API does not have. This also refuses what
griffe cannot read in a docstring, and checks the pages that come out: each link leads to a file and an anchor that are
there, and nothing is loaded from a network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for every element."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links |= {given["href"]} if tag == "a" and "href" in given else set()
        if given.get("rel") not in ("canonical", "next", "prev"):
            self.loads |= {given[name] for of, name in LOADS if of == tag and name in given}


def check(site: Path) -> list[str]:
    """List what is wrong with the pages of a site. Links to other sites are not followed."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    faults = []
    for path, page in pages.items():
        here = path.relative_to(site.resolve())
        faults += [f"{here} loads {url} from a network" for url in page.loads if urlsplit(url).netloc]
        for url in page.links | page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                faults.append(f"{here} links to {url}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                faults.append(f"{here} links to {url}, which has no such anchor")
    return faults


def main() -> int:
    """Build and check; 1 if something is wrong."""
    zensical = shutil.which("zensical", path=str(Path(sys.executable).parent))
    if zensical is None:
        print('zensical is missing: pip install -c constraints.txt -e ".[docs]"', file=sys.stderr)
        return 1
    command = [zensical, "build", "--strict", "--clean"]
    built = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    faults = [line for line in built.stdout.splitlines() if line.startswith(("griffe:", "mkdocstrings:", "autorefs:"))]
    if built.returncode:
        print(built.stdout, file=sys.stderr)
    faults += check(SITE) if built.returncode == 0 else []
    print("\n".join(faults) or f"{len(list(SITE.rglob('*.html')))} pages in {SITE.name}/", file=sys.stderr)
    return int(bool(built.returncode or faults))


if __name__ == "__main__":
    sys.exit(main())
