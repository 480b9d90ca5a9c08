"""Every config file: it loads, says only what is its own, and carries the paper's numbers."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mscm import evaluation
from mscm.checkpoint import parameter_shapes
from mscm.config import ConfigError
from mscm.experiment import build

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("digits", "cifar10", "imagenet", "captioned_digits", "t2i512", "edm")
ALONE = "toy_mixture"  # family and runs in one file
FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem not in (*FAMILIES, ALONE, "base", "__init__"))
VARIANTS = {
    "imagenet": (":large",), "cifar": (":small",), "t2i": (":high",),
    "edm_cifar10": (":cond-ve", ":uncond-vp", ":uncond-ve"),
}


def _family(stem: str) -> str:
    """What `VARIANTS` calls the family of a file."""
    return stem.rpartition("_")[0] if stem.startswith("edm_") else stem.split("_")[0].rstrip("0123456789")


# What --config takes, relative to the root of the repository: every file, and its other variant where there is one.
ALL_CONFIGS = [
    f"configs/{path.name}{suffix}"
    for path in FILES
    for suffix in ("", *VARIANTS.get(_family(path.stem), ()))
    if path.stem + suffix != "t2i512_teacher:high"  # guidance is of its students
]
TOY = [f"configs/{ALONE}.py:{run}" for run in ("teacher", "cd1", "cd2", "cd4", "ct1", "ct2", "ct4")]


def load(name: str) -> ConfigDict:
    """The config that --config=`name` gives: a file by its path, and what follows the colon as its argument."""
    file, _, variant = name.partition(":")
    spec = spec_from_file_location(f"config_{Path(file).stem}", ROOT / file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def paths(config: ConfigDict, prefix: str = "") -> set[str]:
    """Every key of a config as a dotted path."""
    found = set()
    for key, value in config.items():
        found |= paths(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key}
    return found


def test_the_files_that_the_readme_promises_exist():
    small = {
        f"{family}_{run}"
        for family in ("digits", "cifar10")
        for run in ("teacher", *(f"{kind}{s}" for kind in ("cd", "ct") for s in (1, 2, 4, 8)))
    }
    imagenet = {
        f"imagenet{side}_{run}"
        for side in (64, 128)
        for run in ("teacher", *(f"{kind}{s}" for kind in ("cd", "ct") for s in (1, 2, 4, 8, 16)))
    }
    baselines = ("pd", *(f"tract{s}" for s in (1, 2, 4, 8)), "cm_cd", "cm_ct", "ict", "edm", "tract_edm1")
    others = {f"{family}_{run}" for family in ("digits", "cifar10") for run in baselines}
    others |= {f"digits_{run}" for run in ("averaged", "guidable", "guided", "guided_cd4")}
    others |= {"imagenet64_ict", "imagenet64_pd"}
    others |= {f"t2i512_{run}" for run in ("teacher", "cd4", "cd8", "cd16", "cd256")}
    others |= {f"captioned_digits_{run}" for run in ("teacher", "cd4", "cd8", "cd256")}
    others |= {f"edm_cifar10_{run}" for run in ("teacher", "cd1", "cd2", "cd4", "cd8", "pd", "tract1")}
    others |= {f"edm_imagenet64_{run}" for run in ("teacher", "cd1", "cd2", "cd4", "cd8")}
    assert {path.stem for path in FILES} == small | imagenet | others


@pytest.mark.parametrize("name", [*ALL_CONFIGS, *TOY])
def test_loads_and_is_deterministic(name):
    config = load(name)
    assert config.to_dict() == load(name).to_dict()
    # The name of a run is the name of its file, so that a work directory can be traced back.
    assert config.name == Path(name.partition(":")[0]).stem + name.replace(":", "_").partition(".py")[2]


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_a_caller_cannot_change_the_next_one(name):
    config = load(name)
    sizes, key = (config.model.middle, "width") if "middle" in config.model else (config.model, "num_blocks")
    sizes[key] += 1
    again = load(name).model
    assert again.get("middle", again)[key] == sizes[key] - 1


def test_every_config_has_the_keys_of_its_kind():
    # The parameters of a schedule and the number of stages may differ, and some keys may be left out; everything else
    # is one schema for an objective and a kind of network, of which consistency models from data alone read less.
    differs = ("model.stages", "schedule.", "data.text.", "model.text.", "eval.alignment", "ema.further.", "ema.snap")
    differs += ("model.position_scale",)
    schemas = {}
    for name in ALL_CONFIGS:
        config = load(name)
        # Noise that a config draws at random is one key more.
        found = {path for path in paths(config) if not path.startswith((*differs, "objective.noise"))}
        if config.objective.name == "consistency":
            found = {path for path in found if not path.startswith(("objective.", "teacher"))}
        is_unet = "channel_mult" in config.model
        assert schemas.setdefault((config.objective.name, is_unet), found) == found
    assert len(schemas) == 6 + 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_named_file_states_only_its_difference(path):
    tree = ast.parse(path.read_text())
    docstring, imports, function = tree.body
    assert isinstance(imports, ast.ImportFrom) and imports.module == "configs"
    assert imports.names[0].name in FAMILIES
    # The function is one call of the family, and its only numbers are the resolution and the number of student steps.
    (statement,) = function.body
    assert isinstance(statement, ast.Return) and isinstance(statement.value, ast.Call)
    allowed = {
        id(keyword.value) for keyword in statement.value.keywords if keyword.arg in ("resolution", "student_steps")
    }
    numbers = [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and id(node) not in allowed
    ]
    assert numbers == []


def test_header_of_the_toy():
    header = ast.get_docstring(ast.parse((ROOT / "configs" / "toy_mixture.py").read_text()))
    for field in ("Command:", "Hardware:", "Cost:", "Expected:", "Variants:"):
        assert field in header


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_names_command_hardware_cost_and_expected_result(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    for field in ("Command:", "Hardware:", "Cost:", "Expected:"):
        assert field in header
    assert f"python -m mscm.main --config=configs/{path.name} --workdir=" in header
    if path.stem.startswith("edm_"):
        assert "python -m mscm.import_teacher" in header or "CC BY-NC-SA 4.0" in header
    expected = " ".join(header.partition("Expected:")[2].split())
    if path.stem.startswith("imagenet"):
        assert f"--config=configs/{path.name}:large" in header
        # A number that this project has not measured is not presented as its own.
        assert expected.startswith("FID") and "the paper's" in expected and "not reproduced here" in expected
    elif path.stem.startswith("t2i"):
        assert "CLIP score" in expected and "the paper's" in expected and "not reproduced here" in expected
    elif path.stem.startswith("edm_imagenet64"):
        assert expected.startswith("FID") and "the paper's" in expected and "not reproduced here" in expected
    elif path.stem.startswith("captioned"):
        assert "caption_accuracy" in expected
    else:
        assert "fd_classifier" in expected and "FID" not in expected
        assert "the paper's" not in expected or "not reproduced here" in expected


# FID of Table 1, arXiv:2403.06807v3: by number of steps, (small, large) of CT and of CD.
_TABLE_1 = {
    64: {
        "ct": {1: (7.2, 6.4), 2: (2.7, 2.3), 4: (1.8, 1.6), 8: (1.5, 1.5), 16: (1.5, 1.6)},
        "cd": {1: (4.3, 3.2), 2: (2.0, 1.9), 4: (1.7, 1.6), 8: (1.6, 1.4), 16: (1.5, 1.4)},
    },
    128: {
        "ct": {1: (16.0, 14.5), 2: (6.0, 4.2), 4: (4.0, 2.7), 8: (3.3, 2.2), 16: (3.4, 2.3)},
        "cd": {1: (8.5, 7.0), 2: (3.1, 3.1), 4: (2.4, 2.3), 8: (2.1, 2.1), 16: (2.0, 2.0)},
    },
}


@pytest.mark.parametrize("side", (64, 128))
@pytest.mark.parametrize("kind", ("ct", "cd"))
@pytest.mark.parametrize("steps", (1, 2, 4, 8, 16))
def test_imagenet_student_is_the_papers(side, kind, steps):
    name = f"configs/imagenet{side}_{kind}{steps}.py"
    small, large = _TABLE_1[side][kind][steps]
    assert f"FID {small}; large: {large} (" in (ROOT / name).read_text()
    for suffix in ("", ":large"):
        config = load(name + suffix)
        assert config.data.name == f"imagenet{side}" and config.data.resolution == side
        assert config.train.batch_size == 2048 and config.train.num_steps == 200_000
        assert config.objective.teacher_steps.to_dict() == dict(start=64, end=1280, anneal_steps=100_000)
        assert config.objective.x_var_frac == 0.75 and config.objective.huber_epsilon == 1e-4
        assert config.objective.student_steps == steps and config.objective.distil == (kind == "cd")
        assert config.teacher.config == f"configs/imagenet{side}_teacher.py{suffix}"
        assert config.teacher.workdir is None


@pytest.mark.parametrize(
    ("name", "stages", "middle"),
    [  # Per level: kind, channels, dropout (the paper's table of U-ViT configurations)
        ("64_teacher.py", [("residual", 256, 0), ("transformer", 512, 0)], (1024, 0.2)),
        ("64_teacher.py:large", [("residual", 512, 0), ("transformer", 1024, 0.1)], (2048, 0.1)),
        ("128_teacher.py", [("residual", 128, 0), ("residual", 256, 0), ("transformer", 512, 0)], (1024, 0.1)),
        (
            "128_teacher.py:large",
            [("residual", 256, 0), ("residual", 512, 0.1), ("transformer", 1024, 0.1)],
            (2048, 0.1),
        ),
    ],
)
def test_imagenet_network_is_the_papers(name, stages, middle):
    model = load(f"configs/imagenet{name}").model
    assert list(model.stages) == [f"stage_{i}" for i in range(len(stages))]
    assert [(s.kind, s.width, s.dropout) for s in model.stages.values()] == stages
    assert all(s.num_blocks == 3 for s in model.stages.values())
    assert (model.middle.width, model.middle.dropout) == middle and model.middle.num_blocks == 16
    assert model.emb_dim == 1024 and model.mlp_ratio == 4


@pytest.mark.parametrize("name", [n for n in (*ALL_CONFIGS, *TOY) if load(n).teacher is not None])
def test_student_differs_from_its_teacher_only_in_the_method(name):
    student = load(name)
    teacher = load(student.teacher.config)
    if student.objective.name == "guided":  # the weight of guidance becomes an input
        teacher.model.guidance_input = True
    if student.name.startswith("edm_"):  # which are asked on any schedule, and are not trained here
        assert (student.model.dropout, student.prediction) == (0.0, "edm") and teacher.model.dropout > 0
        teacher.schedule, teacher.model.dropout = student.schedule, 0.0
    elif student.objective.name in ("progressive", "tract", "consistency"):  # C4, D and E3 of the papers' tables
        for level in (teacher.model.middle, *teacher.model.stages.values()):
            level.dropout = 0.0
    for part in ("data", "model", "schedule", "prediction"):
        assert student[part] == teacher[part]


@pytest.mark.parametrize("name", [n for n in ALL_CONFIGS if "/edm_" in n])
def test_students_of_edms_networks_ask_them_what_they_know(name):
    """No noise beyond sigma / alpha = 80, nor, but for the data itself, below 0.002."""
    schedule = build(load(name)).schedule
    alpha, sigma = schedule(jnp.array([0.0, 0.06, 1.0]))
    u = np.ravel(sigma / alpha)
    assert u[2] == pytest.approx(80, rel=1e-4) and u[1] > 0.00199
    assert u[0] == pytest.approx(0.002, rel=1e-4) or (u[0] == 0 and load(name).schedule.name == "karras")


def test_unknown_variant_of_edm():
    with pytest.raises(ValueError, match="got 'vp', expected one of '', 'cond-ve', 'uncond-vp', 'uncond-ve'"):
        load("configs/edm_cifar10_cd4.py:vp")


# Of C4 and C5 of the papers' tables: images in a step, steps, rate, average.
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("configs/cifar10_ict.py", (1024, 400_000, 1e-4, 0.99993)),
        ("configs/imagenet64_ict.py", (4096, 800_000, 1e-4, 0.99997)),
    ],
)
def test_improved_consistency_training_is_the_papers(name, numbers):
    config = load(name)
    assert numbers == (
        config.train.batch_size, config.train.num_steps, config.optimizer.learning_rate, config.ema.decay
    )
    assert config.schedule.to_dict() == dict(name="karras", sigma_min=0.002, sigma_max=80, rho=7)
    assert config.objective.grid.to_dict() == dict(name="ict", start=10, end=1280)
    assert config.objective.noise.to_dict() == dict(mean=-1.1, std=2.0)
    assert config.objective.distance.scale == 0.00054 and config.objective.weight == "inverse_gap"
    assert config.objective.target_decay is None and config.teacher is None
    assert config.optimizer.name == "radam" and config.model.fourier_scale == 0.02


def test_gradients_of_tract_are_clipped_as_the_authors_code_does():
    """At 1, of a sum over pixels; of EDM's variant not at all."""
    assert load("configs/cifar10_tract1.py").optimizer.clip_norm == 1.0
    for name in ("configs/cifar10_tract_edm1.py", "configs/edm_cifar10_tract1.py"):
        assert load(name).optimizer.clip_norm is None


