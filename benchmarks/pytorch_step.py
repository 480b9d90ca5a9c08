"""A consistency distillation step on the CPU against the same network and step in PyTorch.

  pip install -e .[dev,benchmark]
  python benchmarks/pytorch_step.py

Three settings: the digits; the small CIFAR-10 network on images of 64 pixels, as the README trains one's own images;
and that of configs/imagenet64_cd8.py with a quarter of the channels, fewer blocks and a batch that two cores can bear,
in float32. In PyTorch images are channels-last, attention is its fused kernel, Adam and the average are its fused and
batched ones; once eager and once with its compiler (which needs one for C++). Before anything is timed, both get the
same parameters, images, noise and times, and must give the same loss and the same gradient. Turn by turn, because a
shared machine's speed drifts.
"""

import copy
import functools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from absl import app, flags
from torch import Tensor, nn

from mscm.config import load_config
from mscm.experiment import build
from mscm.objectives import multistep_consistency as ours
from mscm.planning import random_inputs
from mscm.report.table import format_table

_STAGES = "model.stages.stage_"
_QUARTER = {
    "train.batch_size": 8, "mesh.fsdp": 1, f"{_STAGES}0.width": 64, f"{_STAGES}0.num_blocks": 2,
    f"{_STAGES}1.width": 128, f"{_STAGES}1.num_blocks": 2, "model.middle.width": 256, "model.middle.num_blocks": 4,
    "model.emb_dim": 256, "model.head_dim": 64, "model.dtype": "float32", "model.remat": None,
    "model.scan_blocks": False,
}  # fmt: skip

# Config file, and what is changed in it; the keys of its model are changed in its teacher too.
SETTINGS = {
    "digits": ("configs/digits_cd4.py", {}),
    "64 pixels, patches": ("configs/cifar10_cd4.py:small", {"data.resolution": 64}),
    "64 pixels, convolutions": ("configs/imagenet64_cd8.py", _QUARTER),
}

_TEACHER = """
from mscm.config import load_config

def get_config():
    config = load_config({config!r})
    config.update_from_flattened_dict({changes!r})
    return config
"""

SETTING = flags.DEFINE_multi_enum("setting", list(SETTINGS), list(SETTINGS), "Settings to measure.")
COMPILED = flags.DEFINE_bool("compiled", True, "Also measure torch.compile.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements of each; the table shows the medians.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 4.0, "Length of one measurement.")


class Embedding(nn.Module):
    """Of noise level and class."""

    def __init__(self, features: int, num_classes: int):
        super().__init__()
        self.time_in, self.time_out = nn.Linear(features, features), nn.Linear(features, features)
        self.classes = nn.Embedding(num_classes + 1, features)
        half = features // 2
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * (-math.log(10_000.0) / (half - 1))))

    def forward(self, logsnr: Tensor, labels: Tensor) -> Tensor:
        angles = 1000.0 * (logsnr[:, None] + 10.0) / 20.0 * self.frequencies
        emb = self.time_in(torch.cat([angles.sin(), angles.cos()], dim=-1))
        return self.time_out(F.silu(emb)) + self.classes(labels)


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of images; the permutations move nothing where these are channels-last."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with FiLM between them."""

    def __init__(self, width: int, emb_dim: int, dropout: float, *, has_skip: bool):
        super().__init__()
        self.norm_in, self.norm_film = PixelNorm(width), PixelNorm(width)
        self.norm_skip = PixelNorm(width) if has_skip else None
        self.conv_in, self.conv_out = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.film, self.dropout = nn.Linear(emb_dim, 2 * width), nn.Dropout(dropout)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.norm_in(x)
        if skip is not None:
            h = (h + self.norm_skip(skip)) * math.sqrt(0.5)
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm_film(self.conv_in(F.silu(h))) * (1.0 + scale) + shift
        return x + self.conv_out(self.dropout(F.silu(h)))


