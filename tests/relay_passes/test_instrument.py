"""The check behind every pass of these tests finds what is wrong."""

import pytest
import tvm
from tvm import relax

from tvm_balanced.relay_passes.module_pass import module_pass


def module():
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    w = relax.Var("w", relax.TensorType((4,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w], attrs={"num_input": 1}):
        with builder.dataflow():
            out = builder.emit_output(relax.op.add(x, w))
        builder.emit_func_output(out)
    return builder.get()


@module_pass
def drop_a_parameter(mod):
    """Lose a weight."""
    func = mod["main"]
    out = tvm.IRModule(dict(mod.functions_items()))
    out["main"] = relax.Function(func.params[:1], func.body, func.ret_ty, True, func.attrs)
    return out


@module_pass
def read_a_stranger(mod):
    mod = relax.transform.LegalizeOps()(mod)
    kernel = mod["add"]
    other = tvm.IRModule(dict(mod.functions_items()))
    params = [tvm.ir.Var(kernel.params[0].name, kernel.params[0].ty), *kernel.params[1:]]
    other["add"] = tvm.tirx.PrimFunc(params, kernel.body, kernel.ret_type, kernel.attrs)
    return other


@pytest.mark.parametrize("broken", [drop_a_parameter, read_a_stranger])
def test_a_broken_pass_is_caught(broken):
    with pytest.raises((ValueError, tvm.error.InternalError)):
        tvm.transform.Sequential([broken])(module())


def test_a_pass_keeps_the_name_and_docstring_of_its_function():
    assert drop_a_parameter.info.name == "drop_a_parameter"
    assert drop_a_parameter.__doc__ == "Lose a weight."
