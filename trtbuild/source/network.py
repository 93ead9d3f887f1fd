"""The torch module that the plans describe, and a fold's weights in it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtbuild.errors import ModelError, Untrusted
from trtbuild.source.architecture import Architecture
from trtbuild.source.checkpoint import plain_names
from trtbuild.source.extras import require
from trtbuild.source.fields import listed
from trtbuild.spec import ModelSpec

if TYPE_CHECKING:
    import torch

SAFE_PACKAGES = ("dynamic_network_architectures.", "torch.nn.")
# Old plans name a module that dynamic_network_architectures never had; nnU-Net searches the package for the class.
MOVED = {
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet":
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}  # fmt: skip


def network_from_architecture(architecture: Architecture, spec: ModelSpec, *, trust: bool) -> torch.nn.Module:
    """The network with random weights, in evaluation mode, without deep supervision.

    Args:
        architecture: what to build; `network_channels` and the heads come from `spec`.
        spec: of the model.
        trust: import names outside `dynamic_network_architectures` and `torch.nn`, which runs code.

    Raises:
        Untrusted: a name lies outside those packages.
        ModelError: a name does not exist, or the class does not take the arguments.
    """
    require("torch")
    require("dynamic_network_architectures")
    arguments = dict(architecture.arguments)
    for key in architecture.imported:
        if arguments[key] is not None:
            arguments[key] = _located(arguments[key], f"{architecture.where}.arch_kwargs.{key}", trust)
    name = MOVED.get(architecture.name, architecture.name)
    build = _located(name, f"{architecture.where}.network_class_name", trust)
    facts: dict[str, Any] = {"channels": spec.network_channels, "heads": spec.labels.heads, "patch": spec.patch,
                             "no deep supervision": False}  # fmt: skip
    arguments |= {argument: facts[fact] for argument, fact in architecture.from_spec.items()}
    try:
        return build(**arguments).eval()
    except MemoryError:
        raise
    except Exception as error:  # the class is free to raise anything about its arguments
        raise ModelError("The network cannot be built with the arguments in the plans.",
                         got=f"{type(error).__name__}: {error}", where=architecture.where) from error  # fmt: skip


def load_weights(network: torch.nn.Module, weights: Mapping[str, torch.Tensor], spec: ModelSpec, where: str) -> None:
    """Puts a fold's weights, by their plain names, into the network; every one must be there, fit, and be wanted.

    Raises:
        ModelError: they are another network's; input channels and heads are named where they are the difference.
    """
    state = network.state_dict()
    own = plain_names(state)  # a network may have parts that look like a wrapper's, or be wrapped itself
    missing, extra = [n for n in own.values() if n not in weights], [n for n in weights if n not in own.values()]
    if missing or extra:
        raise ModelError("The checkpoint holds the weights of another network than the plans describe.",
                         expected=f"these weights, which are missing: {listed(missing)}",
                         got=f"these, which the network does not have: {listed(extra)}", where=where)  # fmt: skip
    for name, plain in own.items():
        shape, got = tuple(state[name].shape), tuple(weights[plain].shape)
        if got != shape:
            raise _misfit(name, shape, got, spec, where)
    network.load_state_dict({name: weights[plain] for name, plain in own.items()})


def _misfit(name: str, expected: tuple[int, ...], got: tuple[int, ...], spec: ModelSpec, where: str) -> ModelError:
    """Says what a differing shape means where that is clear from the axis that differs."""
    differing = [i for i, sizes in enumerate(zip(expected, got, strict=False)) if sizes[0] != sizes[1]]
    reason = "A weight has another shape than the network of the plans."
    if len(expected) == len(got) and differing == [1] and expected[1] == spec.network_channels:
        reason = f"The checkpoint takes {got[1]} input channels, dataset.json and plans.json make it {expected[1]}."
    elif len(expected) == len(got) and differing == [0] and expected[0] == spec.labels.heads:
        reason = f"The checkpoint has {got[0]} heads, the labels in dataset.json make it {expected[0]}."
    return ModelError(reason, expected=expected, got=got, where=f"{where}: {name}",
                      hint="take plans.json and dataset.json from the training that wrote the checkpoint")  # fmt: skip


def _located(name: str, where: str, trust: bool) -> Any:
    """What a dotted name stands for: a class of a network layer, or with the user's trust anything."""
    if not trust and not name.startswith(SAFE_PACKAGES):
        raise _untrusted(name, where)
    found = _imported(name)
    if found is None:
        raise ModelError(f"{name} does not exist.", got=name, where=where,
                         hint="install the package that holds it, in the version of the training")  # fmt: skip
    nn = require("torch").nn
    # A name may start in a safe package and lead out of it ("torch.nn.functional.sys.exit"): look where it ended.
    if not trust and not (isinstance(found, type) and issubclass(found, nn.Module)
                          and f"{found.__module__}.".startswith(SAFE_PACKAGES)):  # fmt: skip
        raise _untrusted(name, where)
    return found


def _untrusted(name: str, where: str) -> Untrusted:
    return Untrusted("plans.json names code that trtbuild does not run unasked.", got=name, where=where,
                     expected=f"a network class under {' or '.join(SAFE_PACKAGES)}*",
                     hint="if you trust whoever made the model, pass --trust-checkpoint")  # fmt: skip


def _imported(name: str) -> Any:
    """`pydoc.locate`, but an import that fails inside the module is an error, not "not found"."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:split])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise ModelError(f"{module} cannot be imported.", got=error, where=name) from error
            continue
        except (ImportError, RuntimeError) as error:
            raise ModelError(f"{module} cannot be imported.", got=error, where=name) from error
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found
    return None