def test_the_diffusion_models_that_the_paper_guides_know_no_class():
    """Those for 128 pixels."""
    assert load("configs/imagenet64_teacher.py").objective.label_dropout == 0.0
    teacher = build(load("configs/imagenet128_teacher.py"))
    assert teacher.guided(0.1).guidance == 0.1


def test_tracts_average_is_as_long_as_its_phases():
    """Of what it began with, a thousandth is left: also where a command changes how long they are."""
    config = load("configs/digits_tract2.py")
    for num_steps in (config.train.num_steps, 200):
        config.train.num_steps = num_steps
        for member in build(config).lineage("DIR")[1:]:
            ema = member.experiment.config["ema"]
            assert ema["decay"] ** member.experiment.train.num_steps == pytest.approx(1e-3)
            assert member.experiment.train.num_steps == num_steps and not ema["warmup"]
    config.objective.num_steps_before = (400,)
    lengths = {}
    for member in build(config).lineage("DIR")[1:]:
        lengths[member.experiment.name] = num_steps = member.experiment.train.num_steps
        assert member.experiment.config["ema"]["decay"] ** num_steps == pytest.approx(1e-3)
    assert [*lengths.values()] == [400, 200]


@pytest.mark.parametrize(
    ("name", "images", "half_life"), [("edm_cifar10_teacher", 200e6, 0.5e6), ("edm_imagenet64_teacher", 2500e6, 50e6)]
)
def test_the_teachers_of_edm_are_the_papers(name, images, half_life):
    config = load(f"configs/{name}.py")
    batch = config.train.batch_size
    assert config.train.num_steps * batch == pytest.approx(images, rel=0.01)
    assert config.optimizer.warmup_steps * batch == pytest.approx(10e6, rel=0.01)
    assert config.ema.decay ** (half_life / batch) == pytest.approx(0.5)


