"""nnU-Net's one-dash option words on top of click.

click reads `-chkk x` as `-c hkk` and `-f 0 1` as one fold and a stray argument, silently. `WordCommand` refuses every
one-dash word that was not declared, with "did you mean", and lets `-f` and `-i` take all their words that follow.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

import click

FOLD_WORD = re.compile(r"^(\d+(,\d+)*,?|all)$")
DASH_WORD = re.compile(r"^-[A-Za-z]")
OPTION_WORD = re.compile(r"^-.")
NUMBER = r"\d+(\.\d*)?([eE][+-]?\d+)?"
WEIGHT_WORD = re.compile(rf"^{NUMBER}(,{NUMBER})*$", re.ASCII)
DEVICES_WORD = re.compile(r"\d{1,4}(,\d{1,4})*", re.ASCII)
SIZE_WORD = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$", re.ASCII | re.IGNORECASE)


def _no_argument(ctx: click.Context, name: str) -> click.BadOptionUsage:
    return click.BadOptionUsage(name, f"Option {name!r} requires an argument.", ctx=ctx)


class WordCommand(click.Command):
    """A click command whose options may be words with one dash (`-step_size 0.5`, `-f 0 1 2`, `-i=FOLDER`)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._expanded(ctx, list(args)))

    def _expanded(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = {name: param for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        result: list[str] = []
        while args:
            word = args.pop(0)
            if word == "--":
                return [*result, word, *args]
            name, equals, value = word.partition("=")
            option = options.get(name)
            if DASH_WORD.match(word) and option is None:
                self._refuse(ctx, name, list(options))
            if equals and len(name) == 2 and isinstance(option, click.Option) and not option.is_flag:
                if not value:
                    raise _no_argument(ctx, name)
                result += [name, value]  # click would take "=value" as the value of a one-letter option
            elif isinstance(option, GreedyOption) and not equals:
                result += self._greedy(ctx, name, option, args)
            else:
                result.append(word)
        return result

    def _greedy(self, ctx: click.Context, name: str, option: GreedyOption, args: list[str]) -> list[str]:
        """The option once before each of the words that it takes from `args`."""
        result: list[str] = []
        while args and option.takes(args[0]):
            result += [name, args.pop(0)]
        if not result and (not args or OPTION_WORD.match(args[0])):
            raise _no_argument(ctx, name)
        return result or [name]

    def _refuse(self, ctx: click.Context, word: str, declared: list[str]) -> None:
        near = [name for name in declared if name.lstrip("-").startswith(word.lstrip("-"))]
        near += [name for name in difflib.get_close_matches(word, declared, n=3, cutoff=0.5) if name not in near]
        raise click.NoSuchOption(word, possibilities=near or None, ctx=ctx)


class GreedyOption(click.Option):
    """An option that takes all the words that follow it and fit, as a tuple."""

    def takes(self, word: str) -> bool:
        """Whether the next word belongs to this option."""
        raise NotImplementedError


class InputsOption(GreedyOption):
    """`-i a.nii.gz b.nii.gz`, as a shell writes `-i *.nii.gz`: every word up to the next option or bundle."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"multiple": True}))

    def takes(self, word: str) -> bool:
        """Bundles end in .trtb, so `-i IMAGES brain.trtb` is clear too."""
        return not OPTION_WORD.match(word) and not word.rstrip("/\\").endswith(".trtb")


class FoldOption(GreedyOption):
    """`-f 0 1 2`, `-f 0,1,2`, `-f all`, `-f 0 -f 1`: a tuple of fold names, None where not given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"multiple": True, "callback": self._folds}
        super().__init__(*args, **kwargs)

    def takes(self, word: str) -> bool:
        """Numbers, lists of numbers with commas, and "all"."""
        return FOLD_WORD.match(word) is not None

    @staticmethod
    def _folds(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
        folds = [fold for word in value for fold in word.split(",") if fold]
        if value and not folds:
            raise click.BadParameter("no fold is named.", ctx=ctx, param=param)
        for fold in folds:
            if not FOLD_WORD.match(fold):
                raise click.BadParameter(f"{fold!r} is no fold: expected numbers or all.", ctx=ctx, param=param)
        if len(set(folds)) != len(folds):
            raise click.BadParameter(f"a fold is named twice in {' '.join(folds)}.", ctx=ctx, param=param)
        if "all" in folds and len(folds) > 1:
            raise click.BadParameter("all cannot be combined with other folds.", ctx=ctx, param=param)
        return tuple(folds) or None


class WeightsOption(GreedyOption):
    """`--weights 2 1`, `--weights 2,1`: a tuple of numbers, None where not given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"multiple": True, "callback": self._weights}
        super().__init__(*args, **kwargs)

    def takes(self, word: str) -> bool:
        """Numbers, and lists of numbers with commas."""
        return WEIGHT_WORD.match(word) is not None

    @staticmethod
    def _weights(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[float, ...] | None:
        words = [word for some in value for word in some.split(",") if word]
        for word in words:
            if not WEIGHT_WORD.match(word):
                raise click.BadParameter(f"{word!r} is no weight: expected positive numbers.", ctx=ctx, param=param)
        return tuple(map(float, words)) or None


class DevicesType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """Numbers of GPUs: 0, or 0,1; a tuple of distinct whole numbers."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers, in the order of the words."""
        if isinstance(value, tuple):
            return value
        if not DEVICES_WORD.fullmatch(value):
            self.fail(f"{value!r} is no list of GPUs: expected numbers and commas, such as 0,1.", param, ctx)
        devices = tuple(map(int, value.split(",")))
        if len(set(devices)) != len(devices):
            self.fail(f"a GPU is named twice in {value}.", param, ctx)
        return devices


class BytesType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A size in bytes: 8G, 512M, 1.5GiB, 2000000000; K, M, G, T are powers of 1024, as in `docker run -m`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        match = SIZE_WORD.match(value)
        number = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else 0.0
        size = int(number) if number < 2**63 else 0
        if size < 1:
            self.fail(f"{value!r} is no size: expected a number with K, M, G or T, such as 8G.", param, ctx)
        return size


DEVICES = DevicesType()
BYTES = BytesType()
