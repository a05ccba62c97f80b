"""What the project set itself for the CPU before it had code, beside what is reached: the tables of bench/notes/limits.md."""

from __future__ import annotations

from dataclasses import dataclass

from bench.records import Record, timed
from bench.tables import ours, percentage

MACHINE = "amd-epyc-2c"
"""Where the goals were set; records of other machines leave the page as it is."""


@dataclass(frozen=True)
class Goal:
    """A speed-up, and the share of the floor in percent where one was asked for."""

    case: str
    speed_up: float
    floor: int | None = None


PRODUCTS = (
    Goal("ggn-v1-regression-n1000", 3.4, 70),
    Goal("ggn-v8-regression-n1000", 3.6, 70),
    Goal("ggn-v1-classifier-n4096", 4, 85),
    Goal("ggn-v8-classifier-n4096", 3.1, 85),
    Goal("ggn-v1-lenet-n512", 8, 65),
    Goal("ggn-v8-lenet-n512", 8, 65),
    Goal("ggn-v1-resnet20-n128", 2.5, 75),
    Goal("ggn-v8-resnet20-n128", 2.6, 75),
    Goal("ggn-v1-gpt-n16", 3, 70),
    Goal("ggn-v8-gpt-n16", 3, 70),
)
RETRAINING = Goal("retrain-v20-retrained-n1280", 5)
PER_EXAMPLE = ("grads", "norms", "dots-v8", "gram")
NETWORKS = ("regression", "classifier", "lenet")


def goals(records: list[Record]) -> str:
    """Both tables; a case without a record has no row, or a dash."""
    known = {record["case"]: record for record in records}
    lines = [
        "| row | asked | reached | against `linearize` too | floor asked | floor reached | a floor of 100 % |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(_row(goal, known[goal.case]) for goal in (*PRODUCTS, RETRAINING) if goal.case in known),
        "",
        "| N = 256 | gradients: vmap, compiled | norms | dots, V = 8 | Gram matrix |",
        "|---|--:|--:|--:|--:|",
        *(_per_example(name, known) for name in NETWORKS),
    ]
    return "\n".join(lines)


def _row(goal: Goal, record: Record) -> str:
    mine = ours(record)
    vectors = "" if goal is RETRAINING else f", V = {record['num_vectors']}"
    label = f"{record['title'] if goal is RETRAINING else record['workload']}, N = {record['num_examples']}{vectors}"
    named = [c["median"] for c in record["contenders"] if not c["ours"] and "median" in c and _was_named(goal, c["name"])]
    reached = "–" if mine is None or not named else f"{min(named) / mine['median']:.2f} ×"
    floor = f"{min(named) / record['floor']['seconds']:.1f} ×" if named and record["floor"] else "–"
    everyone = f"{record['ratio']:.2f} ×" if record["ratio"] else "–"
    asked = f"{goal.floor} %" if goal.floor else "–"
    return f"| {label} | {goal.speed_up:g} × | {reached} | {everyone} | {asked} | {percentage(record['percent_of_floor'])} | {floor} |"


def _was_named(goal: Goal, contender: str) -> bool:
    """Products were asked for against torch.func, torch.compile and curvlinops, retraining against plain PyTorch one by one."""
    return contender == "plain PyTorch" if goal is RETRAINING else not contender.startswith("torch.func.linearize")


def _per_example(network: str, known: dict[str, Record]) -> str:
    found = {quantity: known.get(f"{quantity}-{network}-n256") for quantity in PER_EXAMPLE}
    label = next((r["workload"] for r in found.values() if r), network)
    gradients = ", ".join(_ratio(found["grads"], peer) for peer in ("torch.func, vmap", "torch.compile, vmap"))
    return f"| {label} | {gradients} | {' | '.join(_ratio(found[q], 'torch.func, vmap') for q in PER_EXAMPLE[1:])} |"


def _ratio(record: Record | None, peer: str) -> str:
    mine, other = (ours(record), timed(record, peer)) if record else (None, None)
    return f"{other['median'] / mine['median']:.1f} ×" if mine and other else "–"
