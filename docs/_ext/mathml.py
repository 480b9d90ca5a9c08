"""Formulas as MathML, which browsers draw themselves: the pages need no script and no network."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def _mathml(text, **options):
    # An index of an accent would stand below it, as a limit of a sum does.
    return tex2mathml(re.sub(r"(\\hat\{[^{}]*\})_", r"{\1{}}_", text), **options)


def _inline(translator, node):
    translator.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator, node):
    translator.body.append(f'<div class="math">{_mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
