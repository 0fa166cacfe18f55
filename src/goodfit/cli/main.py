"""`goodfit VERB ...`: parses words, calls the api, prints the result. Imports torch only when a command needs it."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from goodfit import __version__
from goodfit.cli.arguments import OUTPUT, split_words, take_output_options
from goodfit.config.request import options
from goodfit.core.errors import GoodfitError, RequestError, Stopped

Words = list[str]
Asked = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found: for scripts as one JSON object, for people as lines, which may still be made while they are printed."""

    value: dict[str, Any] | Callable[[], dict[str, Any]]
    lines: Iterable[str] = ()


def train(places: Words, asked: Asked) -> Answer:
    """Take a dataset through the whole workflow, from audit to bundle."""
    from goodfit.api.train import train

    return _finished(train(_one(places, asked, "data"), **asked))


def demo(places: Words, asked: Asked) -> Answer:
    """Train on real handwritten digits: classes in a minute, boxes (demo detect) in two, masks (demo segment) in four."""
    from goodfit.api.demo import RECIPES, demo

    if len(places) > 1 or (places and places[0] not in RECIPES):
        raise RequestError(
            f"The demo takes no folder: {places[0]}.", next=f"goodfit train {places[0]}, or goodfit demo detect"
        )
    return _finished(demo(*places, **asked))


def resume(places: Words, asked: Asked) -> Answer:
    """Go on with a run that was stopped."""
    from goodfit.api.train import resume
    from goodfit.config.parse import parse_request

    run = _one(places, asked, "run")
    request = parse_request(asked, allowed=("workers", "latency"))
    if run is None:
        raise RequestError("No run was given.", next="goodfit resume runs/NAME")
    return _finished(resume(run, workers=request.workers, latency=asked.get("latency")))


def extend(places: Words, asked: Asked) -> Answer:
    """Train a finished run for more epochs, in a new segment from before its rate fell."""
    from goodfit.api.extend import extend
    from goodfit.config.parse import parse_request

    run = _one(places, asked, "run")
    request = parse_request(asked, allowed=("epochs",))
    if run is None or request.epochs is None:
        raise RequestError(f"No {'run' if run is None else 'number of epochs'} was given.",
                           next="goodfit extend runs/NAME epochs=600")  # fmt: skip
    return _finished(extend(run, epochs=request.epochs))


def test(places: Words, asked: Asked) -> Answer:
    """Test a finished run once more; the look is counted."""
    from goodfit.api.train import test
    from goodfit.config.parse import parse_request

    run = _one(places, asked, "run")
    parse_request(asked, allowed=())
    if run is None:
        raise RequestError("No run was given.", next="goodfit test runs/NAME")
    value = test(run)
    found = value["metrics"]["test"]
    figure = (
        f"{100 * found['accuracy']:.1f} %" if "accuracy" in found else f"AP50 {found['ap50']:.3f}, AP {found['ap']:.3f}"
    )
    return Answer(value, [f"test      look {found['look']}: {figure}"])


def audit(places: Words, asked: Asked) -> Answer:
    """Read and check a dataset, and write audit.html to look at what was found."""
    from goodfit.api.train import audit

    found = audit(_one(places, asked, "data"), **asked)
    lines = []
    for f in found["findings"]:
        lines.append(f"{f['severity']:<8} {f['count']:>6,} {f['kind']}: {f['action']}")
        lines += [f"{'':<16}{item}" for item in f["items"][:3]] if f["severity"] != "info" else []
    return Answer(found, [*(lines or ["nothing found"]), f"page      {found['page']}"])


def plan(places: Words, asked: Asked) -> Answer:
    """Decide everything and stop there; nothing is written."""
    from goodfit.api.train import plan
    from goodfit.config.execution import unwise

    made = plan(_one(places, asked, "data"), **asked).plan
    value = made.to_dict()
    width = max(len(name) for name in value["decisions"])
    lines = [
        f"{n:<{width}}  {_short(d['value']):<28} {d['source']:<9} {d['reason']}" for n, d in value["decisions"].items()
    ]
    lines += made.measured.table() if made.measured is not None else []
    return Answer(value, [*lines, *(f"warning   {text}" for text in unwise(made))])


