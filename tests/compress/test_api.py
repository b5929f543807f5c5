"""The public API: few parameters, and names that stay importable."""

import inspect

import glm_edge as ge

MOST = 10
# Functions that have more than `MOST` parameters until they take options as one argument.
LONGER = {"chat", "export.verify", "generate.chat", "generate.generate", "generate.stream"}


def public_functions():
    """Yields the functions of the facade and of its public modules, with their names."""
    for name in ge.__all__:
        value = getattr(ge, name)
        if inspect.ismodule(value):
            for inner in getattr(value, "__all__", ()):
                if inspect.isfunction(getattr(value, inner)):
                    yield f"{name}.{inner}", getattr(value, inner)
        elif inspect.isfunction(value):
            yield name, value


def test_no_public_function_has_more_than_ten_parameters():
    longer = {
        name
        for name, function in public_functions()
        if len(inspect.signature(function).parameters) > MOST
    }
    assert longer <= LONGER


def test_transforms_are_importable_from_the_public_modules():
    for module, names in {
        ge.quantize: "rtn hqq gptq awq adaround blockwise qat distill_scales activations rotate",
        ge.prune: "magnitude mask sparsegpt structured encoders depth vocabulary channels compact",
        ge: "distill reparameterize",
    }.items():
        for name in names.split():
            assert issubclass(getattr(module, name), ge.Transform)
