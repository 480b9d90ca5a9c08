"""The references that are made of the code: keys of a config, flags of the commands."""

import ast
import contextlib
import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = ROOT / "docs" / "config_keys.toml"

# Configs that together read every key; tests/test_docs.py compares with what the source reads.
CONFIGS = (
    "digits_teacher", "digits_averaged", "digits_edm", "digits_cd4", "digits_ct4", "digits_pd", "digits_tract2",
    "digits_tract_edm1", "digits_cm_cd", "digits_cm_ct", "digits_ict", "digits_guided", "digits_guided_cd4",
    "captioned_digits_cd4", "t2i512_cd4", "toy_mixture", "cifar10_cm_cd", "edm_cifar10_cd4", "edm_cifar10_teacher",
    "imagenet64_cd8",
)
# Sections whose keys depend on a name in them.
VARIANTS = {"schedule": "name", "model": "name", "objective": "name"}
_ANY_NAME = (
    (re.compile(r"^(model\.stages)\.[^.]+"), r"\1.NAME"),
    (re.compile(r"^(ema\.further)\.[^.]+"), r"\1.NAME"),
)
# One builder reads the same keys for all of them.
_SAME = {"ddpmpp": "ddpmpp, ncsnpp, adm"}
_READERS = (
    "has", "take", "choose", "number", "text", "optional_text", "name", "texts", "whole_numbers", "section",
    "optional_section",
)


class Read(NamedTuple):
    """What the code says of a key where it reads it."""

    variants: set[str]  # for which names in VARIANTS it is read; empty: it is for all
    allowed: dict[str, str]  # by variant, in words
    may_be_left_out: bool
    default: str | None  # of one that may be left out


def _in_words(reader, arguments):
    match reader:
        case "number":
            low, below = arguments["minimum"], arguments["below"]
            kind = "whole number" if isinstance(low, int) else "number"
            limit = "" if below is None else f", below {below:g}"
            return f"{kind} from {low:g}{limit}"
        case "choose":
            return ", ".join(f"`{choice}`" for choice in arguments["choices"])
        case "text" | "name":
            return "text"
        case "optional_text":
            return "text or `None`"
        case "texts":
            return "texts"
        case "whole_numbers":
            return f"whole numbers from {arguments['minimum']}"
        case "section":
            return "section"
        case "optional_section":
            return "section or `None`"


@contextlib.contextmanager
def _recording(note):
    """Inside, `note(path, key, reader, arguments)` hears of everything that is read from a config."""
    from mscm import experiment
    from mscm.config import Section

    originals = {name: getattr(Section, name) for name in (*_READERS, "bind")}
    shapes = experiment._boxed_shapes

    def heard(name):
        original, signature = originals[name], inspect.signature(originals[name])

        def method(self, key, *args, **kwargs):
            bound = signature.bind(self, key, *args, **kwargs)
            bound.apply_defaults()
            note(self._path, key, name, bound.arguments | {"value": self._values.get(key)})
            return original(self, key, *args, **kwargs)

        return method

    def bind(self, function):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not isinstance(function, type(None)):
                bound = getattr(function, "keywords", {})
                if parameter.name not in bound:
                    note(self._path, parameter.name, "bind", {"parameter": parameter})
        return originals["bind"](self, function)

    try:
        for name in _READERS:
            setattr(Section, name, heard(name))
        Section.bind = bind
        experiment._boxed_shapes = lambda model, data: {}  # nothing is traced: this is about keys
        yield
    finally:
        for name, original in originals.items():
            setattr(Section, name, original)
        experiment._boxed_shapes = shapes


def read_keys(configs=CONFIGS):
    """Every key that the code reads in `configs`, by its path without "config."."""
    from mscm.config import load_config
    from mscm.experiment import build

    found, current = {}, []

    def note(path, key, reader, arguments):
        path = f"{path}.{key}".removeprefix("config.")
        for pattern, name in _ANY_NAME:
            path = pattern.sub(name, path)
        section = path.partition(".")[0]
        entry = found.setdefault(path, Read(set(), {}, False, None))
        variant = ""
        if section in VARIANTS and path != f"{section}.{VARIANTS[section]}":
            variant = getattr(current[-1], section)[VARIANTS[section]]
            variant = _SAME.get(variant, variant)
            entry.variants.add(variant)
        if reader == "has":
            found[path] = entry._replace(may_be_left_out=True)
        elif reader == "bind":
            parameter = arguments["parameter"]
            annotation = parameter.annotation
            if annotation is not parameter.empty:
                text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
                entry.allowed.setdefault(variant, {"float": "number", "int": "whole number", "str": "text"}.get(
                    text, text.replace("float", "number").replace(" | None", " or `None`")))
            if parameter.default is not parameter.empty:
                found[path] = entry._replace(may_be_left_out=True, default=repr(parameter.default))
        else:
            words = _in_words(reader, arguments)
            if words is None and isinstance(arguments["value"], bool):
                words = "`True` or `False`"
            if words is not None:
                before = entry.allowed.get(variant, "")
                # `take` sees less than what reads the value after it, an optional section more than a section.
                if not before or before == "`True` or `False`" or reader in ("optional_section", "choose"):
                    entry.allowed[variant] = words

    originals = {}
    with _recording(note):
        from mscm import experiment

        originals["_build"] = experiment._build

        def build_one(root, config, *others):
            current.append(config)
            try:
                return originals["_build"](root, config, *others)
            finally:
                current.pop()

        experiment._build = build_one
        try:
            for name in configs:
                config = load_config(f"configs/{name}.py")
                if "further" in config.ema:  # of the other kind
                    config.ema.further.slow = dict(decay=0.9999, warmup=True)
                build(config)
        finally:
            experiment._build = originals["_build"]
    return found


