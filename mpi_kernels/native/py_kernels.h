/* What other py_*.c files need of Pass. */
#ifndef EMFLOW_PY_KERNELS_H
#define EMFLOW_PY_KERNELS_H

#include <Python.h>

#include "native.h"

/* The pass of a Python object `Pass`, which must be kept alive; NULL: an exception is set. */
nat_pass *nat_pass_of(PyObject *object);

#endif
