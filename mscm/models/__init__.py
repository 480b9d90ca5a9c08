"""Networks: Flax Linen modules with logical axis names; they know no schedule, loss or mesh."""
