"""The paper's settings as plans: what fits, what bounds the speed, and the speed that the paper reports.

  python benchmarks/plan_table.py --json=runs/plan_table.json

ImageNet 64 and 128, consistency training and distillation, small on 64 and large on 256 TPU v5e chips, and text to
image on 256; global batch 2048 (arXiv:2403.06807v3). Needs pip install -e .[aot] and no TPU; each setting compiles
for minutes. Results are kept in --json as they come, and a setting that is there is not compiled again; --setting
chooses some of them.
"""

import dataclasses
import json
import os

from absl import app, flags, logging

from mscm import atomic
from mscm.config import load_config
from mscm.cost import chips
from mscm.planning import plan_for
from mscm.report.table import format_table

# Steps per second of the paper, its section on compute; None: it says none.
PAPER: dict[str, float | None] = {
    "imagenet64_ct8": 2.7,
    "imagenet64_cd8": 2.5,
    "imagenet128_ct8": 2.2,
    "imagenet128_cd8": 1.7,
    "imagenet64_ct8:large": 2.9,
    "imagenet64_cd8:large": 2.5,
    "imagenet128_ct8:large": 2.2,
    "imagenet128_cd8:large": 1.8,
    "t2i512_teacher": None,
    "t2i512_cd8": 0.71,
}
HEADER = (
    "setting", "topology", "HBM (GiB)", "model FLOPs (P)", "shares", "traffic (GB)", "sent (GB)",
    "compute (ms)", "memory (ms)", "interconnect (ms)", "steps/s at most", "paper's", "utilisation in the paper",
)  # fmt: skip

JSON = flags.DEFINE_string("json", "plan_table.json", "File that keeps the plans by setting.")
SETTING = flags.DEFINE_multi_enum("setting", list(PAPER), list(PAPER), "Settings to plan.")


def topology(setting: str) -> str:
    """The paper's number of chips."""
    return "v5e:16x16" if setting.endswith(":large") or setting.startswith("t2i512") else "v5e:8x8"


def row(setting: str, plan: dict) -> list:
    """One line of the table; of a program that does not fit only what is known without compiling it."""
    peak = plan["peak_hbm_bytes"]
    known = [setting, plan["topology"], None if peak is None else peak / 2**30, plan["model_flops_per_step"] / 1e15]
    flops = plan["num_devices"] * chips.chip_of(plan["topology"]).flops
    rate = PAPER[setting]
    paper = [rate, None if rate is None else f"{100 * rate * plan['model_flops_per_step'] / flops:.0f}%"]
    if not plan["fits"]:
        return [*known, *[None] * 6, "does not fit", *paper]
    sent = sum(messages["sent_bytes"] for messages in plan["collectives"].values())
    share = plan["executed_flops_per_step"] / plan["num_devices"]
    costs = [plan["device_flops_per_step"] / share, plan["bytes_per_step"] / 1e9, sent / 1e9]
    times = [1e3 * plan["seconds_at_least"][part] for part in ("compute", "memory", "interconnect")]
    return [*known, *costs, *times, plan["steps_per_second_bound"], *paper]


def main(_: list[str]) -> None:
    """Compiles what is missing, prints the table."""
    plans = {}
    if os.path.exists(JSON.value):
        with open(JSON.value, encoding="utf-8") as file:
            plans = json.load(file)
    for setting in SETTING.value:
        if setting not in plans:
            logging.info("Compiling %s", setting)
            name, _, variant = setting.partition(":")
            config = load_config(f"configs/{name}.py:{variant}" if variant else f"configs/{name}.py")
            plans[setting] = dataclasses.asdict(plan_for(config, topology(setting)))
            atomic.write_text(os.path.abspath(JSON.value), json.dumps(plans, indent=2) + "\n")
    print(format_table(HEADER, [row(setting, plans[setting]) for setting in SETTING.value]))


if __name__ == "__main__":
    app.run(main)
