"""How far a measurement is, on standard error, where that is a terminal; the rows themselves go to standard output."""
from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


class Progress:
    """A bar where tqdm is installed, else a line that is written again and again. Use as a context manager."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.done = total, unit, 0
        self.shown = sys.stderr.isatty()
        self.bar: Any = None
        if self.shown and importlib.util.find_spec("tqdm") is not None:
            self.bar = importlib.import_module("tqdm").tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def begin(self, name: str) -> None:
        """Say what is measured now."""
        if self.bar is not None:
            self.bar.set_postfix_str(name)
        elif self.shown:
            print(f"\r\033[K{self.done}/{self.total} {name}", end="", file=sys.stderr, flush=True)

    def step(self, text: str | None = None) -> None:
        """One is done; its row is printed above the bar."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        if text is not None:
            self.say(text)

    def say(self, text: str) -> None:
        """Print on standard output, above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            if self.shown:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
            print(text)
        sys.stdout.flush()
