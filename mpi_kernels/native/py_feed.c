/* What Python sees of feed.c. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "native.h"

int nat_register_feed(PyObject *module)
{
    (void)module;
    return 0;
}
