"""Samplers as configs, flags and tables name them: a name with options, and a number of steps.

    ddim    ddim:eta=0.5    heun:grid=karras,s_churn=40    addim:guidance=0.5,clip=static    consistency:sigmas=2.5/0.8

What a text leaves out has the default below. A text is printed in one way only, without defaults, so that equal
samplers are equal texts. sigma means sigma / alpha, in units of the data; guidance_low and guidance_high are log-SNR.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mscm.config import ConfigError, nearest
from mscm.diffusion import denoiser as denoisers
from mscm.diffusion import sampler as samplers
from mscm.diffusion import schedule as schedules
from mscm.types import Denoiser, Images, Keys, Schedule

Sample = Callable[[Denoiser, Schedule, Images, Keys], Images]

CLIPS: dict[str, Callable[[Denoiser], Denoiser]] = {
    "none": lambda denoiser: denoiser,
    "static": denoisers.clipped,
    "dynamic": denoisers.dynamically_clipped,
}
MAX_STEPS = 100_000  # float32 tells so many times apart
_VARIANCES = {"small": 0.0, "large": 1.0}


class Plan(NamedTuple):
    """A sampler on a schedule: its function, and the times at which that asks the denoiser, in order."""

    sample: Sample
    evaluated: samplers.Grid


class Option(NamedTuple):
    """Of a sampler's text: `name=value`."""

    default: Any
    expected: str
    parse: Callable[[str], Any]  # ValueError: the text is not what is expected
    needs: str | None = None  # an option without which this one would do nothing


def number(
    default: float,
    *,
    above: float | None = None,
    least: float = -math.inf,
    most: float = math.inf,
    needs: str | None = None,
) -> Option:
    """An option whose value is a number: above `above`, or from `least` to `most`."""
    if above is not None:
        limits = f" above {above:g}"
    else:
        limits = f" from {least:g}" * (least > -math.inf) + f" to {most:g}" * (most < math.inf)

    def parse(text: str) -> float:
        value = float(text)
        is_number = math.isfinite(value) or value == default
        if not (is_number and least <= value <= most and (above is None or value > above)):
            raise ValueError
        return value

    return Option(default, f"a number{limits}", parse, needs)


