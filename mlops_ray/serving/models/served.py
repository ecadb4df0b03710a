"""Which models an endpoint serves, and as what: the deployment's user config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import ValidationError

from mlops_ray.config.base import Frozen
from mlops_ray.config.serving import Routing
from mlops_ray.errors import ServingError


class ModelSpec(Frozen):
    """Which package serves under which alias."""

    alias: str
    version: int
    path: str


class Challenger(Frozen):
    """A model that answers a share of the requests, in (0, 1]."""

    spec: ModelSpec
    share: float


class ServedModels(Frozen):
    """The user config of the deployment: which models to serve. ``epoch`` tells changes apart.

    Challengers answer their shares of the requests, ``answer`` the rest; ``shadows`` answer nobody.
    """

    answer: ModelSpec
    challengers: tuple[Challenger, ...] = ()
    shadows: tuple[ModelSpec, ...] = ()
    epoch: int = 0

    @classmethod
    def of(cls, models: Sequence[ModelSpec], routing: Routing, epoch: int = 0) -> Self:
        """Say who answers: the first model, and those that ``routing`` gives a share. The share of an
        alias that is not among them is the first one's.

        Raises:
            ServingError: The first model has a share.
        """
        shares = routing.shares
        if models[0].alias in shares:
            raise ServingError(
                f"{models[0].alias} answers what the shares leave over; it has none of its own",
                where="serving.routing.shares",
                fix="leave it out of the shares, or deploy another alias first",
            )
        return cls(
            answer=models[0],
            challengers=tuple(
                Challenger(spec=model, share=shares[model.alias])
                for model in models[1:]
                if model.alias in shares
            ),
            shadows=tuple(model for model in models[1:] if model.alias not in shares),
            epoch=epoch,
        )

    @property
    def all(self) -> tuple[ModelSpec, ...]:
        """All models: the answering one, the challengers, those in shadow."""
        return (self.answer, *(c.spec for c in self.challengers), *self.shadows)

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Read it from the JSON value that Serve hands over. ServingError where it is none."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ServingError("the deployment's user_config is wrong", why=str(error)) from error
