"""Which model and image size fit a latency limit: the candidates, the order in which they are tried, and the choice. Pure.

The limit is on the 95th percentile of one image as it is served: bytes of a file in, answer out, through goodfit.runtime
(decoding, scaling, network, softmax), batch 1, on the CPU with `latency_threads` threads. Random weights do: they do not
change what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from goodfit.config.catalogue import CATALOGUE, Pictures
from goodfit.core.errors import RequestError

MARGIN = 0.1  # of the limit that a choice leaves free: production is not as quiet as the measurement
REPEATS_TO = 0.05  # of the limit: how far two measurements of the same bundle may lie apart
# A candidate is passed over unmeasured if even this share of what another's figures let expect is too slow. Decoding and
# scaling took 2.3 ms for 160 pixels and 1.2 for 96 (JPEGs of 512 pixels, which are then decoded at half their size).
SLACK = 0.5
SLACK_SAME_MODEL = 0.8  # ... of the network's time at another image size, which follows the number of pixels
SIDE = 32  # pixels: image sizes are multiples of it
STEM_SCORE = 75.0  # of a network without ImageNet figures: for small pictures, before those whose stem is too coarse


def _tried(pictures: Pictures) -> tuple[tuple[str, float, float], ...]:
    """What a limit tries for such pictures, from the catalogue: model, order, and milliseconds of its network at 160 pixels.

    The second gives the order of preference, best first; the third only what is worth measuring: what is chosen was measured.
    """
    models = [model for model in CATALOGUE["classify"] if pictures in model.tried_for]
    made = [
        (m.name, m.top1 or STEM_SCORE, m.serving_ms * (160 / m.imgsz) ** 2 if m.imgsz < 160 else m.serving_ms)
        for m in models
    ]
    return tuple(sorted(made, key=lambda row: -row[1]))


# Residual networks are slow in ONNX Runtime for what they reach on photos: resnet26d takes 28 ms at 160 pixels.
LADDER = _tried("photos")
# Share of the rule's image size, and the points of top-1 it costs: MobileNetV2 at 160, 128 and 96 pixels has 68.8, 65.3
# and 60.3 (Sandler et al. 2018, table of the published checkpoints).
SIZES: tuple[tuple[float, float], ...] = ((1.0, 0.0), (0.8, 3.5), (0.6, 8.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model at an image size. `score` orders by what accuracy to expect; `cost` is a guess of its network's time."""

    model: str
    imgsz: int
    score: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyCost:
    """One image as it is served by a candidate, in milliseconds.

    Attributes:
        p50, p95: From the bytes of a file to the answer.
        preparing: The median share of it for decoding and scaling.
        problem: Why it could not be measured; empty if it could.
    """

    model: str
    imgsz: int
    threads: int
    p50: float = 0.0
    p95: float = 0.0
    preparing: float = 0.0
    problem: str = ""

    def line(self) -> str:
        """For a table."""
        figures = f"p95 {self.p95:.2f} ms, p50 {self.p50:.2f} ms, of it {self.preparing:.2f} ms decoding and scaling"
        return f"{f'{self.model} at {self.imgsz}':<44}{self.problem or figures}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What fits a limit. `costs` are all that were measured, the chosen one among them."""

    chosen: LatencyCost
    costs: tuple[LatencyCost, ...]
    reason: str
    chose_model: bool
    chose_size: bool


def candidates(
    imgsz: int, *, model: str | None, fixed_size: bool, stride: int = 1, pictures: Pictures = "photos"
) -> list[Candidate]:
    """What may be tried, best first.

    Args:
        imgsz: The image size that was asked for or that the rules give, pixels.
        model: The only model, where it was asked for.
        fixed_size: Whether only `imgsz` may be tried.
        stride: The image size of `model` must be a multiple of it.
        pictures: What kind they are: pictures of few pixels need no larger network than the first of theirs.
    """
    ladder = ((model, 0.0, 10.0),) if model is not None else _tried(pictures)
    step = stride if stride > 1 else SIDE
    found: dict[tuple[str, int], Candidate] = {}
    for share, lost in SIZES[:1] if fixed_size else SIZES:
        side = imgsz if share == 1 else max(step, round(share * imgsz / step) * step)
        if side > imgsz:
            continue
        for name, top1, cost in ladder:
            made = Candidate(model=name, imgsz=side, score=top1 - lost, cost=cost * (side / 160) ** 2)
            found.setdefault((name, side), made)
    return sorted(found.values(), key=lambda c: -c.score)


def allowance(limit: float, *, free: bool) -> float:
    """Milliseconds that may be taken: nine tenths of the limit where there is a choice, all of it where there is none."""
    return limit * (1 - MARGIN) if free else limit


