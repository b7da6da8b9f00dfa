"""Recipes show every parameter that they pass on, also to `inject_hyperparams`."""

import inspect
from collections.abc import Callable
from typing import TypeVar

__all__ = ["passes_on_to"]

Recipe = TypeVar("Recipe", bound=Callable)


def passes_on_to(target: Callable) -> Callable[[Recipe], Recipe]:
    """Gives a recipe's `**kwargs` the names and defaults of `target`'s parameters."""

    def show(recipe: Recipe) -> Recipe:
        signature = inspect.signature(recipe)
        own = dict(signature.parameters)
        rest = next(n for n, p in own.items() if p.kind is p.VAR_KEYWORD)
        del own[rest]
        added = {
            name: p.replace(kind=p.KEYWORD_ONLY)
            for name, p in inspect.signature(target).parameters.items()
            if name not in own and p.default is not p.empty
        }
        parameters = [*own.values(), *added.values()]
        recipe.__signature__ = signature.replace(parameters=parameters)  # type: ignore
        return recipe

    return show
