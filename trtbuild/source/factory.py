"""A network that the user builds: `--network module:function` in place of what plans and trainer say.

For trainers that trtbuild does not know and that build a network of their own. The function is the trainer's
`build_network_architecture`, so that it can be named as it stands: `my_trainers:MyTrainer.build_network_architecture`.
Its arguments are given by name, of which nnU-Net has had several sets:

- `architecture_class_name`, `arch_init_kwargs`, `arch_init_kwargs_req_import`: what the plans say, before anything is
  imported;
- `plans_manager`, `configuration_manager`: nnU-Net's own objects, which need nnunetv2 to be installed;
- `dataset_json`: the content of dataset.json;
- `num_input_channels`, `num_output_channels`, and `enable_deep_supervision`, which is False.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from trtbuild.errors import ModelError
from trtbuild.source.architecture import architecture_from_plans
from trtbuild.source.extras import require
from trtbuild.source.fields import listed
from trtbuild.spec import ModelSpec

if TYPE_CHECKING:
    import torch

Factory = Callable[..., Any]
OPTION = "--network"


def factory_from_word(word: str) -> Factory:
    """The function that "module:function" or "module:Class.function" names. Importing the module runs its code.

    Raises:
        ModelError: the word is of another form, the module cannot be imported, or there is no such function in it.
    """
    module, colon, name = word.partition(":")
    if not colon or not module or not all(part.isidentifier() for part in name.split(".")):
        raise ModelError(
            "The factory of the network cannot be read.",
            got=word,
            where=OPTION,
            expected="module:function, such as my_trainers:MyTrainer.build_network_architecture",
        )
    try:
        found: Any = importlib.import_module(module)
    except MemoryError:
        raise
    except Exception as error:  # the module is the user's own and may raise anything
        raise ModelError(f"{module} cannot be imported.", got=f"{type(error).__name__}: {error}", where=OPTION,
                         hint="install it, or put its folder into PYTHONPATH") from error  # fmt: skip
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ModelError(f"{module} has no function {name}.", expected="a function", where=OPTION,
                         got="nothing" if found is None else type(found).__name__)  # fmt: skip
    return found  # type: ignore[no-any-return]


def network_from_factory(
    factory: Factory, plans: Mapping[str, Any], dataset: Mapping[str, Any], spec: ModelSpec
) -> torch.nn.Module:
    """The network that the factory builds, with whatever weights it has then, in evaluation mode.

    Raises:
        ModelError: the factory asks for an argument that nnU-Net does not give, raises, or returns no torch module.
    """
    where = f"{OPTION} {getattr(factory, '__qualname__', factory)}"
    arguments = _arguments(factory, plans, dataset, spec, where)
    try:
        network = factory(**arguments)
    except MemoryError:
        raise
    except Exception as error:  # the function is the user's own and may raise anything
        raise ModelError("The factory could not build the network.", got=f"{type(error).__name__}: {error}",
                         where=where) from error  # fmt: skip
    if not isinstance(network, require("torch").nn.Module):
        raise ModelError("The factory returned no network.", expected="a torch.nn.Module", got=type(network).__name__,
                         where=where)  # fmt: skip
    return network.eval()


def _arguments(
    factory: Factory, plans: Mapping[str, Any], dataset: Mapping[str, Any], spec: ModelSpec, where: str
) -> dict[str, Any]:
    """The arguments that the factory names, out of those that nnU-Net gives."""
    plain: dict[str, Any] = {
        "num_input_channels": spec.network_channels,
        "num_output_channels": spec.labels.heads,
        "enable_deep_supervision": False,
        "dataset_json": deepcopy(dict(dataset)),
    }
    late = {
        **dict.fromkeys(("architecture_class_name", "arch_init_kwargs", "arch_init_kwargs_req_import"), _from_plans),
        **dict.fromkeys(("plans_manager", "configuration_manager"), _from_nnunet),
    }
    try:
        asked = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError) as error:  # some functions written in C
        raise ModelError("The factory does not say which arguments it takes.", got=error, where=where) from error
    unknown = [p.name for p in asked if p.name not in {*plain, *late} and p.default is p.empty
               and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
    if unknown:
        raise ModelError(f"The factory asks for {unknown[0]!r}, which nnU-Net's trainers are not given.", where=where,
                         expected=f"arguments out of {listed([*late, *plain])}", got=listed(unknown))  # fmt: skip
    for make in {late[p.name] for p in asked if p.name in late}:
        plain |= make(plans, spec)
    return {p.name: plain[p.name] for p in asked if p.name in plain}


def _from_plans(plans: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    architecture = architecture_from_plans(plans, spec.configuration)
    return {
        "architecture_class_name": architecture.name,
        "arch_init_kwargs": deepcopy(dict(architecture.arguments)),
        "arch_init_kwargs_req_import": list(architecture.imported),
    }


def _from_nnunet(plans: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Only where the user's own function asks for nnU-Net's objects; trtbuild itself needs nothing of nnunetv2."""
    try:
        handler = importlib.import_module("nnunetv2.utilities.plans_handling.plans_handler")
    except ImportError as error:
        raise ModelError("The factory asks for nnU-Net's plans_manager, and nnunetv2 cannot be imported.", got=error,
                         where=OPTION, hint="pip install nnunetv2, or name a function that needs no plans_manager") \
            from error  # fmt: skip
    manager = handler.PlansManager(deepcopy(dict(plans)))
    return {"plans_manager": manager, "configuration_manager": manager.get_configuration(spec.configuration)}
