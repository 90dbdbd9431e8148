"""The suites: one module each, with a function ``cases(settings)`` that yields its cases."""

import importlib
import pkgutil

from ..case import Suite

#: Every suite by name.
SUITES: dict[str, Suite] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").cases for module in pkgutil.iter_modules(__path__)
}