def choice(default: str, choices: tuple[str, ...]) -> Option:
    """An option whose value is one of `choices`."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return Option(default, f"one of {', '.join(choices)}", parse)


def _parse_variance(text: str) -> float:
    value = _VARIANCES[text] if text in _VARIANCES else float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def _parse_sigmas(text: str) -> tuple[float, ...]:
    sigmas = tuple(float(part) for part in text.split("/"))
    if not all(0 < low < high for high, low in zip((math.inf, *sigmas), sigmas, strict=False)):
        raise ValueError
    return sigmas


OPTIONS_OF_ALL = {
    "guidance": number(0.0, least=0.0),
    "guidance_low": number(-math.inf, needs="guidance"),
    "guidance_high": number(math.inf, needs="guidance"),
    "clip": choice("none", tuple(CLIPS)),
}
GRID_OPTIONS = {
    "grid": choice("uniform", ("uniform", "karras")),
    "sigma_min": number(0.002, above=0.0, needs="grid"),
    "sigma_max": number(80.0, above=0.0, needs="grid"),
    "rho": number(7.0, above=0.0, needs="grid"),
} | OPTIONS_OF_ALL


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """A sampler and its number of steps.

    Raises:
      ConfigError: a name, an option or a value that is not there, or less than one step.
    """

    sampler: str  # its text, printed in the one way
    num_steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", _print(*_parse(self.sampler)))
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise ConfigError(f"num_steps: got {self.num_steps}, expected at least 1 and at most {MAX_STEPS}")
        own = own_steps(self.sampler)
        if own not in (None, self.num_steps):
            raise ConfigError(
                f"num_steps: got {self.num_steps}, expected {own} for {self.sampler!r}: one, and one for each of sigmas"
            )

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "SamplerSpec":
        """The sampler of a row of scores."""
        return cls(row["sampler"], row.get("num_steps", row["nfe"]))

    def __str__(self) -> str:
        return f"{self.sampler} {steps_in_words(self.num_steps)}"

    @property
    def file_name(self) -> str:
        """The same in letters that a file name may have."""
        return f"{re.sub(r'[^a-z0-9_.-]', '-', self.sampler)}_{self.num_steps}"

    @property
    def name(self) -> str:
        """Without the options."""
        return self.sampler.partition(":")[0]

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        """Of all options, the defaults too."""
        name, given = _parse(self.sampler)
        return {key: given.get(key, option.default) for key, option in SAMPLERS[name].options.items()}

    @property
    def guidance(self) -> float:
        """Classifier-free guidance; 0 is none."""
        return self._values["guidance"]

    def guided(self, weight: float) -> "SamplerSpec":
        """The same with this weight of guidance."""
        name, given = _parse(self.sampler)
        return SamplerSpec(_print(name, given | {"guidance": weight}), self.num_steps)

    @property
    def is_plain_ddim(self) -> bool:
        """Whether it is Algorithm 2, but for clipping and for the weight that a guided student takes as an input."""
        return self.name == "ddim" and not _parse(self.sampler)[1].keys() - {"clip", "guidance"}

    def clip(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser under the sampler's policy of clipping."""
        return CLIPS[self._values["clip"]](denoiser)

    def guided_times(self, schedule: Schedule) -> tuple[float, float] | None:
        """First and last time with guidance; None: all."""
        low, high = self._values["guidance_low"], self._values["guidance_high"]
        if (low, high) == (-math.inf, math.inf):
            return None
        noisiest, cleanest = schedules.logsnr_range(schedule)
        if not max(low, noisiest) <= min(high, cleanest):
            raise ConfigError(
                f"sampler {self.sampler!r}: got an interval of guidance without any log-SNR of the schedule, "
                f"{noisiest:.4g} to {cleanest:.4g}"
            )
        first, last = schedules.times_of_logsnr(schedule, np.array([high, low], np.float32))
        return float(first), float(last)

    def plan(self, schedule: Schedule) -> Plan:
        """What it does on a schedule.

        Raises:
          ConfigError: the schedule does not have its noise levels.
        """
        return _plan(self, schedule)

    def num_evaluations(self, schedule: Schedule, *, guided: bool = False) -> int:
        """NFE: forward passes of the network for one image; `guided`: of a denoiser that itself takes two."""
        times = self.plan(schedule).evaluated
        if guided or not self.guidance:
            return len(times) * (2 if guided else 1)
        first, last = self.guided_times(schedule) or (0.0, 1.0)
        return len(times) + int(np.sum((first <= times) & (times <= last)))

    def _times(self, schedule: Schedule) -> samplers.Grid:
        values = self._values
        if self.name == "consistency":
            logsnr = -2 * np.log(np.float64(values["sigmas"]))
            noisiest, cleanest = schedules.logsnr_range(schedule)
            if not all(noisiest < number < cleanest for number in logsnr):
                least, most = math.exp(-cleanest / 2), math.exp(-noisiest / 2)
                raise ValueError(f"got sigmas beyond the schedule, expected numbers from {least:.4g} to {most:.4g}")
            return np.append(np.float32(1), schedules.times_of_logsnr(schedule, logsnr.astype(np.float32)))
        if values["grid"] == "uniform":
            return samplers.uniform_times(self.num_steps)
        return samplers.karras_times(
            schedule, self.num_steps, **{key: values[key] for key in ("sigma_min", "sigma_max", "rho")}
        )


@functools.lru_cache(maxsize=256)  # every row of scores asks for its NFE
def _plan(spec: SamplerSpec, schedule: Schedule) -> Plan:
    try:
        return SAMPLERS[spec.name].plan(schedule, spec._times(schedule), spec._values)
    except ValueError as error:
        raise ConfigError(f"sampler {spec.sampler!r}: {error}") from error


def steps_in_words(num_steps: int) -> str:
    """1 step, 2 steps."""
    return f"{num_steps} step" + "s" * (num_steps != 1)


def line_of(sampler: str) -> str:
    """The text without the option that says how many steps there are: samplers of one line over their number.

    It need not be that of a sampler which is known here.
    """
    name, _, options = sampler.partition(":")
    kept = ",".join(option for option in options.split(",") if not option.startswith("sigmas="))
    return f"{name}:{kept}" if kept else name


def own_steps(sampler: str) -> int | None:
    """The number of steps that the text of a sampler decides; None: any will do.

    Raises:
      ConfigError: as `SamplerSpec`.
    """
    name, given = _parse(sampler)
    return 1 + len(given.get("sigmas", ())) if name == "consistency" else None


