"""The frame of a report: one HTML page that loads nothing, and the few elements it is made of."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dinov2_fast.data.image_source import printable

if TYPE_CHECKING:
    from PIL import Image

# Pictures come as data URIs and styles stand in the page; a browser refuses everything else, so a
# file name that smuggled markup through could still load and run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfb; --ink: #1c1d21; --quiet: #5d616b; --rule: #dddfe4; --panel: #f3f3f1;
  --accent: #0b6e99; --grid: #e4e5e9; --track: #e9e9e6; --plain: #9aa0ab;
  --curve-0: #0b6e99; --curve-1: #c2571a; --curve-2: #4f7d2a; --curve-3: #8a4fa0;
  --right: #2f8f46; --wrong: #c7372f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --ink: #e7e7e4; --quiet: #a0a4ae; --rule: #31353d; --panel: #1d2026;
    --accent: #58b7e0; --grid: #2a2e36; --track: #262a31; --plain: #6e7582;
    --curve-0: #58b7e0; --curve-1: #ee965c; --curve-2: #93c469; --curve-3: #c79bdb;
    --right: #59c172; --wrong: #ef746c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "Noto Sans", "DejaVu Sans", sans-serif;
}
header { border-bottom: 1px solid var(--rule); padding-bottom: 1.25rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.75rem 0 .5rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 44rem; }
.quiet, figcaption, th { color: var(--quiet); }
.quiet, figcaption { font-size: .9rem; }
nav a { color: var(--accent); margin-right: 1rem; text-decoration: none; white-space: nowrap; }
nav { margin-top: .75rem; font-size: .9rem; }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
.columns > * { min-width: 0; }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 28.7rem), 1fr)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .95rem; width: 100%; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: break-word; }
th { font-weight: 500; }
td:first-child { min-width: 5.5rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.emphasized td { font-weight: 650; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--rule); border-radius: 6px;
  padding: .75rem; }
figcaption { margin-top: .35rem; }
figcaption.above { margin: 0 0 .35rem; color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; font-size: 13px; }
svg text { fill: var(--quiet); }
svg .value { fill: var(--ink); font-weight: 650; }
.grid { stroke: var(--grid); }
.track { fill: var(--track); } .bar { fill: var(--plain); } .emphasized { fill: var(--accent); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.curve-0 { stroke: var(--curve-0); } .curve-1 { stroke: var(--curve-1); }
.curve-2 { stroke: var(--curve-2); } .curve-3 { stroke: var(--curve-3); }
.dot-0 { fill: var(--curve-0); } .dot-1 { fill: var(--curve-1); }
.dot-2 { fill: var(--curve-2); } .dot-3 { fill: var(--curve-3); }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; margin: .5rem 0; }
.row { flex-wrap: nowrap; }
.row figure { flex: 0 1 auto; min-width: 0; }
.strip figure { background: none; border: 0; padding: 0; border-radius: 0; }
.strip figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; border-radius: 3px; }
img.pixels { image-rendering: pixelated; }
.right img { outline: 3px solid var(--right); outline-offset: -3px; }
.wrong img { outline: 3px dashed var(--wrong); outline-offset: -3px; }
.strip .query { box-sizing: content-box; padding-right: .5rem;
  border-right: 1px solid var(--rule); }
.group { border-bottom: 1px solid var(--rule); padding: .4rem 0; }
@media (max-width: 34rem) {
  body { padding: 1.25rem .9rem 3rem; }
  h1 { font-size: 1.5rem; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --quiet: #444; --rule: #ccc; --panel: #fff; --grid: #ddd;
    --track: #eee; --plain: #999; --accent: #0b6e99; --curve-0: #0b6e99; --curve-1: #c2571a;
    --curve-2: #4f7d2a; --curve-3: #8a4fa0; --right: #2f8f46; --wrong: #c7372f; }
  body { max-width: none; padding: 0; font-size: 10pt; print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  nav { display: none; }
  figure, tr, .group { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""


def text(value: object) -> str:
    """Anything as text of an element or attribute: escaped, control characters made visible."""
    return html.escape(printable(str(value)))


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole HTML document.

    Args:
        title: heading and title of the window; escaped.
        subtitle: a sentence below it; escaped.
        sections: identifier, heading (escaped) and body (HTML) of each section.
    """
    links = " ".join(f'<a href="#{text(key)}">{text(head)}</a>' for key, head, _ in sections)
    body = "".join(
        f'<section id="{text(key)}"><h2>{text(head)}</h2>{content}</section>\n'
        for key, head, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(title)}</h1>\n<p>{text(subtitle)}</p>\n<nav>{links}</nav></header>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def paragraph(words: str, *, quiet: bool = False) -> str:
    """A paragraph; the words are escaped."""
    opening = '<p class="quiet">' if quiet else "<p>"
    return f"{opening}{text(words)}</p>"


def table(
    rows: Iterable[Sequence[object]],
    *,
    head: Sequence[str] = (),
    num_text_columns: int = 1,
    emphasized: int | None = None,
) -> str:
    """A table; every cell is escaped.

    Args:
        rows: cells from left to right.
        head: names of the columns; empty for none.
        num_text_columns: columns aligned to the left; the others hold numbers.
        emphasized: index of a row set in bold.
    """

    def cell(kind: str, index: int, value: object) -> str:
        number = ' class="number"' if index >= num_text_columns else ""
        return f"<{kind}{number}>{text(value)}</{kind}>"

    heading = "".join(cell("th", index, name) for index, name in enumerate(head))
    lines = [f"<thead><tr>{heading}</tr></thead>" if head else "", "<tbody>"]
    for index, row in enumerate(rows):
        bold = ' class="emphasized"' if index == emphasized else ""
        cells = "".join(cell("td", column, value) for column, value in enumerate(row))
        lines.append(f"<tr{bold}>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</tbody></table></div>'


def picture(
    image: Image.Image, *, alt: str, width_px: int, caption: str = "", classes: str = ""
) -> str:
    """An image inside the page.

    Args:
        image: stored as PNG, exactly.
        alt: what it shows, for screen readers; escaped.
        width_px: width on the page; enlarged images keep their pixels visible.
        caption: below the image; escaped.
        classes: style classes of the frame.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height = round(width_px * image.height / image.width)
    pixels = ' class="pixels"' if width_px > image.width else ""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="{text(classes)}" style="width:{width_px}px;max-width:100%">'
        f'<img{pixels} width="{width_px}" height="{height}" alt="{text(alt)}" '
        f'src="data:image/png;base64,{data}">{below}</figure>'
    )


def strip(pictures: Iterable[str], *, wrap: bool = True) -> str:
    """Pictures side by side.

    Args:
        pictures: HTML of each.
        wrap: where the screen is narrow, start another line; False makes the pictures smaller.
    """
    kind = "strip" if wrap else "strip row"
    return f'<div class="{kind}">{"".join(pictures)}</div>'


def chart(svg: str, heading: str, *, caption: str = "") -> str:
    """A drawing with a heading and an optional caption, both escaped."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><figcaption class="above">{text(heading)}</figcaption>{svg}{below}</figure>'


def columns(parts: Iterable[str], *, wide: bool = False) -> str:
    """Parts next to each other where the screen is wide enough.

    Args:
        parts: HTML.
        wide: at most two in a row.
    """
    kind = "columns pairs" if wide else "columns"
    return f'<div class="{kind}">{"".join(parts)}</div>'
