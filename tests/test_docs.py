"""README and docs say what is so: the site is built, every block of code is run or says why not, the examples work."""

import ast
import contextlib
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm import cli, demonstration, experiment, methods, sampling
from mscm.checkpoint import Checkpoints
from mscm.config import ConfigError, flat, load_config
from mscm.data import sources
from mscm.diffusion import schedule as schedules
from mscm.diffusion import steps
from mscm.experiment import build
from mscm.metrics import files
from mscm.report import events
from mscm.sampling import SamplerSpec
from tests import browser, commands, tiny_run

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *DOCS.rglob("*.md")] if "_build" not in path.parts
)
TABLES = (methods.OBJECTIVES, sampling.SAMPLERS, experiment.MODELS, sources.SOURCES)


@pytest.fixture(scope="module")
def reference():
    """The extension of Sphinx that reads the code."""
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        yield importlib.import_module("reference")
    finally:
        sys.path.remove(str(DOCS / "_ext"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the work directories that the pages name; their networks are those of the package."""
    folder = tmp_path_factory.mktemp("docs")
    networks = demonstration.widened(files.tree(files.load(demonstration.NETWORKS)[0]))
    for name, places in (("digits_teacher", ["TEACHER"]), ("digits_cd4", ["DIR", "runs/digits_cd4"])):
        of = build(load_config(f"configs/{name}.py"))
        for place in places:
            with Checkpoints(folder / place, keep=1) as checkpoints:
                checkpoints.save_ema(3200, networks[name], of.facts())
    return folder


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The process is in a folder, as the reader of a page is; what its modules register is forgotten afterwards."""
    before = [dict(table) for table in TABLES]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.syspath_prepend(str(folder))
            yield
    finally:
        for table, entries in zip(TABLES, before, strict=True):
            table.clear()
            table.update(entries)
        for path in EXAMPLES.glob("*.py"):
            sys.modules.pop(path.stem, None)


@pytest.fixture
def examples():
    """Imports a module of docs/examples, in which the process is."""
    with inside(EXAMPLES):
        yield importlib.import_module


# ------------------------------------------------------------------------------------------------------------ the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, built with every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_is_built_without_warnings_and_asks_nothing_of_a_network(site):
    for page in PAGES:
        if page != "README.md":
            assert (site / Path(page).relative_to("docs")).with_suffix(".html").exists()
    loaded = r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*'
    assert [found for page in site.rglob("*.html") for found in re.findall(loaded, page.read_text())] == []
    assert "<math" in (site / "concepts.html").read_text()
    text = (site / "reference" / "objectives.html").read_text()
    assert "consistency_loss" in text and "Algorithm 1, arXiv:2403.06807v3" in text


def test_a_browser_shows_a_page_of_formulas_without_a_network(site):
    seen = browser.look(site / "concepts.html")
    assert seen.requests == [] and seen.console == [] and "DDIM" in seen.found["text"]


def test_every_module_is_in_the_reference():
    listed = set()
    for page in (DOCS / "reference").glob("*.md"):
        listed |= set(re.findall(r"^(?:\.\. automodule:: |## )(mscm[\w.]*)$", page.read_text(), re.MULTILINE))
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "mscm").rglob("*.py")}
    internal = {name for name in modules if name.endswith(("__init__", "__main__", "_flags"))}
    assert modules - internal - listed == set()


# ------------------------------------------------------------------------------------------------- the config reference


def _paths_of_configs() -> set[str]:
    """Of all keys that config files have, but for the names that one chooses."""
    found = set()
    for file in sorted((ROOT / "configs").glob("*.py")):
        if "def get_config" in file.read_text():
            found |= flat(json.loads(load_config(str(file)).to_json_best_effort())).keys()
    return {re.sub(r"^(model\.stages|ema\.further)\.[^.]+", r"\1.NAME", path) for path in found}