def predict(places: Words, asked: Asked) -> Answer:
    """Classify images, or find objects in them, with a bundle; needs no torch."""
    from goodfit.api.predict import stream_predictions

    table = asked.pop("table", "false").lower() in ("true", "1", "yes", "on")
    out, threshold = asked.pop("out", None), _share(asked.pop("threshold", None), "threshold")
    if asked:
        raise RequestError(f"predict does not take {', '.join(asked)}.",
                           next="goodfit predict BUNDLE IMAGE... table=true out=FOLDER threshold=0.5")  # fmt: skip
    if not places:
        raise RequestError("No bundle was given.", next="goodfit predict BUNDLE IMAGE...")
    made = stream_predictions(places[0], places[1:], threshold=threshold, out=out)
    rows = list(made) if table else made
    lines = _table(list(rows)) if table else (json.dumps(row, ensure_ascii=False) for row in rows)
    return Answer(lambda: _predicted(list(rows)), lines)


def _predicted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    failed = sum("error" in row for row in rows)
    return {"status": "done", "num_images": len(rows), "num_failed": failed, "predictions": rows}


def _table(rows: list[dict[str, Any]]) -> list[str]:
    width = max(len(row["image"]) for row in rows)
    return [f"{row['image']:<{width}}  {_told(row)}" for row in rows]


