"""DPM-Solver++(2S), arXiv:2211.01095: of second order, from an evaluation inside each step.

From z_t a DDIM step leads to the part r of the way to s, in log-SNR; x_hat there and x_hat at t are extrapolated:

  (1) D = (1 - 1 / (2 r)) x_hat(z_t, t) + 1 / (2 r) x_hat(z_m, m),  z_s = DDIM_{t->s}(D, z_t)

The last step returns x_hat as all samplers here do: NFE = 2n - 1.
"""

import functools
from typing import Any

import numpy as np

from mscm.diffusion import sampler, steps
from mscm.diffusion import schedule as schedules
from mscm.sampling import GRID_OPTIONS, SAMPLERS, Kind, Plan, number
from mscm.types import Denoiser, Images, Keys, Schedule


def dpm_solver_pp_2s(
    denoiser: Denoiser,
    schedule: Schedule,
    z_1: Images,
    keys: Keys | None = None,
    *,
    times: sampler.Grid,
    middles: sampler.Grid,
    r: float,
) -> Images:
    """Equation (1) between each two of `times`; `middles` are the times m."""
    del keys

    def step(z_t: Images, at: sampler.Step) -> Images:
        (m,) = at.entries
        x_t, lvl_m = denoiser(z_t, at.t), schedule(m)
        x_m = denoiser(steps.ddim(x_t, z_t, at.lvl_t, lvl_m), m)
        return steps.ddim(x_t + (x_m - x_t) / (2 * r), z_t, at.lvl_t, at.lvl_s)

    return sampler.run(step, denoiser, schedule, z_1, times, middles)


def plan(schedule: Schedule, times: sampler.Grid, values: dict[str, Any]) -> Plan:
    """The sampler at `times`, and the times at which it asks the denoiser: t, m, t, m, ..., t."""
    r = values["r"]
    logsnr = schedules.host_logsnr(schedule, times)
    middles = schedules.times_of_logsnr(schedule, (1 - r) * logsnr[:-1] + r * logsnr[1:])
    evaluated = np.stack([times, np.append(middles, 0)], axis=1).ravel()[:-1]
    return Plan(functools.partial(dpm_solver_pp_2s, times=times, middles=middles, r=r), evaluated)


SAMPLERS["dpm_solver_pp_2s"] = Kind(plan, {"r": number(0.5, least=0.1, most=1.0)} | GRID_OPTIONS)
