"""What an image on a GPU goes through: one network, whose labels stay there and need nothing of the host."""

from __future__ import annotations

from collections.abc import Sequence

from trtbuild.errors import EngineError, TrtbuildError
from trtbuild.runtime import Member, Recipe
from trtbuild.steps.prediction.opening import Model

ON_HOST = "hand over the image on the host, to predict_array"


def member_for_image_on_gpu(models: Sequence[Model], recipe: Recipe, given_previous: bool) -> Member:
    """The one stage of the one model.

    Raises:
        EngineError: it does not run on a GPU.
        TrtbuildError: there are several bundles, two stages, or something is to be done to the labels.
    """
    member, first = models[0].stages[-1], models[0]
    if member.device is None:
        reasons = "; ".join(f"{name}: {' '.join(reason.split())}" for name, reason in first.refused)
        raise EngineError(
            "The model does not run on a GPU.",
            expected="a backend for GPUs, such as tensorrt",
            got=first.backend + (f" ({reasons})" if reasons else ""),
            where=first.bundle.path,
            hint=f"compile it for this GPU, or {ON_HOST}",
        )
    for there, what, instead in (
        (len(models) > 1, f"an ensemble of {len(models)} bundles", "open one bundle"),
        (len(first.stages) > 1 or given_previous, "a cascade", "open a bundle of one stage"),
        (bool(recipe.postprocessing), "rules of post-processing", "open it with postprocessing=False"),
        (recipe.disagreement, "a map of disagreement", "open it without disagreement"),
    ):
        if there:
            raise TrtbuildError(
                "An image on a GPU goes through one network, and nothing is done to its labels.",
                expected="one bundle of one stage, without post-processing and disagreement",
                got=what,
                where=first.bundle.path,
                hint=f"{instead}, or {ON_HOST}",
            )
    return member
