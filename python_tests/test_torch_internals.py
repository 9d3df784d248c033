"""torch's private names: each still does what the package needs it for, and none is used elsewhere."""

import ast
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fdfa_ext import _torch_internals as internals

PACKAGE = Path(internals.__file__).parent


def private_names(source: str) -> list[str]:
    """Names of torch with an underscore before them, and modules of torch that are imported so."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr[1] != "_":
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in ("torch", "forward_ad", "nn_module", "F"):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch._"):
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda file: file.name)
def test_private_names_of_torch_have_one_home(file: Path) -> None:
    found = set(private_names(file.read_text())) - {"torch._check"}  # for fake kernels, as documented
    if file.name == "_torch_internals.py":
        assert len(found) > 8
    else:
        assert not found


def test_a_level_is_that_of_forward_ad() -> None:
    x, tangent = torch.randn(2, 3).unbind()
    assert not internals.is_in_dual_level()
    internals.enter_dual_level()
    try:
        assert internals.is_in_dual_level()
        y = forward_ad.make_dual(x, tangent) * 2
        primal, ty = internals.traced_unpack_dual(y)
        torch.testing.assert_close((primal, ty), (x * 2, tangent * 2))
        with internals.without_forward_mode():
            assert internals.traced_unpack_dual(internals.traced_make_dual(x, tangent) * 2)[1] is None
        assert internals.traced_unpack_dual(y * 2)[1] is not None
    finally:
        internals.exit_dual_level()
    assert not internals.is_in_dual_level()
    with forward_ad.dual_level():
        assert internals.is_in_dual_level()


def test_function_modes_are_switched_off_and_on() -> None:
    seen = []

    class Sees(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(3)
    with Sees(), internals.DisableTorchFunction():
        F.relu(x)
        assert not seen
        with internals.EnableTorchFunction():
            F.relu(x)
        assert seen[0] is F.relu


def test_a_checkpoint_is_seen_when_it_computes_and_when_it_computes_again() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(internals.is_in_checkpoint())
        return x.exp().sin()

    x = torch.randn(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False).sum().backward()
    assert seen == [True, True]
    function(x)
    assert seen[-1] is False


def test_hooks_are_found_where_torch_keeps_them() -> None:
    module = nn.Linear(2, 2)
    for name in internals.MODULE_CONTENTS:
        assert name in vars(module)
    for index, register in enumerate(
        [
            module.register_forward_hook,
            module.register_forward_pre_hook,
            module.register_full_backward_hook,
            module.register_full_backward_pre_hook,
        ]
    ):
        handle = register(lambda *_: None)
        assert [bool(hooks) for hooks in internals.hooks_of(module)] == [i == index for i in range(4)]
        handle.remove()
    torch_module = nn.modules.module
    for index, register_global in enumerate(
        [
            torch_module.register_module_forward_hook,
            torch_module.register_module_forward_pre_hook,
            torch_module.register_module_full_backward_hook,
            torch_module.register_module_full_backward_pre_hook,
        ]
    ):
        handle = register_global(lambda *_: None)
        found = [bool(hooks) for hooks in internals.GLOBAL_HOOKS]
        handle.remove()
        assert found == [i == index for i in range(4)]


def test_a_modules_call_goes_through_the_names_that_are_watched() -> None:
    calls = []

    class Watched(nn.Linear):
        def _call_impl(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            calls.append("_call_impl")
            result: Tensor = super()._call_impl(*args, **kwargs)
            return result

    Watched(2, 2)(torch.randn(1, 2))
    assert calls == ["_call_impl"]
    assert set(internals.CALL_NAMES) == {"__call__", "_call_impl"}


def test_a_compiled_module_is_known() -> None:
    module = nn.Linear(2, 2)
    assert not internals.is_compiled(module)
    compiled = torch.compile(module, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert internals.is_compiled(compiled)
    assert not internals.is_compiled(module)
    module.compile(backend="eager")
    assert internals.is_compiled(module)


def test_kernels_and_nodes_are_found() -> None:
    assert internals.has_kernel("fdfa::max_pool2d", "cpu")
    assert not internals.has_kernel("fdfa::max_pool2d", "xla")

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

    y = Twice.apply(torch.randn(3, requires_grad=True))
    assert isinstance(y.grad_fn, internals.backward_node_of(Twice))