def _told(row: dict[str, Any]) -> str:
    """A prediction in a few words."""
    if "error" in row:
        return f"error: {row['error']}"
    if "objects" not in row:
        return f"{row['label']}  {row['probability']}"
    counts: dict[str, int] = {}
    for found in row["objects"]:
        counts[found["label"]] = counts.get(found["label"], 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"


def _share(text: str | None, name: str) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise RequestError(f"{name}={text} is no number.", next=f"{name}=0.5") from error


def models(places: Words, asked: Asked) -> Answer:
    """List the networks that goodfit chooses among: cost, licence, measured latency."""
    from goodfit.api.models import list_models, table
    from goodfit.config.parse import parse_request

    if places:
        raise RequestError(f"models takes no place: {places[0]}.", next="goodfit models task=classify measure=true")
    request = parse_request(asked, allowed=("task", "measure"))
    rows = list_models(request.task or "classify", measure=request.measure is True)
    return Answer({"status": "done", "task": request.task or "classify", "models": rows}, table(rows))


COMMANDS: dict[str, Callable[[Words, Asked], Answer]] = {
    "train": train, "demo": demo, "resume": resume, "extend": extend, "test": test, "audit": audit, "plan": plan, "predict": predict,
    "models": models,
}  # fmt: skip
USAGE = {
    "train": "goodfit train FOLDER [key=value ...]", "demo": "goodfit demo [detect|segment] [key=value ...]",
    "resume": "goodfit resume RUN [workers=N] [latency=20ms]", "extend": "goodfit extend RUN epochs=N", "test": "goodfit test RUN", "audit": "goodfit audit FOLDER [key=value ...]",
    "plan": "goodfit plan FOLDER [key=value ...]", "predict": "goodfit predict BUNDLE IMAGE... [table=true] [out=FOLDER] [threshold=0.5]",
    "models": "goodfit models [task=classify] [measure=true]",
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 request, 3 data, 4 storage, 5 training, 130/143 stopped."""
    words = list(sys.argv[1:] if words is None else words)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):  # a file name that is no UTF-8 must not end a command whose work is done
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    output = {"json": any(w.lstrip("-") in ("json", "json=true", "json=1") for w in words), "debug": False}
    try:
        if not words or (words[0] in ("-h", "--help", "help") and len(words) == 1):
            print(_overview())
            return 0
        if words[0] in ("--version", "version"):
            print(__version__)
            return 0
        name = words[1] if words[0] == "help" else words[0]
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            raise RequestError(f"There is no command {name!r}.",
                               next=f"goodfit {near[0]}" if near else "goodfit --help")  # fmt: skip
        if words[0] == "help" or any(w in ("-h", "--help") for w in words[1:]):
            print(_command_help(name))
            return 0
        places, asked = split_words(words[1:], extra=("run", "table", "out", "threshold"))
        output = take_output_options(asked)
        return _print(COMMANDS[name](places, asked), output["json"])
    except GoodfitError as error:
        return _fail(error, **output)
    except KeyboardInterrupt as error:
        return _fail(_interrupted(error), **output)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # a bug of ours; say so in the same form
        if output["debug"]:
            raise
        bug = GoodfitError(
            f"An error that goodfit did not foresee: {type(error).__name__}: {error}",
            kept="everything that was written before",
            next="run again with debug=true and report it",
        )
        return _fail(bug, **output)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that no `except Exception` on the way catches."""


def _terminate(_number: int, _frame: object) -> None:
    """SIGTERM outside of training, where the loop handles it: leave at once, in the usual form."""
    raise _Terminated


def _interrupted(error: KeyboardInterrupt) -> GoodfitError:
    return Stopped("Stopped at once.", exit_code=143 if isinstance(error, _Terminated) else 130,
                   kept="every checkpoint that was written", next="goodfit resume RUN, if a run began")  # fmt: skip


def _print(answer: Answer, as_json: bool) -> int:
    if as_json:
        print(json.dumps(answer.value() if callable(answer.value) else answer.value, ensure_ascii=False))
    else:
        for line in answer.lines:
            print(line, flush=True)
    sys.stdout.flush()
    return 0


def _fail(error: GoodfitError, *, json: bool, debug: bool) -> int:
    import json as encoder

    if debug:
        import traceback

        traceback.print_exc()
    if json:
        print(encoder.dumps(error.describe(), ensure_ascii=False), flush=True)
    else:
        print(f"goodfit: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def _finished(run: Any) -> Answer:
    """The run's result; what it found was told on standard error, stage by stage."""
    from goodfit.api.finish import commands

    again, python, use = commands(run)
    return Answer(run.result, [f"again     {again}     python: {python}", f"use       {use}"])


def _one(places: Words, asked: Asked, name: str) -> str | None:
    """The single place of a command, given as a word or as name=."""
    if len(places) > 1:
        raise RequestError(f"One {name} is expected, but there are {len(places)}: {', '.join(places)}.",
                           next="quote a path that has spaces")  # fmt: skip
    named = asked.pop(name, None)
    if places and named is not None:
        raise RequestError(f"{name} is given twice: {places[0]} and {named}.")
    return places[0] if places else named


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 28 else text[:27] + "…"


def _overview() -> str:
    rows = [f"  {name:<9} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["goodfit: from a labelled dataset to a tested, deployable model, by one command", "", *rows, "",
         "  goodfit demo                 see a whole run", "  goodfit train FOLDER         train on your images",
         "  goodfit train --help         every option", ""]
    )  # fmt: skip


def _command_help(name: str) -> str:
    """Help from the schema itself, through argparse, which knows how to wrap and align it."""
    parser = argparse.ArgumentParser(
        prog=f"goodfit {name}", usage=USAGE[name], description=(COMMANDS[name].__doc__ or "").splitlines()[0],
        add_help=False, allow_abbrev=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, 30, 110),
        epilog="key=value, --key value and --key=value all work; what is not given is decided, with a reason.",
    )  # fmt: skip
    groups: dict[str, Any] = {}
    if name in ("train", "demo", "plan", "audit"):
        for field, option in options().items():
            group = groups.get(option.group) or groups.setdefault(option.group, parser.add_argument_group(option.group))
            text = option.help + (f" ({', '.join(option.choices)})" if option.choices else "")
            text += f"; also {', '.join(option.aliases)}" if option.aliases else ""
            group.add_argument(f"--{field.replace('_', '-')}", metavar="X", help=text.replace("%", "%%"))
    output = parser.add_argument_group("Output")
    for field, text in OUTPUT.items():
        output.add_argument(f"--{field}", metavar="X", help=text)
    return parser.format_help()
