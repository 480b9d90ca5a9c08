"""Parts of pages: what is text stays text, numbers as a person reads them, a page that is one file."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from mscm.report import page

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\x00\ud800 &amp;'


class Tags(html.parser.HTMLParser):
    """The elements of a page, and whether each is closed."""

    void = {"meta", "img", "line", "path", "circle"}

    def __init__(self, text: str):
        super().__init__()
        self.names, self.open, self.values = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.values += attrs
        self.open += [] if tag in self.void else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)


def test_text_is_text():
    """In every part that takes some; and it can be written as UTF-8."""
    parts = page.section(
        HOSTILE,
        page.text(HOSTILE),
        page.facts({HOSTILE: HOSTILE}),
        page.table([HOSTILE], [[HOSTILE]], title=HOSTILE),
        page.folded(HOSTILE, page.text(HOSTILE)),
        page.image(np.zeros((2, 3, 1), np.uint8), title=HOSTILE, alt=HOSTILE),
    )
    text = page.document(HOSTILE, parts)
    tags = Tags(text)
    assert not tags.open and "script" not in tags.names and tags.names.count("img") == 1
    assert not [name for name, _ in tags.values if name.startswith("on")]
    assert text.encode() and "&lt;script&gt;" in text
    assert len(page.escape("x" * 10**6)) < 400


def test_nothing_is_loaded():
    """The policy forbids it, and nothing asks for it: no address but those of data."""
    text = page.document("a", page.image(np.zeros((2, 2, 3), np.uint8), title="b", alt="c"))
    assert "default-src 'none'" in text and "url(" not in page.STYLE and "@import" not in page.STYLE
    addresses = [value for name, value in Tags(text).values if name in ("src", "href", "srcset", "data")]
    assert len(addresses) == 1 and addresses[0].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1600, "1,600"), (0.03125, "0.03125"), (2.0, "2"), (1234.56, "1235"), (0, "0"), (-3.5, "-3.5"),
        (float("nan"), "nan"), (float("-inf"), "-inf"), (1e300, "1e+300"), (10**400, "very large"), (1e-9, "1e-09"),
    ],
    ids=lambda value: str(value)[:9],
)
def test_numbers(value, text):
    assert page.number(value) == text


def test_columns_of_numbers_are_aligned_and_rows_are_bounded():
    text = page.table(["name", "NFE"], [["a", 4], ["b", None]], title="t")
    assert text.count('class="right"') == 3 and ">4<" in text and "None" not in text
    text = page.table(["n"], [[i] for i in range(1000)], title="t")
    assert text.count("<tr>") == 401 and "600 more rows" in text


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_in_the_page(channels):

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    text = page.image(pixels, title="t", alt="a")
    data = base64.b64decode(re.search('base64,([^"]*)', text)[1])
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, channels), pixels)
    assert 'width="7" height="5" alt="a"' in text


def test_a_file_is_in_the_page_or_named(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(path)
    assert 'class="wide"' in page.picture(str(path), title="t", alt="a")
    with monkeypatch.context() as patch:
        patch.setattr(page, "_MAX_PICTURE_BYTES", 60)
        assert page.picture(str(path), title="t", alt="a") == f"<p>t: see {path}</p>"
    path.write_bytes(b"\x89PNG")
    assert page.picture(str(path), title="t", alt="a") == f"<p>t: {path} is no PNG</p>"


def test_a_paragraph_is_longer_than_a_cell():
    assert page.text("a" * 1000) == f"<p>{'a' * 1000}</p>"
    assert len(page.text("a" * 99999)) < 5000 and "a" * 301 not in page.table(["n"], [["a" * 1000]], title="t")


def test_nothing_is_shown_of_nothing():
    assert page.section("a") == page.columns() == page.section("a", page.columns("")) == ""