def _keys_in_the_source() -> set[str]:
    """The literal names of keys that the builders read, wherever they stand."""
    readers = ("has", "take", "choose", "number", "text", "optional_text", "name", "texts", "whole_numbers", "section",
               "optional_section")
    found = set()
    for module in ("experiment", "methods"):
        for node in ast.walk(ast.parse((ROOT / "mscm" / f"{module}.py").read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in readers:
                names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
                found |= {name for name in names if isinstance(name, str)}
    return found


@pytest.fixture(scope="module")
def keys(reference):
    """What the code reads of configs."""
    return reference.read_keys()


def test_every_key_that_the_code_reads_has_a_sentence(reference, keys):
    texts, page = reference.sentences(), (DOCS / "reference" / "config.md").read_text()
    leaves = reference.leaves(keys)
    lacking = [(path, variant) for path, read in leaves.items() for variant in read.variants or {""}
               if not reference.sentence_of(path, variant, texts)]
    assert lacking == []
    of_variants = {re.sub(r"\[.*\]", "", path) for path in texts}
    assert of_variants - leaves.keys() == set()  # sentences about keys that nothing reads
    for section in {path.partition(".")[0] if "." in path else "top" for path in leaves}:
        assert f"```{{config-keys}} {section}\n" in page
    assert _paths_of_configs() - keys.keys() == set()
    # What reads a key that none of the configs of the reference has would be found nowhere else.
    assert _keys_in_the_source() - {path.rpartition(".")[2] for path in keys} == set()


def test_a_key_says_what_it_takes(reference, keys):
    texts, defaults = reference.sentences(), reference.shared_defaults()
    table = "\n".join(reference.key_table("train", keys, texts, defaults))
    assert "| `train.max_bad_steps` | `0` | whole number from 0 |" in table
    table = "\n".join(reference.key_table("objective", keys, texts, defaults))
    assert "`v_mse`, `truncated_snr_mse`, `edm_mse`" in table and "below 1 |" in table
    of_learning_rate = "\n".join(reference.key_table("optimizer", keys, texts, defaults))
    assert "| `optimizer.b2` | `0.99` | number from 0, below 1 |" in of_learning_rate


# ----------------------------------------------------------------------------------------------------- blocks of code


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str
    marker: str  # the comment directly above it


def blocks_of(text: str) -> Iterator[Block]:
    """The blocks that a reader takes for code; those of Sphinx's own are none."""
    lines, i = text.splitlines(), 0
    while i < len(lines):
        fence = re.match(r"(`{3,}|:{3,})(.*)", lines[i])
        if fence is None:
            i += 1
            continue
        end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(fence[1]))
        marker = re.fullmatch(r"<!-- (.*) -->", lines[i - 1]) if i else None
        if "{" not in fence[2]:
            yield Block(i + 1, fence[2].strip() or "bash", "\n".join(lines[i + 1 : end]), marker[1] if marker else "")
        i = end + 1


def lines_of(script: str) -> Iterator[list[str]]:
    """The commands of a block as words, the body of a loop with the first value of its variable."""
    variables = {}
    for line in script.replace("\\\n", " ").splitlines():
        loop = re.match(r"for (\w+) in (\S+)", line)
        if loop:
            variables[loop[1]] = loop[2]
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if words and words[0] not in ("for", "done"):
            yield words


def check(words: list[str], where: Path) -> None:
    """Whether there is such a command and it takes such flags; it does nothing."""
    words = [word for word in words if not re.match(r"[A-Z]+=", word)]
    if "python" in words[1:]:
        script = next(word for word in words if word.startswith("launch/"))
        assert (ROOT / script).exists(), words
        words = words[words.index("python") :]
    words = words[: words.index("|")] if "|" in words else words
    match words:
        case ["python", "-m", "pytest", *_] | ["ruff", "check", "."] | ["kubectl", *_] | ["python", "-m", "sphinx", *_]:
            pass
        case ["pip", "install", "-e", target]:
            extras = re.fullmatch(r"\.\[(\w+)\]", target)[1]
            assert re.search(rf"^{extras} =", (ROOT / "setup.cfg").read_text(), re.M), words
        case ["python", "-m", module, *flags] if module.startswith("mscm."):
            flags = [re.sub(r"^--config=\.\.\.$", "--config=configs/digits_cd4.py", flag) for flag in flags]
            with inside(where), pytest.MonkeyPatch.context() as patch:
                patch.setattr(cli, "run", _only_parsing)
                assert commands.run(module.removeprefix("mscm."), *flags) == 0, words
        case ["python", *rest]:
            file = ROOT / (rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0])
            for flag in rest[2 if rest[0] == "-m" else 1 :]:
                assert f'"{flag.removeprefix("--").partition("=")[0]}"' in file.read_text(), words
        case [script, *_]:
            assert script.startswith("launch/") and (ROOT / script).exists(), words


