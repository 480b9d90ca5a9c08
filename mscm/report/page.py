"""Parts of an HTML page that is one file: no script, nothing from a network, light and dark, narrow and wide.

    page.document("digits_cd4", page.section("Scores", page.table(["NFE", "fid"], [[4, 1.5]])))

Functions take plain text, which they escape, but for `*parts`, which other functions here and in `charts` have made.
"""

import base64
import html
import io
import numbers
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from mscm import remote
from mscm.report.table import is_numeric

_MAX_TEXT, _MAX_PARAGRAPH = 300, 4000  # characters of one text
_MAX_PICTURE_BYTES = 2_000_000
_MAX_ROWS = 400

# Okabe and Ito's colours, which people tell apart however they see colours, darker or lighter against the background.
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #5f6368; --rule: #e0e0e3; --back: #fff; --card: #f6f6f7;
  --c0: #1c1c1e; --c1: #0072b2; --c2: #c44f00; --c3: #00805c; --c4: #b0528a; --c5: #a06a00; --c6: #2b88c4;
  --c7: #77777b }
@media (prefers-color-scheme: dark) { :root { --ink: #ececee; --soft: #a5a7ab; --rule: #3a3a3d; --back: #161618;
  --card: #222225; --c0: #ececee; --c1: #56b4e9; --c2: #ff8a3c; --c3: #2fc79a; --c4: #e49ac6; --c5: #f0b429;
  --c6: #8fc7ff; --c7: #9a9a9f } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 16px; max-width: 1160px; font: 16px/1.45 system-ui, sans-serif;
  color: var(--ink); background: var(--back); overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 0 4px; line-height: 1.2 }
h2 { font-size: 1.15rem; margin: 32px 0 10px; padding-top: 14px; border-top: 1px solid var(--rule) }
p { margin: 4px 0; color: var(--soft); font-size: .9rem }
summary { cursor: pointer; font-weight: 600; padding: 8px 0 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px; margin: 12px 0 }
dl div { background: var(--card); border-radius: 8px; padding: 8px 12px }
dt { color: var(--soft); font-size: .8rem }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 20px 24px }
figure { margin: 0; min-width: 0; max-width: 560px }
figure.wide { max-width: 1000px }
.columns + figure { margin-top: 20px }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: 4px }
figure > svg, figure img { display: block; width: 100%; height: auto }
figure img { border-radius: 4px }
figure.pixels img { image-rendering: pixelated }
svg text { font-size: 11px; fill: var(--soft) }
svg path, svg line { fill: none; stroke: currentColor; stroke-width: 1.6; vector-effect: non-scaling-stroke }
svg path { stroke-linejoin: round }
svg .rule { stroke: var(--rule); stroke-width: 1 }
svg .axis { stroke: var(--soft); stroke-width: 1 }
svg line.level, .level line { stroke: var(--soft); stroke-dasharray: 5 3; stroke-width: 1.2 }
svg circle { fill: currentColor }
.again path, .again line { stroke-dasharray: 4 3 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; list-style: none; margin: 2px 0 0; padding: 0;
  font-size: .8rem }
.legend svg { width: 18px; height: 10px; margin-right: 5px }
.scroll { overflow-x: auto; margin: 10px 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { color: var(--soft); font-weight: 600 }
.right { text-align: right }
""" + "\n".join(f".c{i} {{ color: var(--c{i}) }}" for i in range(8))

# Nothing is loaded or run, whatever a page should hold: it is made of files of any origin.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def escape(text: Any, *, limit: int = _MAX_TEXT) -> str:
    """Text as it may stand in a page and in an attribute, cut where it is very long."""
    text = str(text)
    if len(text) > limit:
        text = f"{text[:limit]} ..."
    # Not what no file may hold: control characters, and halves of a character.
    text = "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
    return html.escape(text)


def number(value: int | float) -> str:
    """`1,600`, `0.03125`, `1.234e-05`: whole numbers in groups of three digits, others with four digits."""
    if not abs(value) < 1e15:  # not a number, too
        return f"{value:.4g}" if isinstance(value, float) else "very large"
    if value == round(value):
        return f"{round(value):,}"
    return f"{value:.4g}"


def document(title: str, *parts: str) -> str:
    """The whole page, whose heading is the title."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="generator" content="mscm"><title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Parts under a heading; nothing where there are none."""
    inside = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inside}</section>" if inside else ""


def folded(title: str, *parts: str) -> str:
    """Parts that are shown when the title is touched."""
    return f"<details><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "</details>"


def columns(*parts: str) -> str:
    """Parts beside each other where there is room; nothing where there are none."""
    inside = "\n".join(part for part in parts if part)
    return f'<div class="columns">{inside}</div>' if inside else ""


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{escape(words, limit=_MAX_PARAGRAPH)}</p>"


def facts(values: Mapping[str, Any]) -> str:
    """Names and values as small cards; those of None are left out."""
    cards = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(_cell(value))}</dd></div>"
        for name, value in values.items()
        if value is not None
    )
    return f"<dl>{''.join(cards)}</dl>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str) -> str:
    """A table that scrolls within the page; columns that hold only numbers are aligned to the right."""
    texts = [[_cell(value) for value in row] for row in rows[:_MAX_ROWS]]
    kinds = [' class="right"' if is_numeric([row[c] for row in texts]) else "" for c in range(len(header))]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{escape(value)}</td>" for value, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in texts
    )
    more = text(f"{len(rows) - _MAX_ROWS} more rows are left out.") if len(rows) > _MAX_ROWS else ""
    # Who has no mouse scrolls it with the keys.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{more}"
    )


def image(pixels: UInt8[np.ndarray, "h w c"], *, title: str, alt: str) -> str:
    """A picture as a part of the page itself, each of its pixels a square."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG", optimize=True)
    return _figure("pixels", file.getvalue(), title, alt)


def picture(path: str, *, title: str, alt: str) -> str:
    """A PNG file, on which there may be letters, as a part of the page itself; one that is too large is named."""
    file = epath.Path(path)
    if remote.size(file) > _MAX_PICTURE_BYTES:
        return text(f"{title}: see {path}")
    data = file.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 33:
        return text(f"{title}: {path} is no PNG")
    return _figure("wide", data, title, alt)


def _figure(kind: str, data: bytes, title: str, alt: str) -> str:
    width, height = struct.unpack(">II", data[16:24])
    return (
        f'<figure class="{kind}"><figcaption>{escape(title)}</figcaption>'
        f'<img width="{width}" height="{height}" alt="{escape(alt)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></figure>'
    )


def _cell(value: Any) -> str:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return number(value if isinstance(value, int | float) else float(value))
    return "" if value is None else str(value)
