"""Which names a chat template reads beside the messages (`tasks.*.chat_template_kwargs`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from data_mixers.common.suggest import closest_match
from mtft.common.errors import UserError
from mtft.common.listing import listed
from mtft.recipe.rules.task_rules import GIVEN


def names_read(source: str) -> set[str]:
    """The names that a template takes from outside. Raises jinja2.TemplateError for what is no template.

    Jinja also counts a name that the template sets itself in some branch; one that it sets before it reads is its own.
    """
    from jinja2 import meta
    from jinja2.ext import Extension, do, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, with which transformers marks answers: here only what stands in it."""

        tags = {"generation"}

        def parse(self, parser):  # type: ignore[no-untyped-def]
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, do, loopcontrols])
    tree = environment.parse(source)
    first: dict[str, str] = {}
    for name, use in _uses(tree):
        first.setdefault(name, use)
    taken = meta.find_undeclared_variables(tree) - set(environment.globals)
    return {name for name in taken if first.get(name) == "load"}


def _uses(node: Any) -> Iterator[tuple[str, str]]:
    """(name, load or store) in the order in which they happen: what is assigned is computed first."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        yield node.name, node.ctx
    later = isinstance(node, nodes.Assign | nodes.AssignBlock | nodes.For)
    children = list(node.iter_child_nodes(exclude=("target",) if later else ()))
    if isinstance(node, nodes.For):
        children.insert(1, node.target)
    elif later:
        children.append(node.target)
    for child in children:
        yield from _uses(child)


def check_options(source: str, names: Iterable[str], where: str) -> None:
    """UserError for the first of the names that the template does not read, or that is not the recipe's to give."""
    from jinja2 import TemplateError

    if not (names := list(names)):
        return
    try:
        read = names_read(source) - set(GIVEN)
    except TemplateError:  # what is wrong with it is said when it is used
        return
    for name in names:
        if name in GIVEN:
            raise UserError(f"{name!r} is not for the recipe to set", where=where, do="leave it out")
        if name not in read:
            near = closest_match(name, read)
            known = f"it reads {listed(sorted(read))}" if read else "it reads none beside the messages and tools"
            do = f"did you mean {near!r}?" if near else f"leave it out; {known}"
            raise UserError(f"the chat template never reads {name!r}", where=where, do=do)