_run = cli.run


def _only_parsing(main, **arguments):
    _run(lambda: None, **arguments)


def named_tests(marker: str) -> list[str]:
    """The tests that a marker names; each exists."""
    found = re.findall(r"(tests/\S+\.py)::(\w+)", marker)
    for file, name in found:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), f"there is no test {file}::{name}"
    return found


def verdict(block: Block) -> str:
    """What is done about a block: `run`, or `check` where the marker says who runs it or why nobody does."""
    if not block.marker:
        return "run"
    if block.marker.startswith("run with "):
        return "run"
    if block.marker.startswith("run by ") and named_tests(block.marker):
        return "check"
    if re.match(r"not run: \S", block.marker):
        named_tests(block.marker)
        return "check"
    raise AssertionError(f"line {block.line}: got the marker {block.marker!r}, expected run with, run by or not run:")


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_code_are_run_or_say_why_not(page, runs, monkeypatch):
    monkeypatch.chdir(runs)
    for block in blocks_of((ROOT / page).read_text()):
        what, where, place = verdict(block), ROOT, f"{page}:{block.line}"
        if block.language == "python" and what == "run":
            exec(compile(block.text, place, "exec"), {})
        known = block.language in ("bash", "python") or what == "check"
        assert known, f"{place}: got {block.language!r}, expected bash, python, or a reason not to run it"
        for words in lines_of(block.text) if block.language == "bash" else ():
            if words[0] == "cd":
                where = ROOT / words[1]
                continue
            check(words, where)
            if what == "run":
                assert words[:2] == ["python", "-m"] and words[2].startswith("mscm."), f"{place}: mark it"
                more = block.marker.removeprefix("run with ").split()
                assert commands.run(words[2].removeprefix("mscm."), *words[3:], *more) == 0, words


def test_a_block_without_a_reason_is_run():
    """The test above is no formality."""
    (block,) = blocks_of("text\n```\npython -m mscm.main --config=x\n```\n")
    assert block.language == "bash" and verdict(block) == "run"
    (block,) = blocks_of("<!-- not run: -->\n```\nx\n```\n")
    with pytest.raises(AssertionError, match="expected run with"):
        verdict(block)
    (block,) = blocks_of("<!-- run by tests/test_docs.py::test_nothing -->\n```\nx\n```\n")
    with pytest.raises(AssertionError, match="there is no test"):
        verdict(block)
    for wrong in ("python -m mscm.sample --workdr=x", "python -m mscm.main --config=configs/digits_cd4.py --workdir=x "
                  "--config.train.num_step=3", "python benchmarks/frechet.py --nothing=1", "launch/none.sh",
                  "python -m mscm.plan --config=configs/none.py --topology=host"):
        with pytest.raises((AssertionError, FileNotFoundError)):
            check(shlex.split(wrong), ROOT)


def test_averages_as_the_page_says():
    (block,) = (b for b in blocks_of((DOCS / "howto" / "averages.md").read_text()) if b.language == "python")
    config = load_config("configs/digits_teacher.py")
    exec(block.text, {"config": config})
    of = build(config)
    assert sorted(of.further) == ["long", "short", "slow"] and of.snapshot_every_steps == 200


# -------------------------------------------------------------------------------------------------------- the examples

_STD = 0.4  # of Gaussian data, whose denoiser and paths are known


def _exact(schedule):
    def denoise(z_t, t):
        alpha, sigma = schedule(t)
        return alpha * _STD**2 / (alpha**2 * _STD**2 + sigma**2) * z_t

    return denoise


def _width(level):
    return jnp.sqrt(level.alpha**2 * _STD**2 + level.sigma**2)


