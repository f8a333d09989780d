"""One of the processes that `hasten.several_devices` starts: trains its share; the first writes the variant."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from hasten.distillation import keep, teach
from hasten.errors import HastenError
from hasten.peers import join, peers
from hasten.several_devices import Said, read_order


def end_with_parent() -> None:
    """Ends this process when its input does: whoever started it is gone."""

    def wait() -> None:
        while os.read(0, 4096):  # not by way of sys.stdin, whose lock would be held when Python ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def teller() -> Callable[[Said], object]:
    """Tells whoever started this; what libraries write to stdout goes to stderr from here on."""
    lines = os.dup(1)
    os.dup2(2, 1)
    return lambda said: os.write(lines, msgspec.json.encode(said) + b"\n")  # at once, so that lines stay whole


def work(path: Path, say: Callable[[Said], object]) -> None:
    """Trains.

    Args:
        path: What to do, see `hasten.several_devices.Order`.
        say: Is told the steps, by the first of the processes.
    """
    order = read_order(path)
    join()
    leads = peers().leads

    def progress(done: int, steps: int) -> None:
        say(Said(done=done, steps=steps))

    model, facts = teach(
        order.student, order.options, name=order.name, lesson=order.lesson, work=order.work,
        progress=progress if leads else None,
    )  # fmt: skip
    if leads:
        keep(model, order.student, order.out, order.options, name=order.name, lesson=order.lesson, facts=facts)


def main() -> None:
    """Trains, and tells what goes wrong."""
    end_with_parent()
    say = teller()
    try:
        work(Path(sys.argv[1]), say)
    except HastenError as error:
        say(Said(error=str(error), kind=type(error).__name__))
        raise SystemExit(1) from error
    except Exception as error:
        say(Said(error=f"{type(error).__name__}: {error}"))
        raise


if __name__ == "__main__":
    main()