class TransformerBlock(nn.Module):
    """An MLP with FiLM on its hidden layer, then attention."""

    def __init__(self, width: int, emb_dim: int, head_dim: int, mlp_ratio: int, dropout: float):
        super().__init__()
        hidden, self.head_dim = mlp_ratio * width, head_dim
        self.norm_mlp, self.norm_attention = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.mlp_in, self.mlp_out = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.film, self.dropout = nn.Linear(emb_dim, 2 * hidden), nn.Dropout(dropout)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.LayerNorm(head_dim, eps=1e-6), nn.LayerNorm(head_dim, eps=1e-6, bias=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(emb)[:, None].chunk(2, dim=-1)
        h = F.silu(self.mlp_in(self.norm_mlp(x))) * (1.0 + scale) + shift
        x = x + self.mlp_out(self.dropout(h))
        b, n, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).reshape(b, n, -1, 3 * self.head_dim).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return x + self.attention_out(h.transpose(1, 2).reshape(b, n, width))


class ResidualStage(nn.Module):
    """Residual blocks; gives all outputs."""

    def __init__(self, spec: Mapping, model: Mapping, *, has_skips: bool):
        super().__init__()
        for i in range(spec["num_blocks"]):
            block = ResidualBlock(spec["width"], model["emb_dim"], spec["dropout"], has_skip=has_skips)
            self.add_module(f"block_{i}", block)

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor] | None = None) -> list[Tensor]:
        outputs = []
        for i, block in enumerate(self.children()):
            x = block(x, emb) if skips is None else block(x, emb, skips[-1 - i])
            outputs.append(x)
        return outputs


