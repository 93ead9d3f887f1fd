"""nnU-Net's one-dash option words on top of click.

click reads `-chkk x` as `-c hkk` and `-f 0 1` as one fold and a stray argument, silently. `WordCommand` refuses every
one-dash word that was not declared, with "did you mean", and lets `-f` take all the fold words that follow it.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

import click

FOLD_WORD = re.compile(r"^(\d+(,\d+)*,?|all)$")
DASH_WORD = re.compile(r"^-[A-Za-z]")


class WordCommand(click.Command):
    """A click command whose options may be words with one dash (`-step_size 0.5`, `-f 0 1 2`)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._expanded(ctx, list(args)))

    def _expanded(self, ctx: click.Context, args: list[str]) -> list[str]:
        declared = [name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)]
        greedy = {name for param in self.get_params(ctx) if isinstance(param, FoldOption) for name in param.opts}
        result: list[str] = []
        while args:
            word = args.pop(0)
            if word == "--":
                return [*result, word, *args]
            if DASH_WORD.match(word) and word.split("=")[0] not in declared:
                self._refuse(ctx, word.split("=")[0], declared)
            if word not in greedy:
                result.append(word)
                continue
            folds = []
            while args and FOLD_WORD.match(args[0]):
                folds.append(args.pop(0))
            # without a fold word after it, click reports the missing value itself
            result += [part for fold in folds for part in (word, fold)] if folds else [word]
        return result

    def _refuse(self, ctx: click.Context, word: str, declared: list[str]) -> None:
        near = [name for name in declared if name.lstrip("-").startswith(word.lstrip("-"))]
        near += [name for name in difflib.get_close_matches(word, declared, n=3, cutoff=0.5) if name not in near]
        raise click.NoSuchOption(word, possibilities=near or None, ctx=ctx)


class FoldOption(click.Option):
    """`-f 0 1 2`, `-f 0,1,2`, `-f all`, `-f 0 -f 1`: a tuple of fold names, None where not given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"multiple": True, "callback": self._folds}
        super().__init__(*args, **kwargs)

    @staticmethod
    def _folds(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
        folds = [fold for word in value for fold in word.split(",") if fold]
        for fold in folds:
            if not FOLD_WORD.match(fold):
                raise click.BadParameter(f"{fold!r} is no fold: expected numbers or all.", ctx=ctx, param=param)
        if len(set(folds)) != len(folds):
            raise click.BadParameter(f"a fold is named twice in {' '.join(folds)}.", ctx=ctx, param=param)
        if "all" in folds and len(folds) > 1:
            raise click.BadParameter("all cannot be combined with other folds.", ctx=ctx, param=param)
        return tuple(folds) or None
