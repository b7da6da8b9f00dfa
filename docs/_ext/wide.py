"""Which built pages are wider than a window, so that one has to scroll text sideways.

    python docs/_ext/wide.py docs/_build/html

Needs `chromium`. Prints each such page with its widest elements, and ends with 1.
"""

import html
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = (390, 1280)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--allow-file-access-from-files",  # else a page cannot look into its frame
    "--virtual-time-budget=600000",
    "--dump-dom",
)
LOOK = """
const results = [], frame = document.querySelector("iframe");
const inScroller = (node) => {
  for (let up = node.parentElement; up; up = up.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)
        && up.tagName != "BODY" && up.tagName != "HTML") return true;
  return false;
};
(async () => {
  for (const page of PAGES) for (const width of WIDTHS) {
    frame.width = width;
    await new Promise((done) => { frame.onload = done; frame.src = page; });
    const root = frame.contentDocument.documentElement;
    if (root.scrollWidth <= width) continue;
    const wide = [...root.querySelectorAll(".bd-article *")].filter((node) =>
      node.getBoundingClientRect().right > width + 1 && !inScroller(node));
    const told = wide.slice(0, 3).map((node) =>
      `${node.tagName} ${node.textContent.trim().slice(0, 60)}`);
    results.push([page, width, root.scrollWidth, told]);
  }
  document.body.textContent = `found ${JSON.stringify(results)} end`;
})();
"""


def wide(folder: Path) -> list[tuple[str, int, int, list[str]]]:
    """(page, width of the window, width of the page, what is wide) of those wider."""
    pages = [path.resolve().as_uri() for path in sorted(folder.rglob("*.html"))]
    script = LOOK.replace("PAGES", json.dumps(pages)).replace("WIDTHS", f"{[*WIDTHS]}")
    with tempfile.TemporaryDirectory() as temporary:
        driver = Path(temporary) / "driver.html"
        driver.write_text(
            f'<body><iframe height="844"></iframe><script>{script}</script></body>'
        )
        command = ["chromium", *FLAGS, driver.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"found (\[.*\]) end", html.unescape(done.stdout), flags=re.S)
    if not found:
        raise RuntimeError(f"chromium did not look at the pages: {done.stderr}")
    return json.loads(found[1])


def main() -> None:
    found = wide(Path(sys.argv[1]))
    for page, window, width, elements in found:
        print(f"{page}: {width} in a window of {window}")
        for element in elements:
            print(f"    {element}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