@pytest.mark.parametrize(("name", "guidance"), [("t2i512_teacher", [0.5, 3.0]), ("t2i512_cd8", [0.0])])
def test_a_teacher_of_text_to_image_is_scored_as_its_students_learn_from_it(name, guidance):
    """With the two weights of Table 6 by itself; as a teacher it is guided already."""
    samplers = evaluation.diffusion_samplers(build(load(f"configs/{name}.py")))
    assert [spec.guidance for spec in samplers] == guidance
    assert {(spec.name, spec.num_steps) for spec in samplers} == {("ancestral", 256)}


def test_progressive_distillation_is_the_papers():
    """Halves 1024 steps to 1, the phases of 2 steps and 1 step twice as long."""
    lineage = build(load("configs/imagenet64_pd.py")).lineage("DIR")
    students = [member.experiment for member in lineage[1:]]
    assert [student.student_steps for student in students] == [512 >> i for i in range(10)]
    assert [student.train.num_steps for student in students] == [50_000] * 8 + [100_000] * 2
    assert all(float(student.learning_rate(student.train.num_steps)) == 0 for student in students)
    assert [member.workdir for member in lineage[:3]] == ["DIR/teacher", "DIR/phases/512", "DIR/phases/256"]
    assert lineage[-1].workdir == "DIR" and not any(member.is_given for member in lineage)