def _parse(sampler: str) -> tuple[str, dict[str, Any]]:
    """Name, and the options that are not the default, in the order of their table."""
    name, colon, rest = sampler.partition(":")
    if name not in SAMPLERS:
        raise ConfigError(f"got sampler {name!r}{nearest(name, SAMPLERS)}, expected one of {', '.join(SAMPLERS)}")
    options, given = SAMPLERS[name].options, {}
    for part in rest.split(",") if colon else ():
        key, equals, text = part.partition("=")
        if not equals or key in given:
            raise ConfigError(f"sampler {sampler!r}: got {part!r}, expected each option once, as option=value")
        if key not in options:
            raise ConfigError(
                f"sampler {sampler!r}: got option {key!r}{nearest(key, options)}, expected one of {', '.join(options)}"
            )
        try:
            given[key] = options[key].parse(text)
        except ValueError as error:
            raise ConfigError(f"sampler {sampler!r}: got {key}={text}, expected {options[key].expected}") from error
    values = {key: given[key] for key, option in options.items() if given.get(key, option.default) != option.default}
    for key in given:
        if options[key].needs not in (None, *values):
            raise ConfigError(f"sampler {sampler!r}: got {key} without {options[key].needs}, expected both or neither")
    for low, high in (("sigma_min", "sigma_max"), ("s_min", "s_max"), ("guidance_low", "guidance_high")):
        if low in options and values.get(low, options[low].default) >= values.get(high, options[high].default):
            raise ConfigError(f"sampler {sampler!r}: got {low} that is not below {high}")
    return name, values


def _print(name: str, values: dict[str, Any]) -> str:
    options = ",".join(f"{key}={_print_value(key, value)}" for key, value in values.items())
    return f"{name}:{options}" if options else name


def _print_value(key: str, value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(_print_value(key, entry) for entry in value)
    if key == "variance":
        return {number: text for text, number in _VARIANCES.items()}.get(value, repr(value))
    return value if isinstance(value, str) else repr(value).removesuffix(".0")


def _plan_ddim(schedule: Schedule, times: samplers.Grid, values: dict[str, Any]) -> Plan:
    if not values["eta"]:
        return Plan(functools.partial(samplers.ddim, times=times), times)
    return Plan(functools.partial(samplers.stochastic_ddim, times=times, eta=values["eta"]), times)


def _plan_ancestral(schedule: Schedule, times: samplers.Grid, values: dict[str, Any]) -> Plan:
    return Plan(functools.partial(samplers.ancestral, times=times, log_variance_mix=values["variance"]), times)


def _plan_heun(schedule: Schedule, times: samplers.Grid, values: dict[str, Any]) -> Plan:
    raised, sample = times, functools.partial(samplers.heun, times=times)
    if values["s_churn"]:
        raised = samplers.churned_times(schedule, times, **{key: values[key] for key in ("s_churn", "s_min", "s_max")})
        sample = functools.partial(samplers.churned_heun, times=times, raised=raised, s_noise=values["s_noise"])
    return Plan(sample, np.stack([raised, np.roll(times, -1)], axis=1).ravel()[:-1])


def plain(sample: Callable[..., Images]) -> Callable[..., Plan]:
    """The plan of a sampler that asks the denoiser once at each of `times`, and takes nothing else."""
    return lambda schedule, times, values: Plan(functools.partial(sample, times=times), times)


class Kind(NamedTuple):
    """A sampler: its plan for times on a schedule and values of its options."""

    plan: Callable[[Schedule, samplers.Grid, dict[str, Any]], Plan]
    options: dict[str, Option] = GRID_OPTIONS


SAMPLERS: dict[str, Kind] = {
    "ddim": Kind(_plan_ddim, {"eta": number(0.0, least=0.0, most=1.0)} | GRID_OPTIONS),
    "addim": Kind(plain(samplers.addim)),
    "noisy_ddim": Kind(plain(samplers.noisy_ddim)),
    "ancestral": Kind(
        _plan_ancestral,
        {"variance": Option(0.0, "small, large, or a number from 0 to 1 between them", _parse_variance)} | GRID_OPTIONS,
    ),
    "heun": Kind(
        _plan_heun,
        {
            "s_churn": number(0.0, least=0.0),
            "s_min": number(0.0, least=0.0, needs="s_churn"),
            "s_max": number(math.inf, least=0.0, needs="s_churn"),
            "s_noise": number(1.0, above=0.0, needs="s_churn"),
        }
        | GRID_OPTIONS,
    ),
    "dpm_solver_pp_2m": Kind(plain(samplers.dpm_solver_pp_2m)),
    "consistency": Kind(
        plain(samplers.consistency),
        {"sigmas": Option((), "falling numbers above 0, such as 2.5/0.8", _parse_sigmas)} | OPTIONS_OF_ALL,
    ),
}
