// The face of direct.h in `_C`.
#pragma once
#include <Python.h>

namespace fs::direct {

// Adds direct_setup(), and int8_linear() and its like, to the module; false with an error set.
bool add_to(PyObject* module);

}  // namespace fs::direct
