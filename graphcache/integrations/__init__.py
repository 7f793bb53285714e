"""Knows particular libraries: one module a library, and none of the libraries is imported.

Comes in: a module whose forward was just decorated. Goes out: nothing. An integration leaves a method
in the module's `__dict__`, or warns. Each has one function, `attach`, which `decorators` calls. An
integration recognises its library by the methods of the module, so it does nothing where the library
is absent.

An integration may use the wrapper of a forward (`wrappers`) and what lies below. Only `decorators`
knows of integrations.
"""
