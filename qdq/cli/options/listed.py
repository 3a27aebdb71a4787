"""Options whose help lists what they take, looked up in the tables that the program works by when it is shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


class Listed(click.Option):
    """An option whose help lists what it takes, looked up when that help is shown: `{names}` in its text."""

    def __init__(self, *args: Any, names: Callable[[], Iterable[object]], **kwargs: Any) -> None:
        """As of `click.Option`; `names` gives the list."""
        super().__init__(*args, **kwargs)
        self._text, self._names = self.help or "", names

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names that begin so; files, where these are descriptions and not names."""
        words = [re.split(r"[ ,]", str(name))[0] for name in self._names()]
        if self.name == "data":
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option and its help, with the names in it."""
        *some, last = map(str, self._names())
        self.help = self._text.format(names=f"{', '.join(some)} or {last}" if some else last)
        return super().get_help_record(ctx)


def gpu_names() -> Iterable[str]:
    """The GPUs that times can be predicted for."""
    from engines.cost.gpus import GPUS

    return GPUS


def compiler_names() -> list[str]:
    """What `--compiler` takes, with what each needs."""
    from engines.backends.backend import backends
    from engines.backends.profile import profiles

    versions = {b.name: [p.key for p in profiles().values() if p.backend == b.name] for b in backends().values()}
    return [f"{', '.join(dict.fromkeys((b.compiler, *versions[b.name])))} ({b.need})" for b in backends().values()]


def targets() -> Iterable[str]:
    """The GPU generations that a compiler builds for without such a GPU."""
    from engines.backends.backend import backends

    return dict.fromkeys(target for b in backends().values() if not b.needs_gpu for target in b.targets)


def tasks() -> Iterable[str]:
    """What outputs can be taken for."""
    from engines.verify.meaning import TASKS

    return TASKS


def setting(option: str, text: str) -> Callable[[F], F]:
    """The option of a setting that takes one of several names; the default is marked."""
    name = option.lstrip("-").replace("-", "_")

    def names() -> list[str]:
        from msgspec import structs

        from qdq.plan.settings import Settings, choices

        default = {f.name: f.default for f in structs.fields(Settings)}[name]
        return [f"{choice} (default)" if choice == default else str(choice) for choice in choices(name)]

    return click.option(option, cls=Listed, names=names, help=text)


def data_forms() -> list[str]:
    """The forms of samples."""
    from calib_data.sources import forms

    return [form.says for form in forms()]