def leaves(keys):
    """Those keys that are no sections, with the variants for which they are none."""
    found = {}
    for path, read in keys.items():
        inner = [other.variants for name, other in keys.items() if name.startswith(path + ".")]
        rest = read.variants.difference(*inner)
        if not inner or rest:
            found[path] = read._replace(variants=rest) if inner else read
    return found


def shared_defaults():
    """The values that all families of configs share, by path."""
    from configs import base
    from mscm.config import flat

    return flat(json.loads(base.with_shared().to_json_best_effort()))


def sentences():
    """What each key means, by path."""
    return tomllib.loads(SENTENCES.read_text())


def sentence_of(path, variant, texts):
    """The sentence of a key, of a variant's own where there is one; None: there is none."""
    section, _, rest = path.partition(".")
    return texts.get(f"{section}[{variant}].{rest}") or texts.get(path)


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def key_table(section, keys, texts, defaults):
    """Tables in Markdown of the keys of a section, one for each variant."""
    of_section = {
        path: read
        for path, read in leaves(keys).items()
        if (path.partition(".")[0] if "." in path else "top") == section
    }
    variants = sorted({variant for read in of_section.values() for variant in read.variants}) or [""]
    lines = []
    if variants != [""]:
        common = [path for path, read in of_section.items() if not read.variants or read.variants == set(variants)]
        groups = [("", common)] + [
            (variant, [path for path, read in of_section.items() if variant in read.variants and path not in common])
            for variant in variants
        ]
    else:
        groups = [("", list(of_section))]
    for variant, paths in groups:
        if not paths:
            continue
        if len(groups) > 1:
            names = " or ".join(f"`{name}`" for name in variant.split(", "))
            title = f"With the {VARIANTS[section]} {names}:" if variant else "Always:"
            lines += [f"**{title}**", ""]
        lines += ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        for path in paths:
            read = of_section[path]
            any_variant = variant or next(iter(sorted(read.variants)), "")
            if path in defaults:
                default = f"`{defaults[path]!r}`"
            elif read.may_be_left_out:
                default = f"left out: `{read.default}`" if read.default is not None else "may be left out"
            else:
                default = ""
            allowed = read.allowed.get(any_variant) or read.allowed.get("", "")
            text = sentence_of(path, any_variant, texts) or ""
            text, _, extra = text.partition(" Allowed: ")
            lines.append(f"| `{path}` | {_cell(default)} | {_cell(extra or allowed)} | {_cell(text)} |")
        lines.append("")
    return lines


_cache = {}


class ConfigKeys(SphinxDirective):
    """```{config-keys} SECTION```: the keys of one section of a config."""

    required_arguments = 1

    def run(self):
        """Reads the code once for all sections."""
        if not _cache:
            _cache["keys"] = read_keys()
        self.env.note_dependency(str(SENTENCES))
        lines = key_table(self.arguments[0], _cache["keys"], sentences(), shared_defaults())
        return self.parse_text_to_nodes("\n".join(lines))


def source_of(module):
    """The file of a command; a package is run by its __main__."""
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def command_flags(module):
    """(name, default, help) of each flag that a command has, from its source."""
    path = source_of(module)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mscm":  # flags that commands share
            found += [flag for name in node.names if name.name.endswith("_flags")
                      for flag in command_flags(f"mscm.{name.name}")]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.rpartition(".")[2].startswith("DEFINE_") and node.args and isinstance(node.args[0], ast.Constant):
            arguments = [ast.literal_eval(arg) for arg in node.args if isinstance(arg, ast.Constant | ast.List)]
            values = [ast.unparse(arg) for arg in node.args]
            texts = [text for text in arguments[1:] if isinstance(text, str)]
            found.append((arguments[0], values[1] if len(values) > 1 else "None", texts[-1] if texts else ""))
    return sorted(set(found))


class CommandFlags(SphinxDirective):
    """```{command-flags} mscm.main```: what a command says of itself, and its flags."""

    required_arguments = 1

    def run(self):
        """Reads the source; nothing is imported."""
        (module,) = self.arguments
        path = source_of(module)
        self.env.note_dependency(str(path))
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines = ["```text", doc, "```", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        for name, default, text in command_flags(module):
            lines.append(f"| `--{name}` | `{_cell(default)}` | {_cell(text)} |")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app):
    """Called by Sphinx."""
    app.add_directive("config-keys", ConfigKeys)
    app.add_directive("command-flags", CommandFlags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