def test_the_objective_is_the_error_at_the_end_of_the_path(examples):
    """Of the map that Gaussian data has in the limit: falls with the square of the steps' error."""
    trajectory = examples("trajectory")
    teacher, z_1 = _exact(schedules.cosine), jax.random.normal(jax.random.key(0), (3, 4, 4, 1))

    def student(z_t, t):
        return _STD * z_t

    loss = [
        trajectory.trajectory_loss(student, teacher, schedules.cosine, z_1, teacher_steps=n)[0] for n in (8, 32)
    ]
    assert np.all(loss[1] < loss[0] / 8) and np.all(loss[0] < 0.05)
    # One step of the teacher is its own x_hat.
    loss, metrics = trajectory.trajectory_loss(teacher, teacher, schedules.cosine, z_1, teacher_steps=1)
    np.testing.assert_array_equal(loss, 0)
    assert metrics["logsnr"].shape == (3,)


def _losses(workdir) -> list[float]:
    return [scalar.value for scalar in events.read(workdir).scalars if scalar.name == "loss"]


def test_the_objective_trains_and_is_sampled(examples, runs, tmp_path, monkeypatch):
    """One file, and one line in a config: what the page shows, with 40 steps on the package's teacher."""
    tiny_run.hurry(monkeypatch)
    flags = ("--config=trajectory_digits.py", f"--workdir={tmp_path}", f"--config.teacher.workdir={runs / 'TEACHER'}",
             "--config.train.num_steps=40", "--config.train.log_every_steps=10", "--config.train.save_every_steps=40",
             "--config.train.batch_size=16", "--config.objective.teacher_steps=4", "--config.optimizer.warmup_steps=5",
             "--config.eval.at_end=False")
    assert commands.run("main", *flags) == 0
    losses = _losses(tmp_path)
    assert len(losses) == 4 and losses[-1] < losses[0], losses
    with np.load(_sampled(tmp_path, *flags)) as file:
        assert file["images"].shape == (50, 8, 8, 1)


def _sampled(folder, *flags):
    assert commands.run("sample", *flags, f"--output={folder}/x.npz") == 0
    return folder / "x.npz"


@pytest.mark.parametrize("distil", [False, True])
def test_an_objective_may_do_without_a_teacher_if_it_asks_none(distil, monkeypatch):
    def builder(section, parts):
        loss_fn = methods.OBJECTIVES["diffusion"](section, parts).loss_fn
        return methods.Method(loss_fn, distil=distil)

    monkeypatch.setitem(methods.OBJECTIVES, "mine", builder)
    config = load_config("configs/digits_teacher.py")
    config.objective.name = "mine"
    if distil:
        with pytest.raises(ConfigError, match="config.teacher: got None"):
            build(config)
    else:
        assert build(config).student_steps is None


@pytest.mark.parametrize("r", [0.5, 1.0])
def test_the_sampler_is_of_second_order(examples, r):
    """On the exact denoiser of Gaussian data, from a time to another: twice the steps, a quarter of the error."""
    module = examples("dpm_solver_pp_2s")
    schedule, z_1 = schedules.cosine, jax.random.normal(jax.random.key(0), (2, 4, 4, 1))

    def error(n):
        times = np.linspace(0.9, 0.1, n + 1, dtype=np.float32)
        images = jax.jit(module.plan(schedule, times, {"r": r}).sample, static_argnums=(0, 1))(
            _exact(schedule), schedule, z_1, None
        )
        first, last = (schedule(jnp.full((2,), t)) for t in times[[0, -1]])
        z_last = first.sigma * z_1 * _width(last) / _width(first)
        return float(jnp.max(jnp.abs(images - _exact(schedule)(z_last, jnp.full((2,), times[-1])))))

    assert 3.3 < error(8) / error(16) < 5