def test_a_lineage_begins_with_what_the_config_names():
    """A teacher's own teacher is looked for beside it, and not where the teacher is given."""
    config = load("configs/digits_guided_cd4.py")
    names = ["digits_guidable", "digits_guided", "digits_guided_cd4"]
    lineage = build(config).lineage("DIR")
    assert [(m.experiment.name, m.workdir) for m in lineage] == list(
        zip(names, ["DIR/teacher/teacher", "DIR/teacher", "DIR"], strict=True)
    )
    config.teacher.workdir = "THERE"
    lineage = build(config).lineage("DIR")
    assert [(m.experiment.name, m.workdir, m.is_given) for m in lineage] == [
        ("digits_guided", "THERE", True), ("digits_guided_cd4", "DIR", False)
    ]


@pytest.mark.parametrize(
    ("name", "teacher", "workdir"),
    [
        ("digits_cd4", "digits_teacher", "DIR/teacher"),
        ("imagenet64_pd", "imagenet64_teacher", "DIR/teacher"),
        ("digits_guided_cd4", "digits_guided", "DIR/teacher"),  # which has a teacher itself
        ("digits_guided", "digits_guidable", "DIR/teacher"),
    ],
)
def test_what_a_model_is_taught_by(name, teacher, workdir):
    """No phase, and nothing that is older than it."""
    found = build(load(f"configs/{name}.py")).diffusion_teacher("DIR")
    assert (found.experiment.name, found.workdir) == (teacher, workdir)


def test_a_teacher_is_taught_by_none():
    assert build(load("configs/digits_teacher.py")).diffusion_teacher("DIR") is None


def test_imagenet_schedules_and_teacher():
    for side in (64, 128):
        config = load(f"configs/imagenet{side}_teacher.py")
        assert config.schedule.name == "interpolated" and config.schedule.resolution == side
        assert (config.schedule.noise_low, config.schedule.noise_high) == (32, side)
        # Simple diffusion, arXiv:2301.11093, the U-ViT
        optimizer = config.optimizer
        assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.99, 1e-12)
        assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.clip_norm) == (1e-4, 10_000, 1)
        assert config.ema.decay == 0.9999 and config.train.num_steps == 500_000
    assert load("configs/imagenet64_teacher.py").objective.multiscale is None
    assert load("configs/imagenet128_teacher.py").objective.multiscale == (128, 64)


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("imagenet")], ids=lambda path: path.stem)
def test_unknown_variant_names_the_choices(path):
    with pytest.raises(ValueError, match="got 'huge', expected one of '', 'large'"):
        load(f"configs/{path.name}:huge")


def test_variants_of_the_toy():
    """Without one it is the teacher; a DDIM teacher is distilled, and one pixel has no features but itself."""
    assert load("configs/toy_mixture.py").to_dict() == load("configs/toy_mixture.py:teacher").to_dict()
    config = load("configs/toy_mixture.py:cd2")
    assert config.objective.student_steps == 2 and config.objective.x_var_frac == 0.0 and config.objective.distil
    assert not load("configs/toy_mixture.py:ct2").objective.distil
    assert config.eval.network == "pixels"
    with pytest.raises(ValueError, match="got 'cd3', expected one of teacher, cd1, cd2, cd4, ct1, ct2, ct4"):
        load("configs/toy_mixture.py:cd3")


@pytest.mark.parametrize(
    "name", ["configs/digits_cd2.py", "configs/imagenet128_ct4.py:large", "configs/cifar10_teacher.py:small", TOY[1]]
)
def test_a_config_read_back_from_json_builds_the_same(name):
    """A work directory's config.json: keys without a value and tuples, which JSON writes as lists, come back."""
    config = load(name)
    config.mesh.fsdp = 1
    experiment = build(config)
    again = build(ConfigDict(json.loads(json.dumps(experiment.config))))
    assert again.config == experiment.config
    for part in ("name", "seed", "data", "model", "train", "eval", "student_steps", "distil", "guidance", "mesh_sizes"):
        assert getattr(again, part) == getattr(experiment, part), part
    t = jnp.linspace(0.0, 1.0, 5)
    jax.tree.map(np.testing.assert_array_equal, again.schedule(t), experiment.schedule(t))
    assert (again.teacher is None) == (experiment.teacher is None)
    if again.teacher is not None:
        assert again.teacher.workdir == experiment.teacher.workdir
        assert again.teacher.experiment.config == experiment.teacher.experiment.config


