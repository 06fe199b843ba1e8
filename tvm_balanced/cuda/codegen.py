"""A scheduled module becomes host and device functions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tvm_balanced.cuda import nvrtc

if TYPE_CHECKING:
    import tvm


def lower(
    mod: tvm.IRModule, target: tvm.target.Target, pipeline: str = "default"
) -> tuple[str, tvm.IRModule]:
    """CUDA source and host functions of scheduled PrimFuncs, without calling a CUDA compiler.

    The source is in the form in which a library's is compiled. ``pipeline`` names the TIR pipeline that
    lowers the functions, as :func:`tvm.compile` takes it.
    """
    import tvm

    build = importlib.import_module("tvm.tirx.build")
    hosted = tvm.target.Target(target).with_host("llvm")
    # private functions get no host code, so there would be nothing to launch
    public = {
        gvar: func
        if func.attrs and "global_symbol" in func.attrs
        else func.with_attr("global_symbol", gvar.name_hint)
        for gvar, func in mod.functions.items()
        if isinstance(func, tvm.tirx.PrimFunc)
    }
    bound = tvm.tirx.transform.BindTarget(hosted)(tvm.IRModule(public))
    passes, _, finalize_device = tvm.tirx.get_tir_pipeline(pipeline)
    host, devices = build.split_host_device_mods(passes(bound))
    with nvrtc.tvm_callbacks(lambda source: source.encode()):
        built = [build.codegen_build(finalize_device()(d), t) for t, d in devices.items()]
    return "\n".join(kernel.inspect_source() for kernel in built), host
