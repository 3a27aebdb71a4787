"""Words about the command line itself: `help` and `completion`."""

from __future__ import annotations

import click

from qdq.cli import options
from qdq.cli.terminal import show_json


def _topics(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The topics and verbs that begin so."""
    from qdq.cli.about.topics import topics

    verbs = (
        ctx.parent.command.list_commands(ctx.parent)
        if ctx.parent and isinstance(ctx.parent.command, click.Group)
        else []
    )
    return [word for word in (*topics(), *verbs) if word.startswith(incomplete)]


SHELLS = ("bash", "zsh", "fish")


@click.command("help")
@click.argument("topic", metavar="[TOPIC]", required=False, shell_complete=_topics)
@options.json_option
@click.pass_context
def help_command(ctx: click.Context, topic: str | None, as_json: bool) -> None:
    """Explain a topic, such as schemes, limits or exit-codes; without TOPIC, list them. Or show a verb's help."""
    from qdq.cli.about.topics import contents, text_of, topics
    from qdq.cli.answer.documents import HelpAnswer
    from qdq.core.choices import choose

    assert ctx.parent is not None and isinstance(ctx.parent.command, click.Group)
    program = ctx.parent.command
    if topic is None:
        text = contents()
    elif verb := program.get_command(ctx.parent, topic):
        with click.Context(verb, info_name=topic, parent=ctx.parent) as inner:
            text = verb.get_help(inner) + "\n"
    else:
        text = text_of(choose(topic, (*topics(), *program.commands), "topic"), program)
    if as_json:
        show_json(HelpAnswer(topic=topic or "", text=text).to_json())
    else:
        click.echo_via_pager(text.rstrip("\n"))


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@options.json_option
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that completes verbs, options and their values in a shell.

    bash: source <(qdq completion bash) in ~/.bashrc. zsh: the same in ~/.zshrc. fish: qdq completion fish >
    ~/.config/fish/completions/qdq.fish.
    """
    from click.shell_completion import get_completion_class

    from qdq.cli.answer.documents import CompletionAnswer

    assert ctx.parent is not None
    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(ctx.parent.command, {}, "qdq", "_QDQ_COMPLETE")
    script = made.source_template % made.source_vars()  # its `source` runs bash to ask for its version
    if as_json:
        show_json(CompletionAnswer(shell=shell, script=script).to_json())
    else:
        click.echo(script)