# FID of 30,000 images and CLIP score of Table 6, arXiv:2403.06807v3, with the guidance weights 0.5 and 3.
_TABLE_6 = {
    4: ((8.7, ".298"), (12.4, ".311")),
    8: ((8.1, ".300"), (13.9, ".311")),
    16: ((7.9, ".300"), (14.4, ".312")),
    256: ((8.2, ".300"), (13.9, ".312")),
}


@pytest.mark.parametrize("steps", _TABLE_6)
@pytest.mark.parametrize(("variant", "guidance"), [("", 0.5), (":high", 3.0)])
def test_text_to_image_is_the_papers(steps, variant, guidance):
    """But for the patches, without which the paper's rate is beyond its chips."""
    name = f"configs/t2i512_cd{steps}.py"
    (fid, clip), (fid_high, clip_high) = _TABLE_6[steps]
    header = " ".join((ROOT / name).read_text().split())
    assert f"FID of 30,000 images {fid} and CLIP score {clip}; high: {fid_high} and {clip_high} (" in header
    config = load(name + variant)
    assert config.teacher.guidance == guidance and config.objective.student_steps == steps
    assert config.objective.teacher_steps.to_dict() == dict(start=256, end=256, anneal_steps=0)
    assert config.objective.huber_epsilon == 1.0 and config.objective.x_var_frac == 0.75
    assert config.objective.multiscale == (512, 256, 128, 64, 32)
    assert config.train.batch_size == 2048 and config.train.num_steps == 30_000
    stages = [(s.kind, s.width, s.num_blocks) for s in config.model.stages.values()]
    assert stages == [("residual", 128, 3), ("residual", 256, 3), ("residual", 1024, 3), ("transformer", 2048, 3)]
    middle = config.model.middle
    assert (middle.width, middle.num_blocks, middle.dropout) == (4096, 16, 0.1) and config.model.patch_size == 4
    assert (config.schedule.noise_low, config.schedule.noise_high) == (32, 512)
    assert load("configs/t2i512_teacher.py").objective.label_dropout == 0.1


def test_unknown_variant_of_text_to_image():
    with pytest.raises(ValueError, match="got 'low', expected one of '', 'high'"):
        load("configs/t2i512_cd4.py:low")


def test_unknown_variant_of_cifar10():
    with pytest.raises(ValueError, match="got 'large', expected one of '', 'small'"):
        load("configs/cifar10_cd4.py:large")