def test_the_sampler_draws_and_counts_its_evaluations(examples, runs, tmp_path):
    examples("dpm_solver_pp_2s")
    schedule = load_and_build("digits_2s.py").schedule
    spec = SamplerSpec("dpm_solver_pp_2s:r=0.4,grid=karras", 4)
    plan = spec.plan(schedule)
    assert spec.num_evaluations(schedule) == 7 == len(plan.evaluated) and np.all(np.diff(plan.evaluated) < 0)
    # A constant answer is followed exactly, whatever the steps.
    constant = jnp.full((2, 2, 2, 1), 0.3)
    images = plan.sample(lambda z, t: constant, schedule, jnp.ones((2, 2, 2, 1)), None)
    np.testing.assert_allclose(images, constant, atol=1e-6)
    with pytest.raises(ConfigError, match="from 0.1 to 1"):
        SamplerSpec("dpm_solver_pp_2s:r=2", 4)
    flags = ("--config=digits_2s.py", f"--workdir={runs / 'TEACHER'}", f"--sampler={spec.sampler}", "--num_steps=4")
    with np.load(_sampled(tmp_path, *flags)) as file:
        assert file["images"].std() > 30


def load_and_build(file):
    return build(load_config(file))


def test_the_tiles_are_the_photographs(examples):
    tiles = examples("tiles")
    photograph = np.arange(35 * 50 * 3, dtype=np.int64).reshape(35, 50, 3).astype(np.uint8)
    cut = tiles.cut(photograph)
    assert cut.shape == (6, 16, 16, 3)
    np.testing.assert_array_equal(cut[4], photograph[16:32, 16:32])
    source = sources.open_source("tiles", split="train")
    assert isinstance(source, sources.Source) and np.bincount(source.labels).tolist() == [1040, 1040]
    with pytest.raises(ValueError, match="expected train"):
        sources.open_source("tiles", split="test")


def test_network_and_data_set_train(examples, tmp_path, monkeypatch):
    tiny_run.hurry(monkeypatch)
    of = load_and_build("tiles_mixer.py")
    params = jax.jit(of.init_params)(jax.random.key(0))
    z, labels = jax.random.normal(jax.random.key(1), (2, 16, 16, 3)), jnp.array([0, 1])
    assert not np.any(of.model.apply({"params": params}, z, jnp.zeros(2), labels, train=False))
    flags = ("--config=tiles_mixer.py", f"--workdir={tmp_path}", "--config.train.num_steps=20",
             "--config.train.batch_size=16", "--config.train.steps_per_dispatch=5", "--config.train.log_every_steps=5",
             "--config.train.save_every_steps=20", "--config.optimizer.warmup_steps=2", "--config.eval.at_end=False")
    assert commands.run("main", *flags) == 0
    losses = _losses(tmp_path)
    assert len(losses) == 4 and losses[-1] < losses[0], losses


def test_a_comparison_is_told_which_modules_to_import(examples, capfd):
    assert "trajectory" not in methods.OBJECTIVES
    sentence = commands.refusal(capfd, "compare", "--workdir=none", "--output=x", "--modules=trajectory")
    assert "none, which has no config.json" in sentence and "trajectory" in methods.OBJECTIVES
    sentence = commands.refusal(capfd, "compare", "--workdir=none", "--output=x", "--modules=trajektory")
    assert "--modules: got 'trajektory'" in sentence


def test_steps_are_the_equations_of_the_concepts():
    """The formulas as the page of concepts writes them, in float64's stead at a coarse step."""
    t, s = (schedules.cosine(jnp.full((1,), time)) for time in (0.7, 0.4))
    x, z = jnp.full((1, 1, 1, 1), 0.3), jnp.full((1, 1, 1, 1), -0.8)
    a = s.alpha - t.alpha * s.sigma / t.sigma
    np.testing.assert_allclose(steps.ddim(x, z, t, s), a * x + s.sigma / t.sigma * z, rtol=1e-5)
    np.testing.assert_allclose(steps.inv_ddim(steps.ddim(x, z, t, s), z, t, s), x, rtol=1e-5)
    eps, x_var = (z - t.alpha * x) / t.sigma, jnp.full((1,), 0.1)
    expected = s.alpha * x + jnp.sqrt(s.sigma**2 + a**2 * 0.1 / jnp.mean(eps**2)) * eps
    np.testing.assert_allclose(steps.addim(x, x_var, z, t, s), expected, rtol=1e-5)