def next_candidate(
    order: Sequence[Candidate], costs: Sequence[LatencyCost], most: float, *, hurry: bool = False
) -> Candidate | None:
    """What to measure next, given what was measured; None when nothing better can be found.

    The best first. One that is too slow rules out those whose cost would make them too slow as well. If nothing is
    left, or in a hurry, the cheapest is measured nevertheless, so that a refusal can name what is possible.
    """
    known = {(c.model, c.imgsz): c for c in costs}
    guess = {(c.model, c.imgsz): c.cost for c in order}
    timed = [(c, guess[c.model, c.imgsz]) for c in costs if not c.problem]
    for candidate in order:
        cost = known.get((candidate.model, candidate.imgsz))
        if cost is not None and fits(cost, most):
            return None
        if cost is None and not hurry and all(_at_least(candidate, c, g) <= most for c, g in timed):
            return candidate
    cheapest = min(order, key=lambda c: c.cost)
    return None if (cheapest.model, cheapest.imgsz) in known else cheapest


def _at_least(candidate: Candidate, known: LatencyCost, guess: float) -> float:
    """Milliseconds that a candidate will hardly be below, by what another one took, whose cost was guessed as `guess`."""
    network = max(0.0, known.p95 - known.preparing) * candidate.cost / guess
    slack = SLACK_SAME_MODEL if candidate.model == known.model else SLACK
    return known.preparing * (1.0 if candidate.imgsz == known.imgsz else SLACK) + network * slack


def fits(cost: LatencyCost, most: float) -> bool:
    """Whether it takes at most that many milliseconds."""
    return not cost.problem and cost.p95 <= most


def best_fitting(order: Sequence[Candidate], costs: Sequence[LatencyCost], most: float) -> LatencyCost | None:
    """The best in order that was measured and fits."""
    known = {(c.model, c.imgsz): c for c in costs}
    ranked = (known.get((c.model, c.imgsz)) for c in order)
    return next((c for c in ranked if c is not None and fits(c, most)), None)


def explain(chosen: LatencyCost, costs: Sequence[LatencyCost], limit: float) -> str:
    """Why this one: its figure, and that of the quickest of those that are too slow."""
    threads = f"{chosen.threads} thread{'s' if chosen.threads > 1 else ''}"
    text = (f"p95 {chosen.p95:.1f} ms of {limit:g} ms with {threads}, {chosen.preparing:.1f} ms of it decoding and scaling")  # fmt: skip
    slower = [c for c in costs if not c.problem and c.p95 > limit * (1 - MARGIN) and c is not chosen]
    if slower:
        next_one = min(slower, key=lambda c: c.p95)
        text += f"; {next_one.model} at {next_one.imgsz}: {next_one.p95:.1f} ms"
    return text


def refusal(costs: Sequence[LatencyCost], limit: float, threads: int, *, model: bool, size: bool) -> RequestError:
    """Nothing fits: the fastest that was measured, and what could be done.

    Args:
        model, size: Whether these were chosen freely; otherwise asking for less is a way out.
    """
    timed = [c for c in costs if not c.problem]
    asked = f"latency={limit:g}ms ({threads} thread{'s' if threads > 1 else ''}{', a tenth to spare' if model or size else ''})"
    if not timed:
        why = "; ".join(f"{c.model} at {c.imgsz}: {c.problem}" for c in costs) or "nothing answered"
        return RequestError(f"{asked}: no candidate could be measured: {why}.", where="latency=", kept="nothing was started",
                            next="name another model=, or leave latency out")  # fmt: skip
    best = min(timed, key=lambda c: c.p95)
    free = model or size
    ways = [f"latency={_enough(best.p95, free=free):g}ms"]
    ways += [] if size else ["leave imgsz out, or a smaller one"]
    ways += [] if model else ["leave model out, or a smaller one"]
    ways.append("more latency_threads, if production has them")
    if best.preparing > 0.5 * best.p95:
        ways.append("smaller picture files: decoding them takes most of it")
    return RequestError(
        f"Nothing fits {asked}: the fastest measured, {best.model} at {best.imgsz}, takes {best.p95:.2f} ms (p95), of it "
        f"{best.preparing:.2f} ms decoding and scaling.",
        where="latency=", kept="nothing was started", next="; or ".join(ways),
    )  # fmt: skip


def _enough(p95: float, *, free: bool) -> float:
    """A limit that this fits, in two digits, rounded up."""
    need = p95 / (1 - MARGIN) * 1.05 if free else p95 * 1.05
    scale = 1.0
    while need / scale >= 100:
        scale *= 10
    while need / scale < 10:
        scale /= 10
    return float(f"{-(-need // scale) * scale:.3g}")


def no_timing(deterministic_asks: str) -> RequestError:
    """With deterministic=true a timing may not choose what is trained."""
    return RequestError(
        f"latency= chooses by timing, and deterministic=true promises the same plan every time: {deterministic_asks} is missing.",
        where="latency=", kept="nothing was started",
        next="name model= and imgsz=, which are then checked against the limit, or leave deterministic out",
    )  # fmt: skip


def verdict(p95: float, limit: float) -> str:
    """What a finished bundle's figure means; "" if it is over the limit by more than timings differ."""
    if p95 <= limit:
        return f"within the limit of {limit:g} ms"
    if p95 <= limit * (1 + REPEATS_TO):
        return f"{100 * (p95 / limit - 1):.0f} % over the limit of {limit:g} ms: no more than timings differ"
    return ""