def test_flag_finds_the_family_from_another_directory(tmp_path):
    """By path and through the flag, from a directory that is not the repository, as an installed mscm is used."""
    script = (
        'from absl import app\n'
        'from ml_collections import config_flags\n'
        'CONFIG = config_flags.DEFINE_config_file("config")\n'
        'def main(_):\n'
        '    c = CONFIG.value\n'
        '    print(c.name, c.teacher.workdir, c.model.remat, c.objective.multiscale, c.model.middle.width)\n'
        'app.run(main)\n'
    )
    overrides = [
        "--config.teacher.workdir=there",
        "--config.model.remat=dots",
        "--config.objective.multiscale=(64,32)",
        "--config.model.middle.width=8",
    ]
    out = subprocess.run(
        [sys.executable, "-c", script, f"--config={ROOT}/configs/imagenet64_cd8.py:large", *overrides],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.split() == ["imagenet64_cd8_large", "there", "dots", "(64,", "32)", "8"]


def test_reading_a_config_imports_no_heavy_library():
    """`--help` and an error in a config must not wait for jax."""
    script = "import sys, configs.digits, configs.cifar10, configs.imagenet, configs.toy_mixture, configs.edm"
    heavy = "jax", "flax", "numpy", "tensorflow_datasets"
    script += f"\nprint([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def _abstract_step(name: str):
    """The state before and after one dispatch, and its metrics, as shapes."""
    config = load(name)
    config.mesh.fsdp = 1  # there is one device here
    experiment = build(config)
    spec, data = experiment.train, experiment.data
    lead = (spec.steps_per_dispatch, spec.batch_size)
    batch = {
        "image": jax.ShapeDtypeStruct((*lead, data.resolution, data.resolution, data.channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct(lead, jnp.int32),
    }
    frozen = experiment.abstract_frozen()
    state = experiment.abstract_state()
    return state, *jax.eval_shape(experiment.train_steps(), state, frozen, batch, jax.random.key(0))


@pytest.mark.parametrize("name", [*ALL_CONFIGS, *TOY])
def test_builds(name):
    """Every config is accepted whole, and what its checkpoints would say of it is JSON."""
    experiment = build(load(name))
    facts = experiment.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["config"] == json.loads(load(name).to_json_best_effort())
    assert facts["parameters"] == parameter_shapes(experiment.abstract_params())
    if experiment.teacher is not None:
        theirs = parameter_shapes(experiment.teacher.experiment.abstract_params())
        added = facts["parameters"].keys() - theirs.keys()
        assert all(name.startswith("condition/guidance/") for name in added)
        assert bool(added) == (experiment.config["objective"]["name"] == "guided")
        assert {name: facts["parameters"][name] for name in theirs} == theirs


# The files of a family differ in numbers that no shape depends on, so one of each kind of run and of each network.
STEPPED = [name for name in ALL_CONFIGS if re.match(r"configs/digits_(?!(cd|ct|tract)[148]\.)", name)] + [
    "configs/cifar10_teacher.py", "configs/cifar10_cd4.py:small", "configs/edm_cifar10_cd4.py:cond-ve",
    "configs/edm_imagenet64_teacher.py",
] + [
    f"configs/imagenet{side}_{run}.py{suffix}"
    for side, run, suffix in ((64, "cd4", ":large"), (128, "ct16", ""), (128, "teacher", ":large"))
]


@pytest.mark.parametrize("name", STEPPED)
def test_a_training_step_keeps_the_shapes_of_the_state(name):
    """One dispatch maps the state onto itself and reports scalars."""
    before, after, averages = _abstract_step(name)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    assert all(leaf.shape == () for leaf in jax.tree.leaves(averages))
    segments = [key for key in averages if key.startswith("loss_segment/")]
    config = load(name)
    phases = config.objective.get("phase_steps", (0,))
    assert len(segments) == config.objective.get("student_steps", phases[-1])


def _changed(name: str, **changes) -> ConfigDict:
    """The config with the value of dotted keys set, also of keys that it does not have; None removes nothing."""
    config = load(name)
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = config
        for part in sections:
            section = section[part]
        with section.unlocked():
            if value is _REMOVED:
                del section[key]
            else:
                section[key] = value
    return config


_REMOVED = object()
_LPIPS = {"name": "lpips", "weights": None, "resize": 224}


@pytest.mark.parametrize(
    ("path", "value", "nearest"),
    [
        ("optimizer__learning_rat", 1e-3, "learning_rate"),
        ("model__widht", 3, None),
        ("model__emb_dims", 3, "emb_dim"),
        ("model__middle__num_block", 3, "num_blocks"),
        ("schedule__logsnr_mins", -3.0, "logsnr_min"),
        ("objective__teacher_steps__anneal_step", 3, "anneal_steps"),
        ("objective__huber_epsilo", 3, "huber_epsilon"),
        ("ema__decays", 0.3, "decay"),
        ("eval__num_image", 3, "num_images"),
        ("seeds", 3, "seed"),
        ("notes", "mine", None),
    ],
)
def test_a_key_that_nobody_reads_is_refused(path, value, nearest):
    """The error names the key by its path, and the key that was meant where one is near."""
    with pytest.raises(ConfigError) as error:
        build(_changed("configs/digits_cd2.py", **{path: value}))
    message = str(error.value)
    assert f"config.{path.replace('__', '.')}: nothing reads this key" in message
    assert f"did you mean {nearest!r}?" in message if nearest else "did you mean" not in message


@pytest.mark.parametrize(
    "path", ["optimizer__learning_rate", "model__emb_dim", "objective__distance", "ema__decay"]
)
def test_a_missing_key_is_named(path):
    """A key without a default that is absent is an error that names it, and the misspelt key beside it."""
    section, key = path.rsplit("__", 1)
    name = "configs/digits_cd2.py"
    value = load(name)[section][key]
    with pytest.raises(ConfigError, match=f"config.{section}: got no key '{key}' .did you mean '{key[:-1]}'"):
        build(_changed(name, **{path: _REMOVED, path[:-1]: value}))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("schedule__name", "cosin", "config.schedule.name: got 'cosin' .did you mean 'cosine'"),
        ("prediction", "w", "config.prediction: got 'w'"),
        ("objective__name", "consistancy", "config.objective.name: got 'consistancy' .did you mean 'consistency'"),
        ("objective__distance", "huber", "config.objective.distance: got 'huber'"),
        ("objective__student_steps", 0, "config.objective.student_steps: got 0, expected a whole number of at least 1"),
        ("optimizer__decay", "linaer", "optimizer.decay: got .linaer., expected one of constant, cosine, linear"),
        ("optimizer__name", "sgd", "optimizer.name: got 'sgd', expected one of adam, radam"),
        ("train__num_steps", 15, "config.train.num_steps: got 15, expected a multiple of"),
        ("eval__teacher_steps", (), "config.eval.teacher_steps: got .., expected whole numbers from 1"),
        ("eval__teacher_steps", (4, 0), "config.eval.teacher_steps: got .4, 0., expected whole numbers from 1"),
        ("eval__seeds", (-1,), "config.eval.seeds: got .-1,., expected whole numbers from 0"),
        ("eval__teacher_samplers", ("heum",), "eval.teacher_samplers: got sampler 'heum' .did you mean 'heun'"),
        ("eval__teacher_samplers", (4,), "eval.teacher_samplers: got .4,., expected texts, such as"),
        ("eval__teacher_samplers", ("heun:grid=karras,sigma_min=2e3,sigma_max=3e3",), "a range that meets that of the"),
        ("eval__teacher_samplers", ("ddim:guidance=1",), "'ddim:guidance=1': guidance: got 1.0, expected 0.0 because"),
        ("eval__teacher_samplers", ("consistency",), "samplers: got 'consistency', expected a sampler of diffusion"),
        ("eval__labels", "random", "config.eval.labels: got 'random', expected one of balanced, uniform"),
        ("eval__network", "inceptoin", "config.eval.network: got 'inceptoin' .did you mean 'inception'"),
        ("eval__network", "lpips", "config.eval.network: got 'lpips', expected one of classifier, pixels, inc"),
        ("eval__precision", "float16", "config.eval.precision: got 'float16'.*, expected one of float32, bfloat16"),
        ("objective__multiscale", (8, 3), "config.objective.multiscale: got 3, expected divisors of .*resolution = 8"),
        ("objective__teacher_steps__start", 0.0, "config.objective.teacher_steps.start: got 0.0, expected"),
        ("model__head_dim", 0, "config.model.head_dim: got 0, expected a whole number of at least 1"),
        ("model__patch_size", 0, "config.model.patch_size: got 0, expected a whole number of at least 1"),
        ("model__logsnr_input", "inv_cos", "config.model.logsnr_input: got inv_cos, expected the teacher's linear"),
        ("model__attention", "splahs", "config.model.attention: got 'splahs' .did you mean 'splash'"),
        ("model__attention", "splash", "got attention 'splash' for 16 tokens of float32 with head_dim=32, expected"),
        ("optimizer__b2", 1.5, "optimizer.b2: got 1.5, expected a number from 0 and below 1.0"),
        ("optimizer__learning_rate", 0.0, "optimizer.learning_rate: got 0.0, expected a number above 0"),
        ("optimizer__clip_norm", 0.0, "optimizer.clip_norm: got 0.0, expected a number above 0, or None"),
        ("teacher__guidance", 1.0, "config.teacher.guidance: got 1.0, expected 0.0 because 'digits_teacher' was"),
        ("ema__decay", 1.0, "config.ema.decay: got 1.0, expected a number of at least 0.0 and below 1.0"),
        ("model", None, "config.model: got None, expected a section"),
        ("teacher", None, "config.teacher: got None"),
        ("teacher__config", "configs/absent.py", "got config file 'configs/absent.py'"),
        ("teacher__config", "configs/digits_cd4.py", "got 'digits_cd4', expected the config of a diffusion model"),
        # The student starts from the teacher's weights, which mean nothing under another schedule.
        ("schedule__shift", 1.0, "config.schedule: got .* expected the teacher's"),
        ("prediction", "x", "config.prediction: got x, expected the teacher's v"),
        ("prediction", "consistency", "config.prediction: got consistency, expected the teacher's v"),
        ("model__guidance_input", True, "config.model.guidance_input: got True, expected False because"),
    ],
)
def test_an_impossible_value_is_refused(path, value, sentence):
    """One sentence with the path of the key, what was got and what was expected."""
    with pytest.raises(ConfigError, match=sentence):
        build(_changed("configs/digits_cd2.py", **{path: value}))


@pytest.mark.parametrize(
    ("name", "path", "value", "sentence"),
    [
        ("digits_pd", "objective__phase_steps", (64, 16), "got 16 steps after 64, expected half of them"),
        ("digits_pd", "objective__phase_steps", (64,), r"phase_steps: got \(64,\), expected the teacher's steps"),
        ("digits_pd", "objective__phase_steps", (8, 8), r"phase_steps: got \(8, 8\), expected .* each a divisor"),
        ("digits_tract4", "objective__phase_steps", (256, 48), "each a divisor of the one before"),
        ("digits_tract4", "objective__num_steps_before", (1, 2), "expected None, or .* each of the 1 phases before"),
        ("digits_tract4", "objective__self_teacher_decay", 1.0, "self_teacher_decay: got 1.0, expected a number"),
        ("digits_tract4", "objective__solver__name", "euler", "solver.name: got 'euler'.*, expected one of addim, cl"),
        ("digits_pd", "objective__solver__x_var", 0.5, "solver.x_var: nothing reads this key"),
        ("digits_pd", "objective__distance", "l2", "objective.distance: got 'l2', expected one of v_mse, trunc"),
        ("digits_cm_ct", "objective__grid__name", "edm", "grid.name: got 'edm', expected one of constant, cm, ict"),
        ("digits_cm_ct", "objective__grid__start", 1, "got start=1 and end=20 grid points, expected 2 <= start"),
        ("digits_cm_ct", "objective__solver", {"name": "heun"}, "objective.solver: nothing reads this key"),
        ("digits_cm_cd", "teacher", None, "config.teacher: got None, expected a section naming the diffusion model"),
        ("digits_cm_cd", "objective__weight", "two", "objective.weight: got 'two', expected one of one, inverse_gap"),
        ("digits_cm_cd", "objective__distance", {"name": "lpip"}, "name: got 'lpip' .did you mean 'lpips'"),
        ("digits_cm_cd", "objective__distance", {"name": "lpips", "weights": None}, "distance: got no key 'resize'"),
        ("digits_cm_cd", "objective__distance", _LPIPS | {"resize": None}, "resize: got None for images of 8 pixels"),
        ("digits_cm_cd", "objective__distance", _LPIPS | {"resize": 15}, "resize: got 15 .* of 16 pixels at least"),
        ("digits_cm_cd", "objective__distance", _LPIPS | {"resize": 64.0}, "resize: got 64.0 .* a whole number"),
        ("digits_cm_cd", "objective__distance", _LPIPS | {"pooling": "mean"}, "pooling: got 'mean', expected one of"),
        ("digits_cm_cd", "objective__distance", _LPIPS | {"precision": "half"}, "precision: got 'half', expected"),
        ("digits_cm_cd", "objective__distance", _LPIPS | {"scale": 1.0}, "distance.scale: nothing reads this key"),
        ("digits_cm_cd", "objective__distance", None, "config.objective.distance: got None, expected a section"),
        ("digits_ict", "prediction", "v", "got 'v', expected one of edm, consistency with the schedule 'karras'"),
        ("digits_ict", "schedule__sigma_min", 0.0, "got sigma_min=0.0 and sigma_max=80.0, expected 0 < sigma_min"),
        ("digits_guided", "teacher__config", "configs/digits_teacher.py", "expected one that knows the null class"),
        ("digits_guided", "model__guidance_input", False, "guidance_input: got False, expected True because"),
        ("digits_guided_cd4", "objective__distil", False, "objective.distil: got False, expected True"),
        ("digits_guided", "objective__guidance_low", 5.0, "guidance_high: got 4.0, expected a number of at least 5.0"),
        ("digits_guided", "eval__teacher_samplers", ("addim:guidance=5",), "got 5.0, expected one weight from 0 to 4"),
        (
            "digits_guided_cd4",
            "eval__teacher_samplers",
            ("addim:guidance=1,guidance_low=-1",),
            "guidance: got 1.0 at some times, expected one weight from 0 to 4",
        ),
        ("digits_cm_cd", "eval__student_samplers", ("consistency:guidance=1",), "student_samplers: .* got 1.0, exp"),
        ("digits_cm_cd", "objective__grid__points", 1, "got points=1 of a grid, expected a whole number of at least 2"),
        ("digits_pd", "objective__solver", {"name": "addim", "x_var_frac": -1.0}, "solver.x_var_frac: got -1.0, expe"),
        ("digits_cd4", "eval__alignment", "digits", "eval.alignment: got 'digits', expected 'none' for a model of lab"),
    ],
)
def test_an_impossible_value_of_the_other_methods_is_refused(name, path, value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build(_changed(f"configs/{name}.py", **{path: value}))


def test_a_diffusion_model_has_no_teacher():
    """A teacher of a teacher would be ignored, so it is refused."""
    config = load("configs/digits_teacher.py")
    with config.unlocked():
        config.teacher = load("configs/digits_cd2.py").teacher
    with pytest.raises(ConfigError, match="config.teacher: got a teacher, expected None"):
        build(config)


def test_a_student_of_another_architecture_is_refused():
    """A student starts from the teacher's weights, so it has the teacher's shapes."""
    with pytest.raises(ConfigError, match="config.model: got shape .* expected the teacher's"):
        build(_changed("configs/digits_cd2.py", model__middle__width=64))


def test_an_attention_that_the_devices_cannot_run_is_refused_before_anything_is_computed():
    """The name, the device that is there, and what to do."""
    experiment = build(_changed("configs/imagenet64_teacher.py", model__attention="splash", mesh__fsdp=1))
    with pytest.raises(ConfigError, match="'imagenet64_teacher': got attention 'splash' on 'cpu', expected a TPU"):
        experiment.train_steps()


def test_a_teacher_has_the_attention_of_its_student():
    """It runs on the same devices."""
    experiment = build(_changed("configs/digits_cd2.py", model__attention="xla"))
    assert experiment.teacher.experiment.model.attention == "xla"


def test_a_preconditioned_teacher_has_the_schedule_of_its_student():
    """It is the same function on any; another prediction is refused above."""
    experiment = build(_changed("configs/digits_tract_edm1.py", schedule__rho=5.0))
    teacher = experiment.teacher.experiment
    assert teacher.config["schedule"] == experiment.config["schedule"] != load("configs/digits_edm.py").schedule
    np.testing.assert_array_equal(teacher.schedule(jnp.ones(3) / 2), experiment.schedule(jnp.ones(3) / 2))


def test_a_teacher_has_the_data_of_its_student():
    """An override of the data is said once, and both are trained on the same images."""
    experiment = build(_changed("configs/digits_cd2.py", data__num_classes=7, data__path="photos"))
    assert experiment.data == experiment.teacher.experiment.data
    assert experiment.teacher.experiment.model.num_classes == 7


def test_the_data_must_be_what_the_config_says():
    """The sizes in the config and in the data set agree, or the error says both."""
    experiment = build(_changed("configs/digits_teacher.py", data__num_classes=11))
    with pytest.raises(ConfigError, match="config.data.num_classes: got 11, expected 10"):
        experiment.data.open()
    with pytest.raises(ConfigError, match="config.data: "):
        build(_changed("configs/digits_teacher.py", data__name="digitz")).data.open()
    assert len(np.unique(build(load("configs/digits_teacher.py")).data.open().labels)) == 10
