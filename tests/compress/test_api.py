"""The public API: few parameters, and names that stay importable."""

import inspect

import glm_edge as ge
from glm_edge.compress.methods import METHODS
from glm_edge.compress.transform import registered

MOST = 10
# Classes whose fields come from files or are results: users read them and rarely make one.
READ_FROM_FILES = {
    "GLMConfig",
    "Processor",
    "configs.DecoderConfig",
    "configs.GLMConfig",
    "configs.SpeechConfig",
    "configs.TextConfig",
    "configs.VisionConfig",
    "preprocess.ImageProcessing",
    "preprocess.Processor",
    "preprocess.VideoProcessing",
}
RESULTS = {
    "device.Machine",
    "device.Prediction",
    "export.Bundle",
    "export.Verification",
    "params.Quantized",
}


def public_callables():
    """Yields the functions and classes of the facade and of its public modules, with their names.

    A method has the name of its class before its own.
    """
    for name in ge.__all__:
        value = getattr(ge, name)
        members = {name: value}
        if inspect.ismodule(value):
            names = getattr(value, "__all__", ())
            members = {f"{name}.{inner}": getattr(value, inner) for inner in names}
        for path, member in members.items():
            if inspect.isfunction(member):
                yield path, member
            elif inspect.isclass(member) and not issubclass(member, Exception):
                yield path, member
                for inner, method in vars(member).items():
                    function = getattr(method, "__func__", method)
                    if inspect.isfunction(function) and (inner[0] != "_" or inner == "__call__"):
                        yield f"{path}.{inner}", function


def parameters_of(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_no_public_function_or_class_has_more_than_ten_parameters():
    longer = {name for name, value in public_callables() if len(parameters_of(value)) > MOST}
    assert longer == READ_FROM_FILES | RESULTS


def test_no_transform_has_more_than_ten_options():
    for method in METHODS:
        assert len(parameters_of(registered(method.name))) <= MOST


def test_transforms_are_importable_from_the_public_modules():
    for module, names in {
        ge.quantize: "rtn hqq gptq awq adaround blockwise qat distill_scales activations rotate",
        ge.prune: "magnitude mask sparsegpt structured encoders depth vocabulary channels compact",
        ge: "distill reparameterize",
    }.items():
        for name in names.split():
            assert issubclass(getattr(module, name), ge.Transform)
