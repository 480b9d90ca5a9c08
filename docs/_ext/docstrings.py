"""The docstrings of mscm are plain text for people who read the source; this turns them into reStructuredText.

Indented lines are literal blocks, `name` is code, Args and Raises are lists of names. Signatures are shown as the
source writes them, with its own names of types, and the fields of a class with their comments.
"""

import ast
import inspect
import io
import re
import textwrap
import tokenize

_SECTIONS = ("Args:", "Raises:", "Returns:")


def inline(text):
    """One line of plain text as reStructuredText."""
    parts = re.split(r"`([^`]+)`", text)
    plain = [re.sub(r"([\\*|_`<>])", r"\\\1", part) for part in parts[::2]]
    # The end of code must be seen: `name`s would go on.
    code = [f"``{part}``" + "\\ " * after[:1].isalnum() for part, after in zip(parts[1::2], parts[2::2], strict=True)]
    return "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))


def _indent(line):
    return len(line) - len(line.lstrip())


def _described(lines):
    """Entries `name: text`, whose text may go on indented deeper, as a list."""
    entries = []
    for line in lines:
        if _indent(line) == _indent(lines[0]):
            entries.append(line.strip())
        else:
            entries[-1] += " " + line.strip()
    for entry in entries:
        name, colon, text = entry.partition(": ")
        yield f"* ``{name}``: {inline(text)}" if colon and " " not in name else f"* {inline(entry)}"


def to_rst(lines):
    """The lines of a docstring as reStructuredText."""
    lines, found = [line.rstrip() for line in lines], []
    i = 0
    while i < len(lines):
        if not lines[i]:
            i += 1
            continue
        start, indented = i, _indent(lines[i]) > 0
        if lines[i] in _SECTIONS:
            i += 1
            while i < len(lines) and lines[i] and _indent(lines[i]):
                i += 1
            found += [f"**{lines[start]}**", "", *_described(lines[start + 1 : i]), ""]
        elif indented:
            while i < len(lines) and (_indent(lines[i]) or not lines[i]):
                i += 1
            block = textwrap.dedent("\n".join(lines[start:i])).strip("\n").splitlines()
            found += ["::", "", *("    " + line for line in block), ""]
        elif lines[i].startswith("- "):
            while i < len(lines) and lines[i] and (_indent(lines[i]) or lines[i].startswith("- ")):
                i += 1
            found += [("* " + inline(line[2:])) if line.startswith("- ") else "  " + inline(line.strip())
                      for line in lines[start:i]] + [""]
        else:
            while i < len(lines) and lines[i] and not _indent(lines[i]) and lines[i] not in _SECTIONS:
                i += 1
            # As one line: a span of code may go over the end of a line.
            found += [inline(" ".join(lines[start:i])), ""]
    return found


def _tree(obj):
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


def fields(obj):
    """(name, annotation and default as the source has them, comment) of each field that a class declares."""
    node = _tree(obj)
    if not isinstance(node, ast.ClassDef):
        return []
    source = textwrap.dedent(inspect.getsource(obj))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return [
        (
            entry.target.id,
            ast.unparse(entry.annotation) + (f" = {ast.unparse(entry.value)}" if entry.value else ""),
            comments.get(entry.end_lineno, ""),
        )
        for entry in node.body
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and entry.target.id[0] != "_"
    ]


def _process_docstring(app, what, name, obj, options, lines):
    lines[:] = to_rst(lines)
    if what == "class":
        for field, annotation, comment in fields(obj):
            lines.append(f"* ``{field}``: ``{annotation}``" + (f": {inline(comment)}" if comment else ""))
        lines.append("")


def _process_signature(app, what, name, obj, options, signature, returns):
    if not getattr(obj, "__module__", "").startswith("mscm"):
        return None
    if what == "class":
        return "", None  # its fields stand below
    node = _tree(inspect.unwrap(obj) if callable(obj) else obj)
    if not isinstance(node, ast.FunctionDef):
        return None
    arguments = node.args
    if what == "method" and arguments.args:
        arguments.args = arguments.args[1:]
    returns = ast.unparse(node.returns) if node.returns else None
    return f"({ast.unparse(arguments)})", returns


def _skip(app, what, name, obj, skip, options):
    # Fields stand in the list of their class.
    return True if type(obj).__name__ in ("_tuplegetter", "member_descriptor") else None


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