class TransformerStage(nn.Module):
    """Position embedding and transformer blocks."""

    def __init__(self, spec: Mapping, model: Mapping, side: int):
        super().__init__()
        width, sizes = spec["width"], (model["emb_dim"], model["head_dim"], model["mlp_ratio"])
        for i in range(spec["num_blocks"]):
            self.add_module(f"block_{i}", TransformerBlock(width, *sizes, spec["dropout"]))
        self.position = nn.Parameter(torch.zeros(side, side, width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = (x.permute(0, 2, 3, 1) + self.position).reshape(b, h * w, c)
        for block in self.children():
            tokens = block(tokens, emb)
        return tokens.reshape(b, h, w, c).permute(0, 3, 1, 2)


class UViT(nn.Module):
    """The network of `mscm.models.uvit`, with modules and parameters of the same names."""

    def __init__(self, model: Mapping, data: Mapping):
        super().__init__()
        self.stages, self.patch_size = list(model["stages"].values()), model["patch_size"]
        levels = [*self.stages, model["middle"]]
        side, channels = data["resolution"] // self.patch_size, data["channels"] * self.patch_size**2
        self.condition = Embedding(model["emb_dim"], data["num_classes"])
        self.conv_in = nn.Conv2d(channels, levels[0]["width"], 3, padding=1)
        for i, stage in enumerate(self.stages):
            for name in (f"down_{i}", f"up_{i}"):
                is_residual = stage["kind"] == "residual"
                self.add_module(
                    name,
                    ResidualStage(stage, model, has_skips=name.startswith("up"))
                    if is_residual
                    else TransformerStage(stage, model, side),
                )
            self.add_module(f"down_{i}_out", nn.Conv2d(stage["width"], levels[i + 1]["width"], 1))
            self.add_module(f"up_{i}_in", nn.Conv2d(levels[i + 1]["width"], stage["width"], 1))
            side //= 2
        self.middle = TransformerStage(model["middle"], model, side)
        self.norm_out = PixelNorm(levels[0]["width"])
        self.conv_out = nn.Conv2d(levels[0]["width"], channels, 3, padding=1)

    def forward(self, z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        p, emb = self.patch_size, self.condition(logsnr, labels)
        # Our patches are pixels before channels.
        b, c, h, w = z.shape
        x = z.reshape(b, c, h // p, p, w // p, p).permute(0, 3, 5, 1, 2, 4).reshape(b, p * p * c, h // p, w // p)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for i in range(len(self.stages)):
            outputs = getattr(self, f"down_{i}")(x, emb)
            skips.append(outputs)
            x = outputs[-1] if isinstance(outputs, list) else outputs
            x = getattr(self, f"down_{i}_out")(F.avg_pool2d(x, 2))
        x = self.middle(x, emb)
        for i in reversed(range(len(self.stages))):
            x = F.interpolate(getattr(self, f"up_{i}_in")(x), scale_factor=2)
            up = getattr(self, f"up_{i}")
            is_residual = isinstance(skips[i], list)
            x = up(x, emb, skips[i])[-1] if is_residual else up((x + skips[i]) * math.sqrt(0.5), emb)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return x.reshape(b, p, p, c, h // p, w // p).permute(0, 3, 4, 1, 5, 2).reshape(b, c, h, w)

    def load(self, params: Mapping) -> "UViT":
        """Takes the parameters of the JAX network."""
        state = dict(self.named_parameters())
        for path, value in jax.tree.leaves_with_path(params):
            *module, leaf = (key.key for key in path)
            value = np.asarray(value)
            name = ".".join([*module, {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)])
            target = state.pop(name)
            if leaf == "kernel":
                value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
            target.data.copy_(torch.tensor(value).reshape(target.shape))
        if state:
            raise ValueError(f"got no value for {sorted(state)}, expected one for every parameter")
        return self


def logsnr_of(t: Tensor, schedule: Mapping) -> Tensor:
    """Cosine log-SNR, shifted or interpolated."""
    a, b = (math.atan(math.exp(-schedule[key] / 2)) for key in ("logsnr_max", "logsnr_min"))
    plain = -2.0 * torch.log(torch.tan(a + t * (b - a)))
    if schedule["name"] == "cosine":
        return plain + schedule["shift"]
    low, high = (2 * math.log(schedule[key] / schedule["resolution"]) for key in ("noise_low", "noise_high"))
    return plain + t * low + (1 - t) * high


class Level:
    """alpha, sigma and what follows from them, at one time for each example."""

    def __init__(self, t: Tensor, schedule: Mapping):
        self.logsnr = logsnr_of(t, schedule)
        logsnr = self.logsnr[:, None, None, None]
        self.alpha, self.sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
        self.angle = torch.atan2(self.sigma, self.alpha)

    def coefficient(self, other: "Level") -> Tensor:
        return torch.sin(self.angle - other.angle) / torch.sin(self.angle)


class Step:
    """A training step: student, teacher, Adam and average."""

    def __init__(self, setting: "Setting", params: Mapping, frozen: Mapping):
        self.config = config = setting.config
        self.objective = config["objective"]
        self.student, self.teacher = (
            UViT(config["model"], config["data"]).load(tree).to(memory_format=torch.channels_last)
            for tree in (params, frozen)
        )
        self.teacher.requires_grad_(False).eval()
        spec = config["optimizer"]
        self.adam = torch.optim.Adam(
            self.student.parameters(), betas=(spec["b1"], spec["b2"]), eps=spec["eps"], lr=0.0, fused=True
        )
        self.average = torch.optim.swa_utils.AveragedModel(
            self.student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config["ema"]["decay"])
        )
        self.rates, self.step = jax.vmap(setting.experiment.learning_rate)(jnp.arange(10_000)).tolist(), 0
        self.call_student, self.call_teacher = self.student, self.teacher

    def compiled(self) -> "Step":
        """A copy whose networks are compiled."""
        other = copy.deepcopy(self)
        other.adam = torch.optim.Adam(other.student.parameters(), **self.adam.defaults)
        other.call_student, other.call_teacher = (
            torch.compile(network, dynamic=False) for network in (other.student, other.teacher)
        )
        return other

    def x_hat(self, network: Callable[..., Tensor], z: Tensor, level: Level, labels: Tensor) -> Tensor:
        return level.alpha * z - level.sigma * network(z, level.logsnr, labels)

    def loss(self, x: Tensor, labels: Tensor, eps: Tensor, t: Tensor, s: Tensor, t_step: Tensor) -> Tensor:
        """One loss per example: Algorithm 1, with the target in the convex form."""
        at_t, at_s, at_step = (Level(time, self.config["schedule"]) for time in (t, s, t_step))
        is_first = (s == t_step)[:, None, None, None]
        z_t = at_t.alpha * x + at_t.sigma * eps
        masks = torch.get_rng_state()
        with torch.no_grad():
            x_teacher = self.x_hat(self.call_teacher, z_t, at_t, labels)
            x_var = self.objective["x_var_frac"] * (x_teacher - x).square().mean((1, 2, 3), keepdim=True)
            eps_teacher = (z_t - at_t.alpha * x_teacher) / at_t.sigma
            added = at_t.coefficient(at_s).square() * x_var / eps_teacher.square().mean((1, 2, 3), keepdim=True)
            correction = added / ((at_s.sigma.square() + added).sqrt() + at_s.sigma)
            z_s = at_t.coefficient(at_s) * x_teacher + at_s.sigma / at_t.sigma * z_t + correction * eps_teacher
            x_ref = self.x_hat(self.call_student, z_s, at_s, labels)
            shrink = torch.where(is_first, 1.0, at_step.sigma / at_s.sigma)
            to_step = at_t.coefficient(at_step)
            weight = torch.where(is_first, 1.0, shrink * at_t.coefficient(at_s) / to_step)
            target = (1 - weight) * x_ref + weight * x_teacher + shrink / to_step * correction * eps_teacher
        torch.set_rng_state(masks)  # the same units are dropped out in both calls of the student
        diff = self.x_hat(self.call_student, z_t, at_t, labels) - target
        epsilon = self.objective["huber_epsilon"]
        return ((diff / at_t.sigma).square().mean((1, 2, 3)) + epsilon**2).sqrt() - epsilon

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """One step on uint8 images."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        if self.config["data"]["flip"]:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        segments, grows = self.objective["student_steps"], self.objective["teacher_steps"]
        fraction = min(1.0, self.step / grows["anneal_steps"])
        per_segment = round(grows["start"] * (grows["end"] / grows["start"]) ** fraction / segments)
        start = per_segment * torch.randint(segments, (len(x),))
        end = start + torch.randint(1, per_segment + 1, (len(x),))
        times = (index / (per_segment * segments) for index in (end, end - 1, start))
        self.adam.zero_grad(set_to_none=True)
        self.loss(x, labels, torch.randn_like(x), *times).mean().backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.config["optimizer"]["clip_norm"])
        self.adam.param_groups[0]["lr"] = self.rates[self.step]
        self.adam.step()
        self.average.update_parameters(self.student)
        self.step += 1


class Setting:
    """An experiment with changes to its network and its teacher's; fields `config` and `experiment`."""

    def __init__(self, name: str, *, dropout: bool = True):
        path, changes = SETTINGS[name]
        self.config = load_config(path)
        if not dropout:  # masks of two libraries cannot be compared
            levels = ["middle", *(f"stages.{stage}" for stage in self.config.model.stages)]
            changes = changes | {f"model.{level}.dropout": 0.0 for level in levels}
        self.config.update_from_flattened_dict(changes)
        of_model = {key: value for key, value in changes.items() if key.startswith("model.")}
        with tempfile.TemporaryDirectory() as folder:
            teacher = os.path.join(folder, "teacher.py")
            with open(teacher, "w", encoding="utf-8") as file:
                file.write(_TEACHER.format(config=self.config.teacher.config, changes=of_model))
            self.config.teacher.config = teacher
            self.experiment = build(self.config)


def check_equal(setting: Setting) -> None:
    """The same loss and gradient for the same parameters, images, noise and times.

    Raises:
      AssertionError: they differ by more than float32 explains.
    """
    experiment, rng = setting.experiment, np.random.default_rng(0)
    spec, data, batch = setting.config.objective, experiment.data, 4
    initial = jax.device_get(experiment.init_params(jax.random.key(0)))
    params, frozen = (
        # Not as they are initialised: with the zeros at the end of each block nothing before them would matter.
        jax.tree.map(lambda a: (a + 0.02 * rng.standard_normal(a.shape)).astype(np.float32), initial)
        for _ in range(2)
    )
    x = rng.uniform(-1, 1, (batch, data.resolution, data.resolution, data.channels)).astype(np.float32)
    labels = rng.integers(0, data.num_classes, batch)
    key, steps = jax.random.key(1), dict(student_steps=spec.student_steps, teacher_steps=spec.teacher_steps.start)

    def loss(params: Mapping) -> jax.Array:
        student, teacher = experiment.denoiser(params, labels), experiment.denoiser(frozen, labels)
        losses, _ = ours.consistency_loss(student, teacher, experiment.schedule, x, key, **steps)
        return losses.mean()

    expected, gradient = jax.jit(jax.value_and_grad(loss))(params)
    k_eps, k_grid = jax.random.split(key)
    grid = ours.sample_grid(k_grid, batch, **steps)
    step = Step(setting, params, frozen)
    arrays = (x, jax.random.normal(k_eps, x.shape))
    images, noise = (torch.tensor(np.asarray(array)).permute(0, 3, 1, 2) for array in arrays)
    times = (torch.tensor(np.asarray(array)) for array in (grid.t, grid.s, grid.t_step))
    got = step.loss(images, torch.tensor(labels), noise, *times).mean()
    got.backward()
    np.testing.assert_allclose(got.item(), expected, rtol=1e-4)
    of_jax = UViT(setting.config.model, setting.config.data).load(gradient)
    for (name, parameter), other in zip(step.student.named_parameters(), of_jax.parameters(), strict=True):
        tolerance = 1e-3 * other.abs().max().item() + 1e-7
        np.testing.assert_allclose(parameter.grad, other.detach(), rtol=0, atol=tolerance, err_msg=name)


def runners(setting: Setting) -> dict[str, Callable[[], int]]:
    """By name, a function that takes some optimiser steps and says how many."""
    experiment = setting.experiment
    state, frozen, batch, key = random_inputs(experiment)
    step = Step(setting, *(jax.device_get(tree) for tree in (state.params, frozen.teacher)))
    images, labels = (torch.tensor(np.asarray(batch[name])).clone() for name in ("image", "label"))
    run_ours, num_steps = experiment.train_steps(), experiment.train.steps_per_dispatch

    def take_ours() -> int:
        nonlocal state
        state, _ = run_ours(state, frozen, batch, key)
        jax.block_until_ready(state)
        return num_steps

    def take(step: Step) -> int:
        for i in range(num_steps):
            step(images[i], labels[i].long())
        return num_steps

    steps = {"PyTorch": step} | ({"PyTorch, compiled": step.compiled()} if COMPILED.value else {})
    return {"mscm": take_ours} | {name: functools.partial(take, step) for name, step in steps.items()}


def seconds_per_step(run: Callable[[], int]) -> float:
    """Wall-clock time of one optimiser step."""
    started, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < SECONDS.value or steps == 0:
        steps += run()
    return passed / steps


def main(_: list[str]) -> None:
    """Checks, measures in turns, prints the table."""
    rows = []
    for name in SETTING.value:
        torch.compiler.reset()  # it gives up after eight versions of a function, and settings share theirs
        check_equal(Setting(name, dropout=False))
        setting = Setting(name)
        of_each = runners(setting)
        for run in of_each.values():
            run()  # compiles
        seconds = np.array([[seconds_per_step(run) for run in of_each.values()] for _ in range(ROUNDS.value)])
        for i, library in enumerate(of_each):
            ratio = statistics.median(seconds[:, 0] / seconds[:, i])
            ms = 1e3 * statistics.median(seconds[:, i])
            rows.append([name, setting.experiment.train.batch_size, library, f"{ms:.1f}", f"{ratio:.2f}"])
    print(format_table(["setting", "batch", "library", "ms per step", "mscm's time / its time"], rows))


if __name__ == "__main__":
    app.run(main)
